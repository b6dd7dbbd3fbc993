"""MoCo-v2's and SimCLR's ResNet-50 under torchvision's names."""

import re

from drift_jax.models.naming import Naming, inside
from drift_jax.training.conversions.layouts import (
  IMAGENET_MEAN,
  IMAGENET_STD,
  Config,
  Converted,
  Weights,
  WeightsError,
  convert,
  count_blocks,
)

BATCH_NORM_EPSILON = 1e-5

_BLOCK = {
  "conv{n}/kernel": "conv{n}.weight",
  "conv{n}/bias": "bn{n}.bias",
  "downsample/kernel": "downsample.0.weight",
  "downsample/bias": "downsample.1.bias",
}
NAMES = Naming(
  {
    "stem/kernel": "conv1.weight",
    "stem/bias": "bn1.bias",
    **inside("stage{stage}_block{block}/", "layer{stage}.{block0}.", _BLOCK),
    # A scan's blocks are those after the first one; see models.resnet.
    **inside("stage{stage}_blocks/", "layer{stage}.{i1}.", _BLOCK),
  }
)

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
  if any(name.startswith(_MOCO) for name in weights):
    weights = {
      name.removeprefix(_MOCO): array
      for name, array in weights.items()
      if not _MOCO_UNUSED.fullmatch(name)
    }
  return _convert("MoCo", weights, IMAGENET_MEAN, IMAGENET_STD)


def convert_simclr(weights: Weights, config: Config | None) -> Converted:
  """SimCLR's ResNet under torchvision's names -> kind 'resnet'.

  Its input is in [0, 1] without further normalisation.

  Args:
    weights: torch's layouts, any floating dtype; wider ones ('2x') have more
      base_channels. A head ('fc') is left out.
    config: not looked at.

  Raises:
    WeightsError: names, shapes or values that do not fit.
  """
  del config
  return _convert("SimCLR", weights, [0.0] * 3, [1.0] * 3)


def _convert(
  whose: str, weights: Weights, image_mean: list[float], image_std: list[float]
) -> Converted:
  layers = [count_blocks(weights, f"layer{stage}.") for stage in range(1, 5)]
  stem = weights.get("conv1.weight")
  if stem is None or stem.ndim != 4:
    raise WeightsError(
      f"these are not the weights of {whose}'s ResNet: there is no convolution"
      f" conv1.weight, but {sorted(weights)[:5]}"
    )
  model_config = {
    "layers": layers,
    "base_channels": len(stem),
    "image_mean": list(image_mean),
    "image_std": list(image_std),
  }
  return convert(
    f"{whose}'s ResNet of {layers} bottlenecks",
    "resnet",
    model_config,
    NAMES.entries,
    {k: v for k, v in weights.items() if not _HEAD.fullmatch(k)},
    batch_norm_epsilon=BATCH_NORM_EPSILON,
  )
