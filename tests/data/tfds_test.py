"""TFDS data sets prepared as ArrayRecord, without network or TensorFlow."""

import io
import json
import logging
import os
import pickle
import shutil
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from drift_jax.data import encoded, sources
from drift_jax.system import console
from tests.data.pictures import cut, picture, write

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
  LABEL_KEY = "label"

  def _info(self):
    features = {
      "image": tfds.features.Image(shape=(None, None, None)),
      self.LABEL_KEY: tfds.features.ClassLabel(names=self.NAMES),
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
          self.LABEL_KEY: LABELS[index],
          "mask": png(image[..., 0]),
        },
      )


class OtherKey(TinyPictures):
  """The same with the label under another name."""

  LABEL_KEY = "species"


class OtherKind(TinyPictures):
  """The same with a number for a label."""

  def _info(self):
    features = super()._info().features
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {**features, "label": tfds.features.Scalar(np.int64)}
      ),
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
  options = {"class_order": "", "max_corrupt": 0, "decoder": "pillow"}
  return sources.open_source(
    f"tfds:{name}", split=split, data_dir=str(data_dir), **options | changes
  )


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
  assert "tensorflow" not in sys.modules


def test_parts_of_a_split(prepared):
  whole = make(prepared)
  part = make(prepared, split="train[2:5]")
  assert len(part) == 3
  assert seeds_of(part) == seeds_of(whole)[2:5]
  np.testing.assert_array_equal(part.labels, whole.labels[2:5])
  assert "train[2:5][1]" in part.path(1)


def test_names_are_those_of_the_records_wherever_they_are(prepared, tmp_path):
  shutil.copytree(prepared, tmp_path / "moved")
  names = sources.names_sha256(make(prepared))
  assert sources.names_sha256(make(tmp_path / "moved")) == names != ""
  part = make(prepared, split="train[2:5]")
  assert sources.names_sha256(part) != names


def test_imagenet_order_by_class_names(prepared):
  plain = make(prepared)
  source = make(prepared, class_order="imagenet")
  assert len(source.class_names) == 1000
  np.testing.assert_array_equal(
    source.labels, np.array([281, 0, 999])[plain.labels]
  )


