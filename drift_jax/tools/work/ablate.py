"""Runs tables of ablations: see drift_jax.tools.ablate."""

import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import IO, Any

from absl import flags
from etils import epath
from ml_collections import ConfigDict

from drift_jax import config as config_lib
from drift_jax.metrics.files import replacing
from drift_jax.metrics.writers import read_jsonl
from drift_jax.system import console, exits
from drift_jax.system.console import logger
from drift_jax.tasks import parse
from drift_jax.tasks.generator.config import GeneratorConfig
from drift_jax.tools import ablation_table
from drift_jax.training import facts as data_facts

FLAGS = flags.FLAGS

# Where it is written what a workdir's runs have in common.
FACTS = "ablations.json"
# Keys that say how a run is computed, not what: runs on other machines may
# have other values.
_MACHINE = tuple(
  key for key in config_lib.RESUMABLE if not key.startswith(("train.", "eval."))
)


@dataclasses.dataclass(frozen=True)
class Plan:
  """What the command line asks for, resolved.

  Attributes:
    table: its name.
    rows: filled in as runs end, in the table's order.
    heading: of the table.
    runs: each once, in the order in which they run.
  """

  table: str
  rows: list[ablation_table.Row]
  heading: ablation_table.Heading
  runs: list["Run"]


@dataclasses.dataclass(frozen=True)
class Run:
  """A training, and for Fig. 5 an evaluation of it.

  Attributes:
    name: for messages.
    rows: that its figures are of.
    seed: its seed.
    path: its workdir.
    config: resolved.
    command: that trains it.
    alphas: evaluated afterwards; () where the training's own evaluation is it.
  """

  name: str
  rows: list[ablation_table.Row]
  seed: int
  path: pathlib.Path
  config: GeneratorConfig
  command: list[str]
  alphas: tuple[float, ...]

  @property
  def report(self) -> pathlib.Path:
    """Of the evaluation over alpha."""
    return self.path / "alphas.json"

  @property
  def log(self) -> pathlib.Path:
    """What the processes say; not in the workdir, which main makes."""
    return self.path.with_suffix(".log")

  def trained(self) -> bool:
    """Whether the last step is evaluated and saved."""
    step = self.config.train.num_steps
    file = self.path / "metrics.jsonl"
    if not (self.path / "checkpoints" / str(step)).is_dir():
      return False
    records = read_jsonl(file) if file.exists() else []
    return bool(ablation_table.last_figures(records, step)[0])

  def evaluated(self) -> bool:
    """Whether the report over alpha is there, if one is asked for."""
    if not self.alphas:
      return True
    if not self.report.exists():
      return False
    report = json.loads(self.report.read_text())
    found = set(map(float, report["results"]))
    return report["step"] == self.config.train.num_steps and (
      set(self.alphas) <= found
    )

  def finished(self) -> bool:
    """Whether there is nothing left to do."""
    return self.trained() and self.evaluated()

  def left(self) -> Iterator[list[str]]:
    """Commands that are left to run, one after the other."""
    if not self.trained():
      yield self.command
    if not self.evaluated():
      yield [
        *(sys.executable, "-m", "drift_jax.evaluate"),
        f"--workdir={self.path}",
        f"--step={self.config.train.num_steps}",
        f"--alphas={','.join(f'{alpha:g}' for alpha in self.alphas)}",
        f"--out={self.report}",
      ]

  def fill_in(self) -> None:
    """Puts its figures into its rows."""
    if not self.alphas:
      figures, baseline = ablation_table.last_figures(
        read_jsonl(self.path / "metrics.jsonl"),
        self.config.train.num_steps,
      )
      for row in self.rows:
        row.runs[self.seed] = figures
    else:
      report = json.loads(self.report.read_text())
      results = {float(a): fs for a, fs in report["results"].items()}
      baseline = report["baseline"]
      for row, alpha in zip(self.rows, self.alphas, strict=True):
        row.runs[self.seed] = {
          name: {alpha: value} for name, value in results[alpha].items()
        }
    for row in self.rows:
      row.baseline.update(baseline)
      row.workdirs[self.seed] = str(self.path)
      row.failed.pop(self.seed, None)


