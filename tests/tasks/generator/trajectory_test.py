"""The default field trains as it did before it was one of a family, to the bit.

Any change that moves a digit of published settings on any machine shows here:
either it was not meant, or `former_loss` changes with it, in a commit that says
so.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drift_jax import drift
from drift_jax.drift import many
from drift_jax.drift.field import (
  affinities,
  mean_shift,
  product_coefficients,
  squared_distances,
)
from drift_jax.system import sharding
from drift_jax.tasks.generator.setup import init_generator
from drift_jax.tasks.generator.step import train_step
from drift_jax.training import state as state_lib
from drift_jax.training.run import make_optimizer
from tests.tasks.generator.step_test import (
  OPTIM,
  encoder_params,
  toy_batch,
  toy_task,
  with_encoder,
)

pytestmark = pytest.mark.slow


def former_loss(
  gen,
  pos,
  neg,
  *,
  weight_neg,
  temperatures,
  affinity_floor,
  normalization,
  attraction,
  repulsion,
  axis_name,
  scalars,
  **rest,
):
  """A.6 in one piece, as the loss was before the family of fields."""
  assert rest.pop("variant") == drift.PAPER
  assert set(rest.values()) == {None}

  def batch_mean(x):
    return jnp.mean(jnp.mean(x, axis=tuple(range(1, x.ndim))))

  def over_axes(means):
    return jax.lax.pmean(means, axis_name) if axis_name else means

  frozen = [jax.lax.stop_gradient(a) for a in (gen, neg, pos)]
  ones = [jnp.ones(a.shape[:2], jnp.float32) for a in (gen, pos)]
  weight = jnp.concatenate([ones[0], weight_neg, ones[1]], axis=1)
  n, channels = gen.shape[1:]
  n_neg = n + neg.shape[1]
  x, targets = frozen[0], jnp.concatenate(frozen, axis=1)
  self_pair = jnp.eye(n, targets.shape[1], dtype=bool)
  squared = jnp.where(self_pair, 0.0, squared_distances(x, targets))
  squared = jnp.maximum(squared, 1e-8)
  distance = jnp.sqrt(squared)
  mean_distance, mean_weight = over_axes(
    (batch_mean(distance * weight[:, None, :]), batch_mean(weight))
  )
  scale = mean_distance / mean_weight if scalars is None else scalars.scale
  distance_unit = jnp.maximum(scale, 1e-3)
  self_distance = 1e-4 + 100.0 * distance_unit
  squared = jnp.where(self_pair, self_distance**2, squared)
  unit = jnp.maximum(scale / math.sqrt(channels), 1e-3)
  center = jnp.mean(x, axis=1, keepdims=True)
  x, targets = (x - center) / unit, (targets - center) / unit
  drifts, mean_squares, neighbours, floored = [], [], [], []
  for temperature in temperatures:
    # Once, as in the loss: XLA of jax 0.12 rounds otherwise where it is twice.
    bandwidth = temperature * distance_unit
    affinity = affinities(
      squared,
      bandwidth,
      normalization=normalization,
      affinity_floor=affinity_floor,
    )
    weighted = affinity * weight[:, None, :]
    w_pos, w_neg = product_coefficients(
      weighted[..., n_neg:], weighted[..., :n_neg]
    )
    signed = jnp.concatenate([-repulsion * w_neg, attraction * w_pos], axis=-1)
    drifts.append(mean_shift(x, targets, signed))
    mean_squares.append(batch_mean(drifts[-1] ** 2))
    logits = -jnp.sqrt(squared[..., n_neg:]) / bandwidth
    p = jax.nn.softmax(logits, axis=-1)
    neighbours.append(jnp.mean(1.0 / jnp.sum(p**2, axis=-1)))
    floored.append(jnp.mean(affinity <= affinity_floor**0.5, where=~self_pair))
  mean_squares, neighbours, floored = over_axes(
    (mean_squares, neighbours, floored)
  )
  if scalars is not None and scalars.drift_ms is not None:
    mean_squares = [scalars.drift_ms[t] for t in temperatures]
  total = jnp.zeros_like(x)
  for one, mean_square in zip(drifts, mean_squares, strict=True):
    total += one / jnp.sqrt(jnp.maximum(mean_square, 1e-8))
  info = {
    "scale": scale,
    "drift_ms": dict(zip(temperatures, mean_squares, strict=True)),
    "effective_positives": dict(zip(temperatures, neighbours, strict=True)),
    "floor_fraction": dict(zip(temperatures, floored, strict=True)),
    "extra": {},
  }
  residual = (gen - jax.lax.stop_gradient(gen)) / unit - total
  return jnp.mean(residual**2, axis=(1, 2)), info


def trajectory(groups, floor):
  """State and metrics of some steps of a small generator."""
  task = with_encoder(toy_task())
  task = dataclasses.replace(
    task,
    groups=groups,
    exact=True,
    drift={**task.drift, "affinity_floor": floor},
  )
  frozen = encoder_params(task)
  optimizer, schedule = make_optimizer(OPTIM, 5)
  _, init = state_lib.abstract_and_init(
    init_generator(task),
    optimizer,
    ema_decays=(0.9,),
    seed=3,
    mesh=sharding.make_mesh(1, 1, jax.devices()[:1]),
  )
  step = jax.jit(
    functools.partial(
      train_step, task=task, optimizer=optimizer, schedule=schedule
    )
  )
  state, seen = init(), []
  for i in range(4):
    state, metrics = step(state, toy_batch(8, i), frozen)
    seen.append(jax.device_get(metrics))
  return jax.device_get(state), seen


@pytest.mark.parametrize(
  ("groups", "floor"), [(1, 1e-6), (2, 0.0)], ids=["whole", "groups"]
)
def test_the_default_field_is_unchanged_to_the_bit(groups, floor, monkeypatch):
  now = trajectory(groups, floor)
  monkeypatch.setattr(many, "drift_loss", former_loss)
  before = trajectory(groups, floor)
  jax.tree.map(np.testing.assert_array_equal, now, before)
  assert all(np.isfinite(metrics["loss"]) for metrics in now[1])
