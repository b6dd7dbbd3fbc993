"""The drifting losses of all features of a batch."""

import dataclasses
import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from drift_jax.drift import fused
from drift_jax.drift.field import (
  MAX_DIRECT_CHANNELS,
  Normalization,
  check_affinities,
  check_axes,
  wide_dtype,
)
from drift_jax.drift.loss import (
  PAPER,
  DriftInfo,
  Scalars,
  Temperatures,
  Variant,
  check_temperatures,
  drift_loss,
)

Kernel = Literal["xla", "pallas", "interpret"]

# Narrower features have their distances by subtraction, as in
# field.squared_distances; wider ones don't fit on chip.
_WIDTHS = range(MAX_DIRECT_CHANNELS + 1, 8193)
_MAX_TEMPERATURES = 12


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("info",),
  meta_fields=("keys",),
)
@dataclasses.dataclass(frozen=True)
class DriftReport:
  """What to watch of all features.

  Attributes:
    keys: of the features, in the order of the arrays.
    info: DriftInfo whose entries are arrays [F].
  """

  keys: tuple[str, ...]
  info: DriftInfo

  def of(self, key: str) -> DriftInfo:
    """One feature's."""
    at = self.keys.index(key)
    return jax.tree.map(lambda x: x[at], self.info)


def drift_losses(
  generated: Mapping[str, Float[Array, "L N _ _"]],
  real: Mapping[str, Float[Array, "L R _ _"]],
  weight_unconditional: Float[Array, " L"],
  *,
  num_positives: int,
  temperatures: Temperatures,
  affinity_floor: float = 1e-6,
  normalization: Normalization = "xy",
  attraction: float = 1.0,
  repulsion: float = 1.0,
  axis_name: str | tuple[str, ...] = (),
  kernel: Kernel = "xla",
  scalars: Scalars | None = None,
  variant: Variant = PAPER,
  num_unconditional: int | None = None,
  temperature_scale: Float[Array, ""] | None = None,
) -> tuple[Float[Array, " F"], DriftReport]:
  """Mean `drift_loss` of each feature key, and what to watch of it.

  The same numbers for every kernel, up to rounding: below 1e-5 of a key's
  loss, diagnostics and (float32) gradient.

  Args:
    generated: features of N generated samples of each of L labels,
      {key: [L, N, T, C]}: T locations and C channels are each key's own. A
      label at a location is one drift problem.
    real: those of the reals, {key: [L, R, T, C]}: positives first, then
      unconditional ones, then the independent samples of a variant that has
      them.
    weight_unconditional: of each label's unconditional reals as negatives.
    num_positives: P.
    temperatures, affinity_floor, normalization, attraction, repulsion,
      axis_name: see `drift_loss`.
    kernel: 'xla'; 'pallas' for TPUs: few passes over the features, see
      `drift.fused`; 'interpret' is that without a TPU. Other variants than the
      paper's are computed by 'xla'.
    scalars: see `drift_loss`; arrays [F] in the order of the report of the
      larger batch, which is the order here.
    variant, temperature_scale: see `drift_loss`.
    num_unconditional: U; None: all reals but the positives.

  Returns:
    losses: of each key, in the order of the report's.
    report: without gradient.

  Raises:
    ValueError: an unknown kernel, features or shapes that don't go together;
      as `drift_loss`.
  """
  if kernel not in get_args(Kernel):
    raise ValueError(
      f"kernel={kernel!r} is unknown; valid options: {get_args(Kernel)}"
    )
  _check_features(generated, real, weight_unconditional, num_positives)
  temperatures = check_temperatures(temperatures)
  check_affinities(affinity_floor, normalization)
  field = fused.Field(
    temperatures,
    affinity_floor,
    normalization,
    attraction,
    repulsion,
    num_positives,
  )
  plain = _Plain(
    field, axis_name, variant, num_unconditional, temperature_scale
  )

  values = {
    key: (x, jax.lax.stop_gradient(real[key])) for key, x in generated.items()
  }

  weight = jax.lax.stop_gradient(
    weight_unconditional.astype(wide_dtype(weight_unconditional))
  )
  scalars = jax.lax.stop_gradient(scalars)

  def is_fused(key: str) -> bool:
    width, is_double = (
      generated[key].shape[3],
      generated[key].dtype == "float64",
    )
    few = len(temperatures) <= _MAX_TEMPERATURES
    is_paper = variant == PAPER and temperature_scale is None
    fits = few and width in _WIDTHS and not is_double
    return kernel != "xla" and is_paper and fits

  # Compiled once for each group: of equal shapes, or of equal width.
  groups: dict[Any, list[str]] = {}
  for key, (x, y) in values.items():
    alike = x.shape[3] if is_fused(key) else x.shape
    groups.setdefault((alike, x.dtype, y.dtype), []).append(key)
  found, start = [], 0
  for keys in groups.values():
    chosen = [values[key] for key in keys]
    at = slice(start, start + len(keys))
    start = at.stop
    own = jax.tree.map(operator.itemgetter(at), scalars)
    if is_fused(keys[0]):
      interpret = kernel == "interpret"
      result = _fused(chosen, weight, field, axis_name, interpret, own)
    else:
      result = _by_xla(chosen, weight, plain, own)
    found.append((keys, result))
  losses, info = jax.tree.map(
    lambda *parts: jnp.concatenate(parts), *(result for _, result in found)
  )
  keys = tuple(key for keys, _ in found for key in keys)
  return losses, DriftReport(keys, jax.lax.stop_gradient(info))


