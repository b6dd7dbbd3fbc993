"""The conditional 1-D U-Net of Diffusion Policy (arXiv:2303.04137).

Sequences are [batch, time, channels]; parameters are float32 and the products
run in the `dtype` of their module.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from drift_jax.models.arguments import require_multiple
from drift_jax.models.convolutions import GroupNorm
from drift_jax.models.layers import sinusoidal_embedding

# Uniform in +-1 / sqrt(fan-in), as in the published code: FiLM's scales are
# then small at first, and what a block adds as well.
_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

# Above it mish(x) is x in float32, long before exp overflows.
_MISH_IS_LINEAR = 20.0


def mish(x: Float[Array, "..."]) -> Float[Array, "..."]:
  """x tanh(log(1 + e^x)), in float32, then the dtype of x.

  With e = e^x it is x n / (n + 2), n = e (e + 2): one exponential instead of
  three transcendental functions.
  """
  wide = x.astype(jnp.float32)
  e = jnp.exp(jnp.minimum(wide, _MISH_IS_LINEAR))
  n = e * (e + 2)
  return (wide * (n / (n + 2))).astype(x.dtype)


def convolve(
  x: Float[Array, "B T C"],
  kernel: Float[Array, "K C D"],
  stride: int,
  padding: int,
) -> Float[Array, "B t D"]:
  """y_o = sum_i x_i kernel_(i - stride o + padding), over the i there are.

  If the kernel spans the whole sequence, it is one product with a matrix of all
  pairs (i, o): XLA's CPU convolution would take 20 times as long, and multiply
  with padding.
  """
  size, channels, features = kernel.shape
  steps = x.shape[1]
  if steps > size:
    axes = ("NWC", "WIO", "NWC")
    around = ((padding, padding),)
    return jax.lax.conv_general_dilated(
      x, kernel, (stride,), around, dimension_numbers=axes
    )
  outputs = (steps + 2 * padding - size) // stride + 1
  lead = stride * (outputs - 1)
  behind = max(0, steps + padding - size)
  padded = jnp.pad(kernel, ((lead, behind), (0, 0), (0, 0)))
  starts = [lead + padding - stride * o for o in range(outputs)]
  pairs = jnp.stack([padded[s : s + steps] for s in starts], axis=2)
  y = jnp.dot(
    x.reshape(-1, steps * channels),
    pairs.reshape(steps * channels, outputs * features),
  )
  return y.reshape(-1, outputs, features)


def _kernel_and_bias(
  module: "Conv1d | Upsample", size: int, channels: int
) -> tuple[Array, Array]:
  shape = (size, channels, module.features)
  kernel = module.param("kernel", _kernel_init, shape)
  bias = module.param("bias", _uniform(size * channels), shape[-1:])
  return kernel.astype(module.dtype), bias.astype(module.dtype)


class Conv1d(nn.Module):
  """A convolution over time with a bias; see `convolve`."""

  features: int
  size: int
  dtype: jnp.dtype
  stride: int = 1

  @nn.compact
  def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B t D"]:
    kernel, bias = _kernel_and_bias(self, self.size, x.shape[-1])
    x, padding = x.astype(self.dtype), (self.size - 1) // 2
    return convolve(x, kernel, self.stride, padding) + bias


class Upsample(nn.Module):
  """A transposed convolution of size 4 and stride 2: twice the time.

  y_(2t) = x_t k_1 + x_(t-1) k_3, y_(2t+1) = x_(t+1) k_0 + x_t k_2, each with a
  bias; as one convolution of size 2 with both of them as channels, their pairs
  of steps being the same but for one step.
  """

  features: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B 2*T D"]:
    batch, steps, channels = x.shape
    kernel, bias = _kernel_and_bias(self, 4, channels)
    pairs = kernel[::-1].reshape(2, 2, channels, self.features)
    pairs = pairs.transpose(0, 2, 1, 3).reshape(2, channels, -1)
    y = convolve(x.astype(self.dtype), pairs, 1, 1)
    even, odd = y[:, :-1, : self.features], y[:, 1:, self.features :]
    y = jnp.stack([even, odd], axis=2).reshape(batch, 2 * steps, self.features)
    return y + bias


class _ConvBlock(nn.Module):
  """mish(GroupNorm(convolution))."""

  features: int
  size: int
  groups: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T D"]:
    x = Conv1d(self.features, self.size, self.dtype, name="conv")(x)
    # The other axis of a map has nothing to average over.
    x = GroupNorm(self.dtype, self.groups, name="norm")(x[:, :, None, :])
    return mish(x[:, :, 0, :])


class _ResidualBlock(nn.Module):
  """x + block2(scale * block1(x) + shift), scale and shift of the condition.

  FiLM: (scale, shift) = W mish(condition) + b, one of each for each channel. x
  is projected if its channels differ.
  """

  features: int
  size: int
  groups: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T C"], condition: Float[Array, "B D"]
  ) -> Float[Array, "B T F"]:
    arguments = (self.features, self.size, self.groups, self.dtype)
    hidden = _ConvBlock(*arguments, name="block1")(x)
    film = _dense(mish(condition), 2 * self.features, self.dtype, "film")
    scale, shift = jnp.split(film[:, None, :], 2, axis=-1)
    hidden = _ConvBlock(*arguments, name="block2")(scale * hidden + shift)
    if x.shape[-1] != self.features:
      x = _dense(x, self.features, self.dtype, "residual")
    return x + hidden


class ConditionalUnet1d(nn.Module):
  """Actions of a sequence and a condition -> actions.

  A level has two residual blocks; sequences are halved between levels. On the
  way up, a level starts from its lower neighbour's output next to what went
  down from there. The uppermost level's blocks are not repeated: as published,
  a final block follows the last transposed convolution.

  Attributes:
    action_size: A, channels of what goes in and comes out.
    widths: channels of the levels, from the top; (256, 512, 1024) is published.
    kernel_size: of the convolutions, odd.
    groups: of the group norms.
    time_size: channels of the time's embedding; 0 for a network without time.
    dtype: of activations and products.
  """

  action_size: int
  widths: tuple[int, ...]
  kernel_size: int = 5
  groups: int = 8
  time_size: int = 0
  dtype: jnp.dtype = jnp.dtype(jnp.float32)

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B T A"],
    condition: Float[Array, "B C"],
    time: Int[Array, " B"] | None = None,
  ) -> Float[Array, "B T A"]:
    """Returns float32.

    Args:
      x: a multiple of 2^(levels - 1) steps.
      condition: vectors; with the time's embedding, if there is one, in front.
      time: a denoising step's number, for networks which have one.

    Raises:
      ValueError: attributes or a number of steps that don't fit.
    """
    self._check(x.shape[1])
    if time is not None:
      condition = jnp.concatenate([self._embed(time), condition], axis=-1)
    condition = condition.astype(self.dtype)

    sizes = (self.kernel_size, self.groups, self.dtype)

    def two_blocks(name: str, width: int, x: Float[Array, "B T C"]) -> Array:
      for i in (1, 2):
        x = _ResidualBlock(width, *sizes, name=f"{name}_block{i}")(x, condition)
      return x

    hidden = x.astype(self.dtype)
    skips = []
    for level, width in enumerate(self.widths):
      hidden = two_blocks(f"down{level}", width, hidden)
      skips.append(hidden)
      if level < len(self.widths) - 1:
        hidden = Conv1d(width, 3, self.dtype, 2, name=f"down{level}")(hidden)
    hidden = two_blocks("middle", self.widths[-1], hidden)
    for level in range(len(self.widths) - 1, 0, -1):
      hidden = jnp.concatenate([hidden, skips[level]], axis=-1)
      width = self.widths[level - 1]
      hidden = two_blocks(f"up{level}", width, hidden)
      hidden = Upsample(width, self.dtype, name=f"up{level}")(hidden)
    hidden = _ConvBlock(self.widths[0], *sizes, name="final")(hidden)
    # The output and what follows are float32.
    return _dense(hidden, self.action_size, jnp.dtype(jnp.float32), "output")

  def _embed(self, time: Int[Array, " B"]) -> Float[Array, "B _"]:
    x = sinusoidal_embedding(time.astype(jnp.float32), self.time_size)
    x = _dense(x, 4 * self.time_size, self.dtype, "time_in")
    x = _dense(mish(x), self.time_size, self.dtype, "time_out")
    return x.astype(jnp.float32)

  def _check(self, steps: int) -> None:
    levels = len(self.widths)
    factor = f"2^({levels} levels - 1)"
    require_multiple("x's steps", steps, factor, 2 ** (levels - 1))
    require_multiple("time_size", self.time_size, "sine and cosine", 2)
    for level, width in enumerate(self.widths):
      require_multiple(f"widths (level {level})", width, "groups", self.groups)
    if self.kernel_size % 2 == 0:
      raise ValueError(f"kernel_size={self.kernel_size}: must be odd")


def _dense(
  x: Float[Array, "*B C"], features: int, dtype: jnp.dtype, name: str
) -> Float[Array, "*B F"]:
  return nn.Dense(
    features,
    dtype=dtype,
    kernel_init=_kernel_init,
    bias_init=_uniform(x.shape[-1]),
    name=name,
  )(x)


def _uniform(fan_in: int) -> nn.initializers.Initializer:
  """Uniform in +-1 / sqrt(fan-in), like the kernels."""
  bound = fan_in**-0.5

  def init(key: Array, shape: Any, dtype: Any = jnp.float32) -> Array:
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init
