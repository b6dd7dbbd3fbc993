"""What all conversions share: their types, and torch's layouts."""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

CONFIG_FILE = "config.json"
BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
COUNTER = ".num_batches_tracked"  # of training; some files hold it

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


def count_blocks(weights: Weights, prefix: str) -> int:
  """The first number N from 0 on of which no name begins with PREFIX N."""
  numbers = {
    name.removeprefix(prefix).partition(".")[0]
    for name in weights
    if name.startswith(prefix)
  }
  return next(i for i in itertools.count() if str(i) not in numbers)


def fold_batch_norm(
  conv: str, norm: str, weights: Weights, epsilon: float
) -> tuple[np.ndarray, np.ndarray]:
  """Kernel and bias of a convolution with the BatchNorm after it.

  Computed in float64: kernel' = kernel s and bias' = bias - mean s, where
  s = weight / sqrt(var + epsilon), with the running statistics.

  Args:
    conv, norm: names of the two modules; the convolution has no bias.
    weights: torch's layouts.
    epsilon: of the BatchNorm.

  Raises:
    WeightsError: values that are no floats, not finite, or variances below 0.
  """
  kernel = jax_layout(f"{conv}.weight", weights[f"{conv}.weight"])
  weight, bias, mean, variance = (
    jax_layout(f"{norm}.{key}", weights[f"{norm}.{key}"]).astype(np.float64)
    for key in BATCH_NORM
  )
  if variance.min() < 0:
    raise WeightsError(f"{norm}.running_var holds {variance.min()}, want >= 0")
  scale = weight / np.sqrt(variance + epsilon)
  return (
    (kernel * scale).astype(np.float32),
    (bias - mean * scale).astype(np.float32),
  )