def run(arguments: Sequence[str], seeds: Sequence[int]) -> None:
  """Runs what is left of a table, or prints its commands.

  Args:
    arguments: the table's name.
    seeds: of its runs.

  Raises:
    ConfigError, OSError, ValueError: what can't be run.
  """
  if len(arguments) != 1:
    raise config_lib.ConfigError(
      f"name one table, got {list(arguments)}; {_tables_hint(sys.argv)}"
    )
  plan = make_plan(arguments[0], seeds)
  check_workdir(plan)
  if FLAGS.commands:
    for each in plan.runs:
      for command in each.left():
        print(shlex.join(command))
    return
  _write_facts(plan)
  _execute(plan)


def _tables_hint(argv: Sequence[str]) -> str:
  file, _ = _files(argv)
  return f"valid options are {list(_ablations(file)['TABLES'])}"


def _files(argv: Sequence[str]) -> tuple[pathlib.Path, str]:
  """(the file of ablations, the base's name) of --config."""
  argument, _ = config_lib.config_arguments(argv)
  assert argument is not None
  name, _, variant = argument.partition(":")
  path = pathlib.Path(name)
  base = f"{path.stem}:{variant}" if variant else path.stem
  return path.parent / "ablations.py", base


def _ablations(file: pathlib.Path) -> dict[str, Any]:
  if not file.is_file():
    raise config_lib.ConfigError(
      f"there is no {file}, which names the tables, beside the base config"
    )
  return runpy.run_path(str(file))


def make_plan(table: str, seeds: Sequence[int]) -> Plan:
  """The rows and runs that the flags ask for.

  Raises:
    ConfigError: an unknown table, row, base or figure, overrides of what the
      table varies, seeds that are none.
  """
  file, base = _files(sys.argv)
  _, given = config_lib.config_arguments(sys.argv)
  module = _ablations(file)
  try:
    module["base_config"](base)
    found: dict[str, Any] = module["rows"](table, base)
  except ValueError as error:
    raise config_lib.ConfigError(str(error)) from error
  if FLAGS.rows is not None:
    for name in FLAGS.rows:
      if name not in found:
        raise config_lib.ConfigError(
          f"--rows: there is no {name!r} in {table} of {base}, valid options "
          f"are {list(found)}"
        )
    found = {name: row for name, row in found.items() if name in FLAGS.rows}
  _check_overrides(table, found, given)
  # What is asked for of all rows, with the end's evaluation in place of the
  # base's: only its figures are read.
  common: dict[str, Any] = {key: _at(FLAGS.config, key) for key in given}
  if not common.get("eval.every"):
    common["eval.every"] = FLAGS.config.train.num_steps
    common["checkpoint.best_metric"] = ""
  arguments = {
    **given,
    **{k: str(v) for k, v in common.items() if k not in given},
  }
  arguments["eval.every"] = str(common["eval.every"])
  plain = _set(module["get_config"](base), common)
  workdir = pathlib.Path(FLAGS.workdir)
  rows, runs = [], {}
  for name, row in found.items():
    only_evaluated = all(key.startswith("eval.") for key in row.overrides)
    curve = bool(row.overrides) and only_evaluated
    named = base if curve else f"{base}/{table}/{name}"
    values = _set(module["get_config"](named), common)
    changes = _changes(plain, values)
    overrides = row.overrides if curve else changes
    entry = ablation_table.Row(name, row.label, _describe(overrides), row.paper)
    rows.append(entry)
    for seed in seeds:
      values.seed = seed
      path = workdir / _folder(changes) / f"seed_{seed}"
      alphas = row.overrides["eval.alphas"] if curve else ()
      if (path, curve) in runs:
        run = runs[path, curve]
        run.rows.append(entry)
        run = dataclasses.replace(run, alphas=run.alphas + alphas)
      else:
        command = [
          *(sys.executable, "-m", "drift_jax.main"),
          f"--config={file}:{named}",
          f"--config.seed={seed}",
          *(f"--config.{key}={value}" for key, value in arguments.items()),
          f"--workdir={path}",
        ]
        config = parse(values)
        assert isinstance(config, GeneratorConfig)
        title = table if curve else name
        run = Run(
          f"{title}, seed {seed}", [entry], seed, path, config, command, alphas
        )
      runs[path, curve] = run
  # A whole table of one seed first.
  ordered = sorted(runs.values(), key=lambda run: seeds.index(run.seed))
  about = module["TABLES"][table]
  heading = ablation_table.Heading(
    title=about.title,
    varies=about.varies,
    source=about.source,
    base=base,
    steps=ordered[0].config.train.num_steps,
    seeds=seeds,
    figure=_choose_figure(ordered),
    alpha=FLAGS.alpha,
    command=shlex.join(
      ["python", "-m", "drift_jax.tools.ablate", *sys.argv[1:]]
    ),
    curve=any(run.alphas for run in ordered),
  )
  _check_alpha(ordered)
  return Plan(table, rows, heading, ordered)


