"""ResNet-50 as a frozen feature extractor on pixels (appendix A.5)."""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from drift_jax.drift.features import root_mean_square
from drift_jax.models.arguments import (
  DTYPES,
  reject_unknown,
  require_choice,
  require_colors,
  require_int,
)
from drift_jax.models.convnext import (
  normalize_colors,
  require_pixels,
  resize_input,
)
from drift_jax.models.layers import conv
from drift_jax.models.mae import Maps, single_blocks, stage_features

EXPANSION = 4  # a block's output channels, in those of its 3x3 convolution


# With the BatchNorm folded into it; see tools.conversions.
_conv = functools.partial(conv, use_bias=True)


class Bottleneck(nn.Module):
  """relu(x + conv(relu(conv(relu(conv(x)))))) of sizes 1, 3, 1.

  The stride is the 3x3 convolution's (torchvision's v1.5); x is projected if
  shapes differ. Shaped as the body of a scan over depth: the carry is x, and
  what is stacked is x as well.
  """

  channels: int
  stride: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self, x: Float[Array, "B H W C"]
  ) -> tuple[Float[Array, "B h w D"], Float[Array, "B h w D"]]:
    width = EXPANSION * self.channels
    out = nn.relu(_conv(self.channels, 1, self.dtype, "conv1")(x))
    out = _conv(self.channels, 3, self.dtype, "conv2", self.stride)(out)
    out = _conv(width, 1, self.dtype, "conv3")(nn.relu(out))
    if self.stride != 1 or x.shape[-1] != width:
      x = _conv(width, 1, self.dtype, "downsample", self.stride)(x)
    x = nn.relu(out + x)
    return x, x


