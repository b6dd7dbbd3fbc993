"""The Stable Diffusion autoencoder (AutoencoderKL): images <-> latents."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from drift_jax.models.arguments import build, require_multiple
from drift_jax.models.convolutions import GroupNorm
from drift_jax.models.layers import attention

SCALING_FACTOR = 0.18215
# Limits of the logarithm of the posterior's variance.
MIN_LOG_VARIANCE = -30.0
MAX_LOG_VARIANCE = 20.0


def sample_latents(
  moments: Float[ArrayLike, "*B D"],
  noise: Float[ArrayLike, "*B C"],
  *,
  scaling_factor: float = SCALING_FACTOR,
) -> Float[Array, "*B C"]:
  """(mean + exp(logvar / 2) * noise) * scaling_factor, in float32.

  Args:
    moments: mean and logvar along the last axis, as `Vae.encode` gives them;
      D = 2 C.
    noise: standard normal.
    scaling_factor: of the autoencoder; gives latents about unit variance.

  Returns:
    Latents as the generator and `Vae.decode` take them.
  """
  mean, log_variance = jnp.split(
    jnp.asarray(moments).astype(jnp.float32), 2, axis=-1
  )
  noise = jnp.asarray(noise).astype(jnp.float32)
  return (mean + jnp.exp(log_variance / 2) * noise) * scaling_factor


def latent_mean(
  moments: Float[ArrayLike, "*B D"], *, scaling_factor: float = SCALING_FACTOR
) -> Float[Array, "*B C"]:
  """mean * scaling_factor: `sample_latents` without its noise."""
  mean, _ = jnp.split(jnp.asarray(moments).astype(jnp.float32), 2, axis=-1)
  return mean * scaling_factor


def _conv(
  channels: int,
  size: int,
  dtype: jnp.dtype,
  name: str | None = None,
  *,
  stride: int = 1,
) -> nn.Conv:
  """A convolution; stride 1 keeps the size, stride 2 pads at the end only."""
  padding = {1: (0, 0), 3: (1, 1)}[size] if stride == 1 else (0, 1)
  return nn.Conv(
    channels,
    (size, size),
    strides=(stride, stride),
    padding=(padding, padding),
    dtype=dtype,
    name=name,
  )


def repeat_pixels(x: Float[Array, "B h w C"]) -> Float[Array, "B 2*h 2*w C"]:
  """Nearest-neighbour enlargement by two along H and W."""
  batch, height, width, channels = x.shape
  shape = (batch, height, 2, width, 2, channels)
  x = jnp.broadcast_to(x[:, :, None, :, None, :], shape)
  return x.reshape(batch, 2 * height, 2 * width, channels)


class ResnetBlock(nn.Module):
  """x + conv(silu(GN(conv(silu(GN(x)))))); x is projected if widths differ."""

  channels: int
  norm_groups: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
    out = nn.silu(GroupNorm(self.dtype, self.norm_groups, name="norm1")(x))
    out = _conv(self.channels, 3, self.dtype, "conv1")(out)
    out = nn.silu(GroupNorm(self.dtype, self.norm_groups, name="norm2")(out))
    out = _conv(self.channels, 3, self.dtype, "conv2")(out)
    if x.shape[-1] != self.channels:
      x = _conv(self.channels, 1, self.dtype, "shortcut")(x)
    return x + out


class AttentionBlock(nn.Module):
  """x + linear(attention over all locations of GN(x)), with one head."""

  norm_groups: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    batch, height, width, channels = x.shape
    hidden = GroupNorm(self.dtype, self.norm_groups, name="norm")(x)
    hidden = hidden.reshape(batch, height * width, 1, channels)
    query, key, value = (
      nn.Dense(channels, dtype=self.dtype, name=name)(hidden)
      for name in ("query", "key", "value")
    )
    out = attention(query, key, value, dtype=self.dtype)
    out = nn.Dense(channels, dtype=self.dtype, name="out")(out)
    return x + out.reshape(x.shape)


class Head(nn.Module):
  """conv(silu(GN(x))): the last layer of either half, float32 out."""

  channels: int
  norm_groups: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
    x = nn.silu(GroupNorm(self.dtype, self.norm_groups, name="norm")(x))
    return _conv(self.channels, 3, self.dtype, "conv")(x).astype(jnp.float32)


class Half(nn.Module):
  """Encoder or decoder: levels of residual blocks, and a middle.

  The encoder goes down the levels and then through the middle (two blocks
  around one attention), the decoder through the middle and then up.
  """

  widths: tuple[int, ...]
  blocks_per_level: int
  out_channels: int
  upwards: bool
  norm_groups: int
  dtype: jnp.dtype
  remat: bool

  @nn.compact
  def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
    # The convolutions between them store nothing for their input's gradient.
    types = (ResnetBlock, AttentionBlock, Head)
    resnet, attend, head = map(nn.remat, types) if self.remat else types
    options = {"norm_groups": self.norm_groups, "dtype": self.dtype}

    def middle(x: Array) -> Array:
      width = x.shape[-1]
      x = resnet(width, **options, name="middle_block1")(x)
      x = attend(**options, name="middle_attention")(x)
      return resnet(width, **options, name="middle_block2")(x)

    x = _conv(self.widths[0], 3, self.dtype, "conv_in")(x.astype(self.dtype))
    if self.upwards:
      x = middle(x)
    for level, width in enumerate(self.widths, start=1):
      for i in range(self.blocks_per_level):
        name = f"level{level}_block{i + 1}"
        x = resnet(width, **options, name=name)(x)
      if level < len(self.widths):
        stride = 1 if self.upwards else 2
        x = repeat_pixels(x) if self.upwards else x
        name = f"level{level}_resample"
        x = _conv(width, 3, self.dtype, name, stride=stride)(x)
    if not self.upwards:
      x = middle(x)
    return head(self.out_channels, **options, name="head")(x)


class Vae(nn.Module):
  """The autoencoder whose latents the latent generators draw (A.2).

  Both halves are differentiable. `vae.clone(remat=True)` is the same model
  with less memory in its gradient. Build it with `build_vae`, which checks the
  arguments.

  Attributes:
    in_channels: of images.
    latent_channels: of latents.
    widths: channels of the encoder's levels, the finest first; each level
      but the last halves the resolution. The decoder mirrors it.
    blocks_per_level: residual blocks of an encoder's level; the decoder has
      one more.
    norm_groups: of every GroupNorm; divides the widths.
    scaling_factor: latents are multiplied with it.
    dtype: of activations and products, 'float32' or 'bfloat16'; parameters,
      statistics, softmax and results are float32.
    remat: recompute each block in the backward pass instead of storing its
      activations. XLA undoes that on CPUs.
  """

  in_channels: int
  latent_channels: int
  widths: tuple[int, ...]
  blocks_per_level: int
  norm_groups: int
  scaling_factor: float
  dtype: jnp.dtype
  remat: bool

  @property
  def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Smallest input of a call: an image."""
    side = self.downsampling
    shape = (1, side, side, self.in_channels)
    return (jax.ShapeDtypeStruct(shape, jnp.float32),)

  def setup(self) -> None:
    options = {
      "norm_groups": self.norm_groups,
      "dtype": self.dtype,
      "remat": self.remat,
    }
    self.encoder = Half(
      self.widths,
      self.blocks_per_level,
      2 * self.latent_channels,
      upwards=False,
      **options,
    )
    self.decoder = Half(
      self.widths[::-1],
      self.blocks_per_level + 1,
      self.in_channels,
      upwards=True,
      **options,
    )
    self.quant_conv = _conv(2 * self.latent_channels, 1, self.dtype)
    self.post_quant_conv = _conv(self.latent_channels, 1, self.dtype)

  @property
  def downsampling(self) -> int:
    """Pixels along a latent cell's side: 8."""
    return 2 ** (len(self.widths) - 1)

  def encode(self, images: Float[ArrayLike, "B H W c"]) -> Float[Array, "..."]:
    """The posterior of the latents, unscaled; see `sample_latents`.

    Args:
      images: RGB pixels in [-1, 1], NHWC; H and W are multiples of 8.

    Returns:
      [B, H/8, W/8, 8] float32: along the last axis the mean, then the
      logarithm of the variance, clipped to [-30, 20].

    Raises:
      ValueError: images of another number of channels, or of a size that is
        no multiple of 8.
    """
    images = jnp.asarray(images)
    _, height, width, channels = images.shape
    _require_channels("images", channels, self.in_channels)
    for name, size in (("height", height), ("width", width)):
      require_multiple(name, size, "downsampling", self.downsampling)
    moments = self.quant_conv(self.encoder(images)).astype(jnp.float32)
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    log_variance = jnp.clip(log_variance, MIN_LOG_VARIANCE, MAX_LOG_VARIANCE)
    return jnp.concatenate([mean, log_variance], axis=-1)

  def decode(
    self, latents: Float[ArrayLike, "B h w C"]
  ) -> Float[Array, "B _ _ c"]:
    """Images of scaled latents.

    Args:
      latents: [B, h, w, 4], scaled: as `sample_latents` gives them and as the
        generator sees them.

    Returns:
      [B, 8 h, 8 w, 3] RGB in about [-1, 1], float32, not clipped.

    Raises:
      ValueError: latents of another number of channels.
    """
    latents = jnp.asarray(latents)
    _require_channels("latents", latents.shape[-1], self.latent_channels)
    unscaled = latents.astype(jnp.float32) / self.scaling_factor
    return self.decoder(self.post_quant_conv(unscaled))

  def __call__(
    self, images: Float[ArrayLike, "B H W c"]
  ) -> Float[Array, "B H W c"]:
    """Reconstruction through the mean of the posterior."""
    moments = self.encode(images)
    return self.decode(latent_mean(moments, scaling_factor=self.scaling_factor))


def _require_channels(what: str, channels: int, expected: int) -> None:
  if channels != expected:
    raise ValueError(
      f"{what} have {channels} channels along the last axis, but this"
      f" autoencoder takes {expected} (NHWC)"
    )


def build_vae(**arguments: Any) -> Vae:
  """Builds the autoencoder from its attributes, the dtype by name.

  Raises:
    ValueError: an unknown or missing argument, or a value out of range.
  """
  vae = build(Vae, arguments)
  for i, width in enumerate(vae.widths):
    require_multiple(f"widths[{i}]", width, "norm_groups", vae.norm_groups)
  return vae
