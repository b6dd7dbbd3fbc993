"""Figures of a drift for the user to watch, without gradient."""

from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from drift_jax.drift import family
from drift_jax.drift.field import Axes, Tau, batch_mean, mean_shift, over_axes
from drift_jax.drift.variant import Variant


class DriftInfo(TypedDict):
  """Figures of the field beside the loss, which says little of progress.

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
    extra: {name: {temperature: value}} for variants that ask for it, means over
      labels and samples:
      with `diagnostics`
        alignment: cosine of V+ and V-, in [-1, 1];
        self_mass: share of a sample's repulsion by itself, in [0, 1], if it
          is among its negatives;
        marginal_error: total variation, in [0, 1], between the share of all
          attraction that each positive has and its weight's;
      with `neighbours`
        temperature_scale: factor of the temperature;
      with `learned`
        temperature_gradient: derivative by log tau of the mean over problems
          of the least misfit of a sample, -log(sum over positives of
          softmax(-d / tau)).
  """

  scale: Float[Array, ""]
  drift_ms: dict[float, Float[Array, ""]]
  effective_positives: dict[float, Float[Array, ""]]
  floor_fraction: dict[float, Float[Array, ""]]
  extra: dict[str, dict[float, Float[Array, ""]]]


class Scalars(NamedTuple):
  """Scalars shared by all problems of a feature, over the larger batch.

  Attributes:
    scale: S, as in DriftInfo.
    drift_ms: as in DriftInfo; None if it is not known yet.
  """

  scale: Float[Array, "*F"]
  drift_ms: dict[float, Float[Array, "*F"]] | None


def figures(
  problem: family.Problem,
  tau: Tau,
  pulls: family.Pulls,
  drift: Float[Array, "B N C"],
  masked: Bool[Array, "N T"] | None,
  stretch: Float[Array, "B 1 1"] | None,
  variant: Variant,
) -> dict[str, Any]:
  """DriftInfo's figures of one temperature, means over these problems.

  Args:
    problem: samples and targets.
    tau: temperature.
    pulls, drift: the field's result, and the drift made of it.
    masked: self-pairs that take no part.
    stretch: factor of adaptive temperatures.
    variant: asks for the extra figures.
  """
  extra = _balance(problem, pulls) if variant.diagnostics else {}
  if stretch is not None:
    extra["temperature_scale"] = jnp.mean(stretch)
  if variant.learned:
    extra["temperature_gradient"] = _temperature_gradient(problem, tau)
  mean_square = batch_mean(drift**2)
  distance = jnp.sqrt(problem.squared[..., problem.num_negatives :])
  neighbours = jnp.mean(effective_numbers(-distance / tau))
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


def report(
  temperatures: tuple[float, ...],
  scale: Float[Array, ""],
  figures: list[dict[str, Any]],
  axis_name: Axes,
  scalars: Scalars | None,
) -> DriftInfo:
  """Each figure by temperature, means over all parts of B, or the known."""
  by_temperature = jax.tree.map(
    lambda *values: dict(zip(temperatures, values, strict=True)), *figures
  )
  info = DriftInfo(scale=scale, **over_axes(by_temperature, axis_name))
  if scalars is not None and scalars.drift_ms is not None:
    info["drift_ms"] = {t: scalars.drift_ms[t] for t in temperatures}
  return info


def effective_numbers(logits: Float[Array, "B N P"]) -> Float[Array, "B N"]:
  """Participation ratio 1 / sum p^2 of p = softmax(logits), in [1, P]."""
  p = jax.nn.softmax(logits, axis=-1)
  return 1.0 / jnp.sum(p**2, axis=-1)


def _balance(
  problem: family.Problem, pulls: family.Pulls
) -> dict[str, Float[Array, ""]]:
  """alignment, marginal_error and self_mass, see DriftInfo."""
  if isinstance(pulls, family.Velocities):
    return {"alignment": _mean_cosine(pulls.pos, pulls.neg)}
  at = problem.num_negatives
  pull = mean_shift(problem.x, problem.targets[:, at:], pulls.pos)
  push = mean_shift(problem.x, problem.targets[:, :at], pulls.neg)
  excess = _shares(jnp.sum(pulls.pos, axis=-2)) - _shares(
    problem.weight[:, at:]
  )
  figures = {
    "alignment": _mean_cosine(pull, push),
    "marginal_error": 0.5 * jnp.mean(jnp.sum(jnp.abs(excess), axis=-1)),
  }
  if problem.with_self:
    on_self = jnp.diagonal(pulls.neg, axis1=-2, axis2=-1)
    repulsion = family.divisor(jnp.sum(pulls.neg, axis=-1))
    figures["self_mass"] = jnp.mean(on_self / repulsion)
  return figures


def _temperature_gradient(
  problem: family.Problem, temperature: Any
) -> Float[Array, ""]:
  """Gradient of the best candidates' misfit by log tau, see DriftInfo."""
  distance = jnp.sqrt(problem.squared)

  def misfit(log_scale: Array) -> Array:
    logits = -distance / (temperature * jnp.exp(log_scale))
    positives = logits[..., problem.num_negatives :]
    lse = jax.nn.logsumexp
    return jnp.mean(jnp.min(lse(logits, -1) - lse(positives, -1), axis=-1))

  return jax.grad(misfit)(jnp.zeros((), distance.dtype))


def _shares(x: Float[Array, "B T"]) -> Float[Array, "B T"]:
  """Rows divided by their sums."""
  return x / family.divisor(jnp.sum(x, axis=-1, keepdims=True))


def _mean_cosine(a: Float[Array, "B N C"], b: Float[Array, "B N C"]) -> Array:
  """Mean cosine; 0 where one of them is 0."""
  norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
  return jnp.mean(jnp.sum(a * b, axis=-1) / family.divisor(norms))
