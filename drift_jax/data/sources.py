"""Sources: random access to what is stored, with labels and class names."""

import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.resources
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from drift_jax.system import options, paths, storage
from drift_jax.system.errors import DataError
from drift_jax.system.options import check_choice

Names = Sequence[str]
_LISTED = 10  # names that an error shows
SPLITS = ("train", "test")
# Name of the class of images without class folders.
ONE_CLASS = "images"
# Held out of every class of the digits: enough to judge by, and the same
# number for each class.
DIGITS_TEST_PER_CLASS = 54
DIGITS_SPLIT_SEED = 0
# Module and class of each kind of encoded images, imported for those who use
# it: TFDS is a large package.
_ENCODED = {
  "folder": ("folder", "FolderSource"),
  "tar": ("folder", "TarSource"),
  "tfds": ("tfds", "TfdsSource"),
  "hf": ("parquet", "ParquetSource"),
}
# Those of an extra: its name, its package.
_EXTRAS = {
  "tfds": ("tfds", "tensorflow_datasets"),
  "hf": ("hub", "pyarrow"),
}
_DIGITS = "sklearn/datasets/data/digits.csv.gz"


class NoSplitError(DataError):
  """The data are there, but have no split of that name."""


class Labelled:
  """Records with labels, by index.

  Attributes:
    class_names: one name for each label.
    labels: [N] int32; may take long on first use, and are kept then.
  """

  class_names: tuple[str, ...]
  labels: Any

  def __len__(self) -> int:
    return len(self.labels)


class Source(Labelled):
  """Labelled images by index; thread-safe, may be sent to a worker process."""

  def __getitem__(self, index: int) -> np.ndarray:
    """[h, w, C]: uint8 RGB of any size, or float32 of one size in [-1, 1]."""
    raise NotImplementedError

  def image(self, index: int) -> Image.Image:
    """The record of uint8 RGB as a PIL image; files spare a copy."""
    return Image.fromarray(self[index])

  def path(self, index: int) -> str:
    """Where the record is stored, for messages."""
    return f"image {index}"

  def name(self, index: int) -> str:
    """The record's path in the data; '' where its place in them tells it."""
    del index
    return ""

  def names_sha256(self) -> str:
    """Checksum of the records' names in order, not of their place; '': none."""
    return ""


class Reopening:
  """Base of objects that may be sent to another process.

  Attributes named in `_UNSENT` are not sent; `_open` makes them in each one.
  """

  _UNSENT: ClassVar[tuple[str, ...]] = ()

  def _open(self) -> None:
    raise NotImplementedError

  def __getstate__(self) -> dict[str, Any]:
    return {k: v for k, v in vars(self).items() if k not in self._UNSENT}

  def __setstate__(self, state: dict[str, Any]) -> None:
    vars(self).update(state)
    self._open()


def labels_sha256(labels: np.ndarray) -> str:
  """SHA-256 of labels as little-endian int32, in hexadecimal."""
  data = np.ascontiguousarray(labels, "<i4").tobytes()
  return hashlib.sha256(data).hexdigest()


def names_sha256(source: object) -> str:
  """`Source.names_sha256`; '' for what is no source, e.g. latents."""
  return source.names_sha256() if isinstance(source, Source) else ""


@dataclasses.dataclass(frozen=True)
class ArraySource(Source):
  """Labelled images in memory.

  Attributes:
    images: [N, H, W, C] float32 in [-1, 1].
    labels: [N] int32.
    class_names: one name for each label.
    grid: [G] ascending, the values that a pixel can take.
  """

  images: np.ndarray
  labels: np.ndarray
  class_names: tuple[str, ...]
  grid: np.ndarray

  @property
  def sample_shape(self) -> tuple[int, int, int]:
    """(H, W, C) of one image."""
    return self.images.shape[1:]

  def __getitem__(self, index: int) -> np.ndarray:
    return self.images[index]


class Subset(Source):
  """Some records of a source; labels and class names follow.

  Attributes:
    parent: the source.
    indices: [N] int64, the record of `parent` that each index stands for.
  """

  def __init__(self, parent: Source, indices: np.ndarray):
    self.parent = parent
    self.indices = indices
    self.class_names = parent.class_names
    self.labels = parent.labels[indices]

  def __getitem__(self, index: int) -> np.ndarray:
    return self.parent[int(self.indices[index])]

  def image(self, index: int) -> Image.Image:
    return self.parent.image(int(self.indices[index]))

  def path(self, index: int) -> str:
    return self.parent.path(int(self.indices[index]))

  def names_sha256(self) -> str:
    """That of the whole source: which records these are follows from it."""
    return self.parent.names_sha256()


