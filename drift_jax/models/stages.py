"""Stages of residual blocks, and the feature vectors of their maps (A.5)."""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from drift_jax.drift.features import pooled_features

Maps = list[Float[Array, "B _ _ _"]]

# Of `pooled_features`; the paper's.
_POOLING = {
  "patch_mean_size": (2, 4),
  "patch_std_size": (2, 4),
  "use_mean": True,
  "use_std": True,
}


def single_blocks(different: int, count: int) -> int:
  """Returns how many of a stage's blocks stand alone; the rest is one scan.

  A TPU's compiler takes some ten seconds for each convolution, equal ones too.
  But a scan copies each block's output into a stack: if there are few equal
  blocks, that is, if maps are large, it costs more than it saves.

  Args:
    different: how many of the first blocks differ from the others, 0 or 1.
    count: of the stage's blocks.
  """
  return different if count - different >= 4 else count


def run_stage(
  block: type[nn.Module],
  x: Float[Array, "B H W C"],
  stage: int,
  *,
  single: int,
  count: int,
  remat: bool,
  **arguments: Any,
) -> tuple[Float[Array, "B h w D"], Maps]:
  """Runs a stage's blocks; returns its output and each block's.

  Args:
    block: takes `arguments` and a stride; x -> (output, output), as the body
      of a scan.
    x: the stage's input.
    stage: from 1; from 2 on the first block halves the resolution.
    single: how many blocks stand alone, under the names stageI_blockJ; the
      others are one scan with stacked parameters, stageI_blocks.
    count: of all blocks.
    remat: recompute each block in the backward pass.
    **arguments: of each block.
  """
  scanned = block
  if remat:
    # The loop keeps XLA from merging what is recomputed and what was stored.
    block, scanned = nn.remat(block), nn.remat(block, prevent_cse=False)
  outputs = []
  for i in range(1, single + 1):
    stride = 2 if stage > 1 and i == 1 else 1
    name = f"stage{stage}_block{i}"
    x, _ = block(stride=stride, **arguments, name=name)(x)
    outputs.append(x)
  if count > single:
    x, stacked = nn.scan(
      scanned,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=count - single,
    )(stride=1, **arguments, name=f"stage{stage}_blocks")(x)
    outputs += list(stacked)
  return x, outputs


def stage_features(
  outputs: Maps,
  blocks: Sequence[Maps],
  *,
  every_k_block: int | float = 2,
  **pooling: Any,
) -> dict[str, Float[Array, "B _ _"]]:
  """Feature vectors of the stem, of every k-th block and of each stage.

  Maps: `conv1` (the stem), `layerI_blkJ` (the output of every k-th block of
  stage I) and `layerI` (the stage's output), each with the statistics of
  `drift.features.pooled_features`.

  Args:
    outputs: stem, stage 1, ..., stage 4.
    blocks: of each stage.
    every_k_block: k; math.inf for no block outputs.
    **pooling: patch_mean_size, patch_std_size, use_mean, use_std of
      `pooled_features`; by default the paper's (2, 4), (2, 4), True, True.

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
    features |= pooled_features(feature_map, name, **(_POOLING | pooling))
  return features
