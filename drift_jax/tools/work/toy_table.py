"""Trains toys for a table: see drift_jax.tools.toy_table."""

import csv
import io
import itertools
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from drift_jax import config as config_lib
from drift_jax import drift
from drift_jax.metrics.files import replacing
from drift_jax.system.console import logger
from drift_jax.system.errors import ERRORS
from drift_jax.tasks import parse
from drift_jax.tasks.toy import train as train_toy
from drift_jax.tasks.toy.config import ToyConfig
from drift_jax.tasks.toy.plots import plot_toy_table
from drift_jax.training.drifting import drift_arguments
from drift_jax.training.facts import read_facts

# The figure of the table: energy distance to fresh data over that of data to
# data; beside it, where there are modes, how far the worst one's mass is off.
FIGURE = "energy_distance_ratio"
MODES = "worst_mode_error"


class Cell(NamedTuple):
  """Runs of a field on a toy.

  Attributes:
    figures: figures.json of each finished run, by seed.
    failed: what the others say.
  """

  figures: dict[int, dict[str, Any]]
  failed: list[str]

  def values(self, figure: str) -> np.ndarray:
    """Of the finished runs, those that have it."""
    found = [f[figure] for f in self.figures.values() if figure in f]
    return np.asarray(found, np.float64)

  def text(self) -> str:
    """Mean and deviation over seeds; the worst mode's error in brackets."""
    ratios, errors = self.values(FIGURE), self.values(MODES)
    if not len(ratios):
      return "failed" if self.failed else ""
    text = spread(ratios)
    if len(errors):
      text += f" ({spread(100 * errors)} %)"
    return text + f", {len(self.failed)} failed" * bool(self.failed)


Table = dict[tuple[str, str], Cell]


def spread(values: np.ndarray) -> str:
  """'mean ± sample standard deviation', of one value just it."""
  text = f"{values.mean():.3g}"
  return text if len(values) == 1 else f"{text} ± {values.std(ddof=1):.2g}"


def make_config(
  file: str, toy: str, variant: str, changes: Mapping[str, Any]
) -> dict[str, Any]:
  """The values of a run's config, checked.

  Raises:
    ConfigError: no such toy or variant, or values that can't be run.
  """
  values = config_lib.load_config(f"{file}:{toy},{variant}")
  for key, value in changes.items():
    *sections, name = key.split(".")
    section: Any = values
    for part in sections:
      section = section[part]
    section[name] = value
  config = parse(values)
  if not isinstance(config, ToyConfig):
    raise config_lib.ConfigError(
      f"--config={file}: task={config.task!r}, want 'toy': configs/toy.py"
    )
  drift_arguments(config.drift)
  return values


def changes_of(
  field: str, temperature: float, seed: int, overrides: Mapping[str, str]
) -> dict[str, Any]:
  """{key: value} of a run."""
  changes: dict[str, Any] = {
    "drift.field": field,
    "drift.temperatures": (temperature,),
    "seed": seed,
  }
  if field == "sinkhorn":
    changes["drift.negatives"] = "independent"
  for key, text in overrides.items():
    try:
      changes[key] = json.loads(text)
    except json.JSONDecodeError:
      changes[key] = text
  return changes


def train(
  config: Any, path: pathlib.Path, draw: bool
) -> tuple[dict[str, Any] | None, str]:
  """(figures.json of a run, or None, and what is wrong then)."""
  file = path / "figures.json"
  if file.exists():
    # A finished run is taken as it is only where it is the one asked for.
    if (path / "config.json").read_text() != config_lib.to_json(parse(config)):
      return None, (
        f"{path} holds a finished run of another config: use a new --workdir, "
        "or the flags that it was made with"
      )
  else:
    level = logger.level
    logger.setLevel("WARNING")  # a table says what its runs would
    try:
      train_toy.train_and_evaluate(config, str(path), draw=draw)
    except ERRORS as error:
      return None, str(error)
    finally:
      logger.setLevel(level)
  try:
    return read_facts(epath.Path(file), dict), ""
  except config_lib.ConfigError as error:
    return None, str(error)


