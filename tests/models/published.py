"""Weights and inputs of the golden encoders, see tests/golden/README.md."""

import zlib
from collections.abc import Iterable

import numpy as np

# config.json of narrow Vision Transformers.
DINOV2 = {
  "model_type": "dinov2",
  "hidden_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 3,
  "mlp_ratio": 4,
  "image_size": 518,
  "patch_size": 14,
  "layer_norm_eps": 1e-6,
}
CLIP = {
  "model_type": "clip_vision_model",
  "hidden_size": 24,
  "intermediate_size": 80,
  "num_hidden_layers": 2,
  "num_attention_heads": 3,
  "image_size": 48,
  "patch_size": 16,
  "projection_dim": 20,
  "hidden_act": "quick_gelu",
  "layer_norm_eps": 1e-5,
}
_AS_DRAWN = (".grn.", "position_emb", "class_emb", "cls_token", "mask_token")


def draw_all(
  parameters: Iterable[str], gain: float = 3, variance: float = 0.8
) -> dict[str, np.ndarray]:
  """Weights by name of "NAME SHAPE" lines.

  Args:
    parameters: the lines.
    gain: kernels have variance gain / fan-in / 3.
    variance: running variances are 1 up to this.
  """
  weights = {}
  for line in parameters:
    name, shape = str(line).split()
    sizes = tuple(map(int, shape.split(",")))
    weights[name] = draw(name, sizes, gain, variance)
  return weights


def draw(
  name: str, shape: tuple[int, ...], gain: float = 3, variance: float = 0.8
) -> np.ndarray:
  random = np.random.RandomState(zlib.crc32(name.encode()))
  uniform = 2 * random.random_sample(shape) - 1
  if name.endswith(".running_var"):
    uniform = 1 + variance * uniform
  elif name.endswith((".bias", ".running_mean")) and ".grn." not in name:
    uniform *= 0.2
  elif not any(part in name for part in _AS_DRAWN):
    if len(shape) == 1:
      uniform = 1 + 0.2 * uniform
    else:
      uniform *= np.sqrt(gain / np.prod(shape[1:]))
  return uniform.astype(np.float32)


def noise(seed: int, shape: tuple[int, ...]) -> np.ndarray:
  """Pixels in [-1, 1]."""
  random = np.random.RandomState(seed)
  return random.uniform(-1, 1, shape).astype(np.float32)


def under(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Those whose names begin with the prefix, without it."""
  return {
    key.removeprefix(prefix): value
    for key, value in arrays.items()
    if key.startswith(prefix)
  }
