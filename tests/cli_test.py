"""Mistakes on the command line, in real processes: one line, no traceback."""

import json
import subprocess
import sys

import pytest

from tests.process import call, process_environment

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
  (("--config=digitz",), "no file 'configs/digitz.py'; valid options are ["),
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


# A project that has a package `configs` itself, and another beside it.
PROJECT = {
  "configs/__init__.py": "SEED = 6",
  "configs/common.py": "",  # not that of drift_jax
  "configs/local.py": "SEED = 7",
  "configs/mine.py": "from configs.local import SEED",
  "configs/init.py": "from configs import SEED",
  "beside/configs/local.py": "SEED = 8",
  "beside/configs/mine.py": "from configs.local import SEED",
}
GET = """

def get_config():
  from ml_collections import ConfigDict
  return ConfigDict({"seed": SEED})
"""


@pytest.mark.parametrize(
  ("name", "seed"),
  [
    ("mine", 7),
    ("configs/mine.py", 7),
    ("init", 6),
    ("digits:smoke", 0),
    ("beside/configs/mine.py", 8),
  ],
)
def test_whose_configs_a_config_imports(tmp_path, name, seed):
  for file, text in PROJECT.items():
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    get = "" if file.endswith(("__init__.py", "local.py")) else GET
    (tmp_path / file).write_text(text + get)
  program = """if True:
    import sys
    from drift_jax import config
    print(config.load_config(sys.argv[1])["seed"])
  """
  done = subprocess.run(
    [sys.executable, "-c", program, name],
    cwd=tmp_path,
    env=process_environment(),
    capture_output=True,
    text=True,
  )
  assert done.stdout == f"{seed}\n", done.stderr
