"""Mistakes on the command line, in real processes: one line, no traceback."""

import json

from tests.process import call

SMOKE = "--config=configs/digits.py:smoke"
# One program, once for each list of arguments, in a process of its own; the
# exit codes are printed. Nothing heavy is imported before a mistake is seen.
EACH = """if True:
  import json
  import os
  import sys
  from absl import app
  from drift_jax import config, main

  cases = json.loads(sys.argv[1])
  for arguments in cases:
    child = os.fork()
    if not child:
      sys.argv[1:] = arguments
      main.define_flags()
      try:
        app.run(main.main, flags_parser=config.parse_flags)
      finally:
        print("jax" in sys.modules, end=" ", flush=True)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""
MISTAKES = (
  (
    (SMOKE, "--config.drift.temprature=1"),
    "drift.temprature='1': did you mean",
  ),
  ((SMOKE, "--config.model.depth=two"), "depth='two' can't be read as int"),
  ((SMOKE, "--config.seed=-1"), "seed=-1 must be at least 0"),
  (("--config=configs/models.py",), "models.py has no get_config()"),
  (("--config=~nobody-here/digits.py:smoke",), "no home folder of 'nobody-her"),
)


def test_main_before_anything_heavy(tmp_path):
  workdir = tmp_path / "never"
  cases = [(f"--workdir={workdir}", *given) for given, _ in MISTAKES]
  done = call("-c", EACH, json.dumps(cases))
  assert done.stdout.splitlines() == ["False 1"] * len(cases), done
  lines = done.stderr.splitlines()
  for (_, part), line in zip(MISTAKES, lines, strict=True):
    assert line.startswith("Error: ") and part in line
  assert not workdir.exists()
