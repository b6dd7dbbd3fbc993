"""How a program ends, in one process or in several: codes and last lines.

  0    done
  1    an error
  75   to be started again: preempted, or another process was lost
  130  Ctrl-C

Where one of several processes ends for a reason of its own, the others would
wait for it in their next collective: it tells them, and they end as well.
"""

import contextlib
import itertools
import json
import logging
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils

from drift_jax import processes
from drift_jax.console import logger

ERROR = 1
RESTART = 75  # EX_TEMPFAIL of sysexits.h
INTERRUPTED = 128 + signal.SIGINT
AGAIN = "the same command goes on from the newest checkpoint"

_END = "drift_jax/end"
_ALIVE = "drift_jax/alive"
_DONE = "/done"
# How often each process says that it lives, and looks at the others.
_INTERVAL_SECONDS = 1.0
# How long a process that ends waits for the others to have heard of it.
_FAREWELL_SECONDS = 5.0


class Preempted(Exception):
  """The run was told to stop, and everything is saved; says at which step."""


def run(
  program: Callable[[], None], errors: tuple[type[Exception], ...]
) -> None:
  """Runs a program and ends its process with the code that says how it went.

  Args:
    program: joins the other processes, if there are any, by `join`.
    errors: those whose message says all that there is to say.
  """
  try:
    program()
  except errors as error:
    _end(ERROR, f"Error: {error}")
  except Preempted as error:
    _leave(RESTART, f"{error}; {AGAIN}.")
    return
  except KeyboardInterrupt:
    _end(INTERRUPTED, f"Interrupted: {AGAIN}.")
  except Exception as error:
    if processes.is_lost_peer(error):
      reason = " ".join(str(error).split())[:200]
      _end(RESTART, f"Another process was lost ({reason}); {AGAIN}.", lost=1)
    if not processes.several():
      raise
    traceback.print_exc()
    _end(ERROR, f"Error: {type(error).__name__}: {error}")
  _leave(0, "")


def join(
  coordinator: str,
  num_processes: int | None,
  process_id: int | None,
  *,
  heartbeat_timeout: int = processes.HEARTBEAT_SECONDS,
) -> None:
  """`processes.initialize`; then watches whether the others are well."""
  processes.initialize(
    coordinator,
    num_processes,
    process_id,
    heartbeat_timeout=heartbeat_timeout,
  )
  if processes.several():
    _Watch(heartbeat_timeout).start()


class _Watch(threading.Thread):
  """Ends this process where another has ended or is lost.

  A collective can wait for a lost process for ever. JAX's own heartbeat aborts
  the process then; this one is a little earlier and says what to do.
  """

  def __init__(self, heartbeat_timeout: float):
    super().__init__(name="watch-processes", daemon=True)
    self._patience = heartbeat_timeout - min(0.5 * heartbeat_timeout, 10.0)
    # {process: (its last sign of life, when it was new)}, in the first.
    self._seen: dict[str, tuple[str, float]] = {}

  def run(self) -> None:
    client, own = processes.client(), jax.process_index()
    for number in range(sys.maxsize):
      time.sleep(_INTERVAL_SECONDS)
      if _ending.locked():
        return
      try:
        client.key_value_set(
          f"{_ALIVE}/{own}", str(number), allow_overwrite=True
        )
        ended = _last_words(client)
        silent = None if own else self._silent(client)
      except jax.errors.JaxRuntimeError:
        continue  # JAX ends a process that can't reach the service.
      if ended is not None:
        code, process, reason = ended
        text = reason.removeprefix("Error: ")
        start = "Error: process" if code == ERROR else "Process"
        _end(code, f"{start} {process} ended first: {text}")
      if silent is not None:
        _end(
          RESTART,
          f"Process {silent} was lost: no sign of life for "
          f"{self._patience:.0f} s; {AGAIN}.",
          lost=1,
        )

  def _silent(self, client: Any) -> int | None:
    """A process that has said nothing new for too long."""
    now = time.monotonic()
    for key, sign in client.key_value_dir_get(_ALIVE):
      if key.endswith(_DONE):  # It waits for the others in `_leave`.
        self._seen[key.removesuffix(_DONE)] = (sign, math.inf)
      elif self._seen.get(key, ("", 0.0))[0] != sign:
        self._seen[key] = (sign, now)
    for key, (_, since) in self._seen.items():
      if now - since > self._patience:
        return int(key.rpartition("/")[2])
    return None


