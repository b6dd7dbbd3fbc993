"""The drifting loss with feature and drift normalisation (A.6).

Read `reference.paper_loss` first: it is the same without options.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from drift_jax.drift import diagnostics, family
from drift_jax.drift.diagnostics import DriftInfo, Scalars, report
from drift_jax.drift.field import (
  TINY_SQUARED_DISTANCE,
  Axes,
  Normalization,
  Tau,
  batch_mean,
  check_axes,
  mask_pairs,
  over_axes,
  squared_distances,
  weights_or_ones,
  wide_dtype,
)
from drift_jax.drift.variant import (
  PAPER,
  Temperatures,
  Variant,
  check_temperatures,
)

# The paper's loss masks self-pairs by adding this to their normalised distance:
# only the affinity floor is left of them. Other losses mask them so that their
# kernels vanish.
SELF_DISTANCE = 100.0
# Of normalised features: least distance and scale, in their units.
MIN_DISTANCE = 1e-4
MIN_SCALE = 1e-3
# In units of the coordinates' scale S / sqrt(C).
MIN_DRIFT_MEAN_SQUARE = 1e-8

# Least divisor, for a numerator that is 0 there too.
_TINY = float(jnp.finfo(jnp.float32).tiny)
# Range and halvings of the search for an adaptive temperature's scale.
_SCALES = (1e-3, 1e3)
_BISECTIONS = 24


def drift_loss(
  gen: Float[Array, "B N C"],
  pos: Float[Array, "B P C"],
  neg: Float[Array, "B M C"] | None,
  *,
  weight_gen: Float[Array, "B G"] | None = None,
  weight_pos: Float[Array, "B P"] | None = None,
  weight_neg: Float[Array, "B M"] | None = None,
  temperatures: Temperatures,
  affinity_floor: float = 1e-6,
  normalization: Normalization = "xy",
  attraction: float = 1.0,
  repulsion: float = 1.0,
  axis_name: Axes = (),
  scalars: Scalars | None = None,
  variant: Variant = PAPER,
  independent: Float[Array, "B I C"] | None = None,
  temperature_scale: Float[Array, ""] | None = None,
) -> tuple[Float[Array, " B"], DriftInfo]:
  """Drifting loss of one feature key (eq. 6, 13; A.6 of arXiv:2602.04770).

    L_b = mean over samples and channels of (x/s - sg(x/s + V))^2
    V = sum over temperatures of F / sqrt(max(mean F^2, 1e-8))
    F_i = a sum_j W_pos[i, j] (y_pos_j - x_i) / s - b (same with W_neg)
  with W as in Alg. 2 from the distances divided by max(S, 1e-3), and
  s = max(S / sqrt(C), 1e-3). S (mean of weight * distance over mean weight,
  self-pairs included) and mean F^2 are shared by ALL of B: pass a feature key
  whole, all labels and locations of the global batch, or split it evenly over
  mapped axes that are named.
  Row b is one drift problem (a label at a location). Its negatives are its
  own N generated samples, each masked for itself, `independent` ones and `neg`.
  The gradient by gen is -2 V / (N C s), by all else 0; a temperature's loss
  averages to 1 over B, that of K temperatures to at most K^2.

  Args:
    gen: generated features of any float dtype; float64 keeps its own (x64).
    pos: features of the positives, P real samples.
    neg: features of unconditional real samples, or None for M = 0.
    weight_gen, weight_pos: weight of each generated sample as a negative, gen
      before `independent`, and of each positive; None means 1.
    weight_neg: weight of each unconditional negative, see
      `guidance.unconditional_weight`; None means 1. Weights multiply the
      affinities after normalisation: a target of weight 0 still counts in the
      softmaxes.
    temperatures: distinct taus > 0, or one, in units of the mean distance S.
    affinity_floor: lower bound of the squared affinities of the softmax field:
      1e-6 as published; 0 keeps distributions from collapsing onto their means
      where the temperatures reach no neighbours.
    normalization: its softmaxes: "xy" (both axes), "y" or "none" (Table 11).
    attraction, repulsion: a and b, scales of V+ and V- (Table 1).
    axis_name: names of the mapped axes (jax.shard_map) that B is split over.
    scalars: those of a larger batch, used and returned in place of B's.
    variant: another field, other negatives, guidance or normalisation.
    independent: any number of generated samples that repel, of weight 1 and
      counted in S: in place of gen in variants that need them, else beside it.
    temperature_scale: > 0, multiplies all temperatures.

  Returns:
    loss: one value per row of B, float32, or float64 if some features are.
    info: diagnostics of all of B, without gradient.

  Raises:
    ValueError: bad arguments, shapes that disagree, no independent samples.
  """
  temperatures = check_temperatures(temperatures)
  # 1. Problems: samples, their targets, the distances between them.
  neg = _check_features(gen, pos, neg, weight_neg, independent, variant)
  gen = gen.astype(wide_dtype(gen, pos, neg))
  targets = (_repelling(gen, independent, variant), neg, pos)
  weights = (weight_gen, weight_neg, weight_pos)
  problem, self_pairs = _problem(gen, targets, weights, variant)
  # 2. The scale S that all problems share, and the units that it gives.
  problem, scale_weight, strength = _split_guidance(problem)
  scale = _scale(problem, scale_weight, variant, axis_name, scalars)
  distance_unit, unit, least = _units(scale, gen.shape[-1], variant)
  # 3. Temperatures in the unit of the distances; self-pairs out of their reach.
  stretch = _stretch(problem, scale, variant)
  taus = _taus(temperatures, distance_unit, temperature_scale, stretch)
  masked = self_pairs if variant.negatives == "own" else None
  is_soft = variant.has_soft_mask and temperature_scale is None
  problem = _mask(problem, masked, taus, distance_unit if is_soft else None)
  problem = _normalise(problem, distance_unit, unit)
  # 4. The drift of each temperature, and what to watch of it.
  field = _field(variant, affinity_floor, normalization)
  drifts, figures = [], []
  for tau in taus:
    pulls = _guide(problem, field(problem, tau), strength)
    drift = family.displacement(problem, pulls, attraction, repulsion)
    drifts.append(drift)
    figures.append(
      diagnostics.figures(problem, tau, pulls, drift, masked, stretch, variant)
    )
  # 5. The report, the sum of the normalised drifts, the loss.
  info = report(temperatures, scale, figures, axis_name, scalars)
  mean_squares = [info["drift_ms"][t] for t in temperatures]
  total = _total(drifts, mean_squares, least, variant)
  # gen - sg(gen) is exactly zero: the value is mean V^2 without the
  # cancellation in x/s - (x/s + V), and the gradient is the same.
  residual = (gen - jax.lax.stop_gradient(gen)) / unit - total
  return jnp.mean(residual**2, axis=(1, 2)), info


def _check_features(
  gen: Array,
  pos: Array,
  neg: Array | None,
  weight_neg: Array | None,
  independent: Array | None,
  variant: Variant,
) -> Float[Array, "B M C"]:
  """Raises a ValueError unless they go together; returns neg, M = 0 if None."""
  if neg is None and weight_neg is not None:
    raise ValueError("weight_neg is given but neg is None")
  if variant.negatives == "independent" and independent is None:
    raise ValueError(
      "variant.negatives='independent', but independent samples are not given"
    )
  if neg is None:
    neg = jnp.zeros((*gen.shape[:1], 0, *gen.shape[2:]), pos.dtype)
  arrays = {"gen": ("B N C", gen), "pos": ("B P C", pos), "neg": ("B M C", neg)}
  if independent is not None:
    arrays["independent"] = ("B I C", independent)
  remedy = "of a single problem [N, C], give gen[None] and so on"
  if any(array.ndim > 3 for _, array in arrays.values()):
    remedy = "flatten what follows N, as gen.reshape(B, N, -1) does"
  check_axes(remedy, **arrays)
  return neg


def _repelling(
  gen: Float[Array, "B N C"],
  independent: Float[Array, "B I C"] | None,
  variant: Variant,
) -> Float[Array, "B _ C"]:
  """All generated negatives; where gen is among them it comes first."""
  if independent is None or variant.negatives == "independent":
    return gen if independent is None else independent
  return jnp.concatenate([gen, independent.astype(gen.dtype)], axis=1)


def _problem(
  gen: Float[Array, "B N C"],
  targets: tuple[Array, Array, Array],
  weights: tuple[Array | None, ...],
  variant: Variant,
) -> tuple[family.Problem, Bool[Array, "N T"]]:
  """(problems without gradient in the units of the features, self-pairs).

  Targets and weights are those that repel, unconditional reals, positives.
  """
  dtype = gen.dtype
  frozen = [jax.lax.stop_gradient(array.astype(dtype)) for array in targets]
  names = ("weight_gen", "weight_neg", "weight_pos")
  weight = [
    weights_or_ones(name, given, array.shape[:2], dtype)
    for name, given, array in zip(names, weights, frozen, strict=True)
  ]
  weight = jnp.concatenate(weight, axis=1)
  x, y = jax.lax.stop_gradient(gen), jnp.concatenate(frozen, axis=1)
  squared = squared_distances(x, y)
  self_pairs = jnp.eye(*squared.shape[1:], dtype=bool)
  with_self = variant.negatives != "independent"
  if with_self:
    squared = jnp.where(self_pairs, 0.0, squared)
  # On raw distances no absolute length means anything.
  least = (
    MIN_DISTANCE**2 if variant.normalize_features else TINY_SQUARED_DISTANCE
  )
  num_generated, num_unconditional, _ = (array.shape[1] for array in frozen)
  problem = family.Problem(
    x,
    y,
    jnp.maximum(squared, least),
    weight,
    unit=1.0,
    num_generated=num_generated,
    num_negatives=num_generated + num_unconditional,
    apart=variant.guidance == "velocity",
    with_self=with_self,
  )
  return problem, self_pairs


def _split_guidance(
  problem: family.Problem,
) -> tuple[family.Problem, Float[Array, "B T"], Float[Array, "B 1 1"] | None]:
  """(problem, weights of the scale, strength alpha - 1 of velocity guidance).

  With guidance='negatives' nothing changes (A.7). With 'velocity' (W-Flow)
  unconditional reals get weight 1 and do not count in the scale; the sum of
  their weights is the strength.
  """
  weight = problem.weight
  if not problem.apart:
    return problem, weight, None
  target = jnp.arange(weight.shape[1])
  is_unconditional = (target >= problem.num_generated) & (
    target < problem.num_negatives
  )
  strength = jnp.sum(weight, axis=1, where=is_unconditional)[:, None, None]
  scale_weight = jnp.where(is_unconditional, 0.0, weight)
  weight = jnp.where(is_unconditional, 1.0, weight)
  return problem._replace(weight=weight), scale_weight, strength


def _scale(
  problem: family.Problem,
  weight: Float[Array, "B T"],
  variant: Variant,
  axis_name: Axes,
  scalars: Scalars | None,
) -> Float[Array, ""]:
  """S = (mean of w d^p / mean of w)^(1/p), self-pairs included, or as known.

  With `own_in_scale` the samples are N more targets of weight 1.
  """
  power = variant.scale_power
  if scalars is not None:
    return scalars.scale
  squared = problem.squared
  powered = jnp.sqrt(squared) if power == 1 else squared
  means = batch_mean(powered * weight[:, None, :]), batch_mean(weight)
  if variant.own_in_scale:
    share = squared.shape[1] / squared.shape[2]
    own = _mean_within(problem.x, power)
    means = means[0] + share * own, means[1] + share
  mean_power, mean_weight = over_axes(means, axis_name)
  scale = mean_power / mean_weight
  return scale if power == 1 else jnp.sqrt(scale)


def _mean_within(x: Float[Array, "B N C"], power: int) -> Float[Array, ""]:
  """Mean of d^p over all pairs of a problem's samples, those of one included.

  The mean square is twice the variance: no pair is looked at.
  """
  if power == 2:
    spread = (x - jnp.mean(x, axis=1, keepdims=True)) ** 2
    return 2.0 * x.shape[-1] * batch_mean(spread)
  others = ~jnp.eye(x.shape[1], dtype=bool)
  return batch_mean(jnp.sqrt(jnp.where(others, squared_distances(x, x), 0.0)))


def _units(
  scale: Float[Array, ""], channels: int, variant: Variant
) -> tuple[Array, Array, float | Array]:
  """(unit of distances, of coordinates, least mean square of a drift) (A.6).

  In these coordinates the mean distance is sqrt(C). Units are 1 if features are
  not normalised.
  """
  if variant.normalize_features:
    distance_unit = jnp.maximum(scale, MIN_SCALE)
    unit = jnp.maximum(scale / math.sqrt(channels), MIN_SCALE)
    return distance_unit, unit, MIN_DRIFT_MEAN_SQUARE
  one = jnp.ones_like(scale)
  least = jnp.maximum(MIN_DRIFT_MEAN_SQUARE * scale**2 / channels, _TINY)
  return one, one, least


def _stretch(
  problem: family.Problem, scale: Float[Array, ""], variant: Variant
) -> Float[Array, "B 1 1"] | None:
  """Each problem's factor of the temperatures that `neighbours` asks for.

  With it, samples have so many effective positives on average at temperature 1.
  By bisection within 1e-3 to 1e3 of the scale; the nearest end if none does.
  """
  if not variant.neighbours:
    return None
  squared = problem.squared[..., problem.num_negatives :]
  if not variant.neighbours < squared.shape[-1]:
    raise ValueError(
      f"neighbours={variant.neighbours} must be below the number of positives, "
      f"{squared.shape[-1]}"
    )
  scale = jnp.maximum(scale, MIN_SCALE if variant.normalize_features else _TINY)
  distance = jnp.sqrt(squared) / scale

  def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
    low, high = ends
    middle = (low + high) / 2.0
    count = diagnostics.effective_numbers(-distance / jnp.exp(middle))
    few = jnp.mean(count, axis=-1)[:, None, None] < variant.neighbours
    return jnp.where(few, middle, low), jnp.where(few, high, middle)

  low, high = (
    jnp.full((len(distance), 1, 1), math.log(end), distance.dtype)
    for end in _SCALES
  )
  low, high = jax.lax.fori_loop(0, _BISECTIONS, halve, (low, high))
  stretch = jnp.exp((low + high) / 2.0)
  # Temperatures of normalised features are multiplied by S already.
  return stretch if variant.normalize_features else stretch * scale


def _taus(
  temperatures: tuple[float, ...], unit: Array, *factors: Array | None
) -> list[Tau]:
  """Temperatures in the unit of the distances, times the factors there are."""
  taus: list[Any] = [temperature * unit for temperature in temperatures]
  for factor in jax.lax.stop_gradient(factors):
    if factor is not None:
      taus = [tau * factor for tau in taus]
  return taus


def _mask(
  problem: family.Problem,
  pairs: Bool[Array, "N T"] | None,
  taus: list[Tau],
  soft_unit: Float[Array, ""] | None,
) -> family.Problem:
  """Moves pairs apart: to the paper's distance, or so far that kernels vanish.

  The paper's distance is 100 soft_unit; without soft_unit see `mask_pairs`.
  """
  if pairs is None:
    return problem
  if soft_unit is None:
    return problem._replace(
      squared=mask_pairs(problem.squared, pairs, sum(taus))
    )
  far = MIN_DISTANCE + SELF_DISTANCE * soft_unit
  return problem._replace(squared=jnp.where(pairs, far**2, problem.squared))


def _normalise(
  problem: family.Problem, distance_unit: Array, unit: Array
) -> family.Problem:
  """Coordinates in their unit, about the mean of a problem's samples."""
  center = jnp.mean(problem.x, axis=1, keepdims=True)
  return problem._replace(
    x=(problem.x - center) / unit,
    targets=(problem.targets - center) / unit,
    unit=distance_unit,
  )


