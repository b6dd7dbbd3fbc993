"""Small models: their arguments, random parameters and shared properties."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

from tests.builders import random_like

LABELS = jnp.array([0, 1, 4, 4])
GENERATOR = {
  "input_size": 4,
  "in_channels": 2,
  "out_channels": 3,
  "patch_size": 2,
  "hidden_size": 16,
  "depth": 2,
  "num_heads": 2,
  "mlp_ratio": 4.0,
  "num_classes": 5,
  "cond_dim": 12,
  "context_tokens": 3,
  "style_vocab": 6,
  "style_tokens": 2,
  "dtype": "float32",
  "attention_dtype": "float32",
  "remat": "none",
}
# The 8x8 digits: the four stages see 8x8, 4x4, 2x2 and 1x1 maps.
MAE = {
  "in_channels": 1,
  "base_channels": 8,
  "layers": (1, 1, 1, 1),
  "input_patch_size": 1,
  "mask_patch_size": 2,
  "num_classes": 10,
  "norm_groups": 32,
  "dtype": "float32",
  "remat": False,
}
CONVNEXT = {
  "depths": (1, 2, 1, 1),
  "widths": (8, 8, 8, 8),
  "dtype": "float32",
}
RESNET = {
  "layers": (1, 1, 1, 1),
  "base_channels": 2,
  "image_mean": (0.5, 0.4, 0.3),
  "image_std": (0.2, 0.3, 0.4),
  "dtype": "float32",
}
VAE = {
  "in_channels": 3,
  "latent_channels": 4,
  "widths": (8, 16),
  "blocks_per_level": 1,
  "norm_groups": 4,
  "scaling_factor": 0.5,
  "dtype": "float32",
  "remat": False,
}
INCEPTION = {"width": 1, "num_classes": 5}
VIT = {
  "image_size": 8,
  "patch_size": 4,
  "hidden_size": 6,
  "depth": 2,
  "num_heads": 2,
  "mlp_size": 10,
  "activation": "quick_gelu",
  "pre_norm": True,
  "layer_scale": True,
  "patch_bias": True,
  "projection_dim": 5,
  "epsilon": 1e-5,
  "image_mean": (0.5, 0.4, 0.3),
  "image_std": (0.2, 0.3, 0.4),
}


def random_variables(module: Any, scale: float = 0.3) -> Any:
  """Random parameters of a module."""
  keys = dict.fromkeys(("params", "noise", "mask"), jax.random.key(0))
  shapes = jax.eval_shape(module.init, keys, *module.example_inputs)
  return random_like(shapes, scale)


def products(jaxpr: Any) -> list[Any]:
  """The precision of each product and convolution of a program."""
  found = []
  for equation in jaxpr.eqns:
    if equation.primitive.name in ("conv_general_dilated", "dot_general"):
      found.append(equation.params["precision"])
    for inner in jaxprs_in_params(equation.params):
      found += products(inner)
  return found
