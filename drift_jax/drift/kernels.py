"""Pallas kernels of `drift.fused`, for TPUs.

Each works on a block of problems, one after the other: references are to
[problems of the block, rows, lanes].

Numerics. All arithmetic is float32; the matrix unit rounds operands to
bfloat16, so products are asked for at the highest precision (several passes).
Distances come by the gram expansion ||x||^2 + ||y||^2 - 2 x.y, whose rounding
is relative to the norms: coordinates are centred about the mean of a problem's
samples first, as in `field.squared_distances`. Softmaxes take differences to
the nearest target before they divide by a temperature, see `_excess`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from drift_jax.drift import family
from drift_jax.drift.field import Axes, Normalization
from drift_jax.drift.loss import MIN_DISTANCE, SELF_DISTANCE

# Registers are [8, 128].
SUBLANES, LANES = 8, 128
# Channels that a kernel handles at a time, at most.
_MAX_PART = 512


class Transport(NamedTuple):
  """Options of the field 'sinkhorn' with velocity guidance, as W-Flow has it.

  Reals are the positives, the unconditional ones, then the independent batch.

  Attributes:
    cost, iterations: arguments of family.sinkhorn.
    num_unconditional: U.
    scale_power, own_in_scale: of variant.Variant.
  """

  cost: family.Cost
  iterations: float
  num_unconditional: int
  scale_power: int
  own_in_scale: bool


class Plan(NamedTuple):
  """Static description of the loss and of how it is computed.

  Attributes:
    temperatures, affinity_floor, normalization, attraction, repulsion,
      axis_name: arguments of loss.drift_loss.
    num_positives: P.
    interpret: whether to do without a TPU.
    transport: of W-Flow's field; None: the paper's.
  """

  temperatures: tuple[float, ...]
  affinity_floor: float
  normalization: Normalization
  attraction: float
  repulsion: float
  axis_name: Axes
  num_positives: int
  interpret: bool
  transport: Transport | None = None

  @property
  def pairs(self) -> list[tuple[int, int]]:
    """Temperatures whose drifts' inner products are taken."""
    count = len(self.temperatures)
    return [(i, j) for i in range(count) for j in range(i, count)]


def distances(x_ref, y_ref, wx_ref, wy_ref, xx_ref, xy_ref, out_ref, *, plan):
  """Squared distances to generated and real targets, their weighted sums.

  Sums are of the distances, or of their squares.
  """
  is_square = plan.transport is not None and plan.transport.scale_power == 2
  root = (lambda squared: squared) if is_square else jnp.sqrt
  n, reals = x_ref.shape[1], y_ref.shape[1]

  def add(_, x, y, carry):
    """Adds a part's squared norms and products.

    Norms are wanted along columns and along rows. A matrix can't be turned
    cheaply: a product with ones sums along the lanes and leaves a row. It has
    as many equal rows as the least tile.
    """
    ones = jnp.ones((SUBLANES, x.shape[1]), jnp.float32)
    part = (
      jnp.sum(x * x, axis=1, keepdims=True),
      _dot(ones, x * x, (1, 1))[:1],
      _dot(ones, y * y, (1, 1))[:1],
      _dot(x, x, (1, 1)),
      _dot(x, y, (1, 1)),
    )
    return tuple(a + b for a, b in zip(carry, part, strict=True))

  @pl.loop(0, x_ref.shape[0])
  def _(i):
    zeros = tuple(
      jnp.zeros(shape, jnp.float32)
      for shape in ((n, 1), (1, n), (1, reals), (n, n), (n, reals))
    )
    column, row_x, row_y, xx, xy = _over_channels(x_ref, y_ref, i, add, zeros)
    # Rounding leaves a sample at a distance to itself, or below 0.
    xx = jnp.where(_self_pair(xx.shape), 0.0, column + row_x - 2.0 * xx)
    xx = jnp.maximum(xx, MIN_DISTANCE**2)
    xy = jnp.maximum(column + row_y - 2.0 * xy, MIN_DISTANCE**2)
    xx_ref[i], xy_ref[i] = xx, xy
    sums = _total(root(xx) * wx_ref[i]) + _total(root(xy) * wy_ref[i])
    out_ref[i] = _row([sums])


