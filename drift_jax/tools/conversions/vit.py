"""Hugging Face's DINOv2 and CLIP: their image encoders as kind 'vit'."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from drift_jax.models import release
from drift_jax.tools.conversions.layouts import (
  CONFIG_FILE,
  Config,
  Converted,
  Weights,
  WeightsError,
  jax_layout,
  torch_shape,
)

# Pixels of the images that features are computed of, and their statistics as
# the publishers prescribe them.
DINOV2_IMAGE_SIZE = 224
IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]
OPENAI_MEAN = [0.48145466, 0.4578275, 0.40821073]
OPENAI_STD = [0.26862954, 0.26130258, 0.27577711]

CUBIC = -0.75  # torch's a; the image's resize has -0.5

# What a config.json may leave out: the defaults of transformers' classes.
_DINOV2_DEFAULTS = {"mlp_ratio": 4, "layer_norm_eps": 1e-6}
_DINOV2_FIXED = {"hidden_act": "gelu", "num_channels": 3, "qkv_bias": True}
_CLIP_DEFAULTS = {
  "hidden_size": 768,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "intermediate_size": 3072,
  "image_size": 224,
  "patch_size": 32,
  "hidden_act": "quick_gelu",
  "layer_norm_eps": 1e-5,
  "projection_dim": 512,
}
_CLIP_FIXED = {"num_channels": 3}

_IMAGE_HALF = "vision_model."
_PROJECTION = "visual_projection.weight"
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


class Names(NamedTuple):
  """Published names of what is here.

  Attributes:
    outer: of modules, or of parameters whose names hold no '/'.
    block: of the same inside a block.
    layer: prefix of block `{}`.
  """

  outer: Mapping[str, str]
  block: Mapping[str, str]
  layer: str

  def of(self, path: str, depth: int) -> tuple[str, ...]:
    """The parameter's name, or one for each block; e.g. of norm/scale."""
    if not path.startswith("blocks/"):
      return (self._name(self.outer, path),)
    name = self._name(self.block, path.removeprefix("blocks/"))
    return tuple(self.layer.format(i) + name for i in range(depth))

  @staticmethod
  def _name(table: Mapping[str, str], path: str) -> str:
    if path in table:
      return table[path]
    module, _, leaf = path.rpartition("/")
    return f"{table[module]}.{_LEAVES[leaf]}"


DINOV2_NAMES = Names(
  {
    "class_token": "embeddings.cls_token",
    "position_embedding": "embeddings.position_embeddings",
    "patch_embed": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
  },
  {
    "attention_norm": "norm1",
    "attention/query": "attention.attention.query",
    "attention/key": "attention.attention.key",
    "attention/value": "attention.attention.value",
    "attention/out": "attention.output.dense",
    "attention_scale": "layer_scale1.lambda1",
    "mlp_norm": "norm2",
    "mlp/expand": "mlp.fc1",
    "mlp/project": "mlp.fc2",
    "mlp_scale": "layer_scale2.lambda1",
  },
  "encoder.layer.{}.",
)
CLIP_NAMES = Names(
  {
    "class_token": f"{_IMAGE_HALF}embeddings.class_embedding",
    "position_embedding": f"{_IMAGE_HALF}embeddings.position_embedding.weight",
    "patch_embed": f"{_IMAGE_HALF}embeddings.patch_embedding",
    "pre_norm": f"{_IMAGE_HALF}pre_layrnorm",
    "norm": f"{_IMAGE_HALF}post_layernorm",
    "projection": _PROJECTION.removesuffix(".weight"),
  },
  {
    "attention_norm": "layer_norm1",
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.out_proj",
    "mlp_norm": "layer_norm2",
    "mlp/expand": "mlp.fc1",
    "mlp/project": "mlp.fc2",
  },
  f"{_IMAGE_HALF}encoder.layers.{{}}.",
)
# Neither belongs to the network: one replaces hidden patches in training, the
# other counts positions.
_UNUSED = ("embeddings.mask_token", f"{_IMAGE_HALF}embeddings.position_ids")


