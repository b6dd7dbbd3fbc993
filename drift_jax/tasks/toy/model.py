"""Generators of points of the plane, for the toy experiments (5.1).

Both are called with noise [n, Z] and give points [n, 2].
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

DIMENSIONS = 2
# 1 / E[silu(z)^2] of a standard normal z: kernels of this variance keep that of
# the activations over depth.
_SILU_GAIN = 2.8120


class Mlp(nn.Module):
  """x = f(noise): `depth` SiLU layers of one width, then a linear one.

  At first x has mean `location` and, over noise, a deviation of about `spread`
  in each coordinate.
  """

  noise_size: int
  width: int
  depth: int
  location: tuple[float, ...]
  spread: float

  @nn.compact
  def __call__(self, noise: Float[Array, "n Z"]) -> Float[Array, "n 2"]:
    x = noise
    for layer in range(self.depth):
      gain = _SILU_GAIN if layer else 1.0
      x = nn.silu(nn.Dense(self.width, kernel_init=_normal(gain))(x))
    return nn.Dense(
      DIMENSIONS,
      kernel_init=_normal(_SILU_GAIN * self.spread**2),
      bias_init=lambda key, shape, dtype: jnp.array(self.location, dtype),
      name="output",
    )(x)


class Particles(nn.Module):
  """The samples themselves are the parameters, [count, 2]; no network.

  Called with noise of n samples, n a multiple of count, it repeats them in
  order.
  """

  count: int
  location: tuple[float, ...]
  spread: float

  @nn.compact
  def __call__(self, noise: Float[Array, "n Z"]) -> Float[Array, "n 2"]:
    def start(key: Array) -> Float[Array, "count 2"]:
      shape = (self.count, DIMENSIONS)
      return jnp.array(
        self.location, jnp.float32
      ) + self.spread * jax.random.normal(key, shape)

    positions = self.param("positions", start)
    return jnp.tile(positions, (len(noise) // self.count, 1))


def _normal(gain: float) -> nn.initializers.Initializer:
  """Normal of variance gain / fan-in."""
  return nn.initializers.variance_scaling(gain, "fan_in", "normal")
