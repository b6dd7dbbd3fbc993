"""Latents that were drawn before, one torch file an image: the authors' cache.

  DIR/SPLIT/CLASS/FILE.pt    {'moments': [h, w, c], 'moments_flip': [h, w, c]}

float32. The names mislead: they hold a latent that was sampled and scaled, of
the image and of its mirror image.
"""

import importlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from drift_jax.data.folder import FolderSource
from drift_jax.system.errors import DataError
from drift_jax.system.storage import PathLike

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
