"""Several processes as one program: starting them, and sums on their hosts."""

import jax
import numpy as np
from jax.experimental import multihost_utils

# Bytes of one process that a collective moves at a time.
_CHUNK_BYTES = 2**24


def initialize(
  coordinator: str, num_processes: int | None, process_id: int | None
) -> None:
  """Joins this process to the others; the first thing that a program does.

  Args:
    coordinator: HOST:PORT of process 0; 'auto' where the machine tells all
      three (TPU pods, SLURM); '' for a single process, which does nothing.
    num_processes: how many there are; None for 'auto' and ''.
    process_id: 0 to num_processes - 1; None for 'auto' and ''.

  Raises:
    ValueError: values that don't go together, or a coordinator that can't be
      reached within a minute.
  """
  explicit = coordinator not in ("", "auto")
  given = num_processes is not None, process_id is not None
  if given != (explicit, explicit):
    raise ValueError(
      f"coordinator={coordinator!r}, num_processes={num_processes}, "
      f"process_id={process_id}: give all three, or the coordinator 'auto' "
      "alone, or none"
    )
  if not coordinator:
    return
  if explicit:
    assert num_processes is not None and process_id is not None
    if not 0 <= process_id < num_processes:
      raise ValueError(
        f"process_id={process_id} must lie in [0, num_processes="
        f"{num_processes})"
      )
  try:
    if explicit:
      jax.distributed.initialize(
        coordinator, num_processes, process_id, initialization_timeout=60
      )
    else:
      jax.distributed.initialize()
  except (RuntimeError, ValueError) as error:
    text = " ".join(str(error).split())
    raise ValueError(
      f"coordinator={coordinator!r} was not reached: {text}"
    ) from error


def is_first() -> bool:
  """Whether this process is the one that writes files and speaks."""
  return jax.process_index() == 0


def gather(array: np.ndarray) -> list[np.ndarray]:
  """The arrays of all processes, in their order, on every host, bit by bit.

  JAX's own collectives would round float64 to float32.

  Args:
    array: [n, ...]; n may differ between processes, dtype and the other axes
      may not.
  """
  if jax.process_count() == 1:
    return [array]
  lengths = _allgather(np.asarray([len(array)], np.int64))[:, 0]
  if not lengths.any():
    return [array] * len(lengths)
  padded = np.zeros((int(lengths.max()), *array.shape[1:]), array.dtype)
  padded[: len(array)] = array
  return [rows[:n] for rows, n in zip(_allgather(padded), lengths, strict=True)]


def total(array: np.ndarray) -> np.ndarray:
  """Sum over the processes, added in their order, on every host.

  Args:
    array: [n, ...], of one shape and dtype in all processes. Beside it, one
      piece of 16 MiB of each process is in memory at a time.
  """
  if jax.process_count() == 1:
    return array
  rows = max(1, _CHUNK_BYTES // max(array[:1].nbytes, 1))
  parts = [
    _allgather(array[start : start + rows]).sum(axis=0, dtype=array.dtype)
    for start in range(0, len(array), rows)
  ]
  return np.concatenate(parts) if parts else array


def _allgather(array: np.ndarray) -> np.ndarray:
  """[P, ...] of arrays [...] that have one shape."""
  raw = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
  gathered = np.asarray(multihost_utils.process_allgather(raw))
  return gathered.view(array.dtype).reshape(-1, *array.shape)
