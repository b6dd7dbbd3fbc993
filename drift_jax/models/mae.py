"""The residual masked autoencoder whose encoder gives the features (A.3)."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from drift_jax.drift.features import pooled_features, root_mean_square
from drift_jax.models.arguments import (
  DTYPES,
  reject_unknown,
  require_choice,
  require_int,
)
from drift_jax.models.layers import GroupNorm, conv, patchify

Maps = list[Float[Array, "B _ _ _"]]


class MAEOutput(NamedTuple):
  """What one masked forward pass gives; h x w is the folded input's grid.

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


def single_blocks(stage: int, count: int) -> int:
  """How many of a stage's blocks stand alone; all others are one scan.

  A TPU's compiler takes some ten seconds for each convolution, equal ones too.
  But a scan copies each block's output into a stack: where there are few equal
  blocks, that is, where maps are large, it costs more than it saves.

  Args:
    stage: 0 to 3; from 1 on the first block differs from the others.
    count: of the stage's blocks.
  """
  different = min(stage, 1)
  return different if count - different >= 4 else count


class Encoder(nn.Module):
  """Stem and four stages of residual blocks, widths C, 2C, 4C, 8C.

  Stages 2 to 4 halve the resolution in their first block. Each stage ends in
  a GroupNorm whose output is the stage's feature and the next one's input.
  Many equal blocks are one scan with stacked parameters; see single_blocks.
  """

  base_channels: int
  layers: tuple[int, ...]
  dtype: jnp.dtype
  norm_groups: int
  remat: bool

  @nn.compact
  def __call__(self, x: Float[Array, "B H W C"]) -> tuple[Maps, list[Maps]]:
    """Returns ([stem, stage 1, ..., stage 4], blocks of each stage)."""
    block = scanned = ResidualBlock
    if self.remat:
      block = nn.remat(ResidualBlock)
      # The loop keeps XLA from merging what is recomputed and what was stored.
      scanned = nn.remat(ResidualBlock, prevent_cse=False)
    x = x.astype(self.dtype)
    x = conv(self.base_channels, 3, self.dtype, "stem_conv")(x)
    x = nn.relu(GroupNorm(self.dtype, self.norm_groups, name="stem_norm")(x))
    outputs, blocks = [x], []
    for stage, count in enumerate(self.layers):
      channels = self.base_channels * 2**stage
      rest = (self.dtype, self.norm_groups)
      blocks.append([])
      single = single_blocks(stage, count)
      for i in range(single):
        stride = 2 if stage > 0 and i == 0 else 1
        name = f"stage{stage + 1}_block{i + 1}"
        x, _ = block(channels, stride, *rest, name=name)(x)
        blocks[-1].append(x)
      if count > single:
        x, stacked = nn.scan(
          scanned,
          variable_axes={"params": 0},
          split_rngs={"params": True},
          length=count - single,
        )(channels, 1, *rest, name=f"stage{stage + 1}_blocks")(x)
        blocks[-1] += list(stacked)
      x = GroupNorm(
        self.dtype, self.norm_groups, name=f"stage{stage + 1}_norm"
      )(x)
      outputs.append(x)
    return outputs, blocks


