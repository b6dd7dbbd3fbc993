"""Figures of a trained run: python -m drift_jax.evaluate --workdir=DIR ..."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags
from etils import epath

from drift_jax import config as config_lib
from drift_jax import console, experiment, metrics, sharding
from drift_jax.console import logger

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run.", required=True
)
_ALPHAS = flags.DEFINE_list(
  "alphas", None, "Guidance scales; the config's if not given."
)
_METRICS = flags.DEFINE_list(
  "metrics", None, "Figures, e.g. fd_pixel,coverage; the config's if not given."
)
_NUM_IMAGES = flags.DEFINE_integer(
  "num_images",
  None,
  "Images for each alpha; 0: as many as are held out; the config's if not "
  "given.",
  lower_bound=0,
)
_SEED = flags.DEFINE_integer(
  "seed",
  None,
  "Of noise and style; config.seed + 1 if not given.",
  lower_bound=0,
  upper_bound=2**32 - 1,
)
_STEP = flags.DEFINE_integer(
  "step", None, "Checkpoint; the best one, else the newest, if not given."
)
_EMA_DECAY = flags.DEFINE_float(
  "ema_decay", None, "Which EMA; the evaluated one if not given."
)
_OUT = flags.DEFINE_string(
  "out", None, "JSON to write; WORKDIR/evaluation.json if not given."
)


def evaluate(
  workdir: str,
  *,
  alphas: Sequence[float] | None = None,
  metric_names: Sequence[str] | None = None,
  num_images: int | None = None,
  seed: int | None = None,
  step: int | None = None,
  ema_decay: float | None = None,
) -> dict[str, Any]:
  """Figures of a checkpoint, beside the same figures of real images.

  Args:
    workdir: of the run.
    alphas: guidance scales; None for the config's.
    metric_names: see config.EVAL_METRICS; None for the config's.
    num_images: for each alpha, a multiple of the class count; 0 for as many as
      are held out, class for class.
    seed: of noise and style; None takes config.seed + 1, noise that the run's
      own evaluations (which chose the best checkpoint) did not use.
    step: checkpoint; None for the best, else the newest.
    ema_decay: which average; None for the evaluated one.

  Returns:
    {'step', 'ema_decay', 'seed', 'num_images', 'results': {alpha: {figure:
    value}}, 'baseline': {figure: value of real train images}}.

  Raises:
    ConfigError: arguments that do not fit the run.
    CheckpointError: no usable checkpoint.
    ArtifactError: an encoder that can't be loaded.
  """
  mesh = sharding.make_mesh()
  run = experiment.load_generator(workdir, mesh, step=step, ema_decay=ema_decay)
  given = {
    "alphas": None if alphas is None else tuple(alphas),
    "metrics": None if metric_names is None else tuple(metric_names),
    "num_images": num_images,
    "ema_decay": ema_decay,
  }
  evaluation = dataclasses.replace(
    run.config.eval, **{k: v for k, v in given.items() if v is not None}
  )
  # A metric may be asked for that the training did not rank by.
  checkpoints = dataclasses.replace(run.config.checkpoint, best_metric="")
  config = dataclasses.replace(
    run.config, eval=evaluation, checkpoint=checkpoints
  )
  config_lib.check(config)
  if not evaluation.metrics:
    raise config_lib.ConfigError(
      f"eval.metrics is empty: ask for some of {config_lib.EVAL_METRICS}"
    )
  seed = config.seed + 1 if seed is None else seed
  encoders = (
    experiment.load_encoders(config.encoders, mesh)
    if "fd_encoder" in evaluation.metrics
    else {}
  )
  experiment.check_frozen(
    epath.Path(workdir), experiment.frozen_sums(encoders, None)
  )
  readers = experiment.open_readers(config, run.vae)
  test = readers.test()
  with experiment.naming("eval"):
    labels = experiment.evaluation_labels(
      evaluation, config.model.num_classes, test
    )
    evaluators = experiment.make_evaluators(
      config, encoders, readers.train, test, mesh
    )
  sample_fn = experiment.make_sampler(run.task, mesh, seed)(run.params)
  results = metrics.evaluate(
    evaluators,
    sample_fn,
    labels,
    evaluation.alphas,
    experiment.pad_to_mesh(evaluation.batch_size, mesh),
  )
  return {
    "step": run.step,
    "ema_decay": evaluation.ema_decay,
    "seed": seed,
    "num_images": len(labels),
    "results": results,
    "baseline": metrics.baselines(evaluators),
  }


def table(report: dict[str, Any]) -> str:
  """The report as a Markdown table: a row for each figure."""
  alphas = list(report["results"])
  header = [f"{report['num_images']} images, step {report['step']}"]
  header += [f"alpha {alpha:g}" for alpha in alphas] + ["real"]
  rows = [header, ["---"] * len(header)]
  for figure in report["results"][alphas[0]]:
    values = [report["results"][alpha][figure] for alpha in alphas]
    row = [figure] + [f"{value:.4g}" for value in values]
    baseline = report["baseline"].get(figure)
    rows.append(row + ["" if baseline is None else f"{baseline:.4g}"])
  return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main(argv: list[str]) -> None:
  """Prints the table and writes the JSON that the flags ask for."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  console.setup()
  try:
    report = evaluate(
      _WORKDIR.value,
      alphas=parse_floats("alphas", _ALPHAS.value),
      metric_names=_METRICS.value,
      num_images=_NUM_IMAGES.value,
      seed=_SEED.value,
      step=_STEP.value,
      ema_decay=_EMA_DECAY.value,
    )
  except experiment.ERRORS as error:
    sys.exit(f"Error: {error}")
  print(table(report))
  out = _OUT.value or f"{_WORKDIR.value}/evaluation.json"
  with metrics.replacing(out) as temporary:
    temporary.write_text(json.dumps(report, indent=2))
  logger.info("Wrote %s.", out)


def parse_floats(flag: str, values: list[str] | None) -> list[float] | None:
  """Numbers of a list flag; ConfigError names the entry that is none."""
  if values is None:
    return None
  try:
    return [float(value) for value in values]
  except ValueError as error:
    raise config_lib.ConfigError(f"--{flag}: {error}") from error


if __name__ == "__main__":
  app.run(main)
