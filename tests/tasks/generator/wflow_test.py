"""A W-Flow step against its formulas in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drift_jax.tasks.generator.step import draw, generator_gradients
from drift_jax.training.step import apply
from tests.conftest import assert_close
from tests.drift.wflow_test import oracle, variant
from tests.tasks.generator.step_test import (
  encoder_params,
  random_params,
  toy_batch,
  toy_task,
  with_encoder,
)

TEMPERATURES, ITERATIONS, LABELS = (0.05,), 10, 4


@pytest.mark.parametrize("groups", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_gradients_of_the_parameters(groups):
  """The mean over features; in groups of two labels, each with its scalars."""
  task = dataclasses.replace(
    with_encoder(toy_task()),
    drift={"temperatures": TEMPERATURES},
    variant=variant(ITERATIONS),
    average=True,
    groups=groups,
  )
  params, frozen = random_params(task), encoder_params(task)
  batch = toy_batch(LABELS)
  draws = draw(jax.random.key(1), task, LABELS)
  loss, _, gradients = jax.jit(
    functools.partial(generator_gradients, task=task)
  )(params, batch, draws, frozen)

  @jax.jit
  def features(params, noise, style):
    n = task.num_generated
    labels, alpha = jnp.repeat(batch.labels, n), jnp.repeat(draws.alpha, n)
    images = apply(
      task.generator, params, labels, alpha, noise=noise, style=style
    )
    return by_label(task.features(frozen, images))

  def by_label(features):
    return {k: x.reshape(LABELS, -1, *x.shape[1:]) for k, x in features.items()}

  generated, vjp = jax.vjp(
    lambda p: features(p, draws.noise, draws.style), params
  )
  sets = [generated]
  for reals in (batch.positives, batch.unconditional):
    sets.append(by_label(task.features(frozen, reals.reshape(-1, 4, 4, 1))))
  sets.append(features(params, *draws.repelling))
  losses, cotangents = [], {}
  for key in generated:
    parts = [
      oracle(
        *(np.asarray(one[key])[at] for one in sets),
        np.float64(draws.alpha)[at],
        TEMPERATURES,
        ITERATIONS,
      )
      for at in np.split(np.arange(LABELS), groups)
    ]
    losses += [part[0] for part in parts]
    gradient = np.concatenate([part[1] for part in parts])
    cotangents[key] = np.float32(gradient / (len(generated) * groups))
  assert_close(loss, np.mean(losses), 1e-5)
  (expected,) = vjp(cotangents)
  jax.tree.map(functools.partial(assert_close, rtol=1e-5), gradients, expected)
