"""Image sources: random access, length, labels and class names."""

import dataclasses

import numpy as np
from sklearn import datasets

SPLITS = ("train", "test")
# Held out of every class of the digits: enough to judge by, and the same
# number for each class.
DIGITS_TEST_PER_CLASS = 54
DIGITS_SPLIT_SEED = 0


@dataclasses.dataclass(frozen=True)
class ImageSource:
  """Labelled images in memory, addressed by index.

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

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    return {"image": self.images[index], "label": self.labels[index]}


def digits(split: str) -> ImageSource:
  """scikit-learn's 1797 handwritten 8x8 digits, values 0..16 -> [-1, 1].

  The 'test' split holds 54 images of each class (540), chosen by a fixed
  permutation; 'train' holds the other 1257.
  """
  pixels, target = datasets.load_digits(return_X_y=True)
  images = (pixels.reshape(-1, 8, 8, 1) / 8.0 - 1.0).astype(np.float32)
  labels = target.astype(np.int32)
  order = np.random.RandomState(DIGITS_SPLIT_SEED).permutation(len(labels))
  held_out = np.concatenate(
    [order[labels[order] == c][:DIGITS_TEST_PER_CLASS] for c in range(10)]
  )
  is_test = np.zeros(len(labels), bool)
  is_test[held_out] = True
  chosen = is_test if split == "test" else ~is_test
  return ImageSource(
    images=images[chosen],
    labels=labels[chosen],
    class_names=tuple(str(c) for c in range(10)),
    grid=np.linspace(-1.0, 1.0, 17, dtype=np.float32),
  )


SOURCES = {"digits": digits}


def make_source(name: str, split: str) -> ImageSource:
  """The named data set's split.

  Raises:
    ValueError: if the name or the split is not known.
  """
  if name not in SOURCES:
    raise ValueError(
      f"data.source={name!r}: valid options are {sorted(SOURCES)}"
    )
  if split not in SPLITS:
    raise ValueError(f"split {split!r}: valid options are {list(SPLITS)}")
  return SOURCES[name](split)