def _check_overrides(
  table: str, rows: Mapping[str, Any], given: Mapping[str, str]
) -> None:
  """Raises ConfigError where all rows would get what they differ in."""
  varied = {key for row in rows.values() for key in row.overrides}
  for key, value in given.items():
    if key == "seed":
      raise config_lib.ConfigError(
        f"--config.seed={value}: give seeds by --seeds"
      )
    for other in varied:
      if f"{key}.".startswith(f"{other}."):
        raise config_lib.ConfigError(
          f"--config.{key}={value}: {other} is what the rows of {table} set"
        )


def _choose_figure(runs: Sequence[Run]) -> str:
  """--figure, or the first Frechet distance that all runs compute."""
  names = [ablation_table.figures_of(r.config.eval.metrics) for r in runs]
  shared = [n for n in names[0] if all(n in other for other in names)]
  if FLAGS.figure is None:
    for name in shared:
      if name == "fid" or name.startswith("fd_"):
        return name
    raise config_lib.ConfigError(
      f"eval.metrics has no Frechet distance, only {shared}: name what rows "
      "are compared by, --figure"
    )
  if FLAGS.figure not in shared:
    raise config_lib.ConfigError(
      f"--figure={FLAGS.figure}: valid options are {shared} (eval.metrics)"
    )
  return FLAGS.figure


def _check_alpha(runs: Sequence[Run]) -> None:
  """Raises ConfigError where --alpha is not evaluated."""
  if FLAGS.alpha is None:
    return
  for run in runs:
    if run.alphas:
      raise config_lib.ConfigError(
        f"--alpha={FLAGS.alpha:g}: the rows are alphas themselves, use --rows"
      )
    if FLAGS.alpha not in run.config.eval.alphas:
      raise config_lib.ConfigError(
        f"--alpha={FLAGS.alpha:g}: evaluated are {run.config.eval.alphas} "
        "(eval.alphas)"
      )


def _at(config: Any, key: str) -> Any:
  for part in key.split("."):
    config = config[part]
  return config


