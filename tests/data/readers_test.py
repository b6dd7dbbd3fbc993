"""Readers: crops, channels, wire formats, seeding, errors."""

import pickle

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from drift_jax.data import errors, readers, sources, transforms
from tests.data.pictures import picture, write

SIZES = [(40, 30), (24, 50), (16, 16), (33, 17)]


class Pictures:
  """Record i: `picture(i)` of SIZES[i]."""

  class_names = ("a", "b")
  labels = np.array([0, 1, 1, 0], np.int32)

  def __len__(self):
    return 4

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
  return readers.ImageReader(source or Pictures(), **arguments)


def rngs(*seeds):
  return [np.random.default_rng(seed) for seed in seeds]


def test_pixel_grid():
  grid = readers.pixel_grid()
  assert grid.dtype == np.float32 and grid.shape == (256,)
  want = (np.arange(256) - 127.5) / 127.5
  assert np.abs(grid - want).max() < 1e-7
  assert grid[0] == -1 and grid[255] == 1 and (np.diff(grid) > 0).all()


def test_center_crops():
  reader = make()
  assert reader.sample_shape == (16, 16, 3) and reader.dtype == np.uint8
  assert len(reader) == 4 and reader.class_names == ("a", "b")
  assert reader.labels.tolist() == [0, 1, 1, 0] and reader.chunk == 64
  got = reader.read(np.array([1, 3, 1]), rngs(0, 1, 2))
  assert got.dtype == np.uint8 and got.shape == (3, 16, 16, 3)
  for row, index in zip(got, [1, 3, 1], strict=True):
    want = transforms.center_crop(picture(index, SIZES[index]), 16)
    np.testing.assert_array_equal(row, np.asarray(want))


@pytest.mark.parametrize("crop", ["center", "random"])
def test_fixed_is_the_centre_crop_as_float(crop):
  reader = make(crop=crop, flip=True)
  got = reader.fixed(np.arange(4))
  assert got.dtype == np.float32
  pixels = make().read(np.arange(4), rngs(0, 1, 2, 3))
  np.testing.assert_array_equal(got, readers.pixel_grid()[pixels])
  assert np.isin(got, reader.grid).all()


def test_threads_change_nothing_of_fixed():
  """More images than threads, in order; what one of them meets arrives."""
  indices = np.tile(np.arange(4), 10)
  got = make(num_threads=3).fixed(indices)
  np.testing.assert_array_equal(got, make(num_threads=1).fixed(indices))
  with pytest.raises(errors.DataError, match="image 0 is 40 x 30"):
    make(num_threads=3, crop="none").fixed(np.array([2, 2, 0, 2]))


def test_float_wire_carries_the_same_values():
  a = make(flip=True).read(np.arange(4), rngs(0, 1, 2, 3))
  reader = make(flip=True, wire="float32")
  b = reader.read(np.arange(4), rngs(0, 1, 2, 3))
  assert b.dtype == reader.dtype == np.float32
  np.testing.assert_array_equal(b, readers.pixel_grid()[a])


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


@pytest.mark.parametrize("crop", ["center", "random"])
def test_a_record_depends_on_its_index_and_generator_alone(crop):
  reader = make(crop=crop, flip=True)
  together = reader.read(np.array([0, 3, 0]), rngs(5, 6, 7))
  for row, index, seed in zip(together, [0, 3, 0], [5, 6, 7], strict=True):
    alone = reader.read(np.array([index]), rngs(seed))[0]
    np.testing.assert_array_equal(row, alone)
  if crop == "random":
    assert not np.array_equal(together[0], together[2])


def test_random_crops_come_from_the_generator():
  reader = make(crop="random", crop_scale=(0.3, 0.6))
  got = reader.read(np.array([0]), rngs(3))[0]
  want = transforms.random_resized_crop(
    picture(0, SIZES[0]), 16, np.random.default_rng(3), (0.3, 0.6)
  )
  np.testing.assert_array_equal(got, np.asarray(want))


def test_pad():
  reader = make(crop="pad", size=50)
  got = reader.read(np.array([0]), rngs(0))[0]
  np.testing.assert_array_equal(
    got[10:40, 5:45], np.asarray(picture(0, SIZES[0]))
  )
  assert got[:10].max() == 0
  with pytest.raises(
    errors.DataError, match="image 1 is 24 x 50.*crop='pad' .*at most 32 x 32"
  ):
    make(crop="pad", size=32).fixed(np.array([1]))


