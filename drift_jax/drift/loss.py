"""The drifting loss with feature and drift normalisation (A.6)."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypedDict, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from drift_jax.drift import family
from drift_jax.drift.field import (
  TINY_SQUARED_DISTANCE,
  Normalization,
  check_axes,
  check_points,
  check_temperature,
  masked,
  mean_shift,
  squared_distances,
  wide_dtype,
)

Negatives = Literal["own", "own_with_self", "independent"]
GuidanceForm = Literal["negatives", "velocity"]

# One, or several.
Temperatures = float | np.number | np.ndarray | Sequence[float]

_Means = TypeVar("_Means")

# The paper's loss has a sample as its own negative only through the affinity
# floor: this is added to its normalised distance to itself. Other losses leave
# the pair out of the kernels exactly.
SELF_DISTANCE = 100.0
# Of normalised features: least distance and scale, in their units.
MIN_DISTANCE = 1e-4
MIN_SCALE = 1e-3
# In units of the coordinates' scale S / sqrt(C).
MIN_DRIFT_MEAN_SQUARE = 1e-8


# To divide by, where what is divided is 0.
_TINY = float(jnp.finfo(jnp.float32).tiny)
# Where an adaptive temperature's scale is looked for, and how often halved.
_SCALES = (1e-3, 1e3)
_BISECTIONS = 24


@dataclasses.dataclass(frozen=True)
class Variant:
  """How a drifting loss departs from the paper's; as it stands, nowhere.

  Attributes:
    field: one of family.FIELDS.
    options: keyword arguments of the field, but for those of `drift_loss`.
    negatives: what repels beside unconditional reals: the samples themselves
      without self-pairs ('own'), with them ('own_with_self'), or an
      'independent' batch of samples, given as such.
    guidance: unconditional reals are weighted 'negatives' (A.7), or
      V += (alpha - 1) (T_{q->p} - T_{q->unc}), the 'velocity' form of W-Flow:
      weight_neg is (alpha - 1) / M then; they are left out of the scale S.
    normalize_features: whether coordinates and distances are in units of S.
    normalize_drift: whether each temperature's drift is divided by its RMS.
    neighbours: where > 0, each problem's temperatures are multiplied by what
      gives a sample so many effective positives at temperature 1, on average.
    learned: whether `temperature_gradient` is wanted.
    diagnostics: whether DriftInfo has what costs time.

  Raises:
    ValueError: for an unknown field, option or value.
  """

  field: str = "softmax"
  options: Mapping[str, Any] | tuple[tuple[str, Any], ...] = ()
  negatives: Negatives = "own"
  guidance: GuidanceForm = "negatives"
  normalize_features: bool = True
  normalize_drift: bool = True
  neighbours: float = 0.0
  learned: bool = False
  diagnostics: bool = False

  def __post_init__(self) -> None:
    # A tuple can be hashed: variants are static arguments of jitted functions.
    options = tuple(sorted(dict(self.options).items()))
    object.__setattr__(self, "options", options)
    family.check_field(self.field, dict(options))
    if self.field == "softmax" and options:
      raise ValueError(
        f"options={dict(options)}: those of the field 'softmax' are the loss' "
        "own arguments, normalization and affinity_floor"
      )
    for name, options in (
      ("negatives", get_args(Negatives)),
      ("guidance", get_args(GuidanceForm)),
    ):
      if getattr(self, name) not in options:
        raise ValueError(
          f"{name}={getattr(self, name)!r} is unknown; valid options: "
          f"{', '.join(options)}"
        )
    if self.guidance == "velocity" and self.field in family.JOINT_FIELDS:
      raise ValueError(
        f"guidance='velocity' needs a field that looks at one set at a time; "
        f"{self.field!r} does not, use guidance='negatives' or one of "
        f"{', '.join(f for f in family.FIELDS if f not in family.JOINT_FIELDS)}"
      )
    if self.neighbours and not self.neighbours > 1:
      raise ValueError(
        f"neighbours={self.neighbours} must be above 1 (0 switches it off)"
      )

  @property
  def has_soft_mask(self) -> bool:
    """Whether self-pairs are SELF_DISTANCE apart, as the paper's are."""
    return (
      self.field == "softmax"
      and self.normalize_features
      and not self.neighbours
    )

  @property
  def scale_power(self) -> int:
    """p of S = (mean of w d^p / mean of w)^(1/p)."""
    return family.scale_power(self.field, dict(self.options))


