"""Which observations of a file are read, and as which type."""

import contextlib
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np

from drift_jax.system.errors import DataError

# Steps whose images are converted at once.
_BLOCK = 512
_IMAGES = "want images of integers in [0, 255]"


def parse(name: str) -> tuple[str, int | None]:
  """('state', 2) of 'state[:2]', its first two values; ('state', None) else."""
  match = re.fullmatch(r"(.+)\[:([1-9]\d*)\]", name)
  return (match[1], int(match[2])) if match else (name, None)


@contextlib.contextmanager
def reading(where: str | os.PathLike[str]) -> Iterator[None]:
  """Turns errors of what reads files into a DataError that names the place."""
  try:
    yield
  except (ValueError, IndexError, OSError) as error:
    raise DataError(f"{where}: {error}") from error


def first(episodes: Any, count: int) -> Any:
  """The first `count` of a sequence; all of it if count is 0.

  Raises:
    DataError: there are not as many.
  """
  if not 0 <= count <= len(episodes):
    raise DataError(f"max_episodes={count}, there are {len(episodes)}")
  return episodes[: count or None]


def select(
  observations: Sequence[str],
  present: Collection[str],
  open_array: Callable[[str], Any],
) -> dict[str, np.ndarray]:
  """Reads observations, {name as asked for: [S, ...]}.

  Args:
    observations: names; 'NAME[:K]' are the first K columns of NAME.
    present: names that there are.
    open_array: gives one as anything with a shape whose slices are arrays.

  Returns:
    Vectors are float32, further axes flattened; images uint8.

  Raises:
    DataError: missing names, fewer than K columns, images whose values are no
      integers in [0, 255], or unreadable ones.
  """
  missing = sorted({parse(name)[0] for name in observations} - set(present))
  if missing:
    there = f"there are {sorted(present)}, and NAME[:K] of each"
    raise DataError(f"observations {missing} are missing; {there}")
  selected = {}
  for name in observations:
    source, count = parse(name)
    with reading(repr(name)):
      selected[name] = _converted(open_array(source), count)
  return selected


def _converted(values: Any, count: int | None) -> np.ndarray:
  axes = len(values.shape)
  if axes == 4:
    if count is not None:
      raise DataError("an image has no first columns to take")
    return _pixels(values)
  if axes < 2:
    raise DataError(f"shape {tuple(values.shape)}: want one vector a step")
  vectors = np.asarray(values[:], np.float32)
  # Keypoints come as [S, K, 2].
  vectors = vectors.reshape(len(vectors), math.prod(vectors.shape[1:]))
  if count is not None and vectors.shape[1] < count:
    raise DataError(f"it has {vectors.shape[1]} columns")
  return np.ascontiguousarray(vectors[:, :count])


def _pixels(values: Any) -> np.ndarray:
  """In blocks: as float32, images can take four times the memory that is left.

  A float image may be of [0, 1]: only what is exactly a uint8 becomes one.
  """
  pixels = np.empty(values.shape, np.uint8)
  highest = 0
  for start in range(0, len(pixels), _BLOCK):
    stop = min(start + _BLOCK, len(pixels))
    block = np.asarray(values[start:stop])
    if block.dtype == np.uint8:
      pixels[start:stop] = block
      highest = 255
      continue
    with np.errstate(invalid="ignore"):
      converted = block.astype(np.uint8)
    wrong = np.argwhere(converted != block)
    if len(wrong):
      step, *_ = place = tuple(wrong[0])
      raise DataError(f"step {start + step} has {block[place]}: {_IMAGES}")
    highest = max(highest, converted.max(initial=0))
    pixels[start:stop] = converted
  if highest <= 1:
    raise DataError(f"no value is above {highest}: {_IMAGES}")
  return pixels
