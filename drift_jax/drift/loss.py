"""The drifting loss with feature and drift normalisation (A.6).

Read `reference.paper_loss` first: it is the same without options.
"""

import functools
import math
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from drift_jax.drift import diagnostics, family
from drift_jax.drift.field import (
  TINY_SQUARED_DISTANCE,
  Normalization,
  Tau,
  check_axes,
  mask_pairs,
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

# The paper's loss has a sample as its own negative only through the affinity
# floor: this is added to its normalised distance to itself. Other losses leave
# the pair out of the kernels exactly.
SELF_DISTANCE = 100.0
# Of normalised features: least distance and scale, in their units.
MIN_DISTANCE = 1e-4
MIN_SCALE = 1e-3
# In units of the coordinates' scale S / sqrt(C).
MIN_DRIFT_MEAN_SQUARE = 1e-8

# Names of mapped axes.
Axes = str | tuple[str, ...]

# Least divisor, for a numerator that is 0 there too.
_TINY = float(jnp.finfo(jnp.float32).tiny)
# Range and halvings of the search for an adaptive temperature's scale.
_SCALES = (1e-3, 1e3)
_BISECTIONS = 24


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
      are at the floor, self-pairs left out}; of the softmax field only.
    extra: of variants that ask for it, {name: {temperature: value}}, means over
      labels and samples:
      with `diagnostics`
        alignment: cosine of V+ and V-, in [-1, 1];
        self_mass: share of a sample's repulsion that is its own, in [0, 1],
          where it is among its negatives;
        marginal_error: total variation, in [0, 1], between the share of all
          attraction that each positive has and its weight's;
      with `neighbours`
        temperature_scale: what the temperature was multiplied by;
      with `learned`
        temperature_gradient: of the mean over problems of the smallest over
          samples of -log(sum over positives of softmax(-d / tau)), with
          respect to log tau.
  """

  scale: Float[Array, ""]
  drift_ms: dict[float, Float[Array, ""]]
  effective_positives: dict[float, Float[Array, ""]]
  floor_fraction: dict[float, Float[Array, ""]]
  extra: dict[str, dict[float, Float[Array, ""]]]


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
  weight_gen: Float[Array, "B I"] | None = None,
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
    gen: generated features, any float dtype; the arithmetic is float32, or
      float64 where some features are (jax_enable_x64).
    pos: features of the positives, P real samples.
    neg: features of unconditional real samples, or None for M = 0.
    weight_gen: weight of each generated sample as a negative; None means 1.
    weight_pos: weight of each positive; None means 1.
    weight_neg: weight of each unconditional negative, see
      `guidance.unconditional_weight`; None means 1. Weights multiply the
      affinities after the softmaxes, so zero-weight targets still take part
      in those.
    temperatures: distinct taus > 0, or one, in units of the mean distance S.
    affinity_floor: lower bound of the squared affinities. 1e-6 in the
      published configurations; 0 keeps distributions from collapsing onto
      their means where the temperatures reach no neighbours.
    normalization: "xy" (softmax over both axes), "y" or "none" (Table 11).
    attraction: a, scale of V+ (Table 1).
    repulsion: b, scale of V-.
    axis_name: of the mapped axes (jax.shard_map) that B is split over.
    scalars: of a larger batch, where B is a part of it that is computed on its
      own; what it holds is used and returned in place of B's.
    variant: another field of the family, other negatives, guidance or
      normalisation than the above. affinity_floor and normalization are the
      softmax field's.
    independent: features of I samples that repel in place of gen's, where the
      variant says so.
    temperature_scale: > 0, multiplies all temperatures.

  Returns:
    loss: one value per row of B, in the dtype of the arithmetic.
    info: diagnostics of all of B, without gradient.

  Raises:
    ValueError: no temperature, repeated or non-positive ones, an unknown
      normalization, a negative floor, independent samples that the variant
      does not ask for or lacks, or shapes that disagree.
  """
  temperatures = check_temperatures(temperatures)
  # 1. Problems: samples, their targets, the distances between them.
  neg = _check_features(gen, pos, neg, weight_neg, independent, variant)
  gen = gen.astype(wide_dtype(gen, pos, neg))
  targets = (gen if independent is None else independent, neg, pos)
  weights = (weight_gen, weight_neg, weight_pos)
  problem, self_pairs = _problem(gen, targets, weights, variant)
  # 2. The scale S that all problems share, and the units that it gives.
  problem, scale_weight, strength = _split_guidance(problem)
  scale = _scale(problem.squared, scale_weight, variant.scale_power, axis_name)
  if scalars is not None:
    scale = scalars.scale
  distance_unit, unit, least = _units(scale, gen.shape[-1], variant)
  # 3. Temperatures in the unit of the distances; self-pairs out of their reach.
  stretch = _stretch(problem, scale, variant)
  factors = (jax.lax.stop_gradient(temperature_scale), stretch)
  taus = _taus(temperatures, distance_unit, factors)
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
    extra = _extra_figures(problem, tau, pulls, stretch, variant)
    drifts.append(drift)
    figures.append(_figures(problem, tau, pulls, drift, masked, extra))
  info = _info(temperatures, scale, figures, axis_name)
  if scalars is not None and scalars.drift_ms is not None:
    info["drift_ms"] = {t: scalars.drift_ms[t] for t in temperatures}
  # 5. The sum of the normalised drifts, and the loss.
  total = jnp.zeros_like(problem.x)
  for temperature, drift in zip(temperatures, drifts, strict=True):
    if variant.normalize_drift:
      drift /= jnp.sqrt(jnp.maximum(info["drift_ms"][temperature], least))
    total += drift
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
  if (variant.negatives == "independent") != (independent is not None):
    raise ValueError(
      f"variant.negatives={variant.negatives!r}, but independent samples are "
      f"{'not ' if independent is None else ''}given"
    )
  if neg is None:
    neg = jnp.zeros((*gen.shape[:1], 0, *gen.shape[2:]), pos.dtype)
  arrays = {"gen": ("B N C", gen), "pos": ("B P C", pos), "neg": ("B M C", neg)}
  if independent is not None:
    arrays["independent"] = ("B I C", independent)
  check_axes("of a single problem [N, C], give gen[None] and so on", **arrays)
  return neg


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

  Unconditional reals are weighted negatives (A.7), or a set of their own
  (W-Flow): uniform, left out of the scale, and their weights' sum is the
  strength.
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
  squared: Float[Array, "B N T"],
  weight: Float[Array, "B T"],
  power: int,
  axis_name: Axes,
) -> Float[Array, ""]:
  """S = (mean of w d^p / mean of w)^(1/p), self-pairs included."""
  powered = jnp.sqrt(squared) if power == 1 else squared
  mean_power, mean_weight = _over_axes(
    (_batch_mean(powered * weight[:, None, :]), _batch_mean(weight)), axis_name
  )
  scale = mean_power / mean_weight
  return scale if power == 1 else jnp.sqrt(scale)


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
  temperatures: tuple[float, ...], unit: Array, factors: tuple[Any, ...]
) -> list[Tau]:
  """Temperatures in the unit of the distances, times the factors there are."""
  taus: list[Any] = [temperature * unit for temperature in temperatures]
  for factor in factors:
    if factor is not None:
      taus = [tau * factor for tau in taus]
  return taus


