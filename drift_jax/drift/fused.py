"""The drifting loss of many features in few passes over them (Pallas, TPU).

The same numbers as `loss.drift_loss`. Features of equal width go together,
whatever their number of locations. A drift problem (a label at a location) is
so small that all it needs fits on chip; the problems of a feature are coupled
by scalars only, so that three passes suffice: distances and their mean (1);
drifts of each temperature, their inner products (2); in the backward pass, with
the drifts' scales known, the force (3). No [N, T] matrix but the squared
distances is stored.
"""

import dataclasses
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

from drift_jax.drift.field import TINY_SQUARED_DISTANCE, Normalization
from drift_jax.drift.loss import (
  MIN_DISTANCE,
  MIN_DRIFT_MEAN_SQUARE,
  MIN_SCALE,
  SELF_DISTANCE,
)

_LANES = 128
# Channels that a kernel handles at a time, at most.
_MAX_PART = 512
# Features up to this size of a block are read together, bytes.
_BLOCK = 2 * 2**20


@dataclasses.dataclass(frozen=True)
class Field:
  """The static part of the field; see loss.drift_loss."""

  temperatures: tuple[float, ...]
  affinity_floor: float
  normalization: Normalization
  attraction: float
  repulsion: float
  num_positives: int

  @property
  def pairs(self) -> list[tuple[int, int]]:
    """Temperatures whose drifts' inner products are taken."""
    count = len(self.temperatures)
    return [(i, j) for i in range(count) for j in range(i, count)]


class Statistics(NamedTuple):
  """Of each problem: sums over samples and channels, means over samples.

  Attributes:
    products: of the raw drifts of pairs of temperatures.
    neighbours: effective number of positives, for each temperature.
    floored: fraction of affinities at the floor, for each temperature.
  """

  products: Float[Array, "B pairs"]
  neighbours: Float[Array, "B K"]
  floored: Float[Array, "B K"]


def _dot(a: Any, b: Any, contract: tuple[int, int]) -> Any:
  return jax.lax.dot_general(
    a,
    b,
    (((contract[0],), (contract[1],)), ((), ())),
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )


def _self_pair(shape: tuple[int, int]) -> Any:
  row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
  return row == jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def _over_channels(
  x_ref: Any, y_ref: Any, i: Any, body: Callable[..., Any], carry: Any
) -> Any:
  """carry = body(channels, x, y, carry) for parts of problem i's channels.

  Features come about the mean of x, in float32. In parts the kernels stay
  small, whatever the width.
  """
  channels = x_ref.shape[2]
  widths = range(_LANES, _MAX_PART + 1, _LANES)
  width = max((w for w in widths if channels % w == 0), default=channels)

  def part(start: Any, carry: Any) -> Any:
    at = pl.ds(start, width)
    x = x_ref[i, :, at].astype(jnp.float32)
    y = y_ref[i, :, at].astype(jnp.float32)
    center = jnp.mean(x, axis=0, keepdims=True)
    return body(at, x - center, y - center, carry)

  if width == channels:
    return part(0, carry)
  return jax.lax.fori_loop(
    0,
    channels // width,
    lambda j, carry: part(pl.multiple_of(j * width, _LANES), carry),
    carry,
  )


def _row(values: Sequence[Any]) -> Any:
  """[1, 128] of [1, 1] values."""
  lane = jax.lax.broadcasted_iota(jnp.int32, (1, _LANES), 1)
  row = jnp.zeros((1, _LANES), jnp.float32)
  for i, value in enumerate(values):
    row = jnp.where(lane == i, value, row)
  return row


def _total(x: Any) -> Any:
  """[1, 1]: rows first, so that long sums stay accurate."""
  return jnp.sum(jnp.sum(x, axis=1, keepdims=True), axis=0, keepdims=True)


