"""Messages of a run on the terminal: one line an event, nothing else."""

import argparse
import contextlib
import logging
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

from absl import logging as absl_logging
from tqdm import tqdm

logger = logging.getLogger("drift_jax")

# Between two lines of progress if there is no terminal to draw a bar on.
LOG_SECONDS = 30.0


def _is_news(record: logging.LogRecord) -> bool:
  """False for errors in Orbax' threads: it logs each, and raises the first.

  Those of TensorStore's database that come after it have no traceback.
  """
  if not record.exc_info:
    return True
  _, error, trace = record.exc_info
  names = [f.f_code.co_filename for f, _ in traceback.walk_tb(trace)]
  return "OCDBT" not in str(error) and not any(
    "/orbax/" in name for name in [record.pathname, *names]
  )


def _unraisable(found: "sys.UnraisableHookArgs") -> None:
  """Shows all but what TensorStore tells an event loop of Orbax that is over.

  It does for each write after the first that failed, of which Orbax raises.
  """
  if found.object is not None or str(found.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(found)


class _Handler(logging.Handler):
  """Writes above a progress bar, if there is one, without breaking it."""

  def emit(self, record: logging.LogRecord) -> None:
    tqdm.write(self.format(record), file=sys.stderr)


def setup(process: int = 0) -> None:
  """Sends this package's messages to stderr; other packages' only from
  warnings up. Called by entry points, never at import.

  Args:
    process: number of the process that speaks. All but the first show only
      warnings, after their number.
  """
  handler = _Handler()
  number = f"process {process}: " if process else ""
  handler.setFormatter(
    logging.Formatter(f"%(asctime)s {number}%(message)s", "%H:%M:%S")
  )
  logger.handlers[:] = [handler]
  logger.propagate = False
  # It has a handler, too: each message would come twice.
  logging.getLogger("huggingface_hub").propagate = False
  logger.setLevel(logging.WARNING if process else logging.INFO)
  absl_logging.set_verbosity(absl_logging.WARNING)
  for noisy in (absl_logging.get_absl_logger(), logging.getLogger("asyncio")):
    noisy.addFilter(_is_news)
  sys.unraisablehook = _unraisable


def shows_bars() -> bool:
  """Whether progress is a bar on a terminal, which one process draws."""
  return sys.stderr.isatty() and logger.isEnabledFor(logging.INFO)


class Parser(argparse.ArgumentParser):
  """Says mistakes on the command line in one line."""

  def error(self, message: str) -> NoReturn:
    sys.exit(f"Error: {message} (see {self.prog} --help)")


class Once(argparse.Action):
  """Stores the value of an argument of several names, which is given once."""

  def __call__(
    self,
    parser: argparse.ArgumentParser,
    namespace: argparse.Namespace,
    values: Any,
    option_string: str | None = None,
  ) -> None:
    given = getattr(namespace, self.dest)
    if given is not self.default:
      parser.error(
        f"{option_string}={values}: {given} is given already "
        f"({' and '.join(self.option_strings)} mean the same); leave one of "
        "them out"
      )
    setattr(namespace, self.dest, values)


class Progress:
  """Counts what is done: a bar on a terminal, else a line now and then.

  Attributes:
    seconds: that the last speed was taken over, without pauses.
  """

  def __init__(
    self,
    what: str,
    total: int,
    *,
    first: int = 0,
    unit: str = "images",
    lines: bool = True,
  ):
    """Starts the clock.

    Args:
      what: the work, named at the start of each line.
      total: at the end.
      first: done before.
      unit: the things that are counted.
      lines: whether `update` says something now and then; else call `show`.
    """
    self._what, self._unit, self._total = what, unit, total
    self._lines = lines and not shows_bars()
    self._bar = tqdm(
      total=total,
      initial=first,
      desc=what,
      unit=unit,
      dynamic_ncols=True,
      disable=not shows_bars(),
    )
    self._first = self._done = first
    self._begin = time.perf_counter()
    self.restart()

  def restart(self) -> None:
    """Takes the next speed from here on."""
    self._mark = self._done, time.perf_counter()
    self._paused = self.seconds = 0.0

  def update(self, count: int = 1) -> None:
    """Counts what is done."""
    self._done += count
    self._bar.update(count)
    if self._lines and time.perf_counter() - self._mark[1] >= LOG_SECONDS:
      self.show()

  def show(self, text: str = "") -> float | None:
    """Shows the progress; returns the speed since the last time, per second.

    None if nothing was done since.
    """
    done, since = self._mark
    seconds = max(time.perf_counter() - since - self._paused, 1e-9)
    speed = (self._done - done) / seconds or None
    rest = ""
    if speed:
      seconds_left = (self._total - self._done) / speed
      rest = f" ({speed:.4g} {self._unit}/s, {seconds_left:.0f} s left)"
    if self._bar.disable:
      place = f"{self._what} {self._done}/{self._total}"
      logger.info("%s %s%s", place, text or self._unit, rest)
    else:
      self._bar.set_postfix_str(text, refresh=False)
    if speed:
      self.restart()
      self.seconds = seconds
    return speed

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Keeps this time out of the speed."""
    start = time.perf_counter()
    try:
      yield
    finally:
      self._paused += time.perf_counter() - start

  def close(self) -> float:
    """Units per second from start to end."""
    self._bar.close()
    seconds = time.perf_counter() - self._begin
    return (self._done - self._first) / max(seconds, 1e-9)
