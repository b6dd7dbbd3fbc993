"""Runs tables of ablations: see drift_jax.tools.ablate."""

import dataclasses
import fcntl
import hashlib
import json
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import IO, Any

from absl import flags
from etils import epath
from tqdm import tqdm

from drift_jax import config as config_lib
from drift_jax.metrics.files import replacing
from drift_jax.metrics.writers import read_jsonl
from drift_jax.system import console, exits, storage
from drift_jax.system.console import logger
from drift_jax.tasks import parse
from drift_jax.tasks.generator.config import GeneratorConfig, of_one_class
from drift_jax.tools.work import ablation_table
from drift_jax.tools.work.ablation_table import Row, Table
from drift_jax.tools.work.rows import (
  MACHINE,
  at_alpha,
  changes,
  last_figures,
  set_values,
)
from drift_jax.training import facts as data_facts

FLAGS = flags.FLAGS

# File of the facts that all runs of a workdir share.
FACTS = "ablations.json"


@dataclasses.dataclass(frozen=True)
class Run:
  """A training, and for Fig. 5 an evaluation of it.

  Attributes:
    name: for messages.
    rows: rows that it fills.
    seed: seed of the training.
    path: workdir.
    config: resolved config.
    command: command that trains it.
    alphas: guidance scales evaluated after the training, one for each row; []
      if the training's own evaluation counts.
  """

  name: str
  rows: list[Row]
  seed: int
  path: pathlib.Path
  config: GeneratorConfig
  command: list[str]
  alphas: list[float] = dataclasses.field(default_factory=list)

  @property
  def report(self) -> pathlib.Path:
    """Report of the evaluation over alpha."""
    return self.path / "alphas.json"

  @property
  def log(self) -> pathlib.Path:
    """Output of the processes, beside the workdir, which main makes."""
    return self.path.with_suffix(".log")

  def figures(self) -> tuple[dict[str, float], dict[str, float]]:
    """Figures of the training's last evaluation: see last_figures."""
    file = self.path / "metrics.jsonl"
    records = read_jsonl(file) if file.exists() else []
    return last_figures(records, self.config.train.num_steps)

  def over_alpha(self) -> tuple[dict[str, float], dict[str, float]]:
    """Figures of the evaluation over alpha; empty if an alpha is missing."""
    report = json.loads(self.report.read_text()) if self.report.exists() else {}
    figures = {
      at_alpha(name, float(alpha)): value
      for alpha, values in report.get("results", {}).items()
      for name, value in values.items()
    }
    ends = tuple(at_alpha("", alpha) for alpha in self.alphas)
    missing = [e for e in ends if not any(n.endswith(e) for n in figures)]
    if missing or report["step"] != self.config.train.num_steps:
      return {}, {}
    return figures, report["baseline"]

  def left(self) -> Iterator[list[str]]:
    """Yields the commands that are left to run, in their order."""
    step = self.config.train.num_steps
    saved = (self.path / "checkpoints" / str(step)).is_dir()
    if not saved or not self.figures()[0]:
      yield self.command
    if self.alphas and not self.over_alpha()[0]:
      yield [
        *(sys.executable, "-m", "drift_jax.evaluate"),
        *(f"--from={self.path}", f"--step={step}"),
        f"--alphas={','.join(f'{alpha:g}' for alpha in self.alphas)}",
        f"--out={self.report}",
      ]

  def fill_in(self) -> None:
    """Puts the figures into the rows: all, or those of the row's own alpha."""
    figures, real = self.over_alpha() if self.alphas else self.figures()
    for number, row in enumerate(self.rows):
      end = at_alpha("", self.alphas[number]) if self.alphas else ""
      row.figures[self.seed] = {
        name: value for name, value in figures.items() if name.endswith(end)
      }
      row.real.update(real)
      row.workdirs[self.seed] = str(self.path)
      row.failed.pop(self.seed, None)