def _field(
  variant: Variant, affinity_floor: float, normalization: Normalization
) -> family.Field:
  """The variant's field with its options; two of them are the loss' own."""
  options = dict(variant.options)
  if variant.field == "softmax":
    options["affinity_floor"] = affinity_floor
    options["normalization"] = normalization
  return functools.partial(family.FIELDS[variant.field], **options)


def _guide(
  problem: family.Problem,
  pulls: family.Pulls,
  strength: Float[Array, "B 1 1"] | None,
) -> family.Pulls:
  """V+ and V- with velocity guidance, where there is a strength.

  V = (1 + strength) V+ - V-(generated) - strength V-(unconditional)
  """
  if strength is None or isinstance(pulls, family.Velocities):
    return pulls
  at = problem.num_generated
  neg = [pulls.neg[..., :at], strength * pulls.neg[..., at:]]
  return pulls._replace(
    pos=(1.0 + strength) * pulls.pos, neg=jnp.concatenate(neg, axis=-1)
  )


def _total(
  drifts: list[Float[Array, "B N C"]],
  mean_squares: list[Float[Array, ""]],
  least: float | Float[Array, ""],
  variant: Variant,
) -> Float[Array, "B N C"]:
  """V = sum over temperatures of F / sqrt(max(mean F^2, least))."""
  total = jnp.zeros_like(drifts[0])
  for drift, mean_square in zip(drifts, mean_squares, strict=True):
    if variant.normalize_drift:
      drift /= jnp.sqrt(jnp.maximum(mean_square, least))
    total += drift
  return total
