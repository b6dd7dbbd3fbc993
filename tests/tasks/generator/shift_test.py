"""Encoders that see the images of each step somewhere else."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drift_jax import config as config_lib
from drift_jax.tasks import parse
from drift_jax.tasks.generator.step import (
  Draws,
  draw,
  generator_gradients,
  moved,
)
from tests.conftest import assert_close
from tests.tasks.generator.step_test import (
  ToyEncoder,
  encoder_params,
  random_params,
  toy_batch,
  toy_task,
  with_encoder,
)
from tests.tasks.generator.variants_test import small

LABELS = 4


def task_of(shift: int, **changed):
  task = with_encoder(toy_task())
  space = dataclasses.replace(task.features, shift=shift)
  return dataclasses.replace(task, features=space, **changed)


@pytest.mark.parametrize("offset", [(0, 0), (2, 2), (4, 1), (3, 4)])
def test_moved_images_mirror_their_border(offset):
  images = np.random.default_rng(0).normal(size=(3, 6, 5, 2))
  images = images.astype(np.float32)
  down, right = 2 - offset[0], 2 - offset[1]

  def seen(at: int, by: int, side: int) -> int:
    at = abs(at - by)
    return min(at, 2 * (side - 1) - at)

  rows = [seen(i, down, 6) for i in range(6)]
  columns = [seen(i, right, 5) for i in range(5)]
  np.testing.assert_array_equal(
    moved(images, jnp.array(offset), 2), images[:, rows][:, :, columns]
  )


def test_samples_reals_and_negatives_move_together():
  """As if the encoder itself had moved what it was given."""
  task = task_of(1, num_negatives=3)
  draws = draw(jax.random.key(6), task, LABELS)
  assert draws.offset is not None
  offset = np.asarray(draws.offset)
  assert (offset == offset[0]).all()
  assert (offset[0] != 1).any(), "this key moves nothing"

  class Moving(ToyEncoder):
    """Moves what it is given."""

    def features(self, x):
      return super().features(moved(x, jnp.array(offset[0]), 1))

  space = dataclasses.replace(
    task.features, encoders={"toy": Moving()}, shift=0
  )
  expected = dataclasses.replace(task, features=space)
  arguments = random_params(task), toy_batch(LABELS)
  frozen = encoder_params(task)

  def gradients(task, draws):
    call = jax.jit(functools.partial(generator_gradients, task=task))
    return call(*arguments, draws, frozen)

  found, still = gradients(task, draws), Draws(*draws[:-1], None)
  wanted = gradients(expected, still)
  jax.tree.map(lambda a, b: assert_close(a, b, 1e-6), found, wanted)
  unmoved = gradients(task, still)
  assert abs(unmoved[0] - found[0]) > 1e-3 * abs(found[0])


def test_each_step_sees_another_place():
  """All places within the shift, and no other draw changes."""
  keys = jax.random.split(jax.random.key(0), 200)
  offsets = np.array([draw(k, task_of(1), 2).offset[0] for k in keys])
  places, counts = np.unique(offsets, axis=0, return_counts=True)
  assert len(places) == 9
  assert counts.min() > 200 / 9 / 3
  plain, moving = (draw(keys[0], task_of(s), 2) for s in (0, 1))
  assert plain.offset is None
  jax.tree.map(np.testing.assert_array_equal, plain[:-1], moving[:-1])


@pytest.mark.parametrize("shift", [-1, 1000])
def test_mistakes_are_named(shift):
  config = small()
  config.features.shift = shift
  with pytest.raises(config_lib.ConfigError, match=f"features.shift={shift}"):
    parse(config)
