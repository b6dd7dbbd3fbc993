"""Attention on chip, interpreted, against the plain form."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from drift_jax.models import layers
from drift_jax.models.generator import build_generator
from tests.conftest import assert_close, kernel_costs
from tests.models.kernels import assert_same, params_like
from tests.models.small import GENERATOR as SMALL
from tests.models.small import LABELS


@functools.partial(jax.jit, static_argnames=("heads", "dtype", "kernel"))
def run(params, x, cotangent, *, heads, dtype, kernel):
  """(output, gradients of parameters and input)."""
  module = layers.Attention(heads, x.dtype, jnp.dtype(dtype), kernel)
  out, vjp = jax.vjp(lambda p, x: module.apply({"params": p}, x), params, x)
  return out, vjp(cotangent.astype(out.dtype))


def inputs(tokens, channels, heads, dtype):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, tokens, channels)), dtype)
  module = layers.Attention(heads, x.dtype, jnp.dtype(jnp.float32))
  shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
  return (
    params_like(shapes),
    x,
    jnp.asarray(rng.normal(size=x.shape), jnp.float32),
  )


# Heads that fill the lanes two by two, one by one, not at all, and 16 together,
# which is too many (heads of 72, as W-Flow's largest has). Tolerances of the
# result and of its gradients.
@pytest.mark.parametrize(
  ("tokens", "channels", "heads", "dtype", "tolerances"),
  [
    pytest.param(20, 256, 4, "float32", (2e-6, 1e-5), marks=pytest.mark.slow),
    pytest.param(9, 256, 2, "float32", (2e-6, 1e-5), marks=pytest.mark.slow),
    (17, 96, 3, "float32", (2e-6, 1e-5)),
    pytest.param(9, 1152, 16, "float32", (2e-6, 1e-5), marks=pytest.mark.slow),
    pytest.param(
      20, 256, 4, "bfloat16", (2**-8, 2**-7), marks=pytest.mark.slow
    ),
  ],
)
def test_same_numbers_as_the_plain_form(
  tokens, channels, heads, dtype, tolerances
):
  arguments = inputs(tokens, channels, heads, jnp.dtype(dtype))
  plain, fused = (
    run(*arguments, heads=heads, dtype=dtype, kernel=kernel)
    for kernel in ("xla", "interpret")
  )
  assert_same(plain, fused, tolerances)


def test_no_matrix_of_tokens_is_kept_for_the_backward_pass():
  arguments = inputs(128, 96, 3, jnp.float32)

  def largest(kernel):
    module = layers.Attention(
      3, jnp.dtype("float32"), jnp.dtype("float32"), kernel
    )
    _, vjp = jax.eval_shape(
      lambda p, x: jax.vjp(lambda p, x: module.apply({"params": p}, x), p, x),
      *arguments[:2],
    )
    return max(leaf.size for leaf in jax.tree.leaves(vjp))

  assert largest("xla") == 2 * 3 * 128 * 128
  assert largest("interpret") == 2 * 128 * 3 * 96


def test_long_sequences_are_left_to_xla():
  tokens = layers.MAX_TOKENS_ON_CHIP + 1
  module = layers.Attention(
    1, jnp.dtype("float32"), jnp.dtype("float32"), "interpret"
  )
  shape = jax.ShapeDtypeStruct((1, tokens, 8), jnp.float32)
  trace = jax.make_jaxpr(
    lambda x: module.init_with_output(jax.random.key(0), x)[0]
  )
  assert "pallas_call" not in str(trace(shape))


@pytest.mark.slow
def test_a_generator_has_the_same_parameters_and_samples_either_way():
  plain = build_generator(**SMALL)
  fused = dataclasses.replace(plain, attention_kernel="interpret")
  rngs = {"params": jax.random.key(0), "noise": jax.random.key(1)}
  shapes, same = (
    jax.eval_shape(model.init, rngs, LABELS, 2.0)["params"]
    for model in (plain, fused)
  )
  assert same == shapes
  params = params_like(shapes)
  images = [
    jax.jit(model.apply)(
      {"params": params}, LABELS, 2.0, rngs={"noise": jax.random.key(3)}
    )
    for model in (plain, fused)
  ]
  assert_close(images[1], images[0], 5e-6)


def test_declared_cost_is_the_hand_count():
  batch, tokens, channels, heads = 2, 20, 96, 3
  arguments = inputs(tokens, channels, heads, jnp.float32)
  jaxpr = jax.make_jaxpr(
    functools.partial(run, heads=heads, dtype="float32", kernel="interpret")
  )(*arguments)
  forward, backward = kernel_costs(jaxpr.jaxpr)
  # Logits and values: 2 products of [T, T] and [T, D]; 6 with gradients, which
  # make both again.
  product = 2 * tokens * tokens * channels * batch
  assert (forward.flops, backward.flops) == (2 * product, 6 * product)
  row = batch * tokens * channels * 4
  small = (2 * 32 + 3 * 96) * 4  # scales, bias
  tables = 2 * tokens * 32 * 4  # cosines and sines
  assert forward.bytes_accessed == 3 * row + row + small + tables
  assert backward.bytes_accessed == 2 * 3 * row + row + 2 * small + tables


def lowered_for_gpus(attention_dtype, head_dim=64, tokens=20) -> str:
  """The gradient's program, before XLA has seen it."""
  module = layers.Attention(
    4, jnp.dtype(jnp.bfloat16), jnp.dtype(attention_dtype), "cudnn"
  )
  params, x, cotangent = inputs(tokens, 4 * head_dim, 4, jnp.bfloat16)

  def gradient(params, x, cotangent):
    _, vjp = jax.vjp(lambda p: module.apply({"params": p}, x), params)
    return vjp(cotangent.astype(x.dtype))

  traced = jax.jit(gradient).trace(params, x, cotangent)
  return traced.lower(lowering_platforms=("cuda",)).as_text()


