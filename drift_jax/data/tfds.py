"""TensorFlow Datasets prepared as ArrayRecord, read without TensorFlow."""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import tempfile
import time
import zipfile
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from drift_jax.data import encoded
from drift_jax.system import console, paths, storage

_ANY_VERSION = ":*.*.*"
_LABEL_THREADS = 8
_LABELS_AT_ONCE = 128  # 15 MB of ImageNet
_LOG_SECONDS = 10.0


def _prepare_command(name: str, data_dir: str) -> str:
  where = f", data_dir={data_dir!r}" if data_dir else ""
  return (
    'python -c "import tensorflow_datasets as tfds; '
    f"tfds.builder({name!r}{where}, file_format='array_record')"
    '.download_and_prepare()"'
  )


def _missing(name: str, data_dir: str, looked_in: str) -> ValueError:
  text = (
    f"data.source='tfds:{name}': no prepared data in {looked_in} "
    "(data.data_dir, or TFDS_DATA_DIR, or ~/tensorflow_datasets). Prepare "
    f"them with\n  {_prepare_command(name, data_dir)}\n"
    "which for many data sets, and for this once, needs `pip install "
    "tensorflow`; reading does not."
  )
  if re.split("[:/]", name)[0] == "imagenet2012":
    root = data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    text += (
      " imagenet2012 can't be downloaded: first put "
      "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar (from "
      f"image-net.org) into {root}/downloads/manual, TFDS' manual_dir."
    )
  return ValueError(text)


def _find(name: str, data_dir: str) -> epath.Path:
  """The directory that holds the records of a data set.

  Raises:
    ValueError: there is none, or several.
  """
  if name.startswith(("/", ".", "~")) or "://" in name:
    root = epath.Path(paths.expand(name))
    for folders in ([root], storage.entries(root)):
      infos = [folder / "dataset_info.json" for folder in folders]
      found = [info for info in infos if info.exists()]
      if len(found) > 1:
        raise ValueError(
          f"data.source='tfds:{name}' holds several data sets, name one of "
          f"{[str(path.parent) for path in found]}"
        )
      if found:
        return found[0].parent
    raise ValueError(
      f"data.source='tfds:{name}': no dataset_info.json in {root} or in a "
      "folder of it: name the folder that TFDS prepared, e.g. "
      "~/tensorflow_datasets/mnist/3.0.1"
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
      f"data.source='tfds:{name}': {reason} Names are as in "
      "tensorflow.org/datasets/catalog, NAME, NAME/CONFIG or NAME:VERSION; a "
      f"data set of your own must have been prepared in "
      f"{data_dir or 'data.data_dir'}, or be named by its folder, "
      "tfds:/DIR/NAME/VERSION"
    ) from error
  if not builder.is_prepared():
    raise _missing(name, data_dir, str(builder.data_path))
  return builder.data_path


