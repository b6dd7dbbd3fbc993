"""Sources: random access to what is stored, with labels and class names."""

import dataclasses
import importlib.metadata
import pathlib
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from drift_jax.data import encoded, folder
from drift_jax.system import paths, storage

SPLITS = ("train", "test")
KINDS = ("digits", "folder:DIR", "tar:FILE", "tfds:NAME")
# Held out of every class of the digits: enough to judge by, and the same
# number for each class.
DIGITS_TEST_PER_CLASS = 54
DIGITS_SPLIT_SEED = 0
_DIGITS = "sklearn/datasets/data/digits.csv.gz"


class Source(Protocol):
  """Labelled images by index; thread-safe, may be sent to a worker process.

  Attributes:
    class_names: one name for each label.
  """

  @property
  def class_names(self) -> tuple[str, ...]: ...

  @property
  def labels(self) -> np.ndarray:
    """[N] int32; may take long on first use, and is kept then."""
    ...

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> np.ndarray:
    """[h, w, C]: uint8 RGB of any size, or float32 of one size in [-1, 1]."""
    ...


@runtime_checkable
class StoredImages(Protocol):
  """What sources of image files offer besides."""

  def image(self, index: int) -> Image.Image:
    """The record as a PIL image of mode RGB."""
    ...

  def path(self, index: int) -> str:
    """Where the record is stored."""
    ...


@runtime_checkable
class NamedRecords(Protocol):
  """What sources offer besides that know their records by name."""

  def names_sha256(self) -> str:
    """Of the records' names in their order, but not of where they lie."""
    ...


def names_sha256(source: object) -> str:
  """`NamedRecords.names_sha256` in hexadecimal; '' where there are no names."""
  return source.names_sha256() if isinstance(source, NamedRecords) else ""


def image_of(source: Source, index: int) -> Image.Image:
  """A record of uint8 RGB as a PIL image; spares a copy where it can."""
  if isinstance(source, StoredImages):
    return source.image(index)
  return Image.fromarray(source[index])


def path_of(source: Source, index: int) -> str:
  """Where a record is stored, for messages."""
  if isinstance(source, StoredImages):
    return source.path(index)
  return f"image {index}"


@dataclasses.dataclass(frozen=True)
class ArraySource:
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
    height, width, channels = self.images.shape[1:]
    return height, width, channels

  def __len__(self) -> int:
    return len(self.labels)

  def __getitem__(self, index: int) -> np.ndarray:
    return self.images[index]


@dataclasses.dataclass(frozen=True)
class Subset:
  """Some records of a source; labels and class names follow.

  Attributes:
    parent: the source.
    indices: [N] int64, the record of `parent` that each index stands for.
  """

  parent: Source
  indices: np.ndarray

  @property
  def class_names(self) -> tuple[str, ...]:
    """One name for each label."""
    return self.parent.class_names

  @property
  def labels(self) -> np.ndarray:
    """[N] int32."""
    return self.parent.labels[self.indices]

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, index: int) -> np.ndarray:
    return self.parent[int(self.indices[index])]

  def image(self, index: int) -> Image.Image:
    """The record as a PIL image of mode RGB."""
    return image_of(self.parent, int(self.indices[index]))

  def path(self, index: int) -> str:
    """Where the record is stored."""
    return path_of(self.parent, int(self.indices[index]))

  def names_sha256(self) -> str:
    """That of the whole source: which records these are follows from it."""
    return names_sha256(self.parent)