def _distance_kernel(x_ref, y_ref, wx_ref, wy_ref, xx_ref, xy_ref, out_ref):
  n, reals = x_ref.shape[1], y_ref.shape[1]

  def add(_, x, y, carry):
    """Of squared norms and products."""
    ones = jnp.ones((8, x.shape[1]), jnp.float32)
    found = (
      jnp.sum(x * x, axis=1, keepdims=True),
      _dot(ones, x * x, (1, 1))[:1],
      _dot(ones, y * y, (1, 1))[:1],
      _dot(x, x, (1, 1)),
      _dot(x, y, (1, 1)),
    )
    return tuple(a + b for a, b in zip(carry, found, strict=True))

  def body(i, _):
    zeros = tuple(
      jnp.zeros(shape, jnp.float32)
      for shape in ((n, 1), (1, n), (1, reals), (n, n), (n, reals))
    )
    column, row_x, row_y, xx, xy = _over_channels(x_ref, y_ref, i, add, zeros)
    xx = jnp.where(_self_pair(xx.shape), 0.0, column + row_x - 2.0 * xx)
    xx = jnp.maximum(xx, MIN_DISTANCE**2)
    xy = jnp.maximum(column + row_y - 2.0 * xy, MIN_DISTANCE**2)
    xx_ref[i], xy_ref[i] = xx, xy
    sums = _total(jnp.sqrt(xx) * wx_ref[i]) + _total(jnp.sqrt(xy) * wy_ref[i])
    out_ref[i] = _row([sums])
    return 0

  jax.lax.fori_loop(0, x_ref.shape[0], body, 0)


def _affinities(xx: Any, xy: Any, unit: Any, field: Field) -> list[Any]:
  """(of generated, of real targets) for each temperature."""
  xx, xy = (
    jnp.maximum(xx, TINY_SQUARED_DISTANCE),
    jnp.maximum(xy, TINY_SQUARED_DISTANCE),
  )
  root_xx, root_xy = jnp.sqrt(xx), jnp.sqrt(xy)

  def excess(squared: Any, root: Any, nearest: Any) -> Any:
    return (squared - nearest) / (root + jnp.sqrt(nearest))

  rows = columns = None
  if field.normalization != "none":
    nearest = jnp.minimum(
      jnp.min(xx, axis=1, keepdims=True), jnp.min(xy, axis=1, keepdims=True)
    )
    rows = (excess(xx, root_xx, nearest), excess(xy, root_xy, nearest))
  if field.normalization == "xy":
    columns = [
      excess(squared, root, jnp.min(squared, axis=0, keepdims=True))
      for squared, root in ((xx, root_xx), (xy, root_xy))
    ]
  found = []
  for temperature in field.temperatures:
    tau = temperature * unit
    if rows is None:
      pair = [jnp.exp(-root / tau) for root in (root_xx, root_xy)]
    else:
      pair = [jnp.exp(-e / (2.0 * tau)) for e in rows]
      norm = sum(jnp.sum(k * k, axis=1, keepdims=True) for k in pair)
      pair = [k / jnp.sqrt(norm) for k in pair]
      if columns is None:
        pair = [k * k for k in pair]
      else:
        over = [jnp.exp(-e / (2.0 * tau)) for e in columns]
        over = [
          k / jnp.sqrt(jnp.sum(k * k, axis=0, keepdims=True)) for k in over
        ]
        pair = [k * o for k, o in zip(pair, over, strict=True)]
    found.append([jnp.maximum(k, field.affinity_floor**0.5) for k in pair])
  return found


def _signed(pair: Any, weights: Any, field: Field) -> tuple[Any, Any]:
  """Signed coefficients of the generated and of the real targets."""
  own, real = (k * w for k, w in zip(pair, weights, strict=True))
  lane = jax.lax.broadcasted_iota(jnp.int32, real.shape, 1)
  is_positive = lane < field.num_positives
  positive = jnp.where(is_positive, real, 0.0)
  positives = jnp.sum(positive, axis=1, keepdims=True)
  negatives = jnp.sum(own, axis=1, keepdims=True) + jnp.sum(
    real - positive, axis=1, keepdims=True
  )
  away = -field.repulsion * positives
  return own * away, real * jnp.where(
    is_positive, field.attraction * negatives, away
  )


def _shift(x: Any, y: Any, signed: tuple[Any, Any]) -> Any:
  own, real = signed
  total = jnp.sum(own, axis=1, keepdims=True) + jnp.sum(
    real, axis=1, keepdims=True
  )
  return _dot(own, x, (1, 0)) + _dot(real, y, (1, 0)) - total * x


