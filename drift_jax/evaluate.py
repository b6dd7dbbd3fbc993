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
from drift_jax import (
  console,
  exits,
  experiment,
  metrics,
  numerics,
  paths,
  processes,
)
from drift_jax.console import logger

_WORKDIR = paths.define_flag("workdir", None, "Folder of a run.")
_WEIGHTS = paths.define_flag(
  "weights",
  None,
  "A generator's exported weights: their folder, an export, or hf://NAME.",
)
_VAE = paths.define_flag(
  "vae",
  "",
  "The autoencoder behind the latents of --weights that are no export; of "
  "--workdir where it is now, if it is not found.",
)
_ENCODERS = flags.DEFINE_multi_string(
  "encoder",
  [],
  "Of --workdir: NAME=DIR, where encoders.NAME.path is now; once for each.",
)
_DATA_SOURCE = flags.DEFINE_string(
  "data_source", None, "Of --workdir: where its data are now, e.g. folder:DIR."
)
_DATA_DIR = paths.define_flag(
  "data_dir", None, "Of --workdir: the folder that its data start from now."
)
_IMAGES = paths.define_flag(
  "images", None, "Folder or ADM .npz of images that were made elsewhere."
)
_ALPHAS = flags.DEFINE_list(
  "alphas", None, "Guidance scales; the config's if not given."
)
_METRICS = flags.DEFINE_list(
  "metrics",
  None,
  f"Figures, of {config_lib.EVAL_METRICS}; the config's, or "
  f"{','.join(experiment.METRICS)} without one.",
)
_NUM_SAMPLES = flags.DEFINE_integer(
  "num_samples",
  None,
  "For each alpha; 0: as many as are held out, or as --labels lists; the "
  f"config's, or {experiment.NUM_SAMPLES} without one.",
  lower_bound=0,
)
_LABELS = paths.define_flag(
  "labels", None, "File of class indices (.txt, .npy); balanced if not given."
)
_BATCH_SIZE = flags.DEFINE_integer(
  "batch_size", None, "Samples at a time, on all devices.", lower_bound=1
)
_SEED = flags.DEFINE_integer(
  "seed",
  None,
  "Of noise and style; config.seed + 1 if not given, 0 without a config.",
  lower_bound=0,
  upper_bound=2**32 - 1,
)
_STEP = flags.DEFINE_integer(
  "step", None, "Checkpoint; the best one, else the newest, if not given."
)
_EMA_DECAY = flags.DEFINE_float(
  "ema_decay", None, "Which EMA; the evaluated one if not given."
)
_JUDGES = {
  (name, key): paths.define_flag(
    name if key == "path" else f"{name}_reference", None, text
  )
  for name, key, text in (
    ("inception", "path", "Folder of the converted Inception-v3."),
    ("inception", "reference", "Its statistics of real images, .npz."),
    ("dinov2", "path", "Folder of a converted DINOv2."),
    ("dinov2", "reference", "Its statistics of real images, .npz."),
  )
}
_NEIGHBOURS = flags.DEFINE_integer(
  "neighbours",
  0,
  "Of --workdir: nearest training images of samples to look for; 10 in B.4.",
  lower_bound=0,
)
_SPACE = paths.define_flag(
  "neighbour_space",
  "encoder",
  "Where they are near: encoder, pixel, or the folder of a converted network.",
)
_NEIGHBOUR_SAMPLES = flags.DEFINE_integer(
  "neighbour_samples", 1000, "At least as many samples.", lower_bound=1
)
_SAMPLES_OUT = paths.define_flag(
  "samples_out",
  None,
  "Write the samples as an .npz in ADM's format; with several alphas, one for "
  "each, NAME_alpha_A.npz.",
)
_OUT = paths.define_flag(
  "out",
  None,
  "JSON to write, pictures beside it; WORKDIR/evaluation.json or "
  "evaluation.json if not given.",
)
config_lib.define_process_flags(join_timeout=processes.JOIN_SECONDS)
# Flags that not every source of images has a use for.
_ONLY_WITH = (
  (
    ("--workdir",),
    (
      _STEP,
      _EMA_DECAY,
      _NEIGHBOURS,
      _SPACE,
      _NEIGHBOUR_SAMPLES,
      _ENCODERS,
      _DATA_SOURCE,
      _DATA_DIR,
    ),
  ),
  (("--workdir", "--weights"), (_ALPHAS, _LABELS, _SAMPLES_OUT, _VAE)),
)


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
  console.setup()
  numerics.pin()
  exits.run(_program, experiment.ERRORS, again=exits.ANEW)


