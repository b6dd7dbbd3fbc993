"""A Python process in the project's root, as a user starts it."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def call(*command, **environment) -> subprocess.CompletedProcess[str]:
  """Runs it to its end, on one CPU device; more variables by keyword."""
  return subprocess.run(
    [sys.executable, *map(str, command)],
    cwd=ROOT,
    env=os.environ
    | {
      "JAX_PLATFORMS": "cpu",
      "NO_PROXY": "127.0.0.1",
      "PYTHONPATH": str(ROOT),
    }
    | environment,
    capture_output=True,
    text=True,
    timeout=300,
  )