# Held for ever by the thread that ends this process.
_ending = threading.Lock()


def _last_words(client: Any) -> tuple[int, int, str] | None:
  """(exit code, process, reason) of the first process that ended."""
  try:
    code, process, reason = json.loads(client.key_value_try_get(_END))
    return code, process, reason
  except jax.errors.JaxRuntimeError as error:
    if "NOT_FOUND" in str(error):
      return None
    raise


def _end(code: int, message: str, *, lost: int = 0) -> NoReturn:
  """Says why this process ends, here and to the others, and ends it.

  Args:
    code, message: of the exit.
    lost: how many of the others can't be told any more.
  """
  if not processes.several():
    if code == ERROR:
      sys.exit(message)
    logger.info(message)
    sys.exit(code)
  _only_once()
  if code == ERROR:
    sys.stderr.write(f"{message}\n")
  else:
    logger.log(
      logging.INFO if code == INTERRUPTED else logging.WARNING, message
    )
  client = processes.client()
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    words = json.dumps([code, jax.process_index(), message])
    client.key_value_set(_END, words)
  if code != RESTART:  # Else one will never come.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      client.wait_at_barrier(_END, int(_FAREWELL_SECONDS * 1000))
  if processes.is_first() and jax.process_count() - 1 > lost:
    # The service ends with this process, and JAX would abort the others.
    time.sleep(2 * _INTERVAL_SECONDS)
  _exit_now(code)


def _leave(code: int, message: str) -> None:
  """Ends this process when all the others have come to the same end.

  A single process that is done returns.
  """
  if message:
    logger.info(message)
  if not processes.several():
    if code:
      sys.exit(code)
    return
  _only_once()
  key = f"{_ALIVE}/{jax.process_index()}{_DONE}"
  processes.client().key_value_set(key, "")
  jax.distributed.shutdown()
  _exit_now(code)


def _only_once() -> None:
  """Waits for ever where another thread is ending this process already."""
  if not _ending.acquire(blocking=False):
    threading.Event().wait()


def _exit_now(code: int) -> NoReturn:
  """Without waiting for threads that may wait for lost processes."""
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


# Numbers the questions whether to stop: JAX wants one increasing series, the
# same in all processes.
_questions = itertools.count(1)


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[], bool]]:
  """Yields what tells whether to stop now, by SIGTERM.

  A SIGTERM to any process makes all of them stop at the same question, if all
  ask equally often: between training steps and the batches of evaluations.
  Nobody else may ask JAX, and after a yes nobody may ask again.
  """
  if processes.several():
    # JAX has taken the signal over since the processes joined.
    yield lambda: multihost_utils.reached_preemption_sync_point(
      next(_questions)
    )
    return
  told = threading.Event()

  def handle(number: int, frame: FrameType | None) -> None:
    del number, frame
    told.set()

  if threading.current_thread() is not threading.main_thread():
    yield lambda: False  # Only the main thread may handle signals.
    return
  before = signal.signal(signal.SIGTERM, handle)
  try:
    yield told.is_set
  finally:
    if not told.is_set():  # Else a second one must not disturb the end.
      signal.signal(signal.SIGTERM, before)


def stop_on_sigterm() -> None:
  """Until `preemption` takes over: SIGTERM ends a program that has no state."""

  def handle(number: int, frame: FrameType | None) -> NoReturn:
    del number, frame
    raise Preempted("Told to stop before the first step")

  if not processes.several():
    signal.signal(signal.SIGTERM, handle)
