"""The residual masked autoencoder whose encoder gives the features (A.3)."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from drift_jax.drift.features import root_mean_square
from drift_jax.models.arguments import build
from drift_jax.models.convolutions import GroupNorm, conv
from drift_jax.models.layers import patchify
from drift_jax.models.stages import (
  Maps,
  run_stage,
  single_blocks,
  stage_features,
)


class MAEOutput(NamedTuple):
  """Result of a masked forward pass; h x w is the folded input's grid.

  Attributes:
    recon: reconstruction of the folded input, float32.
    logits: class logits from the masked input, float32.
    mask: 1 where the input was hidden, 0 where it was seen, float32.
    target: the folded input itself, float32.
  """

  recon: Float[Array, "B h w C"]
  logits: Float[Array, "B K"]
  mask: Float[Array, "B h w 1"]
  target: Float[Array, "B h w C"]


class ConvNormRelu(nn.Module):
  """relu(GroupNorm(3x3 convolution))."""

  channels: int
  dtype: jnp.dtype
  norm_groups: int

  @nn.compact
  def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
    x = conv(self.channels, 3, self.dtype, "conv")(x)
    return nn.relu(GroupNorm(self.dtype, self.norm_groups, name="norm")(x))


class ResidualBlock(nn.Module):
  """relu(x + GN(conv(relu(GN(conv(x)))))); x is projected if shapes differ.

  Shaped as the body of a scan over depth: the carry is x, and what is stacked
  is x as well.
  """

  channels: int
  stride: int
  dtype: jnp.dtype
  norm_groups: int

  @nn.compact
  def __call__(
    self, x: Float[Array, "B H W C"]
  ) -> tuple[Float[Array, "B h w D"], Float[Array, "B h w D"]]:
    out = conv(self.channels, 3, self.dtype, "conv1", self.stride)(x)
    out = nn.relu(GroupNorm(self.dtype, self.norm_groups, name="norm1")(out))
    out = conv(self.channels, 3, self.dtype, "conv2")(out)
    out = GroupNorm(self.dtype, self.norm_groups, name="norm2")(out)
    if self.stride != 1 or x.shape[-1] != self.channels:
      x = conv(self.channels, 1, self.dtype, "proj_conv", self.stride)(x)
      x = GroupNorm(self.dtype, self.norm_groups, name="proj_norm")(x)
    x = nn.relu(out + x)
    return x, x


class Encoder(nn.Module):
  """Stem and four stages of residual blocks, widths C, 2C, 4C, 8C.

  Stages 2 to 4 halve the resolution in their first block. Each stage ends in
  a GroupNorm whose output is the stage's feature and the next one's input.
  Many equal blocks are one scan with stacked parameters, see
  stages.single_blocks.
  """

  base_channels: int
  layers: tuple[int, ...]
  dtype: jnp.dtype
  norm_groups: int
  remat: bool

  @nn.compact
  def __call__(self, x: Float[Array, "B H W C"]) -> tuple[Maps, list[Maps]]:
    """Returns ([stem, stage 1, ..., stage 4], blocks of each stage)."""
    x = x.astype(self.dtype)
    x = conv(self.base_channels, 3, self.dtype, "stem_conv")(x)
    x = nn.relu(GroupNorm(self.dtype, self.norm_groups, name="stem_norm")(x))
    outputs, blocks = [x], []
    for stage, count in enumerate(self.layers, start=1):
      x, stage_blocks = run_stage(
        ResidualBlock,
        x,
        stage,
        single=single_blocks(min(stage - 1, 1), count),
        count=count,
        remat=self.remat,
        channels=self.base_channels * 2 ** (stage - 1),
        dtype=self.dtype,
        norm_groups=self.norm_groups,
      )
      blocks.append(stage_blocks)
      norm = f"stage{stage}_norm"
      x = GroupNorm(self.dtype, self.norm_groups, name=norm)(x)
      outputs.append(x)
    return outputs, blocks


class UpBlock(nn.Module):
  """Resizes x to the skip's size, joins them, and convolves twice."""

  channels: int
  dtype: jnp.dtype
  norm_groups: int

  @nn.compact
  def __call__(
    self, x: Float[Array, "B h w D"], skip: Float[Array, "B H W C"]
  ) -> Float[Array, "B H W F"]:
    batch, height, width, _ = skip.shape
    x = jax.image.resize(x, (batch, height, width, x.shape[-1]), "bilinear")
    x = jnp.concatenate([x, skip], axis=-1)
    x = GroupNorm(self.dtype, self.norm_groups, name="norm")(x)
    x = ConvNormRelu(self.channels, self.dtype, self.norm_groups, name="proj")(
      x
    )
    return ConvNormRelu(
      self.channels, self.dtype, self.norm_groups, name="refine"
    )(x)


