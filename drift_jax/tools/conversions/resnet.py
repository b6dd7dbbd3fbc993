"""MoCo-v2's and SimCLR's ResNet-50 under torchvision's names."""

import re
from typing import Any

import numpy as np
from flax import traverse_util

from drift_jax.models import release
from drift_jax.tools.conversions.layouts import (
  BATCH_NORM,
  COUNTER,
  Config,
  Converted,
  Weights,
  WeightsError,
  count_blocks,
  fold_batch_norm,
  torch_shape,
)

BATCH_NORM_EPSILON = 1e-5
IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]

_MOCO = "module.encoder_q."  # the encoder that was trained by gradients
# Of pretraining only: its slow copy and the queue of that one's outputs.
_MOCO_UNUSED = re.compile(r"module\.(encoder_k\..*|queue|queue_ptr)")
_HEAD = re.compile(r"fc\.(\d\.)?(weight|bias)")  # projections or classes


def convert_moco(weights: Weights, config: Config | None) -> Converted:
  """A checkpoint of MoCo-v2's pretraining -> kind 'resnet'.

  Args:
    weights: names with the prefix 'module.encoder_q.', or torchvision's bare
      ones; torch's layouts, any floating dtype. The projection head, the slow
      copy and the queue are left out.
    config: not looked at.

  Raises:
    WeightsError: names, shapes or values that do not fit.
  """
  del config
  prefix = _MOCO if any(name.startswith(_MOCO) for name in weights) else ""
  if prefix:
    weights = {
      k: v for k, v in weights.items() if not _MOCO_UNUSED.fullmatch(k)
    }
  return _convert("MoCo", weights, prefix, IMAGENET_MEAN, IMAGENET_STD)


def convert_simclr(weights: Weights, config: Config | None) -> Converted:
  """SimCLR's ResNet under torchvision's names -> kind 'resnet'.

  Its input is in [0, 1] without further normalisation.

  Args:
    weights: torch's layouts, any floating dtype; wider ones ('2x') have more
      base_channels. A head
      ('fc') is left out.
    config: not looked at.

  Raises:
    WeightsError: names, shapes or values that do not fit.
  """
  del config
  return _convert("SimCLR", weights, "", [0.0] * 3, [1.0] * 3)


def published_names(path: str, layers: list[int]) -> list[tuple[str, str]]:
  """Names of the convolutions and BatchNorms of a module here, block by block.

  Args:
    path: e.g. stem, stage1_block1/downsample, stage3_blocks/conv2.
    layers: blocks of each stage.
  """
  if path == "stem":
    return [("conv1", "bn1")]
  match = re.fullmatch(r"stage(\d)_block(s|\d+)/(conv(\d)|downsample)", path)
  assert match, path
  stage, block, part, number = match.groups()
  count = layers[int(stage) - 1]
  # A scan's blocks are those after the first one; see models.resnet.
  blocks = range(1, count) if block == "s" else [int(block) - 1]
  conv, norm = part, f"bn{number}"
  if part == "downsample":
    conv, norm = "downsample.0", "downsample.1"
  prefixes = [f"layer{stage}.{i}." for i in blocks]
  return [(prefix + conv, prefix + norm) for prefix in prefixes]


def published_shapes(
  shapes: dict[str, tuple[int, ...]], layers: list[int]
) -> dict[str, tuple[int, ...]]:
  """Names and shapes in torchvision's state dict of those here."""
  published = {}
  for path, shape in shapes.items():
    module, _, leaf = path.rpartition("/")
    for conv, norm in published_names(module, layers):
      if leaf == "kernel":
        published[f"{conv}.weight"] = torch_shape(shape[-4:])
      else:
        published |= {f"{norm}.{key}": shape[-1:] for key in BATCH_NORM}
  return published


def _convert(
  what: str,
  weights: Weights,
  prefix: str,
  image_mean: list[float],
  image_std: list[float],
) -> Converted:
  """Checks names and shapes, folds BatchNorm, and stacks equal blocks."""
  layers = [
    max(1, count_blocks(weights, f"{prefix}layer{stage}."))
    for stage in range(1, 5)
  ]
  stem = weights.get(f"{prefix}conv1.weight")
  if stem is None or stem.ndim != 4:
    raise WeightsError(
      f"these are not the weights of {what}'s ResNet: there is no convolution"
      f" {prefix}conv1.weight, but {sorted(weights)[:5]}"
    )
  model_config: dict[str, Any] = {
    "layers": layers,
    "base_channels": len(stem),
    "image_mean": list(image_mean),
    "image_std": list(image_std),
  }
  try:
    shapes = release.parameter_shapes("resnet", model_config)
    published = published_shapes(shapes, layers)
    release.require_parameters(
      f"these are not the weights of {what}'s ResNet of {layers} bottlenecks",
      {
        k: v
        for k, v in weights.items()
        if not _HEAD.fullmatch(k.removeprefix(prefix))
        and not k.endswith(COUNTER)
      },
      {prefix + name: shape for name, shape in published.items()},
    )
  except ValueError as error:
    raise WeightsError(str(error)) from error
  params = {}
  for path, shape in shapes.items():
    module, _, leaf = path.rpartition("/")
    if leaf == "kernel":
      folded = [
        fold_batch_norm(
          prefix + conv, prefix + norm, weights, BATCH_NORM_EPSILON
        )
        for conv, norm in published_names(module, layers)
      ]
      for name, arrays in zip(
        ("kernel", "bias"), zip(*folded, strict=True), strict=True
      ):
        stacked = len(shape) > 4
        params[f"{module}/{name}"] = np.stack(arrays) if stacked else arrays[0]
  return Converted(model_config, traverse_util.unflatten_dict(params, sep="/"))
