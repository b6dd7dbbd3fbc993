"""The drifting losses of all features of a batch."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from drift_jax.drift.diagnostics import DriftInfo, Scalars
from drift_jax.drift.field import (
  Axes,
  Normalization,
  check_affinities,
  check_axes,
  check_choice,
  wide_dtype,
)
from drift_jax.drift.loss import drift_loss
from drift_jax.drift.variant import (
  PAPER,
  Temperatures,
  Variant,
  check_temperatures,
)

Kernel = Literal["xla", "early", "pallas", "interpret"]


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("info",),
  meta_fields=("keys",),
)
@dataclasses.dataclass(frozen=True)
class DriftReport:
  """DriftInfo of all features.

  Attributes:
    keys: names of the features, in the order of the arrays.
    info: DriftInfo whose entries are arrays [F].
  """

  keys: tuple[str, ...]
  info: DriftInfo

  def of(self, key: str) -> DriftInfo:
    """DriftInfo of one feature."""
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
  axis_name: Axes = (),
  kernel: Kernel = "xla",
  scalars: Scalars | None = None,
  variant: Variant = PAPER,
  num_unconditional: int | None = None,
  temperature_scale: Float[Array, ""] | None = None,
) -> tuple[Float[Array, " F"], DriftReport]:
  """Mean `drift_loss` of each feature key, and the figures to watch.

  The same numbers for every kernel, up to rounding: below 1e-5 of a key's
  loss, diagnostics and (float32) gradient.

  Args:
    generated: features of N generated samples of each of L labels,
      {key: [L, N, T, C]}: T locations and C channels are each key's own. A
      label at a location is one drift problem.
    real: those of the reals, {key: [L, R, T, C]}: positives first, then
      unconditional ones, then `independent` generated samples of drift_loss.
    weight_unconditional: weight of a label's unconditional reals as negatives.
    num_positives: P.
    temperatures, affinity_floor, normalization, attraction, repulsion,
      axis_name: see `drift_loss`.
    kernel: 'xla'; 'early' for GPUs: that, but keeps gradients, in the features'
      dtype, not what makes them; 'pallas' for TPUs: few passes over the
      features, see `drift.fused`; 'interpret' is that without a TPU. Other
      variants than the paper's and W-Flow's are computed by 'xla'.
    scalars: see `drift_loss`; arrays [F] in the order of the report of the
      larger batch, which is the order here.
    variant, temperature_scale: see `drift_loss`.
    num_unconditional: U; None: all reals but the positives.

  Returns:
    losses: of each key, in the order of the report's.
    report: without gradient.

  Raises:
    ValueError: an unknown kernel, unlike features; as `drift_loss`.
  """
  # 1. Checked arguments; reals and weights without gradient.
  check_choice("kernel", kernel, get_args(Kernel))
  _check_features(generated, real, weight_unconditional, num_positives)
  check_affinities(affinity_floor, normalization)
  temperatures = check_temperatures(temperatures)
  real, weight, scalars = jax.lax.stop_gradient(
    (
      {key: real[key] for key in generated},
      weight_unconditional.astype(wide_dtype(weight_unconditional)),
      scalars,
    )
  )
  # 2. Two ways to compute a group of features.
  static = {
    "temperatures": temperatures,
    "affinity_floor": affinity_floor,
    "normalization": normalization,
    "attraction": attraction,
    "repulsion": repulsion,
    "axis_name": axis_name,
  }
  loss = functools.partial(drift_loss, **static, variant=variant)
  stops = [num_positives]
  num_reals = num_positives + (num_unconditional or 0)
  has_more = any(real[key].shape[1] > num_reals for key in generated)
  counted = num_unconditional is not None
  if variant.negatives == "independent" or (counted and has_more):
    stops.append(num_reals)
  parts = {"temperature_scale": temperature_scale, "stops": stops}
  early = kernel == "early"
  by_xla = functools.partial(_by_xla, **parts, loss=loss, early=early)
  on_chip, fits_chip = by_xla, lambda x, num_reals: False
  has_kernel = variant.has_kernel and temperature_scale is None
  if has_kernel and kernel in ("pallas", "interpret"):
    on_chip, fits_chip = _on_chip(
      variant,
      num_unconditional,
      **static,
      num_positives=num_positives,
      interpret=kernel == "interpret",
    )
  # 3. Groups of features, each compiled once: of equal width, or shape.
  keys, results = [], []
  for (fits, *_), members in _groups(generated, real, fits_chip).items():
    values = [(generated[key], real[key]) for key in members]
    at = slice(len(keys), len(keys) + len(members))
    shared = jax.tree.map(operator.itemgetter(at), scalars)
    results.append((on_chip if fits else by_xla)(values, weight, shared))
    keys += members
  losses, info = jax.tree.map(lambda *parts: jnp.concatenate(parts), *results)
  return losses, DriftReport(tuple(keys), jax.lax.stop_gradient(info))


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


def _groups(
  generated: Mapping[str, Array],
  real: Mapping[str, Array],
  fits_chip: Callable[[Array, int], bool],
) -> dict[tuple[Any, ...], list[str]]:
  """{(whether the kernels compute it, ...): keys that are compiled as one}."""
  groups: dict[tuple[Any, ...], list[str]] = {}
  for key, x in generated.items():
    fits = fits_chip(x, real[key].shape[1])
    alike = x.shape[3] if fits else x.shape
    group = (fits, alike, x.dtype, real[key].dtype)
    groups.setdefault(group, []).append(key)
  return groups


def _on_chip(
  variant: Variant, num_unconditional: int | None, **static: Any
) -> tuple[Callable[..., Any], Callable[[Array, int], bool]]:
  """What computes a group of features by kernels, and whether a feature fits.

  Arguments as of drift_losses.
  """
  from drift_jax.drift import fused  # Pallas takes a while to import.

  plan = fused.plan_of(variant, num_unconditional or 0, **static)
  return (
    functools.partial(
      fused.losses_of_group, plan=plan, num_unconditional=num_unconditional
    ),
    functools.partial(fused.fits, temperatures=static["temperatures"]),
  )


_Value = tuple[Array, Array]


def problems(features: Float[Array, "L n T C"]) -> Float[Array, "LT n C"]:
  """One problem for each label and location."""
  by_location = features.swapaxes(1, 2)
  return by_location.reshape(-1, *by_location.shape[2:])


def _by_xla(
  values: Sequence[_Value],
  weight: Float[Array, " L"],
  scalars: Scalars | None,
  *,
  temperature_scale: Array | None,
  stops: Sequence[int],
  loss: Callable[..., tuple[Array, DriftInfo]],
  early: bool,
) -> tuple[Float[Array, " F"], DriftInfo]:
  """Losses of features of equal shapes, one after the other.

  Args:
    values: generated and real features.
    weight: weight of each label's unconditional reals.
    scalars: of a larger batch.
    temperature_scale: of drift_loss.
    stops: where reals are split: positives, unconditional, independent ones.
    loss: drift_loss with its options.
    early: whether gradients are taken with the losses.
  """

  def loss_of(
    x: Array,
    y: Array,
    weight: Array,
    scalars: Scalars | None,
    temperature_scale: Array | None,
  ) -> tuple[Array, DriftInfo]:
    locations = x.shape[2]
    x, y = problems(x), problems(y)
    positives, unconditional, *independent = jnp.split(y, stops, axis=1)
    weights = jnp.repeat(weight, locations)[:, None]
    losses, info = loss(
      x,
      positives,
      unconditional,
      weight_neg=jnp.broadcast_to(weights, unconditional.shape[:2]),
      scalars=scalars,
      temperature_scale=temperature_scale,
      independent=independent[0] if independent else None,
    )
    return losses.mean(), info

  one: Callable[..., Any] = _early(loss_of) if early else loss_of
  if len(values) == 1:
    shared = jax.tree.map(lambda x: x[0], scalars)
    return jax.tree.map(
      lambda x: x[None], one(*values[0], weight, shared, temperature_scale)
    )
  stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *values)
  return jax.lax.map(
    lambda args: one(*args[0], weight, args[1], temperature_scale),
    (stacked, scalars),
  )


def _early(
  function: Callable[..., tuple[Array, Any]],
) -> Callable[..., tuple[Array, Any]]:
  """A function (x, ...) -> (loss, aux) that takes its gradient by x at once.

  It keeps the gradient, of x's dtype, and nothing else for the backward pass,
  and multiplies it by the loss's cotangent there. By the others it has none.
  """

  def forward(x: Array, *others: Any) -> tuple[Any, Any]:
    loss, gradient = jax.value_and_grad(function, has_aux=True)(x, *others)
    return loss, (gradient, (None,) * len(others))

  def backward(kept: Any, cotangents: Any) -> Any:
    gradient, others = kept
    scaled = cotangents[0] * gradient.astype(cotangents[0].dtype)
    return (scaled.astype(gradient.dtype), *others)

  early = jax.custom_vjp(function)
  early.defvjp(forward, backward)
  return early
