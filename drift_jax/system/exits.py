"""Ends of a program, in one process or in several: codes and last lines.

  0    done
  1    an error
  75   to be started again: preempted, or another process was lost
  130  Ctrl-C

If one of several processes ends for a reason of its own, the others would wait
for it in their next collective: it tells them, and they end as well. An error
in one process may follow from the end of another one: its cause is sought
before it is shown.
"""

import contextlib
import itertools
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

from drift_jax.system import console, processes
from drift_jax.system.console import logger
from drift_jax.system.errors import ERRORS, naming

ERROR = 1
RESTART = 75  # EX_TEMPFAIL of sysexits.h
INTERRUPTED = 128 + signal.SIGINT
# Remedies after codes 75 and 130: for a run, for a program without a state.
AGAIN = "the same command goes on from the newest checkpoint"
ANEW = "start the same command again"

_LOST = "Another process was lost"
_END = "drift_jax/end"
_ALIVE = "drift_jax/alive"
_LEAVE = "drift_jax/leave"
# Time between two signs of life of a process, and between its looks at others.
_INTERVAL_SECONDS = 1.0
# A process that ends waits so long until the others have heard of it.
_FAREWELL_SECONDS = 5.0
# A process that failed waits so long for the others' next signs of life.
_DOUBT_SECONDS = 10.0
# A process that is done waits so long for those that still write files.
_LEAVE_SECONDS = 3600.0


class Preempted(Exception):
  """The run was told to stop, and everything is saved; says at which step."""


def run(program: Callable[[], None], *, again: str = AGAIN) -> None:
  """Runs a program and ends its process with the code that says how it went.

  Args:
    program: joins the other processes, if there are any, by `join`.
    again: what to do if it did not come to its end.
  """
  try:
    program()
  except processes.UnjoinedError as error:
    logger.warning("processes: %s; %s.", error, again)
    _exit_now(RESTART)
  except Preempted as error:
    logger.info("%s; %s.", error, again)
    _leave(INTERRUPTED if _interrupted.is_set() else RESTART, again)
  except KeyboardInterrupt:
    _end(INTERRUPTED, f"Interrupted: {again}.")
  except Exception as error:
    if processes.several():
      _end_for(error, again)
    if not isinstance(error, ERRORS):
      raise
    _end(ERROR, f"Error: {error}")
  else:
    _leave(0, again)


def join(
  coordinator: str,
  num_processes: int | None,
  process_id: int | None,
  *,
  again: str = AGAIN,
  **timeouts: int,
) -> None:
  """`processes.initialize`; then watches whether the others are well.

  Args:
    coordinator, num_processes, process_id, timeouts: see there.
    again: as `run` has it. A program without a state, which is to be started
      anew, never asks for `preemption`: SIGTERM kills it.

  Raises:
    ConfigError: values that don't go together or that JAX refuses.
    UnjoinedError: not all came in time.
  """
  if again != AGAIN:
    jax.config.update("jax_enable_preemption_service", False)
  with naming("processes"):
    processes.initialize(coordinator, num_processes, process_id, **timeouts)
  console.setup(processes.index())
  if processes.several():
    # A little earlier than JAX's own heartbeat, which aborts the process.
    heartbeat = timeouts.get("heartbeat_timeout", processes.HEARTBEAT_SECONDS)
    patience = heartbeat - min(0.5 * heartbeat, 10.0)
    watch = threading.Thread(target=_watch, args=(patience, again), daemon=True)
    watch.start()


