"""TensorFlow Datasets prepared as ArrayRecord, read without TensorFlow."""

import functools
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Sequence
from concurrent import futures
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from drift_jax.data import encoded, sources
from drift_jax.data.files import replacing
from drift_jax.system import console, paths, storage

_ANY_VERSION = ":*.*.*"
_LABEL_THREADS = 8
_LABELS_AT_ONCE = 128  # 15 MB of ImageNet
_FEATURES = {"image": tfds.features.Image, "label": tfds.features.ClassLabel}


def _find(name: str, data_dir: str) -> epath.Path:
  """The directory that holds the records of a data set.

  Raises:
    ValueError: there is none, or several.
  """
  what = f"data.source='tfds:{name}'"
  if name.startswith(("/", ".", "~")) or "://" in name:
    root = epath.Path(paths.expand(name))
    for folders in ([root], storage.entries(root)):
      prepared = [f for f in folders if (f / "dataset_info.json").exists()]
      if len(prepared) > 1:
        several = list(map(str, prepared))
        raise ValueError(f"{what} holds several data sets, name one: {several}")
      if prepared:
        return prepared[0]
    raise ValueError(
      f"{what}: no dataset_info.json in {root} or in a folder of it: name the "
      "folder that TFDS prepared, e.g. ~/tensorflow_datasets/mnist/3.0.1"
    )
  # With a version TFDS looks for files before it asks the data set's code,
  # whose version may be newer.
  exact = name if ":" in name else name + _ANY_VERSION
  try:
    builder = tfds.builder(exact, data_dir=data_dir or None)
  except (ValueError, AssertionError) as error:
    # TFDS goes on with a list of all its data sets.
    reason = str(error).strip().split("\n")[0].replace(_ANY_VERSION, "")
    raise ValueError(
      f"{what}: {reason} Names (NAME, NAME/CONFIG or NAME:VERSION) are as in "
      "tensorflow.org/datasets/catalog; your own must have been prepared in "
      f"{data_dir or 'data.data_dir'}, or be named as tfds:/DIR/NAME/VERSION"
    ) from error
  if builder.is_prepared():
    return builder.data_path
  where = f", data_dir={data_dir!r}" if data_dir else ""
  text = (
    f"{what}: no prepared data in {builder.data_path} (data.data_dir, or "
    "TFDS_DATA_DIR, or ~/tensorflow_datasets). Prepare them with\n"
    f'  python -c "import tensorflow_datasets as tfds; tfds.builder({name!r}'
    f"{where}, file_format='array_record').download_and_prepare()\"\n"
    "which for many data sets, and for this once, needs `pip install "
    "tensorflow`; reading does not."
  )
  if re.split("[:/]", name)[0] == "imagenet2012":
    root = data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    text += (
      " imagenet2012 can't be downloaded: first put ILSVRC2012_img_train.tar "
      "and ILSVRC2012_img_val.tar (from image-net.org) into "
      f"{root}/downloads/manual."
    )
  raise ValueError(text)


def _builder(directory: epath.Path) -> Any:
  """Reads the directory's ArrayRecord files.

  Raises:
    ValueError: the records have another format, or their features do.
  """
  builder = tfds.builder_from_directory(directory)
  stored = {str(f.value) for f in builder.info.available_file_formats()}
  if "array_record" not in stored:
    raise ValueError(
      f"{directory} was prepared as {sorted(stored)}, which has no access by "
      "index. Convert it once (needs `pip install tensorflow`) with\n  tfds "
      f"convert_format --dataset_version_dir={directory} "
      "--out_file_format=array_record\nor prepare it anew elsewhere with "
      "file_format='array_record'"
    )
  features: Any = builder.info.features
  for key, kind in _FEATURES.items():
    if key not in features or not isinstance(features[key], kind):
      types = ", ".join(f"{k}: {type(f).__name__}" for k, f in features.items())
      raise ValueError(
        f"{directory}: the feature {key!r} must be a {kind.__name__}, but the "
        f"data set's features are {types}"
      )
  if features["image"].np_dtype != np.uint8:
    dtype = features["image"].np_dtype
    raise ValueError(f"{directory}: images are {dtype}, not uint8")
  return tfds.builder_from_directory(directory, file_format="array_record")