def _open(directory: epath.Path) -> Any:
  """A builder that reads the directory's ArrayRecord files.

  Raises:
    ValueError: the records have another format.
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
  return tfds.builder_from_directory(directory, file_format="array_record")


def _check_features(features: Any, directory: epath.Path) -> None:
  """Raises ValueError where 'image' or 'label' is not what we read."""
  wanted = {"image": tfds.features.Image, "label": tfds.features.ClassLabel}
  for key, kind in wanted.items():
    if key not in features or not isinstance(features[key], kind):
      raise ValueError(
        f"{directory}: the feature {key!r} must be a {kind.__name__}, but the "
        "data set's features are "
        + ", ".join(f"{k}: {type(f).__name__}" for k, f in features.items())
      )
  if features["image"].np_dtype != np.uint8:
    raise ValueError(
      f"{directory}: images are {features['image'].np_dtype}, not uint8"
    )


def _cache_dir() -> pathlib.Path:
  root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return pathlib.Path(paths.expand(root)) / "drift_jax"


class TfdsSource(encoded.EncodedSource):
  """A split of a TFDS data set with features 'image' and 'label'.

  Images are kept as stored and decoded by `decode.decode`, so that greyscale
  ones come out as RGB. The first use of `labels` reads every record, minutes
  for ImageNet, and keeps the result in $XDG_CACHE_HOME/drift_jax (or
  ~/.cache/drift_jax).
  """

  def __init__(
    self,
    name: str,
    *,
    split: str,
    data_dir: str,
    class_order: str,
    max_corrupt: int,
    decoder: str,
  ):
    """Finds the data set and opens the split.

    Args:
      name: NAME, NAME/CONFIG, either with :VERSION, or the path of a prepared
        data set, beginning with '/', '.', '~' or a scheme.
      split: as TFDS writes it, e.g. 'train' or 'train[:1000]'.
      data_dir: where TFDS keeps its data sets; '' for its default.
      class_order: '' (the data set's own) or 'imagenet' for data sets whose
        class names are WordNet ids (see `encoded.order_classes`).
      max_corrupt: images that may turn out undecodable before it is an error.
      decoder: see `decode.decode`.

    Raises:
      NoSplitError: the data set has no such split.
      ValueError: the data set is not prepared, has other features, or is
        stored in another format; the text says what to do.
    """
    self._directory = _find(name, data_dir)
    self._split = split
    self._open()
    self._check_files()
    label = self._builder.info.features["label"]
    names = [label.int2str(i) for i in range(label.num_classes)]
    class_names, self._label_of = encoded.order_classes(names, class_order)
    super().__init__(
      class_names=class_names, max_corrupt=max_corrupt, decoder=decoder
    )
    self._labels: np.ndarray | None = None

  def _open(self) -> None:
    self._builder = _open(self._directory)
    features = self._builder.info.features
    _check_features(features, self._directory)
    try:
      self._records = self._builder.as_data_source(
        self._split,
        deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
      )
    except ValueError as error:
      known = re.split(r"[\[+]", self._split)[0] in self._builder.info.splits
      kind = ValueError if known else encoded.NoSplitError
      raise kind(f"{self._directory}: {error}") from error
    # The other features of a record are not parsed.
    self._image: Any = tfds.features.FeaturesDict({"image": features["image"]})
    self._label: Any = tfds.features.FeaturesDict({"label": features["label"]})

  def _files(self) -> list[Any]:
    """The shards that the split reads, with the records of each."""
    return self._builder.info.splits[self._split].file_instructions

  def _check_files(self) -> None:
    names = [epath.Path(file.filename) for file in self._files()]
    missing = [str(name) for name in names if not name.exists()]
    if missing:
      raise ValueError(
        f"{self._directory}: {len(missing)} of {len(names)} record files of "
        f"split {self._split!r} are missing, the first is {missing[0]}: copy "
        "the data set anew"
      )

  def __getstate__(self) -> dict[str, Any]:
    state = super().__getstate__()
    for opened in ("_builder", "_records", "_image", "_label"):
      del state[opened]
    return state

  def __setstate__(self, state: dict[str, Any]) -> None:
    super().__setstate__(state)
    self._open()

  def __len__(self) -> int:
    return len(self._records)

  def path(self, index: int) -> str:
    """DIRECTORY SPLIT[INDEX]."""
    return f"{self._directory} {self._split}[{index}]"

  @contextlib.contextmanager
  def _reading(self, first: int, last: int) -> Iterator[None]:
    try:
      yield
    except (RuntimeError, IndexError, ValueError) as error:
      where = (
        self.path(first)
        if first == last
        else (f"one of {self.path(first)} to [{last}]")
      )
      raise OSError(
        f"{where} is unreadable: {error}; copy or prepare the data set anew"
      ) from error

  def read_bytes(self, index: int) -> bytes:
    """The encoded image of a record.

    Raises:
      OSError: the record's shard is missing or damaged.
    """
    with self._reading(index, index):
      record = self._records[index]
    example = self._image.deserialize_example_np(
      record, decoders={"image": tfds.decode.SkipDecoding()}
    )
    # Of a shard that was cut short, ArrayRecord may give empty records.
    if example["image"] is None:
      raise OSError(f"{self.path(index)} is empty: its shard is damaged")
    return example["image"]

  @property
  def labels(self) -> np.ndarray:
    """[N] int32."""
    with self._lock:
      if self._labels is None:
        self._labels = self._label_of[self._load_stored_labels()]
      return self._labels

  def _fingerprint(self) -> str:
    """Changes with the data set, the records of the split and their files."""
    files = []
    for part in self._files():
      stat = epath.Path(part.filename).stat()
      files.append(
        (str(part.filename), part.skip, part.take, stat.length, stat.mtime)
      )
    text = json.dumps([self._builder.info.full_name, files])
    return hashlib.sha256(text.encode()).hexdigest()

  def names_sha256(self) -> str:
    """Of the data set's name and version, and of the records of its files."""
    files = [
      (epath.Path(part.filename).name, part.skip, part.take)
      for part in self._files()
    ]
    text = json.dumps([self._builder.info.full_name, files])
    return hashlib.sha256(text.encode()).hexdigest()

  def _load_stored_labels(self) -> np.ndarray:
    """The labels as stored, from the cache or from the records."""
    fingerprint = self._fingerprint()
    cache = _cache_dir() / f"labels-{fingerprint[:32]}.npz"
    num_classes = len(self._label_of)
    try:
      # A zip: its checksums are verified.
      with open(cache, "rb") as file, np.load(file) as stored:
        labels, of = stored["labels"], str(stored["fingerprint"])
      if (
        of == fingerprint
        and labels.shape == (len(self),)
        and labels.dtype == np.int32
        and ((labels >= 0) & (labels < num_classes)).all()
      ):
        return labels
      console.logger.warning("%s holds other labels: made anew", cache)
    except FileNotFoundError:
      pass
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
      console.logger.warning("%s can't be read (%s): made anew", cache, e)
    labels = self._read_labels(num_classes)
    try:
      _write_atomically(cache, labels=labels, fingerprint=fingerprint)
    except OSError as error:
      console.logger.warning(
        "labels are not kept for the next run: %s: %s", cache, error
      )
    return labels

  def _read_labels(self, num_classes: int) -> np.ndarray:
    labels = np.empty(len(self), np.int32)

    def read(start: int) -> None:
      indices = range(start, min(start + _LABELS_AT_ONCE, len(labels)))
      with self._reading(indices[0], indices[-1]):
        records = self._records.__getitems__(indices)
      for index, record in zip(indices, records, strict=True):
        label = self._label.deserialize_example_np(record)["label"]
        if label is None:
          raise OSError(f"{self.path(index)} is empty: its shard is damaged")
        labels[index] = label

    logged = time.monotonic()
    with futures.ThreadPoolExecutor(_LABEL_THREADS) as pool:
      starts = range(0, len(labels), _LABELS_AT_ONCE)
      for start, _ in zip(starts, pool.map(read, starts), strict=True):
        if time.monotonic() - logged > _LOG_SECONDS:
          logged = time.monotonic()
          console.logger.info(
            "reading the labels of %s %s: %d of %d",
            self._builder.info.full_name,
            self._split,
            start,
            len(labels),
          )
    bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if bad.size:
      index = int(bad[0])
      raise ValueError(
        f"{self.path(index)}: label {labels[index]} lies outside "
        f"[0, {num_classes})"
      )
    return labels


def _write_atomically(
  path: pathlib.Path, *, labels: np.ndarray, fingerprint: str
) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  # Under a name of its own: several processes may write the same file.
  with tempfile.NamedTemporaryFile(
    dir=path.parent, suffix=".tmp", delete=False
  ) as file:
    try:
      np.savez(file, labels=labels, fingerprint=np.array(fingerprint))
      file.close()
      os.replace(file.name, path)
    except BaseException:
      os.unlink(file.name)
      raise