def convert_dinov2(weights: Weights, config: Config | None) -> Converted:
  """transformers' Dinov2Model -> kind 'vit' for images of 224 pixels.

  The position embeddings of 518 pixels (37 x 37 patches of 14) are resized to
  16 x 16, see `resize_positions`: transformers does it whenever it runs.

  Args:
    weights: the hub's names and layouts; any floating dtype.
    config: transformers' config.json, model_type 'dinov2'.

  Raises:
    WeightsError: no config.json or that of another architecture (giant, with
      registers), or weights whose names, shapes or values do not fit.
  """
  config = _DINOV2_DEFAULTS | dict(_required(config))
  _check_model_type(config, ("dinov2",))
  if config.get("use_swiglu_ffn"):
    raise WeightsError(
      f"{CONFIG_FILE} has use_swiglu_ffn=True: DINOv2 giant's SwiGLU is not"
      " here; take facebook/dinov2-small, -base or -large"
    )
  _check_fixed(config, _DINOV2_FIXED)
  width, patch = (
    _integer(config, key) for key in ("hidden_size", "patch_size")
  )
  side = _integer(config, "image_size") // patch
  model_config = {
    "image_size": DINOV2_IMAGE_SIZE,
    "patch_size": patch,
    "hidden_size": width,
    "depth": _integer(config, "num_hidden_layers"),
    "num_heads": _integer(config, "num_attention_heads"),
    "mlp_size": int(width * _positive(config, "mlp_ratio")),
    "activation": "gelu",
    "pre_norm": False,
    "layer_scale": True,
    "patch_bias": True,
    "projection_dim": 0,
    "epsilon": _positive(config, "layer_norm_eps"),
    "image_mean": IMAGENET_MEAN,
    "image_std": IMAGENET_STD,
  }
  return _convert(
    "DINOv2",
    weights,
    model_config,
    DINOV2_NAMES,
    special={
      "class_token": (1, 1, width),
      "position_embedding": (1, 1 + side**2, width),
    },
    positions=functools.partial(
      resize_positions, side=DINOV2_IMAGE_SIZE // patch
    ),
  )


def convert_clip(weights: Weights, config: Config | None) -> Converted:
  """The image half of transformers' CLIPModel -> kind 'vit'.

  Args:
    weights: the hub's names and layouts; any floating dtype. Those of the
      text half are not looked at.
    config: transformers' config.json, of the whole ('clip') or of the image
      half ('clip_vision_model'), which may come without its projection:
      features are then those before it.

  Raises:
    WeightsError: no config.json or that of another architecture, or weights
      whose names, shapes or values do not fit.
  """
  config = _required(config)
  _check_model_type(config, ("clip", "clip_vision_model"))
  whole = config["model_type"] == "clip"
  if whole:
    # Early files hold the second as well; transformers lets it prevail.
    image = {
      **_part(config, "vision_config"),
      **_part(config, "vision_config_dict"),
      "projection_dim": config.get(
        "projection_dim", _CLIP_DEFAULTS["projection_dim"]
      ),
    }
    names = (_IMAGE_HALF, _PROJECTION)
    weights = {k: v for k, v in weights.items() if k.startswith(names)}
  else:
    image = dict(config)
    if not any(name.startswith(_IMAGE_HALF) for name in weights):
      # transformers 5 writes the bare CLIPVisionModel so.
      weights = {_IMAGE_HALF + k: v for k, v in weights.items()}
  image = _CLIP_DEFAULTS | image
  _check_fixed(image, _CLIP_FIXED)
  width, patch = (_integer(image, key) for key in ("hidden_size", "patch_size"))
  projected = whole or _PROJECTION in weights
  model_config = {
    "image_size": _integer(image, "image_size"),
    "patch_size": patch,
    "hidden_size": width,
    "depth": _integer(image, "num_hidden_layers"),
    "num_heads": _integer(image, "num_attention_heads"),
    "mlp_size": _integer(image, "intermediate_size"),
    "activation": image["hidden_act"],
    "pre_norm": True,
    "layer_scale": False,
    "patch_bias": False,
    "projection_dim": _integer(image, "projection_dim") if projected else 0,
    "epsilon": _positive(image, "layer_norm_eps"),
    "image_mean": OPENAI_MEAN,
    "image_std": OPENAI_STD,
  }
  side = model_config["image_size"] // patch
  return _convert(
    "CLIP's image encoder",
    weights,
    model_config,
    CLIP_NAMES,
    special={
      "class_token": (width,),
      "position_embedding": (1 + side**2, width),
    },
  )


def resize_positions(positions: np.ndarray, side: int) -> np.ndarray:
  """Position embeddings [1 + n^2, C] -> [1 + side^2, C], float32.

  Cubic convolution with a = -0.75 at (i + 1/2) n / side - 1/2 along either
  axis, repeating the border and without a low-pass filter, computed in
  float64: torch's bicubic interpolation, of which transformers makes use. The
  first row, of the class token, stays as it is. (The publishers' own code
  takes positions of a scale n / (side + 0.1).)
  """
  length = math.isqrt(len(positions) - 1)
  if side == length:
    return positions
  matrix = _cubic_matrix(length, side)
  grid = positions[1:].reshape(length, length, -1).astype(np.float64)
  grid = np.einsum("ih,jw,hwc->ijc", matrix, matrix, grid, optimize=True)
  resized = grid.reshape(side * side, -1).astype(np.float32)
  return np.concatenate([positions[:1], resized])