def run(arguments: Sequence[str]) -> None:
  """Runs what is left of a table, or prints its commands.

  Args:
    arguments: the table's name.

  Raises:
    ConfigError, OSError, ValueError: what can't be run.
  """
  file, base = _base()
  module = config_lib.run_config(file)
  if len(arguments) != 1:
    raise config_lib.ConfigError(
      f"name one table, got {list(arguments)}; valid options are "
      f"{list(module['TABLES'])}"
    )
  (name,) = arguments
  rows, runs = _runs(module, name, base, _rows(module, name, base))
  # A whole table of one seed first.
  runs.sort(key=lambda run: FLAGS.seeds.index(run.seed))
  table = Table(
    rows=rows,
    about=module["TABLES"][name],
    base=base,
    steps=runs[0].config.train.num_steps,
    seeds=FLAGS.seeds,
    figure=_choose_figure(runs),
    alpha=FLAGS.alpha,
    command=shlex.join(
      ["python", "-m", "drift_jax.tools.ablate", *sys.argv[1:]]
    ),
    curve=any(run.alphas for run in runs),
  )
  check_workdir(runs)
  if FLAGS.commands:
    for each in runs:
      for command in each.left():
        print(shlex.join(command))
    return
  for each in runs:
    each.path.parent.mkdir(parents=True, exist_ok=True)
  write_facts()
  _execute(table, name, runs)


def _base() -> tuple[pathlib.Path, str]:
  """(the file of ablations, the base's name) of --config."""
  argument, _ = config_lib.config_arguments(sys.argv)
  assert argument is not None
  name, colon, variant = config_lib.find_config(argument).partition(":")
  file = pathlib.Path(name).parent / "ablations.py"
  if not file.is_file():
    raise config_lib.ConfigError(
      f"there is no {file}, which names the tables, beside the base config"
    )
  return file, pathlib.Path(name).stem + (f":{variant}" if variant else "")


def _rows(module: Mapping[str, Any], table: str, base: str) -> dict[str, Any]:
  """{name: row of configs/ablations.py} of the flags.

  Raises:
    ConfigError: an unknown table, row or base, or overrides of what the rows
      differ in.
  """
  try:
    rows: dict[str, Any] = module["rows"](table, base)
  except ValueError as error:
    raise config_lib.ConfigError(str(error)) from error
  if FLAGS.rows is not None:
    if unknown := [name for name in FLAGS.rows if name not in rows]:
      raise config_lib.ConfigError(
        f"--rows: there is no {unknown[0]!r} in {table} of {base}, valid "
        f"options are {list(rows)}"
      )
    rows = {name: row for name, row in rows.items() if name in FLAGS.rows}
  varied = {key for row in rows.values() for key in row.overrides}
  for key, value in config_lib.config_arguments(sys.argv)[1].items():
    remedies = {
      other: f"{other} is what the rows of {table} set" for other in varied
    }
    remedies["seed"] = "give seeds by --seeds"
    for other, remedy in remedies.items():
      if f"{key}.".startswith(f"{other}."):
        raise config_lib.ConfigError(f"--config.{key}={value}: {remedy}")
  return rows


def _runs(
  module: Mapping[str, Any], table: str, base: str, found: Mapping[str, Any]
) -> tuple[list[Row], list[Run]]:
  """Rows of the table, still empty, and the runs that fill them, each once.

  Args:
    module: configs/ablations.py.
    table, base: names of the table and the base.
    found: {name: row of the module}.
  """
  # 1. Overrides of all rows; they are evaluated at their end alone, unless told
  # otherwise, because no other figures are read.
  asked = config_lib.flatten(FLAGS.config.to_dict())
  _, overrides = config_lib.config_arguments(sys.argv)
  common = {key: asked[key] for key in overrides}
  if not common.get("eval.every"):
    common = {"checkpoint.best_metric": "", **common}
    common["eval.every"] = asked["train.num_steps"]

  def config_of(name: str) -> dict[str, Any]:
    config = module["get_config"](name).to_dict()
    set_values(config, common)
    return config

  plain = config_lib.flatten(config_of(base))
  # 2. Rows that change the evaluation alone share the base's runs
  rows = []
  runs: dict[tuple[pathlib.Path, bool], Run] = {}
  for name, row in found.items():
    curve = bool(row.overrides) and all(
      key.startswith("eval.") for key in row.overrides
    )
    named = base if curve else f"{base}/{table}/{name}"
    values = config_of(named)
    pairs = changes(plain, config_lib.flatten(values))
    changed = {key: after for key, (_, after) in pairs.items()}
    described = _describe(row.overrides if curve else changed)
    rows.append(Row(name, row.label, described, row.paper))
    for seed in FLAGS.seeds:
      path = pathlib.Path(FLAGS.workdir) / _folder(changed) / f"seed_{seed}"
      command = [
        *(sys.executable, "-m", "drift_jax.main"),
        *(f"--config={module['__file__']}:{named}", f"--config.seed={seed}"),
        *(f"--config.{key}={value}" for key, value in common.items()),
        f"--workdir={path}",
      ]
      config = parse(values | {"seed": seed})
      assert isinstance(config, GeneratorConfig)
      title = f"{table if curve else name}, seed {seed}"
      new = Run(title, [], seed, path, config, command)
      run = runs.setdefault((path, curve), new)
      run.rows.append(rows[-1])
      if curve:
        run.alphas.extend(row.overrides["eval.alphas"])
  return rows, list(runs.values())