def _set(config: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
  """Sets dotted keys.

  Raises:
    ConfigError: a key that the row's config does not have.
  """
  for key, value in values.items():
    config_lib.check_override(config.to_dict(), key, str(value))
    section, _, last = key.rpartition(".")
    (_at(config, section) if section else config)[last] = value
  return config


def _changes(base: ConfigDict, row: ConfigDict) -> dict[str, Any]:
  """{dotted key: value} of what a row has otherwise than the base."""
  before, after = (config_lib.flatten(c.to_dict()) for c in (base, row))
  return {
    key: after.get(key)
    for key in sorted(before | after)
    if key not in after or key not in before or before[key] != after[key]
  }


def _describe(changes: Mapping[str, Any]) -> str:
  """Changes in one line; of a section that is gone: none."""
  texts = [
    f"{key}={'{}' if value is None else value}"
    for key, value in changes.items()
  ]
  return "; ".join(texts)


def _folder(changes: Mapping[str, Any]) -> str:
  """A folder's name that says what the row changes, as far as it is short."""
  if not changes:
    return "base"
  text = _describe(changes)
  short = re.sub(r"[^\w.=,-]+", "_", text.replace(" ", ""), flags=re.ASCII)
  digest = hashlib.sha256(text.encode()).hexdigest()[:8]
  return f"{short[:80].strip('_.')}-{digest}"


def check_workdir(plan: Plan) -> None:
  """Raises ConfigError where the workdir's runs are of other configs."""
  file = pathlib.Path(FLAGS.workdir) / FACTS
  if file.exists():
    before, now = json.loads(file.read_text()), _facts()
    if before != now:
      raise config_lib.ConfigError(
        f"--workdir={FLAGS.workdir} holds runs of --config={before['base']} "
        f"with {before['overrides'] or 'no overrides'}, this is "
        f"--config={now['base']} with {now['overrides'] or 'no overrides'}: "
        "give it those again or use another workdir"
      )
  for run in plan.runs:
    file = run.path / "config.json"
    if not file.exists():
      continue
    before, after = (
      config_lib.flat_values(text)
      for text in (file.read_text(), config_lib.to_json(run.config))
    )
    if after["model.num_classes"] == 0:  # as many as the data have
      after["model.num_classes"] = before.get("model.num_classes")
    changed = [
      f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
      for key in sorted(before | after)
      if before.get(key) != after.get(key)
      and not key.startswith(_MACHINE)
      and not key.endswith(config_lib.RESUMABLE_ENDS)
    ]
    if changed:
      raise config_lib.ConfigError(
        f"{run.path} holds a run with another config; use another workdir or "
        f"the old values. Changed: {'; '.join(changed)}"
      )
  data_facts.check_same_data([epath.Path(run.path) for run in plan.runs])


def _facts() -> dict[str, Any]:
  """What all runs of a workdir have in common."""
  argument, given = config_lib.config_arguments(sys.argv)
  overrides = {k: v for k, v in given.items() if not k.startswith(_MACHINE)}
  return {"base": argument, "overrides": overrides}


def _write_facts(plan: Plan) -> None:
  for run in plan.runs:
    run.path.parent.mkdir(parents=True, exist_ok=True)
  with replacing(pathlib.Path(FLAGS.workdir) / FACTS) as file:
    file.write_text(json.dumps(_facts(), indent=2))


class _Stopped(Exception):
  """A signal came, and the child has ended."""

  def __init__(self, number: int):
    super().__init__(number)
    self.number = number


class _Children:
  """Runs processes one at a time, and passes signals on to them."""

  def __init__(self) -> None:
    self._child: subprocess.Popen[bytes] | None = None
    self._stopped: int | None = None
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, self._stop)

  def _stop(self, number: int, frame: FrameType | None) -> None:
    del frame
    # A training saves at SIGTERM; who asks twice does not want to wait.
    passed = signal.SIGTERM if self._stopped is None else signal.SIGKILL
    self._stopped = number
    if self._child is not None:
      self._child.send_signal(passed)

  def run(
    self, command: Sequence[str], log: pathlib.Path, watch: Callable[[], None]
  ) -> int:
    """The exit code; its words are appended to the log.

    Args:
      command: of the process.
      log: locked while the process lives, also where this one is killed.
      watch: called now and then meanwhile.

    Raises:
      _Stopped: this process was told to stop.
      ConfigError: a process that an earlier call left is still at work.
    """
    with open(log, "ab") as file:
      _lock(file, log)
      code = None if self._stopped else self._start(command, file)
      while self._child is not None and code is None:
        try:
          code = self._child.wait(timeout=console.LOG_SECONDS)
        except subprocess.TimeoutExpired:
          watch()
      self._child = None
    if self._stopped is not None or code is None:
      raise _Stopped(self._stopped or signal.SIGTERM)
    return code

  def _start(self, command: Sequence[str], output: IO[bytes]) -> None:
    # In a session of its own: Ctrl-C comes through this process alone.
    self._child = subprocess.Popen(
      command,
      stdin=subprocess.DEVNULL,
      stdout=output,
      stderr=subprocess.STDOUT,
      env=_environment(),
      start_new_session=True,
    )
    if self._stopped is not None:  # while it was started
      self._child.send_signal(signal.SIGTERM)


