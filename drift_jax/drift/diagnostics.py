"""Figures of a drift that a user watches; none has a gradient."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from drift_jax.drift import family
from drift_jax.drift.field import mean_shift


def effective_numbers(logits: Float[Array, "B N P"]) -> Float[Array, "B N"]:
  """Participation ratio 1 / sum p^2 of p = softmax(logits), in [1, P]."""
  p = jax.nn.softmax(logits, axis=-1)
  return 1.0 / jnp.sum(p**2, axis=-1)


def balance(
  problem: family.Problem, pulls: family.Coefficients | family.Velocities
) -> dict[str, Float[Array, ""]]:
  """alignment, marginal_error and self_mass, see loss.DriftInfo."""
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


def temperature_gradient(
  problem: family.Problem, temperature: Any
) -> Float[Array, ""]:
  """Gradient of the best candidates' misfit by log tau, see loss.DriftInfo."""
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
