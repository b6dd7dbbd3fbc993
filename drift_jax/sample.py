"""Images from a generator: python -m drift_jax.sample --from=SOURCE ...

  python -m drift_jax.sample --from=runs/digits --labels=3,5-7 --alpha=1.5
  python -m drift_jax.sample --from=hf://NAME --vae=weights/vae \\
      --labels="golden retriever" --count=16 --out=dogs.png
  python -m drift_jax.sample --from=export --count=50 --out=samples/
  python -m drift_jax.sample --from=export --interpolate=24 --out=walk.gif

--out says what is written: a grid (.png, .jpg, .webp), all images in ADM's
format (.npz), a walk from one noise to another (.gif), or a folder of single
images, which an interrupted command continues.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags
from PIL import Image

from drift_jax import config as config_lib
from drift_jax import (
  console,
  exits,
  experiment,
  metrics,
  numerics,
  paths,
  processes,
  sampling,
)
from drift_jax.console import logger

_FROM = paths.define_flag(
  "from",
  None,
  "A run's workdir, an export, an artifact's folder, hf://NAME of the authors' "
  "release or hf://OWNER/NAME[@REVISION][/FOLDER].",
)
_WORKDIR = paths.define_flag("workdir", None, "The same, of a run.")
_VAE = paths.define_flag(
  "vae",
  "",
  "Of an artifact: the autoencoder behind its latents; of a run where it is "
  "now, if it is not found.",
)
_LABELS = flags.DEFINE_list(
  "labels",
  None,
  "Class indices, ranges and names, e.g. 3,5-7,tench; all if not given. A name "
  "that holds a comma: '\"great white shark, white shark\"'. Classes that are "
  "called by numbers: index:3 or name:3.",
)
_ALPHA = flags.DEFINE_float("alpha", 1.0, "Guidance scale.")
_SEED = flags.DEFINE_integer(
  "seed",
  0,
  "Of noise and style.",
  lower_bound=0,
  upper_bound=sampling.MAX_SEED,
)
_STYLE = flags.DEFINE_list(
  "style",
  None,
  "Style indices that all images share: one for all tokens, or one for each; "
  "-1 leaves one to chance, as all are if this is not given.",
)
_COUNT = flags.DEFINE_integer(
  "count", 10, "Images of each label: a row of the grid.", lower_bound=1
)
_BATCH = flags.DEFINE_integer(
  "batch_size",
  sampling.BATCH_SIZE,
  "Images at a time, on all devices.",
  lower_bound=1,
)
_STEP = flags.DEFINE_integer(
  "step",
  None,
  "Of a run: checkpoint; the best one, else the newest, if not given.",
)
_EMA_DECAY = flags.DEFINE_float(
  "ema_decay", None, "Of a run: which EMA; the evaluated one if not given."
)
_INTERPOLATE = flags.DEFINE_integer(
  "interpolate",
  None,
  "Frames of a walk from one noise to another, there and back, as a .gif.",
  lower_bound=2,
)
_OUT = paths.define_flag(
  "out",
  "grid.png",
  "FILE.png (or .jpg, .webp), FILE.npz, FILE.gif, or a folder for .png files.",
)
config_lib.define_process_flags(join_timeout=processes.JOIN_SECONDS)

_FILES = (*metrics.PICTURES, ".npz", ".gif")
_FRAME_MS = 80


def parse_style(values: list[str] | None) -> list[int] | None:
  """Style indices of the flag; ConfigError names the entry that is none."""
  if values is None:
    return None
  try:
    return [int(value) for value in values]
  except ValueError as error:
    raise config_lib.ConfigError(f"--style: {error}") from error


def check_out(out: str, interpolate: int | None) -> str:
  """The suffix of a file, '' of a folder.

  Raises:
    ConfigError: a suffix that nothing here writes, or of something else than is
      asked for.
  """
  is_folder = os.path.isdir(out) or out.endswith("/")
  suffix = "" if is_folder else os.path.splitext(out)[1].lower()
  if suffix not in ("", *_FILES):
    raise config_lib.ConfigError(
      f"--out={out}: {suffix!r} is none of {list(_FILES)}; a folder ends in /"
    )
  if (suffix == ".gif") != (interpolate is not None):
    raise config_lib.ConfigError(
      f"--out={out} with --interpolate={interpolate}: a .gif is a walk of "
      "--interpolate=FRAMES, and only a .gif is"
    )
  return suffix


def main(argv: list[str]) -> None:
  """Writes what the flags ask for."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  console.setup()
  numerics.pin()
  exits.run(_run, experiment.ERRORS, again=exits.ANEW)