class TfdsSource(encoded.EncodedSource):
  """A split of a TFDS data set with features 'image' and 'label'.

  Images are kept as stored and decoded by `decode.decode`, so that greyscale
  ones come out as RGB. The first use of `labels` reads every record, minutes
  for ImageNet, and keeps the result in paths.user_cache().
  """

  _UNSENT = ("_lock", "corrupt", "_builder", "_records", "_features")

  def __init__(
    self, name: str, *, data_dir: str, split: str, class_order: str, **rest: Any
  ):
    """Finds the data set and opens the split.

    Args:
      name: NAME, NAME/CONFIG, either with :VERSION, or the path of a prepared
        data set, beginning with '/', '.', '~' or a scheme.
      split: as TFDS writes it, e.g. 'train' or 'train[:1000]'.
      data_dir: where TFDS keeps its data sets; '' for its default.
      class_order: '' (the data set's own) or 'imagenet' for data sets whose
        class names are WordNet ids (see `sources.order_classes`).
      **rest: max_corrupt, decoder: see `encoded.EncodedSource`.

    Raises:
      NoSplitError: the data set has no such split.
      ValueError: the data set is not prepared, has other features, or is
        stored in another format; the text says what to do.
    """
    self._directory = _find(name, data_dir)
    self._split = split
    label = _builder(self._directory).info.features["label"]
    class_names, self._label_of = sources.order_classes(
      [label.int2str(i) for i in range(label.num_classes)], class_order
    )
    super().__init__(class_names, **rest)
    files = [epath.Path(part.filename) for part in self._parts()]
    missing = [str(file) for file in files if not file.exists()]
    if missing:
      raise ValueError(
        f"{self._directory}: {len(missing)} of {len(files)} record files of "
        f"split {split!r} are missing: {missing[0]}: copy the data set anew"
      )

  def _open(self) -> None:
    super()._open()
    self._builder = _builder(self._directory)
    try:
      self._records = self._builder.as_data_source(
        self._split,
        deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
      )
    except ValueError as error:
      known = re.split(r"[\[+]", self._split)[0] in self._builder.info.splits
      kind = ValueError if known else sources.NoSplitError
      raise kind(f"{self._directory}: {error}") from error
    # The other features of a record are not parsed.
    self._features: Any = {
      key: tfds.features.FeaturesDict({key: self._builder.info.features[key]})
      for key in _FEATURES
    }

  def _parts(self) -> list[Any]:
    """The shards that the split reads, with the records of each."""
    return self._builder.info.splits[self._split].file_instructions

  def __len__(self) -> int:
    return len(self._records)

  def path(self, index: int) -> str:
    """DIRECTORY SPLIT[INDEX]."""
    return f"{self._directory} {self._split}[{index}]"

  def _read(self, key: str, indices: Sequence[int]) -> list[Any]:
    """A feature of successive records, images as they are stored."""
    try:
      records = self._records.__getitems__(indices)
    except (RuntimeError, IndexError, ValueError) as error:
      where = self.path(indices[0])
      if len(indices) > 1:
        where = f"one of {where} to [{indices[-1]}]"
      raise OSError(
        f"{where} is unreadable: {error}; copy or prepare the data set anew"
      ) from error
    skip = {"image": tfds.decode.SkipDecoding()} if key == "image" else None
    read = self._features[key].deserialize_example_np
    values = [read(record, decoders=skip)[key] for record in records]
    for index, value in zip(indices, values, strict=True):
      # Of a shard that was cut short, ArrayRecord may give empty records.
      if value is None:
        raise OSError(f"{self.path(index)} is empty: its shard is damaged")
    return values

  def read_bytes(self, index: int) -> bytes:
    """The encoded image of a record.

    Raises:
      OSError: the record's shard is missing or damaged.
    """
    return self._read("image", [index])[0]

  def _sha256(self, facts: list[Any]) -> str:
    """SHA-256 of the data set's name and version, and of facts."""
    text = json.dumps([self._builder.info.full_name, facts])
    return hashlib.sha256(text.encode()).hexdigest()

  def names_sha256(self) -> str:
    """Checksum of the name, the version and the records of the files."""
    parts = self._parts()
    return self._sha256(
      [(epath.Path(p.filename).name, p.skip, p.take) for p in parts]
    )

  @functools.cached_property
  def labels(self) -> np.ndarray:
    """[N] int32, from the cache or from the records."""
    # Changes with the data set, the records of the split and their files.
    facts = []
    for part in self._parts():
      stat = epath.Path(part.filename).stat()
      taken = (str(part.filename), part.skip, part.take)
      facts.append((*taken, stat.length, stat.mtime))
    fingerprint = self._sha256(facts)
    cache = paths.user_cache() / f"labels-{fingerprint[:32]}.npz"
    try:
      # A zip: its checksums are verified.
      with open(cache, "rb") as file, np.load(file) as stored:
        if str(stored["fingerprint"]) == fingerprint:
          return self._label_of[stored["labels"]]
      console.logger.warning("%s holds other labels: made anew", cache)
    except FileNotFoundError:
      pass
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
      console.logger.warning("%s can't be read (%s): made anew", cache, e)
    labels = self._read_labels()
    try:
      cache.parent.mkdir(parents=True, exist_ok=True)
      with replacing(cache) as path, path.open("wb") as file:
        np.savez(file, labels=labels, fingerprint=np.array(fingerprint))
    except OSError as error:
      console.logger.warning("labels are not kept: %s: %s", cache, error)
    return self._label_of[labels]

  def _read_labels(self) -> np.ndarray:
    """The labels as stored."""
    labels = np.empty(len(self), np.int32)

    def read(start: int) -> int:
      indices = range(start, min(start + _LABELS_AT_ONCE, len(labels)))
      labels[start : indices.stop] = self._read("label", indices)
      return len(indices)

    progress = console.Progress("Reading labels", len(labels))
    with futures.ThreadPoolExecutor(_LABEL_THREADS) as pool:
      for count in pool.map(read, range(0, len(labels), _LABELS_AT_ONCE)):
        progress.update(count)
    progress.close()
    bad = np.flatnonzero((labels < 0) | (labels >= len(self._label_of)))
    if bad.size:
      where, label = self.path(bad[0]), labels[bad[0]]
      raise ValueError(
        f"{where}: label {label} is not of {len(self._label_of)}"
      )
    return labels
