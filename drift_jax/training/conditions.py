"""Conditions of images other than a class: an embedding or tokens for each.

An .npz beside the images holds them (docs/data.md#conditions):

  conditions  [n, D], or [n, T, D] of tokens, float16 or float32
  names       [n] of the images: the path in the folder or tar of a data source,
              'train/3/0001.png'; of other sources SPLIT/INDEX, 'train/17'
"""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from drift_jax.data import sources
from drift_jax.metrics.files import reading_npz
from drift_jax.system import paths, storage

CONDITIONS, NAMES = "conditions", "names"
DTYPES = ("float16", "float32")
_CHUNK = 4096


class Conditions:
  """What a file holds: conditions by the names of images.

  Attributes:
    values: [n, D] or [n, T, D], in the file's dtype.
  """

  def __init__(self, path: str):
    """Reads the file.

    Raises:
      ValueError: another format, an image that is named twice, or a condition
        that is not finite.
      OSError: it can't be read.
    """
    self._path = path
    storage.check_local("data.conditions", path)
    arrays = read_arrays(path, (CONDITIONS, NAMES))
    self.values = check_values(path, arrays[CONDITIONS])
    names = arrays[NAMES]
    if names.dtype.kind != "U" or names.shape != (len(self.values),):
      raise ValueError(
        f"{path}: {NAMES!r} is {names.dtype} {names.shape}, want a text for "
        f"each of the {len(self.values)} rows of {CONDITIONS!r}"
      )
    self._rows = {name: row for row, name in enumerate(names.tolist())}
    if len(self._rows) < len(names):
      (twice, _), *_ = Counter(names.tolist()).most_common(1)
      raise ValueError(f"{path} names image {twice!r} twice: keep one row")

  def of(self, source: Any, split: str) -> np.ndarray:
    """The rows [N, ...] of a source's images, in its order.

    Args:
      source: images, or the reader of a latent cache.
      split: its name.

    Raises:
      ValueError: an image without a condition, or a condition of the split
        without an image.
    """
    if isinstance(source, sources.Subset):
      return self.of(source.parent, split)[source.indices]
    names = image_names(source, split)
    rows = np.array([self._rows.get(name, -1) for name in names], np.int64)
    missing = np.flatnonzero(rows < 0)
    if missing.size:
      raise ValueError(
        f"{self._path} has no condition for image {names[missing[0]]!r} "
        f"({missing.size} of {len(names)} images are like that; its first row "
        f"is named {next(iter(self._rows), None)!r}): add theirs, or remove "
        "the images"
      )
    inside = os.path.commonpath([os.path.dirname(name) for name in names])
    start = f"{inside}/" if inside else ""
    extra = set(self._rows).difference(names)
    extra = sorted(name for name in extra if name.startswith(start))
    if extra:
      raise ValueError(
        f"{self._path} has a condition for {extra[0]!r}, which is no image of "
        f"the split {split!r} ({len(extra)} rows are like that): remove them, "
        "or add the images"
      )
    return self.values[rows]


def image_names(source: Any, split: str) -> list[str]:
  """The names of a source's images as a file of conditions has them."""
  name = getattr(source, "name", lambda index: "")
  return [name(i) or f"{split}/{i}" for i in range(len(source))]


def read_arrays(path: str, wanted: Sequence[str]) -> dict[str, np.ndarray]:
  """Arrays of an .npz by name; never of objects.

  Raises:
    ValueError: no .npz, or one that lacks any of them.
  """
  path = paths.expand(path)
  with reading_npz(path), np.load(path) as archive:
    there = list(archive) if hasattr(archive, "files") else []
    missing = [name for name in wanted if name not in there]
    if missing:
      raise ValueError(
        f"{path} has no array {missing[0]!r}: want an .npz of {list(wanted)}, "
        f"found {there}"
      )
    return {name: archive[name] for name in wanted}


def check_values(what: str, values: np.ndarray) -> np.ndarray:
  """Conditions [n, D] or [n, T, D] in float16 or float32.

  Raises:
    ValueError: another shape or dtype, or a number that is not finite.
  """
  if values.dtype == np.float64:
    values = values.astype(np.float32)
  if str(values.dtype) not in DTYPES or values.ndim not in (2, 3):
    raise ValueError(
      f"{what}: conditions are {values.dtype} {values.shape}, want [n, D], or "
      f"[n, T, D] of tokens, of {' or '.join(DTYPES)}"
    )
  if 0 in values.shape:
    raise ValueError(f"{what}: conditions of shape {values.shape} hold nothing")
  for start in range(0, len(values), _CHUNK):
    part = values[start : start + _CHUNK]
    bad = np.flatnonzero(~np.isfinite(part.reshape(len(part), -1)).all(axis=1))
    if bad.size:
      raise ValueError(
        f"{what}: condition {start + int(bad[0])} is not finite: mend it"
      )
  return values


def sha256(values: np.ndarray) -> str:
  """SHA-256 of conditions: their shape, dtype and numbers."""
  checksum = hashlib.sha256(f"{values.shape} {values.dtype}".encode())
  for start in range(0, len(values), _CHUNK):
    checksum.update(values[start : start + _CHUNK].tobytes())
  return checksum.hexdigest()