def test_grey_images_keep_their_values(tmp_path):
  grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
  (tmp_path / "data/a").mkdir(parents=True)
  grey.save(tmp_path / "data/a/0.png")
  write(tmp_path / "data/a/1.png", 1, (16, 16))
  source = sources.open_source(
    f"folder:{tmp_path}/data",
    split="train",
    data_dir="",
    class_order="",
    max_corrupt=0,
    decoder="pillow",
  )
  reader = make(source, channels=1, crop="none")
  assert reader.sample_shape == (16, 16, 1)
  got = reader.read(np.array([0, 1]), rngs(0, 0))
  assert got.shape == (2, 16, 16, 1)
  np.testing.assert_array_equal(got[0, ..., 0], np.asarray(grey))
  luma = np.asarray(picture(1, (16, 16))) @ [0.299, 0.587, 0.114]
  assert np.abs(got[1, ..., 0] - luma).max() <= 0.51


def test_none_wants_the_size(tmp_path):
  np.testing.assert_array_equal(
    make(crop="none").read(np.array([2]), rngs(0))[0],
    np.asarray(picture(2, SIZES[2])),
  )
  with pytest.raises(
    ValueError, match="image 0 is 40 x 30 .*'none'.*16 x 16.*'center'"
  ):
    make(crop="none").fixed(np.array([0]))
  write(tmp_path / "data/a/0.png", 0)
  source = sources.open_source(
    f"folder:{tmp_path}/data",
    split="train",
    data_dir="",
    class_order="",
    max_corrupt=0,
    decoder="pillow",
  )
  with pytest.raises(ValueError, match="data/a/0.png is 12 x 10"):
    make(source, crop="none").fixed(np.array([0]))


def test_goes_to_another_process():
  reader = make(crop="random", flip=True)
  copy = pickle.loads(pickle.dumps(reader))
  np.testing.assert_array_equal(
    copy.read(np.arange(4), rngs(0, 1, 2, 3)),
    reader.read(np.arange(4), rngs(0, 1, 2, 3)),
  )


@pytest.mark.parametrize(
  ("change", "match"),
  [
    ({"size": 0}, "image_size=0"),
    ({"channels": 4}, r"channels=4.*\[1, 3\]"),
    ({"crop": "centre"}, "crop='centre'.*'center', 'random', 'pad', 'none'"),
    ({"crop_scale": (0.0, 1.0)}, r"crop_scale=\(0.0, 1.0\)"),
    ({"crop_scale": (0.5, 0.2)}, r"crop_scale=\(0.5, 0.2\)"),
    ({"wire": "float16"}, "wire='float16'.*'uint8', 'float32'"),
  ],
)
def test_errors(change, match):
  with pytest.raises(ValueError, match=match):
    make(**change)


@pytest.mark.parametrize("wire", ["float32", "float16", "bfloat16"])
def test_digits_are_exact_in_every_float(wire):
  source = sources.digits("test")
  reader = readers.ArrayReader(source, wire=wire)
  assert reader.dtype == np.dtype(getattr(ml_dtypes, wire, wire))
  assert reader.sample_shape == (8, 8, 1) and len(reader) == 540
  got = reader.read(np.array([5, 0]), rngs(0, 0))
  assert got.dtype == reader.dtype
  want = source.images[[5, 0]]
  np.testing.assert_array_equal(got.astype(np.float32), want)
  np.testing.assert_array_equal(reader.fixed(np.array([5, 0])), want)
  np.testing.assert_array_equal(reader.grid, source.grid)


def test_digits_do_not_fit_bytes():
  with pytest.raises(
    ValueError,
    match=r"'uint8' can't hold .* 17 values.*\['float32', 'float16', 'bf",
  ):
    readers.ArrayReader(sources.digits("test"), wire="uint8")
  with pytest.raises(ValueError, match="'float64'.*'float32'"):
    readers.ArrayReader(sources.digits("test"), wire="float64")
  thirds = sources.ArraySource(
    np.zeros((1, 1, 1, 1), np.float32),
    np.zeros(1, np.int32),
    ("a",),
    np.array([0, 1 / 3], np.float32),
  )
  with pytest.raises(ValueError, match=r"'float16'.*\['float32'\]"):
    readers.ArrayReader(thirds, wire="float16")
