"""The drifting loss and the step, written plainly: a paper read into code."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from drift_jax.tasks.generator.step import (
  GeneratorBatch,
  GeneratorTask,
  by_label,
  draw,
)
from drift_jax.training import state as state_lib
from drift_jax.training.step import apply, from_wire


def drift_loss(
  x: jax.Array,
  positives: jax.Array,
  unconditional: jax.Array,
  weight: jax.Array,
  temperatures: Sequence[float],
  floor: float,
) -> jax.Array:
  """Alg. 2 and A.6 of one feature: [B, N, C], [B, P, C], [B, U, C], [B, U]."""
  x, positives, unconditional = (
    a.astype(jnp.float32) for a in (x, positives, unconditional)
  )
  samples = jax.lax.stop_gradient(x)
  n, channels = x.shape[1:]
  negatives = jnp.concatenate([samples, unconditional], axis=1)
  targets = jnp.concatenate([negatives, positives], axis=1)
  count = negatives.shape[1]
  weights = jnp.concatenate(
    [
      jnp.ones(samples.shape[:2]),
      weight,
      jnp.ones(positives.shape[:2]),
    ],
    axis=1,
  )[:, None, :]
  squares = (
    jnp.sum(samples**2, -1)[:, :, None]
    + jnp.sum(targets**2, -1)[:, None, :]
    - 2 * jnp.einsum("bnc,btc->bnt", samples, targets)
  )
  distance = jnp.sqrt(jnp.maximum(squares, 1e-8))
  scale = jnp.mean(distance * weights) / jnp.mean(weights)
  unit = jnp.maximum(scale / math.sqrt(channels), 1e-3)
  distance /= jnp.maximum(scale, 1e-3)
  distance += 100.0 * jnp.eye(n, targets.shape[1])
  x, samples, targets = x / unit, samples / unit, targets / unit
  total = jnp.zeros_like(samples)
  for temperature in temperatures:
    logits = -distance / temperature
    product = jax.nn.softmax(logits, -1) * jax.nn.softmax(logits, -2)
    affinity = jnp.sqrt(jnp.maximum(product, floor)) * weights
    a_neg, a_pos = affinity[..., :count], affinity[..., count:]
    w_neg = a_neg * a_pos.sum(-1, keepdims=True)
    w_pos = a_pos * a_neg.sum(-1, keepdims=True)
    rows = jnp.concatenate([-w_neg, w_pos], -1)
    drift = jnp.einsum("bnt,btc->bnc", rows, targets)
    drift -= rows.sum(-1, keepdims=True) * samples
    total += drift / jnp.sqrt(jnp.maximum(jnp.mean(drift**2), 1e-8))
  return jnp.mean((x - jax.lax.stop_gradient(samples + total)) ** 2)


def drift_losses(
  generated: Mapping[str, jax.Array],
  real: Mapping[str, jax.Array],
  weight: jax.Array,
  *,
  num_positives: int,
  temperatures: Sequence[float],
  affinity_floor: float,
) -> jax.Array:
  """Sum over features {key: [L, n, T, C]}, one after the other."""

  def problems(x: jax.Array) -> jax.Array:
    return x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3])

  total = jnp.zeros(())
  for key, x in generated.items():
    reals = problems(jax.lax.stop_gradient(real[key]))
    positives, unconditional = (
      reals[:, :num_positives],
      reals[:, num_positives:],
    )
    rows = jnp.repeat(weight, x.shape[2])[:, None]
    total += drift_loss(
      problems(x),
      positives,
      unconditional,
      jnp.broadcast_to(rows, unconditional.shape[:2]),
      temperatures,
      affinity_floor,
    )
  return total


def train_step(
  state: Any,
  batch: GeneratorBatch,
  frozen: Any,
  *,
  task: GeneratorTask,
  optimizer: Any,
) -> tuple[Any, jax.Array]:
  """One step of the same networks by autodiff, features in float32."""
  labels, n = len(batch.labels), task.num_generated
  draws = draw(state.key(), task, labels)
  generator = task.generator.clone(
    attention_kernel="xla", remat="none", unroll=1
  )

  def loss_of(params: Any) -> jax.Array:
    samples = apply(
      generator,
      params,
      jnp.repeat(batch.labels, n),
      jnp.repeat(draws.alpha, n),
      noise=draws.noise,
      style=draws.style,
    )
    reals = jnp.concatenate([batch.positives, batch.unconditional], axis=1)
    reals = from_wire(reals.reshape(-1, *reals.shape[2:]))
    generated, real = (
      jax.tree.map(
        lambda x: x.astype(jnp.float32), task.features(frozen, images)
      )
      for images in (samples, reals)
    )
    unconditional = batch.unconditional.shape[1]
    weight = jnp.ones(labels)
    if unconditional:
      weight = (draws.alpha - 1) * (n - 1) / unconditional
    return drift_losses(
      by_label(generated, labels),
      by_label(real, labels),
      weight,
      num_positives=batch.positives.shape[1],
      temperatures=task.drift["temperatures"],
      affinity_floor=task.drift.get("affinity_floor", 1e-6),
    )

  loss, grads = jax.value_and_grad(loss_of)(state.params)
  return state_lib.update(state, grads, optimizer), loss
