"""What the steps of all tasks share."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Shaped

from drift_jax import models, sharding
from drift_jax import state as state_lib

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


def early_dtype(module: Any) -> Callable[[str, jnp.dtype], jnp.dtype]:
  """(path, dtype) -> the dtype in which the module uses the parameter.

  A module without a `dtype` uses all as they are.
  """
  if getattr(module, "dtype", jnp.float32) == jnp.float32:
    return lambda name, dtype: dtype
  # Asked only where something is gathered: it takes a trace, once.
  return lambda name, dtype: models.used_dtypes(module)[name]


def update(
  state: state_lib.TrainState,
  grads: Any,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
) -> tuple[state_lib.TrainState, Metrics]:
  """The next state, and metrics of the way there.

  'grad_norm' before clipping, 'learning_rate', 'param_norm' after the update.
  """
  metrics = {
    "grad_norm": optax.tree.norm(grads),
    "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
  }
  state = state_lib.update(state, grads, optimizer)
  return state, metrics | {"param_norm": optax.tree.norm(state.params)}
