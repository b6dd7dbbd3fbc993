"""ConvNeXt-V2 under timm's, its authors' and transformers' names."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from drift_jax.models import release
from drift_jax.tools.conversions.layouts import (
  Config,
  Converted,
  Weights,
  WeightsError,
  count_blocks,
  jax_layout,
  torch_shape,
)

_STAGES = 4
_RESPONSE = "/response_norm/"
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


class Naming(NamedTuple):
  """Published names of what is here.

  Attributes:
    whose: them.
    stem: the two modules before stage 1, convolution and norm.
    down: the two before another stage, norm and convolution.
    blocks: prefix of a stage's blocks; both count from 0.
    parts: modules of a block.
    gamma, beta: of a GlobalResponseNorm.
    flat: whether these two are vectors, or [1, 1, 1, C].
    norm: the last one.
    head: the module that is left out.
  """

  whose: str
  stem: tuple[str, str]
  down: tuple[str, str]
  blocks: str
  parts: Mapping[str, str]
  gamma: str
  beta: str
  flat: bool
  norm: str
  head: str

  def of(self, path: str, depths: list[int]) -> list[str]:
    """A parameter's name, or one for each block; e.g. of norm/scale."""
    module, _, leaf = path.rpartition("/")
    if module == "norm":
      return [f"{self.norm}.{_LEAVES[leaf]}"]
    match = re.fullmatch(
      r"stage(\d)_(down_norm|down_conv|blocks/(\w+))", module
    )
    assert match, path
    stage = int(match[1]) - 1
    if part := match[3]:
      response = {"gamma": self.gamma, "beta": self.beta}
      name = f"{self.parts[part]}.{(_LEAVES | response)[leaf]}"
      return [
        f"{self.blocks.format(stage=stage)}{i}.{name}"
        for i in range(depths[stage])
      ]
    conv, norm = self.stem if stage == 0 else self.down[::-1]
    name = (norm if match[2] == "down_norm" else conv).format(stage=stage)
    return [f"{name}.{_LEAVES[leaf]}"]


FACEBOOK = Naming(
  whose="facebookresearch/ConvNeXt-V2",
  stem=("downsample_layers.0.0", "downsample_layers.0.1"),
  down=("downsample_layers.{stage}.0", "downsample_layers.{stage}.1"),
  blocks="stages.{stage}.",
  parts={
    "depthwise": "dwconv",
    "norm": "norm",
    "expand": "pwconv1",
    "response_norm": "grn",
    "project": "pwconv2",
  },
  gamma="gamma",
  beta="beta",
  flat=False,
  norm="norm",
  head="head",
)
TIMM = Naming(
  whose="timm",
  stem=("stem.0", "stem.1"),
  down=("stages.{stage}.downsample.0", "stages.{stage}.downsample.1"),
  blocks="stages.{stage}.blocks.",
  parts={
    "depthwise": "conv_dw",
    "norm": "norm",
    "expand": "mlp.fc1",
    "response_norm": "mlp.grn",
    "project": "mlp.fc2",
  },
  gamma="weight",
  beta="bias",
  flat=True,
  norm="head.norm",
  head="head.fc",
)
TRANSFORMERS = Naming(
  whose="transformers",
  stem=("embeddings.patch_embeddings", "embeddings.layernorm"),
  down=(
    "encoder.stages.{stage}.downsampling_layer.0",
    "encoder.stages.{stage}.downsampling_layer.1",
  ),
  blocks="encoder.stages.{stage}.layers.",
  parts={
    "depthwise": "dwconv",
    "norm": "layernorm",
    "expand": "pwconv1",
    "response_norm": "grn",
    "project": "pwconv2",
  },
  gamma="weight",
  beta="bias",
  flat=False,
  norm="layernorm",
  head="classifier",
)
NAMINGS = (FACEBOOK, TIMM, TRANSFORMERS)
_CLASSIFIERS = "convnextv2."  # before the encoder's names in one


def convert_convnext(weights: Weights, config: Config | None) -> Converted:
  """ConvNeXt-V2 of any size, without its head -> kind 'convnext'.

  Args:
    weights: names of timm, of facebookresearch/ConvNeXt-V2, or of
      transformers' ConvNextV2Model and -ForImageClassification; torch's
      layouts, any floating dtype. They tell the depths and widths.
    config: not looked at.

  Raises:
    WeightsError: names, shapes or values that do not fit.
  """
  del config
  prefix = (
    _CLASSIFIERS if any(k.startswith(_CLASSIFIERS) for k in weights) else ""
  )
  found = [n for n in NAMINGS if f"{prefix}{n.stem[0]}.weight" in weights]
  if not found:
    stems = [f"{naming.stem[0]}.weight ({naming.whose})" for naming in NAMINGS]
    raise WeightsError(
      "these are not the weights of a ConvNeXt-V2: it has one of"
      f" {', '.join(stems)}, but there are {sorted(weights)[:5]}"
    )
  naming = found[0]
  what = f"these are not the weights of a ConvNeXt-V2 as {naming.whose} has it"
  weights = {
    k.removeprefix(prefix): _as_linear(v)
    for k, v in weights.items()
    if k not in (f"{naming.head}.weight", f"{naming.head}.bias")
  }
  depths = [
    max(1, count_blocks(weights, naming.blocks.format(stage=stage)))
    for stage in range(_STAGES)
  ]
  convs = [
    naming.of(f"stage{stage}_down_conv/kernel", depths)[0]
    for stage in range(1, _STAGES + 1)
  ]
  missing = [k for k in convs if k not in weights or weights[k].ndim != 4]
  if missing:
    raise WeightsError(f"{what}: missing convolutions: {', '.join(missing)}")
  model_config: dict[str, Any] = {
    "depths": depths,
    "dims": [len(weights[name]) for name in convs],
  }
  try:
    shapes = release.parameter_shapes("convnext", model_config)
    release.require_parameters(
      f"{what} (of {depths} blocks)",
      weights,
      published_shapes(naming, shapes, depths),
    )
  except ValueError as error:
    raise WeightsError(str(error)) from error
  params = {}
  for path, shape in shapes.items():
    leaves = [
      # Of 1 x 1 x 1 x C numbers: there is nothing to transpose.
      jax_layout(name, weights[name].reshape(-1))
      if _RESPONSE in path
      else jax_layout(name, weights[name])
      for name in naming.of(path, depths)
    ]
    params[path] = np.stack(leaves).reshape(shape)
  return Converted(model_config, traverse_util.unflatten_dict(params, sep="/"))


def _as_linear(array: np.ndarray) -> np.ndarray:
  """[O, I] of a layer that timm's small models have as a 1x1 convolution."""
  return array[:, :, 0, 0] if array.shape[2:] == (1, 1) else array


def published_shapes(
  naming: Naming, shapes: Mapping[str, tuple[int, ...]], depths: list[int]
) -> dict[str, tuple[int, ...]]:
  """Names and shapes in a published state dict of those here."""
  published = {}
  for path, shape in shapes.items():
    one = shape[1:] if "_blocks/" in path else shape
    if _RESPONSE not in path:
      one = torch_shape(one)
    elif naming.flat:
      one = one[-1:]
    published |= dict.fromkeys(naming.of(path, depths), one)
  return published
