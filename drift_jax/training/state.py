"""Training state: abstract first, then sharded, then initialised by one jit."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from drift_jax.system import sharding, streams

Params = Any


@flax.struct.dataclass
class TrainState:
  """Everything that a step reads and writes.

  Attributes:
    step: int32, optimiser steps done.
    rng: uint32 key data; streams are folded from it by step and use.
    params: float32 parameters.
    opt_state: the optimiser's state.
    ema: {str(decay): averaged parameters}.
    drift: scale of the drifting field's temperatures; empty if it is not
      learnt.
  """

  step: jax.Array
  rng: jax.Array
  params: Params
  opt_state: optax.OptState
  ema: dict[str, Params]
  drift: dict[str, Any] = flax.struct.field(default_factory=dict)

  def key(self) -> jax.Array:
    """The typed key of this step."""
    return jax.random.fold_in(jax.random.wrap_key_data(self.rng), self.step)


def abstract_and_init(
  init_params: Callable[[jax.Array], Params],
  optimizer: optax.GradientTransformation,
  *,
  ema_decays: Sequence[float],
  seed: int,
  mesh: jax.sharding.Mesh,
  init_drift: Callable[[], dict[str, Any]] = dict,
) -> tuple[TrainState, Callable[[], TrainState]]:
  """The abstract sharded state, and a function that makes the real one.

  Args:
    init_params: key -> parameters.
    optimizer: its state is sharded by the same rules as the parameters.
    ema_decays: averages to keep; all start at the initial parameters.
    seed: seed of the parameters and of every later draw.
    mesh: where the state lives.
    init_drift: makes TrainState.drift.

  Returns:
    (tree of ShapeDtypeStructs with shardings, init), where init() computes
    the state directly in its shards: no device ever holds all of it.
  """

  def init() -> TrainState:
    params = init_params(streams.stream(seed, "params"))
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      rng=jax.random.key_data(streams.stream(seed, "train")),
      params=params,
      opt_state=optimizer.init(params),
      ema={str(d): jax.tree.map(jnp.copy, params) for d in ema_decays},
      drift=init_drift(),
    )

  shapes = jax.eval_shape(init)
  shardings = sharding.infer_sharding(shapes, mesh)
  abstract = sharding.abstract(shapes, shardings)
  return abstract, jax.jit(init, out_shardings=shardings)


def update(
  state: TrainState, grads: Params, optimizer: optax.GradientTransformation
) -> TrainState:
  """One optimiser step, then every EMA: e <- d e + (1 - d) params."""
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  ema = {
    decay: optax.incremental_update(params, average, 1.0 - float(decay))
    for decay, average in state.ema.items()
  }
  return dataclasses.replace(
    state, step=state.step + 1, params=params, opt_state=opt_state, ema=ema
  )
