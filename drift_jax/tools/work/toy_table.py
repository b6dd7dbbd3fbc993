"""Trains toys for a table: see drift_jax.tools.toy_table."""

import itertools
import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from absl import flags

from drift_jax import config as config_lib
from drift_jax import drift
from drift_jax.system.console import logger
from drift_jax.system.errors import ERRORS
from drift_jax.tasks import parse
from drift_jax.tasks.toy import train as train_toy
from drift_jax.tasks.toy.config import ToyConfig
from drift_jax.tasks.toy.plots import plot_toy_table
from drift_jax.tools.work import rows
from drift_jax.training.drifting import drift_arguments

# The figure of the table: energy distance to fresh data over that of data to
# data; beside it, if there are modes, how far the worst one's mass is off.
FIGURE = "energy_distance_ratio"
MODES = "worst_mode_error"
# Figures of the CSV file.
_COLUMNS = (FIGURE, "sliced_wasserstein_ratio", MODES, "loss_ema", "step")

# {(toy, field): runs}.
Table = dict[tuple[str, str], rows.Runs]


def run(values: flags.FlagValues, overrides: Mapping[str, str]) -> list[str]:
  """Trains the runs that are missing; returns the failures.

  Args:
    values: flags of the tool.
    overrides: {key of the config: value}.
  """
  # 1. All configs are checked before the first is trained; seed by seed, so
  # that a whole table comes first.
  workdir = pathlib.Path(values.workdir)
  fields = values.fields or list(drift.FIELDS)
  toys = values.toys
  configs = {
    (temperature, toy, field, seed): make_config(
      f"{values.config}:{toy},{values.variant}",
      {
        "drift.field": field,
        "drift.temperatures": (temperature,),
        "seed": seed,
      },
      overrides,
    )
    for seed in values.seeds
    for temperature, toy, field in itertools.product(
      values.temperatures, toys, fields
    )
  }
  changed = [f"--config.{key}={value}" for key, value in overrides.items()]
  about = (
    f"Variant `{values.variant}`{', ' * bool(changed)}{' '.join(changed)}."
  )
  tables: dict[float, Table] = {
    temperature: {cell: rows.Runs() for cell in itertools.product(toys, fields)}
    for temperature in values.temperatures
  }
  # 2. The runs
  start, trained = time.monotonic(), 0
  for number, (key, config) in enumerate(configs.items(), 1):
    temperature, toy, field, seed = key
    path = workdir / f"{toy}-{field}-{temperature:g}" / f"seed_{seed}"
    done = (path / "figures.json").exists()
    cell = tables[temperature][toy, field]
    try:
      train(config, path, draw=seed == values.seeds[0])
      cell.add(rows.read(path), f"{toy}, {field}")
    except ERRORS as error:
      cell.failed[seed] = str(error)
    trained += not done
    if done and number < len(configs):
      continue
    left = (time.monotonic() - start) / max(trained, 1)
    logger.info(
      "%d/%d %s, %s, temperature %g, seed %d: %s; about %.0f min left",
      *(number, len(configs), toy, field, temperature, seed, cell_text(cell)),
      left * (len(configs) - number) / 60,
    )
    write(tables[temperature], workdir, f"{temperature:g}", about)
  return [line for table in tables.values() for line in _failures(table)]


def make_config(
  name: str, changes: Mapping[str, Any], overrides: Mapping[str, str]
) -> dict[str, Any]:
  """The values of a run's config, checked.

  Args:
    name: the config, FILE:VARIANT.
    changes: {dotted key: value} of the run.
    overrides: {dotted key: JSON, or text} of all runs.

  Raises:
    ConfigError: no such toy or variant, or values that can't be run.
  """
  values = config_lib.load_config(name)
  if values.get("task") != "toy":
    raise config_lib.ConfigError(
      f"--config={name}: task={values.get('task')!r}, want 'toy'"
    )
  rows.set_values(values, changes)
  if values["drift"]["field"] == "sinkhorn":
    values["drift"]["negatives"] = "independent"
  for key, text in overrides.items():
    try:
      rows.set_values(values, {key: json.loads(text)})
    except json.JSONDecodeError:
      rows.set_values(values, {key: text})
  config = parse(values)
  assert isinstance(config, ToyConfig)
  drift_arguments(config.drift)
  return values


def train(config: Any, path: pathlib.Path, draw: bool) -> None:
  """Trains a run, unless it is finished.

  Raises:
    ConfigError: a finished run of another config; and what training raises.
  """
  if (path / "figures.json").exists():
    if (path / "config.json").read_text() != config_lib.to_json(parse(config)):
      raise config_lib.ConfigError(
        f"{path} holds a finished run of another config: use a new --workdir, "
        "or the flags that it was made with"
      )
    return
  level = logger.level
  logger.setLevel("WARNING")  # the table reports in their place
  try:
    train_toy.train_and_evaluate(config, str(path), draw=draw)
  finally:
    logger.setLevel(level)


def cell_text(cell: rows.Runs) -> str:
  """Mean and deviation over seeds; the worst mode's error in brackets."""
  ratios, errors = cell.values(FIGURE), cell.values(MODES)
  if not len(ratios):
    return "failed" if cell.failed else ""
  text = rows.spread(ratios, 3)
  if len(errors):
    text += f" ({rows.spread(100 * errors, 3)} %)"
  return text + f", {len(cell.failed)} failed" * bool(cell.failed)


def write(
  table: Table, workdir: pathlib.Path, temperature: str, about: str
) -> None:
  """Markdown, CSV and PNG of one temperature."""
  toys = list(dict.fromkeys(toy for toy, _ in table))
  fields = list(dict.fromkeys(field for _, field in table))
  parts = [
    f"# Fields on toys, temperature {temperature}",
    "Energy distance of samples to fresh data, over that of data to data (1 is "
    "perfect), mean ± sample standard deviation over seeds; in brackets, if "
    "there are modes, how far the worst one's mass is off its own.",
    about,
    rows.markdown(
      ["", *fields],
      ([toy, *(cell_text(table[toy, f]) for f in fields)] for toy in toys),
    ),
  ]
  if failed := _failures(table):
    parts.append("\n- ".join(["Failed:", *failed]))
  lines = [
    {"toy": toy, "field": field, "seed": seed}
    | {name: figures.get(name, "") for name in _COLUMNS}
    for (toy, field), cell in table.items()
    for seed, figures in cell.figures.items()
  ]
  name = f"toys_{temperature}"
  markdown = "\n\n".join(parts) + "\n"
  table_csv = rows.csv_text(lines, ("toy", "field", "seed", *_COLUMNS))
  rows.write(workdir, name, md=markdown, csv=table_csv)
  plot_toy_table(
    {
      toy: {field: table[toy, field].values(FIGURE) for field in fields}
      for toy in toys
    },
    workdir / f"{name}.png",
    title=f"temperature {temperature}",
  )


def _failures(table: Table) -> list[str]:
  return [
    f"{toy}, {field}: seed {seed}: {text}"
    for (toy, field), cell in table.items()
    for seed, text in cell.failed.items()
  ]
