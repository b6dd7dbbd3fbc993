"""Images from a trained run: python -m drift_jax.sample --workdir=DIR ..."""

import sys

import numpy as np
from absl import app, flags

from drift_jax import config as config_lib
from drift_jax import console, experiment, metrics, sharding
from drift_jax.console import logger

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run.", required=True
)
_LABELS = flags.DEFINE_list(
  "labels", None, "Class indices, e.g. 3,7; all classes if not given."
)
_ALPHA = flags.DEFINE_float("alpha", 1.0, "Guidance scale.")
_SEED = flags.DEFINE_integer(
  "seed", 0, "Of noise and style.", lower_bound=0, upper_bound=2**32 - 1
)
_COUNT = flags.DEFINE_integer(
  "count", 10, "Images of each label: a row of the grid.", lower_bound=1
)
_STEP = flags.DEFINE_integer(
  "step", None, "Checkpoint; the best one, else the newest, if not given."
)
_EMA_DECAY = flags.DEFINE_float(
  "ema_decay", None, "Which EMA; the evaluated one if not given."
)
_OUT = flags.DEFINE_string("out", "grid.png", "PNG to write.")

BATCH_SIZE = 256


def parse_labels(names: list[str] | None, num_classes: int) -> np.ndarray:
  """Class indices from strings.

  Raises:
    ConfigError: naming the entry that is no class index.
  """
  if not names:
    return np.arange(num_classes, dtype=np.int32)
  for name in names:
    # Not isdigit, which is true of '²' as well.
    if not name.strip().isdecimal() or int(name) >= num_classes:
      raise config_lib.ConfigError(
        f"--labels={','.join(names)}: {name!r} is no class index in "
        f"[0, {num_classes})"
      )
  return np.array([int(name) for name in names], np.int32)


def sample(
  workdir: str,
  *,
  labels: list[str] | None,
  alpha: float,
  seed: int,
  count: int,
  step: int | None = None,
  ema_decay: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Draws `count` images of each label from a trained run.

  Image i depends on (seed, i, its label, alpha) alone.

  Args:
    workdir: of the run.
    labels: class indices as strings; None for all classes.
    alpha: guidance scale, inside the trained range.
    seed: of noise and style.
    count: images of each label.
    step: checkpoint; None for the best, else the newest.
    ema_decay: which average; None for the evaluated one.

  Returns:
    (images [L * count, H, W, C] float32 in [-1, 1], labels [L * count]).

  Raises:
    ConfigError: labels or alpha outside what was trained; no run there.
    CheckpointError: no usable checkpoint.
  """
  mesh = sharding.make_mesh()
  run = experiment.load_generator(workdir, mesh, step=step, ema_decay=ema_decay)
  classes = parse_labels(labels, run.config.model.num_classes)
  experiment.check_alphas([alpha], run.config.guidance)
  sample_fn = experiment.make_sampler(run.task, mesh, seed)(run.params)
  decode = experiment.make_decoder(run.vae, mesh)
  wanted = np.repeat(classes, count)
  batches = list(
    metrics.generate(
      sample_fn,
      wanted,
      alpha,
      batch_size=experiment.pad_to_mesh(min(BATCH_SIZE, len(wanted)), mesh),
    )
  )
  logger.info("%d images from step %d of %s.", len(wanted), run.step, workdir)
  images = [experiment.gathered(b, decode(b.samples)) for b in batches]
  return np.concatenate(images), wanted


def main(argv: list[str]) -> None:
  """Writes the grid that the flags ask for."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  console.setup()
  try:
    images, _ = sample(
      _WORKDIR.value,
      labels=_LABELS.value,
      alpha=_ALPHA.value,
      seed=_SEED.value,
      count=_COUNT.value,
      step=_STEP.value,
      ema_decay=_EMA_DECAY.value,
    )
    metrics.save_png(experiment.grid_image(images, _COUNT.value), _OUT.value)
  except experiment.ERRORS as error:
    sys.exit(f"Error: {error}")
  logger.info("Wrote %s.", _OUT.value)


if __name__ == "__main__":
  app.run(main)
