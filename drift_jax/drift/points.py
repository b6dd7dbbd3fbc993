"""The field at given points: one problem, raw distances, nothing normalised."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from drift_jax.drift import family
from drift_jax.drift.field import (
  TINY_SQUARED_DISTANCE,
  Normalization,
  affinities,
  check_axes,
  check_temperature,
  mask_pairs,
  mean_shift,
  product_coefficients,
  squared_distances,
  weights_or_ones,
  wide_dtype,
)


def compute_v(
  x: Float[Array, "N D"],
  y_pos: Float[Array, "P D"],
  y_neg: Float[Array, "M D"],
  temperature: float,
  *,
  mask_self: bool,
  normalization: Normalization = "xy",
  attraction: float = 1.0,
  repulsion: float = 1.0,
) -> Float[Array, "N D"]:
  """The drifting field V = a V+ - b V- at x, on raw distances (Alg. 2).

    V+(x_i) = sum_j W_pos[i, j] (y_pos[j] - x_i),  V- likewise (eq. 7-12,
  arXiv:2602.04770; W of `product_coefficients`). With a = b = 1 the x_i
  cancel: V = W_pos y_pos - W_neg y_neg. Sums, not means, over the targets.

  Args:
    x: samples at which the field is evaluated.
    y_pos: positives, samples of the data distribution p.
    y_neg: negatives, samples of the generated distribution q.
    temperature: tau > 0, in the units of the coordinates.
    mask_self: True when y_neg are the samples x themselves; the pair
      (x_i, y_neg_i) then takes no part. False gives the population form,
      which is anti-symmetric: exchanging y_pos and y_neg flips V.
    normalization: "xy" (softmax over both axes), "y" or "none" (Table 11).
    attraction: a; any (a, b) != (1, 1) breaks the anti-symmetry (Table 1).
    repulsion: b.

  Returns:
    V in the units of the coordinates, float32 (float64 of points that are),
    without any normalisation.

  Raises:
    ValueError: temperature <= 0, unknown normalization, mask_self with
      N != M, or other axes than these.
  """
  dtype = wide_dtype(x, y_pos, y_neg)
  x, y_pos, y_neg = (a.astype(dtype) for a in (x, y_pos, y_neg))
  w_pos, w_neg, _ = coefficients(
    x,
    y_pos,
    y_neg,
    temperature,
    mask_self=mask_self,
    normalization=normalization,
  )
  center = jnp.mean(x, axis=0)
  x, y_pos, y_neg = x - center, y_pos - center, y_neg - center
  v_pos = mean_shift(x, y_pos, w_pos)
  v_neg = mean_shift(x, y_neg, w_neg)
  return attraction * v_pos - repulsion * v_neg


def coefficients(
  x: Float[Array, "N D"],
  y_pos: Float[Array, "P D"],
  y_neg: Float[Array, "M D"],
  temperature: float,
  *,
  mask_self: bool,
  normalization: Normalization = "xy",
) -> tuple[Float[Array, "N P"], Float[Array, "N M"], Float[Array, "N P+M"]]:
  """Coefficients (W_pos, W_neg) and affinities A of Alg. 2, float32 or 64.

  A has the positives first. Arguments and errors are those of `compute_v`.
  """
  _check_points(x, y_pos, y_neg, temperature, mask_self)
  dtype = wide_dtype(x, y_pos, y_neg)
  x, y_pos, y_neg = (a.astype(dtype) for a in (x, y_pos, y_neg))
  p = len(y_pos)
  squared = squared_distances(x, jnp.concatenate([y_pos, y_neg]))
  if mask_self:
    self_pair = jnp.eye(*squared.shape, k=p, dtype=bool)
    squared = mask_pairs(squared, self_pair, temperature)
  affinity = affinities(squared, temperature, normalization=normalization)
  w_pos, w_neg = product_coefficients(affinity[:, :p], affinity[:, p:])
  return w_pos, w_neg, affinity


def compute_field(
  x: Float[Array, "N D"],
  y_pos: Float[Array, "P D"],
  y_neg: Float[Array, "M D"],
  temperature: float,
  *,
  field: str,
  weight_pos: Float[Array, " P"] | None = None,
  weight_neg: Float[Array, " M"] | None = None,
  mask_self: bool = False,
  **options: Any,
) -> Float[Array, "N D"]:
  """V of any field of the family at given points, on raw distances.

  Args:
    x: points at which the field is evaluated.
    y_pos: positives, which attract.
    y_neg: negatives, which repel.
    temperature: tau, in units of distance.
    field: one of family.FIELDS.
    weight_pos: weight of each positive; None means 1.
    weight_neg: weight of each negative; None means 1.
    mask_self: whether y_neg is x itself, and (x_i, y_neg_i) no pair.
    **options: options of the field.

  Returns:
    V = V+ - V-, float32 (float64 of points that are), without gradient;
    nothing is normalised but what the field itself does.

  Raises:
    ValueError: other axes than these, an unknown field or option, a temperature
      that is not positive, mask_self with N != M.
  """
  _check_points(x, y_pos, y_neg, temperature, mask_self)
  family.check_field(field, options)
  dtype = wide_dtype(x, y_pos, y_neg)
  x, targets = (
    jax.lax.stop_gradient(a.astype(dtype))[None]
    for a in (x, jnp.concatenate([y_neg, y_pos]))
  )
  squared = jnp.maximum(squared_distances(x, targets), TINY_SQUARED_DISTANCE)
  if mask_self:
    self_pair = jnp.eye(*squared.shape[1:], dtype=bool)
    squared = mask_pairs(squared, self_pair, temperature)
  weights = [
    weights_or_ones(name, weight, (len(y),), dtype)
    for name, weight, y in (
      ("weight_neg", weight_neg, y_neg),
      ("weight_pos", weight_pos, y_pos),
    )
  ]
  center = jnp.mean(x, axis=1, keepdims=True)
  problem = family.Problem(
    x - center,
    targets - center,
    squared,
    jnp.concatenate(weights)[None],
    unit=1.0,
    num_generated=len(y_neg),
    num_negatives=len(y_neg),
    apart=False,
    with_self=mask_self,
  )
  pulls = family.FIELDS[field](problem, temperature, **options)
  return family.displacement(problem, pulls)[0]


def _check_points(
  x: Array, y_pos: Array, y_neg: Array, temperature: float, mask_self: bool
) -> None:
  """Raises a ValueError unless they are the points of one problem."""
  check_axes(
    "it is one problem; jax.vmap takes several",
    x=("N D", x),
    y_pos=("P D", y_pos),
    y_neg=("M D", y_neg),
  )
  check_temperature(temperature)
  if mask_self and len(x) != len(y_neg):
    raise ValueError(
      "mask_self=True masks the pair (x_i, y_neg_i), so x and y_neg need as "
      f"many rows; got {len(x)} and {len(y_neg)}"
    )
