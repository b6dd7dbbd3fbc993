"""Mistakes on the command line, in real processes: one line, no traceback."""

import json

import pytest
from ml_collections import ConfigDict

from configs import digits
from drift_jax.system.errors import ERRORS
from drift_jax.tasks.generator import train
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
    ("unknown key drift.temprature='1': did you mean temperatures or",),
  ),
  (
    (SMOKE, "--config.model.depth=two"),
    ("model.depth='two' can't be read as int", "the config file's model.dep"),
  ),
  ((SMOKE, "--config.seed=-1"), ("seed=-1 must lie in",)),
  (
    ("--config=configs/models.py",),
    ("models.py has no get_config()", "'configs/digits.py'"),
  ),
  (
    ("--config=~nobody-here/digits.py:smoke",),
    ("no home folder of 'nobody-here'", "~nobody-here/digits.py"),
  ),
  (
    (SMOKE, "--config.data.source=folder:~nobody-here/x"),
    ("data.source='folder:~nobody-here/x'", "no home folder of"),
  ),
  (
    ("--config=configs/digits.py:smok",),
    ("variant 'smok': valid options are", "'smoke'"),
  ),
)


def test_main_before_anything_heavy(tmp_path):
  workdir = tmp_path / "never"
  cases = [(f"--workdir={workdir}", *given) for given, _ in MISTAKES]
  done = call("-c", EACH, json.dumps(cases))
  assert done.stdout.splitlines() == ["False 1"] * len(cases), done
  lines = done.stderr.splitlines()
  for (_, parts), line in zip(MISTAKES, lines, strict=True):
    assert line.startswith("Error: ")
    for part in parts:
      assert part in line
  assert not workdir.exists()


@pytest.mark.parametrize(
  ("variant", "changes", "message"),
  [
    ("smoke", {"mesh.fsdp": 3}, "mesh.*fsdp=3 does not fit 8 devices"),
    (
      "features,smoke",
      {"encoders.mae.path": "/nowhere"},
      "encoders.mae: no exported model in /nowhere",
    ),
  ],
)
def test_a_run_before_its_workdir(tmp_path, variant, changes, message):
  workdir = tmp_path / "never"
  config = ConfigDict(digits.get_config(variant))
  config.update_from_flattened_dict(changes)
  with pytest.raises(ERRORS, match=message):
    train.train_and_evaluate(config, str(workdir))
  assert not workdir.exists()


@pytest.mark.system
def test_main_while_it_trains(tmp_path):
  """A real divergence takes long to compile; train_test has one."""
  program = """if True:
    import sys
    from drift_jax import config as config_lib
    from drift_jax import main
    from drift_jax.system.errors import DataError
    from drift_jax.tasks.generator import train
    from drift_jax.training import loop

    def fail(config, workdir):
      raise errors.pop(0)

    train.train_and_evaluate = fail
    main.define_flags()
    config_lib.parse_flags(sys.argv)
    errors = [
      loop.NonFiniteError("step 3 is not finite"),
      DataError("a/1.png is 8 x 8"),
      FileNotFoundError(2, "No such file or directory", "a/2.png"),
      KeyboardInterrupt(),
    ]
    while errors:
      try:
        main.main(sys.argv[:1])
      except SystemExit as ended:
        print(ended.code)
  """
  done = call("-c", program, SMOKE, f"--workdir={tmp_path}")
  assert done.stdout.splitlines() == [
    "Error: step 3 is not finite",
    "Error: a/1.png is 8 x 8",
    "Error: [Errno 2] No such file or directory: 'a/2.png'",
    "130",
  ]
  assert done.stderr.count("\n") == 1 and "Interrupted: " in done.stderr