def statistics(
  x_ref, y_ref, wx_ref, wy_ref, xx_ref, xy_ref, scalars_ref, out_ref, *, plan
):
  """Figures of each problem, in the lanes of a row.

  [inner products of the drifts of plan.pairs, summed over samples and channels;
  effective number of positives, for each temperature; fraction of affinities
  at the floor, for each temperature]. Scalars are the unit of the distances and
  one over that of the coordinates.
  """
  n = x_ref.shape[1]
  temperatures = plan.temperatures
  floor = plan.affinity_floor**0.5

  @pl.loop(0, x_ref.shape[0])
  def _(i):
    distance_unit = scalars_ref[i][:, 0:1]
    inverse_unit = scalars_ref[i][:, 1:2]
    self_pair, affinities = _affinities(
      xx_ref[i], xy_ref[i], distance_unit, plan
    )
    weights = (wx_ref[i], wy_ref[i])
    signed = [_signed(pair, weights, plan) for pair in affinities]
    products = _inner_products(x_ref, y_ref, i, signed, inverse_unit, plan)
    root = jnp.sqrt(xy_ref[i][:, : plan.num_positives])
    root = root - jnp.min(root, axis=1, keepdims=True)
    neighbours, floored = [], []
    targets = xx_ref.shape[2] + xy_ref.shape[2] - 1
    for tau, (generated, real) in zip(temperatures, affinities, strict=True):
      neighbours.append(_neighbours(root, tau, distance_unit))
      count = _total(jnp.where(self_pair | (generated > floor), 0.0, 1.0))
      count += _total(jnp.where(real > floor, 0.0, 1.0))
      floored.append(count / (n * targets))
    out_ref[i] = _row([*products, *neighbours, *floored])


def force(
  x_ref, y_ref, wx_ref, wy_ref, xx_ref, xy_ref, scalars_ref, out_ref, *, plan
):
  """Sum over temperatures of factor * drift, in units of the features.

  Scalars are the unit of the distances and the factor of each temperature.
  """

  @pl.loop(0, x_ref.shape[0])
  def _(i):
    scalars = scalars_ref[i]
    _, affinities = _affinities(xx_ref[i], xy_ref[i], scalars[:, 0:1], plan)
    # Drifts are linear in the coefficients: one product for all temperatures.
    weights = (wx_ref[i], wy_ref[i])
    signed = [_signed(pair, weights, plan) for pair in affinities]
    factors = [scalars[:, 1 + k : 2 + k] for k in range(len(signed))]
    generated, real = (
      sum(f * pair[side] for f, pair in zip(factors, signed, strict=True))
      for side in (0, 1)
    )

    def write(at, x, y, _):
      out_ref[i, :, at] = _shift(x, y, (generated, real)).astype(out_ref.dtype)

    _over_channels(x_ref, y_ref, i, write, None)


def plans(x_ref, y_ref, xy_ref, scalars_ref, out_ref, *signed_refs, plan):
  """Transport plans: figures of each problem, and each temperature's W.

  Figures are as in `statistics`, but for the floor. W are signed coefficients
  of the reals. Scalars are those of `statistics` and the strength of guidance.
  """
  transport = plan.transport
  at = plan.num_positives, plan.num_positives + transport.num_unconditional

  @pl.loop(0, x_ref.shape[0])
  def _(i):
    distance_unit, inverse_unit, strength = (
      scalars_ref[i][:, k : k + 1] for k in range(3)
    )
    xy = xy_ref[i]
    sets = xy[:, : at[0]], xy[:, at[0] : at[1]], xy[:, at[1] :]
    factors = (
      plan.attraction * (1.0 + strength),
      -plan.repulsion * strength,
      -plan.repulsion,
    )
    for tau, signed_ref in zip(plan.temperatures, signed_refs, strict=True):
      start = 0
      for squared, factor in zip(sets, factors, strict=True):
        stop = start + squared.shape[1]
        if stop == start:
          continue
        exponent = family.transport_exponent(
          squared, tau * distance_unit, distance_unit, transport.cost
        )
        log_b = jnp.full((1, stop - start), -math.log(stop - start))
        rows = family.plan_rows(exponent, log_b, transport.iterations)
        signed_ref[i, :, start:stop] = factor * rows
        start = stop
    signed = [(None, ref[i]) for ref in signed_refs]
    products = _inner_products(x_ref, y_ref, i, signed, inverse_unit, plan)
    root = jnp.sqrt(sets[0])
    root = root - jnp.min(root, axis=1, keepdims=True)
    neighbours = [
      _neighbours(root, tau, distance_unit) for tau in plan.temperatures
    ]
    out_ref[i] = _row([*products, *neighbours])