def _check_features(
  generated: Mapping[str, Array],
  real: Mapping[str, Array],
  weight: Array,
  num_positives: int,
) -> None:
  if not generated or not generated.keys() <= real.keys():
    raise ValueError(
      f"generated has the features {sorted(generated)}, real {sorted(real)}: "
      "give at least one, and reals of each"
    )
  for key, x in generated.items():
    check_axes(
      "features without locations [L, N, C] have one, give x[:, :, None]",
      **{
        "weight_unconditional": ("L", weight),
        f"generated[{key!r}]": ("L N T C", x),
        f"real[{key!r}]": ("L R T C", real[key]),
      },
    )
    if not 1 <= num_positives <= real[key].shape[1]:
      raise ValueError(
        f"num_positives={num_positives}: real[{key!r}] has "
        f"{real[key].shape[1]} samples of each label, positives first"
      )


_Value = tuple[Array, Array]


class _Plain(NamedTuple):
  """What features share that `drift_loss` computes."""

  field: fused.Field
  axis_name: str | tuple[str, ...]
  variant: Variant
  num_unconditional: int | None
  temperature_scale: Float[Array, ""] | None


def _problems(features: Float[Array, "L n T C"]) -> Float[Array, "LT n C"]:
  """One problem for each label and location."""
  problems = features.swapaxes(1, 2)
  return problems.reshape(-1, *problems.shape[2:])


def _by_xla(
  values: Sequence[_Value],
  weight: Float[Array, " L"],
  plain: _Plain,
  scalars: Scalars | None,
) -> tuple[Float[Array, " F"], DriftInfo]:
  """drift_loss of features of equal shapes: compiled once for all of them."""
  field, variant = plain.field, plain.variant

  def of_one(args: tuple[_Value, Scalars | None]) -> tuple[Array, DriftInfo]:
    value, scalars = args
    locations = value[0].shape[2]
    x, y = (_problems(features) for features in value)
    positives, unconditional = jnp.split(y, [field.num_positives], axis=1)
    independent = None
    if variant.negatives == "independent":
      unconditional, independent = jnp.split(
        unconditional, [plain.num_unconditional or 0], axis=1
      )
    losses, info = drift_loss(
      x,
      positives,
      unconditional,
      weight_neg=jnp.broadcast_to(
        jnp.repeat(weight, locations)[:, None], unconditional.shape[:2]
      ),
      temperatures=field.temperatures,
      affinity_floor=field.affinity_floor,
      normalization=field.normalization,
      attraction=field.attraction,
      repulsion=field.repulsion,
      axis_name=plain.axis_name,
      scalars=scalars,
      variant=variant,
      independent=independent,
      temperature_scale=plain.temperature_scale,
    )
    return losses.mean(), info

  if len(values) == 1:
    own = jax.tree.map(lambda x: x[0], scalars)
    return jax.tree.map(lambda x: x[None], of_one((values[0], own)))
  stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *values)
  return jax.lax.map(of_one, (stacked, scalars))


def _fused(
  values: Sequence[_Value],
  weight: Float[Array, " L"],
  field: fused.Field,
  axis_name: str | tuple[str, ...],
  interpret: bool,
  scalars: Scalars | None,
) -> tuple[Float[Array, " F"], DriftInfo]:
  """The same of features of equal width, in few passes."""
  locations = tuple(x.shape[2] for x, _ in values)
  # Joined first, so that they are transposed once.
  x, y = (
    _problems(jnp.concatenate(arrays, axis=2))
    for arrays in zip(*values, strict=True)
  )
  weight_y = jnp.where(
    jnp.arange(y.shape[1]) < field.num_positives,
    1.0,
    jnp.repeat(weight.astype(jnp.float32), sum(locations))[:, None, None],
  )
  ones = jnp.ones((len(x), 1, x.shape[1]), jnp.float32)
  problems = fused.Problems(x, y, ones, weight_y)
  shared: Any = None
  if scalars is not None:
    rows = scalars.drift_ms
    if rows is not None:
      rows = jnp.stack([rows[t] for t in field.temperatures], axis=1)
    shared = (scalars.scale, rows)
  result: Any = fused.losses(
    problems, shared, locations, field, axis_name, interpret
  )
  losses, info = result

  def by_temperature(rows: Float[Array, "F K"]) -> dict[float, Array]:
    return dict(zip(field.temperatures, rows.T, strict=True))

  return losses, {
    "scale": info["scale"],
    "drift_ms": by_temperature(info["drift_ms"]),
    "effective_positives": by_temperature(info["effective_positives"]),
    "floor_fraction": by_temperature(info["floor_fraction"]),
    "extra": {},
  }
