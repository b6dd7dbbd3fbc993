"""Several processes as one program: starting them, and sums on their hosts."""

import itertools
import json
import os
import re
import sys
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

# Bytes of one process that a collective moves at a time.
_CHUNK_BYTES = 2**24
# How long processes wait for each other at the start; where JAX itself gives
# up, it ends the process without a Python exception.
_JOIN_SECONDS = 45
HEARTBEAT_SECONDS = 100
# What collectives and the coordination service say where a process is gone;
# the last two are of NCCL and of Orbax' barriers.
_LOST = re.compile(
  r"connection (closed|reset|refused)|gloo|socket closed|broken pipe"
  r"|coordination ?service|stopped sending heartbeats|task .* (died|failed)"
  r"|remote process exited|barrier (timed out|failed)",
  re.IGNORECASE,
)
_rounds = itertools.count()


class PeerError(RuntimeError):
  """Something failed in another process; the message says which and what."""


def initialize(
  coordinator: str,
  num_processes: int | None,
  process_id: int | None,
  *,
  heartbeat_timeout: int = HEARTBEAT_SECONDS,
) -> None:
  """Joins this process to the others; the first thing that a program does.

  Where the others can't be reached within a minute, the process ends with one
  line and exit code 1: JAX would abort it.

  Args:
    coordinator: HOST:PORT of process 0; 'auto' where the machine tells all
      three (TPU pods, SLURM); '' for a single process, which does nothing.
    num_processes: how many there are; None for 'auto' and ''.
    process_id: 0 to num_processes - 1; None for 'auto' and ''.
    heartbeat_timeout: seconds after which a silent process counts as lost.

  Raises:
    ValueError: values that don't go together or that JAX refuses.
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
    if not re.fullmatch(r".+:\d+", coordinator):
      raise ValueError(
        f"coordinator={coordinator!r} must be HOST:PORT of process 0, or 'auto'"
      )
    if not 0 <= process_id < num_processes:
      raise ValueError(
        f"process_id={process_id} must lie in [0, num_processes="
        f"{num_processes})"
      )
  where = (
    f"coordinator={coordinator!r}, process {process_id} of {num_processes}"
    if explicit
    else f"coordinator={coordinator!r}"
  )
  give_up = threading.Timer(_JOIN_SECONDS, _end_unjoined, [where])
  give_up.daemon = True
  give_up.start()
  try:
    jax.distributed.initialize(
      coordinator if explicit else None,
      num_processes,
      process_id,
      initialization_timeout=2 * _JOIN_SECONDS,
      heartbeat_timeout_seconds=heartbeat_timeout,
      # For as long as the first may write files that the others do not.
      shutdown_timeout_seconds=3600,
    )
  except (RuntimeError, ValueError) as error:
    text = " ".join(str(error).split())
    raise ValueError(f"{where} could not join the others: {text}") from error
  finally:
    give_up.cancel()


def _end_unjoined(where: str) -> None:
  """Ends this process, which still waits for the others."""
  sys.stderr.write(
    f"Error: processes: {where} did not find all the others within "
    f"{_JOIN_SECONDS} s: start every process, with the same HOST:PORT of "
    "process 0, the same number of processes and its own process_id, and let "
    "no firewall close the port\n"
  )
  sys.stderr.flush()
  os._exit(1)


def several() -> bool:
  """Whether this program runs in more than one process."""
  return client() is not None and jax.process_count() > 1


def client() -> Any:
  """JAX's connection to the coordination service; None if it is alone."""
  return distributed.global_state.client


def is_lost_peer(error: BaseException) -> bool:
  """Whether an error says that another process of the program is gone."""
  if not several():
    return False
  seen: BaseException | None = error
  while seen is not None:
    text = str(seen)
    if "RESOURCE_EXHAUSTED" in text:
      return False
    if isinstance(seen, jax.errors.JaxRuntimeError) and _LOST.search(text):
      return True
    seen = seen.__cause__ or seen.__context__
  return False


def index() -> int:
  """This process' number; does not touch devices where it is alone."""
  return jax.process_index() if client() is not None else 0


def is_first() -> bool:
  """Whether this process is the one that writes files and speaks."""
  return index() == 0


def from_first(function: Callable[[], Any]) -> Any:
  """What the first process' call returns, in all; the others do not call.

  What they do together has the same order in all processes. No device takes
  part, and the others wait for as long as it takes.

  Args:
    function: gives something that JSON can hold.

  Raises:
    PeerError: in the other processes, where the call raises in the first.
  """
  if not several():
    return function()
  key = f"drift_jax/from_first/{next(_rounds)}"
  return _told(key, function) if is_first() else _heard(key, 0)


def from_all(function: Callable[[], Any]) -> list[Any]:
  """What the call returns in each process, in their order, in all of them.

  All wait for all, for as long as it takes. No device takes part.

  Args:
    function: gives something that JSON can hold.

  Raises:
    PeerError: where the call raises in another process.
  """
  if not several():
    return [function()]
  key = f"drift_jax/from_all/{next(_rounds)}"
  value = _told(f"{key}/{index()}", function)
  return [
    value if process == index() else _heard(f"{key}/{process}", process)
    for process in range(jax.process_count())
  ]


def _told(key: str, function: Callable[[], Any]) -> Any:
  """What a call returns; the other processes are told it, or its error."""
  try:
    value = function()
  except Exception as error:
    client().key_value_set(key, json.dumps({"error": str(error)}))
    raise
  client().key_value_set(key, json.dumps({"value": value}))
  return value


def _heard(key: str, process: int) -> Any:
  """What another process' call returned."""
  answer = json.loads(_wait_for(key))
  if "error" in answer:
    raise PeerError(f"process {process} failed: {answer['error']}")
  return answer["value"]


def _wait_for(key: str) -> str:
  while True:
    try:
      return client().blocking_key_value_get(key, 60_000)
    except jax.errors.JaxRuntimeError as error:
      if "DEADLINE_EXCEEDED" not in str(error):
        raise


def fetch(tree: Any) -> Any:
  """Arrays of a mesh over all processes as NumPy arrays, on every host.

  One array after the other is on every device as a whole.
  """
  return jax.tree.map(
    lambda x: (
      np.asarray(multihost_utils.process_allgather(x, tiled=True))
      if isinstance(x, jax.Array) and not x.is_fully_addressable
      else np.asarray(jax.device_get(x))
    ),
    tree,
  )


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