def pull(x_ref, y_ref, scalars_ref, *refs, plan):
  """`force` of coefficients W; scalars are the factor of each temperature."""
  *signed_refs, out_ref = refs

  @pl.loop(0, x_ref.shape[0])
  def _(i):
    scalars = scalars_ref[i]
    signed = sum(
      scalars[:, k : k + 1] * r[i] for k, r in enumerate(signed_refs)
    )

    def write(at, x, y, _):
      shift = _shift(x, y, (None, signed))
      out_ref[i, :, at] = shift.astype(out_ref.dtype)

    _over_channels(x_ref, y_ref, i, write, None)


def _inner_products(
  x_ref: Any, y_ref: Any, i: Any, signed: Sequence[Any], unit: Any, plan: Plan
) -> list[Any]:
  """[1, 1] sums of the products of the drifts of plan.pairs."""

  def add(_, x, y, products):
    x, y = x * unit, y * unit
    drifts = [_shift(x, y, coefficients) for coefficients in signed]
    return tuple(
      total + jnp.sum(drifts[a] * drifts[b], axis=1, keepdims=True)
      for total, (a, b) in zip(products, plan.pairs, strict=True)
    )

  n = x_ref.shape[1]
  zeros = tuple(jnp.zeros((n, 1), jnp.float32) for _ in plan.pairs)
  return [
    jnp.sum(rows, axis=0, keepdims=True)
    for rows in _over_channels(x_ref, y_ref, i, add, zeros)
  ]


def _neighbours(root: Any, tau: float, unit: Any) -> Any:
  """Effective number of targets at distances root above the least, [1, 1].

  (sum k)^2 / sum k^2 is 1 / sum p^2 of the softmax p of the positives.
  """
  kernel = jnp.exp(-root / (tau * unit))
  once = jnp.sum(kernel, axis=1, keepdims=True)
  twice = jnp.sum(kernel * kernel, axis=1, keepdims=True)
  return _total(once * once / twice) / root.shape[0]


def _over_channels(
  x_ref: Any, y_ref: Any, i: Any, body: Callable[..., Any], carry: Any
) -> Any:
  """carry = body(channels, x, y, carry) for parts of problem i's channels.

  Features come about the mean of x, in float32. In parts the kernels stay
  small, whatever the width.
  """
  channels = x_ref.shape[2]
  widths = range(LANES, _MAX_PART + 1, LANES)
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
    lambda j, carry: part(pl.multiple_of(j * width, LANES), carry),
    carry,
  )