def _choose_figure(runs: Sequence[Run]) -> str:
  """--figure, or the first Frechet distance that all runs compute.

  Raises:
    ConfigError: a figure or an alpha that is not evaluated.
  """
  names = [ablation_table.figures_of(r.config.eval.metrics) for r in runs]
  shared = [n for n in names[0] if all(n in other for other in names)]
  distances = [n for n in shared if n == "fid" or n.startswith("fd_")]
  figure = FLAGS.figure or next(iter(distances), None)
  if figure not in shared:
    raise config_lib.ConfigError(
      f"--figure={figure}: valid options are {shared} (eval.metrics)"
    )
  alpha = FLAGS.alpha
  if alpha is not None and any(run.alphas for run in runs):
    raise config_lib.ConfigError(
      f"--alpha={alpha:g}: the rows are alphas themselves, use --rows"
    )
  alphas = [run.config.eval.alphas for run in runs]
  if missing := [found for found in alphas if alpha not in (None, *found)]:
    raise config_lib.ConfigError(
      f"--alpha={alpha:g}: evaluated are {missing[0]} (eval.alphas)"
    )
  return figure


def _describe(values: Mapping[str, Any]) -> str:
  """Keys and values in one line; a section that is gone is {}."""
  texts = [f"{k}={'{}' if v is None else v}" for k, v in values.items()]
  return "; ".join(texts)


def _folder(changed: Mapping[str, Any]) -> str:
  """Name of a row's folder: its changes, cut off if long, and their hash."""
  if not changed:
    return "base"
  text = _describe(changed)
  short = re.sub(r"[^\w.=,-]+", "_", text.replace(" ", ""), flags=re.ASCII)
  digest = hashlib.sha256(text.encode()).hexdigest()[:8]
  return f"{short[:80].strip('_.')}-{digest}"


def _facts() -> dict[str, Any]:
  """The base and the overrides of all runs, but for those of the machine."""
  base, overrides = config_lib.config_arguments(sys.argv)
  shared = {k: v for k, v in overrides.items() if not k.startswith(MACHINE)}
  return {"base": base, "overrides": shared}


def write_facts() -> None:
  """Records the base and the overrides, for check_workdir."""
  with replacing(pathlib.Path(FLAGS.workdir) / FACTS) as file:
    file.write_text(json.dumps(_facts(), indent=2))


def check_workdir(runs: Sequence[Run]) -> None:
  """Raises ConfigError if the workdir's runs have other configs or data."""
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
  for run in runs:
    file = epath.Path(run.path) / config_lib.CONFIG_FILE
    if not file.exists():
      continue
    config = run.config
    written = config_lib.completed(storage.read_json(file, dict), config)
    before = config_lib.flatten(written)
    classes = before.get("model.num_classes")
    is_of_data = config.model.num_classes == 0  # as many as the data have
    if is_of_data and classes == 1:
      config = of_one_class(config, written)
    after = config_lib.flatten(json.loads(config_lib.to_json(config)))
    if is_of_data:
      after["model.num_classes"] = classes
    changed = [
      f"{key}: {old!r} -> {new!r}"
      for key, (old, new) in changes(before, after, MACHINE).items()
      if not key.endswith(config_lib.RESUMABLE_ENDS)
    ]
    if changed:
      raise config_lib.ConfigError(
        f"{run.path} holds a run with another config; use another workdir or "
        f"the old values. Changed: {'; '.join(changed)}"
      )
  data_facts.check_same_data([epath.Path(run.path) for run in runs])


