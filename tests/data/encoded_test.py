"""Damaged files: counting, replacement, scanning; class order."""

import logging
from concurrent import futures

import numpy as np
import pytest
from PIL import Image

from drift_jax.data import encoded, folder
from drift_jax.data.errors import DataError
from drift_jax.system import console
from tests.data.pictures import cut, picture, write


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
  return folder.FolderSource(
    root,
    split="train",
    class_order="",
    max_corrupt=max_corrupt,
    decoder="pillow",
  )


def seeds_of(source, indices):
  """Which picture each index gives."""
  known = {np.asarray(picture(s)).tobytes(): s for s in range(8)}
  return [known[source[i].tobytes()] for i in indices]


def test_an_image_beyond_a_limit_is_named_and_never_replaced(root, monkeypatch):
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
  source = open_folder(root, max_corrupt=9)
  with pytest.raises(DataError, match=r"a/1.png: too large, not damaged"):
    source[1]
  assert not source.corrupt
  assert len(encoded.scan(source, 1)) == 8


def test_replacement_is_the_next_readable_of_the_class(root, caplog):
  for name in ("a/1.png", "a/2.png", "a/5.png"):
    cut(root / name)
  want = [0, 3, 3, 3, 4, 0, 6, 7]  # 1 and 2 -> 3; 5 -> round to 0
  source = open_folder(root, max_corrupt=3)
  with caplog.at_level(logging.WARNING):
    assert seeds_of(source, range(8)) == want
    # Whatever was read before, and however often.
    assert seeds_of(source, reversed(range(8))) == want[::-1]
  assert [path for path, _ in source.corrupt] == [
    str(root / f"a/{i}.png") for i in (1, 2, 5)
  ]
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
    encoded.CorruptImageError, match=r"class 1 \('b'\) has 2 images, none"
  ):
    source[7]


def test_empty_and_foreign_files_are_corrupt(root):
  (root / "a/1.png").write_bytes(b"")
  (root / "a/2.png").write_text("<html>not found</html>")
  assert seeds_of(open_folder(root, max_corrupt=2), [1, 2]) == [3, 3]


def test_unreadable_is_not_corrupt(root):
  """A file that is gone may come back: never replaced."""
  source = open_folder(root, max_corrupt=5)
  (root / "a/1.png").unlink()
  with pytest.raises(FileNotFoundError, match="a/1.png"):
    source[1]
  assert source.corrupt == ()


def test_threads_count_each_file_once(root):
  for name in ("a/1.png", "a/2.png", "b/6.png"):
    cut(root / name)
  source = open_folder(root, max_corrupt=3)
  with futures.ThreadPoolExecutor(8) as pool:
    got = list(pool.map(lambda i: seeds_of(source, [i])[0], [*range(8)] * 50))
  assert got == [0, 3, 3, 3, 4, 5, 7, 7] * 50
  assert len(source.corrupt) == 3


def test_long_lists_are_cut(tmp_path):
  for index in range(14):
    cut(write(tmp_path / f"data/a/{index:02}.png", index))
  source = open_folder(tmp_path / "data", max_corrupt=12)
  with pytest.raises(
    encoded.CorruptImageError, match=r"13 corrupt[^$]*09.png[^$]*and 3 more"
  ) as caught:
    source[0]
  assert "a/10.png" not in str(caught.value)


def test_scan_lists_every_bad_file(root):
  cut(root / "a/1.png")
  source = open_folder(root)
  (root / "b/6.png").unlink()
  bad = encoded.scan(source, num_threads=3)
  assert [path for path, _ in bad] == [
    str(root / "a/1.png"),
    str(root / "b/6.png"),
  ]
  assert "No such file" in bad[1][1] and bad[0][1]
  assert source.corrupt == ()


def test_scan_reaches_every_record(root, monkeypatch):
  monkeypatch.setattr(encoded, "_SCANNED_AT_ONCE", 3)
  for name in ("a/0.png", "a/2.png", "a/3.png", "b/7.png"):
    cut(root / name)
  bad = encoded.scan(open_folder(root), num_threads=2)
  assert [path[-7:] for path, _ in bad] == [
    "a/0.png",
    "a/2.png",
    "a/3.png",
    "b/7.png",
  ]


def test_negative_max_corrupt(root):
  with pytest.raises(ValueError, match="max_corrupt=-1"):
    open_folder(root, max_corrupt=-1)


def test_imagenet_classes():
  classes = encoded.imagenet_classes()
  ids = list(classes)
  assert len(ids) == len(set(classes.values())) == 1000
  assert ids == sorted(ids)  # the standard order is that of the ids
  assert classes["n01440764"] == "tench, Tinca tinca"
  assert ids.index("n02123045") == 281  # tabby, as everyone counts
  assert ids[999] == "n15075141"
  assert classes["n02012849"] == "crane (bird)"
  assert classes["n03126707"] == "crane (machine)"


def test_order_classes():
  names, labels = encoded.order_classes(["b", "a"], "")
  assert names == ("b", "a") and labels.tolist() == [0, 1]
  names, labels = encoded.order_classes(["n02123045", "n01440764"], "imagenet")
  assert labels.tolist() == [281, 0] and labels.dtype == np.int32
  assert names[281].startswith("tabby")
  with pytest.raises(ValueError, match=r"'coco'.*\['', 'imagenet'\]"):
    encoded.order_classes(["a"], "coco")
