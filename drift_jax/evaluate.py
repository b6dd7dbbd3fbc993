"""Figures of a generator or of images: python -m drift_jax.evaluate ...

  python -m drift_jax.evaluate --from=WORKDIR [--alphas=1,1.5] ...
  python -m drift_jax.evaluate --from=EXPORT|hf://NAME --inception=DIR
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
from drift_jax.tasks.generator.protocols import PROTOCOLS, of_request

# Flags that go with a run alone, and with any generator.
_OF_RUN = ("step", "ema_decay", "encoder", "data_source", "data_dir")
_OF_RUN += ("classifier", "conditions")
_OF_RUN += ("neighbours", "neighbour_space", "neighbour_samples")
_OF_GENERATOR = ("alphas", "labels", "samples_out", "vae")
_OF_GENERATOR += ("label_order", "pixels")
# Flags that a request has under the same name.
_OF_REQUEST = ("metrics", "num_samples", "labels", "batch_size", "seed")
_OF_REQUEST += ("neighbours", "neighbour_space", "neighbour_samples")
_OF_REQUEST += ("samples_out", "label_order", "pixels")
# Flags that contradict a protocol, which says the same.
_OF_PROTOCOL = ("num_samples", "labels", "label_order", "pixels")


def define_flags() -> None:
  """Defines the flags: not on import, as other programs have the same names."""
  path, integer = paths.define_flag, flags.DEFINE_integer
  # 1. Whose images.
  config_lib.define_source_flag(
    f"A generator: {config_lib.GENERATORS}.",
    *("workdir", "weights"),
    required=False,
  )
  path("images", None, "Or a folder or an ADM .npz of images from elsewhere.")
  path("vae", "", "Autoencoder of weights; of a run, if it has moved.")
  flags.DEFINE_multi_string(
    "encoder", [], "NAME=DIR, once for each: where encoders.NAME.path is now."
  )
  flags.DEFINE_string("data_source", None, "Where the run's data are now.")
  path("conditions", None, "Where the run's data.conditions are now.")
  path("data_dir", None, "The folder that the run's data start from now.")
  # 2. Which samples, and which figures.
  flags.DEFINE_list("alphas", None, "Guidance scales; default: the config's.")
  flags.DEFINE_list(
    "metrics",
    None,
    f"Figures, of {EVAL_METRICS}; default: the config's, or "
    f"{','.join(options.METRICS)} without one.",
  )
  integer(
    "num_samples",
    None,
    "For each alpha; 0: as many as are held out, or as --labels lists; default:"
    f" the config's, or {options.NUM_SAMPLES} without one.",
    lower_bound=0,
  )
  path("labels", None, "File of class indices (.txt, .npy); default: balanced.")
  flags.DEFINE_enum(
    "label_order",
    None,
    options.LABEL_ORDERS,
    "Of the labels; default: the config's, or given.",
  )
  flags.DEFINE_enum(
    "pixels",
    None,
    options.PIXELS,
    "How samples become 8 bits; default: the config's, or truncate.",
  )
  flags.DEFINE_enum(
    "protocol",
    None,
    list(PROTOCOLS),
    "As published figures were measured: 50 of each class, and its pixels, "
    "order of labels, alphas and figures.",
  )
  integer("batch_size", None, "Samples at a time, of all devices.", 1)
  integer(
    "seed",
    None,
    "Of noise and style; default: config.seed + 1, 0 without a config.",
    lower_bound=0,
    upper_bound=options.MAX_SEED,
  )
  integer("step", None, "Checkpoint; default: the best one, else the newest.")
  flags.DEFINE_float(
    "ema_decay", None, "Which EMA; default: the evaluated one."
  )
  # 3. What they are compared with.
  path("inception", None, "Folder of the converted Inception-v3.")
  path("inception_reference", None, "Its statistics of real images, .npz.")
  path("dinov2", None, "Folder of a converted DINOv2.")
  path("dinov2_reference", None, "Its statistics of real images, .npz.")
  path("classifier", None, "WORKDIR/encoder of a classifier of the run's data.")
  integer("neighbours", 0, "Nearest training images; 10 in B.4.", 0)
  path("neighbour_space", "encoder", "encoder, pixel, or a network's folder.")
  integer("neighbour_samples", 1000, "Samples with neighbours, at least.", 1)
  # 4. What is written.
  path(
    "samples_out",
    None,
    "ADM .npz of the samples; with several alphas NAME_alpha_A.npz for each.",
  )
  path(
    "out",
    None,
    "JSON to write, pictures beside it; default: evaluation.json, of a run in "
    "its workdir.",
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
  from drift_jax.training.workdir import alone_with

  source, asked = config_lib.source(), Request(**arguments)
  with alone_with(asked.out):
    if source is None:
      report = report_on_images(values.images, asked)
    elif config_lib.is_run(source):
      report = report_on_run(
        source, asked, step=values.step, ema_decay=values.ema_decay
      )
    else:
      report = report_on_weights(source, asked, vae=values.vae)
    if processes.is_first():
      print(table(report))
      for text in report.get("protocol", {}).get("differs", ()):
        logger.warning("Not as --protocol=%s: %s.", values.protocol, text)
      write_report(asked.out, report)
  logger.info("Wrote %s.", asked.out)


def request(values: flags.FlagValues) -> dict[str, Any]:
  """Arguments of reports.Request, by the flags.

  Raises:
    ConfigError: flags that don't go together, or a value that is none.
  """
  source = config_lib.source()
  if (source is None) == (values.images is None):
    raise config_lib.ConfigError(
      "give --from=SOURCE of a generator, or --images=DIR|FILE.npz; got "
      f"{'neither' if source is None else 'both'}"
    )
  is_run = source is not None and config_lib.is_run(source)
  judged = f"--images={values.images}" if source is None else f"--from={source}"
  for names, allowed, kind in (
    (_OF_RUN, is_run, "a run"),
    (_OF_GENERATOR, source is not None, "a generator, --from=SOURCE"),
  ):
    for name in names:
      if values[name].present and not allowed:
        raise config_lib.ConfigError(
          f"--{name}={values[name].value} with {judged}: it goes with {kind}"
        )
  out = values.out or f"{f'{source}/' if is_run else ''}evaluation.json"
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
    ("classifier", "path"): values.classifier,
  }
  given = {name: values[name].value for name in _OF_REQUEST}
  given |= {"alphas": alphas}
  return {
    **_protocol(values),
    **{name: value for name, value in given.items() if value is not None},
    "paths": _paths(values),
    "judges": {key: path for key, path in judges.items() if path is not None},
    "out": out,
  }


def _protocol(values: flags.FlagValues) -> dict[str, Any]:
  """What --protocol says of a request; {} without one.

  Raises:
    ConfigError: a flag that says the same.
  """
  if values.protocol is None:
    return {}
  for name in _OF_PROTOCOL:
    if values[name].present:
      raise config_lib.ConfigError(
        f"--{name}={values[name].value} with --protocol={values.protocol}, "
        "which says the same itself: leave one of them out"
      )
  return of_request(values.protocol)


def _paths(values: flags.FlagValues) -> dict[str, str]:
  """{key of a run's config: where it is now}, of the flags that are given.

  Raises:
    ConfigError: an encoder that is no NAME=DIR.
  """
  places = {
    "vae.path": values.vae,
    "data.source": values.data_source,
    "data.data_dir": values.data_dir,
    "data.conditions": values.conditions,
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
