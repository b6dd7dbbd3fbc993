"""Groups of labels in sequence, with gradients added up."""

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
import pytest

from drift_jax import drift
from drift_jax.system import sharding
from drift_jax.tasks.generator.setup import init_generator
from drift_jax.tasks.generator.step import (
  draw,
  generator_gradients,
  generator_loss,
)
from drift_jax.training.drifting import Temperature
from tests.conftest import assert_close
from tests.tasks.generator.step_test import (
  assert_same_histories,
  encoder_params,
  run_toy,
  toy_batch,
  toy_task,
  with_encoder,
)

pytestmark = pytest.mark.slow


def task_of(groups: int, exact: bool = False, **changed: Any):
  task = with_encoder(toy_task())
  return dataclasses.replace(task, groups=groups, exact=exact, **changed)


def test_exact_groups_train_as_all_labels_at_once():
  """Measured: see docs/performance.md; on a mesh in decoded_test."""
  groups = run_toy(None, task_of(4, exact=True), 4)
  assert_same_histories(groups, run_toy(None, task_of(1), 4), 1e-5)


def test_another_field_in_groups_on_a_mesh():
  """W-Flow's: a second batch, velocity guidance, the mean over features."""
  variant = drift.Variant(
    field="sinkhorn",
    options={"cost": "quadratic", "iterations": 3},
    negatives="independent",
    guidance="velocity",
    own_in_scale=True,
    learned=True,
    diagnostics=True,
  )
  changed = {
    "variant": variant,
    "average": True,
    "temperature": Temperature("learned", 0.05, 1e-6),
  }
  whole = run_toy(None, task_of(1, **changed), 4)
  mesh = sharding.make_mesh(2, 2, jax.devices()[:4])
  groups = run_toy(mesh, task_of(2, exact=True, **changed), 4)
  assert "self_mass/0.05" not in whole[0]
  assert 1e-3 < whole[1]["marginal_error/0.05"] < 1
  for ours, theirs in zip(groups, whole, strict=True):
    # Differences of shares of 1 / 5: rounding is relative to these.
    for name in [key for key in ours if "marginal_error" in key]:
      assert abs(ours.pop(name) - theirs.pop(name)) < 1e-6
  assert_same_histories(groups, whole, 2e-5)
  scales = [metrics["temperature_scale"] for metrics in whole]
  # Adam's first step is its rate, whatever the gradient.
  assert scales[0] == 1.0
  assert abs(abs(math.log(scales[1])) - 0.05) < 1e-4


@jax.jit
def weights_and_draws():
  """((of the generator, of the encoders), draws for 4 labels)."""
  task = task_of(1)
  params = init_generator(task)(jax.random.key(0))
  params = jax.tree.map(lambda x: x + 0.05, params)
  weights = params, encoder_params(task)
  return weights, draw(jax.random.key(1), task, 4)


def gradients(task, weights):
  """(batch, draws) -> the loss and the rest, compiled once for each size."""
  params, frozen = weights
  step = jax.jit(functools.partial(generator_gradients, task=task))
  return lambda batch, draws: step(params, batch, draws, frozen)


def test_groups_on_their_own_are_the_mean_of_their_batches():
  batch = toy_batch(4)
  weights, draws = jax.device_get(weights_and_draws())
  found = gradients(task_of(2), weights)(batch, draws)

  def part(i: int, x: Any) -> Any:
    return np.split(x, 2)[i]

  at_once = gradients(task_of(1), weights)
  halves = [
    at_once(*jax.tree.map(functools.partial(part, i), (batch, draws)))
    for i in range(2)
  ]
  mean = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
  jax.tree.map(functools.partial(assert_close, rtol=1e-5), found, mean)
  # Their own scalars are not those of all.
  params, frozen = weights
  whole = jax.jit(functools.partial(generator_loss, task=task_of(1)))
  loss, _ = whole(params, batch, draws, frozen)
  assert abs(found[0] - loss) > 1e-4 * loss
