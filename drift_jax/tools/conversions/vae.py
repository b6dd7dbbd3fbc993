"""diffusers' AutoencoderKL."""

import re
from typing import Any

import numpy as np
from flax import traverse_util

from drift_jax.models import release
from drift_jax.models.vae import SCALING_FACTOR
from drift_jax.tools.conversions.layouts import (
  CONFIG_FILE,
  Config,
  Converted,
  Weights,
  WeightsError,
  jax_layout,
  torch_shape,
)

# Of an AutoencoderKL without config.json: Stable Diffusion's.
_CONFIG = {
  "in_channels": 3,
  "latent_channels": 4,
  "block_out_channels": [128, 256, 512, 512],
  "layers_per_block": 2,
  "norm_num_groups": 32,
  "scaling_factor": SCALING_FACTOR,
}
# What else diffusers' config.json may say, and what build_vae builds.
_FIXED = {
  "_class_name": "AutoencoderKL",
  "act_fn": "silu",
  "shift_factor": None,
  "latents_mean": None,
  "latents_std": None,
  "use_quant_conv": True,
  "use_post_quant_conv": True,
  "mid_block_add_attention": True,
}
_OLD_NAMES = {
  "query": "to_q",
  "key": "to_k",
  "value": "to_v",
  "proj_attn": "to_out.0",
}
_ATTENTION = {
  "norm": "group_norm",
  "query": "to_q",
  "key": "to_k",
  "value": "to_v",
  "out": "to_out.0",
}
_OTHERS = {
  "shortcut": "conv_shortcut",
  "head/norm": "conv_norm_out",
  "head/conv": "conv_out",
}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def convert_vae(weights: Weights, config: Config | None) -> Converted:
  """diffusers' AutoencoderKL -> kind 'vae'.

  Args:
    weights: diffusers' names and layouts (OIHW convolutions), also the older
      attention names and 1x1-convolution shapes. Any floating dtype.
    config: diffusers' config.json; Stable Diffusion's values where it, or all
      of it, is missing.

  Raises:
    WeightsError: a config.json of another architecture, or weights whose
      names, shapes or values do not fit.
  """
  model_config = _vae_config(config)
  try:
    shapes = release.parameter_shapes("vae", model_config)
  except ValueError as error:
    raise WeightsError(f"{CONFIG_FILE}: {error}") from error
  names = {path: vae_name(path) for path in shapes}
  weights = {_vae_new_name(k): _vae_new_shape(k, v) for k, v in weights.items()}
  try:
    release.require_parameters(
      "these are not the weights of "
      + (
        f"Stable Diffusion's AutoencoderKL (there is no {CONFIG_FILE})"
        if config is None
        else f"the AutoencoderKL of {CONFIG_FILE}"
      ),
      weights,
      {names[path]: torch_shape(shape) for path, shape in shapes.items()},
    )
  except ValueError as error:
    raise WeightsError(str(error)) from error
  params = {
    path: jax_layout(name, weights[name]) for path, name in names.items()
  }
  return Converted(model_config, traverse_util.unflatten_dict(params, sep="/"))


def _vae_config(config: Config | None) -> dict[str, Any]:
  config = config or {}
  values = {key: config.get(key, value) for key, value in _CONFIG.items()}
  for key, value in values.items():
    example = _CONFIG[key]
    if not isinstance(value, type(example)):
      raise WeightsError(
        f"{CONFIG_FILE} has {key}={value!r}, want a value like {example!r}"
      )
  levels = len(values["block_out_channels"])
  fixed = _FIXED | {
    "out_channels": values["in_channels"],
    "down_block_types": ["DownEncoderBlock2D"] * levels,
    "up_block_types": ["UpDecoderBlock2D"] * levels,
  }
  for key, value in fixed.items():
    if config.get(key, value) != value:
      raise WeightsError(
        f"{CONFIG_FILE} has {key}={config[key]!r}, but only {value!r} can be"
        " converted"
      )
  return values


def vae_name(path: str) -> str:
  """diffusers' name of our parameter, e.g. encoder/level1_block1/conv1/bias."""
  module, _, leaf = path.rpartition("/")
  half, _, rest = module.partition("/")
  blocks = {"encoder": "down_blocks", "decoder": "up_blocks"}.get(half)
  resampler = {"encoder": "downsamplers", "decoder": "upsamplers"}.get(half)
  part, _, layer = rest.partition("/")
  if match := re.fullmatch(r"level(\d+)_block(\d+)", part):
    block = f"{blocks}.{int(match[1]) - 1}.resnets.{int(match[2]) - 1}"
    rest = f"{block}.{_OTHERS.get(layer, layer)}"
  elif match := re.fullmatch(r"level(\d+)_resample", part):
    rest = f"{blocks}.{int(match[1]) - 1}.{resampler}.0.conv"
  elif match := re.fullmatch(r"middle_block(\d+)", part):
    rest = f"mid_block.resnets.{int(match[1]) - 1}.{layer}"
  elif part == "middle_attention":
    rest = f"mid_block.attentions.0.{_ATTENTION[layer]}"
  else:
    rest = _OTHERS.get(rest, rest)
  return ".".join(filter(None, (half, rest, _LEAVES[leaf])))


def _vae_new_name(name: str) -> str:
  """Today's name of an attention layer that diffusers called otherwise."""
  return re.sub(
    rf"(\.attentions\.\d+)\.({'|'.join(_OLD_NAMES)})\.",
    lambda match: f"{match[1]}.{_OLD_NAMES[match[2]]}.",
    name,
  )


def _vae_new_shape(name: str, array: np.ndarray) -> np.ndarray:
  """[O, I] of an attention layer that was stored as a 1x1 convolution."""
  if ".attentions." in name and array.shape[2:] == (1, 1):
    return array[:, :, 0, 0]
  return array
