"""Python processes in the project's root, as a user starts them."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
# The folder of what the processes of one test session have compiled.
COMPILED = "DRIFT_JAX_TESTS_COMPILED"


def process_environment(devices: int = 1) -> dict[str, str]:
  """Variables of a process of so many CPU devices.

  What one of the session's processes has compiled, the others take from a
  folder.
  """
  return os.environ | {
    "JAX_NUM_CPU_DEVICES": str(devices),
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": os.environ[COMPILED],
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "NO_PROXY": "127.0.0.1",
    "PYTHONPATH": str(ROOT),
    # Compiled modules are kept, whatever the environment says: hundreds of
    # processes start.
    "PYTHONDONTWRITEBYTECODE": "",
  }


def call(
  *command: object, devices: int = 1, timeout: float = 300, **variables: str
) -> subprocess.CompletedProcess[str]:
  """Runs python with these arguments to its end; returns what it said.

  Args:
    *command: arguments of python, such as "-m", "drift_jax.main".
    devices: number of CPU devices.
    timeout: seconds after which the process is killed.
    **variables: more environment variables.
  """
  return subprocess.run(
    [sys.executable, *map(str, command)],
    cwd=ROOT,
    env=process_environment(devices) | variables,
    capture_output=True,
    text=True,
    timeout=timeout,
  )
