"""TFDS data sets prepared as ArrayRecord, without network or TensorFlow."""

import io
import logging
import os
import pickle
import shutil
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from numpy.testing import assert_array_equal
from PIL import Image

from drift_jax.data import sources
from drift_jax.data.sources import names_sha256
from drift_jax.system import console
from tests.data.pictures import cut, opened, picture, write

LABELS = [1, 0, 2, 1, 1, 0, 2]


def png(image: np.ndarray) -> io.BytesIO:
  """As a file: TFDS encodes arrays with TensorFlow only."""
  file = io.BytesIO()
  Image.fromarray(image).save(file, "PNG")
  file.seek(0)
  return file


class TinyPictures(tfds.core.GeneratorBasedBuilder):
  """Seven labelled images, one of them grey, and a feature to ignore."""

  VERSION = tfds.core.Version("1.0.0")
  NAMES = ("n02123045", "n01440764", "n15075141")

  def _info(self):
    features = {
      "image": tfds.features.Image(shape=(None, None, None)),
      "label": tfds.features.ClassLabel(names=self.NAMES),
      "mask": tfds.features.Image(shape=(None, None, 1)),
    }
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features)
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    return {
      "train": self._generate_examples(7),
      "test": self._generate_examples(2),
    }

  def _generate_examples(self, count):
    for index in range(count):
      image = np.asarray(picture(index))
      yield (
        index,
        {
          "image": png(image[..., 0] if index == 3 else image),
          "label": LABELS[index],
          "mask": png(image[..., 0]),
        },
      )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """A data_dir with tiny_pictures/1.0.0."""
  root = tmp_path_factory.mktemp("tfds")
  TinyPictures(data_dir=root, file_format="array_record").download_and_prepare()
  return root


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setattr(console.logger, "propagate", True)


def make(data_dir, name="tiny_pictures", split="train", **changes):
  return opened(f"tfds:{name}", split, data_dir=str(data_dir), **changes)


def seeds_of(source):
  """Which picture each record is: TFDS shuffles when it prepares."""
  known = {np.asarray(picture(s)).tobytes(): s for s in range(7)}
  known[np.repeat(np.asarray(picture(3))[..., :1], 3, -1).tobytes()] = 3
  return [known[source[i].tobytes()] for i in range(len(source))]


@pytest.mark.parametrize(
  "name", ["tiny_pictures", "tiny_pictures:1.0.0", "PATH", "PATH/1.0.0"]
)
def test_reads_by_name_and_by_path(name, prepared):
  source = make(prepared, name.replace("PATH", f"{prepared}/tiny_pictures"))
  assert source.class_names == TinyPictures.NAMES and len(source) == 7
  seeds = seeds_of(source)
  assert sorted(seeds) == list(range(7))  # the grey one as RGB
  assert source.labels.tolist() == [LABELS[seed] for seed in seeds]
  assert source.labels.dtype == np.int32
  ordered = make(prepared, class_order="imagenet")
  assert len(ordered.class_names) == 1000
  want = np.array([281, 0, 999])[source.labels]
  assert_array_equal(ordered.labels, want)
  copy = pickle.loads(pickle.dumps(source))
  assert seeds_of(copy) == seeds and copy.path(1) == source.path(1)
  assert_array_equal(copy.labels, source.labels)
  assert "tensorflow" not in sys.modules


def test_parts_of_a_split(prepared):
  whole = make(prepared)
  part = make(prepared, split="train[2:5]")
  assert len(part) == 3
  assert seeds_of(part) == seeds_of(whole)[2:5]
  assert_array_equal(part.labels, whole.labels[2:5])
  assert "train[2:5][1]" in part.path(1)
  assert names_sha256(part) != names_sha256(whole)


def test_unknown_split(prepared):
  with pytest.raises(sources.NoSplitError, match=r"'val'.*\['train'"):
    make(prepared, split="val[:5]")
  with pytest.raises(ValueError, match="Error parsing split") as caught:
    make(prepared, split="train[:5")
  assert not isinstance(caught.value, sources.NoSplitError)


def copy_of(prepared, tmp_path, name="copy"):
  copy = tmp_path / name
  shutil.copytree(prepared / "tiny_pictures/1.0.0", copy)
  return copy, next(copy.glob("*-train.array_record*"))