def _cubic_matrix(length: int, size: int) -> np.ndarray:
  """[size, length] float64: rows of four weights that sum to 1."""
  position = (np.arange(size) + 0.5) * (length / size) - 0.5
  matrix = np.zeros((size, length))
  for tap in range(-1, 3):
    source = np.floor(position).astype(int) + tap
    x = np.abs(position - source)
    near = ((CUBIC + 2) * x - (CUBIC + 3)) * x**2 + 1
    far = CUBIC * (((x - 5) * x + 8) * x - 4)
    inside = np.clip(source, 0, length - 1)
    np.add.at(matrix, (np.arange(size), inside), np.where(x <= 1, near, far))
  return matrix


def published_shapes(
  names: Names,
  shapes: Mapping[str, tuple[int, ...]],
  special: Mapping[str, tuple[int, ...]],
) -> dict[str, tuple[int, ...]]:
  """Names and shapes in transformers' state dict of those here.

  Args:
    names: of the family.
    shapes: here, by names joined with '/'; those of blocks are stacked.
    special: shapes there of what is no module's, by its name here.
  """
  published = {}
  for path, shape in shapes.items():
    stacked = path.startswith("blocks/")
    theirs = torch_shape(shape[1:] if stacked else shape)
    for name in names.of(path, shape[0]):
      published[name] = special.get(path, theirs)
  return published


def _convert(
  what: str,
  weights: Weights,
  model_config: dict[str, Any],
  names: Names,
  *,
  special: Mapping[str, tuple[int, ...]],
  positions: Callable[[np.ndarray], np.ndarray] = lambda x: x,
) -> Converted:
  """Checks the weights against model_config, then renames and stacks them."""
  try:
    shapes = release.parameter_shapes("vit", model_config)
  except ValueError as error:
    raise WeightsError(f"{CONFIG_FILE}: {error}") from error
  try:
    release.require_parameters(
      f"these are not the weights of the {what} of {CONFIG_FILE}",
      {k: v for k, v in weights.items() if k not in _UNUSED},
      published_shapes(names, shapes, special),
    )
  except ValueError as error:
    raise WeightsError(str(error)) from error
  params = {}
  for path, shape in shapes.items():
    theirs = names.of(path, shape[0])
    if path in special:  # not a matrix: nothing to transpose
      (name,) = theirs
      flat = jax_layout(name, weights[name].reshape(-1))
      rows = flat.reshape(-1, shape[-1])
      rows = positions(rows) if path == "position_embedding" else rows
      params[path] = rows.reshape(shape)
    else:
      leaves = [jax_layout(name, weights[name]) for name in theirs]
      params[path] = (
        np.stack(leaves) if len(shape) > leaves[0].ndim else leaves[0]
      )
  return Converted(model_config, traverse_util.unflatten_dict(params, sep="/"))


def _required(config: Config | None) -> Config:
  if config is None:
    raise WeightsError(
      f"there is no {CONFIG_FILE} beside the weights, which do not say their"
      " number of heads; take it from the same repository"
    )
  return config


def _check_model_type(config: Config, valid: tuple[str, ...]) -> None:
  model_type = config.get("model_type")
  if model_type not in valid:
    registers = (
      "; those with registers are not here"
      if str(model_type).endswith("_with_registers")
      else ""
    )
    raise WeightsError(
      f"{CONFIG_FILE} has model_type={model_type!r}, but only"
      f" {' or '.join(map(repr, valid))} can be converted{registers}"
    )


def _check_fixed(config: Config, fixed: Mapping[str, Any]) -> None:
  for key, value in fixed.items():
    if config.get(key, value) != value:
      raise WeightsError(
        f"{CONFIG_FILE} has {key}={config[key]!r}, but only {value!r} can be"
        " converted"
      )


def _integer(config: Config, key: str) -> int:
  value = _positive(config, key)
  if not isinstance(value, int):
    raise WeightsError(f"{CONFIG_FILE} has {key}={value!r}, want an integer")
  return value


def _positive(config: Config, key: str) -> int | float:
  value = config.get(key)
  if isinstance(value, (int, float)) and value > 0 and value is not True:
    return value
  found = f"{key}={value!r}" if key in config else f"no {key}"
  raise WeightsError(f"{CONFIG_FILE} has {found}, want a positive number")


def _part(config: Config, key: str) -> Config:
  """A dict inside config.json; empty if it is null or not there."""
  part = config.get(key) or {}
  if not isinstance(part, dict):
    raise WeightsError(f"{CONFIG_FILE} has {key}={part!r}, want a dict")
  return part