def test_gpus_have_cudnn_s_attention_in_bfloat16(monkeypatch):
  """Without a GPU, up to the calls that it would run; XLA has the heads that
  cuDNN refuses."""
  monkeypatch.setattr(
    fused_attention_stablehlo, "check_cudnn_version", lambda: 91000
  )
  for head_dim in (64, 72):
    text = lowered_for_gpus("bfloat16", head_dim)
    assert "__cudnn$fmhaSoftmax(" in text
    assert "__cudnn$fmhaSoftmaxBackward(" in text
  assert "cudnn" not in lowered_for_gpus("float32")
  for head_dim in (12, 136):
    assert "cudnn" not in lowered_for_gpus("bfloat16", head_dim)
  assert "cudnn" not in lowered_for_gpus("bfloat16", tokens=21)


@pytest.mark.parametrize(
  ("remat", "forwards"), [("attention", 1), ("branches", 1), ("full", 2)]
)
def test_cudnn_s_result_is_kept_for_the_gradient(remat, forwards, monkeypatch):
  """Its name is JAX's own; 'full' keeps nothing."""
  monkeypatch.setattr(
    fused_attention_stablehlo, "check_cudnn_version", lambda: 91000
  )
  changes = {"dtype": "bfloat16", "attention_dtype": "bfloat16", "remat": remat}
  changes["context_tokens"] = 4  # eight tokens in all
  module = build_generator(**(SMALL | changes))
  keys = {"params": jax.random.key(0), "noise": jax.random.key(1)}
  inputs = LABELS, jnp.ones(LABELS.shape)
  params = jax.eval_shape(module.init, keys, *inputs)
  fused = module.clone(attention_kernel="cudnn")

  def total(params):
    return fused.apply(params, *inputs, rngs=keys).sum()

  text = str(jax.make_jaxpr(jax.grad(total))(params))
  assert text.count(f"{layers.CUDNN_ATTENTION}[") == forwards


def test_cudnn_s_attention_is_called_as_the_plain_form_is(monkeypatch):
  """Its arguments: the plain form in its place gives the plain numbers."""

  def call(query, key, value, *, implementation):
    assert implementation == "cudnn"
    return layers.attention(query, key, value, dtype=query.dtype)

  arguments = inputs(20, 256, 4, jnp.bfloat16)
  plain = run(*arguments, heads=4, dtype="bfloat16", kernel="xla")
  monkeypatch.setattr(jax.nn, "dot_product_attention", call)
  fused = run(*arguments, heads=4, dtype="bfloat16", kernel="cudnn")
  jax.tree.map(np.testing.assert_array_equal, plain, fused)
