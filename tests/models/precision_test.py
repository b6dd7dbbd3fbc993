"""Parameters rounded to what a network uses change none of its numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drift_jax.models import precision as precision_lib
from drift_jax.models.convnext import build_convnext
from drift_jax.models.generator import build_generator
from drift_jax.models.mae import build_mae
from drift_jax.models.precision import used_dtypes
from drift_jax.models.resnet import build_resnet
from drift_jax.models.vae import build_vae

VAE = {
  "in_channels": 3,
  "latent_channels": 2,
  "widths": (4, 4),
  "blocks_per_level": 1,
  "norm_groups": 2,
  "scaling_factor": 0.2,
  "dtype": "bfloat16",
  "remat": False,
}
GENERATOR = {
  "input_size": 8,
  "in_channels": 2,
  "out_channels": 1,
  "patch_size": 2,
  "hidden_size": 16,
  "depth": 2,
  "num_heads": 2,
  "mlp_ratio": 2.0,
  "num_classes": 3,
  "cond_dim": 8,
  "context_tokens": 2,
  "style_vocab": 4,
  "style_tokens": 2,
  "dtype": "bfloat16",
  "attention_dtype": "float32",
  "remat": "branches",
}
MAE = {
  "in_channels": 2,
  "base_channels": 8,
  "layers": (1, 3, 1, 1),
  "input_patch_size": 2,
  "mask_patch_size": 2,
  "num_classes": 3,
  "norm_groups": 4,
  "dtype": "bfloat16",
  "remat": True,
}
CONVNEXT = {"depths": (1, 2, 1, 1), "widths": (8,) * 4, "dtype": "bfloat16"}
RESNET = {
  "layers": (1, 3, 1, 1),
  "base_channels": 8,
  "image_mean": (0.5,) * 3,
  "image_std": (0.2,) * 3,
  "dtype": "bfloat16",
}


def random_params(module):
  keys = dict.fromkeys(("params", "noise", "mask"), jax.random.key(0))
  shapes = jax.eval_shape(module.init, keys, *module.example_inputs)["params"]
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: rng.normal(0.1, 0.3, x.shape).astype(np.float32), shapes
  )


def random_inputs(module):
  rng = np.random.default_rng(1)
  return [
    rng.uniform(0.1, 2, x.shape).astype(x.dtype) for x in module.example_inputs
  ]


@pytest.mark.parametrize(
  ("module", "wide", "narrow"),
  [
    (
      build_generator(**GENERATOR),
      ("blocks/attention/qkv/bias", "blocks/mlp_norm/scale", "style_embed"),
      ("blocks/attention/qkv/kernel", "pos_embed", "patch_embed/bias"),
    ),
    (
      build_vae(**VAE),
      ("decoder/head/norm/scale",),
      ("decoder/head/conv/bias", "quant_conv/kernel"),
    ),
    (
      build_mae(**MAE),
      ("classifier/kernel", "encoder/stage2_block2/norm1/bias"),
      ("encoder/stage2_block2/conv1/kernel", "decoder/head/bias"),
    ),
    (
      build_convnext(**CONVNEXT),
      ("stage2_blocks/response_norm/gamma", "norm/bias"),
      ("stage2_blocks/expand/bias",),
    ),
    (build_resnet(**RESNET), (), ("stage2_block1/conv1/kernel",)),
  ],
  ids=["generator", "vae", "mae", "convnext", "resnet"],
)
def test_what_is_used_in_which_dtype(module, wide, narrow):
  dtypes = used_dtypes(module)
  assert {dtypes[name] for name in wide} <= {np.dtype("float32")}
  assert {dtypes[name] for name in narrow} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
  "module",
  [
    pytest.param(build_generator(**GENERATOR), id="generator"),
    pytest.param(build_mae(**MAE), id="mae", marks=pytest.mark.slow),
  ],
)
def test_rounded_parameters_give_the_same_numbers(module):
  params, inputs = random_params(module), random_inputs(module)
  call = jax.jit(
    lambda params, *inputs: module.apply(
      {"params": params},
      *inputs,
      rngs=dict.fromkeys(("noise", "mask"), jax.random.key(2)),
    )
  )
  rounded = call(precision_lib.rounded(module, params), *inputs)
  jax.tree.map(np.testing.assert_array_equal, rounded, call(params, *inputs))


def test_float32_networks_keep_all():
  module = build_vae(**VAE | {"dtype": "float32"})
  params = {"head": np.full(3, 0.1, np.float32)}
  jax.tree.map(
    np.testing.assert_array_equal, precision_lib.rounded(module, params), params
  )
