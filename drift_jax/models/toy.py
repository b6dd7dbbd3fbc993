"""Generators of points of the plane, for the toy experiments (5.1).

A point is an image of shape (1, 1, 2), its noise one of shape (1, 1, noise
size), and calls are those of the image generator: labels, alpha and style make
no difference.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

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
  def __call__(
    self,
    labels: Int[Array, " n"],
    alpha: Float[ArrayLike, "..."],
    *,
    noise: Float[Array, "n 1 1 Z"],
    style: Int[Array, "n 0"],
  ) -> Float[Array, "n 1 1 2"]:
    del labels, alpha, style
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

  Called for n samples, n a multiple of count, it repeats them in order. Build
  it with `build_toy`.
  """

  count: int
  location: tuple[float, ...]
  spread: float

  @nn.compact
  def __call__(
    self,
    labels: Int[Array, " n"],
    alpha: Float[ArrayLike, "..."],
    *,
    noise: Float[Array, "n 1 1 Z"],
    style: Int[Array, "n 0"],
  ) -> Float[Array, "n 1 1 2"]:
    del alpha, noise, style

    def start(key: Array) -> Float[Array, "count 2"]:
      shape = (self.count, DIMENSIONS)
      return jnp.array(
        self.location, jnp.float32
      ) + self.spread * jax.random.normal(key, shape)

    positions = self.param("positions", start)
    if len(labels) % self.count:
      raise ValueError(
        f"{len(labels)} samples of {self.count} particles: want a multiple"
      )
    times = len(labels) // self.count
    return jnp.tile(positions, (times, 1))[:, None, None, :]


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
  """A generator of points [n, 1, 1, 2].

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