def _run() -> None:
  exits.join(
    *config_lib.process_flags(),
    join_timeout=flags.FLAGS.join_timeout,
    again=exits.ANEW,
  )
  source = sampling.source_of(_FROM.value, _WORKDIR.value)
  out = _OUT.value
  suffix = check_out(out, _INTERPOLATE.value)
  style = parse_style(_STYLE.value)
  model = sampling.load(
    source, vae=_VAE.value, step=_STEP.value, ema_decay=_EMA_DECAY.value
  )
  labels = np.repeat(model.labels(_LABELS.value), _COUNT.value)
  provenance = dict(model.generator.provenance)
  described = ", ".join(f"{key} {value}" for key, value in provenance.items())
  logger.info("Sampling from %s.", described)
  logger.info("Classes: %s.", model.describe(labels))
  asked = {"alpha": _ALPHA.value, "seed": _SEED.value, "style": style}
  rows = {"labels": _LABELS.value, "count": _COUNT.value}
  if suffix == ".gif":
    assert _INTERPOLATE.value is not None
    write_gif(
      model.interpolate(**rows, **asked, frames=_INTERPOLATE.value), out
    )
  elif suffix in metrics.PICTURES:
    samples = model.sample(**rows, **asked, batch_size=_BATCH.value)
    if processes.is_first():
      with experiment.naming("out"):
        samples.save(out)
  else:
    write = write_npz if suffix == ".npz" else write_folder
    with experiment.naming("out"):
      write(model, labels, asked, _BATCH.value, out)
  logger.info("Wrote %s.", out)


def write_gif(frames: Sequence[sampling.Samples], out: str) -> None:
  """Grids of all frames, there and back, as an endless animation."""
  pictures = [Image.fromarray(frame.grid()) for frame in frames]
  pictures += pictures[-2:0:-1]
  if processes.is_first():
    with metrics.replacing(out) as temporary:
      pictures[0].save(
        temporary,
        format="gif",
        save_all=True,
        append_images=pictures[1:],
        duration=_FRAME_MS,
        loop=0,
      )


def write_npz(
  model: sampling.Sampler,
  labels: np.ndarray,
  asked: Mapping[str, Any],
  batch_size: int,
  out: str,
) -> None:
  """All images in ADM's format; the file appears when it is whole."""
  writer = metrics.SampleWriter([out], labels)
  progress = console.Progress("Sampling", len(labels))
  try:
    writer.reset()
    for batch in model.batches(labels, **asked, batch_size=batch_size):
      writer.update(batch)
      progress.update(batch_total(batch))
    writer.result()
  finally:
    writer.close()
    rate = progress.close()
  logger.info("%.4g images/s.", rate)


def write_folder(
  model: sampling.Sampler,
  labels: np.ndarray,
  asked: Mapping[str, Any],
  batch_size: int,
  out: str,
) -> None:
  """Each image in its own file; those that are there already are left.

  Raises:
    ValueError: a folder of other images.
  """
  facts = {**asked, **experiment.identity(model.generator)}
  folder = metrics.SampleFolder(
    out, facts, labels.tolist(), about=model.generator.provenance
  )
  numbers = folder.missing()
  if len(numbers) < len(labels):
    logger.info(
      "%s holds %d of %d images.",
      out,
      len(labels) - len(numbers),
      len(labels),
    )
  progress = console.Progress("Sampling", len(numbers))
  try:
    if len(numbers):
      batches = model.batches(
        labels, **asked, batch_size=batch_size, numbers=numbers
      )
      for batch in batches:
        folder.update(batch)
        progress.update(batch_total(batch))
  finally:
    folder.close()
    rate = progress.close()
  logger.info("%.4g images/s.", rate)


def batch_total(batch: metrics.Batch) -> int:
  """Images of a batch, about, of all processes."""
  return len(batch.index) * jax.process_count()


if __name__ == "__main__":
  app.run(main, flags_parser=config_lib.parse_flags)
