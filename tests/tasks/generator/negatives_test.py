"""Extra negatives: generated samples that repel, without gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drift_jax import config as config_lib
from drift_jax import drift
from drift_jax.system import sharding
from drift_jax.tasks import parse
from drift_jax.tasks.generator.step import draw, generator_gradients
from drift_jax.training.step import apply, in_chunks
from tests.conftest import assert_close
from tests.drift import loss_test, wflow_test
from tests.tasks.generator.step_test import (
  assert_same_histories,
  encoder_params,
  random_params,
  run_toy,
  toy_batch,
  toy_task,
  with_encoder,
)
from tests.tasks.generator.variants_test import small

TEMPERATURES, LABELS, EXTRA = (0.05, 0.2), 4, 5


def task_of(variant=drift.PAPER, **changed):
  """In features of an encoder, the sample, and each place of its grid."""
  task = with_encoder(toy_task())
  space = dataclasses.replace(task.features, tokens=True)
  given = {"features": space, "variant": variant, "num_negatives": EXTRA}
  return dataclasses.replace(task, **given | changed)


def paper_oracle(x, pos, unc, more, alpha):
  """(mean loss, its gradient) of a feature [L, n, T, C], in float64.

  Extra negatives weigh 1, in the scale too; unconditional ones together
  (alpha - 1) times as much as the N - 1 + E generated ones.
  """
  labels, n, locations, _ = x.shape

  def problems(array):
    array = np.moveaxis(np.float64(array), 2, 1)
    return array.reshape(-1, *array.shape[2:])

  weight = (alpha - 1) * (n - 1 + more.shape[1]) / unc.shape[1]
  weights = [
    np.repeat(weight[:, None], unc.shape[1], 1),
    np.ones(more.shape[:2]),
  ]
  loss, gradient, _ = loss_test.oracle(
    *map(problems, (x, pos, np.concatenate([unc, more], axis=1))),
    weight_neg=np.repeat(np.concatenate(weights, axis=1), locations, 0),
    temperatures=TEMPERATURES,
    affinity_floor=0.0,
  )
  gradient = gradient.reshape(labels, locations, n, -1) / len(loss)
  return loss.mean(), np.moveaxis(gradient, 1, 2)


def wflow_oracle(x, pos, unc, more, alpha):
  """Extra negatives make the second batch larger."""
  loss, gradient, *_ = wflow_test.oracle(
    *(x, pos, unc, more, alpha), TEMPERATURES, 3
  )
  return loss, gradient


@pytest.mark.parametrize(
  ("variant", "oracle"),
  [(drift.PAPER, paper_oracle), (wflow_test.variant(3), wflow_oracle)],
  ids=["paper", "wflow"],
)
def test_gradients_of_the_parameters(variant, oracle):
  """Against float64 on features that are not computed in chunks."""
  task = task_of(variant)
  params, frozen = random_params(task), encoder_params(task)
  batch, draws = toy_batch(LABELS), draw(jax.random.key(1), task, LABELS)
  loss, _, gradients = jax.jit(
    functools.partial(generator_gradients, task=task)
  )(params, batch, draws, frozen)

  def by_label(features):
    return {k: x.reshape(LABELS, -1, *x.shape[1:]) for k, x in features.items()}

  @jax.jit
  def features(params, noise, style):
    n = len(noise) // LABELS
    labels, alpha = jnp.repeat(batch.labels, n), jnp.repeat(draws.alpha, n)
    samples = apply(
      task.generator, params, labels, alpha, noise=noise, style=style
    )
    return by_label(task.features(frozen, samples))

  generated, vjp = jax.vjp(
    lambda p: features(p, draws.noise, draws.style), params
  )
  assert generated["tokens"].shape == (LABELS, 4, 16, 1)
  keys = [jax.random.split(key) for key in draws.negatives]
  noise = jnp.stack([jax.random.normal(a, (4, 4, 1)) for a, _ in keys])
  style = jnp.stack([jax.random.randint(b, (2,), 0, 4) for _, b in keys])
  sets = [features(params, noise, style)]
  if draws.repelling is not None:
    second = features(params, *draws.repelling)
    sets = [{k: jnp.concatenate([x, sets[0][k]], 1) for k, x in second.items()}]
  for reals in (batch.unconditional, batch.positives):
    sets.insert(0, by_label(task.features(frozen, reals.reshape(-1, 4, 4, 1))))
  losses, cotangents = [], {}
  for key, x in generated.items():
    value, gradient = oracle(
      *map(np.asarray, (x, *[one[key] for one in sets], draws.alpha))
    )
    losses.append(value)
    cotangents[key] = np.float32(gradient)
  assert_close(loss, np.sum(losses), 1e-5)
  (expected,) = vjp(cotangents)
  jax.tree.map(functools.partial(assert_close, rtol=1e-5), gradients, expected)


@pytest.mark.slow
def test_chunks_groups_and_meshes_train_the_same():
  """Reals and negatives in chunks of 2 and 3, groups, 8 devices.

  The encoder sees each step's images somewhere else.
  """
  space = dataclasses.replace(task_of().features, shift=1)
  task = task_of(features=space)
  whole = run_toy(None, task, 4)
  grouped = dataclasses.replace(task, groups=4, exact=True, detached_at_once=2)
  assert_same_histories(run_toy(None, grouped, 4), whole, 1e-5)
  mesh = sharding.make_mesh(2, 4)
  task = dataclasses.replace(task, detached_at_once=3)
  assert_same_histories(run_toy(mesh, task, 4), whole, 1e-4)


def temporary_bytes(task, count: int, at_once: int) -> int:
  """Of a step's gradients, with so many extra negatives of each label."""
  task = dataclasses.replace(
    task, num_negatives=count, detached_at_once=at_once
  )
  arguments = (
    *(random_params(task), toy_batch(LABELS)),
    *(draw(jax.random.key(1), task, LABELS), encoder_params(task)),
  )
  step = jax.jit(functools.partial(generator_gradients, task=task))
  analysis = step.lower(*arguments).compile().memory_analysis()
  return analysis.temp_size_in_bytes


