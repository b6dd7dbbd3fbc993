"""Damaged files: counting, replacement; class order."""

import importlib.resources
import logging
from concurrent import futures

import numpy as np
import pytest
from PIL import Image

from drift_jax.data import encoded, sources
from drift_jax.system import console
from drift_jax.system.errors import DataError
from tests.data.pictures import cut, opened, picture, seeds_of, write


@pytest.fixture(autouse=True)
def _heard(monkeypatch):
  monkeypatch.setattr(console.logger, "propagate", True)


@pytest.fixture
def root(tmp_path):
  """Six images of class a (0..5), two of class b (6, 7)."""
  for index in range(8):
    write(tmp_path / "data" / "aaaaaabb"[index] / f"{index}.png", index)
  return tmp_path / "data"


def open_folder(root, max_corrupt=0):
  return opened(f"folder:{root}", max_corrupt=max_corrupt)


def test_an_image_beyond_a_limit_is_named_and_never_replaced(root, monkeypatch):
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
  source = open_folder(root, max_corrupt=9)
  with pytest.raises(DataError, match=r"a/1.png: too large, not damaged"):
    source[1]
  assert not source.corrupt


def test_replacement_is_the_next_readable_of_the_class(root, caplog):
  cut(root / "a/1.png")
  (root / "a/2.png").write_bytes(b"")
  (root / "a/5.png").write_text("<html>not found</html>")
  want = [0, 3, 3, 3, 4, 0, 6, 7]  # 1 and 2 -> 3; 5 -> round to 0
  source = open_folder(root, max_corrupt=3)
  with caplog.at_level(logging.WARNING):
    assert seeds_of(source) == want
    # Whatever was read before, and however often.
    assert seeds_of(source, reversed(range(8))) == want[::-1]
  assert list(source.corrupt) == [str(root / f"a/{i}.png") for i in (1, 2, 5)]
  warnings = [record.getMessage() for record in caplog.records]
  assert len(warnings) == 3 and "a/1.png" in warnings[0]
  np.testing.assert_array_equal(
    np.asarray(source.image(1)), np.asarray(picture(3))
  )
  assert seeds_of(open_folder(root, max_corrupt=3), [5, 1]) == [0, 3]


def test_one_too_many_is_an_error_that_lists_them(root):
  for name in ("a/1.png", "a/4.png", "b/6.png"):
    cut(root / name)
  source = open_folder(root, max_corrupt=2)
  assert seeds_of(source, [1, 4, 4, 1]) == [2, 5, 5, 2]
  with pytest.raises(
    encoded.CorruptImageError,
    match=r"3 corrupt .*max_corrupt=2[^$]*a/1.png[^$]*a/4.png[^$]*b/6.png",
  ):
    source[6]
  assert seeds_of(source, [0, 7]) == [0, 7]


def test_a_class_without_a_readable_image(root):
  cut(root / "b/6.png")
  cut(root / "b/7.png")
  source = open_folder(root, max_corrupt=5)
  with pytest.raises(
    encoded.CorruptImageError, match=r"class 1 \('b'\): none of its 2 images"
  ):
    source[7]


def test_unreadable_is_not_corrupt(root):
  """A file that is gone may come back: never replaced."""
  source = open_folder(root, max_corrupt=5)
  (root / "a/1.png").unlink()
  with pytest.raises(FileNotFoundError, match="a/1.png"):
    source[1]
  assert not source.corrupt


def test_threads_count_each_file_once(root):
  for name in ("a/1.png", "a/2.png", "b/6.png"):
    cut(root / name)
  source = open_folder(root, max_corrupt=3)
  with futures.ThreadPoolExecutor(8) as pool:
    got = list(pool.map(lambda i: seeds_of(source, [i])[0], [*range(8)] * 50))
  assert got == [0, 3, 3, 3, 4, 5, 7, 7] * 50
  assert len(source.corrupt) == 3


def test_imagenet_classes():
  classes = sources.imagenet_classes()
  ids = list(classes)
  assert len(ids) == len(set(classes.values())) == 1000
  assert ids == sorted(ids)  # the standard order is that of the ids
  assert ids[0] == "n01440764"
  theirs = importlib.resources.files("tensorflow_datasets.datasets")
  labels = theirs / "imagenet2012" / "labels.txt"
  assert ids == labels.read_text().split()  # what tfds:imagenet2012 reads
  assert classes["n01440764"] == "tench, Tinca tinca"
  assert ids.index("n02123045") == 281  # tabby, as everyone counts
  assert classes["n02012849"] == "crane (bird)"
  assert classes["n03126707"] == "crane (machine)"


def test_order_classes():
  names, labels = sources.order_classes(["b", "a"], "")
  assert names == ("b", "a") and labels.tolist() == [0, 1]
  names, labels = sources.order_classes(["n02123045", "n01440764"], "imagenet")
  assert labels.tolist() == [281, 0] and labels.dtype == np.int32
  assert names[281].startswith("tabby")
  with pytest.raises(ValueError, match=r"'coco'.*\['', 'imagenet'\]"):
    sources.order_classes(["a"], "coco")
