"""Figures of a generator or of images: python -m drift_jax.evaluate ...

  python -m drift_jax.evaluate --workdir=DIR [--alphas=1,1.5] ...
  python -m drift_jax.evaluate --weights=DIR --inception=DIR
      --inception_reference=FILE --num_samples=50000 ...
  python -m drift_jax.evaluate --images=DIR|FILE.npz --inception=DIR
      --inception_reference=FILE

Prints a table and writes a JSON report; where asked, also the figures over
alpha, the samples and their nearest training images.
"""

import functools
import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from drift_jax import config as config_lib
from drift_jax.system import options, paths
from drift_jax.tasks.generator.config import EVAL_METRICS

# Whose images are judged: one of these.
SOURCES = ("workdir", "weights", "images")
# Flags that not every source of images has a use for.
_ONLY_WITH = (
  (
    ("workdir",),
    (
      "step",
      "ema_decay",
      "neighbours",
      "neighbour_space",
      "neighbour_samples",
      "encoder",
      "data_source",
      "data_dir",
    ),
  ),
  (("workdir", "weights"), ("alphas", "labels", "samples_out", "vae")),
)
# {flag: what it is of a request's judges}.
_JUDGES = {
  "inception": ("inception", "path"),
  "inception_reference": ("inception", "reference"),
  "dinov2": ("dinov2", "path"),
  "dinov2_reference": ("dinov2", "reference"),
}


def define_flags() -> None:
  """Defines the flags: not on import, as other programs have the same names."""
  paths.define_flag("workdir", None, "Folder of a run.")
  paths.define_flag(
    "weights",
    None,
    "A generator's exported weights: their folder, an export, or hf://NAME.",
  )
  paths.define_flag(
    "vae",
    "",
    "Folder of the autoencoder that decodes the latents of --weights, if they "
    "are no export; for --workdir, its folder now, if it has moved.",
  )
  flags.DEFINE_multi_string(
    "encoder",
    [],
    "Of --workdir: NAME=DIR, where encoders.NAME.path is now; once for each.",
  )
  flags.DEFINE_string(
    "data_source",
    None,
    "Of --workdir: where its data are now, e.g. folder:DIR.",
  )
  paths.define_flag(
    "data_dir", None, "Of --workdir: the folder that its data start from now."
  )
  paths.define_flag(
    "images", None, "Folder or ADM .npz of images that were made elsewhere."
  )
  flags.DEFINE_list(
    "alphas", None, "Guidance scales; the config's if not given."
  )
  flags.DEFINE_list(
    "metrics",
    None,
    f"Figures, of {EVAL_METRICS}; the config's, or "
    f"{','.join(options.METRICS)} without one.",
  )
  flags.DEFINE_integer(
    "num_samples",
    None,
    "For each alpha; 0: as many as are held out, or as --labels lists; the "
    f"config's, or {options.NUM_SAMPLES} without one.",
    lower_bound=0,
  )
  paths.define_flag(
    "labels", None, "File of class indices (.txt, .npy); balanced if not given."
  )
  flags.DEFINE_integer(
    "batch_size", None, "Samples at a time, on all devices.", lower_bound=1
  )
  flags.DEFINE_integer(
    "seed",
    None,
    "Of noise and style; config.seed + 1 if not given, 0 without a config.",
    lower_bound=0,
    upper_bound=options.MAX_SEED,
  )
  flags.DEFINE_integer(
    "step", None, "Checkpoint; the best one, else the newest, if not given."
  )
  flags.DEFINE_float(
    "ema_decay", None, "Which EMA; the evaluated one if not given."
  )
  paths.define_flag("inception", None, "Folder of the converted Inception-v3.")
  paths.define_flag(
    "inception_reference", None, "Its statistics of real images, .npz."
  )
  paths.define_flag("dinov2", None, "Folder of a converted DINOv2.")
  paths.define_flag(
    "dinov2_reference", None, "Its statistics of real images, .npz."
  )
  flags.DEFINE_integer(
    "neighbours",
    0,
    "Of --workdir: nearest training images of samples to look for; 10 in B.4.",
    lower_bound=0,
  )
  paths.define_flag(
    "neighbour_space",
    "encoder",
    "Where they are near: encoder, pixel, or the folder of a converted "
    "network.",
  )
  flags.DEFINE_integer(
    "neighbour_samples", 1000, "At least as many samples.", lower_bound=1
  )
  paths.define_flag(
    "samples_out",
    None,
    "Write the samples as an .npz in ADM's format; with several alphas, one "
    "for each, NAME_alpha_A.npz.",
  )
  paths.define_flag(
    "out",
    None,
    "JSON to write, pictures beside it; WORKDIR/evaluation.json or "
    "evaluation.json if not given.",
  )
  config_lib.define_process_flags(waits=True)