def _drawn(
  labels: np.ndarray, per_class: int | np.ndarray, seed: int
) -> np.ndarray:
  """[N] bool: `per_class` images of every class, by one permutation of all.

  Args:
    labels: [N] of every image.
    per_class: the same number for all classes, or [K] one for each.
    seed: of the permutation.
  """
  # RandomState's streams are the same for every version of NumPy.
  order = np.random.RandomState(seed).permutation(len(labels))
  # By class, in the permutation's order within each.
  order = order[np.argsort(labels[order], kind="stable")]
  counts = np.bincount(labels, minlength=np.size(per_class))
  starts = np.cumsum(counts) - counts
  rank = np.arange(len(labels)) - starts[labels[order]]
  is_drawn = np.zeros(len(labels), bool)
  limit = np.broadcast_to(per_class, counts.shape)[labels[order]]
  is_drawn[order[rank < limit]] = True
  return is_drawn


def held_out(
  source: Source, *, per_class: float, seed: int
) -> tuple[Subset, Subset]:
  """Splits a source that has no test split: (train, test), both in its order.

  The test split takes `per_class` images of every class, drawn by a
  permutation that depends on the labels and the seed alone. Classes of which
  the source has no image at all are passed over.

  Args:
    source: images to divide.
    per_class: how many of each class, a whole number; or below 1 the share of
      each class, rounded, and at least one image.
    seed: of the permutation.

  Raises:
    ValueError: a class has no image left to train on.
  """
  labels = source.labels
  counts = np.bincount(labels, minlength=len(source.class_names))
  taken = np.full(len(counts), int(per_class))
  if per_class < 1:
    taken = np.maximum(1, np.rint(per_class * counts).astype(int))
  few = np.flatnonzero((counts > 0) & (counts <= taken))
  if few.size:
    label, least = int(few[0]), int(counts[few].min())
    lower = f"lower it to {least - 1 if per_class >= 1 else 0.1}, "
    raise ValueError(
      f"data.held_out={per_class:g}: {taken[label]} images of class {label} "
      f"({source.class_names[label]!r}) of {counts[label]} in all would leave "
      f"none to train on, and {few.size - 1} other classes are as small: "
      f"{lower * (least > 1)}add images, or remove the class"
    )
  is_test = _drawn(labels, taken, seed)
  train, test = np.flatnonzero(~is_test), np.flatnonzero(is_test)
  return Subset(source, train), Subset(source, test)


def digits(split: str) -> ArraySource:
  """scikit-learn's 1797 handwritten 8x8 digits, values 0..16 -> [-1, 1].

  The 'test' split holds 54 images of each class (540), chosen by a fixed
  permutation; 'train' holds the other 1257.

  Raises:
    NoSplitError: if the split is neither.
  """
  if split not in SPLITS:
    valid = list(SPLITS)
    raise NoSplitError(f"split {split!r}: valid options are {valid}")
  # Its file is read as load_digits does: to import scikit-learn takes a second.
  package = importlib.metadata.distribution("scikit-learn")
  rows = np.loadtxt(str(package.locate_file(_DIGITS)), delimiter=",")
  images = (rows[:, :-1].reshape(-1, 8, 8, 1) / 8.0 - 1.0).astype(np.float32)
  labels = rows[:, -1].astype(np.int32)
  is_test = _drawn(labels, DIGITS_TEST_PER_CLASS, DIGITS_SPLIT_SEED)
  keep = is_test if split == "test" else ~is_test
  return ArraySource(
    images=images[keep],
    labels=labels[keep],
    class_names=tuple("0123456789"),
    grid=np.linspace(-1.0, 1.0, 17, dtype=np.float32),
  )


@functools.cache
def imagenet_classes() -> dict[str, str]:
  """WordNet id -> readable name, the 1000 classes in their standard order.

  The names are WordNet's lemmas, e.g. n01440764 'tench, Tinca tinca'; of the
  two that are equal one is 'crane (bird)', the other 'crane (machine)'.
  """
  file = importlib.resources.files("drift_jax.data") / "imagenet_classes.txt"
  lines = file.read_text(encoding="utf-8").splitlines()
  return dict(line.split("\t") for line in lines)


def readable_classes(names: Iterable[str]) -> tuple[str, ...]:
  """The names, but those of ImageNet's classes for their WordNet ids."""
  known = imagenet_classes()
  return tuple(known.get(name, name) for name in names)


