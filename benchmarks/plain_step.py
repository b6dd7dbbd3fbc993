"""The drifting loss and the step, written plainly: a paper read into code."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from drift_jax.drift import paper_loss
from drift_jax.tasks.generator.step import (
  GeneratorBatch,
  GeneratorTask,
  by_label,
  draw,
)
from drift_jax.training import state as state_lib
from drift_jax.training.step import apply, from_wire


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
    positives, unconditional = jnp.split(reals, [num_positives], axis=1)
    rows = jnp.repeat(weight, x.shape[2])[:, None]
    losses = paper_loss(
      problems(x),
      positives,
      unconditional,
      jnp.broadcast_to(rows, unconditional.shape[:2]),
      temperatures,
      affinity_floor,
    )
    total += losses.mean()
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
    attention_kernel="xla", memory_on_chip=0, remat="none", unroll=1
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