def held_out(
  source: Source, *, per_class: int, seed: int
) -> tuple[Subset, Subset]:
  """Splits a source that has no test split: (train, test), both in its order.

  The test split takes `per_class` images of every class, drawn by a
  permutation that depends on the labels and the seed alone. Classes of which
  the source has no image at all are passed over.

  Raises:
    ValueError: a class has no image left to train on.
  """
  if per_class < 1:
    raise ValueError(f"data.held_out={per_class} must be at least 1 per class")
  labels = source.labels
  # RandomState's streams are the same for every version of NumPy.
  order = np.random.RandomState(seed).permutation(len(labels))
  # By class, in the permutation's order within each.
  order = order[np.argsort(labels[order], kind="stable")]
  counts = np.bincount(labels, minlength=len(source.class_names))
  few = np.flatnonzero((counts > 0) & (counts <= per_class))
  if few.size:
    label = int(few[0])
    raise ValueError(
      f"data.held_out={per_class} images of each class, but class {label} "
      f"({source.class_names[label]!r}) has {counts[label]} in all, and "
      f"{few.size - 1} other classes are as small"
    )
  starts = np.cumsum(counts) - counts
  rank = np.arange(len(labels)) - starts[labels[order]]
  is_test = np.zeros(len(labels), bool)
  is_test[order[rank < per_class]] = True
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
    raise encoded.NoSplitError(
      f"split {split!r}: valid options are {list(SPLITS)}"
    )
  # Its file is read as load_digits does: to import scikit-learn takes a second.
  package = importlib.metadata.distribution("scikit-learn")
  rows = np.loadtxt(str(package.locate_file(_DIGITS)), delimiter=",")
  images = (rows[:, :-1].reshape(-1, 8, 8, 1) / 8.0 - 1.0).astype(np.float32)
  labels = rows[:, -1].astype(np.int32)
  order = np.random.RandomState(DIGITS_SPLIT_SEED).permutation(len(labels))
  chosen = np.concatenate(
    [order[labels[order] == c][:DIGITS_TEST_PER_CLASS] for c in range(10)]
  )
  is_test = np.zeros(len(labels), bool)
  is_test[chosen] = True
  keep = is_test if split == "test" else ~is_test
  return ArraySource(
    images=images[keep],
    labels=labels[keep],
    class_names=tuple(str(c) for c in range(10)),
    grid=np.linspace(-1.0, 1.0, 17, dtype=np.float32),
  )


def open_source(
  spec: str,
  *,
  split: str,
  data_dir: str,
  class_order: str,
  max_corrupt: int,
  decoder: str,
) -> ArraySource | encoded.EncodedSource:
  """The source that a config names.

  Args:
    spec: 'digits'; 'folder:DIR' or 'tar:FILE' (see `folder`); 'tfds:NAME'
      (see `tfds.TfdsSource`).
    split: e.g. 'train'; the data set's own name for it.
    data_dir: where relative DIR and FILE start, and where TFDS keeps its data
      sets; '' for the working directory and TFDS' default.
    class_order: '' (the source's own order) or 'imagenet' (see
      `encoded.order_classes`).
    max_corrupt: images that may turn out undecodable before it is an error.
    decoder: see `decode.decode`.

  Raises:
    NoSplitError: the data have no such split.
    StorageError: a URL that can't be read, or of what only disks hold.
    ValueError: an unknown kind, or what the kind raises.
  """
  data_dir = paths.expand(data_dir)
  if spec == "digits":
    if class_order:
      raise ValueError(
        f"data.class_order={class_order!r}: the digits have their own, use ''"
      )
    return digits(split)
  kind, _, rest = spec.partition(":")
  files = {"folder": folder.FolderSource, "tar": folder.TarSource}
  if not rest or kind not in (*files, "tfds"):
    raise ValueError(f"data.source={spec!r}: valid options are {list(KINDS)}")
  if kind == "tfds":
    storage.check_data(rest if storage.is_remote(rest) else data_dir)
    # Imported for those who use it: half a second, and a large package.
    from drift_jax.data import tfds

    return tfds.TfdsSource(
      rest,
      split=split,
      data_dir=data_dir,
      class_order=class_order,
      max_corrupt=max_corrupt,
      decoder=decoder,
    )
  storage.check_local(f"data.source={spec!r}", rest, data_dir)
  return files[kind](
    pathlib.Path(data_dir) / paths.expand(rest),
    split=split,
    class_order=class_order,
    max_corrupt=max_corrupt,
    decoder=decoder,
  )
