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
from tests.models import small

BFLOAT16 = {"dtype": "bfloat16"}
GENERATOR = build_generator(
  **small.GENERATOR | BFLOAT16 | {"remat": "branches"}
)
MAE = build_mae(
  **small.MAE | BFLOAT16 | {"layers": (1, 3, 1, 1), "remat": True}
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
      GENERATOR,
      ("blocks/attention/qkv/bias", "blocks/mlp_norm/scale", "style_embed"),
      ("blocks/attention/qkv/kernel", "pos_embed", "patch_embed/bias"),
    ),
    (
      build_vae(**small.VAE | BFLOAT16),
      ("decoder/head/norm/scale",),
      ("decoder/head/conv/bias", "quant_conv/kernel"),
    ),
    (
      MAE,
      ("classifier/kernel", "encoder/stage2_block2/norm1/bias"),
      ("encoder/stage2_block2/conv1/kernel", "decoder/head/bias"),
    ),
    (
      build_convnext(**small.CONVNEXT | BFLOAT16),
      ("stage2_blocks/response_norm/gamma", "norm/bias"),
      ("stage2_blocks/expand/bias",),
    ),
    (
      build_resnet(**small.RESNET | BFLOAT16),
      (),
      ("stage2_block1/conv1/kernel",),
    ),
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
    pytest.param(GENERATOR, id="generator"),
    pytest.param(MAE, id="mae", marks=pytest.mark.slow),
  ],
)
def test_rounded_parameters_give_the_same_numbers(module):
  params = small.random_variables(module)["params"]
  inputs = random_inputs(module)
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
  module = build_vae(**small.VAE)
  params = {"head": np.full(3, 0.1, np.float32)}
  jax.tree.map(
    np.testing.assert_array_equal, precision_lib.rounded(module, params), params
  )
