"""Hugging Face's DINOv2 and CLIP: their image encoders as kind 'vit'."""

import math
from typing import Any

import numpy as np

from drift_jax.models.naming import Naming, inside
from drift_jax.training.conversions.layouts import (
  CONFIG_FILE,
  IMAGENET_MEAN,
  IMAGENET_STD,
  LEAVES,
  Config,
  Converted,
  Weights,
  WeightsError,
  check_fixed,
  convert,
)

# Side of the images, in pixels, and statistics of pixels in [0, 1], as the
# publishers prescribe them.
DINOV2_IMAGE_SIZE = 224
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

DINOV2_NAMES = Naming(
  {
    "class_token": "embeddings.cls_token",
    "position_embedding": "embeddings.position_embeddings",
    "patch_embed": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    **inside(
      "blocks/",
      "encoder.layer.{i}.",
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
    ),
  },
  LEAVES,
  ".",
)
CLIP_NAMES = Naming(
  {
    **inside(
      "",
      _IMAGE_HALF,
      {
        "class_token": "embeddings.class_embedding",
        "position_embedding": "embeddings.position_embedding.weight",
        "patch_embed": "embeddings.patch_embedding",
        "pre_norm": "pre_layrnorm",
        "norm": "post_layernorm",
      },
    ),
    "projection": "visual_projection",
    **inside(
      "blocks/",
      f"{_IMAGE_HALF}encoder.layers.{{i}}.",
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
    ),
  },
  LEAVES,
  ".",
)


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
  config = _required(config, ("dinov2",))
  model_config = dinov2_config(config)
  width, patch = model_config["hidden_size"], model_config["patch_size"]
  positions = (_number(config, "image_size") // patch) ** 2
  side = DINOV2_IMAGE_SIZE // patch
  return convert(
    f"the DINOv2 of {CONFIG_FILE}",
    "vit",
    model_config,
    DINOV2_NAMES.entries,
    weights,
    special={
      "class_token": ((1, 1, width), np.ravel),
      "position_embedding": (
        (1, 1 + positions, width),
        lambda rows: resize_positions(rows[0], side),
      ),
    },
  )


def dinov2_config(config: Config) -> dict[str, Any]:
  """model_config of a DINOv2's config.json; WeightsError for another one."""
  config = _DINOV2_DEFAULTS | dict(config)
  if config.get("use_swiglu_ffn"):
    raise WeightsError(
      f"{CONFIG_FILE} has use_swiglu_ffn=True: DINOv2 giant's SwiGLU is not"
      " here; take facebook/dinov2-small, -base or -large"
    )
  check_fixed(config, _DINOV2_FIXED)
  width = _number(config, "hidden_size")
  return {
    "image_size": DINOV2_IMAGE_SIZE,
    "mlp_size": int(width * _number(config, "mlp_ratio", float)),
    "activation": "gelu",
    "pre_norm": False,
    "layer_scale": True,
    "patch_bias": True,
    "projection_dim": 0,
    "image_mean": IMAGENET_MEAN,
    "image_std": IMAGENET_STD,
    **_sizes(config),
  }


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
  config = _required(config, ("clip", "clip_vision_model"))
  model_config = clip_config(config)
  if config["model_type"] == "clip":
    names = (_IMAGE_HALF, _PROJECTION)
    weights = {k: v for k, v in weights.items() if k.startswith(names)}
  else:
    if not any(name.startswith(_IMAGE_HALF) for name in weights):
      # transformers 5 writes the bare CLIPVisionModel so.
      weights = {_IMAGE_HALF + k: v for k, v in weights.items()}
    if _PROJECTION not in weights:
      model_config["projection_dim"] = 0
  width = model_config["hidden_size"]
  positions = (model_config["image_size"] // model_config["patch_size"]) ** 2
  return convert(
    f"the image encoder of CLIP of {CONFIG_FILE}",
    "vit",
    model_config,
    CLIP_NAMES.entries,
    weights,
    special={
      "class_token": ((width,), np.ravel),
      "position_embedding": ((1 + positions, width), lambda rows: rows),
    },
  )


def clip_config(config: Config) -> dict[str, Any]:
  """model_config of a CLIP's config.json; WeightsError for another one."""
  if config["model_type"] == "clip":
    default = _CLIP_DEFAULTS["projection_dim"]
    # Early files hold the second as well; transformers lets it prevail.
    config = {
      **_part(config, "vision_config"),
      **_part(config, "vision_config_dict"),
      "projection_dim": config.get("projection_dim", default),
    }
  config = _CLIP_DEFAULTS | dict(config)
  check_fixed(config, _CLIP_FIXED)
  return {
    "image_size": _number(config, "image_size"),
    "mlp_size": _number(config, "intermediate_size"),
    "activation": config["hidden_act"],
    "pre_norm": True,
    "layer_scale": False,
    "patch_bias": False,
    "projection_dim": _number(config, "projection_dim"),
    "image_mean": OPENAI_MEAN,
    "image_std": OPENAI_STD,
    **_sizes(config),
  }


def _sizes(config: Config) -> dict[str, Any]:
  """Arguments whose keys are the same in both."""
  return {
    "patch_size": _number(config, "patch_size"),
    "hidden_size": _number(config, "hidden_size"),
    "depth": _number(config, "num_hidden_layers"),
    "num_heads": _number(config, "num_attention_heads"),
    "epsilon": _number(config, "layer_norm_eps", float),
  }


def resize_positions(positions: np.ndarray, side: int) -> np.ndarray:
  """Position embeddings [1 + n^2, C] -> [1 + side^2, C], float32.

  Cubic convolution with a = -0.75 at (i + 1/2) n / side - 1/2 along either
  axis, repeating the border and without a low-pass filter, computed in
  float64: torch's bicubic interpolation, which transformers uses. The first
  row, of the class token, stays as it is. (The publishers' own code has the
  scale n / (side + 0.1).)
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


def _required(
  config: Config | None, model_types: tuple[str, ...]
) -> dict[str, Any]:
  """The config.json; WeightsError if there is none or one of another model."""
  if config is None:
    raise WeightsError(
      f"there is no {CONFIG_FILE} beside the weights, which do not say their"
      " number of heads; take it from the same repository"
    )
  model_type = config.get("model_type")
  if model_type not in model_types:
    raise WeightsError(
      f"{CONFIG_FILE} has model_type={model_type!r}, but only"
      f" {' or '.join(map(repr, model_types))} can be converted: nothing with"
      " registers, for instance"
    )
  return dict(config)


def _number(
  config: Config, key: str, kind: type[int] | type[float] = int
) -> Any:
  value = config.get(key)
  if isinstance(value, (int, kind)) and value is not True and value > 0:
    return value
  found = f"{key}={value!r}" if key in config else f"no {key}"
  raise WeightsError(
    f"{CONFIG_FILE} has {found}, want a positive {kind.__name__}"
  )


def _part(config: Config, key: str) -> Config:
  """A dict inside config.json; empty if it is null or not there."""
  part = config.get(key) or {}
  if not isinstance(part, dict):
    raise WeightsError(f"{CONFIG_FILE} has {key}={part!r}, want a dict")
  return part
