"""Several processes as one program: starting them, and sums on their hosts."""

import itertools
import json
import logging
import re
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from drift_jax.system import options
from drift_jax.system.errors import UserError

# Bytes of one process that a collective moves at a time.
_CHUNK_BYTES = 2**24
HEARTBEAT_SECONDS = 100
# After so long the log says that this process waits for the others.
_PATIENCE_SECONDS = 10.0
# Texts of collectives and the coordination service about a lost process; the
# last two come from NCCL and from Orbax' barriers.
_LOST = re.compile(
  r"connection (closed|reset|refused)|gloo|socket closed|broken pipe"
  r"|coordination ?service|stopped sending heartbeats|task .* (died|failed)"
  r"|remote process exited|barrier (timed out|failed)",
  re.IGNORECASE,
)
# Start of the text if JAX raises no class of its own: a collective that fails
# while it is dispatched comes as a ValueError.
_STATUS = re.compile(r"[A-Z]+(_[A-Z]+)*: ")
_rounds = itertools.count()
# Set while JAX connects: it has a client then, of which nothing may be asked.
_connecting = threading.Event()
# The package's logger; console, which sets it up, has this module's rank.
_logger = logging.getLogger("drift_jax")


class PeerError(UserError, RuntimeError):
  """Something failed in another process; the message says which and what."""


class UnjoinedError(RuntimeError):
  """The others did not come; the message says what to look at."""


def initialize(
  coordinator: str,
  num_processes: int | None,
  process_id: int | None,
  *,
  heartbeat_timeout: int = HEARTBEAT_SECONDS,
  join_timeout: int = options.JOIN_SECONDS,
) -> None:
  """Joins this process to the others; the first thing that a program does.

  Args:
    coordinator: HOST:PORT of process 0; 'auto' if the machine tells all
      three (TPU pods, SLURM); '' for a single process, which does nothing.
    num_processes: how many there are; None for 'auto' and ''.
    process_id: 0 to num_processes - 1; None for 'auto' and ''.
    heartbeat_timeout: seconds after which a silent process counts as lost.
    join_timeout: seconds to wait for all the others.

  Raises:
    ValueError: values that don't go together or that JAX refuses.
    UnjoinedError: not all came in time. JAX still waits for them, and aborts
      the process later: it has to end now.
  """
  explicit = coordinator not in ("", "auto")
  if explicit != (num_processes is not None) or explicit != (
    process_id is not None
  ):
    raise ValueError(
      f"coordinator={coordinator!r}, num_processes={num_processes}, "
      f"process_id={process_id}: give all three, or the coordinator 'auto' "
      "alone, or none"
    )
  if not coordinator:
    return
  where = f"coordinator={coordinator!r}"
  if num_processes is not None and process_id is not None:
    if not re.fullmatch(r".+:\d+", coordinator):
      raise ValueError(f"{where} must be HOST:PORT of process 0, or 'auto'")
    if not 0 <= process_id < num_processes:
      raise ValueError(
        f"process_id={process_id} must lie in [0, num_processes="
        f"{num_processes})"
      )
    where += f", process {process_id} of {num_processes}"
    _warn_of_address(coordinator, process_id)
  _connect(
    where,
    join_timeout,
    coordinator_address=coordinator if explicit else None,
    num_processes=num_processes,
    process_id=process_id,
    # JAX aborts the process when it gives up: later than _connect.
    initialization_timeout=2 * join_timeout + 60,
    heartbeat_timeout_seconds=heartbeat_timeout,
    # The first process may write files for as long after the others are done.
    shutdown_timeout_seconds=3600,
  )


def _warn_of_address(coordinator: str, process_id: int) -> None:
  """Says at once what is probably wrong with an address.

  It is no error: the name of a host that restarts may come back, and an address
  of another machine may lead here.
  """
  host, _, port = coordinator.rpartition(":")
  try:
    family, *_, address = socket.getaddrinfo(
      host.strip("[]"), int(port), type=socket.SOCK_STREAM
    )[0]
    if process_id == 0:  # It must be an address of this machine.
      with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.bind((address[0], 0))
  except (OSError, OverflowError, UnicodeError) as error:
    _logger.warning(
      "coordinator=%r must lead to process 0%s: %s",
      coordinator,
      "" if process_id else ", which this is",
      error,
    )