def table(report: dict[str, Any]) -> str:
  """The report as a Markdown table: a row for each figure."""
  columns = list(report["results"])
  header = [f"{report['num_samples']} samples"]
  if report.get("step") is not None:
    header[0] += f", step {report['step']}"
  header += [
    column if isinstance(column, str) else f"alpha {column:g}"
    for column in columns
  ]
  header += ["real"] if report["baseline"] else []
  rows = [header, ["---"] * len(header)]
  for figure in report["results"][columns[0]]:
    values = [report["results"][column][figure] for column in columns]
    row = [figure] + [f"{value:.4g}" for value in values]
    if report["baseline"]:
      baseline = report["baseline"].get(figure)
      row.append("" if baseline is None else f"{baseline:.4g}")
    rows.append(row)
  return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main(argv: list[str]) -> None:
  """Prints the table and writes the JSON that the flags ask for."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  try:
    asked = request(flags.FLAGS)
  except config_lib.ConfigError as error:
    sys.exit(f"Error: {error}")
  from drift_jax.system import console, exits, numerics

  console.setup()
  numerics.pin()
  program = functools.partial(_program, flags.FLAGS, asked)
  exits.run(program, again=exits.ANEW)


def _program(values: flags.FlagValues, asked: dict[str, Any]) -> None:
  from drift_jax.metrics.files import write_report
  from drift_jax.system import exits, processes
  from drift_jax.system.console import logger
  from drift_jax.tasks.generator.reports import (
    Request,
    report_on_images,
    report_on_run,
    report_on_weights,
  )
  from drift_jax.training.alone import alone_with

  exits.join(
    *config_lib.process_flags(),
    join_timeout=values.join_timeout,
    again=exits.ANEW,
  )
  wanted = Request(**asked)
  with alone_with(wanted.out):
    if values.workdir is not None:
      report = report_on_run(
        values.workdir, wanted, step=values.step, ema_decay=values.ema_decay
      )
    elif values.weights is not None:
      report = report_on_weights(values.weights, wanted, vae=values.vae)
    else:
      report = report_on_images(values.images, wanted)
    if processes.is_first():
      print(table(report))
      write_report(wanted.out, report)
  logger.info("Wrote %s.", wanted.out)


def request(values: flags.FlagValues) -> dict[str, Any]:
  """What the flags ask for: arguments of experiment.Request.

  Raises:
    ConfigError: flags that don't go together, or a value that is none.
  """
  sources = {name: values[name].value for name in SOURCES}
  given = [name for name, value in sources.items() if value is not None]
  if len(given) != 1:
    raise config_lib.ConfigError(
      f"give one of {[f'--{name}' for name in SOURCES]}, got "
      f"{[f'--{name}' for name in given] or 'none'}"
    )
  for allowed, others in _ONLY_WITH:
    for name in others:
      if values[name].present and given[0] not in allowed:
        raise config_lib.ConfigError(
          f"--{name}={values[name].value} with --{given[0]}: it goes with "
          f"{' or '.join(f'--{flag}' for flag in allowed)}"
        )
  if values.samples_out is not None:
    _check_suffix("samples_out", values.samples_out, ".npz")
  folder = "" if values.workdir is None else f"{values.workdir}/"
  out = values.out or f"{folder}evaluation.json"
  _check_suffix("out", out, ".json")
  judges = {_JUDGES[name]: values[name].value for name in _JUDGES}
  return {
    "alphas": parse_floats("alphas", values.alphas),
    "metrics": values.metrics,
    "num_samples": values.num_samples,
    "labels": values.labels,
    "paths": _paths(values),
    "batch_size": values.batch_size,
    "seed": values.seed,
    "judges": {key: path for key, path in judges.items() if path is not None},
    "neighbours": values.neighbours,
    "neighbour_space": values.neighbour_space,
    "neighbour_samples": values.neighbour_samples,
    "samples_out": values.samples_out,
    "out": out,
  }


def _check_suffix(flag: str, path: str, suffix: str) -> None:
  try:
    paths.check_suffix(path, (suffix,))
  except ValueError as error:
    raise config_lib.ConfigError(f"--{flag}: {error}") from error


def _paths(values: flags.FlagValues) -> dict[str, str]:
  """{key of a run's config: where it is now}, of the flags that are given.

  Raises:
    ConfigError: an encoder that is no NAME=DIR.
  """
  given = {
    "vae.path": values.vae,
    "data.source": values.data_source,
    "data.data_dir": values.data_dir,
  }
  for text in values.encoder:
    name, equals, path = text.partition("=")
    if not name or not equals or not path:
      raise config_lib.ConfigError(f"--encoder={text}: want NAME=DIR")
    given[f"encoders.{name}.path"] = path
  return {key: value for key, value in given.items() if value}


def parse_floats(flag: str, values: Sequence[str] | None) -> list[float] | None:
  """Numbers of a list flag; ConfigError names the entry that is none."""
  if values is None:
    return None
  try:
    return [float(value) for value in values]
  except ValueError as error:
    raise config_lib.ConfigError(f"--{flag}: {error}") from error


if __name__ == "__main__":
  define_flags()
  app.run(main, flags_parser=config_lib.parse_flags)
