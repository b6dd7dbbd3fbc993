"""Generators of points of the plane, for the toy experiments (5.1).

Both are called with noise [n, Z] and give points [n, 2].
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from drift_jax.models.arguments import (
  reject_unknown,
  require_choice,
  require_int,
)

TOY_KINDS = ("mlp", "particles")
DIMENSIONS = 2
# 1 / E[silu(z)^2] of a standard normal z: kernels of this variance keep that of
# the activations over depth.
_SILU_GAIN = 2.8120


class Mlp(nn.Module):
  """x = f(noise): `depth` SiLU layers of one width, then a linear one.

  At first x has mean `location` and, over noise, a deviation of about `spread`
  in each coordinate. Build it with `build_toy`.
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
  order. Build it with `build_toy`.
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
    if len(noise) % self.count:
      raise ValueError(
        f"{len(noise)} samples of {self.count} particles: want a multiple"
      )
    times = len(noise) // self.count
    return jnp.tile(positions, (times, 1))


def build_toy(
  *,
  kind: str,
  noise_size: int,
  width: int,
  depth: int,
  location: tuple[float, ...],
  spread: float,
  count: int,
  **unknown: object,
) -> Mlp | Particles:
  """A generator of points [n, 2] from noise [n, noise_size].

  Args:
    kind: 'mlp', or 'particles', which move without a network.
    noise_size: of the MLP's noise.
    width: of its hidden layers.
    depth: number of hidden layers.
    location: mean of the samples at first, two numbers.
    spread: their standard deviation at first, > 0.
    count: of the particles.

  Raises:
    ValueError: an unknown argument, or one out of range.
  """
  reject_unknown(build_toy, unknown)
  require_choice("kind", kind, TOY_KINDS)
  for name, value in (
    ("noise_size", noise_size),
    ("width", width),
    ("depth", depth),
    ("count", count),
  ):
    require_int(name, value, 1)
  if len(location) != DIMENSIONS:
    raise ValueError(f"location={location}: must be {DIMENSIONS} numbers")
  if spread <= 0:
    raise ValueError(
      f"spread={spread}: must be > 0, or nothing tells the samples apart"
    )
  if kind == "particles":
    return Particles(count=count, location=location, spread=spread)
  return Mlp(
    noise_size=noise_size,
    width=width,
    depth=depth,
    location=location,
    spread=spread,
  )


def _normal(gain: float) -> nn.initializers.Initializer:
  """Normal of variance gain / fan-in."""
  return nn.initializers.variance_scaling(gain, "fan_in", "normal")
