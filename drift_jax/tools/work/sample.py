"""Draws images into files: what python -m drift_jax.sample does."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from drift_jax import sampling
from drift_jax.metrics.batches import Batch
from drift_jax.metrics.files import replacing
from drift_jax.metrics.sample_folder import SampleFolder
from drift_jax.metrics.sample_writer import SampleWriter
from drift_jax.system import console, options, processes
from drift_jax.system.console import logger
from drift_jax.system.errors import naming
from drift_jax.tasks.generator.restore import identity

_FRAME_MS = 80


def draw(
  source: str,
  out: str,
  suffix: str,
  *,
  vae: str,
  step: int | None,
  ema_decay: float | None,
  labels: Sequence[str] | None,
  count: int,
  alpha: float,
  seed: int,
  style: Sequence[int] | None,
  batch_size: int,
  frames: int | None,
) -> None:
  """Writes images of a generator, with all processes.

  Args:
    source, vae, step, ema_decay: see sampling.load.
    out: a file, or a folder.
    suffix: the file's suffix; '' for a folder.
    labels, count, alpha, seed, style: see sampling.Sampler.sample.
    batch_size: images at a time, on all devices.
    frames: number of frames of a walk (.gif only).
  """
  model = sampling.load(source, vae=vae, step=step, ema_decay=ema_decay)
  indices = np.repeat(model.labels(labels), count)
  provenance = dict(model.generator.provenance)
  described = ", ".join(f"{key} {value}" for key, value in provenance.items())
  logger.info("Sampling from %s.", described)
  logger.info("Classes: %s.", model.describe(indices))
  asked = {"alpha": alpha, "seed": seed, "style": style}
  rows = {"labels": labels, "count": count}
  if suffix == ".gif":
    assert frames is not None
    write_gif(model.interpolate(**rows, **asked, frames=frames), out)
  elif suffix in options.PICTURES:
    samples = model.sample(**rows, **asked, batch_size=batch_size)
    if processes.is_first():
      with naming("out"):
        samples.save(out)
  else:
    write = write_npz if suffix == ".npz" else write_folder
    with naming("out"):
      write(model, indices, asked, batch_size, out)
  logger.info("Wrote %s.", out)


def write_gif(frames: Sequence[sampling.Samples], out: str) -> None:
  """Grids of all frames, there and back, as an endless animation."""
  pictures = [Image.fromarray(frame.grid()) for frame in frames]
  pictures += pictures[-2:0:-1]
  if processes.is_first():
    with replacing(out) as temporary:
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
  writer = SampleWriter([out], labels)
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
  facts = {**asked, **identity(model.generator)}
  folder = SampleFolder(
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


def batch_total(batch: Batch) -> int:
  """Images of a batch, about, of all processes."""
  return len(batch.index) * jax.process_count()