class ResNet(nn.Module):
  """ResNet of bottlenecks without its head; build it with `build_resnet`.

  Many equal blocks are one scan with stacked parameters, see
  mae.single_blocks.

  Attributes:
    remat: recompute each block in the backward pass instead of storing what it
      computed.
  """

  layers: tuple[int, ...]
  base_channels: int
  image_mean: tuple[float, ...]
  image_std: tuple[float, ...]
  dtype: jnp.dtype
  remat: bool = False

  @property
  def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Of a call, just large enough: an image."""
    return (jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32),)

  @nn.compact
  def __call__(self, x: Float[ArrayLike, "B H W C"]) -> tuple[Maps, list[Maps]]:
    """Returns ([stem, stage 1, ..., stage 4], blocks of each stage).

    The stem is what enters stage 1: convolution, ReLU and max pooling, 56 x 56.

    Args:
      x: RGB pixels in [-1, 1], NHWC, of any size; resized to 224 x 224 by
        antialiased bilinear interpolation.

    Raises:
      ValueError: x is no RGB.
    """
    pixels = normalize_colors(
      require_pixels(x), self.image_mean, self.image_std
    )
    hidden = resize_input(pixels).astype(self.dtype)
    hidden = nn.relu(
      _conv(self.base_channels, 7, self.dtype, "stem", 2)(hidden)
    )
    # Nothing is below 0: padding with it changes no maximum.
    hidden = jnp.pad(hidden, ((0, 0), (1, 1), (1, 1), (0, 0)))
    hidden = nn.max_pool(hidden, (3, 3), (2, 2))
    block = scanned = Bottleneck
    if self.remat:
      block = nn.remat(Bottleneck)
      # The loop keeps XLA from merging what is recomputed and what was stored.
      scanned = nn.remat(Bottleneck, prevent_cse=False)
    outputs, blocks = [hidden], []
    for stage, count in enumerate(self.layers, start=1):
      channels = self.base_channels * 2 ** (stage - 1)
      blocks.append([])
      single = single_blocks(stage, count)  # in every stage the first differs
      for i in range(1, single + 1):
        stride = 2 if stage > 1 and i == 1 else 1
        name = f"stage{stage}_block{i}"
        hidden, _ = block(channels, stride, self.dtype, name=name)(hidden)
        blocks[-1].append(hidden)
      if count > single:
        hidden, stacked = nn.scan(
          scanned,
          variable_axes={"params": 0},
          split_rngs={"params": True},
          length=count - single,
        )(channels, 1, self.dtype, name=f"stage{stage}_blocks")(hidden)
        blocks[-1] += list(stacked)
      outputs.append(hidden)
    return outputs, blocks

  def pooled(self, x: Float[ArrayLike, "B H W C"]) -> Float[Array, "B D"]:
    """Spatial mean of the last stage, [B, 32 base_channels], float32."""
    outputs, _ = self(x)
    return jnp.mean(outputs[-1].astype(jnp.float32), axis=(1, 2))

  def features(
    self,
    x: Float[ArrayLike, "B H W C"],
    *,
    every_k_block: int | float = 2,
    patch_mean_size: Sequence[int] = (2, 4),
    patch_std_size: Sequence[int] = (2, 4),
    use_mean: bool = True,
    use_std: bool = True,
  ) -> dict[str, Float[Array, "B _ _"]]:
    """Feature vectors for the drifting loss, under an MAE's keys.

    Maps: `conv1` (the stem), `layerI_blkJ` (the output of every k-th block of
    stage I) and `layerI` (the stage's output), each with the statistics of
    `drift.features.pooled_features`. A stage ends in no normalisation: where k
    divides its number of blocks, its output comes under two keys and counts
    twice in the loss. Besides, `norm_x` is the root mean square per channel of
    x, before it is resized.

    Args:
      x: RGB pixels in [-1, 1], NHWC.
      every_k_block: k; math.inf for no block outputs.
      patch_mean_size, patch_std_size, use_mean, use_std: see
        `pooled_features`.

    Returns:
      Key -> [B, T, D] with T vectors of D channels. Maps and their means have
      the model's dtype, stds and `norm_x` are float32.

    Raises:
      ValueError: x is no RGB; every_k_block is below 1.
    """
    outputs, blocks = self(x)
    return {"norm_x": root_mean_square(jnp.asarray(x))} | stage_features(
      outputs,
      blocks,
      every_k_block=every_k_block,
      patch_mean_size=patch_mean_size,
      patch_std_size=patch_std_size,
      use_mean=use_mean,
      use_std=use_std,
    )


def build_resnet(
  *,
  layers: Sequence[int],
  base_channels: int,
  image_mean: Sequence[float],
  image_std: Sequence[float],
  dtype: str,
  **unknown: object,
) -> ResNet:
  """The ResNet encoders of arXiv:2602.04770 (MoCo-v2, SimCLR), frozen.

  BatchNorm has its running statistics and is part of the convolutions, which
  therefore have biases.

  Args:
    layers: number of blocks in each of the four stages; (3, 4, 6, 3) is
      ResNet-50.
    base_channels: of the stem and of the first stage's 3x3 convolutions, which
      double from stage to stage; a stage has four times as many outputs.
    image_mean: red, green and blue, of pixels in [0, 1].
    image_std: as image_mean; pixels less their mean are divided by it.
    dtype: of activations and products, 'float32' or 'bfloat16'; parameters
      are float32.

  Raises:
    ValueError: an unknown argument, or a value out of range.
  """
  reject_unknown(build_resnet, unknown)
  if len(layers) != 4:
    raise ValueError(
      f"layers={tuple(layers)}: must be 4 block counts, one for each stage"
    )
  for stage, count in enumerate(layers, start=1):
    require_int(f"layers (stage {stage})", count, 1)
  require_int("base_channels", base_channels, 1)
  require_choice("dtype", dtype, DTYPES)
  require_colors(image_mean, image_std)
  return ResNet(
    layers=tuple(layers),
    base_channels=base_channels,
    image_mean=tuple(float(x) for x in image_mean),
    image_std=tuple(float(x) for x in image_std),
    dtype=jnp.dtype(dtype),
  )
