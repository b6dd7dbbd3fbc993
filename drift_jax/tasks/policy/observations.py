"""Observations as one vector: states as they are, images encoded."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, Shaped

from drift_jax.models.convolutions import GroupNorm, conv

# ResNet-18: basic blocks of these channels, two of each.
_STAGES = (64, 128, 256, 512)
_BLOCKS = 2
# Channels of a group norm. Batch norm would mix the observations of a batch and
# differ between training and acting.
_GROUP_CHANNELS = 16


def crop_offsets(
  key: Array, count: int, size: int, crop: int
) -> Int[Array, "{count} 2"]:
  """Rows and columns of random crops' upper left corners, uniform.

  Args:
    key: of the draw.
    count: of crops.
    size: side of the images.
    crop: side of the crops; any place inside of an image is as likely.
  """
  return jax.random.randint(key, (count, 2), 0, size - crop + 1, jnp.int32)


def spatial_softmax(maps: Float[Array, "B H W K"]) -> Float[Array, "B 2*K"]:
  """Expected column and row of each map's softmax, in [-1, 1], float32.

  [x_1, y_1, x_2, ...]: the centres of the first and last column are at -1 and
  1, and so are those of the first and last row.
  """
  batch, rows, columns, channels = maps.shape
  logits = maps.astype(jnp.float32).reshape(batch, -1, channels)
  masses = nn.softmax(logits, axis=1).reshape(maps.shape)
  x = jnp.einsum("bhwk,w->bk", masses, jnp.linspace(-1.0, 1.0, columns))
  y = jnp.einsum("bhwk,h->bk", masses, jnp.linspace(-1.0, 1.0, rows))
  return jnp.stack([x, y], axis=-1).reshape(batch, 2 * channels)


def _norm(channels: int, dtype: jnp.dtype, name: str) -> GroupNorm:
  return GroupNorm(dtype, channels // _GROUP_CHANNELS, name=name)


class _BasicBlock(nn.Module):
  """relu(x + norm(conv(relu(norm(conv(x)))))), 3 x 3; x projected if needed."""

  channels: int
  stride: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
    channels, dtype = self.channels, self.dtype
    out = conv(channels, 3, dtype, "conv1", self.stride)(x)
    out = nn.relu(_norm(channels, dtype, "norm1")(out))
    out = conv(channels, 3, dtype, "conv2")(out)
    out = _norm(channels, dtype, "norm2")(out)
    if self.stride != 1 or x.shape[-1] != channels:
      x = conv(channels, 1, dtype, "downsample", self.stride)(x)
      x = _norm(channels, dtype, "downsample_norm")(x)
    return nn.relu(x + out)


class ImageEncoder(nn.Module):
  """ResNet-18's keypoints, as vectors.

  The network ends in maps of 1/32 of the side; their spatial softmax gives the
  places of things.

  Attributes:
    keypoints: maps whose expected coordinates are taken.
    features: of the result.
    dtype: of activations and products.
  """

  keypoints: int
  features: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Float[Array, "B H W 3"]) -> Float[Array, "B F"]:
    """Returns float32.

    Args:
      x: RGB in [-1, 1].
    """
    hidden = conv(_STAGES[0], 7, self.dtype, "stem", 2)(x.astype(self.dtype))
    hidden = nn.relu(_norm(_STAGES[0], self.dtype, "stem_norm")(hidden))
    # Nothing is below 0: padding with it changes no maximum.
    hidden = jnp.pad(hidden, ((0, 0), (1, 1), (1, 1), (0, 0)))
    hidden = nn.max_pool(hidden, (3, 3), (2, 2))
    for stage, channels in enumerate(_STAGES, start=1):
      for i in range(1, _BLOCKS + 1):
        stride = 2 if stage > 1 and i == 1 else 1
        hidden = _BasicBlock(
          channels, stride, self.dtype, name=f"stage{stage}_block{i}"
        )(hidden)
    maps = nn.Conv(self.keypoints, (1, 1), dtype=self.dtype, name="keypoints")
    points = spatial_softmax(maps(hidden))
    return nn.Dense(self.features, name="output")(points)


class ObservationEncoder(nn.Module):
  """Observations of To steps -> a condition of To * F numbers.

  F is the vectors' sizes and `image_features` for each of the images; what
  belongs to a step stands together. Each image has its own network.

  Attributes:
    vectors: names of observations that are vectors, in this order.
    images: names of observations that are images.
    crop: side of the part of an image that is used; 0: all of it.
    keypoints: see ImageEncoder.
    image_features: of each image.
    dtype: of the images' networks.
  """

  vectors: tuple[str, ...]
  images: tuple[str, ...] = ()
  crop: int = 0
  keypoints: int = 32
  image_features: int = 64
  dtype: jnp.dtype = jnp.dtype(jnp.float32)

  @nn.compact
  def __call__(
    self,
    observations: Mapping[str, Shaped[ArrayLike, "B T ..."]],
    offsets: Int[ArrayLike, "B 2"] | None = None,
  ) -> Float[Array, "B C"]:
    """Returns float32.

    Args:
      observations: by name: normalised vectors [B, To, D] or square uint8
        images [B, To, H, W, 3]; other names are ignored.
      offsets: rows and columns of the crops, see crop_offsets, alike for all
        steps and images of an observation; None: the centre.

    Raises:
      ValueError: missing names, images that are no square ones of uint8.
    """
    missing = {*self.vectors, *self.images} - set(observations)
    if missing:
      there = sorted(observations)
      raise ValueError(f"{sorted(missing)} are missing: there are {there}")
    parts = [
      jnp.asarray(observations[name], jnp.float32) for name in self.vectors
    ]
    for name in self.images:
      pixels = jnp.asarray(observations[name])
      batch, steps, height, width, channels = pixels.shape
      if height != width or channels != 3 or pixels.dtype != jnp.uint8:
        raise ValueError(
          f"observation {name!r} is {pixels.dtype} {pixels.shape}, want square "
          "uint8 images [B, To, H, H, 3]"
        )
      if self.crop:
        pixels = _cropped(pixels, self.crop, offsets)
      encoder = ImageEncoder(
        self.keypoints, self.image_features, self.dtype, name=f"image_{name}"
      )
      flat = pixels.reshape(-1, *pixels.shape[2:])
      features = encoder(flat.astype(jnp.float32) / 127.5 - 1.0)
      parts.append(features.reshape(batch, steps, -1))
    return jnp.concatenate(parts, axis=-1).reshape(len(parts[0]), -1)


def _cropped(
  pixels: Shaped[Array, "B T H H 3"],
  crop: int,
  offsets: Int[ArrayLike, "B 2"] | None,
) -> Shaped[Array, "B T h h 3"]:
  if offsets is None:
    start = (pixels.shape[2] - crop) // 2
    return pixels[:, :, start : start + crop, start : start + crop]

  def cut(image: Array, corner: Array) -> Array:
    start, size = (0, *corner, 0), (len(image), crop, crop, 3)
    return jax.lax.dynamic_slice(image, start, size)

  return jax.vmap(cut)(pixels, jnp.asarray(offsets))
