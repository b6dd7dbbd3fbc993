"""Latents that were drawn before, one file an image.

  DIR/SPLIT/CLASS/FILE.pt    {'moments': [h, w, c], 'moments_flip': [h, w, c]}
  DIR/SPLIT/CLASS/FILE.npy   [2, h, w, c], or [h, w, c], of any grid and width

The first is the authors' cache, float32. The names mislead: they hold a latent
that was sampled and scaled, of the image and of its mirror image. The second is
of whatever encoder made it, such as the features of a DINOv2 that a
representation autoencoder decodes (RAE). A file holds the latent of the image
and that of its mirror image, or the first alone, in float32 or float16.
"""

import importlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from drift_jax.data.folder import FolderSource
from drift_jax.system.errors import DataError
from drift_jax.system.storage import PathLike, read_npy

_KEYS = ("moments", "moments_flip")


class DrawnLatents(FolderSource):
  """Files of one split, in the order of their paths."""

  suffixes = (".pt",)

  def __init__(self, path: PathLike, *, split: str, class_order: str):
    """Lists the files; see FolderSource.

    Raises:
      DataError: torch is not installed.
      ValueError: as FolderSource.
    """
    try:
      self._torch: Any = importlib.import_module("torch")
    except ImportError as error:
      raise DataError(
        f"{path}: reading .pt needs torch, which is not installed: "
        "pip install torch (to read this once; training needs none)"
      ) from error
    super().__init__(
      path,
      split=split,
      class_order=class_order,
      max_corrupt=0,
      decoder="pillow",
    )

  def latents(self, index: int, shape: tuple[int, int, int]) -> np.ndarray:
    """[2, h, w, c] float32 of an image and of its mirror image.

    Args:
      index: number of the image in the source.
      shape: (h, w, c) that they must have.

    Raises:
      DataError: naming a file that is damaged or holds something else.
    """
    path, torch = self.path(index), self._torch
    try:
      content = torch.load(path, map_location="cpu", weights_only=True)
    # A bad file raises errors of many kinds, whose messages advise to load it
    # unsafely.
    except Exception as error:
      raise DataError(
        f"{path} ({os.path.getsize(path)} bytes) can't be read as a torch file "
        f"of arrays only ({type(error).__name__}): make or copy it again"
      ) from error
    arrays: list[Any] = [
      content.get(key) if isinstance(content, Mapping) else None
      for key in _KEYS
    ]
    if not all(isinstance(array, torch.Tensor) for array in arrays):
      raise DataError(f"{path} holds no arrays {' and '.join(_KEYS)}")
    for key, tensor in zip(_KEYS, arrays, strict=True):
      have = tuple(tensor.shape)
      if have != shape or tensor.dtype != torch.float32:
        raise DataError(
          f"{path}: {key} is {tensor.dtype} of shape {have}, but the "
          f"autoencoder's latents are float32 of shape {shape}: give another "
          "--image_size or --vae"
        )
    arrays = [tensor.detach().numpy() for tensor in arrays]
    for key, array in zip(_KEYS, arrays, strict=True):
      if not np.isfinite(array).all():
        raise DataError(f"{path}: {key} holds numbers that are not finite")
    return np.stack(arrays)


class ArrayLatents(FolderSource):
  """Arrays of one split, in the order of their paths.

  Attributes:
    latent_shape: (h, w, c) of the first, which all must have.
  """

  suffixes = (".npy",)

  def __init__(self, path: PathLike, *, split: str, class_order: str):
    """Lists the files; see FolderSource.

    Raises:
      DataError: a first file that is damaged or holds something else.
      ValueError: as FolderSource.
    """
    super().__init__(
      path,
      split=split,
      class_order=class_order,
      max_corrupt=0,
      decoder="pillow",
    )
    self.latent_shape = self._read(0).shape[1:]

  def _read(self, index: int) -> np.ndarray:
    """[1 or 2, h, h, c] of any float dtype."""
    path = self.path(index)
    try:
      array = read_npy(path)
    except (OSError, ValueError) as error:
      raise DataError(
        f"{path} can't be read as an array ({error}): make or copy it again"
      ) from error
    array = array[None] if array.ndim == 3 else array
    if (
      array.ndim != 4
      or array.dtype not in (np.float16, np.float32)
      or len(array) not in (1, 2)
      or array.shape[1] != array.shape[2]
    ):
      raise DataError(
        f"{path} is {array.dtype} of shape {array.shape}: want float32 or "
        "float16 [2, h, h, c], an image's latent and its mirror image's, or "
        "[h, h, c]"
      )
    return array

  def latents(self, index: int, shape: tuple[int, int, int]) -> np.ndarray:
    """[2, h, w, c] float32; the same twice where there is no mirror image's.

    Args:
      index: number of the image in the source.
      shape: (h, w, c) that they must have.

    Raises:
      DataError: naming a file that is damaged or holds something else.
    """
    array = self._read(index)
    if array.shape[1:] != shape:
      raise DataError(
        f"{self.path(index)} has latents of shape {array.shape[1:]}, but those "
        f"of {self.path(0)} have {shape}: all must have one"
      )
    if not np.isfinite(array).all():
      raise DataError(f"{self.path(index)} holds numbers that are not finite")
    return np.broadcast_to(array, (2, *shape)).astype(np.float32)
