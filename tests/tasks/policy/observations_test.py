"""Conditions of observations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drift_jax.tasks.policy import observations as observations_lib
from drift_jax.tasks.policy.observations import (
  ObservationEncoder,
  crop_offsets,
  spatial_softmax,
)
from tests.conftest import assert_close, precise_jit


def pictures(batch=2, steps=2, side=40, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (batch, steps, side, side, 3), dtype=np.uint8)


def test_crops_reach_every_place_and_none_outside():
  offsets = crop_offsets(jax.random.key(0), 4_000, size=12, crop=9)
  assert offsets.shape == (4_000, 2) and offsets.dtype == jnp.int32
  places, counts = np.unique(offsets, axis=0, return_counts=True)
  np.testing.assert_array_equal(
    places, np.stack(np.indices((4, 4)), axis=-1).reshape(-1, 2)
  )
  # 6 standard deviations of a binomial of 4_000 / 16.
  np.testing.assert_allclose(counts, 250, atol=6 * 15.3)
  whole = crop_offsets(jax.random.key(0), 3, size=9, crop=9)
  np.testing.assert_array_equal(whole, 0)


def test_the_centre_is_cropped():
  pixels = pictures(batch=3, side=7)
  centre = observations_lib._cropped(jnp.asarray(pixels), 5, None)
  np.testing.assert_array_equal(centre, pixels[:, :, 1:6, 1:6])


def test_spatial_softmax_by_hand():
  """One sharp peak; two peaks of masses 1 : 3; a flat map."""
  maps = np.full((1, 3, 5, 3), -1e4, np.float32)
  maps[0, 0, 3, 0] = 0
  maps[0, 2, 0, 1] = 0
  maps[0, 1, 4, 1] = np.log(3)
  maps[..., 2] = 7
  points = spatial_softmax(jnp.asarray(maps))
  expected = [0.5, -1, -0.25 + 0.75, 0.25 + 0, 0, 0]
  np.testing.assert_allclose(points, [expected], atol=1e-6)


def test_a_basic_block_is_what_it_says():
  """With kernels that pass the centre on, it is two group norms."""
  block = observations_lib._BasicBlock(32, 1, jnp.dtype(jnp.float32))
  x = jax.random.normal(jax.random.key(0), (2, 4, 4, 32))
  params = block.init(jax.random.key(1), x)["params"]
  assert set(params) == {"conv1", "norm1", "conv2", "norm2"}
  centre = jnp.zeros((3, 3, 32, 32)).at[1, 1].set(jnp.eye(32))
  params |= {name: {"kernel": centre} for name in ("conv1", "conv2")}

  def norm(x):
    groups = x.reshape(2, 4, 4, 2, 16)
    mean = groups.mean(axis=(1, 2, 4), keepdims=True)
    variance = groups.var(axis=(1, 2, 4), keepdims=True)
    return ((groups - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape)

  wide = np.asarray(x, np.float64)
  expected = np.maximum(0, wide + norm(np.maximum(0, norm(wide))))
  assert_close(precise_jit(block.apply)({"params": params}, x), expected, 1e-6)


def test_vectors_stand_as_they_are():
  encoder = ObservationEncoder(vectors=("b", "a"))
  a, b = np.arange(12.0).reshape(2, 2, 3), -np.arange(8.0).reshape(2, 2, 2)
  seen = {"a": np.float32(a), "b": np.float32(b), "unused": np.zeros(1)}
  variables = encoder.init(jax.random.key(0), seen)
  assert not variables
  condition = encoder.apply(variables, seen)
  expected = [[*b[i, 0], *a[i, 0], *b[i, 1], *a[i, 1]] for i in range(2)]
  np.testing.assert_array_equal(condition, np.array(expected))


@pytest.mark.slow
def test_images_are_encoded_one_by_one(monkeypatch):
  """With a network of two stages, which compiles sooner."""
  monkeypatch.setattr(observations_lib, "_STAGES", (16, 32))
  names = ("front", "wrist")
  encoder = ObservationEncoder(
    vectors=("state",), images=names, crop=36, image_features=8
  )
  states = np.float32(np.arange(8).reshape(2, 2, 2))
  seen = {"state": states, "front": pictures(), "wrist": pictures(seed=1)}
  offsets = jnp.array([[0, 4], [3, 1]])
  shapes = jax.eval_shape(encoder.init, jax.random.key(0), seen, offsets)
  rng = np.random.default_rng(0)
  variables = jax.tree.map(
    lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), shapes
  )
  apply = jax.jit(encoder.apply)
  condition = apply(variables, seen, offsets).reshape(2, 2, 2 + 8 + 8)
  np.testing.assert_array_equal(condition[..., :2], states)
  # Each by its own network, a sample's steps at one place.
  network = observations_lib.ImageEncoder(32, 8, jnp.dtype(jnp.float32))
  alone = jax.jit(network.apply)
  for number, name in enumerate(names):
    cut = [
      seen[name][i, :, row : row + 36, column : column + 36]
      for i, (row, column) in enumerate(offsets.tolist())
    ]
    expected = alone(
      {"params": variables["params"][f"image_{name}"]},
      jnp.concatenate(cut).astype(jnp.float32) / 127.5 - 1,
    )
    features = condition[..., 2 + 8 * number : 10 + 8 * number]
    assert_close(features.reshape(4, 8), expected, 1e-4)
  moved = apply(variables, seen, offsets[::-1]).reshape(2, 2, -1)
  assert (np.abs(moved - condition)[..., 2:].max(axis=-1) > 1e-3).all()


def test_published_size():
  """ResNet-18 without classifier has 11 176 512 parameters, 9 600 of norms."""
  module = ObservationEncoder(vectors=(), images=("image",), crop=84)
  shapes = jax.eval_shape(
    module.init, jax.random.key(0), {"image": pictures(side=96)}
  )
  count = sum(x.size for x in jax.tree.leaves(shapes))
  assert count == 11_176_512 + (512 + 1) * 32 + (64 + 1) * 64