PAPER = Variant()


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
  axis_name: str | tuple[str, ...] = (),
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
  if neg is None:
    neg = jnp.zeros((*gen.shape[:1], 0, *gen.shape[2:]), pos.dtype)
    if weight_neg is not None:
      raise ValueError("weight_neg is given but neg is None")
  if (variant.negatives == "independent") != (independent is not None):
    raise ValueError(
      f"variant.negatives={variant.negatives!r}, but independent samples are "
      f"{'not ' if independent is None else ''}given"
    )
  arrays = {"gen": ("B N C", gen), "pos": ("B P C", pos), "neg": ("B M C", neg)}
  if independent is not None:
    arrays["independent"] = ("B I C", independent)
  check_axes("of a single problem [N, C], give gen[None] and so on", **arrays)
  dtype = wide_dtype(gen, pos, neg)
  gen = gen.astype(dtype)
  repelling = gen if independent is None else independent
  frozen = [
    jax.lax.stop_gradient(a.astype(dtype)) for a in (repelling, neg, pos)
  ]
  weight = jnp.concatenate(
    [
      _weights("weight_gen", weight_gen, repelling, dtype),
      _weights("weight_neg", weight_neg, neg, dtype),
      _weights("weight_pos", weight_pos, pos, dtype),
    ],
    axis=1,
  )
  n, channels = gen.shape[1:]
  n_gen = repelling.shape[1]
  n_neg = n_gen + neg.shape[1]

  x = frozen[0] if independent is None else jax.lax.stop_gradient(gen)
  targets = jnp.concatenate(frozen, axis=1)
  squared = squared_distances(x, targets)
  self_pair = jnp.eye(n, targets.shape[1], dtype=bool)
  if independent is None:
    squared = jnp.where(self_pair, 0.0, squared)
  # On raw distances no absolute length means anything.
  squared = jnp.maximum(
    squared,
    MIN_DISTANCE**2 if variant.normalize_features else TINY_SQUARED_DISTANCE,
  )
  distance = jnp.sqrt(squared)

  # Velocity guidance: unconditional reals are a set of their own, uniform, and
  # left out of the scale; what their weights add up to is its strength.
  strength = None
  scale_weight = weight
  if variant.guidance == "velocity":
    is_neg = (jnp.arange(weight.shape[1]) >= n_gen) & (
      jnp.arange(weight.shape[1]) < n_neg
    )
    strength = jnp.sum(weight, axis=1, where=is_neg)[:, None, None]
    scale_weight = jnp.where(is_neg, 0.0, weight)
    weight = jnp.where(is_neg, 1.0, weight)

  # The shared scale, and what it turns into: a unit of the coordinates and
  # one of the distances that the kernels see.
  power = variant.scale_power
  powered = distance if power == 1 else squared
  mean_distance, mean_weight = _over_axes(
    (
      _batch_mean(powered * scale_weight[:, None, :]),
      _batch_mean(scale_weight),
    ),
    axis_name,
  )
  if scalars is not None:
    scale = scalars.scale
  else:
    scale = mean_distance / mean_weight
    scale = scale if power == 1 else jnp.sqrt(scale)
  if variant.normalize_features:
    distance_unit = jnp.maximum(scale, MIN_SCALE)
    unit = jnp.maximum(scale / math.sqrt(channels), MIN_SCALE)
  else:
    distance_unit = unit = jnp.ones_like(scale)

  # Temperatures in the units of the distances, and self-pairs out of their
  # reach.
  adapted: Any = None
  if variant.neighbours:
    around = jnp.maximum(scale, _TINY)
    if variant.normalize_features:
      around = distance_unit
    adapted = _adapted(distance[..., n_neg:] / around, variant.neighbours)
    adapted *= around / distance_unit
  bandwidths: list[Any] = [tau * distance_unit for tau in temperatures]
  for factor in (jax.lax.stop_gradient(temperature_scale), adapted):
    if factor is not None:
      bandwidths = [bandwidth * factor for bandwidth in bandwidths]
  if variant.negatives == "own":
    if variant.has_soft_mask and temperature_scale is None:
      self_distance = MIN_DISTANCE + SELF_DISTANCE * distance_unit
      squared = jnp.where(self_pair, self_distance**2, squared)
    else:
      squared = masked(squared, self_pair, sum(bandwidths))
  center = jnp.mean(x, axis=1, keepdims=True)
  x, targets = (x - center) / unit, (targets - center) / unit
  problem = family.Problem(
    x,
    targets,
    squared,
    weight,
    distance_unit,
    num_generated=n_gen,
    num_negatives=n_neg,
    apart=variant.guidance == "velocity",
    with_self=independent is None,
  )
  options = dict(variant.options)
  if variant.field == "softmax":
    options |= {
      "normalization": normalization,
      "affinity_floor": affinity_floor,
    }
  field = family.FIELDS[variant.field]

  drifts, mean_squares, neighbours, floored = [], [], [], []
  extra: dict[str, list[Array]] = {}

  def note(name: str, value: Array) -> None:
    extra.setdefault(name, []).append(value)

  for bandwidth in bandwidths:
    if adapted is not None:
      note("temperature_scale", jnp.mean(adapted))
    found = field(problem, bandwidth, **options)
    drift, of_coefficients = _drift(
      problem, found, attraction, repulsion, strength, variant.diagnostics
    )
    drifts.append(drift)
    mean_squares.append(_batch_mean(drifts[-1] ** 2))
    neighbours.append(
      _effective_number(-jnp.sqrt(squared[..., n_neg:]) / bandwidth)
    )
    if isinstance(found, family.Coefficients) and found.floored is not None:
      outside = ~self_pair if variant.negatives == "own" else None
      floored.append(jnp.mean(found.floored, where=outside))
    for name, value in of_coefficients.items():
      note(name, value)
    if variant.learned:
      note("temperature_gradient", _temperature_gradient(problem, bandwidth))
  mean_squares, neighbours, floored, extra = _over_axes(
    (mean_squares, neighbours, floored, extra), axis_name
  )
  if scalars is not None and scalars.drift_ms is not None:
    mean_squares = [scalars.drift_ms[t] for t in temperatures]
  least: Any = MIN_DRIFT_MEAN_SQUARE
  if not variant.normalize_features:
    least = jnp.maximum(least * scale**2 / channels, _TINY)
  total = jnp.zeros_like(x)
  for drift, mean_square in zip(drifts, mean_squares, strict=True):
    if variant.normalize_drift:
      drift /= jnp.sqrt(jnp.maximum(mean_square, least))
    total += drift

  def by_temperature(values: list[Array]) -> dict[float, Array]:
    return dict(zip(temperatures, values, strict=True)) if values else {}

  info: DriftInfo = {
    "scale": scale,
    "drift_ms": by_temperature(mean_squares),
    "effective_positives": by_temperature(neighbours),
    "floor_fraction": by_temperature(floored),
    "extra": {name: by_temperature(values) for name, values in extra.items()},
  }

  # gen - sg(gen) is exactly zero: the value is mean V^2 without the
  # cancellation in x/s - (x/s + V), and the gradient is the same.
  residual = (gen - jax.lax.stop_gradient(gen)) / unit - total
  return jnp.mean(residual**2, axis=(1, 2)), info