def order_classes(names: Names, class_order: str) -> tuple[Names, np.ndarray]:
  """Class names by label, and the label of each of `names`, int32 [len].

  Args:
    names: what the data call their classes.
    class_order: '' numbers them as they come. 'imagenet': they are WordNet
      ids, the labels are those of the standard order, and there are 1000
      class names (readable) whichever of them occur.

  Raises:
    ValueError: an unknown order; a name that is not one of the 1000 ids.
  """
  check_choice("data.class_order", class_order, options.CLASS_ORDERS)
  if not class_order:
    return tuple(names), np.arange(len(names), dtype=np.int32)
  known = imagenet_classes()
  unknown = [name for name in names if name not in known]
  if unknown:
    raise ValueError(
      f"data.class_order='imagenet', but {unknown[:_LISTED]} "
      f"({len(unknown)} of {len(names)} classes) are not among its 1000 "
      "WordNet ids, e.g. n01440764: use data.class_order='' for other classes"
    )
  position = {name: label for label, name in enumerate(known)}
  labels = np.array([position[name] for name in names], np.int32)
  return tuple(known.values()), labels


def described(spec: str, exif: bool) -> str:
  """A source as records of what was made from it name it."""
  return f"{spec}, upright by EXIF" if exif else spec


def _bucket_folder(folder: str, data_dir: str) -> str:
  """The URL of a folder in a gs:// bucket; '' if it is elsewhere."""
  start = data_dir if storage.is_remote(data_dir) else ""
  url = folder if storage.is_remote(folder) else f"{start}/{folder}"
  return url if url.startswith("gs://") else ""


def _check_extra(spec: str, kind: str) -> None:
  """Raises ExtraError if a package that the kind needs is missing."""
  if kind in _EXTRAS:
    from drift_jax.system import extras

    extras.need(f"data.source={spec!r}", *_EXTRAS[kind])


def missing(spec: str, split: str) -> Sequence[Any]:
  """What is to be downloaded before a split on the hub can be opened.

  Args:
    spec, split: see `open_source`; the spec is 'hf://datasets/OWNER/NAME'.

  Returns:
    hub.Need of its files, which open_source fetches.

  Raises:
    NoSplitError, HubError, DataError, ExtraError: see `parquet`.
    ValueError: another form.
  """
  _check_extra(spec, "hf")
  from drift_jax.data import parquet

  return parquet.missing(spec, split)


def open_source(
  spec: str,
  *,
  split: str,
  data_dir: str,
  class_order: str,
  max_corrupt: int,
  decoder: str,
  exif: bool = False,
) -> Source:
  """The source that a config names.

  Args:
    spec: 'digits'; 'folder:DIR' or 'tar:FILE' (see `folder`); 'tfds:NAME'
      (see `tfds.TfdsSource`); 'hf://datasets/OWNER/NAME' (see `parquet`).
    split: e.g. 'train'; the data set's own name for it.
    data_dir: where relative DIR and FILE start, and where TFDS keeps its data
      sets; '' for the working directory and TFDS' default.
    class_order: '' (the source's own order) or 'imagenet' (see
      `order_classes`).
    max_corrupt: images that may turn out undecodable before it is an error.
    decoder: see `decode.decode`.
    exif: turn images upright, see `decode.decode_image`.

  Raises:
    NoSplitError: the data have no such split.
    StorageError: a URL that can't be read, or of what only disks hold.
    ValueError: an unknown kind, or what the kind raises.
    ExtraError: a package that the kind needs is missing.
  """
  data_dir = paths.expand(data_dir)
  kind, _, rest = spec.partition(":")
  if spec == "digits":
    if exif:
      raise ValueError("data.exif=True: the digits have no orientation")
    if class_order:
      what = f"data.class_order={class_order!r}"
      raise ValueError(f"{what}: the digits have their own, use ''")
    return digits(split)
  if not rest or kind not in _ENCODED:
    check_choice("data.source", spec, options.IMAGE_SOURCES)
  module, name = _ENCODED[kind]
  settings: Any = dict(class_order=class_order, max_corrupt=max_corrupt)
  settings |= dict(split=split, decoder=decoder, exif=exif)
  _check_extra(spec, kind)
  if kind == "tfds":
    storage.check_data(rest if storage.is_remote(rest) else data_dir)
    settings |= dict(data_dir=data_dir)
  elif kind == "hf":
    rest = spec
  elif kind == "folder" and (url := _bucket_folder(rest, data_dir)):
    name, rest = "BucketSource", url
  else:
    storage.check_local(f"data.source={spec!r}", rest, data_dir)
    rest = pathlib.Path(data_dir) / paths.expand(rest)
  opened = getattr(importlib.import_module(f"drift_jax.data.{module}"), name)
  return opened(rest, **settings)
