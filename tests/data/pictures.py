"""Small real image files for the tests of sources."""

import pathlib

import numpy as np
from PIL import Image

from drift_jax.data.sources import open_source


def picture(seed: int, size: tuple[int, int] = (12, 10)) -> Image.Image:
  """RGB noise of (width, height), another for each seed."""
  rng = np.random.default_rng(seed)
  return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))


def write(path: pathlib.Path, seed: int, size=(12, 10)) -> pathlib.Path:
  """A picture in the format of the path's suffix, lossless where it can be."""
  path.parent.mkdir(parents=True, exist_ok=True)
  options = {"lossless": True} if path.suffix.lower() == ".webp" else {}
  picture(seed, size).save(path, **options)
  return path


def cut(path: pathlib.Path) -> None:
  """Truncates a file to half."""
  data = path.read_bytes()
  path.write_bytes(data[: len(data) // 2])


def opened(spec: str, split: str = "train", **changes):
  """A source; by default of its own classes, decoded by Pillow."""
  options = {"data_dir": "", "class_order": "", "max_corrupt": 0}
  return open_source(
    spec, split=split, **options | {"decoder": "pillow"} | changes
  )


def seeds_of(source, indices=None):
  """Which picture each index gives."""
  known = {np.asarray(picture(seed)).tobytes(): seed for seed in range(20)}
  indices = range(len(source)) if indices is None else indices
  return [known[source[i].tobytes()] for i in indices]