def _drift(
  problem: family.Problem,
  found: family.Coefficients | family.Velocities,
  attraction: float,
  repulsion: float,
  strength: Float[Array, "B 1 1"] | None,
  diagnostics: bool,
) -> tuple[Float[Array, "B N C"], dict[str, Float[Array, ""]]]:
  """(F = a V+ - b V-, diagnostics), guided where there is a strength."""
  if isinstance(found, family.Velocities):
    drift = attraction * found.pos - repulsion * found.neg
    if not diagnostics:
      return drift, {}
    return drift, {"alignment": _cosine(found.pos, found.neg)}
  w_pos, w_neg = found.pos, found.neg
  if strength is not None:
    w_pos = (1.0 + strength) * w_pos
    w_neg = jnp.concatenate(
      [
        w_neg[..., : problem.num_generated],
        strength * w_neg[..., problem.num_generated :],
      ],
      axis=-1,
    )
  signed = jnp.concatenate([-repulsion * w_neg, attraction * w_pos], axis=-1)
  drift = mean_shift(problem.x, problem.targets, signed)
  if not diagnostics:
    return drift, {}
  at = problem.num_negatives
  pull = mean_shift(problem.x, problem.targets[:, at:], w_pos)
  push = mean_shift(problem.x, problem.targets[:, :at], w_neg)
  shares = _shares(jnp.sum(w_pos, axis=-2)) - _shares(problem.weight[:, at:])
  report = {
    "alignment": _cosine(pull, push),
    "marginal_error": 0.5 * jnp.mean(jnp.sum(jnp.abs(shares), axis=-1)),
  }
  if problem.with_self:
    own = jnp.diagonal(w_neg, axis1=-2, axis2=-1)
    report["self_mass"] = jnp.mean(
      own / family.divisor(jnp.sum(w_neg, axis=-1))
    )
  return drift, report


