"""The digits, held-out images, and which source a spec opens."""

import pickle
import sys

import numpy as np
import pytest

from drift_jax.data import folder, sources
from drift_jax.system import storage
from tests.data.pictures import opened, picture, write


def test_digits_split():
  train, test = sources.digits("train"), sources.digits("test")
  assert (len(train), len(test)) == (1257, 540)
  assert np.bincount(test.labels).tolist() == [54] * 10
  assert train.sample_shape == (8, 8, 1)
  assert train.images.dtype == np.float32 and train.labels.dtype == np.int32
  assert train.images.min() == -1.0 and train.images.max() == 1.0
  assert np.isin(train.images, train.grid).all()
  together = np.concatenate([train.images, test.images]).reshape(1797, -1)
  assert len(np.unique(together, axis=0)) == 1797
  with pytest.raises(sources.NoSplitError, match="'val'.*train"):
    sources.digits("val")


class Labelled(sources.Source):
  """Record i: one pixel of value i."""

  def __init__(self, labels, classes):
    self.labels = np.array(labels, np.int32)
    self.class_names = tuple("abcdefgh"[:classes])

  def __getitem__(self, index):
    return np.full((1, 1, 3), index, np.uint8)


def test_held_out_takes_the_same_number_of_each_class():
  labels = [0, 1, 3, 1, 0, 1, 3, 3, 0, 1, 0, 3]  # no 2
  source = Labelled(labels, 4)
  train, test = sources.held_out(source, per_class=1, seed=0)
  assert np.bincount(test.labels).tolist() == [1, 1, 0, 1]
  assert np.bincount(train.labels).tolist() == [3, 3, 0, 3]
  assert sorted([*train.indices, *test.indices]) == list(range(12))
  assert test.class_names == ("a", "b", "c", "d")
  for part in (train, test):
    assert (np.diff(part.indices) > 0).all()
    for index in range(len(part)):
      assert part[index][0, 0, 0] == part.indices[index]
      assert part.labels[index] == labels[part.indices[index]]


def test_held_out_takes_a_share_of_each_class():
  """Rounded, and at least one image; none may be left without."""
  source = Labelled([0] * 50 + [1] * 14 + [2] * 2, 4)
  train, test = sources.held_out(source, per_class=0.1, seed=0)
  assert np.bincount(test.labels).tolist() == [5, 1, 1]
  assert sorted([*train.indices, *test.indices]) == list(range(66))
  with pytest.raises(ValueError, match="0.9: 2 images of class 2 .'c'. of 2"):
    sources.held_out(source, per_class=0.9, seed=0)


def test_held_out_is_uniform_and_the_same_for_every_version():
  """Tested images must never become training images."""
  source = Labelled([0, 1] * 10, 2)
  _, test = sources.held_out(source, per_class=2, seed=0)
  assert test.indices.tolist() == [1, 8, 18, 19]
  drawn = [
    sources.held_out(source, per_class=4, seed=seed)[1].indices
    for seed in range(500)
  ]
  counts = np.bincount(np.concatenate(drawn))
  # Each of ten images of a class with probability 0.4: 5 sigma.
  assert np.abs(counts - 200).max() < 5 * np.sqrt(500 * 0.4 * 0.6)


def test_files_and_some_of_them(tmp_path):
  """Relative paths start at data_dir; a subset keeps paths and pictures."""
  for seed in range(6):
    write(tmp_path / "pets/train" / "ab"[seed % 2] / f"{seed}.png", seed)
  source = opened("folder:pets", data_dir=str(tmp_path))
  assert isinstance(source, folder.FolderSource) and len(source) == 6
  subset = sources.Subset(source, np.array([4, 0]))
  subset = pickle.loads(pickle.dumps(subset))
  assert subset.labels.tolist() == [1, 0]
  assert subset.path(0) == str(tmp_path / "pets/train/b/3.png")
  np.testing.assert_array_equal(subset.image(0), np.asarray(picture(3)))
  np.testing.assert_array_equal(subset[1], np.asarray(picture(0)))
  plain = sources.Subset(Labelled([0, 0], 1), np.array([1]))
  assert plain.path(0) == "image 1"
  assert np.asarray(plain.image(0)).tolist() == [[[1, 1, 1]]]


@pytest.mark.parametrize(
  ("spec", "data_dir", "message"),
  [
    ("folder:s3://bucket/x", "", "s3://bucket/x is a URL, .*disks only"),
    ("folder:gs://bucket/x", "", "gs://bucket/x: .*pip install gcsfs"),
    ("folder:x", "gs://bucket", "gs://bucket/x: .*pip install gcsfs"),
    ("tar:x", "gs://bucket", "gs://bucket is a URL, .*gcloud storage rsync"),
    ("tfds:mnist", "gs://bucket/x", "gs://bucket/x: .*pip install gcsfs"),
    ("tfds:gs://bucket/mnist", "", "gs://bucket/mnist: .*pip install gcsfs"),
    ("tfds:mnist", "s3://bucket/x", "s3://bucket/x: .*local disks and gs://"),
  ],
)
def test_urls(monkeypatch, spec, data_dir, message):
  monkeypatch.setitem(sys.modules, "gcsfs", None)
  with pytest.raises(storage.StorageError, match=message):
    opened(spec, data_dir=data_dir)
