"""The drifting loss with feature and drift normalisation (A.6)."""

import math
from collections.abc import Sequence
from typing import NamedTuple, TypedDict, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from drift_jax.drift.field import (
  Normalization,
  affinities,
  check_temperature,
  mean_shift,
  product_coefficients,
  squared_distances,
)

_Means = TypeVar("_Means")

# A sample is its own negative only through the affinity floor: this is added
# to its normalised distance to itself.
SELF_DISTANCE = 100.0
MIN_DISTANCE = 1e-4
MIN_SCALE = 1e-3
MIN_DRIFT_MEAN_SQUARE = 1e-8


class DriftInfo(TypedDict):
  """What to watch while training; the loss itself is constant by design.

  Attributes:
    scale: S, the weighted mean distance, in the units of the features.
    drift_ms: {temperature: mean square of the raw drift F, before the drift
      normalisation, in normalised coordinates, over labels, samples and
      channels}.
    effective_positives: {temperature: effective number of positives that a
      sample sees, in [1, P]: 1 / sum p^2 of the softmax p over its positives,
      averaged over labels and samples; weights do not enter}.
    floor_fraction: {temperature: fraction, in [0, 1], of the affinities that
      are at the floor, self-pairs left out}.
  """

  scale: Float[Array, ""]
  drift_ms: dict[float, Float[Array, ""]]
  effective_positives: dict[float, Float[Array, ""]]
  floor_fraction: dict[float, Float[Array, ""]]


class Scalars(NamedTuple):
  """What couples all problems of a feature, of a batch that these are part of.

  Attributes:
    scale: S, as in DriftInfo.
    drift_ms: as in DriftInfo; None where it is not known yet.
  """

  scale: Float[Array, "*F"]
  drift_ms: dict[float, Float[Array, "*F"]] | None


def drift_loss(
  gen: Float[Array, "B N C"],
  pos: Float[Array, "B P C"],
  neg: Float[Array, "B M C"] | None,
  *,
  weight_gen: Float[Array, "B N"] | None = None,
  weight_pos: Float[Array, "B P"] | None = None,
  weight_neg: Float[Array, "B M"] | None = None,
  temperatures: Sequence[float],
  affinity_floor: float = 1e-6,
  normalization: Normalization = "xy",
  attraction: float = 1.0,
  repulsion: float = 1.0,
  axis_name: str | tuple[str, ...] = (),
  scalars: Scalars | None = None,
) -> tuple[Float[Array, " B"], DriftInfo]:
  """Drifting loss of one feature key (eq. 6, 13; A.6 of arXiv:2602.04770).

    L_b = mean over samples and channels of (x/s - sg(x/s + V))^2
    V = sum over temperatures of F / sqrt(max(mean F^2, 1e-8))
    F_i = a sum_j W_pos[i, j] (y_pos_j - x_i) / s - b (same with W_neg)
  with W as in Alg. 2 from the distances divided by max(S, 1e-3), and
  s = max(S / sqrt(C), 1e-3). The scalars S (mean of weight * distance over
  mean weight, self-pairs included) and mean F^2 are shared by ALL of B: a
  feature key is passed whole, all labels and locations of the global batch,
  or split evenly over mapped axes that are named.

  Row b is one drift problem (a label at a location). Its negatives are its
  own N generated samples, each masked for itself, and `neg`. The gradient
  with respect to gen is -2 V / (N C s), and zero with respect to everything
  else; the loss of a temperature alone averages to 1 over B, that of K
  temperatures to at most K^2.

  Args:
    gen: generated features, any float dtype; the arithmetic is float32.
    pos: features of the positives, P real samples.
    neg: features of unconditional real samples, or None for M = 0.
    weight_gen: weight of each generated sample as a negative; None means 1.
    weight_pos: weight of each positive; None means 1.
    weight_neg: weight of each unconditional negative, see
      `guidance.unconditional_weight`; None means 1. Weights multiply the
      affinities after the softmaxes, so zero-weight targets still take part
      in those.
    temperatures: distinct taus > 0, in units of the mean distance S.
    affinity_floor: lower bound of the squared affinities. 1e-6 in the
      published configurations; 0 keeps distributions from collapsing onto
      their means where the temperatures reach no neighbours.
    normalization: "xy" (softmax over both axes), "y" or "none" (Table 11).
    attraction: a, scale of V+ (Table 1).
    repulsion: b, scale of V-.
    axis_name: of the mapped axes (jax.shard_map) that B is split over.
    scalars: of a larger batch, where B is a part of it that is computed on its
      own; what it holds is used and returned in place of B's.

  Returns:
    loss: one value per row of B, float32.
    info: diagnostics of all of B, without gradient.

  Raises:
    ValueError: no temperature, repeated or non-positive ones, an unknown
      normalization, a negative floor, or shapes that disagree.
  """
  temperatures = check_temperatures(temperatures)
  if neg is None:
    neg = jnp.zeros((pos.shape[0], 0, pos.shape[2]), pos.dtype)
    if weight_neg is not None:
      raise ValueError("weight_neg is given but neg is None")
  _check_shapes(gen, pos, neg)
  gen = gen.astype(jnp.float32)
  frozen = [
    jax.lax.stop_gradient(a.astype(jnp.float32)) for a in (gen, neg, pos)
  ]
  weight = jnp.concatenate(
    [
      _weights("weight_gen", weight_gen, gen),
      _weights("weight_neg", weight_neg, neg),
      _weights("weight_pos", weight_pos, pos),
    ],
    axis=1,
  )
  n, channels = gen.shape[1:]
  n_neg = n + neg.shape[1]

  x, targets = frozen[0], jnp.concatenate(frozen, axis=1)
  self_pair = jnp.eye(n, targets.shape[1], dtype=bool)
  squared = jnp.where(self_pair, 0.0, squared_distances(x, targets))
  squared = jnp.maximum(squared, MIN_DISTANCE**2)
  distance = jnp.sqrt(squared)

  # The shared scale, and what it turns into: a unit of the coordinates and
  # one of the distances that the kernels see, self-pairs pushed away.
  mean_distance, mean_weight = _over_axes(
    (_batch_mean(distance * weight[:, None, :]), _batch_mean(weight)), axis_name
  )
  scale = mean_distance / mean_weight if scalars is None else scalars.scale
  distance_unit = jnp.maximum(scale, MIN_SCALE)
  self_distance = MIN_DISTANCE + SELF_DISTANCE * distance_unit
  squared = jnp.where(self_pair, self_distance**2, squared)
  unit = jnp.maximum(scale / math.sqrt(channels), MIN_SCALE)
  center = jnp.mean(x, axis=1, keepdims=True)
  x, targets = (x - center) / unit, (targets - center) / unit

  drifts, mean_squares, neighbours, floored = [], [], [], []
  for temperature in temperatures:
    affinity = affinities(
      squared,
      temperature * distance_unit,
      normalization=normalization,
      affinity_floor=affinity_floor,
    )
    weighted = affinity * weight[:, None, :]
    w_pos, w_neg = product_coefficients(
      weighted[..., n_neg:], weighted[..., :n_neg]
    )
    signed = jnp.concatenate([-repulsion * w_neg, attraction * w_pos], axis=-1)
    drifts.append(mean_shift(x, targets, signed))
    mean_squares.append(_batch_mean(drifts[-1] ** 2))
    neighbours.append(
      _effective_number(
        -jnp.sqrt(squared[..., n_neg:]) / (temperature * distance_unit)
      )
    )
    floored.append(jnp.mean(affinity <= affinity_floor**0.5, where=~self_pair))
  mean_squares, neighbours, floored = _over_axes(
    (mean_squares, neighbours, floored), axis_name
  )
  if scalars is not None and scalars.drift_ms is not None:
    mean_squares = [scalars.drift_ms[t] for t in temperatures]
  total = jnp.zeros_like(x)
  for drift, mean_square in zip(drifts, mean_squares, strict=True):
    total += drift / jnp.sqrt(jnp.maximum(mean_square, MIN_DRIFT_MEAN_SQUARE))
  info: DriftInfo = {
    "scale": scale,
    "drift_ms": dict(zip(temperatures, mean_squares, strict=True)),
    "effective_positives": dict(zip(temperatures, neighbours, strict=True)),
    "floor_fraction": dict(zip(temperatures, floored, strict=True)),
  }

  # gen - sg(gen) is exactly zero: the value is mean V^2 without the
  # cancellation in x/s - (x/s + V), and the gradient is the same.
  residual = (gen - jax.lax.stop_gradient(gen)) / unit - total
  return jnp.mean(residual**2, axis=(1, 2)), info


