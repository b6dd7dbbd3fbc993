"""ConvNeXt-V2 under timm's, its authors' and transformers' names."""

from typing import NamedTuple

from drift_jax.models.naming import Naming, inside
from drift_jax.training.conversions.layouts import (
  LEAVES,
  Config,
  Converted,
  Weights,
  WeightsError,
  as_linear,
  convert,
  count_blocks,
)

_STAGES = 4


class Published(NamedTuple):
  """How somebody's weights are named.

  Attributes:
    whose: them.
    stem: the module before stage 1, of a convolution and a norm.
    down: that before another stage, of a norm and a convolution.
    blocks: prefix of a stage's blocks; both count from 0.
    parts: modules of a block: depthwise convolution, norm, the two linear
      layers and the response norm between them.
    norm: the last one.
    head: the module that is left out.
    leaves: of parameters.
  """

  whose: str
  stem: tuple[str, str]
  down: str
  blocks: str
  parts: tuple[str, str, str, str, str]
  norm: str
  head: str
  leaves: dict[str, str] = LEAVES | {"gamma": "weight", "beta": "bias"}

  @property
  def names(self) -> Naming:
    ours = ("depthwise", "norm", "expand", "response_norm", "project")
    return Naming(
      {
        "norm": self.norm,
        "stage1_down_conv": self.stem[0],
        "stage1_down_norm": self.stem[1],
        "stage{stage}_down_norm": f"{self.down}.0",
        "stage{stage}_down_conv": f"{self.down}.1",
        **inside(
          "stage{stage}_blocks/",
          f"{self.blocks}{{i}}.",
          dict(zip(ours, self.parts, strict=True)),
        ),
      },
      self.leaves,
      ".",
    )


PUBLISHED = {
  "facebook": Published(
    whose="facebookresearch/ConvNeXt-V2",
    stem=("downsample_layers.0.0", "downsample_layers.0.1"),
    down="downsample_layers.{stage0}",
    blocks="stages.{stage0}.",
    parts=("dwconv", "norm", "pwconv1", "grn", "pwconv2"),
    norm="norm",
    head="head",
    leaves=LEAVES,
  ),
  "timm": Published(
    whose="timm",
    stem=("stem.0", "stem.1"),
    down="stages.{stage0}.downsample",
    blocks="stages.{stage0}.blocks.",
    parts=("conv_dw", "norm", "mlp.fc1", "mlp.grn", "mlp.fc2"),
    norm="head.norm",
    head="head.fc",
  ),
  "transformers": Published(
    whose="transformers",
    stem=("embeddings.patch_embeddings", "embeddings.layernorm"),
    down="encoder.stages.{stage0}.downsampling_layer",
    blocks="encoder.stages.{stage0}.layers.",
    parts=("dwconv", "layernorm", "pwconv1", "grn", "pwconv2"),
    norm="layernorm",
    head="classifier",
  ),
}
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
  # 1. Whose names they are
  weights = {k.removeprefix(_CLASSIFIERS): v for k, v in weights.items()}
  stems = {f"{x.stem[0]}.weight": x for x in PUBLISHED.values()}
  published = next((stems[name] for name in stems if name in weights), None)
  if published is None:
    raise WeightsError(
      f"these are not the weights of a ConvNeXt-V2: none of {list(stems)},"
      f" but there are {sorted(weights)[:5]}"
    )
  # 2. Layouts: linear layers that are convolutions, and the response norms'
  # vectors, which are [1, 1, 1, C] here: as if of a convolution.
  head = (f"{published.head}.weight", f"{published.head}.bias")
  weights = {
    name: array.reshape(-1, 1, 1, 1) if ".grn." in name else as_linear(array)
    for name, array in weights.items()
    if name not in head
  }
  # 3. Depths and widths
  depths = [
    count_blocks(weights, published.blocks.format(stage0=stage))
    for stage in range(_STAGES)
  ]
  down = [f"{published.down.format(stage0=i)}.1" for i in range(1, _STAGES)]
  convs = [f"{name}.weight" for name in (published.stem[0], *down)]
  what = f"a ConvNeXt-V2 as {published.whose} has it, of {depths} blocks"
  missing = [k for k in convs if k not in weights or weights[k].ndim != 4]
  if missing:
    raise WeightsError(f"{what}: missing convolutions: {', '.join(missing)}")
  return convert(
    what,
    "convnext",
    {"depths": depths, "dims": [len(weights[name]) for name in convs]},
    published.names.entries,
    weights,
  )