def _affinities(
  xx: Any, xy: Any, unit: Any, plan: Plan
) -> tuple[Any, list[Any]]:
  """(self-pairs, A of generated and of real targets for each temperature).

  As field.affinities: A = sqrt(softmax over targets * softmax over samples),
  each root as an L2-normalised root of the kernel. Generated and real targets
  stay apart, as matrices of lanes don't join cheaply, and share the norm.
  """
  self_pair = _self_pair(xx.shape)
  far = MIN_DISTANCE + SELF_DISTANCE * unit
  squares = (jnp.where(self_pair, far * far, xx), xy)
  roots = [jnp.sqrt(squared) for squared in squares]
  rows = columns = None
  if plan.normalization != "none":
    nearest = jnp.minimum(
      *(jnp.min(squared, axis=1, keepdims=True) for squared in squares)
    )
    rows = [
      _excess(s, root, nearest) for s, root in zip(squares, roots, strict=True)
    ]
  if plan.normalization == "xy":
    columns = [
      _excess(s, root, jnp.min(s, axis=0, keepdims=True))
      for s, root in zip(squares, roots, strict=True)
    ]
  affinities = []
  for temperature in plan.temperatures:
    tau = temperature * unit
    if rows is None:
      pair = [jnp.exp(-root / tau) for root in roots]
    else:
      over_targets = [jnp.exp(-excess / (2.0 * tau)) for excess in rows]
      norm = sum(jnp.sum(k * k, axis=1, keepdims=True) for k in over_targets)
      pair = [k / jnp.sqrt(norm) for k in over_targets]
      over_samples = pair
      if columns is not None:
        kernels = [jnp.exp(-excess / (2.0 * tau)) for excess in columns]
        over_samples = [
          k / jnp.sqrt(jnp.sum(k * k, axis=0, keepdims=True)) for k in kernels
        ]
      pair = [k * o for k, o in zip(pair, over_samples, strict=True)]
    floor = plan.affinity_floor**0.5
    affinities.append([jnp.maximum(k, floor) for k in pair])
  return self_pair, affinities


def _excess(squared: Any, root: Any, nearest: Any) -> Any:
  """d - min(d) as (d^2 - min(d)^2) / (d + min(d)), without d's rounding.

  A temperature of 0.02 would magnify it by 50.
  """
  return (squared - nearest) / (root + jnp.sqrt(nearest))


def _signed(pair: Any, weights: Any, plan: Plan) -> tuple[Any, Any]:
  """Signed coefficients [-b W_neg, a W_pos] of generated and real targets.

  Positives are the first lanes of the real targets. Lanes are chosen by masks:
  slices that don't end at a multiple of 128 would move data between lanes.
  """
  generated, real = (k * w for k, w in zip(pair, weights, strict=True))
  lane = jax.lax.broadcasted_iota(jnp.int32, real.shape, 1)
  is_positive = lane < plan.num_positives
  positive = jnp.where(is_positive, real, 0.0)
  positives = jnp.sum(positive, axis=1, keepdims=True)
  negatives = jnp.sum(generated, axis=1, keepdims=True) + jnp.sum(
    real - positive, axis=1, keepdims=True
  )
  away = -plan.repulsion * positives
  towards = plan.attraction * negatives
  return generated * away, real * jnp.where(is_positive, towards, away)


def _shift(x: Any, y: Any, signed: tuple[Any, Any]) -> Any:
  """Sum over targets of w_ij (y_j - x_i); see field.mean_shift."""
  generated, real = signed
  if generated is None:
    return _dot(real, y, (1, 0)) - jnp.sum(real, axis=1, keepdims=True) * x
  total = jnp.sum(generated, axis=1, keepdims=True) + jnp.sum(
    real, axis=1, keepdims=True
  )
  return _dot(generated, x, (1, 0)) + _dot(real, y, (1, 0)) - total * x


def _dot(a: Any, b: Any, contract: tuple[int, int]) -> Any:
  """Product over an axis of each, exact to float32."""
  return jax.lax.dot_general(
    a,
    b,
    (((contract[0],), (contract[1],)), ((), ())),
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )


def _self_pair(shape: tuple[int, int]) -> Any:
  """The diagonal; kernels have no jnp.eye."""
  row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
  return row == jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def _row(values: Sequence[Any]) -> Any:
  """[1, 128] of [1, 1] values."""
  lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
  row = jnp.zeros((1, LANES), jnp.float32)
  for i, value in enumerate(values):
    row = jnp.where(lane == i, value, row)
  return row


def _total(x: Any) -> Any:
  """[1, 1]: rows first, so that long sums stay accurate."""
  return jnp.sum(jnp.sum(x, axis=1, keepdims=True), axis=0, keepdims=True)
