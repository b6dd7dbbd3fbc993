"""The training state, made in its shards by one jit, and the optimiser."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from optax import contrib

from drift_jax.system import sharding, streams

Params = Any
# The release starts its warm-up here rather than at zero.
WARMUP_START = 1e-6
# The cosine ends at this fraction of the peak.
COSINE_END = 1e-6


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


def learning_rate_schedule(
  *, kind: str, peak: float, warmup_steps: int, total_steps: int
) -> optax.Schedule:
  """Linear warm-up from 1e-6 to `peak`, then constant or cosine decay.

  Args:
    kind: 'constant' or 'cosine'.
    peak: learning rate after the warm-up.
    warmup_steps: steps of the warm-up; 0 starts at `peak`.
    total_steps: length of the whole schedule, the warm-up included.
  """
  steps = max(total_steps - warmup_steps, 1)
  schedules = {
    "constant": lambda: optax.constant_schedule(peak),
    "cosine": lambda: optax.cosine_decay_schedule(peak, steps, COSINE_END),
  }
  main = schedules[kind]()
  if warmup_steps:
    warmup = optax.linear_schedule(WARMUP_START, peak, warmup_steps)
    main = optax.join_schedules([warmup, main], [warmup_steps])
  return _with_standard_promotion(main)


def make_optimizer(
  schedule: optax.Schedule,
  *,
  b1: float,
  b2: float,
  eps: float,
  weight_decay: float,
  grad_clip: float,
  muon_rate: float = 0.0,
  muon_kernels: str = "blocks",
) -> optax.GradientTransformation:
  """Clip by the global norm, then AdamW with decoupled weight decay.

  Args:
    schedule: learning rate of a step.
    b1, b2, eps, weight_decay: of AdamW.
    grad_clip: largest global norm of a gradient.
    muon_rate: Muon's learning rate over AdamW's; if above 0 Muon
      (kellerjordan.github.io/posts/muon) moves kernels, and AdamW the rest.
    muon_kernels: whose, those of 'blocks' or of 'all' layers.
  """
  rule = optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
  if muon_rate:
    muon = contrib.muon(
      lambda step: muon_rate * schedule(step),
      weight_decay=weight_decay,
      muon_weight_dimension_numbers=_muon_axes,
    )
    chosen = functools.partial(_are_kernels, of=muon_kernels)
    rule = optax.partition({True: muon, False: rule}, chosen)
  optimizer = optax.chain(optax.clip_by_global_norm(grad_clip), rule)
  return with_standard_promotion(optimizer)


def _are_kernels(params: Params, of: str) -> Any:
  """Whether each parameter is a kernel, of a block or of any: {..: bool}."""

  def is_one(path: Any, _: Any) -> bool:
    *names, last = _names(path)
    inside = of == "all" or any("block" in name for name in names)
    return last == "kernel" and inside

  return jax.tree_util.tree_map_with_path(is_one, params)


def _muon_axes(kernels: Params) -> Any:
  """Axes of each kernel as a matrix.

  Kernels are [..., inputs, outputs], and [layers, ...] of scanned blocks; the
  positions of a convolution count among its inputs.
  """

  def axes(path: Any, x: jax.Array) -> contrib.MuonDimensionNumbers:
    first, last = int("blocks" in _names(path)), x.ndim - 1
    return contrib.MuonDimensionNumbers(tuple(range(first, last)), last)

  return jax.tree_util.tree_map_with_path(axes, kernels)


def _names(path: Any) -> list[str]:
  return jax.tree_util.keystr(path, simple=True, separator="/").split("/")


def with_standard_promotion(
  optimizer: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """An optimiser whose update may mix dtypes, as optax does."""
  return optax.GradientTransformation(
    optimizer.init, _with_standard_promotion(optimizer.update)
  )


def _with_standard_promotion(function: Callable[..., Any]) -> Any:
  """Lets optax mix dtypes, which this package's own code must not."""

  def wrapped(*args: Any) -> Any:
    with jax.numpy_dtype_promotion("standard"):
      return function(*args)

  return wrapped
