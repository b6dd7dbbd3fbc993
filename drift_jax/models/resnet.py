"""ResNet-50 as a frozen feature extractor on pixels (appendix A.5)."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from drift_jax.drift.features import root_mean_square
from drift_jax.models.arguments import build
from drift_jax.models.convnext import (
  normalize_colors,
  require_pixels,
  resize_input,
)
from drift_jax.models.convolutions import conv
from drift_jax.models.stages import (
  Maps,
  run_stage,
  single_blocks,
  stage_features,
)

EXPANSION = 4  # a block's output channels, in those of its 3x3 convolution


# With bias: the BatchNorm is folded into it, see training.conversions.
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
  """The ResNet encoders of arXiv:2602.04770 (MoCo-v2, SimCLR), frozen.

  A ResNet of bottlenecks without its head. BatchNorm has its running statistics
  and is part of the convolutions, which therefore have biases. Many equal
  blocks are one scan with stacked parameters, see stages.single_blocks. Build
  it with `build_resnet`, which checks the arguments.

  Attributes:
    layers: number of blocks in each of the four stages; (3, 4, 6, 3) is
      ResNet-50.
    base_channels: of the stem and of the first stage's 3x3 convolutions, which
      double from stage to stage; a stage has four times as many outputs.
    image_mean: red, green and blue, of pixels in [0, 1].
    image_std: as image_mean; pixels less their mean are divided by it.
    dtype: of activations and products, 'float32' or 'bfloat16'; parameters
      are float32.
    remat: recompute each block in the backward pass instead of storing what it
      computed.
  """

  layers: tuple[int, ...]
  base_channels: int
  image_mean: tuple[float, ...]
  image_std: tuple[float, ...]
  dtype: jnp.dtype
  remat: bool = False

  # Smallest input of a call: an image.
  example_inputs = (jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32),)

  @nn.compact
  def __call__(self, x: Float[ArrayLike, "B H W C"]) -> tuple[Maps, list[Maps]]:
    """Returns ([stem, stage 1, ..., stage 4], blocks of each stage).

    The stem is the input of stage 1: convolution, ReLU and max pooling,
    56 x 56.

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
    # Nothing is below 0, so padding with 0 changes no maximum.
    hidden = jnp.pad(hidden, ((0, 0), (1, 1), (1, 1), (0, 0)))
    hidden = nn.max_pool(hidden, (3, 3), (2, 2))
    outputs, blocks = [hidden], []
    for stage, count in enumerate(self.layers, start=1):
      hidden, stage_blocks = run_stage(
        Bottleneck,
        hidden,
        stage,
        single=single_blocks(1, count),  # in every stage the first differs
        count=count,
        remat=self.remat,
        channels=self.base_channels * 2 ** (stage - 1),
        dtype=self.dtype,
      )
      blocks.append(stage_blocks)
      outputs.append(hidden)
    return outputs, blocks

  def pooled(self, x: Float[ArrayLike, "B H W C"]) -> Float[Array, "B D"]:
    """Spatial mean of the last stage, [B, 32 base_channels], float32."""
    outputs, _ = self(x)
    return jnp.mean(outputs[-1].astype(jnp.float32), axis=(1, 2))

  def features(
    self, x: Float[ArrayLike, "B H W C"], **options: Any
  ) -> dict[str, Float[Array, "B _ _"]]:
    """Feature vectors for the drifting loss, under an MAE's keys.

    Those of `stage_features`. A stage ends in no normalisation: if k divides
    its number of blocks, its output comes under two keys and counts twice in
    the loss. Besides, `norm_x` is the root mean square per channel of x,
    before it is resized.

    Args:
      x: RGB pixels in [-1, 1], NHWC.
      **options: every_k_block, patch_mean_size, patch_std_size, use_mean and
        use_std, see `stage_features`.

    Returns:
      Key -> [B, T, D] with T vectors of D channels. Maps and their means have
      the model's dtype, stds and `norm_x` are float32.

    Raises:
      ValueError: x is no RGB; every_k_block is below 1.
    """
    outputs, blocks = self(x)
    return {
      "norm_x": root_mean_square(jnp.asarray(x)),
      **stage_features(outputs, blocks, **options),
    }


def build_resnet(**arguments: Any) -> ResNet:
  """Builds a frozen ResNet encoder from its attributes, the dtype by name.

  Raises:
    ValueError: an unknown or missing argument, or a value out of range.
  """
  return build(ResNet, arguments, lengths={"layers": 4})
