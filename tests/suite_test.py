"""A test run ends when a worker crashes or a test hangs, and names the test."""

import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.system
ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize(
  "body",
  ["os.abort()", "ctypes.CDLL(None).sleep(60)"],
  ids=["crash", "hang"],
)
def test_run_ends_and_names_the_test(tmp_path, body):
  (tmp_path / "pyproject.toml").write_text(
    (ROOT / "pyproject.toml").read_text()
  )
  tests = tmp_path / "tests"
  tests.mkdir()
  (tests / "good_test.py").write_text("def test_good():\n  pass\n")
  (tests / "bad_test.py").write_text(
    "import ctypes, os, pytest\n"
    "@pytest.mark.parametrize('number', range(3))\n"
    f"def test_bad(number):\n  if number == 1:\n    {body}\n"
  )
  done = subprocess.run(
    [sys.executable, "-m", "pytest", "-n", "2", "-o", "faulthandler_timeout=3"],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == 1, done.stderr
  assert "crashed while running 'tests/bad_test.py::test_bad[1]'" in done.stdout
