"""Single arrays on disk."""

import io
import tokenize

import numpy as np
from etils import epath

from drift_jax.system.storage import PathLike


def read_npy(path: PathLike) -> np.ndarray:
  """The array of an .npy file; never of objects.

  Raises:
    ValueError: anything but one whole array of numbers.
    OSError: it can't be read.
  """
  data = io.BytesIO(epath.Path(path).read_bytes())
  try:
    return np.lib.format.read_array(data)
  # The header is parsed as Python, and may name any size.
  except (ValueError, SyntaxError, tokenize.TokenError, MemoryError) as error:
    text = " ".join(str(error).split())
    raise ValueError(f"{path} is no whole .npy file: {text}") from error