def _lock(file: IO[bytes], log: pathlib.Path) -> None:
  """Held by whoever has the file open, so by the child too."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    raise config_lib.ConfigError(
      f"another process is at work on {log.with_suffix('')}: wait for it or "
      "end it"
    ) from error


def _environment() -> dict[str, str]:
  """Seeds of a row run the same programs: they are compiled once."""
  cache = pathlib.Path(FLAGS.workdir).absolute() / "compiled"
  return {"JAX_COMPILATION_CACHE_DIR": str(cache)} | os.environ


def _execute(plan: Plan) -> None:
  """Runs what is left, and writes the table after each run."""
  left = []
  for run in plan.runs:
    if run.finished():
      run.fill_in()
    else:
      left.append(run)
  logger.info(
    "%s of %s: %d runs, %d of them finished.",
    plan.table,
    plan.heading.base,
    len(plan.runs),
    len(plan.runs) - len(left),
  )
  children = _Children()
  progress = _Progress(len(left))
  failed = []
  for run in left:
    progress.start(run)
    try:
      why = _complete(run, children, progress)
    except _Stopped as stopped:
      logger.info("%s: stopped; %s.", run.name, exits.AGAIN)
      code = exits.INTERRUPTED
      sys.exit(code if stopped.number == signal.SIGINT else exits.RESTART)
    if why:
      failed.append(run.name)
      for row in run.rows:
        row.failed[run.seed] = why
      logger.warning("%s failed: %s (%s)", run.name, why, run.log)
    else:
      run.fill_in()
    progress.end()
    _write(plan)
  paths = _write(plan)
  print(ablation_table.markdown(plan.rows, plan.heading))
  logger.info("Wrote %s.", ", ".join(paths))
  if failed:
    sys.exit(
      f"Error: {len(failed)} of {len(plan.runs)} runs failed: "
      f"{'; '.join(failed)}"
    )


def _complete(run: Run, children: _Children, progress: "_Progress") -> str:
  """Runs what a run lacks; returns why it failed, '' if it did not."""
  for command in run.left():
    code = children.run(command, run.log, progress.log)
    if code:
      lines = run.log.read_text(errors="replace").split("\n")
      last = next((line for line in reversed(lines) if line.strip()), "")
      return last.strip() or f"exit code {code}"
  if not run.finished():
    return "it ended without figures of its last step"
  return ""


def _write(plan: Plan) -> list[str]:
  return ablation_table.write(
    plan.rows, plan.heading, FLAGS.workdir, plan.table
  )


class _Progress:
  """Lines that say where the runs are and how long they will take."""

  def __init__(self, total: int):
    self._total = total
    self._done = 0
    self._begin = self._start = time.monotonic()
    self._run: Run | None = None
    self._offset = 0

  def start(self, run: Run) -> None:
    self._run = run
    self._start = time.monotonic()
    self._offset = run.log.stat().st_size if run.log.exists() else 0
    logger.info("%d/%d %s: started.", self._done + 1, self._total, run.name)

  def end(self) -> None:
    assert self._run is not None
    self._done += 1
    seconds = time.monotonic() - self._start
    per_run = (time.monotonic() - self._begin) / self._done
    logger.info(
      "%d/%d %s: %s; about %s left.",
      self._done,
      self._total,
      self._run.name,
      _duration(seconds),
      _duration(per_run * (self._total - self._done)),
    )

  def log(self) -> None:
    """Where the child is, by its own lines."""
    assert self._run is not None
    with open(self._run.log, "rb") as file:
      file.seek(self._offset)
      text = file.read().decode(errors="replace")
    steps = re.findall(r"step (\d+)/(\d+) ", text)
    where, left = "starting", ""
    elapsed = time.monotonic() - self._start
    if steps:
      # Of this process: one that continued began behind the first step.
      first, last, end = int(steps[0][0]), int(steps[-1][0]), int(steps[-1][1])
      where = f"step {last}/{end}"
      if self._done:
        per_run = (self._start - self._begin) / self._done
      else:
        began = 0 if len(steps) == 1 else max(0, 2 * first - int(steps[1][0]))
        per_run = elapsed * end / max(last - began, 1)
      seconds = per_run * (self._total - self._done) - elapsed
      left = f"; about {_duration(max(seconds, 0.0))} left"
    logger.info(
      "%d/%d %s: %s%s.",
      self._done + 1,
      self._total,
      self._run.name,
      where,
      left,
    )


def _duration(seconds: float) -> str:
  if seconds < 90:
    return f"{seconds:.0f} s"
  if seconds < 5400:
    return f"{seconds / 60:.0f} min"
  return f"{seconds / 3600:.1f} h"