def _shares(x: Float[Array, "B T"]) -> Float[Array, "B T"]:
  """Rows divided by their sums."""
  return x / family.divisor(jnp.sum(x, axis=-1, keepdims=True))


def _cosine(a: Float[Array, "B N C"], b: Float[Array, "B N C"]) -> Array:
  """Mean cosine; 0 where one of them is 0."""
  norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
  return jnp.mean(jnp.sum(a * b, axis=-1) / family.divisor(norms))


def _adapted(
  distance: Float[Array, "B N P"], neighbours: float
) -> Float[Array, "B 1 1"]:
  """What gives samples so many effective positives on average, by bisection.

  In the unit of the distances, within 1e-3 to 1e3; the nearest end where none
  does.
  """
  if not neighbours < distance.shape[-1]:
    raise ValueError(
      f"neighbours={neighbours} must be below the number of positives, "
      f"{distance.shape[-1]}"
    )
  low, high = (
    jnp.full((distance.shape[0], 1, 1), math.log(end), distance.dtype)
    for end in _SCALES
  )

  def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
    low, high = ends
    middle = (low + high) / 2.0
    count = _effective_numbers(-distance / jnp.exp(middle))
    few = jnp.mean(count, axis=-1)[:, None, None] < neighbours
    return jnp.where(few, middle, low), jnp.where(few, high, middle)

  low, high = jax.lax.fori_loop(0, _BISECTIONS, halve, (low, high))
  return jnp.exp((low + high) / 2.0)