def write(
  table: Table, workdir: pathlib.Path, temperature: str, about: str
) -> None:
  """Markdown, CSV and PNG of one temperature."""
  toys = list(dict.fromkeys(toy for toy, _ in table))
  fields = list(dict.fromkeys(field for _, field in table))
  lines = [
    f"# Fields on toys, temperature {temperature}",
    "",
    "Energy distance of samples to fresh data, over that of data to data (1 is "
    "perfect), mean ± sample standard deviation over seeds; in brackets, where "
    "there are modes, how far the worst one's mass is off its own.",
    "",
    about,
    "",
    "| | " + " | ".join(fields) + " |",
    "|---" * (1 + len(fields)) + "|",
  ]
  for toy in toys:
    cells = [table[toy, field].text() for field in fields]
    lines.append("| " + " | ".join([toy, *cells]) + " |")
  failed = [
    f"- {toy}, {field}: {text}"
    for (toy, field), cell in table.items()
    for text in cell.failed
  ]
  lines += ["", "Failed:", *failed] if failed else []
  rows = io.StringIO()
  names = ("toy", "field", "seed", FIGURE, "sliced_wasserstein_ratio", MODES)
  writer = csv.writer(rows, lineterminator="\n")
  writer.writerow((*names, "loss_ema", "step"))
  for (toy, field), cell in table.items():
    for seed, figures in cell.figures.items():
      found = [figures.get(n, "") for n in (*names[3:], "loss_ema", "step")]
      writer.writerow([toy, field, seed, *found])
  name = f"toys_{temperature}"
  for suffix, text in (
    (".md", "\n".join(lines) + "\n"),
    (".csv", rows.getvalue()),
  ):
    with replacing(workdir / f"{name}{suffix}") as file:
      file.write_text(text)
  plot_toy_table(
    {
      toy: {field: table[toy, field].values(FIGURE) for field in fields}
      for toy in toys
    },
    workdir / f"{name}.png",
    title=f"temperature {temperature}",
  )


def run(
  workdir: pathlib.Path,
  *,
  config: str,
  variant: str,
  toys: Sequence[str],
  fields: Sequence[str] | None,
  temperatures: Sequence[float],
  seeds: Sequence[int],
  overrides: Mapping[str, str],
  about: str,
) -> list[str]:
  """Trains what is not there yet; returns what failed.

  Args:
    workdir: of the runs and the tables.
    config: file of the toys.
    variant: of it, of all runs.
    toys: columns, variants of the config.
    fields: rows; None for all.
    temperatures: a table of each.
    seeds: of each run.
    overrides: {key of the config: value}.
    about: a line that the tables have.
  """
  if fields is None:
    fields = list(drift.FIELDS)
  chosen = itertools.product(temperatures, toys, fields)
  # All are checked before the first is trained.
  configs = {
    (temperature, toy, field, seed): make_config(
      config,
      toy,
      variant,
      changes_of(field, temperature, seed, overrides),
    )
    for temperature, toy, field in chosen
    for seed in seeds
  }
  jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  tables: dict[float, Table] = {
    temperature: {
      (toy, field): Cell({}, []) for toy in toys for field in fields
    }
    for temperature in temperatures
  }
  start, trained = time.monotonic(), 0
  # Seed by seed, so that a whole table comes first.
  order = sorted(configs, key=lambda run: seeds.index(run[3]))
  for number, (temperature, toy, field, seed) in enumerate(order, 1):
    path = workdir / f"{toy}-{field}-{temperature:g}" / f"seed_{seed}"
    done = (path / "figures.json").exists()
    figures, error = train(
      configs[temperature, toy, field, seed], path, draw=seed == seeds[0]
    )
    cell = tables[temperature][toy, field]
    if figures is None:
      cell.failed.append(f"seed {seed}: {error}")
    else:
      cell.figures[seed] = figures
    if not done:
      trained += 1
    left = (time.monotonic() - start) / max(trained, 1) * (len(order) - number)
    if not done or number == len(order):
      logger.info(
        "%d/%d %s, %s, temperature %g, seed %d: %s; about %.0f min left",
        number,
        len(order),
        toy,
        field,
        temperature,
        seed,
        cell.text(),
        left / 60,
      )
      write(tables[temperature], workdir, f"{temperature:g}", about)
  return [
    f"{toy}, {field}: {text}"
    for table in tables.values()
    for (toy, field), cell in table.items()
    for text in cell.failed
  ]