class Decoder(nn.Module):
  """From the encoder's five outputs back to the folded input, float32."""

  base_channels: int
  out_channels: int
  dtype: jnp.dtype
  norm_groups: int

  @nn.compact
  def __call__(self, outputs: Maps) -> Float[Array, "B H W C"]:
    *skips, x = outputs
    x = ConvNormRelu(x.shape[-1], self.dtype, self.norm_groups, name="bridge")(
      x
    )
    for level in (4, 3, 2, 1):
      skip = skips[level - 1]
      x = UpBlock(
        skip.shape[-1], self.dtype, self.norm_groups, name=f"up{level}"
      )(x, skip)
    x = nn.Conv(self.out_channels, (1, 1), dtype=self.dtype, name="head")(x)
    return x.astype(jnp.float32)


class MAE(nn.Module):
  """The residual masked autoencoder of arXiv:2602.04770, appendix A.3.

  A ResNet with GroupNorm encodes the folded and masked input; a decoder with
  skips reconstructs it, and a linear head classifies the pooled code. Build it
  with `build_mae`, which checks the arguments.

  `mae.apply(variables, x, ...)` reconstructs and classifies a masked input;
  with method='features' or 'pooled' it encodes an unmasked one, with 'classify'
  it classifies one too.

  Attributes:
    in_channels: channels of the input.
    base_channels: width C of stem and first stage; the others have 2C, 4C, 8C.
    layers: number of residual blocks in each of the four stages.
    input_patch_size: side of the pixel patches folded into channels before
      the stem; 1 for none.
    mask_patch_size: side of the patches hidden together, in folded cells.
    num_classes: labels are in [0, num_classes).
    norm_groups: groups of each GroupNorm, or fewer if they do not divide its
      channels; 32 in every published model. With one channel a group the means
      over a map are constants: keep it below base_channels.
    dtype: of activations and products, 'float32' or 'bfloat16'; parameters
      are float32.
    remat: recompute each residual block in the backward pass.
  """

  in_channels: int
  base_channels: int
  layers: tuple[int, ...]
  input_patch_size: int
  mask_patch_size: int
  num_classes: int
  norm_groups: int
  dtype: jnp.dtype
  remat: bool

  @property
  def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Smallest input of a call: an image."""
    side = self.input_patch_size * self.mask_patch_size
    shape = (1, side, side, self.in_channels)
    return (jax.ShapeDtypeStruct(shape, jnp.float32),)

  def setup(self) -> None:
    self.encoder = Encoder(
      self.base_channels,
      self.layers,
      self.dtype,
      self.norm_groups,
      self.remat,
    )
    self.decoder = Decoder(
      self.base_channels,
      self.in_channels * self.input_patch_size**2,
      self.dtype,
      self.norm_groups,
    )
    self.classifier = nn.Dense(self.num_classes, dtype=jnp.float32)

  def __call__(
    self,
    x: Float[ArrayLike, "B H W C"],
    mask: Float[ArrayLike, "B h w 1"] | None = None,
    mask_ratio: Float[ArrayLike, ""] | float = 0.5,
  ) -> MAEOutput:
    """Hides part of x, then reconstructs and classifies it.

    Args:
      x: latents, or pixels in [-1, 1]; NHWC.
      mask: 1 = hidden, on the grid of the folded input. Without it, each
        patch of mask_patch_size^2 cells is hidden independently with
        probability mask_ratio, drawn from rngs={'mask': key}.
      mask_ratio: unused when a mask is given; may be traced.

    Raises:
      ValueError: x or mask has a wrong shape; neither a mask nor the random
        stream 'mask' was given.
    """
    target = self._fold(jnp.asarray(x)).astype(jnp.float32)
    grid = target.shape[:3]
    if mask is None:
      mask = self._draw_mask(grid, mask_ratio)
    mask = jnp.asarray(mask).astype(jnp.float32)
    if mask.shape != (*grid, 1):
      raise ValueError(
        f"mask has shape {mask.shape}: the folded input needs {(*grid, 1)}"
      )
    outputs, _ = self.encoder(target * (1 - mask))
    pooled = jnp.mean(outputs[-1].astype(jnp.float32), axis=(1, 2))
    return MAEOutput(
      self.decoder(outputs), self.classifier(pooled), mask, target
    )

  def draw_mask(
    self,
    x: Float[ArrayLike, "B H W C"],
    mask_ratio: Float[ArrayLike, ""] | float = 0.5,
  ) -> Float[Array, "B h w 1"]:
    """The mask that a call without one draws from the same key.

    Raises:
      ValueError: as a call.
    """
    return self._draw_mask(self._fold(jnp.asarray(x)).shape[:3], mask_ratio)

  def features(
    self, x: Float[ArrayLike, "B H W C"], **options: Any
  ) -> dict[str, Float[Array, "B _ _"]]:
    """Feature vectors of the unmasked input for the drifting loss.

    Those of `stage_features`; a stage's output is its normalised one. Besides,
    `norm_x` is the root mean square per channel of the folded input, and
    `global` the sample itself as one vector, float32.

    Args:
      x: latents, or pixels in [-1, 1]; NHWC.
      **options: every_k_block, patch_mean_size, patch_std_size, use_mean and
        use_std, see `stage_features`.

    Returns:
      Key -> [B, T, D] with T vectors of D channels. Maps, their means and
      `norm_x` have the model's dtype, stds and `global` are float32.

    Raises:
      ValueError: x has a wrong shape; every_k_block is below 1.
    """
    x = jnp.asarray(x)
    folded = self._fold(x)
    outputs, blocks = self.encoder(folded)
    return {
      "global": x.astype(jnp.float32).reshape(x.shape[0], 1, -1),
      "norm_x": root_mean_square(folded).astype(self.dtype),
      **stage_features(outputs, blocks, **options),
    }

  def pooled(self, x: Float[ArrayLike, "B H W C"]) -> Float[Array, "B D"]:
    """Spatial mean of the last stage's output, [B, 8 base_channels], float32.

    The feature space of the Frechet distance fd_encoder.
    """
    outputs, _ = self.encoder(self._fold(jnp.asarray(x)))
    return jnp.mean(outputs[-1].astype(jnp.float32), axis=(1, 2))

  def classify(
    self, x: Float[ArrayLike, "B H W C"]
  ) -> tuple[Float[Array, "B D"], Float[Array, "B K"]]:
    """`pooled` of the unmasked input, and the class logits of it."""
    pooled = self.pooled(x)
    return pooled, self.classifier(pooled)

  def _fold(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
    _, height, width, channels = x.shape
    patch = self.input_patch_size
    if channels != self.in_channels or height % patch or width % patch:
      raise ValueError(
        f"x has shape {x.shape}: needs in_channels={self.in_channels} and"
        f" sides that are multiples of input_patch_size={patch}"
      )
    return patchify(x, self.input_patch_size)

  def _draw_mask(
    self,
    grid: tuple[int, ...],
    mask_ratio: Float[ArrayLike, ""] | float,
  ) -> Float[Array, "B h w 1"]:
    if not (self.has_rng("mask") or self.is_initializing()):
      raise ValueError(
        "the autoencoder needs a mask: pass mask=, or rngs={'mask': key} to"
        " draw one"
      )
    batch, height, width = grid
    size = self.mask_patch_size
    if height % size or width % size:
      raise ValueError(
        f"the folded input is {height} x {width}: its sides must be multiples"
        f" of mask_patch_size={size} to draw a mask"
      )
    hidden = jax.random.bernoulli(
      self.make_rng("mask"), mask_ratio, (batch, height // size, width // size)
    )
    hidden = jnp.repeat(jnp.repeat(hidden, size, axis=1), size, axis=2)
    return hidden[..., None].astype(jnp.float32)


def mae_loss(
  output: MAEOutput,
  labels: Int[ArrayLike, " B"],
  lam: Float[ArrayLike, ""] | float,
) -> dict[str, Float[Array, " B"]]:
  """lam * cross-entropy + (1 - lam) * reconstruction error, per sample.

  The reconstruction error is the squared error summed over channels, averaged
  over the hidden positions of the sample (0 if nothing is hidden).

  Args:
    output: result of the masked forward pass.
    labels: class indices in [0, num_classes).
    lam: weight of the classification in [0, 1]; may be traced.

  Returns:
    `loss`, `cls_loss`, `recon_loss`, `accuracy` (0 or 1) and `mask_ratio`
    (the hidden share of positions), each [B], float32.
  """
  labels = jnp.asarray(labels)
  lam = jnp.asarray(lam, jnp.float32)
  log_probs = jax.nn.log_softmax(output.logits)
  cls_loss = -jnp.take_along_axis(log_probs, labels[:, None], axis=1)[:, 0]
  error = jnp.sum(jnp.square(output.recon - output.target), axis=-1)
  mask = output.mask[..., 0]
  hidden = jnp.sum(mask, axis=(1, 2))
  recon_loss = jnp.sum(error * mask, axis=(1, 2)) / jnp.maximum(hidden, 1)
  correct = jnp.argmax(output.logits, axis=-1) == labels
  return {
    "loss": lam * cls_loss + (1 - lam) * recon_loss,
    "cls_loss": cls_loss,
    "recon_loss": recon_loss,
    "accuracy": correct.astype(jnp.float32),
    "mask_ratio": jnp.mean(mask, axis=(1, 2)),
  }


def build_mae(**arguments: Any) -> MAE:
  """Builds the autoencoder from its attributes, the dtype by name.

  Raises:
    ValueError: an unknown or missing argument, or a value out of range.
  """
  return build(MAE, arguments, lengths={"layers": 4})
