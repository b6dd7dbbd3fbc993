"""Variants of the drifting loss: static arguments, checked."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from drift_jax.drift import family
from drift_jax.drift.field import check_choice, check_temperature

Negatives = Literal["own", "own_with_self", "independent"]
GuidanceForm = Literal["negatives", "velocity"]

# One, or several.
Temperatures = float | np.number | np.ndarray | Sequence[float]


@dataclasses.dataclass(frozen=True)
class Variant:
  """How a drifting loss departs from the paper's; as it stands, nowhere.

  Attributes:
    field: one of family.FIELDS.
    options: keyword arguments of the field, but for those of `drift_loss`.
    negatives: samples that repel beside unconditional reals: the generated ones
      without self-pairs ('own'), with them ('own_with_self'), or an
      'independent' batch, given as such.
    guidance: unconditional reals are weighted 'negatives' (A.7), or
      V += (alpha - 1) (T_{q->p} - T_{q->unc}), the 'velocity' form of W-Flow:
      weight_neg is (alpha - 1) / M then; they are left out of the scale S.
    normalize_features: whether coordinates and distances are in units of S.
    normalize_drift: whether each temperature's drift is divided by its RMS.
    neighbours: if > 0, each problem's temperatures are multiplied by a factor
      with which a sample has so many effective positives at temperature 1, on
      average.
    learned: whether DriftInfo has `temperature_gradient`.
    diagnostics: whether DriftInfo has the figures that cost time.
    own_in_scale: whether S is also over the samples' distances to each other,
      the zeros to themselves included, as W-Flow's is; of 'independent'
      negatives, as others have these pairs.

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
  own_in_scale: bool = False

  def __post_init__(self) -> None:
    # A tuple can be hashed: variants are static arguments of jitted functions.
    options = tuple(sorted(dict(self.options).items()))
    object.__setattr__(self, "options", options)
    family.check_field(self.field, dict(options))
    check_choice("negatives", self.negatives, get_args(Negatives))
    check_choice("guidance", self.guidance, get_args(GuidanceForm))
    if self.field == "softmax" and options:
      raise ValueError(
        f"options={dict(options)}: those of the field 'softmax' are the loss' "
        "own arguments, normalization and affinity_floor"
      )
    if self.guidance == "velocity" and self.field in family.JOINT_FIELDS:
      raise ValueError(
        f"guidance='velocity' needs a field that looks at one set at a time; "
        f"{self.field!r} does not, use guidance='negatives' or one of "
        f"{', '.join(f for f in family.FIELDS if f not in family.JOINT_FIELDS)}"
      )
    if self.own_in_scale and self.negatives != "independent":
      raise ValueError(
        f"own_in_scale=True needs negatives='independent': with "
        f"{self.negatives!r} the scale has the own batch already"
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
  def has_kernel(self) -> bool:
    """Whether Pallas kernels compute it: the paper's loss, or W-Flow's."""
    if self.field != "sinkhorn":
      return self == PAPER
    return self == Variant(
      field=self.field,
      options=self.options,
      negatives="independent",
      guidance="velocity",
      own_in_scale=self.own_in_scale,
    )

  @property
  def scale_power(self) -> int:
    """p of S = (mean of w d^p / mean of w)^(1/p).

    2 for the quadratic cost, whose regularisation is in squared distances.
    """
    options = dict(self.options)
    is_quadratic = options.get("cost") == "quadratic"
    return 2 if self.field == "sinkhorn" and is_quadratic else 1


PAPER = Variant()


def check_temperatures(temperatures: Temperatures) -> tuple[float, ...]:
  """As floats; raises a ValueError for what drift_loss can't take."""
  values = tuple(float(value) for value in np.atleast_1d(temperatures))
  for value in values:
    check_temperature(value)
  if not values or len(set(values)) < len(values):
    raise ValueError(
      f"temperatures={values} must hold at least one value and none twice"
    )
  return values
