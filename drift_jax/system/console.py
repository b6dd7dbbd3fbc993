"""What a run says on the terminal: one line an event, and nothing else."""

import argparse
import logging
import sys
import time
import traceback
from typing import NoReturn

from absl import logging as absl_logging
from tqdm import tqdm

logger = logging.getLogger("drift_jax")

# Between two lines of progress where there is no terminal to draw a bar on.
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
    process: whose they are; of all but the first only warnings are shown, and
      its number in front of them.
  """
  handler = _Handler()
  number = f"process {process}: " if process else ""
  handler.setFormatter(
    logging.Formatter(f"%(asctime)s {number}%(message)s", "%H:%M:%S")
  )
  logger.handlers[:] = [handler]
  logger.propagate = False
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


class Progress:
  """A bar on a terminal, else a line now and then."""

  def __init__(self, what: str, total: int):
    self._what = what
    self._total = total
    self._done = 0
    self._start = self._logged = time.monotonic()
    self._bar = tqdm(
      total=total, desc=what, unit="img", disable=not shows_bars()
    )

  def update(self, count: int) -> None:
    """Counts images that are done."""
    self._done += count
    self._bar.update(count)
    now = time.monotonic()
    if self._bar.disable and now - self._logged >= LOG_SECONDS:
      self._logged = now
      rate = self._done / (now - self._start)
      left = (self._total - self._done) / rate / 60
      logger.info(
        "%s: %d of %d images, %.4g images/s, %.3g min left",
        self._what,
        self._done,
        self._total,
        rate,
        left,
      )

  def close(self) -> float:
    """Images per second from start to end."""
    self._bar.close()
    return self._done / max(time.monotonic() - self._start, 1e-9)
