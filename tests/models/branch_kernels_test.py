"""A block's branches on chip, interpreted, against the plain form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drift_jax.models import branch_kernels, layers
from drift_jax.models.generator import build_generator
from tests.conftest import kernel_costs
from tests.models.kernels import assert_same, params_like
from tests.models.small import GENERATOR, LABELS

MEMORY = 64 * 2**20
WIDTH = 544  # of the MLP: two chunks


def block(heads, dtype, kernel, memory=MEMORY):
  dtype = jnp.dtype(dtype)
  return layers.Block(heads, WIDTH, dtype, dtype, kernel, memory)


@functools.partial(jax.jit, static_argnames=("module",))
def run(params, x, condition, cotangent, *, module):
  """(output, gradients of parameters, input and condition)."""
  out, vjp = jax.vjp(
    lambda *of: module.apply({"params": of[0]}, *of[1:])[0],
    *(params, x, condition),
  )
  return out, vjp(cotangent)


def inputs(samples, tokens, channels, heads, dtype):
  """Parameters, tokens, condition, cotangent."""
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  x = normal(samples, tokens, channels).astype(dtype)
  condition = normal(samples, 40)
  module = block(heads, dtype, "xla", 0)
  shapes = jax.eval_shape(module.init, jax.random.key(0), x, condition)
  # As a step hands them on: matrices in the dtype of the products.
  params = jax.tree_util.tree_map_with_path(
    lambda path, w: w.astype(dtype) if path[-1].key == "kernel" else w,
    params_like(shapes["params"]),
  )
  return params, x, condition, normal(*x.shape).astype(dtype)


# Heads that fill registers and heads that don't; groups of several samples, of
# which there are several, and of one. Tolerances of result and gradients.
@pytest.mark.parametrize(
  ("samples", "tokens", "channels", "heads", "dtype", "tolerances"),
  [
    (3, 8, 72, 3, "float32", (1e-6, 3e-6)),
    pytest.param(
      *(4, 16, 192, 4, "float32", (1e-6, 3e-6)), marks=pytest.mark.slow
    ),
    pytest.param(
      *(4, 16, 192, 4, "bfloat16", (2**-7, 2**-6)), marks=pytest.mark.slow
    ),
  ],
)
def test_same_numbers_as_the_plain_form(
  samples, tokens, channels, heads, dtype, tolerances, monkeypatch
):
  monkeypatch.setattr(branch_kernels, "_MOST_ROWS", 2 * tokens)
  arguments = inputs(samples, tokens, channels, heads, jnp.dtype(dtype))
  plain, fused = (
    run(*arguments, module=block(heads, dtype, *form))
    for form in (("xla", 0), ("interpret", MEMORY))
  )
  assert_same(plain, fused, tolerances)


def test_samples_go_together_as_they_fit():
  float32, bfloat16 = jnp.dtype("float32"), jnp.dtype("bfloat16")
  together = branch_kernels.samples_together
  b2 = 4 * 768**2
  assert together((64, 272, 768), b2, bfloat16, 110 * 2**20) == 4
  assert together((6, 272, 768), b2, bfloat16, 110 * 2**20) == 3
  # One sample has more rows than a group would, and fits.
  assert together((4, 1280, 768), b2, bfloat16, 110 * 2**20) == 1
  # No memory for the weights, or for a sample.
  assert together((64, 272, 768), b2, bfloat16, 16 * 2**20) == 0
  assert together((4, 8192, 768), b2, bfloat16, 110 * 2**20) == 0
  # Samples that begin amid a register.
  assert together((4, 24, 64), 4 * 64**2, bfloat16, MEMORY) == 0
  assert together((4, 24, 64), 4 * 64**2, float32, MEMORY) == 4


def test_what_does_not_fit_is_left_to_xla():
  arguments = inputs(2, 9, 16, 2, "float32")
  jaxpr = jax.make_jaxpr(
    functools.partial(run, module=block(2, "float32", "xla"))
  )
  assert "pallas_call" not in str(jaxpr(*arguments))


@pytest.mark.parametrize(
  ("remat", "kept"),
  [("none", 2), ("attention", 2), ("branches", 2), ("full", 1)],
)
def test_a_generator_keeps_the_input_of_each_branch(remat, kept):
  """And nothing else of the blocks' activations; 'full' only the block's."""
  changes = {"remat": remat, "context_tokens": 4}  # eight tokens in all
  plain = build_generator(**(GENERATOR | changes))
  fused = plain.clone(attention_kernel="interpret", memory_on_chip=MEMORY)
  keys = {"params": jax.random.key(0), "noise": jax.random.key(1)}
  alpha = jnp.ones(LABELS.shape)
  shapes, same = (
    jax.eval_shape(model.init, keys, LABELS, alpha) for model in (plain, fused)
  )
  assert same == shapes
  _, vjp = jax.eval_shape(
    lambda params: jax.vjp(
      lambda params: fused.apply(params, LABELS, alpha, rngs=keys), params
    ),
    shapes,
  )
  depth, tokens = GENERATOR["depth"], (8, GENERATOR["hidden_size"])
  stacked = [
    leaf.shape
    for leaf in jax.tree.leaves(vjp)
    if leaf.shape[:2] == (depth, len(LABELS)) and 8 in leaf.shape
  ]
  assert stacked == [(depth, len(LABELS), *tokens)] * kept


def test_declared_cost_is_the_hand_count():
  samples, tokens, channels, heads = 4, 16, 64, 2
  arguments = inputs(samples, tokens, channels, heads, "float32")
  module = block(heads, "float32", "interpret")
  jaxpr = jax.make_jaxpr(functools.partial(run, module=module))(*arguments)
  attention, mlp, mlp_back, attention_back = kernel_costs(jaxpr.jaxpr)
  rows = samples * tokens
  # Projections, and two products of [T, T] and [T, C] of each sample.
  flops = 2 * rows * (4 * channels**2 + 2 * tokens * channels)
  assert (attention.flops, attention_back.flops) == (flops, 3 * flops)
  flops = 2 * rows * 3 * channels * WIDTH
  assert (mlp.flops, mlp_back.flops) == (flops, 3 * flops)
  # Tokens once each way, modulations, weights; with gradients the tokens, their
  # cotangent and gradient, and twice the rest.
  rest = samples * 3 * channels + channels  # the norm's scale
  rest += 3 * channels * WIDTH + 2 * WIDTH + channels
  assert mlp.bytes_accessed == 4 * (2 * rows * channels + rest)
  assert mlp_back.bytes_accessed == 4 * (3 * rows * channels + 2 * rest)
