"""What all conversions share: their types, and torch's layouts."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

CONFIG_FILE = "config.json"

Weights = Mapping[str, np.ndarray]
Config = Mapping[str, Any]


class WeightsError(ValueError):
  """Weights that can't be converted; the message says why."""


class Converted(NamedTuple):
  """A model in the form that artifacts.save takes."""

  model_config: dict[str, Any]
  params: dict[str, Any]


def torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
  """Shape in torch's layout: OIHW for HWIO, [O, I] for [I, O]."""
  return (*shape[:-3:-1], *shape[:-2]) if len(shape) > 1 else shape


def jax_layout(name: str, array: np.ndarray) -> np.ndarray:
  """float32 in JAX's layout: HWIO for OIHW, [I, O] for [O, I]."""
  if not jnp.issubdtype(array.dtype, jnp.floating):  # knows bfloat16
    raise WeightsError(f"{name} has dtype {array.dtype}, want floating point")
  array = array.astype(np.float32)
  if not np.isfinite(array).all():
    raise WeightsError(f"{name} holds values that are not finite")
  axes = (*range(2, array.ndim), 1, 0) if array.ndim > 1 else (0,)
  return np.ascontiguousarray(array.transpose(axes))
