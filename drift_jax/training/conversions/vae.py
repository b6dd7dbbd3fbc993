"""diffusers' AutoencoderKL, in its PyTorch form and in its Flax form."""

import re
from typing import Any

import numpy as np

from drift_jax.models.naming import Naming, inside
from drift_jax.models.vae import SCALING_FACTOR
from drift_jax.training.conversions.layouts import (
  CONFIG_FILE,
  LEAVES,
  Config,
  Converted,
  Weights,
  WeightsError,
  as_linear,
  check_fixed,
  convert,
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
# Modules of which PyTorch's form has lists: NAME.0 is NAME_0 in Flax' form.
_LISTS = "down_blocks|up_blocks|resnets|attentions|downsamplers|upsamplers"
_OLD_NAMES = {
  "query": "to_q",
  "key": "to_k",
  "value": "to_v",
  "proj_attn": "to_out.0",
}
_BLOCK = {
  "norm{n}": "norm{n}",
  "conv{n}": "conv{n}",
  "shortcut": "conv_shortcut",
}
_ATTENTION = {
  "norm": "group_norm",
  "query": "to_q",
  "key": "to_k",
  "value": "to_v",
  "out": "to_out.0",
}


def _half(blocks: str, resampler: str) -> dict[str, str]:
  """Names of encoder or decoder."""
  level = f"{blocks}.{{level0}}"
  return {
    "conv_in": "conv_in",
    **inside(
      "level{level}_block{block}/", f"{level}.resnets.{{block0}}.", _BLOCK
    ),
    "level{level}_resample": f"{level}.{resampler}.0.conv",
    **inside("middle_block{block}/", "mid_block.resnets.{block0}.", _BLOCK),
    **inside("middle_attention/", "mid_block.attentions.0.", _ATTENTION),
    "head/norm": "conv_norm_out",
    "head/conv": "conv_out",
  }


NAMES = Naming(
  {
    **inside("encoder/", "encoder.", _half("down_blocks", "downsamplers")),
    **inside("decoder/", "decoder.", _half("up_blocks", "upsamplers")),
    "quant_conv": "quant_conv",
    "post_quant_conv": "post_quant_conv",
  },
  LEAVES,
  ".",
)


def convert_vae(weights: Weights, config: Config | None) -> Converted:
  """diffusers' AutoencoderKL -> kind 'vae'.

  Args:
    weights: diffusers' names and layouts (OIHW convolutions), also the older
      attention names and 1x1-convolution shapes, or those of its Flax form,
      names joined with '/'. Any floating dtype.
    config: diffusers' config.json; Stable Diffusion's values where it, or all
      of it, is missing.

  Raises:
    WeightsError: a config.json of another architecture, or weights whose
      names, shapes or values do not fit.
  """
  if any("/" in name for name in weights):
    weights = dict(_from_flax(name, array) for name, array in weights.items())
  return convert(
    f"Stable Diffusion's AutoencoderKL (there is no {CONFIG_FILE})"
    if config is None
    else f"the AutoencoderKL of {CONFIG_FILE}",
    "vae",
    _model_config(config or {}),
    NAMES.entries,
    dict(_today(name, array) for name, array in weights.items()),
  )


def _model_config(config: Config) -> dict[str, Any]:
  values = {key: config.get(key, value) for key, value in _CONFIG.items()}
  for key, value in values.items():
    example = _CONFIG[key]
    if not isinstance(value, type(example)):
      raise WeightsError(
        f"{CONFIG_FILE} has {key}={value!r}, want a value like {example!r}"
      )
  levels = len(values["block_out_channels"])
  fixed = {
    "out_channels": values["in_channels"],
    "down_block_types": ["DownEncoderBlock2D"] * levels,
    "up_block_types": ["UpDecoderBlock2D"] * levels,
  }
  if config.get("_class_name") == "FlaxAutoencoderKL":
    config = {**config, "_class_name": _FIXED["_class_name"]}
  check_fixed(config, _FIXED | fixed)
  return values


def _from_flax(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
  """An array of the Flax form: its name and layout in PyTorch's form."""
  *modules, leaf = name.split("/")
  listed = [re.sub(rf"^({_LISTS})_(\d+)$", r"\1.\2", x) for x in modules]
  if leaf == "kernel":
    array = array.transpose(*range(array.ndim)[:-3:-1], *range(array.ndim - 2))
  return ".".join([*listed, LEAVES.get(leaf, leaf)]), array


def _today(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
  """An attention layer's name and shape since diffusers 0.17."""
  match = re.fullmatch(r"(.*\.attentions\.\d+\.)(\w+)(\..+)", name)
  if match is None:
    return name, array
  layer = _OLD_NAMES.get(match[2], match[2])
  return f"{match[1]}{layer}{match[3]}", as_linear(array)
