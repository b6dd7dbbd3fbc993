"""Draws images into files: what python -m drift_jax.sample does."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from drift_jax import sampling
from drift_jax.metrics.files import replacing
from drift_jax.metrics.sample_files import IMAGES, LABELS
from drift_jax.metrics.sample_folder import SampleFolder
from drift_jax.metrics.sample_writer import SampleWriter
from drift_jax.system import console, options, processes
from drift_jax.system.console import logger
from drift_jax.system.errors import ConfigError, naming
from drift_jax.tasks.generator.restore import identity
from drift_jax.training.conditions import CONDITIONS, read_arrays, sha256

_FRAME_MS = 80


def draw(
  asked: Mapping[str, Any],
  out: str,
  suffix: str,
  *,
  generator: Mapping[str, Any],
  batch_size: int,
  frames: int | None,
) -> None:
  """Writes images of a generator, with all processes.

  Args:
    asked: labels, count, alpha, seed and style, see sampling.Sampler.sample;
      'conditions' is a file or None.
    out: a file, or a folder.
    suffix: the file's suffix; '' for a folder.
    generator: arguments of sampling.load.
    batch_size: images at a time, on all devices.
    frames: number of frames of a walk (.gif only).
  """
  asked = dict(asked)
  if file := asked.pop("conditions", ""):
    with naming("--conditions"):
      found = read_arrays(file, (CONDITIONS,))
    asked["condition"] = found[CONDITIONS]
  model = sampling.load(**generator)
  if not model.are_images and suffix != ".npz":
    raise ConfigError(
      f"--out={out}: samples are arrays of shape {model.image_shape} that "
      "nothing here decodes: give an .npz, for float32 arrays"
    )
  labels, conditions = model.asked(
    asked["labels"], asked.get("condition"), asked["count"]
  )
  provenance = model.generator.provenance.items()
  logger.info(
    "Sampling from %s.",
    ", ".join(f"{key} {value}" for key, value in provenance),
  )
  logger.info("Classes: %s.", model.describe(labels))
  if suffix == ".gif":
    assert frames is not None
    write_gif(model.interpolate(**asked, frames=frames), out)
  elif suffix in options.PICTURES:
    samples = model.sample(**asked, batch_size=batch_size)
    if processes.is_first():
      with naming("out"):
        samples.save(out)
  elif not model.are_images:
    samples = model.sample(**asked, batch_size=batch_size)
    if processes.is_first():
      write_arrays(samples, out)
  else:
    facts = {name: asked[name] for name in ("alpha", "seed", "style")}
    with naming("out"):
      write_each(model, (labels, conditions), facts, batch_size, out, suffix)
  logger.info("Wrote %s.", out)


def write_arrays(samples: sampling.Samples, out: str) -> None:
  """An .npz of arrays as they are, float32, under the names of ADM's format."""
  arrays = {IMAGES: samples.images, LABELS: samples.labels.astype(np.int64)}
  with replacing(out) as temporary, temporary.open("wb") as file:
    np.savez(file, **arrays)


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


def write_each(
  model: sampling.Sampler,
  of_each: tuple[np.ndarray, np.ndarray | None],
  facts: Mapping[str, Any],
  batch_size: int,
  out: str,
  suffix: str,
) -> None:
  """All images: in ADM's format, or in a folder's files, of which those that
  are there already are left.

  Raises:
    ValueError: a folder of other images.
  """
  labels, conditions = of_each
  numbers = np.arange(len(labels), dtype=np.int32)
  if suffix == ".npz":
    writer = SampleWriter([out], labels)
    writer.reset()
  else:
    known = {**facts, **identity(model.generator)}
    if conditions is not None:
      known["conditions"] = sha256(conditions)
    about = model.generator.provenance
    writer = SampleFolder(out, known, labels.tolist(), about)
    numbers = writer.missing()
    there = len(labels) - len(numbers)
    if there:
      logger.info("%s holds %d of %d images.", out, there, len(labels))
  progress = console.Progress("Sampling", len(numbers))
  try:
    if len(numbers):
      for batch in model.batches(
        labels, conditions, **facts, batch_size=batch_size, numbers=numbers
      ):
        writer.update(batch)
        # Of all processes, about.
        progress.update(len(batch.index) * jax.process_count())
    if isinstance(writer, SampleWriter):
      writer.result()
  finally:
    writer.close()
    rate = progress.close()
  logger.info("%.4g images/s.", rate)