@pytest.mark.slow
def test_memory_grows_with_features_alone():
  """Not with activations: measured, 2 copies of the features.

  Without tokens: matrices of distances are no smaller than their features.
  """
  task = with_encoder(toy_task(depth=3))
  image = jax.ShapeDtypeStruct((1, 4, 4, 1), np.float32)
  features = jax.eval_shape(task.features, encoder_params(task), image)
  each = sum(4 * x.size for x in features.values())
  few, many = (temporary_bytes(task, count, 4) for count in (64, 256))
  assert many - few < 3 * each * LABELS * (256 - 64)
  assert temporary_bytes(task, 256, 256) > 2 * many


@pytest.mark.parametrize("size", [0, 1, 3, 4, 7, 9])
def test_chunks_give_every_row_once(size):
  rows = {"a": jnp.arange(7.0), "b": jnp.arange(14.0).reshape(7, 2)}
  found = in_chunks(lambda x: x["a"] + x["b"][:, 1], rows, size)
  np.testing.assert_array_equal(found, 3 * np.arange(7.0) + 1)


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("batch.negatives", -1, "batch.negatives=-1 must be at least 0"),
    ("train.detached_at_once", -2, "detached_at_once=-2 must be at least 0"),
    ("features.sample", False, "no features.*features.tokens=True"),
    ("batch.generated", 1, "use at least 2, or batch.negatives"),
  ],
)
def test_mistakes_are_named(key, value, message):
  config = small()
  config.batch.unconditional, config.guidance.maximum = 0, 1.0
  config.eval.alphas = (1.0,)
  config.update_from_flattened_dict({key: value})
  with pytest.raises(config_lib.ConfigError, match=message):
    parse(config)
  if value == 1:
    config.batch.negatives = 1
    assert parse(config).batch.negatives == 1
