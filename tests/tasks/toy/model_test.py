"""Generators of points: shapes, initialisations, arguments."""

import jax
import jax.numpy as jnp
import numpy as np

from drift_jax.tasks.toy.model import Mlp, Particles

MLP = {
  "noise_size": 8,
  "width": 64,
  "depth": 3,
  "location": (0.3, -2.0),
  "spread": 0.5,
}
PARTICLES = {"count": 6, "location": (0.3, -2.0), "spread": 0.5}


def call(module, count, noise_size=8, params=None, key=0):
  noise = jax.random.normal(jax.random.key(key), (count, noise_size))
  if params is None:
    params = module.init(jax.random.key(1), noise)["params"]
  return params, module.apply({"params": params}, noise)


def test_mlp_starts_where_it_is_told():
  spreads = []
  for spread in (0.5, 0.05):
    params, x = call(Mlp(**MLP | {"spread": spread}), 4_096)
    assert x.shape == (4_096, 2) and x.dtype == jnp.float32
    np.testing.assert_array_equal(
      params["output"]["bias"], np.float32((0.3, -2))
    )
    # One network's mean differs from the average network's.
    np.testing.assert_allclose(x.mean(axis=0), (0.3, -2), atol=2 * spread)
    spreads.append(np.asarray(x.std(axis=0)))
  assert (0.1 < spreads[0]).all() and (spreads[0] < 1.2).all()
  np.testing.assert_allclose(spreads[0], 10 * spreads[1], rtol=1e-4)


def test_particles_are_their_own_samples():
  module = Particles(**PARTICLES)
  params, x = call(module, 12)
  assert set(params) == {"positions"}
  np.testing.assert_array_equal(x[:6], params["positions"])
  np.testing.assert_array_equal(x[6:], x[:6])
  # Whatever the noise.
  np.testing.assert_array_equal(call(module, 12, params=params, key=9)[1], x)
  many = Particles(**PARTICLES | {"count": 4_096})
  positions = call(many, 4_096)[0]["positions"]
  np.testing.assert_allclose(positions.mean(axis=0), (0.3, -2), atol=0.04)
  np.testing.assert_allclose(positions.std(axis=0), 0.5, rtol=0.05)
