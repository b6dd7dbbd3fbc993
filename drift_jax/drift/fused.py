"""The drifting loss of many features in few passes over them (Pallas, TPU).

The same numbers as `loss.drift_loss`. Features of equal width go together,
whatever their number of locations. A drift problem (a label at a location) is
so small that all it needs fits on chip; the problems of a feature are coupled
by scalars only, so that three passes suffice:

  1. squared distances, and sums of the distances: they give the scale S;
  2. inner products of the drifts F_t of all pairs of temperatures: they give
     mean F^2 and, without a drift being stored, the loss
       mean V^2 = sum over (a, b) of <F_a, F_b> / (rms_a rms_b),
     V = sum over t of F_t / rms_t;
  3. in the backward pass, with rms_t known, the force -2 V / (N C s).

No [N, T] matrix but the squared distances is stored; passes 2 and 3 compute
affinities anew from them. W-Flow's plans take iterations: pass 2 stores them.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from drift_jax.drift import family, kernels
from drift_jax.drift.diagnostics import DriftInfo, Scalars
from drift_jax.drift.field import MAX_DIRECT_CHANNELS, over_axes
from drift_jax.drift.kernels import LANES, Plan
from drift_jax.drift.loss import MIN_DRIFT_MEAN_SQUARE, MIN_SCALE
from drift_jax.drift.many import problems
from drift_jax.drift.variant import Variant

# Figures of a problem.
_ROW = (1, LANES)
# Features up to this size of a block are read together, bytes.
_BLOCK = 2 * 2**20
# Narrower features have their distances by subtraction, as in
# field.squared_distances; wider ones don't fit on chip.
_WIDTHS = range(MAX_DIRECT_CHANNELS + 1, 8193)
# Most bytes of a problem's float32 features, read twice ahead in 64 MiB.
_LARGEST = 12 * 2**20
# Figures of a problem fit a row of lanes: 12 * 13 / 2 products, 2 * 12 more.
_MAX_TEMPERATURES = 12


class Features(NamedTuple):
  """Drift problems of one width.

  Attributes:
    x: generated features.
    y: real features: positives, unconditional ones, then independent
      generated ones.
    weight_x, weight_y: weights of them as targets.
  """

  x: Float[Array, "B N C"]
  y: Float[Array, "B R C"]
  weight_x: Float[Array, "B 1 N"]
  weight_y: Float[Array, "B 1 R"]


def fits(
  x: Float[Array, "L N T C"], num_reals: int, temperatures: tuple[float, ...]
) -> bool:
  """Whether the kernels compute the loss of such features."""
  channels = x.shape[3]
  small = 4 * (x.shape[1] + num_reals) * channels <= _LARGEST
  few = len(temperatures) <= _MAX_TEMPERATURES
  return few and small and channels in _WIDTHS and x.dtype != "float64"


def plan_of(variant: Variant, num_unconditional: int, **static: Any) -> Plan:
  """What kernels compute of a variant.

  Args:
    variant: has kernels.
    num_unconditional: U, real samples that follow the positives.
    **static: the other fields of Plan.
  """
  transport = None
  if variant.field == "sinkhorn":
    transport = kernels.Transport(
      num_unconditional=num_unconditional,
      scale_power=variant.scale_power,
      own_in_scale=variant.own_in_scale,
      **family.defaults("sinkhorn") | dict(variant.options),
    )
  return Plan(**static, transport=transport)


def losses_of_group(
  values: Sequence[tuple[Array, Array]],
  weight: Float[Array, " L"],
  scalars: Scalars | None,
  *,
  plan: Plan,
  num_unconditional: int | None,
) -> tuple[Float[Array, " F"], DriftInfo]:
  """Losses of features of equal width together.

  Args:
    values: generated [L, N, T, C] and real [L, R, T, C] features.
    weight: weight of each label's unconditional reals.
    scalars: of a larger batch, arrays [F].
    plan: what is computed.
    num_unconditional: U; None: all reals but the positives.
  """
  locations = tuple(x.shape[2] for x, _ in values)
  # Joined first, so that they are transposed once.
  x, y = (
    problems(jnp.concatenate(arrays, axis=2))
    for arrays in zip(*values, strict=True)
  )
  at = jnp.arange(y.shape[1])
  unweighted = at < plan.num_positives
  # Independent samples follow the unconditional reals.
  num_reals = plan.num_positives + (num_unconditional or 0)
  if plan.transport is not None or (
    num_unconditional is not None and y.shape[1] > num_reals
  ):
    unweighted |= at >= num_reals
  weight_y = jnp.where(
    unweighted,
    1.0,
    jnp.repeat(weight.astype(jnp.float32), sum(locations))[:, None, None],
  )
  ones = jnp.ones((len(x), 1, x.shape[1]), jnp.float32)
  return losses(Features(x, y, ones, weight_y), scalars, locations, plan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def losses(
  features: Features,
  scalars: Scalars | None,
  locations: tuple[int, ...],
  plan: Plan,
) -> tuple[Float[Array, " F"], DriftInfo]:
  """Mean losses of features of equal width, and what to watch of each.

  Args:
    features: for each label, the problems of each feature after the other.
    scalars: of a larger batch, arrays [F].
    locations: number of locations of each feature.
    plan: what is computed; losses are those of the part of a split batch.
  """
  return _forward(features, scalars, locations, plan)[0]


def _forward(
  features: Features,
  scalars: Scalars | None,
  locations: tuple[int, ...],
  plan: Plan,
) -> tuple[Any, Any]:
  """(what `losses` returns, what the backward pass needs)."""
  temperatures = plan.temperatures
  count, n, channels = features.x.shape
  reals = features.y.shape[1]
  targets = n + reals
  transport = plan.transport
  strength = []
  if transport is not None:
    features, strength = _split_guidance(features, plan)
  feature = _feature_of(locations, count)
  sizes = jnp.asarray(np.bincount(feature), jnp.float32)[:, None]

  def means(values: Float[Array, "B V"]) -> Float[Array, "F V"]:
    """Means over the problems of each feature."""
    members = jnp.asarray(feature) == jnp.arange(len(locations))[:, None]
    share = jnp.where(members, 1.0 / sizes, 0.0)
    return jnp.matmul(share, values, precision=jax.lax.Precision.HIGHEST)

  def means_of_all(values: Float[Array, "B V"]) -> Float[Array, "F V"]:
    return over_axes(means(values), plan.axis_name)

  # 1. Distances and the shared scale.
  xx, xy, sums = _call(
    kernels.distances, features, [(n, n), (n, reals), _ROW], (1, 1), plan
  )
  weights = jnp.concatenate([features.weight_x, features.weight_y], axis=2)
  distance, weight = means_of_all(
    jnp.stack(
      [sums[:, 0, 0] / (n * targets), jnp.mean(weights, axis=(1, 2))], axis=1
    )
  ).T
  if scalars is not None:
    scale = scalars.scale
  elif transport is None or transport.scale_power == 1:
    scale = distance / weight
  else:
    scale = jnp.sqrt(distance / weight)
  distance_unit = jnp.maximum(scale, MIN_SCALE)[feature]
  unit = jnp.maximum(scale / math.sqrt(channels), MIN_SCALE)[feature]
  # 2. Figures of the drifts.
  kinds = len(temperatures)
  lanes = _lanes([distance_unit, 1.0 / unit, *strength])
  if transport is None:
    operands = [*features, xx, xy, lanes]
    work = (kinds, 3 * kinds)
    (rows,) = _call(kernels.statistics, operands, [_ROW], work, plan)
    kept = [xx, xy]
  else:
    operands = [features.x, features.y, xy, lanes]
    # Generated samples are no targets, and a plan's last rows one more pass.
    share = reals / targets * kinds
    work = (share, share * (2 * int(transport.iterations) + 2))
    shapes = [_ROW, *[(n, reals)] * kinds]
    rows, *kept = _call(kernels.plans, operands, shapes, work, plan)
  others = 2 if transport is None else 1
  stops = (len(plan.pairs), len(plan.pairs) + others * kinds)
  products, figures, _ = jnp.split(rows[:, 0], stops, axis=1)
  products /= n * channels
  same = np.asarray([i for i, (a, b) in enumerate(plan.pairs) if a == b])
  mean_squares, neighbours, *floored = jnp.split(
    means_of_all(jnp.concatenate([products[:, same], figures], axis=1)),
    1 + others,
    axis=1,
  )
  if scalars is not None and scalars.drift_ms is not None:
    known = [scalars.drift_ms[temperature] for temperature in temperatures]
    mean_squares = jnp.stack(known, axis=1)
  # 3. The loss, and the factors of the raw drifts in its gradient.
  inverse = jax.lax.rsqrt(jnp.maximum(mean_squares, MIN_DRIFT_MEAN_SQUARE))
  loss = jnp.zeros_like(scale)
  for (a, b), product in zip(plan.pairs, means(products).T, strict=True):
    twice = 1.0 if a == b else 2.0
    loss += twice * product * inverse[:, a] * inverse[:, b]
  factors = (inverse / sizes)[feature]
  factors *= (-2.0 / (n * channels * unit**2))[:, None]

  def by_temperature(values: Float[Array, "F K"]) -> dict[float, Array]:
    return dict(zip(temperatures, values.T, strict=True))

  info: DriftInfo = {
    "scale": scale,
    "drift_ms": by_temperature(mean_squares),
    "effective_positives": by_temperature(neighbours),
    "floor_fraction": by_temperature(floored[0]) if floored else {},
    "extra": {},
  }
  return (loss, info), (features, scalars, kept, distance_unit, factors)


def _split_guidance(
  features: Features, plan: Plan
) -> tuple[Features, list[Float[Array, " B"]]]:
  """(features with the scale's weights, [strength of velocity guidance])."""
  assert plan.transport is not None
  start = plan.num_positives
  stop = start + plan.transport.num_unconditional
  weight = features.weight_y
  strength = jnp.sum(weight[:, 0, start:stop], axis=1)
  features = features._replace(
    weight_x=features.weight_x * float(plan.transport.own_in_scale),
    weight_y=weight.at[:, :, start:stop].set(0.0),
  )
  return features, [strength]


def _backward(
  locations: tuple[int, ...], plan: Plan, residuals: Any, cotangents: Any
) -> tuple[Features, Any]:
  """The gradient with respect to x; zeros for all else."""
  features, scalars, kept, distance_unit, factors = residuals
  feature = _feature_of(locations, len(factors))
  factors = factors * cotangents[0][feature][:, None]
  x = features.x
  if plan.transport is None:
    operands = [*features, *kept, _lanes([distance_unit, *factors.T])]
    kernel, work = kernels.force, (1, 2 * len(plan.temperatures))
  else:
    operands = [features.x, features.y, _lanes([*factors.T]), *kept]
    reals = features.y.shape[1]
    kernel, work = kernels.pull, (reals / (x.shape[1] + reals), 0)
  (grad,) = _call(kernel, operands, [x.shape[1:]], work, plan, dtype=x.dtype)
  rest, none = jax.tree.map(jnp.zeros_like, (features[1:], scalars))
  return Features(grad, *rest), none


losses.defvjp(_forward, _backward)


def _feature_of(locations: tuple[int, ...], count: int) -> np.ndarray:
  """Number of the feature of each of `count` problems."""
  of_label = np.repeat(np.arange(len(locations)), locations)
  return np.tile(of_label, count // len(of_label))


def _lanes(values: Sequence[Float[Array, " B"]]) -> Float[Array, "B 1 128"]:
  """Scalars of each problem, as kernels read them."""
  rows = jnp.stack(values, axis=1)
  return jnp.pad(rows, ((0, 0), (0, LANES - rows.shape[1])))[:, None]


def _call(
  kernel: Callable[..., None],
  operands: Sequence[Any],
  shapes: Sequence[tuple[int, ...]],
  work: tuple[int | float, int | float],
  plan: Plan,
  dtype: Any = jnp.float32,
) -> Any:
  """The kernel over blocks of problems.

  Args:
    kernel: of a block of each operand and result.
    operands: arrays [B, ...]; generated and real features first.
    shapes: shape of each result for one problem.
    work: for the compiler's estimate: products of an [N, N + R] by an
      [N + R, C] matrix in a problem; roots or exponentials of each pair.
    plan: what is computed, and whether to interpret.
    dtype: dtype of the results.
  """
  problems, n, channels = operands[0].shape
  targets = n + operands[1].shape[1]
  bytes_of_one = 4 * targets * max(channels, LANES)
  block = min(problems, max(1, _BLOCK // bytes_of_one))

  def spec(shape: tuple[int, ...]) -> pl.BlockSpec:
    return pl.BlockSpec((block, *shape), lambda i: (i, 0, 0))

  out = [jax.ShapeDtypeStruct((problems, *shape), dtype) for shape in shapes]
  products, roots = work
  return pl.pallas_call(
    functools.partial(kernel, plan=plan),
    grid=(pl.cdiv(problems, block),),
    in_specs=[spec(operand.shape[1:]) for operand in operands],
    out_specs=[spec(shape) for shape in shapes],
    out_shape=out,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel",), vmem_limit_bytes=64 * 2**20
    ),
    cost_estimate=pl.CostEstimate(
      flops=round(2 * problems * n * targets * channels * products),
      bytes_accessed=sum(
        math.prod(array.shape) * array.dtype.itemsize
        for array in (*operands, *out)
      ),
      transcendentals=round(problems * n * targets * roots),
    ),
    interpret=plan.interpret,
  )(*operands)
