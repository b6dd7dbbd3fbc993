"""Readers: crops, channels, wire formats, seeding, errors."""

import pickle

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image

from drift_jax.data import images, readers, sources, transforms
from drift_jax.system import errors
from tests.data.pictures import opened, picture, write

SIZES = [(40, 30), (24, 50), (16, 16), (33, 17)]


class Pictures(sources.Source):
  """Record i: `picture(i)` of SIZES[i]."""

  class_names = ("a", "b")
  labels = np.array([0, 1, 1, 0], np.int32)

  def __getitem__(self, index):
    return np.asarray(picture(index, SIZES[index]))


def make(source=None, **changes):
  arguments = {
    "size": 16,
    "channels": 3,
    "crop": "center",
    "crop_scale": (0.2, 1.0),
    "flip": False,
    "wire": "uint8",
    "num_threads": 2,
  } | changes
  return images.ImageReader(source or Pictures(), **arguments)


def rngs(*seeds):
  return [np.random.default_rng(seed) for seed in seeds]


def test_pixel_grid():
  grid = readers.pixel_grid()
  assert grid.dtype == np.float32 and grid.shape == (256,)
  want = (np.arange(256) - 127.5) / 127.5
  assert np.abs(grid - want).max() < 1e-7
  assert grid[0] == -1 and grid[255] == 1 and (np.diff(grid) > 0).all()


def crop_of(index, crop, seed=3):
  image = picture(index, SIZES[index])
  if crop == "random":
    rng = np.random.default_rng(seed)
    return transforms.random_resized_crop(image, 16, rng, (0.3, 0.6))
  return {"center": transforms.center_crop, "pad": transforms.pad}[crop](
    image, 50 if crop == "pad" else 16
  )


@pytest.mark.parametrize("wire", ["uint8", "float32"])
@pytest.mark.parametrize("crop", ["center", "random", "pad"])
def test_crops(crop, wire):
  """As they are read, and without chance; in every form of the wire."""
  size = 50 if crop == "pad" else 16
  reader = make(crop=crop, size=size, crop_scale=(0.3, 0.6), wire=wire)
  assert reader.sample_shape == (size, size, 3) and reader.dtype == wire
  assert len(reader) == 4 and reader.class_names == ("a", "b")
  assert reader.labels.tolist() == [0, 1, 1, 0]
  got = reader.read(np.array([1, 3, 1]), rngs(3, 3, 3))
  want = np.stack([np.asarray(crop_of(i, crop)) for i in [1, 3, 1]])
  grid = readers.pixel_grid()
  assert got.dtype == reader.dtype
  assert_array_equal(got, want if wire == "uint8" else grid[want])
  fixed = make(crop=crop, size=size, flip=True).fixed(np.arange(4))
  still = "center" if crop == "random" else crop
  want = np.stack([np.asarray(crop_of(i, still)) for i in range(4)])
  assert fixed.dtype == np.float32
  assert_array_equal(fixed, grid[want])


def test_threads_change_nothing_of_fixed():
  """More images than threads, in order; what one of them meets arrives."""
  indices = np.tile(np.arange(4), 10)
  got = make(num_threads=3).fixed(indices)
  assert_array_equal(got, make(num_threads=1).fixed(indices))
  with pytest.raises(errors.DataError, match="image 0 is 40 x 30"):
    make(num_threads=3, crop="none").fixed(np.array([2, 2, 0, 2]))


def test_flips_half_of_the_images():
  reader = make(flip=True)
  plain = make().read(np.array([2]), rngs(0))[0]
  flipped = 0
  for seed in range(200):
    got = reader.read(np.array([2]), rngs(seed))[0]
    mirrored = np.array_equal(got, plain[:, ::-1])
    assert mirrored or np.array_equal(got, plain)
    flipped += mirrored
  assert abs(flipped - 100) < 5 * np.sqrt(200 / 4)


def test_grey_images_keep_their_values(tmp_path):
  grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
  (tmp_path / "data/a").mkdir(parents=True)
  grey.save(tmp_path / "data/a/0.png")
  write(tmp_path / "data/a/1.png", 1, (16, 16))
  source = opened(f"folder:{tmp_path}/data")
  reader = pickle.loads(pickle.dumps(make(source, channels=1, crop="none")))
  got = reader.read(np.array([0, 1]), rngs(0, 0))
  assert got.shape == (2, 16, 16, 1)
  assert_array_equal(got[0, ..., 0], np.asarray(grey))
  luma = np.asarray(picture(1, (16, 16))) @ [0.299, 0.587, 0.114]
  assert np.abs(got[1, ..., 0] - luma).max() <= 0.51
  with pytest.raises(ValueError, match="a/0.png is 16 x 16 .*be 17 x 17: use"):
    make(source, crop="none", size=17).fixed(np.array([0]))
  with pytest.raises(errors.DataError, match="'pad' .*at most 15 x 15: use"):
    make(source, crop="pad", size=15).fixed(np.array([0]))


@pytest.mark.parametrize("wire", ["float32", "float16", "bfloat16"])
def test_digits_are_exact_in_every_float(wire):
  source = sources.digits("test")
  reader = readers.ArrayReader(source, wire=wire)
  assert reader.dtype == np.dtype(getattr(ml_dtypes, wire, wire))
  assert reader.sample_shape == (8, 8, 1) and len(reader) == 540
  got = reader.read(np.array([5, 0]), rngs(0, 0))
  assert got.dtype == reader.dtype
  want = source.images[[5, 0]]
  assert_array_equal(got.astype(np.float32), want)
  assert_array_equal(reader.fixed(np.array([5, 0])), want)
  assert_array_equal(reader.grid, source.grid)
