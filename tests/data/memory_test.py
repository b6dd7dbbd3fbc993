"""Decoded images in memory."""

import pickle

import numpy as np
import pytest

from drift_jax.data import encoded, memory, sources
from tests.data.pictures import cut, picture, write

OPTIONS = {
  "data_dir": "",
  "class_order": "",
  "max_corrupt": 0,
  "decoder": "pillow",
}


def test_holds_images_of_any_size(tmp_path):
  sizes = [(12, 10), (7, 9), (30, 2)] * 60
  for seed, size in enumerate(sizes):
    write(tmp_path / f"data/{seed % 2}/{seed:03}.png", seed, size)
  cut(tmp_path / "data/0/004.png")
  options = OPTIONS | {"max_corrupt": 1}
  stored = sources.open_source(
    f"folder:{tmp_path}/data", split="train", **options
  )
  source = memory.MemorySource(stored, num_threads=3)
  for path in (tmp_path / "data").glob("*/*"):
    path.unlink()
  source = pickle.loads(pickle.dumps(source))
  assert len(source) == 180 and source.class_names == ("0", "1")
  np.testing.assert_array_equal(source.labels, stored.labels)
  seeds = [*range(0, 180, 2), *range(1, 180, 2)]
  seeds[2] = 6  # in the damaged one's place
  for index, seed in enumerate(seeds):
    want = np.asarray(picture(seed, sizes[seed]))
    np.testing.assert_array_equal(source[index], want)


def test_images_of_one_size_are_one_array(tmp_path):
  for seed in range(4):
    write(tmp_path / f"data/a/{seed}.png", seed)
  stored = sources.open_source(
    f"folder:{tmp_path}/data", split="train", **OPTIONS
  )
  source = memory.MemorySource(stored, num_threads=1)
  assert source._images.shape == (4, 10, 12, 3)
  np.testing.assert_array_equal(source[3], np.asarray(picture(3)))


def test_refuses_what_the_source_refuses(tmp_path):
  for seed in range(3):
    write(tmp_path / f"data/a/{seed}.png", seed)
  cut(tmp_path / "data/a/1.png")
  source = sources.open_source(
    f"folder:{tmp_path}/data", split="train", **OPTIONS
  )
  with pytest.raises(encoded.CorruptImageError, match="a/1.png"):
    memory.MemorySource(source, num_threads=2)