def test_labels_are_cached_and_the_cache_is_checked(
  prepared, tmp_path, monkeypatch, caplog
):
  want = make(prepared).labels
  (cache,) = (tmp_path / "cache/drift_jax").iterdir()
  reads = []
  kind = type(make(prepared))
  original = kind._read_labels
  monkeypatch.setattr(
    kind, "_read_labels", lambda self: reads.append(1) or original(self)
  )
  assert_array_equal(make(prepared).labels, want)
  make(prepared, class_order="imagenet").labels.tolist()
  assert not reads  # one cache for every order
  make(prepared, split="train[:3]").labels.tolist()
  assert len(reads) == 1  # but not for another split
  good = cache.read_bytes()
  flipped = bytearray(good)
  flipped[good.index(want.tobytes())] ^= 1
  for damage in (good[: len(good) // 2], b"", bytes(flipped)):
    cache.write_bytes(damage)
    with caplog.at_level(logging.WARNING):
      assert_array_equal(make(prepared).labels, want)
    assert "made anew" in caplog.text
    caplog.clear()
    assert cache.read_bytes() == good
  assert len(reads) == 4
  assert len(list(cache.parent.iterdir())) == 2  # no leftovers


def test_changed_records_have_another_cache_and_the_same_names(
  prepared, tmp_path
):
  source = make(prepared)
  copy, shard = copy_of(prepared, tmp_path)
  moved = make("", str(copy))
  assert_array_equal(moved.labels, source.labels)
  assert names_sha256(moved) == names_sha256(source) != ""
  assert len(list((tmp_path / "cache/drift_jax").iterdir())) == 2
  # Written again in place, with other labels perhaps.
  os.utime(shard, (1, 1))
  make("", str(copy)).labels.tolist()
  assert len(list((tmp_path / "cache/drift_jax").iterdir())) == 3


def test_a_cache_that_can_not_be_kept(prepared, monkeypatch, tmp_path, caplog):
  def savez(file, **arrays):
    file.write(b"half")
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(np, "savez", savez)
  with caplog.at_level(logging.WARNING):
    assert sorted(make(prepared).labels) == sorted(LABELS)
  assert "not kept" in caplog.text
  assert list((tmp_path / "cache/drift_jax").iterdir()) == []


@pytest.mark.parametrize(
  ("name", "part"),
  [
    ("mnist", r"DIR/mnist/.*'mnist', data_dir='DIR', file_format='array_rec"),
    ("imagenet2012", "ILSVRC2012_img_train.tar.*DIR/downloads/manual"),
    ("nonsuch", "'tfds:nonsuch'.*not found.*prepared in"),
    ("/nonsuch", "no dataset_info.json in /nonsuch"),
  ],
)
def test_data_that_are_not_there(name, part, tmp_path):
  part = part.replace("DIR", str(tmp_path))
  with pytest.raises(ValueError, match=f"(?s){part}") as caught:
    make(tmp_path, name)
  assert len(str(caught.value)) < 800  # not TFDS' list of all data sets


def test_folders(prepared, tmp_path):
  """One whose name is a pattern; one of several versions."""
  copy_of(prepared, tmp_path, "d[1-2]/1.0.0")
  assert len(make("", f"{tmp_path}/d[1-2]")) == 7
  copy_of(prepared, tmp_path, "d[1-2]/1.1.0")
  with pytest.raises(ValueError, match="several data sets.*/1.0.0.*/1.1.0"):
    make("", f"{tmp_path}/d[1-2]")


def test_damaged_shards(prepared, tmp_path):
  copy, shard = copy_of(prepared, tmp_path)
  data = bytearray(shard.read_bytes())
  stored = data.index(make("", str(copy)).read_bytes(4)[100:140])
  data[stored + 20] ^= 255
  shard.write_bytes(data)
  source = make("", str(copy))
  with pytest.raises(OSError, match=r"copy train\[4\] is unreadable: .*hash"):
    source[4]
  with pytest.raises(OSError, match=r"one of .*train\[0\] to \[6\]"):
    source.labels.tolist()
  shard.write_bytes(data[: len(data) // 2])
  source = make("", str(copy))
  with pytest.raises(OSError, match=r"copy train\[0\] is (unreadable|empty)"):
    source[0]
  with pytest.raises(OSError, match=r"train\[0\].* is (unreadable|empty)"):
    source.labels.tolist()
  shard.unlink()
  with pytest.raises(ValueError, match=f"1 of 1 record files.*{shard.name}"):
    make("", str(copy))


def test_corrupt_images_are_replaced(tmp_path):
  """An image that was already damaged when the data set was prepared."""
  files = [write(tmp_path / f"{i}.png", i) for i in range(7)]
  cut(files[1])

  class TinyDamaged(TinyPictures):
    def _generate_examples(self, count):
      for i in range(count):
        yield i, {"image": files[i], "label": LABELS[i], "mask": files[i]}

  TinyDamaged(
    data_dir=tmp_path, file_format="array_record"
  ).download_and_prepare()
  source = make(tmp_path, "tiny_damaged", max_corrupt=1)
  seeds = seeds_of(source)
  (bad,) = source.corrupt
  index = next(i for i in range(7) if source.path(i) == bad)
  # Its place is taken by another of class 0.
  assert seeds[index] == 5 and source.labels[index] == 0
  assert sorted(seeds) == [0, 2, 3, 4, 5, 5, 6]
