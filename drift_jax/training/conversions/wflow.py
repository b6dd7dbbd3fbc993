"""W-Flow's generators (arXiv:2605.11755): the network of this package."""

from typing import Any

import numpy as np
from flax import traverse_util

from drift_jax.models import naming, release
from drift_jax.models.naming import Naming, inside
from drift_jax.system.console import logger
from drift_jax.training.conversions.layouts import (
  Config,
  Converted,
  Weights,
  WeightsError,
  as_float,
)
from drift_jax.training.conversions.published import WFLOW_SIZES

# What all sizes share, as build_generator has it.
_SHARED = {
  "input_size": 32,
  "in_channels": 4,
  "out_channels": 4,
  "patch_size": 2,
  "mlp_ratio": 4.0,
  "num_classes": 1000,
  "context_tokens": 16,
  "style_vocab": 64,
  "style_tokens": 32,
  "dtype": "bfloat16",
  "remat": "none",
}
# Facts that no checkpoint holds: the range of the guidance scale in training,
# and the autoencoder of the latents.
_FACTS = {
  "alpha_range": [1.0, 4.0],
  "vae": "hf://stabilityai/sd-vae-ft-mse",
}
_COMPILED = "_orig_mod."  # torch.compile's prefix of every name
_WIDTH = "model.pos_embed"  # [1, patches, width]
_LISTED = 5

NAMES = Naming(
  {
    "class_embed": "class_embed",
    "style_embed": "noise_embeds.{i}.weight",
    "alpha_embed/linear_in": "cfg_embedder.fc1",
    "alpha_embed/linear_out": "cfg_embedder.fc2",
    "alpha_embed/norm": "cfg_norm",
    **inside(
      "",
      "model.",
      {
        "pos_embed": "pos_embed",
        "patch_embed": "patch_embed",
        "context_embed": "cls_embed",
        "context_proj": "c_token_proj",
        "final/norm": "final_layer.norm_final",
        "final/modulation/linear": "final_layer.adaLN_mod.1",
        "final/linear": "final_layer.linear",
      },
    ),
    **inside(
      "blocks/",
      "model.blocks.{i}.",
      {
        "modulation/linear": "adaLN_mod.1",
        "attention_norm": "norm1",
        "attention/qkv": "attn.qkv",
        "attention/q_norm": "attn.q_norm",
        "attention/k_norm": "attn.k_norm",
        "attention/out": "attn.proj",
        "mlp_norm": "norm2",
        "mlp/gate": "mlp.w1",
        "mlp/up": "mlp.w3",
        "mlp/down": "mlp.w2",
      },
    ),
  },
  leaves={
    "kernel": "linear.weight",
    "bias": "linear.bias",
    "scale": "weight",
    "embedding": "weight",
  },
  separator=".",
)


def convert_wflow(
  weights: Weights, config: Config | None, size: str | None
) -> Converted:
  """An average of W-Flow's weights -> kind 'gen'.

  Args:
    weights: by W-Flow's names: [O, I] of linear layers, embeddings as here.
    config: what the checkpoint says of them: `step` and `ema_decay`.
    size: of WFLOW_SIZES; None takes the one that the width tells.

  Raises:
    WeightsError: weights of another size, or of two if none is given; names,
      shapes or values that do not fit.
  """
  # 1. The model
  weights = {k.removeprefix(_COMPILED): v for k, v in weights.items()}
  size = _size(weights, size)
  model_config = model_config_of(size)
  shapes = release.parameter_shapes("gen", model_config)
  entries = NAMES.entries(shapes)
  # 2. Names and shapes
  expected = {
    name: _transposed(name, shapes[path][1:] if stacked else shapes[path])
    for path, (names, stacked) in entries.items()
    for name in names
  }
  try:
    naming.require_parameters("these are not the weights", weights, expected)
  except ValueError as error:
    raise WeightsError(f"W-Flow's {size}: {error}") from error

  # 3. Arrays, one after the other: `weights` may be a mapped file
  def read(name: str) -> np.ndarray:
    array = as_float(name, weights[name])
    return array.T if _is_linear(name) else array

  params = naming.gather(entries, read)
  return Converted(
    model_config,
    traverse_util.unflatten_dict(params, sep="/"),
    step=_number(config, "step", int),
    ema_decay=_number(config, "ema_decay", float),
    facts=_FACTS,
  )


def model_config_of(size: str) -> dict[str, Any]:
  """model_config of one of W-Flow's sizes, under the release's names."""
  found = WFLOW_SIZES[size]
  return release.published_config(
    "gen",
    {
      **_SHARED,
      "hidden_size": found.width,
      "cond_dim": found.width,
      "depth": found.depth,
      "num_heads": found.num_heads,
      "attention_dtype": found.attention_dtype,
    },
  )


def _size(weights: Weights, size: str | None) -> str:
  """The size of the weights; WeightsError if it is another or not known."""
  if _WIDTH not in weights:
    raise WeightsError(
      f"these are not W-Flow's weights: there is no {_WIDTH}, but"
      f" {sorted(weights)[:_LISTED]}"
    )
  width = weights[_WIDTH].shape[-1]
  fitting = [k for k, v in WFLOW_SIZES.items() if v.width == width]
  asked = " or ".join(f"--size={name}" for name in fitting)
  if not fitting:
    widths = {name: found.width for name, found in WFLOW_SIZES.items()}
    raise WeightsError(f"{_WIDTH} has width {width}, W-Flow's are {widths}")
  if size is None and len(fitting) > 1:
    raise WeightsError(
      f"{_WIDTH} has width {width}: give {asked}, which differ in the precision"
      " of attention"
    )
  if size is not None and size not in fitting:
    raise WeightsError(
      f"--size={size} has width {WFLOW_SIZES[size].width}, but {_WIDTH} has"
      f" {width}: that is {asked}"
    )
  return size or fitting[0]


def _is_linear(name: str) -> bool:
  return name.endswith(".linear.weight")


def _transposed(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  return shape[::-1] if _is_linear(name) else shape


def _number(config: Config | None, key: str, kind: type[Any]) -> Any:
  """What the checkpoint says; None if it says nothing, or no number."""
  value = (config or {}).get(key)
  if value is not None and type(value) is not kind:
    logger.warning("%s=%r is no %s: not recorded.", key, value, kind.__name__)
    return None
  return value