def _execute(table: Table, name: str, runs: Sequence[Run]) -> None:
  """Runs what is left, and writes the table after each run."""
  # Without a child: see _call.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(exits.RESTART))
  left = [run for run in runs if any(run.left())]
  for run in runs:
    if run not in left:
      run.fill_in()
  done = len(runs) - len(left)
  logger.info(
    "%s of %s: %d runs, %d of them finished.", name, table.base, len(runs), done
  )
  failed = []
  begin = time.monotonic()
  for number, run in enumerate(left, 1):
    where, start = f"{number}/{len(left)} {run.name}", time.monotonic()
    logger.info("%s: started.", where)
    if why := _complete(run, where):
      failed.append(run.name)
      for row in run.rows:
        row.failed[run.seed] = why
      logger.warning("%s failed: %s (%s)", run.name, why, run.log)
    else:
      run.fill_in()
    now = time.monotonic()
    logger.info(
      "%s: %s; about %s left.",
      where,
      tqdm.format_interval(now - start),
      tqdm.format_interval((now - begin) / number * (len(left) - number)),
    )
    ablation_table.write(table, FLAGS.workdir, name)
  paths = ablation_table.write(table, FLAGS.workdir, name)
  print(ablation_table.markdown(table))
  logger.info("Wrote %s.", ", ".join(paths))
  if failed:
    sys.exit(
      f"Error: {len(failed)} of {len(runs)} runs failed: {'; '.join(failed)}"
    )


def _complete(run: Run, where: str) -> str:
  """Runs what a run lacks; returns why it failed, '' if it did not.

  Its log is locked while a process of it lives, also if this one is killed.

  Raises:
    ConfigError: a process that an earlier call left is still at work.
  """
  for command in run.left():
    with open(run.log, "ab") as log:
      try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError as error:
        raise config_lib.ConfigError(
          f"another process is at work on {run.path}: wait for it or end it"
        ) from error
      code = _call(command, run, log, where)
    if code:
      lines = run.log.read_text(errors="replace").split("\n")
      last = next((line for line in reversed(lines) if line.strip()), "")
      return last.strip() or f"exit code {code}"
  return "it has no figures of its last step" if any(run.left()) else ""


def _call(command: Sequence[str], run: Run, log: IO[bytes], where: str) -> int:
  """Runs a child; returns its exit code, or exits if a signal has come.

  SIGTERM and Ctrl-C end the child first. The handler raises nothing, so that
  none of them can come between the child's start and the variable that has it.
  """
  told: list[int] = []
  child: subprocess.Popen[bytes] | None = None

  def stop(number: int, frame: FrameType | None) -> None:
    del frame
    told.append(number)
    if child is not None:
      # A training saves at SIGTERM; a second signal means: do not wait.
      child.send_signal(signal.SIGTERM if len(told) == 1 else signal.SIGKILL)

  numbers = (signal.SIGTERM, signal.SIGINT)
  before = {number: signal.signal(number, stop) for number in numbers}
  child = subprocess.Popen(
    command,
    stdin=subprocess.DEVNULL,
    stdout=log,
    stderr=subprocess.STDOUT,
    # In its own session: Ctrl-C reaches it only through this process.
    start_new_session=True,
  )
  try:
    if told:  # while it was started
      child.terminate()
    while child.returncode is None:
      try:
        child.wait(timeout=console.LOG_SECONDS)
      except subprocess.TimeoutExpired:
        _log_progress(where, run.log)
  finally:
    child.kill()
    for number, handler in before.items():
      signal.signal(number, handler)
  if told:
    logger.info("%s: stopped; %s.", run.name, exits.AGAIN)
    interrupted = told[-1] == signal.SIGINT
    sys.exit(exits.INTERRUPTED if interrupted else exits.RESTART)
  return child.returncode


def _log_progress(where: str, log: pathlib.Path) -> None:
  """Logs the newest line that a child has written about a step."""
  lines = re.findall(r"step \d+/\d+ .*", log.read_text(errors="replace"))
  logger.info("%s: %s", where, lines[-1] if lines else "starting")
