"""Finished runs and the parts that all their tables share."""

import csv
import dataclasses
import functools
import io
import itertools
import operator
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from drift_jax import config as config_lib
from drift_jax.config.sections import RunConfig
from drift_jax.metrics.files import PathLike, replacing
from drift_jax.metrics.writers import EVALUATION, read_jsonl
from drift_jax.system import storage
from drift_jax.tasks import parse

# Keys that say how a run is computed, not what: runs on other machines may
# have other values.
MACHINE = tuple(
  key for key in config_lib.RESUMABLE if not key.startswith(("train.", "eval."))
)


class FinishedRun(NamedTuple):
  """A run on disk.

  Attributes:
    path: workdir.
    config: parsed config.
    values: {dotted key: value} of the config; see config.completed.
    figures: {figure: number} at the end; nested figures have dotted names.
  """

  path: pathlib.Path
  config: RunConfig
  values: dict[str, Any]
  figures: dict[str, float]

  def records(self) -> list[dict[str, float | int]]:
    """The lines of metrics.jsonl."""
    return read_jsonl(self.path / "metrics.jsonl")


@dataclasses.dataclass(kw_only=True)
class Runs:
  """Runs that differ in their seeds alone: a row or a cell of a table.

  Attributes:
    figures: {seed: {figure: number}} of finished runs.
    workdirs: {seed: workdir} of finished runs.
    failed: {seed: why} of the others.
  """

  figures: dict[int, dict[str, float]] = dataclasses.field(default_factory=dict)
  workdirs: dict[int, str] = dataclasses.field(default_factory=dict)
  failed: dict[int, str] = dataclasses.field(default_factory=dict)

  def add(self, run: FinishedRun, name: str, prefix: str = "") -> None:
    """Adds a run: its figures that begin with a prefix, without it.

    Raises:
      ConfigError: a run of this seed is there already, under the row's name.
    """
    seed = run.config.seed
    if seed in self.figures:
      raise config_lib.ConfigError(
        f"{run.path}: {name}, seed {seed} is there twice"
      )
    self.workdirs[seed] = str(run.path)
    self.figures[seed] = {
      figure.removeprefix(prefix): value
      for figure, value in run.figures.items()
      if figure.startswith(prefix)
    }

  def values(self, figure: str) -> np.ndarray:
    """The figure of each seed that has it, in the order of seeds."""
    runs = [self.figures[seed] for seed in sorted(self.figures)]
    return np.asarray([run[figure] for run in runs if figure in run], float)

  def lines(self, **lead: str) -> list[dict[str, Any]]:
    """A line of CSV for each finished run, begun by `lead`."""
    return [
      {**lead, "seed": seed, "workdir": self.workdirs[seed], **figures}
      for seed, figures in sorted(self.figures.items())
    ]


def spread(values: np.ndarray, digits: int = 4) -> str:
  """'mean ± sample standard deviation'; of a single value just it."""
  if not len(values):
    return ""
  text = f"{values.mean():.{digits}g}"
  return text if len(values) == 1 else f"{text} ± {values.std(ddof=1):.2g}"


def markdown(header: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
  """A table in Markdown, without a newline at its end."""
  texts = [f"| {' | '.join(map(str, line))} |" for line in (header, *lines)]
  return "\n".join([texts[0], "|---" * len(header) + "|", *texts[1:]])


def csv_text(
  lines: Sequence[Mapping[str, Any]], first: Sequence[str] = ()
) -> str:
  """CSV whose header has the names in `first`, then other keys of lines."""
  names = dict.fromkeys((*first, *itertools.chain(*lines)))
  text = io.StringIO()
  writer = csv.DictWriter(text, list(names), lineterminator="\n")
  writer.writeheader()
  writer.writerows(lines)
  return text.getvalue()


def write(folder: PathLike, name: str, **texts: str) -> list[str]:
  """Writes NAME.SUFFIX for each suffix=text; returns the paths."""
  names = [f"{folder}/{name}.{suffix}" for suffix in texts]
  for path, text in zip(names, texts.values(), strict=True):
    with replacing(path) as temporary:
      temporary.write_text(text, encoding="utf-8")
  return names


def at_alpha(figure: str, alpha: float) -> str:
  """Name of a generator's figure at a guidance scale."""
  return f"{figure}/alpha_{alpha:g}"


def last_figures(
  records: Iterable[Mapping[str, float]], step: int
) -> tuple[dict[str, float], dict[str, float]]:
  """({figure: value}, {figure: value of real images}) of a step's evaluation.

  Values of one figure at several guidance scales follow each other.

  Args:
    records: lines of metrics.jsonl.
    step: step of the evaluation; without one both results are empty.
  """
  figures: dict[str, dict[str, float]] = {}
  real = {}
  for record in records:
    if record["step"] != step:
      continue
    for key, value in record.items():
      if not key.startswith(EVALUATION):
        continue
      name = key.removeprefix(EVALUATION)
      figure, _, alpha = name.partition("/alpha_")
      if alpha:
        name = at_alpha(figure, float(alpha))
      if name.endswith("/baseline"):
        real[name.removesuffix("/baseline")] = value
      else:
        figures.setdefault(figure, {})[name] = value
  return {k: v for each in figures.values() for k, v in each.items()}, real


def read(workdir: PathLike) -> FinishedRun:
  """Reads a finished run: figures.json, or the evaluation of the last step.

  Raises:
    ConfigError: a folder without a finished run.
  """
  path = pathlib.Path(workdir)
  written = _read_json(path / "config.json")
  config = parse(written)
  values = config_lib.flatten(config_lib.completed(written, config))
  run = FinishedRun(path, config, values, {})
  if config.task in ("toy", "policy"):
    figures = config_lib.flatten(_read_json(path / "figures.json"))
  else:
    figures, _ = last_figures(run.records(), config.train.num_steps)
  if not figures:
    raise config_lib.ConfigError(
      f"no finished run in {path}: metrics.jsonl has no evaluation of step "
      f"{config.train.num_steps}"
    )
  numbers = {k: v for k, v in figures.items() if isinstance(v, (int, float))}
  return run._replace(figures=numbers)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  if not path.exists():
    raise config_lib.ConfigError(
      f"no finished run in {path.parent}: {path} is missing"
    )
  return storage.read_json(epath.Path(path), dict)


def changes(
  before: Mapping[str, Any],
  after: Mapping[str, Any],
  free: tuple[str, ...] = (),
) -> dict[str, tuple[Any, Any]]:
  """{key: (value before, value after)} of keys that differ.

  Args:
    before, after: {dotted key: value}.
    free: beginnings of keys that are left out.
  """
  return {
    key: (before.get(key), after.get(key))
    for key in sorted({*before, *after})
    if before.get(key) != after.get(key) and not key.startswith(free)
  }


def set_values(config: dict[str, Any], values: Mapping[str, Any]) -> None:
  """Sets dotted keys of a config, a nested dict.

  Raises:
    ConfigError: a key that the config does not have.
  """
  for key, value in values.items():
    config_lib.check_override(config, key, str(value))
    *sections, name = key.split(".")
    functools.reduce(operator.getitem, sections, config)[name] = value
