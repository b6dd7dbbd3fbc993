"""Random streams: no key of one use is a key of another."""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from drift_jax.data.feed import QueueFeed
from drift_jax.data.loader import Loader
from drift_jax.system import sharding, streams
from drift_jax.tasks.generator.samplers import sample_step
from drift_jax.training import state
from tests.data.fakes import Numbers


def bits(key):
  return tuple(np.asarray(jax.random.key_data(key)).tolist())


def test_no_two_streams_share_a_key():
  """Roots, what is folded from them by small integers, and other seeds."""
  keys = []
  for seed, use in itertools.product((0, 1, 2), streams.USES):
    root = streams.stream(seed, use)
    keys += [root, *(jax.random.fold_in(root, i) for i in range(20))]
  assert len({bits(key) for key in keys}) == len(keys)


def test_an_unknown_use_lists_the_valid_ones():
  with pytest.raises(ValueError, match="'sampling'.*'params'.*'sample'"):
    streams.stream(0, "sampling")


def test_every_user_takes_its_own_stream(monkeypatch):
  """With one seed for all: parameters, steps, queue and samples."""
  taken = []

  def record(seed, use):
    assert seed == 5
    taken.append(use)
    return stream(seed, use)

  stream = streams.stream
  monkeypatch.setattr(streams, "stream", record)
  seen = {}

  def init_params(key):
    return {"key": jax.random.key_data(key).astype(jnp.float32)}

  _, init = state.abstract_and_init(
    init_params,
    optax.identity(),
    ema_decays=(),
    seed=5,
    mesh=sharding.make_mesh(8, 1),
  )
  started = init()
  seen["train"] = tuple(np.asarray(started.rng).tolist())
  assert seen["train"] == bits(stream(5, "train"))
  np.testing.assert_array_equal(
    started.params["key"], np.float32(jax.random.key_data(stream(5, "params")))
  )
  assert set(taken) == {"params", "train"}

  taken.clear()
  sizes = ("class_size", "unconditional_size", "push_per_step", "num_labels")
  sizes += ("num_positives", "num_unconditional")
  next(
    QueueFeed(
      Loader(Numbers(4, classes=1), batch_size=1, seed=0),
      **{"seed": 5, "prefill": 0, "with_replacement": True},
      **dict.fromkeys(sizes, 1),
    )
  )
  assert taken == ["queue"]

  class Noise:
    """A generator whose image is its noise."""

    def apply(self, variables, labels, alpha, noise, style):
      return noise

  taken.clear()
  task = types.SimpleNamespace(
    generator=Noise(),
    pixels=False,
    noise_shape=(2, 2, 1),
    style_tokens=1,
    style_vocab=1,
  )
  index = jnp.arange(3)
  images = sample_step({}, index, index, index, seed=5, task=task)
  assert taken == ["sample"]
  for i in range(3):
    key = jax.random.fold_in(stream(5, "sample"), i)
    expected = jax.random.normal(jax.random.split(key)[0], (2, 2, 1))
    np.testing.assert_allclose(images[i], expected, rtol=1e-6)
