"""Which observations of a file are read: 'NAME', or 'NAME[:K]'."""

import math
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from drift_jax.data.errors import DataError

# Steps whose images are converted at once.
_BLOCK = 512
_PATTERN = re.compile(r"(?P<key>[^\[\]]+)(\[:(?P<count>[1-9]\d*)\])?")


def select(
  observations: Sequence[str],
  present: Collection[str],
  open_array: Callable[[str], Any],
  where: str,
) -> dict[str, np.ndarray]:
  """The observations that are asked for, {as asked for: [S, ...]}.

  Args:
    observations: names; 'NAME[:K]' are the first K columns of NAME.
    present: names that there are.
    open_array: gives one as anything with a shape whose slices are arrays.
    where: what messages call the file.

  Returns:
    Vectors are float32, what has more axes being flattened; images uint8.

  Raises:
    DataError: no or malformed names, missing ones, fewer than K columns,
      images whose values are no integers in [0, 255], or unreadable ones.
  """
  if not observations:
    raise DataError(f"{where}: no observations are asked for")
  keys = {name: _parsed(name) for name in observations}
  missing = sorted({key for key, _ in keys.values()} - set(present))
  if missing:
    raise DataError(
      f"{where}: observations {missing} are missing; there are "
      f"{sorted(present)}"
    )
  chosen = {}
  for name, (key, count) in keys.items():
    try:
      chosen[name] = _converted(open_array(key), count)
    except (ValueError, IndexError, OSError) as error:
      raise DataError(f"{where}: {name!r}: {error}") from error
  return chosen


def is_selection(name: str) -> bool:
  """Whether a name means a part of the columns of another."""
  return _parsed(name)[1] is not None


def _parsed(name: str) -> tuple[str, int | None]:
  match = _PATTERN.fullmatch(name)
  if match is None:
    raise DataError(
      f"observation {name!r}: want 'NAME', or 'NAME[:K]' of its first K columns"
    )
  count = match["count"]
  return match["key"], None if count is None else int(count)


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
      raise DataError(
        f"step {start + step} has the value {block[place]}: want images of "
        "integers in [0, 255]"
      )
    highest = max(highest, converted.max(initial=0))
    pixels[start:stop] = converted
  if highest <= 1:
    raise DataError(
      f"no value is above {highest}: want images of integers in [0, 255]"
    )
  return pixels