def stage_features(
  outputs: Maps,
  blocks: Sequence[Maps],
  *,
  every_k_block: int | float,
  patch_mean_size: Sequence[int],
  patch_std_size: Sequence[int],
  use_mean: bool,
  use_std: bool,
) -> dict[str, Float[Array, "B _ _"]]:
  """Feature vectors of the stem, of every k-th block and of each stage.

  Args:
    outputs: stem, stage 1, ..., stage 4.
    blocks: of each stage.
    every_k_block: k; math.inf for no block outputs.
    patch_mean_size, patch_std_size, use_mean, use_std: see `pooled_features`.

  Raises:
    ValueError: every_k_block is below 1; a patch size below 1.
  """
  if every_k_block < 1:
    raise ValueError(
      f"every_k_block={every_k_block}: must be >= 1, or math.inf for no"
      " block outputs"
    )
  maps = {"conv1": outputs[0]}
  for stage, stage_blocks in enumerate(blocks, start=1):
    for i, block in enumerate(stage_blocks, start=1):
      if not math.isinf(every_k_block) and i % every_k_block == 0:
        maps[f"layer{stage}_blk{i}"] = block
    maps[f"layer{stage}"] = outputs[stage]
  features = {}
  for name, feature_map in maps.items():
    features |= pooled_features(
      feature_map,
      name,
      patch_mean_size=patch_mean_size,
      patch_std_size=patch_std_size,
      use_mean=use_mean,
      use_std=use_std,
    )
  return features


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
  """Masked autoencoder; build it with `build_mae`, which explains it.

  `mae.apply(variables, x, ...)` reconstructs and classifies a masked input;
  with method='features' or 'pooled' it encodes an unmasked one.
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
    """Of a call, just large enough: an image."""
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
    """The mask that a call without one draws of the same key.

    Raises:
      ValueError: as a call.
    """
    return self._draw_mask(self._fold(jnp.asarray(x)).shape[:3], mask_ratio)

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
    """Feature vectors of the unmasked input for the drifting loss.

    Maps: `conv1` (the stem), `layerI_blkJ` (the output of every k-th block of
    stage I) and `layerI` (the stage's normalised output), each with the
    statistics of `drift.features.pooled_features`. Besides, `norm_x` is the
    root mean square per channel of the folded input, and `global` the sample
    itself as one vector, float32.

    Args:
      x: latents, or pixels in [-1, 1]; NHWC.
      every_k_block: k; math.inf for no block outputs.
      patch_mean_size, patch_std_size, use_mean, use_std: see
        `pooled_features`.

    Returns:
      Key -> [B, T, D] with T vectors of D channels. Maps, their means and
      `norm_x` have the model's dtype, stds and `global` are float32.

    Raises:
      ValueError: x has a wrong shape; every_k_block is below 1.
    """
    x = jnp.asarray(x)
    folded = self._fold(x)
    outputs, blocks = self.encoder(folded)
    features = {
      "global": x.astype(jnp.float32).reshape(x.shape[0], 1, -1),
      "norm_x": root_mean_square(folded).astype(self.dtype),
    }
    return features | stage_features(
      outputs,
      blocks,
      every_k_block=every_k_block,
      patch_mean_size=patch_mean_size,
      patch_std_size=patch_std_size,
      use_mean=use_mean,
      use_std=use_std,
    )

  def pooled(self, x: Float[ArrayLike, "B H W C"]) -> Float[Array, "B D"]:
    """Spatial mean of the last stage's output, [B, 8 base_channels], float32.

    The feature space of the Frechet distance fd_encoder.
    """
    outputs, _ = self.encoder(self._fold(jnp.asarray(x)))
    return jnp.mean(outputs[-1].astype(jnp.float32), axis=(1, 2))

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
  over the hidden positions of the sample (0 where nothing is hidden).

  Args:
    output: of the masked forward pass.
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


def build_mae(
  *,
  in_channels: int,
  base_channels: int,
  layers: Sequence[int],
  input_patch_size: int,
  mask_patch_size: int,
  num_classes: int,
  norm_groups: int,
  dtype: str,
  remat: bool,
  **unknown: object,
) -> MAE:
  """The residual masked autoencoder of arXiv:2602.04770, appendix A.3.

  A ResNet with GroupNorm encodes the folded and masked input; a decoder with
  skips reconstructs it, and a linear head classifies the pooled code.

  Args:
    in_channels: channels of the input.
    base_channels: width C of stem and first stage; the others have 2C, 4C, 8C.
    layers: number of residual blocks in each of the four stages.
    input_patch_size: side of the pixel patches folded into channels before
      the stem; 1 for none.
    mask_patch_size: side of the patches hidden together, in folded cells.
    num_classes: labels are in [0, num_classes).
    norm_groups: groups of each GroupNorm, or fewer where they do not divide
      its channels; 32 in every published model. With one channel a group the
      means over a map are constants: keep it below base_channels.
    dtype: of activations and products, 'float32' or 'bfloat16'; parameters
      are float32.
    remat: recompute each residual block in the backward pass.

  Raises:
    ValueError: an unknown argument, or a value out of range.
  """
  reject_unknown(build_mae, unknown)
  for name, value in (
    ("in_channels", in_channels),
    ("base_channels", base_channels),
    ("input_patch_size", input_patch_size),
    ("mask_patch_size", mask_patch_size),
    ("num_classes", num_classes),
    ("norm_groups", norm_groups),
  ):
    require_int(name, value, 1)
  if len(layers) != 4:
    raise ValueError(
      f"layers={tuple(layers)}: must be 4 block counts, one for each stage"
    )
  for stage, count in enumerate(layers, start=1):
    require_int(f"layers (stage {stage})", count, 1)
  require_choice("dtype", dtype, DTYPES)
  return MAE(
    in_channels=in_channels,
    base_channels=base_channels,
    layers=tuple(layers),
    input_patch_size=input_patch_size,
    mask_patch_size=mask_patch_size,
    num_classes=num_classes,
    norm_groups=norm_groups,
    dtype=jnp.dtype(dtype),
    remat=remat,
  )