def _kernels(
  xx_ref: Any, xy_ref: Any, distance_unit: Any, i: Any, field: Field
) -> tuple[Any, list[Any]]:
  """(self-pairs, affinities), generated samples pushed from themselves."""
  xx = xx_ref[i]
  self_pair = _self_pair(xx.shape)
  far = MIN_DISTANCE + SELF_DISTANCE * distance_unit
  xx = jnp.where(self_pair, far * far, xx)
  return self_pair, _affinities(xx, xy_ref[i], distance_unit, field)


def _statistics_kernel(
  x_ref, y_ref, wx_ref, wy_ref, xx_ref, xy_ref, scalars_ref, out_ref, *, field
):
  n = x_ref.shape[1]

  def body(i, _):
    distance_unit = scalars_ref[i][:, 0:1]
    inverse_unit = scalars_ref[i][:, 1:2]
    self_pair, pairs = _kernels(xx_ref, xy_ref, distance_unit, i, field)
    weights = (wx_ref[i], wy_ref[i])
    signed = [_signed(pair, weights, field) for pair in pairs]

    def add(_, x, y, products):
      x, y = x * inverse_unit, y * inverse_unit
      drifts = [_shift(x, y, coefficients) for coefficients in signed]
      return tuple(
        total + jnp.sum(drifts[a] * drifts[b], axis=1, keepdims=True)
        for total, (a, b) in zip(products, field.pairs, strict=True)
      )

    zeros = tuple(jnp.zeros((n, 1), jnp.float32) for _ in field.pairs)
    products = [
      jnp.sum(rows, axis=0, keepdims=True)
      for rows in _over_channels(x_ref, y_ref, i, add, zeros)
    ]
    root = jnp.sqrt(xy_ref[i][:, : field.num_positives])
    root = root - jnp.min(root, axis=1, keepdims=True)
    neighbours, floored = [], []
    targets = xx_ref.shape[2] + xy_ref.shape[2] - 1
    for temperature, (own, real) in zip(field.temperatures, pairs, strict=True):
      kernel = jnp.exp(-root / (temperature * distance_unit))
      once = jnp.sum(kernel, axis=1, keepdims=True)
      twice = jnp.sum(kernel * kernel, axis=1, keepdims=True)
      neighbours.append(_total(once * once / twice) / n)
      floor = field.affinity_floor**0.5
      count = _total(jnp.where(self_pair | (own > floor), 0.0, 1.0))
      count += _total(jnp.where(real > floor, 0.0, 1.0))
      floored.append(count / (n * targets))
    out_ref[i] = _row([*products, *neighbours, *floored])
    return 0

  jax.lax.fori_loop(0, x_ref.shape[0], body, 0)


def _force_kernel(
  x_ref, y_ref, wx_ref, wy_ref, xx_ref, xy_ref, scalars_ref, out_ref, *, field
):
  def body(i, _):
    scalars = scalars_ref[i]
    _, pairs = _kernels(xx_ref, xy_ref, scalars[:, 0:1], i, field)
    weights = (wx_ref[i], wy_ref[i])
    own, real = 0.0, 0.0
    for k, pair in enumerate(pairs):
      factor = scalars[:, 2 + k : 3 + k]
      signed = _signed(pair, weights, field)
      own, real = own + factor * signed[0], real + factor * signed[1]

    def write(at, x, y, _):
      out_ref[i, :, at] = _shift(x, y, (own, real)).astype(out_ref.dtype)
      return 0

    return _over_channels(x_ref, y_ref, i, write, 0)

  jax.lax.fori_loop(0, x_ref.shape[0], body, 0)


