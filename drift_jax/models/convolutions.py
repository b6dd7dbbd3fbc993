"""Layers of the encoders: convolutions, and norms of their maps.

Maps are [batch, height, width, channels]; parameters are float32.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from drift_jax.models.layers import NORM_EPSILON

# Locations of all maps together, at most, of which a convolution is a product
# if it gives twice as many channels: a convolution's gradient turns the kernel,
# which is larger then.
_FEW = 512


def conv(
  channels: int,
  size: int,
  dtype: jnp.dtype,
  name: str,
  stride: int = 1,
  *,
  use_bias: bool = False,
) -> nn.Conv:
  """A convolution of ResNets: odd size, He's initial kernel.

  The padding is the same on both sides, as PyTorch has it.
  """
  return nn.Conv(
    channels,
    (size, size),
    strides=(stride, stride),
    padding=size // 2,
    use_bias=use_bias,
    kernel_init=nn.initializers.he_normal(),
    dtype=dtype,
    conv_general_dilated=_convolve,
    name=name,
  )


def _convolve(
  x: Float[Array, "B H W C"],
  kernel: Float[Array, "K K C D"],
  strides: tuple[int, int],
  padding: list[tuple[int, int]],
  **rest: Any,
) -> Float[Array, "B h w D"]:
  """lax.conv_general_dilated; of small or few maps, a product.

  XLA's convolution of those, or its gradient, takes many times as long on a
  CPU: docs/performance.md.
  """
  size, stride, channels = len(kernel), strides[0], kernel.shape[-1]
  high, wide = (-(-side // stride) for side in x.shape[1:3])
  few = len(x) * high * wide <= min(_FEW, channels // 2)
  if min(high, wide) >= size and not few:
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **rest)
  padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  down, right = (_seen(side, size, stride) for side in x.shape[1:3])
  patches = [padded[:, rows, columns] for rows in down for columns in right]
  taps = kernel[
    down[0].start : down[-1].start + 1, right[0].start : right[-1].start + 1
  ]
  return jnp.concatenate(patches, axis=-1) @ taps.reshape(-1, channels)


def _seen(side: int, size: int, stride: int) -> list[slice]:
  """The part of a padded side under each tap that meets more than padding."""
  reach = (side - 1) // stride * stride
  first = size // 2
  taps = range(max(0, first - reach), min(size, first + side))
  return [slice(tap, tap + reach + 1, stride) for tap in taps]


class GroupNorm(nn.Module):
  """(x - mean) / sqrt(var + 1e-6) * scale + bias in float32, then `dtype`.

  Mean and variance are over all locations and the channels of a group. The
  number of groups is the largest up to max_groups that divides the channels.
  """

  dtype: jnp.dtype
  max_groups: int

  @nn.compact
  def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    channels = x.shape[-1]
    groups = max(n for n in range(1, self.max_groups + 1) if channels % n == 0)
    scale = self.param("scale", nn.initializers.ones, (channels,))
    bias = self.param("bias", nn.initializers.zeros, (channels,))
    scale, bias = (jnp.asarray(p, jnp.float32) for p in (scale, bias))
    return _group_norm(x, scale, bias, groups, self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _group_norm(
  x: Array, scale: Array, bias: Array, groups: int, dtype: jnp.dtype
) -> Array:
  return _group_norm_forward(x, scale, bias, groups, dtype)[0]


def _of_groups(
  reduce: Any, x: Float[Array, "B C"], groups: int
) -> Float[Array, "B C"]:
  """Reduces over the channels of each group; one value for each channel."""
  rows = x.reshape(x.shape[0], groups, -1)
  return jnp.broadcast_to(
    reduce(rows, axis=-1, keepdims=True), rows.shape
  ).reshape(x.shape)


def _group_norm_forward(
  x: Array, scale: Array, bias: Array, groups: int, dtype: jnp.dtype
) -> tuple[Array, Any]:
  wide = x.astype(jnp.float32)
  # Moments of each channel, then of its group: splitting the channels of a map
  # into groups would change its layout, and copy it.
  means, variances = (f(wide, axis=(1, 2)) for f in (jnp.mean, jnp.var))
  mean = _of_groups(jnp.mean, means, groups)
  variance = _of_groups(jnp.mean, variances, groups) + _of_groups(
    jnp.var, means, groups
  )
  inverse = jax.lax.rsqrt(variance + NORM_EPSILON)
  normal = (wide - _on_map(mean)) * _on_map(inverse)
  return (normal * scale + bias).astype(dtype), (x, scale, mean, inverse)


def _group_norm_backward(
  groups: int, dtype: jnp.dtype, residuals: Any, cotangent: Array
) -> tuple[Array, Array, Array]:
  """Gradients in two passes over the map: sums of each channel, then x's.

  Autodiff would keep float32 maps; this keeps x in its own dtype.
  """
  del dtype
  x, scale, mean, inverse = residuals
  cotangent = cotangent.astype(jnp.float32)
  centered = x.astype(jnp.float32) - _on_map(mean)
  sums = jnp.sum(cotangent, axis=(1, 2))
  products = jnp.sum(cotangent * centered, axis=(1, 2)) * inverse
  count = x[0].size // groups
  shift = _of_groups(jnp.sum, sums * scale, groups) * inverse / count
  slope = _of_groups(jnp.sum, products * scale, groups) * inverse**2 / count
  gradient = (
    cotangent * _on_map(scale * inverse)
    - _on_map(shift)
    - centered * _on_map(slope)
  )
  return gradient.astype(x.dtype), products.sum(axis=0), sums.sum(axis=0)


def _on_map(x: Float[Array, "B C"]) -> Float[Array, "B 1 1 C"]:
  return x[:, None, None, :]


_group_norm.defvjp(_group_norm_forward, _group_norm_backward)


class LayerNorm(nn.Module):
  """(x - mean) / sqrt(var + 1e-6) * scale + bias in float32, then `dtype`.

  Mean and variance are over the channels.
  """

  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
    x = x.astype(jnp.float32)
    mean, variance = (
      f(x, axis=(-1,), keepdims=True) for f in (jnp.mean, jnp.var)
    )
    x = (x - mean) * jax.lax.rsqrt(variance + NORM_EPSILON)
    shape = (x.shape[-1],)
    scale = self.param("scale", nn.initializers.ones, shape)
    bias = self.param("bias", nn.initializers.zeros, shape)
    x = x * scale.astype(jnp.float32) + bias.astype(jnp.float32)
    return x.astype(self.dtype)