def _mask(
  problem: family.Problem,
  pairs: Bool[Array, "N T"] | None,
  taus: list[Tau],
  soft_unit: Float[Array, ""] | None,
) -> family.Problem:
  """Pairs far apart: as far as the paper has them, or beyond every kernel."""
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
  pulls: family.Coefficients | family.Velocities,
  strength: Float[Array, "B 1 1"] | None,
) -> family.Coefficients | family.Velocities:
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


def _figures(
  problem: family.Problem,
  tau: Tau,
  pulls: family.Coefficients | family.Velocities,
  drift: Float[Array, "B N C"],
  masked: Bool[Array, "N T"] | None,
  extra: dict[str, Array],
) -> dict[str, Any]:
  """The figures of DriftInfo of a temperature, means over these problems."""
  mean_square = _batch_mean(drift**2)
  distance = jnp.sqrt(problem.squared[..., problem.num_negatives :])
  neighbours = jnp.mean(diagnostics.effective_numbers(-distance / tau))
  floor_fraction: Any = {}
  if isinstance(pulls, family.Coefficients) and pulls.floored is not None:
    kept = None if masked is None else ~masked
    floor_fraction = jnp.mean(pulls.floored, where=kept)
  return {
    "drift_ms": mean_square,
    "effective_positives": neighbours,
    "floor_fraction": floor_fraction,
    "extra": extra,
  }


def _extra_figures(
  problem: family.Problem,
  tau: Tau,
  pulls: family.Coefficients | family.Velocities,
  stretch: Float[Array, "B 1 1"] | None,
  variant: Variant,
) -> dict[str, Float[Array, ""]]:
  """DriftInfo's figures of variants that ask for them."""
  extra = diagnostics.balance(problem, pulls) if variant.diagnostics else {}
  if stretch is not None:
    extra["temperature_scale"] = jnp.mean(stretch)
  if variant.learned:
    gradient = diagnostics.temperature_gradient(problem, tau)
    extra["temperature_gradient"] = gradient
  return extra


def _info(
  temperatures: tuple[float, ...],
  scale: Float[Array, ""],
  figures: list[dict[str, Any]],
  axis_name: Axes,
) -> DriftInfo:
  """Each figure by temperature, means over all parts of B."""
  by_temperature = jax.tree.map(
    lambda *values: dict(zip(temperatures, values, strict=True)), *figures
  )
  return {"scale": scale, **_over_axes(by_temperature, axis_name)}


def _batch_mean(values: Float[Array, "B ..."]) -> Float[Array, ""]:
  """Mean of everything; per row first, so that long sums stay accurate."""
  return jnp.mean(jnp.mean(values, axis=tuple(range(1, values.ndim))))


def _over_axes(means: Any, axis_name: Axes) -> Any:
  """Means over all parts of B: one collective for the whole tree."""
  return jax.lax.pmean(means, axis_name) if axis_name else means
