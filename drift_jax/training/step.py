"""Parts that the steps of all tasks share: apply, gradients, update."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Shaped

from drift_jax.models.precision import used_dtypes
from drift_jax.system import sharding
from drift_jax.training import state as state_lib

Metrics = dict[str, jax.Array]

WHOLE = PartitionSpec()
SPLIT = PartitionSpec(sharding.BATCH_AXES)


def apply(module: nn.Module, params: Any, *args: Any, **kwargs: Any) -> Any:
  """Applies a module to bare parameters, without mutable collections."""
  return module.apply({"params": params}, *args, **kwargs)


def from_wire(images: Shaped[Array, "..."]) -> Float[Array, "..."]:
  """Converts images to float32: uint8 p becomes p / 127.5 - 1."""
  if images.dtype == jnp.uint8:
    return images.astype(jnp.float32) / 127.5 - 1.0
  return images.astype(jnp.float32)


def in_chunks(function: Callable[[Any], Any], inputs: Any, size: int) -> Any:
  """function(inputs), some rows after the others, in memory for these.

  Args:
    function: of arrays [m, ...], row by row: gives arrays [m, ...].
    inputs: arrays [n, ...].
    size: rows at a time, the last ones may be fewer; 0: all.
  """
  count = len(jax.tree.leaves(inputs)[0])
  if not 0 < size < count:
    return function(inputs)
  whole = count - count % size

  def rows(start: int, stop: int) -> Any:
    return jax.tree.map(lambda x: x[start:stop], inputs)

  parts = jax.tree.map(
    lambda x: x.reshape(-1, size, *x.shape[1:]), rows(0, whole)
  )
  found = jax.tree.map(
    lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(function, parts)
  )
  if whole == count:
    return found
  rest = function(rows(whole, count))
  return jax.tree.map(lambda *x: jnp.concatenate(x), found, rest)


def early_dtype(module: Any) -> Callable[[str, jnp.dtype], jnp.dtype]:
  """Returns (path, dtype) -> dtype in which the module uses a parameter.

  A module without a `dtype` uses all as they are.
  """
  if getattr(module, "dtype", jnp.float32) == jnp.float32:
    return lambda name, dtype: dtype
  # Called only if something is gathered: it takes a trace, once.
  return lambda name, dtype: used_dtypes(module)[name]


def gradients_over(
  loss_of: Callable[..., tuple[Float[Array, ""], Any]],
  params: Any,
  split: tuple[Any, ...],
  whole: tuple[Any, ...],
  layout: sharding.Layout | None,
) -> tuple[Float[Array, ""], Any, Any]:
  """Computes (loss, report, gradients), on a mesh if there is a layout.

  Args:
    loss_of: (params, mesh axes, *split, *whole) -> (mean loss of what it is
      given, report). The axes are () without a mesh.
    params: parameters; on a mesh, in parts, and loss_of gets them gathered.
    split: arrays whose first axis is split over the mesh.
    whole: arrays that every device has.
    layout: how the parameters lie, or None.
  """
  axes, devices = ((), 1)
  if layout is not None:
    axes, devices = (sharding.BATCH_AXES, layout.mesh.size)

  def local(params: Any, *arguments: Any) -> Any:
    def share(params: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
      if layout is not None:
        params = sharding.gather(params, layout.params)
      loss, report = loss_of(params, axes, *arguments)
      return loss / devices, (loss, report)

    return jax.grad(share, has_aux=True)(params)

  if layout is None:
    grads, (loss, report) = local(params, *split, *whole)
    return loss, report, grads

  def on_device(params: Any, *arguments: Any) -> tuple[jax.Array, Any, Any]:
    grads, (loss, report) = local(params, *arguments)
    grads = sharding.sum_gradients(grads, layout.params)
    return jax.lax.pmean(loss, sharding.BATCH_AXES), report, grads

  return sharding.over_devices(
    on_device,
    layout.mesh,
    (layout.params, *[SPLIT] * len(split), *[WHOLE] * len(whole)),
    (WHOLE, WHOLE, layout.params),
  )(params, *split, *whole)


def update(
  state: state_lib.TrainState,
  grads: Any,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
) -> tuple[state_lib.TrainState, Metrics]:
  """Returns the next state, and metrics of the update.

  Metrics: 'grad_norm' before clipping, 'learning_rate', and 'param_norm' after
  the update.
  """
  metrics = {
    "grad_norm": optax.tree.norm(grads),
    "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
  }
  state = state_lib.update(state, grads, optimizer)
  return state, metrics | {"param_norm": optax.tree.norm(state.params)}