def _program() -> None:
  exits.join(
    *config_lib.process_flags(),
    join_timeout=flags.FLAGS.join_timeout,
    again=exits.ANEW,
  )
  request = _request()
  with experiment.alone_with(request.out):
    report = _report(request)
    if processes.is_first():
      print(table(report))
      metrics.write_report(request.out, report)
  logger.info("Wrote %s.", request.out)


def _request() -> experiment.Request:
  """What the flags ask for."""
  sources = {
    "--workdir": _WORKDIR.value,
    "--weights": _WEIGHTS.value,
    "--images": _IMAGES.value,
  }
  given = [flag for flag, value in sources.items() if value is not None]
  if len(given) != 1:
    raise config_lib.ConfigError(
      f"give one of {list(sources)}, got {given or 'none'}"
    )
  for allowed, others in _ONLY_WITH:
    for flag in others:
      if flag.present and given[0] not in allowed:
        raise config_lib.ConfigError(
          f"--{flag.name}={flag.value} with {given[0]}: it goes with "
          f"{' or '.join(allowed)}"
        )
  if _SAMPLES_OUT.value is not None:
    with experiment.naming("--samples_out"):
      metrics.check_suffix(_SAMPLES_OUT.value, (".npz",))
  folder = "" if _WORKDIR.value is None else f"{_WORKDIR.value}/"
  out = _OUT.value or f"{folder}evaluation.json"
  with experiment.naming("--out"):
    metrics.check_suffix(out, (".json",))
  return experiment.Request(
    alphas=parse_floats("alphas", _ALPHAS.value),
    metrics=_METRICS.value,
    num_samples=_NUM_SAMPLES.value,
    labels=_LABELS.value,
    paths=_paths(),
    batch_size=_BATCH_SIZE.value,
    seed=_SEED.value,
    judges={
      key: flag.value for key, flag in _JUDGES.items() if flag.value is not None
    },
    neighbours=_NEIGHBOURS.value,
    neighbour_space=_SPACE.value,
    neighbour_samples=_NEIGHBOUR_SAMPLES.value,
    samples_out=_SAMPLES_OUT.value,
    out=out,
  )


def _report(request: experiment.Request) -> dict[str, Any]:
  """Of whichever source the flags name."""
  if _WORKDIR.value is not None:
    settings = {"step": _STEP.value, "ema_decay": _EMA_DECAY.value}
    return experiment.report_on_run(_WORKDIR.value, request, **settings)
  if _WEIGHTS.value is not None:
    return experiment.report_on_weights(_WEIGHTS.value, request, vae=_VAE.value)
  assert _IMAGES.value is not None
  return experiment.report_on_images(_IMAGES.value, request)


def _paths() -> dict[str, str]:
  """{key of a run's config: where it is now}, of the flags that are given.

  Raises:
    ConfigError: an encoder that is no NAME=DIR.
  """
  given = {
    "vae.path": _VAE.value,
    "data.source": _DATA_SOURCE.value,
    "data.data_dir": _DATA_DIR.value,
  }
  for text in _ENCODERS.value:
    name, equals, path = text.partition("=")
    if not name or not equals or not path:
      raise config_lib.ConfigError(f"--encoder={text}: want NAME=DIR")
    given[f"encoders.{name}.path"] = path
  return {key: value for key, value in given.items() if value}


def parse_floats(flag: str, values: list[str] | None) -> list[float] | None:
  """Numbers of a list flag; ConfigError names the entry that is none."""
  if values is None:
    return None
  try:
    return [float(value) for value in values]
  except ValueError as error:
    raise config_lib.ConfigError(f"--{flag}: {error}") from error


if __name__ == "__main__":
  app.run(main, flags_parser=config_lib.parse_flags)
