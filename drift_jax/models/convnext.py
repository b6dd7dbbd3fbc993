"""ConvNeXt-V2 as a feature extractor on pixels (appendix A.5)."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from drift_jax.drift.features import pooled_features, root_mean_square
from drift_jax.models.arguments import build
from drift_jax.models.convolutions import LayerNorm
from drift_jax.models.layers import NORM_EPSILON

INPUT_SIZE = 224
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
STAGE_EPSILON = 1e-3
# Under square roots, whose gradient at 0 (a dead channel) is infinite.
SQUARE_FLOOR = 1e-12

_kernel_init = nn.initializers.truncated_normal(stddev=0.02)


def normalize_colors(
  x: Float[Array, "B H W 3"],
  mean: Sequence[float] = IMAGENET_MEAN,
  std: Sequence[float] = IMAGENET_STD,
) -> Float[Array, "B H W 3"]:
  """((x + 1) / 2 - mean) / std, unclipped; float32."""
  x = (x.astype(jnp.float32) + 1) / 2
  return (x - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def require_pixels(x: Float[ArrayLike, "..."]) -> Float[Array, "B H W 3"]:
  """Returns x; ValueError unless it is [B, H, W, 3]."""
  x = jnp.asarray(x)
  if x.ndim != 4 or x.shape[-1] != 3:
    raise ValueError(f"x has shape {x.shape}: needs RGB pixels [B, H, W, 3]")
  return x


def resize_input(x: Float[Array, "B H W C"]) -> Float[Array, "B S S C"]:
  """Bilinear resize to 224 x 224, antialiased if that shrinks x."""
  shape = (x.shape[0], INPUT_SIZE, INPUT_SIZE, x.shape[3])
  return jax.image.resize(x, shape, "bilinear", antialias=True)


def normalize_stage(x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
  """(x - mean) / (std + 1e-3), both over the channels; float32."""
  x = x.astype(jnp.float32)
  mean = jnp.mean(x, axis=-1, keepdims=True)
  variance = jnp.var(x, axis=-1, keepdims=True)
  std = jnp.sqrt(jnp.maximum(variance, SQUARE_FLOOR))
  return (x - mean) / (std + STAGE_EPSILON)


class GlobalResponseNorm(nn.Module):
  """gamma * (x * n) + beta + x, n = |x| / mean_c |x|, |x| over H and W."""

  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    shape = (1, 1, 1, x.shape[-1])
    gamma = self.param("gamma", nn.initializers.zeros, shape)
    beta = self.param("beta", nn.initializers.zeros, shape)
    x = x.astype(jnp.float32)
    square = jnp.sum(jnp.square(x), axis=(1, 2), keepdims=True)
    norm = jnp.sqrt(jnp.maximum(square, SQUARE_FLOOR))
    ratio = norm / (jnp.mean(norm, axis=-1, keepdims=True) + NORM_EPSILON)
    gamma, beta = gamma.astype(jnp.float32), beta.astype(jnp.float32)
    return (gamma * (x * ratio) + beta + x).astype(self.dtype)


class ConvNextBlock(nn.Module):
  """x + linear(GRN(gelu(linear(LN(7x7 depthwise convolution(x)))))).

  Shaped as the body of a scan over a stage's depth: the carry is x, there is
  no per-block output.
  """

  width: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self, x: Float[Array, "B H W C"]
  ) -> tuple[Float[Array, "B H W C"], None]:
    out = nn.Conv(
      self.width,
      (7, 7),
      padding=((3, 3), (3, 3)),
      feature_group_count=self.width,
      kernel_init=_kernel_init,
      dtype=self.dtype,
      name="depthwise",
    )(x)
    out = LayerNorm(self.dtype, name="norm")(out)
    out = nn.Dense(
      4 * self.width, kernel_init=_kernel_init, dtype=self.dtype, name="expand"
    )(out)
    out = nn.gelu(out, approximate=False)
    out = GlobalResponseNorm(self.dtype, name="response_norm")(out)
    out = nn.Dense(
      self.width, kernel_init=_kernel_init, dtype=self.dtype, name="project"
    )(out)
    return x + out, None


class ConvNext(nn.Module):
  """The ConvNeXt-V2 encoder of arXiv:2602.04770, appendix A.5; without head.

  A stage's blocks are one scan with stacked parameters. Build it with
  `build_convnext`, which checks the arguments.

  Attributes:
    depths: number of blocks in each of the four stages.
    widths: channels of each stage.
    dtype: of activations and products, 'float32' or 'bfloat16'; parameters
      are float32.
    remat: recompute each block in the backward pass instead of storing what it
      computed.
  """

  depths: tuple[int, ...]
  widths: tuple[int, ...]
  dtype: jnp.dtype
  remat: bool = False

  # Smallest input of a call: an image.
  example_inputs = (jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32),)

  @nn.compact
  def __call__(
    self, x: Float[ArrayLike, "B H W C"]
  ) -> tuple[list[Float[Array, "B _ _ _"]], Float[Array, "B D"]]:
    """Maps of the four stages and the LayerNorm of the last one's mean.

    Args:
      x: RGB pixels in [-1, 1], NHWC, of any size; resized to 224 x 224 by
        antialiased bilinear interpolation.

    Returns:
      ([B, 56, 56, widths[0]], ..., [B, 7, 7, widths[3]]) in the model's
      dtype, and [B, widths[3]] in float32.

    Raises:
      ValueError: x is no RGB.
    """
    hidden = resize_input(normalize_colors(require_pixels(x)))
    hidden = hidden.astype(self.dtype)
    block = ConvNextBlock
    if self.remat:
      block = nn.remat(block, prevent_cse=False)  # the loop prevents it
    maps = []
    for stage, (depth, width) in enumerate(
      zip(self.depths, self.widths, strict=True), start=1
    ):
      norm = LayerNorm(self.dtype, name=f"stage{stage}_down_norm")
      size = 4 if stage == 1 else 2
      down = nn.Conv(
        width,
        (size, size),
        strides=(size, size),
        padding="VALID",
        kernel_init=_kernel_init,
        dtype=self.dtype,
        name=f"stage{stage}_down_conv",
      )
      hidden = norm(down(hidden)) if stage == 1 else down(norm(hidden))
      hidden, _ = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=depth,
      )(width, self.dtype, name=f"stage{stage}_blocks")(hidden)
      maps.append(hidden)
    pooled = jnp.mean(hidden.astype(jnp.float32), axis=(1, 2))
    return maps, LayerNorm(jnp.dtype(jnp.float32), name="norm")(pooled)

  def pooled(self, x: Float[ArrayLike, "B H W C"]) -> Float[Array, "B D"]:
    """LayerNorm of the spatial mean of the last stage, float32."""
    return self(x)[1]

  def features(
    self, x: Float[ArrayLike, "B H W C"], *, input_scale: bool = False
  ) -> dict[str, Float[Array, "B _ _"]]:
    """Feature vectors for the drifting loss, to be joined with an MAE's.

    Each stage's map is normalised over its channels, (x - mean) / (std +
    1e-3). Stage 0 gives its spatial mean and std, the others the map too, as
    `convenxt_stage_I`, `..._mean` and `..._std` (the published spelling).
    `global_mean` is the LayerNorm of the pooled last stage. `global_std` is
    that stage's std again, which thus counts twice in the loss.

    Args:
      x: RGB pixels in [-1, 1], NHWC.
      input_scale: adds `norm_x`, the root mean square per channel of x. An
        MAE has a key of that name too.

    Returns:
      Key -> [B, T, D]; maps and their means in the model's dtype, the rest
      float32.
    """
    x = jnp.asarray(x)
    maps, pooled = self(x)
    features = {}
    for stage, feature_map in enumerate(maps):
      name = f"convenxt_stage_{stage}"
      features |= pooled_features(
        normalize_stage(feature_map).astype(self.dtype),
        name,
        patch_mean_size=(),
        patch_std_size=(),
        use_mean=True,
        use_std=True,
      )
    del features["convenxt_stage_0"]
    features["global_mean"] = pooled[:, None]
    features["global_std"] = features["convenxt_stage_3_std"]
    if input_scale:
      features["norm_x"] = root_mean_square(x)
    return features


def build_convnext(**arguments: Any) -> ConvNext:
  """Builds a ConvNeXt-V2 encoder from its attributes, the dtype by name.

  Raises:
    ValueError: an unknown or missing argument, or a value out of range.
  """
  return build(ConvNext, arguments, lengths={"depths": 4, "widths": 4})