def _watch(patience: float, again: str) -> None:
  """Ends this process if another has ended or is lost.

  A collective can wait for a lost process for ever.

  Args:
    patience: seconds without a sign of life after which a process is lost; the
      first process looks.
    again: as `run` has it.
  """
  own = jax.process_index()
  # {process: (its last sign of life, when it was new)}
  seen: dict[int, tuple[str, float]] = {}
  for number in itertools.count():
    end, signs = None, {}
    # JAX ends a process that can't reach the service.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      processes.client().key_value_set(
        f"{_ALIVE}/{own}", str(number), allow_overwrite=True
      )
      end = _first_end()
      signs = {} if own else _signs()
    if _ending.locked():
      return
    if end is not None and not _failed.is_set():
      _end(*end)
    now = time.monotonic()
    for process, sign in signs.items():
      if process not in seen or seen[process][0] != sign:
        seen[process] = (sign, now)
      elif now - seen[process][1] > patience:
        silence = f"no sign of life for {patience:.0f} s"
        _end(
          RESTART, f"Process {process} was lost: {silence}; {again}.", lost=1
        )
    time.sleep(_INTERVAL_SECONDS)


# Held for ever by the thread that ends this process.
_ending = threading.Lock()
# Set when this process ends by an error, and looks for the cause.
_failed = threading.Event()


def _first_end() -> tuple[int, str] | None:
  """(exit code, message) of a process that ends because another one has."""
  try:
    text = processes.client().key_value_try_get(_END)
  except jax.errors.JaxRuntimeError as error:
    if "NOT_FOUND" in str(error):
      return None
    raise
  code, process, reason = json.loads(text)
  start = "Error: process" if code == ERROR else "Process"
  reason = reason.removeprefix("Error: ")
  return code, f"{start} {process} ended first: {reason}"


def _signs() -> dict[int, str]:
  """{process: its newest sign of life, '' before the first one}."""
  signs = dict.fromkeys(range(jax.process_count()), "")
  for key, sign in processes.client().key_value_dir_get(_ALIVE):
    signs[int(key.rpartition("/")[2])] = sign
  return signs


def _end_for(error: Exception, again: str) -> NoReturn:
  """Ends one of several processes, by what an error follows from."""
  _failed.set()
  cause = cause_of(error)
  if cause is not None:
    code, message = cause
    if message.startswith(_LOST):
      _end(code, f"{message}; {again}.", lost=1)
    _end(code, message)
  if isinstance(error, ERRORS):
    _end(ERROR, f"Error: {error}")
  traceback.print_exception(error)
  _end(ERROR, f"Error: {type(error).__name__}: {error}")


def cause_of(error: BaseException) -> tuple[int, str] | None:
  """The end of another process, if an error follows from it.

  The text of an error of JAX may tell. For any other error the other processes
  do: as long as all of them give signs of life, the error is this process' own.

  Returns:
    None for an error of this process; else (exit code, message) that this
    process ends with.
  """
  told = isinstance(error, Preempted) or not isinstance(error, Exception)
  if told or not processes.several():
    return None
  known = vars(error)
  if "drift_jax_cause" not in known:
    try:
      cause = _find_cause(error)
    except jax.errors.JaxRuntimeError as gone:  # the first, with the service
      cause = _lost(gone)
    known["drift_jax_cause"] = cause
  return known["drift_jax_cause"]


def _find_cause(error: BaseException) -> tuple[int, str] | None:
  lost = processes.is_lost_peer(error)
  before = _signs()
  deadline = time.monotonic() + _DOUBT_SECONDS
  while True:
    end = _first_end()
    if end is not None and (lost or end[0] != ERROR):
      return end
    if lost:
      return _lost(error)
    waiting = [n for n, sign in _signs().items() if sign in ("", before[n])]
    if end is not None or not waiting:
      return None
    if time.monotonic() > deadline:
      numbers = ", ".join(map(str, waiting))
      return _lost(error, f"no sign of life of {numbers} after: ")
    time.sleep(0.2)


def _lost(error: BaseException, found: str = "") -> tuple[int, str]:
  text = " ".join(str(error).split())[:200]
  return RESTART, f"{_LOST} ({found}{text})"