def test_labels_are_cached_and_the_cache_is_checked(
  prepared, tmp_path, monkeypatch, caplog
):
  source = make(prepared)
  want = source.labels
  (cache,) = (tmp_path / "cache/drift_jax").iterdir()
  reads = []
  original = type(source)._read_labels
  monkeypatch.setattr(
    type(source),
    "_read_labels",
    lambda self, n: reads.append(1) or original(self, n),
  )
  np.testing.assert_array_equal(make(prepared).labels, want)
  assert not reads
  np.testing.assert_array_equal(
    make(prepared, class_order="imagenet").labels,
    np.array([281, 0, 999])[want],
  )
  assert not reads  # one cache for every order
  make(prepared, split="train[:3]").labels.tolist()
  assert len(reads) == 1  # but not for another split
  good = cache.read_bytes()
  with np.load(cache) as stored:
    arrays = dict(stored)
  flipped = bytearray(good)
  flipped[good.index(want.tobytes())] ^= 1
  damages = [
    good[: len(good) // 2],
    b"",
    bytes(flipped),
  ]
  for damage in damages:
    cache.write_bytes(damage)
    with caplog.at_level(logging.WARNING):
      np.testing.assert_array_equal(make(prepared).labels, want)
    assert "made anew" in caplog.text
    caplog.clear()
    assert cache.read_bytes() == good
  for wrong in (
    {"labels": arrays["labels"][:-1]},
    {"labels": arrays["labels"] + np.int32(3)},
    {"labels": arrays["labels"].astype(np.int64)},
    {"fingerprint": np.array("other")},
  ):
    np.savez(cache, **arrays | wrong)
    np.testing.assert_array_equal(make(prepared).labels, want)
  assert len(reads) == 8
  assert len(list(cache.parent.iterdir())) == 2  # no leftovers


def test_changed_records_have_another_cache(prepared, tmp_path):
  make(prepared).labels.tolist()
  copy = tmp_path / "copy"
  shutil.copytree(prepared / "tiny_pictures/1.0.0", copy)
  np.testing.assert_array_equal(
    make("", str(copy)).labels, make(prepared).labels
  )
  assert len(list((tmp_path / "cache/drift_jax").iterdir())) == 2
  # Written again in place, with other labels perhaps.
  (shard,) = copy.glob("*-train.array_record*")
  os.utime(shard, (1, 1))
  make("", str(copy)).labels.tolist()
  assert len(list((tmp_path / "cache/drift_jax").iterdir())) == 3


def test_unwritable_cache_is_no_error(prepared, monkeypatch, tmp_path, caplog):
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
  with caplog.at_level(logging.WARNING):
    assert sorted(make(prepared).labels) == sorted(LABELS)
  assert "not kept" in caplog.text


def test_a_full_disk_leaves_no_half_cache(prepared, monkeypatch, tmp_path):
  def savez(file, **arrays):
    file.write(b"half")
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(np, "savez", savez)
  assert sorted(make(prepared).labels) == sorted(LABELS)
  assert list((tmp_path / "cache/drift_jax").iterdir()) == []


def test_goes_to_another_process(prepared):
  source = make(prepared)
  source.labels.tolist()
  copy = pickle.loads(pickle.dumps(source))
  assert seeds_of(copy) == seeds_of(source)
  np.testing.assert_array_equal(copy.labels, source.labels)
  assert copy.path(1) == source.path(1)


def test_missing_data_say_what_prepares_them(tmp_path):
  with pytest.raises(ValueError) as caught:
    make(tmp_path, "mnist")
  text = str(caught.value)
  assert f"no prepared data in {tmp_path}/mnist/" in text
  assert (
    "tfds.builder('mnist', data_dir="
    f"'{tmp_path}', file_format='array_record').download_and_prepare()"
  ) in text
  assert "ILSVRC2012" not in text
  with pytest.raises(ValueError, match="ILSVRC2012_img_train.tar.*ILSVRC") as e:
    make(tmp_path, "imagenet2012")
  assert f"{tmp_path}/downloads/manual" in str(e.value)
  assert "pip install tensorflow" in str(e.value)


@pytest.mark.parametrize(
  ("name", "match"),
  [
    ("nonsuch", "'tfds:nonsuch'.*not found.*prepared in"),
    ("ns:nonsuch", "Namespace ns not found"),
    ("/nonsuch", "no dataset_info.json in /nonsuch"),
  ],
)
def test_unknown_names(name, match, tmp_path):
  with pytest.raises(ValueError, match=match) as caught:
    make(tmp_path, name)
  assert len(str(caught.value)) < 600  # not TFDS' list of all data sets


def test_unknown_split(prepared):
  with pytest.raises(encoded.NoSplitError, match=r"'val'.*\['train'"):
    make(prepared, split="val[:5]")
  with pytest.raises(ValueError, match="Error parsing split") as caught:
    make(prepared, split="train[:5")
  assert not isinstance(caught.value, encoded.NoSplitError)


def copy_of(prepared, tmp_path):
  copy = tmp_path / "copy"
  shutil.copytree(prepared / "tiny_pictures/1.0.0", copy)
  return copy, next(copy.glob("*-train.array_record*"))


def test_a_folder_whose_name_is_a_pattern(prepared, tmp_path):
  folder = tmp_path / "d[1-2]"
  shutil.copytree(prepared / "tiny_pictures/1.0.0", folder / "1.0.0")
  assert len(make("", str(folder))) == len(make("", str(folder / "1.0.0")))


def test_several_versions_in_a_folder(prepared, tmp_path):
  for version in ("1.0.0", "1.1.0"):
    shutil.copytree(prepared / "tiny_pictures/1.0.0", tmp_path / "d" / version)
  with pytest.raises(ValueError, match="several data sets.*d/1.0.0.*d/1.1.0"):
    make("", f"{tmp_path}/d")


def test_tfrecord_says_how_to_convert(prepared, tmp_path):
  copy, _ = copy_of(prepared, tmp_path)
  info = json.loads((copy / "dataset_info.json").read_text())
  info["fileFormat"] = "tfrecord"
  (copy / "dataset_info.json").write_text(json.dumps(info))
  with pytest.raises(
    ValueError,
    match=r"as \['tfrecord'\][^$]*convert_format --dataset_version_dir=.*copy",
  ):
    make("", str(copy))


def test_missing_shard(prepared, tmp_path):
  copy, shard = copy_of(prepared, tmp_path)
  shard.unlink()
  with pytest.raises(ValueError, match=f"1 of 1 record files.*{shard.name}"):
    make("", str(copy))


def test_damaged_shard(prepared, tmp_path):
  copy, shard = copy_of(prepared, tmp_path)
  data = bytearray(shard.read_bytes())
  source = make("", str(copy))
  stored = data.index(source.read_bytes(4)[100:140])
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


def test_corrupt_images_are_counted(tmp_path):
  """An image that was already damaged when the data set was prepared."""
  files = [write(tmp_path / f"{i}.png", i) for i in range(7)]
  cut(files[1])

  class TinyDamaged(TinyPictures):
    def _generate_examples(self, count):
      for index in range(count):
        yield (
          index,
          {
            "image": files[index],
            "label": LABELS[index],
            "mask": files[index],
          },
        )

  TinyDamaged(
    data_dir=tmp_path, file_format="array_record"
  ).download_and_prepare()
  source = make(tmp_path, "tiny_damaged", max_corrupt=1)
  seeds = seeds_of(source)
  assert sorted(seeds)[:1] == [0] and len(set(seeds)) == 6
  (bad,) = source.corrupt
  index = next(i for i in range(7) if source.path(i) == bad[0])
  # Its place is taken by another of class 0.
  assert seeds[index] == 5 and source.labels[index] == 0
  with pytest.raises(encoded.CorruptImageError, match=r"train\["):
    seeds_of(make(tmp_path, "tiny_damaged"))


@pytest.mark.parametrize(
  ("builder", "name", "features"),
  [
    (OtherKey, "other_key", "species: ClassLabel"),
    (OtherKind, "other_kind", "label: Scalar"),
  ],
)
def test_other_features_are_named(builder, name, features, tmp_path):
  builder(data_dir=tmp_path, file_format="array_record").download_and_prepare()
  with pytest.raises(
    ValueError, match=f"'label' must be a ClassLabel.*{features}"
  ):
    make(tmp_path, name)
