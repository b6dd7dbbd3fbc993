"""Python processes in the project's root, as a user starts them."""

import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

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


def free_port() -> int:
  with socket.socket() as server:
    server.bind(("127.0.0.1", 0))
    return server.getsockname()[1]


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
  """Waits until it is true; fails when that takes longer."""
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline, f"nothing happened within {seconds} s"
    time.sleep(0.01)


def call_together(
  *commands: Sequence[object], devices: int = 1, **variables: str
) -> None:
  """Runs python with each of these arguments, at once; all must succeed."""
  environment = process_environment(devices) | variables
  running = [
    subprocess.Popen(
      [sys.executable, *map(str, command)],
      cwd=ROOT,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for command in commands
  ]
  try:
    said = [process.communicate(timeout=240)[0] for process in running]
  finally:
    for process in running:
      process.kill()
  for process, text in zip(running, said, strict=True):
    assert process.returncode == 0, text[-4000:]


def call(
  *command: object,
  devices: int = 1,
  timeout: float = 300,
  cwd: str | os.PathLike[str] = ROOT,
  **variables: str,
) -> subprocess.CompletedProcess[str]:
  """Runs python with these arguments to its end; returns what it said.

  Args:
    *command: arguments of python, such as "-m", "drift_jax.main".
    devices: number of CPU devices.
    timeout: seconds after which the process is killed.
    cwd: the folder it starts in.
    **variables: more environment variables.
  """
  return subprocess.run(
    [sys.executable, *map(str, command)],
    cwd=cwd,
    env=process_environment(devices) | variables,
    capture_output=True,
    text=True,
    timeout=timeout,
  )