def _end(code: int, message: str, *, lost: int = 0) -> NoReturn:
  """Says why this process ends, here and to the others, and ends it.

  Args:
    code, message: exit code and last line.
    lost: number of processes that can't be told any more.
  """
  if not processes.several():
    if code == ERROR:
      sys.exit(message)
    logger.info(message)
    if processes.is_joining():
      _exit_now(code)
    sys.exit(code)
  _only_once()
  if code == ERROR:
    sys.stderr.write(f"{message}\n")
  else:
    level = logging.INFO if code == INTERRUPTED else logging.WARNING
    logger.log(level, message)
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


def _leave(code: int, again: str) -> None:
  """Ends this process when all the others have come to the same end.

  A single process that is done returns.
  """
  if processes.several():
    try:
      # Not in JAX's shutdown, which hears of no other end.
      processes.client().wait_at_barrier(_LEAVE, int(1000 * _LEAVE_SECONDS))
    except jax.errors.JaxRuntimeError as error:
      _end_for(error, again)
    _only_once()
    jax.distributed.shutdown()
    _exit_now(code)
  if _left_behind.is_set():
    _exit_now(code)
  if code:
    sys.exit(code)


# Set once something may hold up an orderly end of this process.
_left_behind = threading.Event()


def leave_behind() -> None:
  """Lets this process end without waiting for what its libraries still do."""
  _left_behind.set()


def _only_once() -> None:
  """Waits for ever if another thread is ending this process already."""
  if not _ending.acquire(blocking=False):
    threading.Event().wait()


def give_up(message: str) -> NoReturn:
  """Ends this process, from any thread, and the others because of an error."""
  if processes.several():
    _end(ERROR, f"Error: {message}")
  _only_once()
  sys.stderr.write(f"Error: {message}\n")
  _exit_now(ERROR)


# Actions that must precede the end of this process, however it ends.
_last: list[Callable[[], None]] = []


@contextlib.contextmanager
def last(action: Callable[[], None]) -> Iterator[None]:
  """Meanwhile: an end in another thread does it first.

  It may be called while the program's own thread goes on.
  """
  _last.append(action)
  try:
    yield
  finally:
    _last.remove(action)


def _exit_now(code: int) -> NoReturn:
  """Without waiting for threads that may wait for lost processes."""
  for action in _last:
    action()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


# Whether Ctrl-C was the reason to stop.
_interrupted = threading.Event()
# Numbers the questions whether to stop: JAX wants one increasing series, the
# same in all processes.
_questions = itertools.count(1)


@contextlib.contextmanager
def preemption() -> Iterator[Callable[[], bool]]:
  """Yields a function that tells whether to stop now, by SIGTERM.

  In a single process also by Ctrl-C; a second one interrupts at once.
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
  if threading.current_thread() is not threading.main_thread():
    yield lambda: False  # Only the main thread may handle signals.
    return
  told = threading.Event()

  def handle(number: int, frame: FrameType | None) -> None:
    del frame
    told.set()
    if number == signal.SIGINT:
      _interrupted.set()
      signal.signal(number, signal.default_int_handler)
      logger.info("Interrupted: this step ends and is saved (again: at once).")

  before = {
    number: signal.signal(number, handle)
    for number in (signal.SIGTERM, signal.SIGINT)
    # A shell that starts a program with & has it ignored.
    if signal.getsignal(number) is not signal.SIG_IGN
  }
  try:
    yield told.is_set
  finally:
    if not told.is_set():  # Else a second SIGTERM must not disturb the end.
      for number, handler in before.items():
        signal.signal(number, handler)


def stop_on_sigterm() -> None:
  """Until `preemption` takes over: SIGTERM ends a program that has no state.

  At once: what a handler raises is lost if it comes while Python calls back
  from C++, and Python's own end may crash on what XLA still does.
  """

  def handle(number: int, frame: FrameType | None) -> NoReturn:
    del number, frame
    logger.info("Told to stop before the first step; %s.", AGAIN)
    _exit_now(RESTART)

  if not processes.several():
    signal.signal(signal.SIGTERM, handle)
