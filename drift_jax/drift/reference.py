"""The paper's loss in its simplest form, to read first and to test against.

`loss.drift_loss` computes the same with other fields, other negatives, shared
scalars of larger batches, and more digits for features far from the origin.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def paper_loss(
  gen: Float[Array, "B N C"],
  pos: Float[Array, "B P C"],
  neg: Float[Array, "B M C"],
  weight_neg: Float[Array, "B M"],
  temperatures: Sequence[float],
  affinity_floor: float = 1e-6,
) -> Float[Array, " B"]:
  """Loss of one feature key (Alg. 2, eq. 6, A.6 of arXiv:2602.04770).

  Args:
    gen: features of N generated samples of each of B problems.
    pos: features of P real samples, which attract.
    neg: features of M unconditional real samples, which repel beside gen.
    weight_neg: weight of each of them, (alpha - 1) (N - 1) / M for guidance.
    temperatures: taus, in units of the mean distance S.
    affinity_floor: lower bound of the squared affinities.

  Returns:
    Mean over samples and channels of (x/s - sg(x/s + V))^2, one per problem;
    float32. Its gradient flows through gen alone.
  """
  gen, pos, neg = (a.astype(jnp.float32) for a in (gen, pos, neg))
  frozen = jax.lax.stop_gradient(gen)
  n, channels = gen.shape[1:]
  targets = jax.lax.stop_gradient(jnp.concatenate([frozen, neg, pos], axis=1))
  num_negatives = n + neg.shape[1]
  weight = jnp.concatenate(
    [jnp.ones(gen.shape[:2]), weight_neg, jnp.ones(pos.shape[:2])], axis=1
  )
  weight = jax.lax.stop_gradient(weight)[:, None, :]

  # Distances, and their weighted mean S over the whole batch (A.6).
  squared = (
    jnp.sum(frozen**2, axis=-1)[:, :, None]
    + jnp.sum(targets**2, axis=-1)[:, None, :]
    - 2.0 * jnp.einsum("bnc,btc->bnt", frozen, targets)
  )
  distance = jnp.sqrt(jnp.maximum(squared, 1e-8))
  scale = jnp.mean(distance * weight) / jnp.mean(weight)
  unit = jnp.maximum(scale / math.sqrt(channels), 1e-3)
  x, targets = frozen / unit, targets / unit
  distance = distance / jnp.maximum(scale, 1e-3)
  # No sample repels itself.
  distance += 100.0 * jnp.eye(n, targets.shape[1])

  total = jnp.zeros_like(x)
  for tau in temperatures:
    # Affinities (Alg. 2): softmaxes over targets and over samples.
    logits = -distance / tau
    product = jax.nn.softmax(logits, axis=2) * jax.nn.softmax(logits, axis=1)
    affinity = jnp.sqrt(jnp.maximum(product, affinity_floor)) * weight
    a_neg = affinity[..., :num_negatives]
    a_pos = affinity[..., num_negatives:]
    # Coefficients (eq. 11), whose signed rows sum to zero.
    w_neg = a_neg * jnp.sum(a_pos, axis=2, keepdims=True)
    w_pos = a_pos * jnp.sum(a_neg, axis=2, keepdims=True)
    w = jnp.concatenate([-w_neg, w_pos], axis=2)
    drift = jnp.einsum("bnt,btc->bnc", w, targets)
    drift -= jnp.sum(w, axis=2, keepdims=True) * x
    # Drift normalisation: unit mean square over the whole batch (A.6).
    total += drift / jnp.sqrt(jnp.maximum(jnp.mean(drift**2), 1e-8))

  goal = jax.lax.stop_gradient(x + total)
  return jnp.mean((gen / unit - goal) ** 2, axis=(1, 2))
