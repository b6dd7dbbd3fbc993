"""What the steps of both tasks share."""

import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Shaped

from drift_jax import sharding

Metrics = dict[str, jax.Array]

WHOLE = PartitionSpec()
SPLIT = PartitionSpec(sharding.BATCH_AXES)


def apply(module: nn.Module, params: Any, *args: Any, **kwargs: Any) -> Any:
  """module.apply on bare parameters, without mutable collections."""
  return module.apply({"params": params}, *args, **kwargs)


def from_wire(images: Shaped[Array, "..."]) -> Float[Array, "..."]:
  """Images as they travel -> float32: uint8 p becomes p / 127.5 - 1."""
  if images.dtype == jnp.uint8:
    return images.astype(jnp.float32) / 127.5 - 1.0
  return images.astype(jnp.float32)


def early_dtype(
  module: Any, prefix: str = ""
) -> Callable[[str, jnp.dtype], jnp.dtype]:
  """(path, dtype) -> the dtype in which the module uses the parameter."""

  def dtype_of(name: str, dtype: jnp.dtype) -> jnp.dtype:
    kept = re.search(module.FLOAT32, prefix + name)
    return dtype if kept else module.dtype

  return dtype_of
