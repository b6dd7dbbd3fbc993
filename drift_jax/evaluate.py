"""Figures of a generator or of images: python -m drift_jax.evaluate ...

  python -m drift_jax.evaluate --workdir=DIR [--alphas=1,1.5] ...
  python -m drift_jax.evaluate --weights=DIR --inception=DIR
      --inception_reference=FILE --num_samples=50000 ...
  python -m drift_jax.evaluate --images=DIR|FILE.npz --inception=DIR
      --inception_reference=FILE

Prints a table and writes a JSON report; where asked, also the figures over
alpha, the samples and their nearest training images.
"""

from typing import Any

from absl import app, flags

from drift_jax import config as config_lib
from drift_jax.system import options, paths, programs
from drift_jax.system.errors import naming
from drift_jax.tasks.generator.config import EVAL_METRICS

# Whose images are judged: one of these.
SOURCES = ("workdir", "weights", "images")
# {flag: the sources that have a use for it}; all have one for the others.
_ONLY_WITH = {
  **dict.fromkeys(("alphas", "labels", "samples_out", "vae"), SOURCES[:2]),
  **dict.fromkeys(
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
    SOURCES[:1],
  ),
}
# Flags that a request has under the same name.
_OF_REQUEST = (
  "metrics",
  "num_samples",
  "labels",
  "batch_size",
  "seed",
  "neighbours",
  "neighbour_space",
  "neighbour_samples",
  "samples_out",
)


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
  corner = f"{report['num_samples']} samples"
  if report.get("step") is not None:
    corner += f", step {report['step']}"
  header = [corner] + [
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
  values = flags.FLAGS
  with programs.checking(argv):
    arguments = request(values)
  programs.run(
    lambda: judge(values, arguments),
    processes=config_lib.process_flags(),
    join_timeout=values.join_timeout,
  )


def judge(values: flags.FlagValues, arguments: dict[str, Any]) -> None:
  """Computes the report, prints its table and writes it."""
  from drift_jax.metrics.files import write_report
  from drift_jax.system import processes
  from drift_jax.system.console import logger
  from drift_jax.tasks.generator.reports import (
    Request,
    report_on_images,
    report_on_run,
    report_on_weights,
  )
  from drift_jax.training.alone import alone_with

  asked = Request(**arguments)
  with alone_with(asked.out):
    if values.workdir is not None:
      report = report_on_run(
        values.workdir, asked, step=values.step, ema_decay=values.ema_decay
      )
    elif values.weights is not None:
      report = report_on_weights(values.weights, asked, vae=values.vae)
    else:
      report = report_on_images(values.images, asked)
    if processes.is_first():
      print(table(report))
      write_report(asked.out, report)
  logger.info("Wrote %s.", asked.out)


def request(values: flags.FlagValues) -> dict[str, Any]:
  """Arguments of reports.Request, by the flags.

  Raises:
    ConfigError: flags that don't go together, or a value that is none.
  """
  sources = [name for name in SOURCES if values[name].value is not None]
  if len(sources) != 1:
    raise config_lib.ConfigError(
      f"give one of {[f'--{name}' for name in SOURCES]}, got "
      f"{[f'--{name}' for name in sources] or 'none'}"
    )
  for name, allowed in _ONLY_WITH.items():
    if values[name].present and sources[0] not in allowed:
      raise config_lib.ConfigError(
        f"--{name}={values[name].value} with --{sources[0]}: it goes with "
        f"{' or '.join(f'--{source}' for source in allowed)}"
      )
  folder = "" if values.workdir is None else f"{values.workdir}/"
  out = values.out or f"{folder}evaluation.json"
  for name, path, suffix in (
    ("samples_out", values.samples_out, ".npz"),
    ("out", out, ".json"),
  ):
    if path is not None:
      with naming(f"--{name}"):
        paths.check_suffix(path, (suffix,))
  with naming("--alphas"):
    alphas = values.alphas and [float(alpha) for alpha in values.alphas]
  judges = {
    ("inception", "path"): values.inception,
    ("inception", "reference"): values.inception_reference,
    ("dinov2", "path"): values.dinov2,
    ("dinov2", "reference"): values.dinov2_reference,
  }
  return {name: values[name].value for name in _OF_REQUEST} | {
    "alphas": alphas,
    "paths": _paths(values),
    "judges": {key: path for key, path in judges.items() if path is not None},
    "out": out,
  }


def _paths(values: flags.FlagValues) -> dict[str, str]:
  """{key of a run's config: where it is now}, of the flags that are given.

  Raises:
    ConfigError: an encoder that is no NAME=DIR.
  """
  places = {
    "vae.path": values.vae,
    "data.source": values.data_source,
    "data.data_dir": values.data_dir,
  }
  for text in values.encoder:
    name, _, path = text.partition("=")
    if not name or not path:
      raise config_lib.ConfigError(f"--encoder={text}: want NAME=DIR")
    places[f"encoders.{name}.path"] = path
  return {key: value for key, value in places.items() if value}


if __name__ == "__main__":
  define_flags()
  app.run(main, flags_parser=config_lib.parse_flags)
