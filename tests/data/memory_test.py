"""Decoded images in memory."""

import pickle

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from drift_jax.data import encoded, images
from tests.data.pictures import cut, opened, picture, write


@pytest.mark.parametrize("sizes", [[(12, 10), (7, 9), (30, 2)], [(12, 10)]])
def test_holds_images_of_any_size(tmp_path, sizes):
  sizes = (sizes * 60)[:60]
  for seed, size in enumerate(sizes):
    write(tmp_path / f"data/{seed % 2}/{seed:03}.png", seed, size)
  cut(tmp_path / "data/0/004.png")
  with pytest.raises(encoded.CorruptImageError, match="0/004.png"):
    images.MemorySource(opened(f"folder:{tmp_path}/data"), num_threads=2)
  stored = opened(f"folder:{tmp_path}/data", max_corrupt=1)
  source = images.MemorySource(stored, num_threads=3)
  for path in (tmp_path / "data").glob("*/*"):
    path.unlink()
  source = pickle.loads(pickle.dumps(source))
  assert len(source) == 60 and source.class_names == ("0", "1")
  assert_array_equal(source.labels, stored.labels)
  seeds = [*range(0, 60, 2), *range(1, 60, 2)]
  seeds[2] = 6  # in the damaged one's place
  for index, seed in enumerate(seeds):
    want = np.asarray(picture(seed, sizes[seed]))
    assert_array_equal(source[index], want)
    assert_array_equal(np.asarray(source.image(index)), want)
  assert source.path(0) == f"{tmp_path}/data/0/000.png"


@pytest.mark.parametrize(
  ("crop", "flip", "wire", "channels"),
  [
    ("center", True, "uint8", 3),
    ("pad", False, "float32", 1),
  ],
)
def test_crops_in_memory_are_the_reader_s(tmp_path, crop, flip, wire, channels):
  """Bit for bit, flips included."""
  for seed in range(12):
    write(tmp_path / f"data/{seed % 2}/{seed:02}.png", seed)
  reader = images.ImageReader(
    opened(f"folder:{tmp_path}/data"),
    size=8 if crop == "center" else 16,
    channels=channels,
    crop=crop,
    crop_scale=(0.2, 1.0),
    flip=flip,
    wire=wire,
  )
  held = images.MemoryReader(reader, flip=flip)
  indices = np.array([3, 0, 11, 3, 7, 5, 1, 2])

  def rngs():
    return [np.random.default_rng(i) for i in range(len(indices))]

  got, want = held.read(indices, rngs()), reader.read(indices, rngs())
  assert got.dtype == want.dtype == held.dtype
  assert_array_equal(got, want)
  if flip and wire == "uint8":
    assert not np.array_equal(got, reader.pixels(indices))
  assert_array_equal(held.fixed(indices), reader.fixed(indices))
  assert held.sample_shape == reader.sample_shape and len(held) == 12
  assert_array_equal(held.labels, reader.labels)
  # What was read is a copy: augmenting it again leaves the images alone.
  got[...] = 0
  assert_array_equal(held.read(indices, rngs()), want)