def _call(
  kernel: Callable[..., None],
  operands: Sequence[Any],
  results: Sequence[tuple[tuple[int, ...], Any]],
  products: int,
  roots: int,
  interpret: bool,
) -> Any:
  """The kernel over blocks of problems.

  Args:
    kernel: of a block of each operand and result.
    operands: [B, ...]; generated and real features first.
    results: shapes of a problem and dtypes.
    products: of an [N, N + R] by an [N + R, C] matrix in a problem.
    roots: roots or exponentials of each pair.
    interpret: without a TPU.
  """
  x, y = operands[:2]
  problems, n, channels = x.shape
  pairs = problems * n * (n + y.shape[1])
  one = 4 * (x.shape[1] + y.shape[1]) * max(x.shape[2], _LANES)
  block = min(problems, max(1, _BLOCK // one))

  def spec(shape: tuple[int, ...]) -> pl.BlockSpec:
    return pl.BlockSpec((block, *shape), lambda i: (i, 0, 0))

  out = [
    jax.ShapeDtypeStruct((problems, *shape), dtype) for shape, dtype in results
  ]
  return pl.pallas_call(
    kernel,
    grid=(pl.cdiv(problems, block),),
    in_specs=[spec(operand.shape[1:]) for operand in operands],
    out_specs=[spec(shape) for shape, _ in results],
    out_shape=out,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel",), vmem_limit_bytes=64 * 2**20
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * pairs * channels * products,
      bytes_accessed=sum(
        math.prod(array.shape) * array.dtype.itemsize
        for array in (*operands, *out)
      ),
      transcendentals=pairs * roots,
    ),
    interpret=interpret,
  )(*operands)


class Problems(NamedTuple):
  """Drift problems of one width.

  Attributes:
    x: generated features.
    y: positives, then unconditional ones.
    weight_x, weight_y: of them as targets.
  """

  x: Float[Array, "B N C"]
  y: Float[Array, "B R C"]
  weight_x: Float[Array, "B 1 N"]
  weight_y: Float[Array, "B 1 R"]


def distances(
  problems: Problems, interpret: bool = False
) -> tuple[Array, Array, Float[Array, " B"]]:
  """(squared distances to generated, to real ones, sum of weighted ones)."""
  n, r = problems.x.shape[1], problems.y.shape[1]
  f32 = jnp.float32
  xx, xy, sums = _call(
    _distance_kernel,
    problems,
    [((n, n), f32), ((n, r), f32), ((1, _LANES), f32)],
    products=1,
    roots=1,
    interpret=interpret,
  )
  return xx, xy, sums[:, 0, 0]


def _scalars(values: Sequence[Float[Array, " B"]]) -> Float[Array, "B 1 128"]:
  rows = jnp.stack(values, axis=1)
  return jnp.pad(rows, ((0, 0), (0, _LANES - rows.shape[1])))[:, None]


def statistics(
  problems: Problems,
  squared: tuple[Array, Array],
  distance_unit: Float[Array, " B"],
  unit: Float[Array, " B"],
  field: Field,
  interpret: bool = False,
) -> Statistics:
  """See Statistics; units of the kernels' distances and of the features."""
  count = len(field.temperatures)
  (rows,) = _call(
    functools.partial(_statistics_kernel, field=field),
    [*problems, *squared, _scalars([distance_unit, 1.0 / unit])],
    [((1, _LANES), jnp.float32)],
    products=count,
    roots=3 * count,
    interpret=interpret,
  )
  pairs = len(field.pairs)
  ends = (pairs, pairs + count, pairs + 2 * count)
  return Statistics(
    *(
      rows[:, 0, start:end]
      for start, end in zip((0, *ends), ends, strict=False)
    )
  )


def force(
  problems: Problems,
  squared: tuple[Array, Array],
  distance_unit: Float[Array, " B"],
  factors: Float[Array, "B K"],
  field: Field,
  interpret: bool = False,
) -> Float[Array, "B N C"]:
  """Sum over temperatures of factor * drift, in the dtype of x.

  Drifts are in units of the features here.
  """
  x = problems.x
  zero = jnp.zeros_like(distance_unit)
  (out,) = _call(
    functools.partial(_force_kernel, field=field),
    [*problems, *squared, _scalars([distance_unit, zero, *factors.T])],
    [(x.shape[1:], x.dtype)],
    products=1,
    roots=2 * len(field.temperatures),
    interpret=interpret,
  )
  return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def losses(
  problems: Problems,
  shared: tuple[Float[Array, " F"], Float[Array, "F K"] | None] | None,
  locations: tuple[int, ...],
  field: Field,
  axis_name: str | tuple[str, ...] = (),
  interpret: bool = False,
) -> tuple[Float[Array, " F"], dict[str, Float[Array, "F ..."]]]:
  """Mean losses of features of equal width, and what DriftInfo says of each.

  Args:
    problems: for each label, those of each feature after the other.
    shared: (S, mean squares of the drifts) of a larger batch, see Scalars.
    locations: of each feature.
    field: what is computed.
    axis_name: of mapped axes over which features are split evenly; losses are
      those of the part.
    interpret: without a TPU.
  """
  return _forward(problems, shared, locations, field, axis_name, interpret)[0]


def _features(locations: tuple[int, ...], count: int) -> np.ndarray:
  """Number of the feature of each of `count` problems."""
  of_label = np.repeat(np.arange(len(locations)), locations)
  return np.tile(of_label, count // len(of_label))


def _forward(
  problems: Problems,
  shared: Any,
  locations: tuple[int, ...],
  field: Field,
  axis_name: str | tuple[str, ...],
  interpret: bool,
) -> tuple[Any, Any]:
  x, y = problems.x, problems.y
  count, n, channels = x.shape
  feature = _features(locations, count)
  sizes = np.bincount(feature)

  def means(values: Float[Array, "B V"]) -> Float[Array, "F V"]:
    """Over the problems of each feature."""
    own = jnp.asarray(feature) == jnp.arange(len(locations))[:, None]
    share = jnp.where(own, 1.0 / jnp.asarray(sizes, jnp.float32)[:, None], 0.0)
    return jnp.matmul(share, values, precision=jax.lax.Precision.HIGHEST)

  def means_of_all(values: Float[Array, "B V"]) -> Float[Array, "F V"]:
    part = means(values)
    return jax.lax.pmean(part, axis_name) if axis_name else part

  own, real, sums = distances(problems, interpret)
  squared = (own, real)
  targets = n + y.shape[1]
  weights = jnp.concatenate([problems.weight_x, problems.weight_y], axis=2)
  distance, weight = means_of_all(
    jnp.stack([sums / (n * targets), jnp.mean(weights, axis=(1, 2))], axis=1)
  ).T
  scale = distance / weight if shared is None else shared[0]
  distance_unit = jnp.maximum(scale, MIN_SCALE)[feature]
  unit = jnp.maximum(scale / math.sqrt(channels), MIN_SCALE)[feature]

  rows = statistics(problems, squared, distance_unit, unit, field, interpret)
  products = rows.products / (n * channels)
  same = np.asarray([i for i, (a, b) in enumerate(field.pairs) if a == b])
  mean_squares, neighbours, floored = jnp.split(
    means_of_all(
      jnp.concatenate([products[:, same], rows.neighbours, rows.floored], 1)
    ),
    3,
    axis=1,
  )
  if shared is not None and shared[1] is not None:
    mean_squares = shared[1]
  inverse = jax.lax.rsqrt(jnp.maximum(mean_squares, MIN_DRIFT_MEAN_SQUARE))
  loss = jnp.zeros_like(scale)
  for (a, b), product in zip(field.pairs, means(products).T, strict=True):
    twice = 1.0 if a == b else 2.0
    loss += twice * product * inverse[:, a] * inverse[:, b]
  # Of the mean over a feature's problems.
  factors = (inverse / jnp.asarray(sizes, jnp.float32)[:, None])[feature]
  factors *= (-2.0 / (n * channels * unit**2))[:, None]
  info = {
    "scale": scale,
    "drift_ms": mean_squares,
    "effective_positives": neighbours,
    "floor_fraction": floored,
  }
  return (loss, info), (problems, shared, squared, distance_unit, factors)


def _backward(
  locations: tuple[int, ...],
  field: Field,
  axis_name: str | tuple[str, ...],
  interpret: bool,
  residuals: Any,
  cotangents: Any,
) -> tuple[Problems, Any]:
  del axis_name
  problems, shared, squared, distance_unit, factors = residuals
  feature = _features(locations, len(factors))
  factors = factors * cotangents[0][feature][:, None]
  grad = force(problems, squared, distance_unit, factors, field, interpret)
  rest = jax.tree.map(jnp.zeros_like, (problems[1:], shared))
  return Problems(grad, *rest[0]), rest[1]


losses.defvjp(_forward, _backward)