def _batch_mean(values: Float[Array, "B ..."]) -> Float[Array, ""]:
  """Mean of everything; per row first, so that long sums stay accurate."""
  return jnp.mean(jnp.mean(values, axis=tuple(range(1, values.ndim))))


def _over_axes(means: _Means, axis_name: str | tuple[str, ...]) -> _Means:
  """Means over all parts of B: one collective for the whole tree."""
  return jax.lax.pmean(means, axis_name) if axis_name else means


def _effective_number(logits: Float[Array, "B N P"]) -> Float[Array, ""]:
  """Participation ratio 1 / sum p^2 of p = softmax(logits), averaged."""
  p = jax.nn.softmax(logits, axis=-1)
  return jnp.mean(1.0 / jnp.sum(p**2, axis=-1))


def check_temperatures(temperatures: Sequence[float]) -> tuple[float, ...]:
  """As floats; raises a ValueError for what drift_loss can't take."""
  values = tuple(float(temperature) for temperature in temperatures)
  for value in values:
    check_temperature(value)
  if not values or len(set(values)) < len(values):
    raise ValueError(
      f"temperatures={values} must hold at least one value and none twice"
    )
  return values


def _check_shapes(gen: Array, pos: Array, neg: Array) -> None:
  for name, features in (("pos", pos), ("neg", neg)):
    if features.shape[::2] != gen.shape[::2]:
      raise ValueError(
        f"{name} has shape {features.shape}, gen {gen.shape}: the first and "
        "the last axis (problems, channels) must agree"
      )


def _weights(
  name: str, weight: Array | None, features: Float[Array, "B T C"]
) -> Float[Array, "B T"]:
  """Weights in float32 without gradient, or ones."""
  if weight is None:
    return jnp.ones(features.shape[:2], jnp.float32)
  if weight.shape != features.shape[:2]:
    raise ValueError(
      f"{name} has shape {weight.shape}; it must be {features.shape[:2]}, one "
      "weight per row of its features"
    )
  return jax.lax.stop_gradient(weight.astype(jnp.float32))
