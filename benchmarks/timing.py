"""Timing in turns, the table, and what the numbers depend on."""

import contextlib
import ctypes
import dataclasses
import gc
import importlib
import importlib.util
import json
import os
import pathlib
import platform
import subprocess
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from drift_jax.system import paths

MIN_TURNS = 5
PACKAGES = ("numpy", "scipy", "PIL", "simplejpeg", "cv2", "jax", "grain")


def path(text: str) -> pathlib.Path:
  """A path of the command line, as the `type` of an argument."""
  return pathlib.Path(paths.argument(text))


@dataclasses.dataclass(frozen=True)
class Row:
  """A line of the table.

  Attributes:
    section, name: what was measured.
    unit: of the values.
    value: ours.
    plain: what it is compared with, if anything.
    times: how often as good (fast, small) as the plain one.
    note: on the pixels, targets and the like.
  """

  section: str
  name: str
  unit: str
  value: float
  plain: float | None = None
  times: float | None = None
  note: str = ""


@dataclasses.dataclass(frozen=True)
class Case:
  """What is timed, between two steps that are not."""

  run: Callable[[], object]
  before: Callable[[], object] = lambda: None
  after: Callable[[], object] = lambda: None

  def seconds(self, clock: Callable[[], float]) -> float:
    """Of one run."""
    self.before()
    start = clock()
    self.run()
    seconds = clock() - start
    self.after()
    return seconds


class Peak:
  """How much more memory runs take than the process held before them.

  Inputs that live on are not counted, what a run makes is: arrays, buffers of
  libraries, the result. On Linux only, else not a number.

  Attributes:
    bytes: the most of all runs.
  """

  def __init__(self) -> None:
    self.bytes = float("nan")
    self._before = float("nan")
    gc.collect()  # takes long: not before each run

  def around(self, run: Callable[[], object]) -> Case:
    """Measures each run."""
    return Case(run, self._start, self._stop)

  def _start(self) -> None:
    with contextlib.suppress(OSError, AttributeError):
      ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system
    with contextlib.suppress(OSError):
      # The highest mark so far falls to what is held now.
      pathlib.Path("/proc/self/clear_refs").write_text("5")
    self._before = resident()

  def _stop(self) -> None:
    more = highest() - self._before
    self.bytes = float(np.fmax(self.bytes, max(more, 0.0)))


class Report:
  """Collects rows.

  Attributes:
    rows: so far.
  """

  def __init__(self, seconds: float):
    """Each case is timed for so many seconds, but at least MIN_TURNS times."""
    self.rows: list[Row] = []
    self._seconds = seconds

  def compare(
    self,
    section: str,
    unit: str,
    count: float,
    plain: Case | None,
    ours: dict[str, Case],
    *,
    clock: Callable[[], float] = time.perf_counter,
    notes: dict[str, str] | None = None,
    once: bool = False,
  ) -> None:
    """Adds a row for each of `ours`.

    Args:
      section: of the table.
      unit: 's' or 'ms' for the time of one run, else of `count`, per second.
      count: what one run handles.
      plain: what all of `ours` are compared with, if anything.
      ours: by name.
      clock: seconds.
      notes: by name.
      once: a single turn and no warm-up, for what takes a minute.
    """
    cases = ({} if plain is None else {"plain": plain}) | ours
    for case in () if once else cases.values():  # warm-up
      case.seconds(clock)
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    stop = time.monotonic() + (0 if once else self._seconds * len(cases))
    turn = 0
    while turn < (1 if once else MIN_TURNS) or time.monotonic() < stop:
      # To and fro: what drifts over a turn cancels out.
      for name in list(cases)[:: 1 if turn % 2 else -1]:
        seconds[name].append(cases[name].seconds(clock))
      turn += 1
    middle = {name: float(np.median(x)) for name, x in seconds.items()}
    scale = {"s": 1.0, "ms": 1e3}.get(unit)
    value = {
      name: scale * x if scale else count / x for name, x in middle.items()
    }
    for name in ours:
      times = None
      if plain is not None:
        times = float(np.median(np.divide(seconds["plain"], seconds[name])))
      note = (notes or {}).get(name, "")
      self.add(
        section, name, unit, value[name], value.get("plain"), times, note
      )

  def add(self, *args: Any, **kwargs: Any) -> None:
    """Adds a row that is not timed."""
    self.rows.append(Row(*args, **kwargs))

  def memory(self, section: str) -> None:
    """Adds the host memory that the process holds now."""
    name = "host memory of the process"
    self.add(section, name, "GB", resident() / 1e9)

  def table(self) -> str:
    """Markdown."""
    lines = ["| | | unit | ours | plain | times | |", "|---" * 7 + "|"]
    above = ""
    for row in self.rows:
      section = row.section if row.section != above else ""
      above = row.section
      times = "" if row.times is None else f"{row.times:.2f}"
      numbers = [_number(row.value), _number(row.plain), times]
      cells = [section, row.name, row.unit, *numbers, row.note]
      lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)

  def json(self, facts: dict[str, Any]) -> str:
    """The rows with what `machine` gave."""
    rows = [dataclasses.asdict(row) for row in self.rows]
    return json.dumps({"machine": facts, "rows": rows}, indent=1)


def _number(value: float | None) -> str:
  if value is None:
    return ""
  return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def resident() -> float:
  """Bytes of this process in memory; on Linux only, else not a number."""
  try:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  except OSError:
    return float("nan")
  return pages * os.sysconf("SC_PAGE_SIZE")


def highest() -> float:
  """The most bytes of this process in memory so far; on Linux only."""
  try:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  except OSError:
    return float("nan")
  # Not getrusage's: that starts at what the parent held.
  return 1024.0 * next(int(x.split()[1]) for x in lines if "VmHWM" in x)


def machine() -> dict[str, Any]:
  """What the numbers depend on."""
  import jax  # not before a benchmark has read its flags

  cpu = platform.processor()
  with contextlib.suppress(OSError):
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((x.split(": ")[1] for x in lines if "model name" in x), cpu)

  def git(*args: str) -> str:
    folder = str(pathlib.Path(__file__).resolve().parent)
    command = ["git", "-C", folder, *args]
    return subprocess.run(command, capture_output=True, text=True).stdout

  versions = {"python": platform.python_version()}
  for name in PACKAGES:
    if importlib.util.find_spec(name):
      versions[name] = importlib.import_module(name).__version__
  changed = git("status", "--porcelain", "--untracked-files=no").strip()
  commit = git("rev-parse", "--short", "HEAD").strip()
  return {
    "cpu": cpu,
    "cores": os.cpu_count(),
    "load": round(os.getloadavg()[0], 2),
    "device": jax.devices()[0].device_kind,
    "versions": versions,
    "commit": commit + " with changes" * bool(changed),
  }


def in_words(facts: dict[str, Any]) -> str:
  """One line of what `machine` gave."""
  versions = ", ".join(" ".join(item) for item in facts["versions"].items())
  return (
    f"{facts['cores']} cores of {facts['cpu']}, load {facts['load']} before; "
    f"device {facts['device']}; {versions}; commit {facts['commit']}."
  )
