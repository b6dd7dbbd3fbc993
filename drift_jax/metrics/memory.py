"""Memory that figures may take."""

import os
import pathlib

from drift_jax.system.errors import EvaluationError

# A figure's share: the rest is the run's, its data's and the system's.
_SHARE = 0.5
# Where containers are told their limit (cgroups 2 and 1).
_LIMITS = (
  "/sys/fs/cgroup/memory.max",
  "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


def machine_memory() -> int:
  """Bytes of this machine, or of the container if that has fewer."""
  memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  for limit in map(pathlib.Path, _LIMITS):
    text = limit.read_text().strip() if limit.is_file() else ""
    if text.isdecimal():
      memory = min(memory, int(text))
  return memory


def check_fits(needed: int, what: str) -> None:
  """Refuses memory that the system would kill the process for.

  Args:
    needed: bytes.
    what: begins the message: who takes them, with the arithmetic.

  Raises:
    EvaluationError: more than half of the machine's memory.
  """
  memory = machine_memory()
  if needed > _SHARE * memory:
    raise EvaluationError(
      f"{what}: {needed / 1e9:.3g} GB, but this machine has"
      f" {memory / 1e9:.3g} GB, of which a figure may take half"
    )