def _temperature_gradient(
  problem: family.Problem, bandwidth: Any
) -> Float[Array, ""]:
  """See DriftInfo: learned from which candidate fits its positives best."""
  distance = jnp.sqrt(problem.squared)

  def objective(log_scale: Array) -> Array:
    logits = -distance / (bandwidth * jnp.exp(log_scale))
    positives = logits[..., problem.num_negatives :]
    misfit = jax.nn.logsumexp(logits, axis=-1) - jax.nn.logsumexp(
      positives, axis=-1
    )
    return jnp.mean(jnp.min(misfit, axis=-1))

  return jax.grad(objective)(jnp.zeros((), distance.dtype))


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
    x: where; any points.
    y_pos: positives, which attract.
    y_neg: negatives, which repel.
    temperature: tau, in units of distance.
    field: one of family.FIELDS.
    weight_pos: of each positive; None means 1.
    weight_neg: of each negative; None means 1.
    mask_self: whether y_neg is x itself, and (x_i, y_neg_i) no pair.
    **options: of the field.

  Returns:
    V = V+ - V-, float32 (float64 of points that are), without gradient;
    nothing is normalised but what the field itself does.

  Raises:
    ValueError: other axes than these, an unknown field or option, a temperature
      that is not positive, as many negatives as samples are wanted but not
      given.
  """
  check_points(x, y_pos, y_neg)
  check_temperature(temperature)
  family.check_field(field, options)
  if mask_self and len(x) != len(y_neg):
    raise ValueError(
      "mask_self=True masks the pair (x_i, y_neg_i), so x and y_neg need as "
      f"many rows; got {len(x)} and {len(y_neg)}"
    )
  dtype = wide_dtype(x, y_pos, y_neg)
  x, targets = (
    jax.lax.stop_gradient(a.astype(dtype))[None]
    for a in (x, jnp.concatenate([y_neg, y_pos]))
  )
  at = len(y_neg)
  squared = jnp.maximum(squared_distances(x, targets), TINY_SQUARED_DISTANCE)
  if mask_self:
    self_pair = jnp.eye(*squared.shape[1:], dtype=bool)
    squared = masked(squared, self_pair, temperature)
  weight = jnp.concatenate(
    [
      _weights(
        "weight_neg",
        None if weight_neg is None else weight_neg[None],
        targets[:, :at],
        dtype,
      ),
      _weights(
        "weight_pos",
        None if weight_pos is None else weight_pos[None],
        targets[:, at:],
        dtype,
      ),
    ],
    axis=1,
  )
  center = jnp.mean(x, axis=1, keepdims=True)
  problem = family.Problem(
    x - center,
    targets - center,
    squared,
    weight,
    jnp.ones((), dtype),
    num_generated=at,
    num_negatives=at,
    apart=False,
    with_self=mask_self,
  )
  found = family.FIELDS[field](problem, temperature, **options)
  return _drift(problem, found, 1.0, 1.0, None, False)[0][0]


def _batch_mean(values: Float[Array, "B ..."]) -> Float[Array, ""]:
  """Mean of everything; per row first, so that long sums stay accurate."""
  return jnp.mean(jnp.mean(values, axis=tuple(range(1, values.ndim))))


def _over_axes(means: _Means, axis_name: str | tuple[str, ...]) -> _Means:
  """Means over all parts of B: one collective for the whole tree."""
  return jax.lax.pmean(means, axis_name) if axis_name else means


def _effective_number(logits: Float[Array, "B N P"]) -> Float[Array, ""]:
  """Participation ratio 1 / sum p^2 of p = softmax(logits), averaged."""
  return jnp.mean(_effective_numbers(logits))


def _effective_numbers(logits: Float[Array, "B N P"]) -> Float[Array, "B N"]:
  p = jax.nn.softmax(logits, axis=-1)
  return 1.0 / jnp.sum(p**2, axis=-1)


def check_temperatures(
  temperatures: Temperatures,
) -> tuple[float, ...]:
  """As floats; raises a ValueError for what drift_loss can't take."""
  several: Any = temperatures if np.ndim(temperatures) else (temperatures,)
  values = tuple(float(temperature) for temperature in several)
  for value in values:
    check_temperature(value)
  if not values or len(set(values)) < len(values):
    raise ValueError(
      f"temperatures={values} must hold at least one value and none twice"
    )
  return values


def _weights(
  name: str,
  weight: Array | None,
  features: Float[Array, "B T C"],
  dtype: jnp.dtype,
) -> Float[Array, "B T"]:
  """Weights without gradient, or ones."""
  if weight is None:
    return jnp.ones(features.shape[:2], dtype)
  if weight.shape != features.shape[:2]:
    raise ValueError(
      f"{name} has shape {weight.shape}; it must be {features.shape[:2]}, one "
      "weight per row of its features"
    )
  return jax.lax.stop_gradient(weight.astype(dtype))