def _connect(where: str, seconds: int, **arguments: Any) -> None:
  """jax.distributed.initialize in a thread: its wait can't be interrupted."""
  failed: list[Exception] = []
  joined = threading.Event()

  def connect() -> None:
    try:
      jax.distributed.initialize(**arguments)
    except (RuntimeError, ValueError, OSError) as error:
      failed.append(error)
    joined.set()

  _connecting.set()
  threading.Thread(target=connect, name="join-processes", daemon=True).start()
  if not joined.wait(min(seconds, _PATIENCE_SECONDS)):
    _logger.info("%s waits for the others, for up to %d s.", where, seconds)
    if not joined.wait(max(seconds - _PATIENCE_SECONDS, 0)):
      raise UnjoinedError(
        f"{where} did not find all the others within {seconds} s: start every "
        "process, with the same HOST:PORT of process 0, the same number of "
        "processes and its own process_id, and let no firewall close the port"
      )
  _connecting.clear()
  for error in failed:
    text = f"{where} could not join the others: {' '.join(str(error).split())}"
    # The machine's own answers may be late; a mistake stays one.
    late = arguments["coordinator_address"] is None
    if late and not isinstance(error, ValueError):
      raise UnjoinedError(text) from error
    raise ValueError(text) from error


def several() -> bool:
  """Whether this program runs in more than one process."""
  return client() is not None and jax.process_count() > 1


def client() -> Any:
  """JAX's connection to the coordination service; None if it is alone."""
  return None if _connecting.is_set() else distributed.global_state.client


def is_joining() -> bool:
  """Whether this process still waits for the others, or has given up."""
  return _connecting.is_set()


def is_lost_peer(error: BaseException) -> bool:
  """Whether an error, or what it follows from, says that a process is gone.

  An error that does not say so may still follow from it: see exits.
  """
  if not several():
    return False
  lost = False
  link: BaseException | None = error
  while link is not None:
    text = str(link)
    if "RESOURCE_EXHAUSTED" in text:
      return False
    is_status = isinstance(link, jax.errors.JaxRuntimeError) or (
      type(link) in (ValueError, RuntimeError) and _STATUS.match(text)
    )
    lost = lost or bool(is_status and _LOST.search(text))
    link = link.__cause__ or link.__context__
  return lost


def index() -> int:
  """This process' number; does not touch devices if it is alone."""
  return jax.process_index() if client() is not None else 0


def is_first() -> bool:
  """Whether this process is the one that writes files and speaks."""
  return index() == 0


def from_first(function: Callable[[], Any]) -> Any:
  """Returns the first process' value in all; the others do not call.

  What they do together has the same order in all processes. No device takes
  part, and the others wait for as long as it takes.

  Args:
    function: gives something that JSON can hold.

  Raises:
    PeerError: in the other processes, if the call raises in the first.
  """
  return _tell(function, [0])[0] if several() else function()


def from_all(function: Callable[[], Any]) -> list[Any]:
  """Returns the values of all processes, in their order, in all of them.

  All wait for all, for as long as it takes. No device takes part.

  Args:
    function: gives something that JSON can hold.

  Raises:
    PeerError: the call raises in another process.
  """
  if not several():
    return [function()]
  return _tell(function, range(jax.process_count()))


def _tell(function: Callable[[], Any], tellers: Sequence[int]) -> list[Any]:
  """Returns the values of some processes, which tell them to all."""
  key, own = f"drift_jax/told/{next(_rounds)}", index()
  if own in tellers:
    try:
      answer = {"value": function()}
    except Exception as error:
      client().key_value_set(f"{key}/{own}", json.dumps({"error": str(error)}))
      raise
    client().key_value_set(f"{key}/{own}", json.dumps(answer))
  values = []
  for process in tellers:
    answer = json.loads(_wait_for(f"{key}/{process}"))
    if "error" in answer:
      raise PeerError(f"process {process} failed: {answer['error']}")
    values.append(answer["value"])
  return values


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
