"""The conditional 1-D U-Net, against loops in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drift_jax.tasks.policy import unet1d
from drift_jax.tasks.policy.unet1d import ConditionalUnet1d
from tests.conftest import assert_close, precise_jit, relative_error

SMALL = {"action_size": 3, "widths": (4, 8), "groups": 2}


def random(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def make(seed, shape):
  """Parameters of a size that keeps activations' scale, norms' too."""
  fan_in = max(1, int(np.prod(shape[:-1])))
  rng = np.random.default_rng([seed, *shape])
  return jnp.asarray(rng.normal(size=shape) / fan_in**0.5, jnp.float32)


def call(steps=8, time=None, **changes):
  """(params, inputs, output)."""
  module = ConditionalUnet1d(**SMALL | changes)
  inputs = (random(0, 2, steps, 3), random(1, 2, 5), time)
  shapes = jax.eval_shape(module.init, jax.random.key(2), *inputs)["params"]
  leaves, tree = jax.tree.flatten(shapes)
  params = tree.unflatten(make(i, x.shape) for i, x in enumerate(leaves))
  return params, inputs, precise_jit(module.apply)({"params": params}, *inputs)


def conv(x, layer, stride=1):
  """Direct sums: output o looks at input stride o + j - (k - 1) // 2."""
  kernel, bias = layer["kernel"], layer["bias"]
  size = len(kernel)
  padding = (size - 1) // 2
  count = (len(x) + 2 * padding - size) // stride + 1
  y = np.zeros((count, kernel.shape[2])) + bias
  for o in range(count):
    for j in range(size):
      i = stride * o + j - padding
      if 0 <= i < len(x):
        y[o] += x[i] @ kernel[j]
  return y


def transposed(x, layer):
  """Input i reaches outputs 2 i - 1 to 2 i + 2."""
  y = np.zeros((2 * len(x), layer["kernel"].shape[2])) + layer["bias"]
  for i in range(len(x)):
    for j in range(4):
      if 0 <= 2 * i - 1 + j < len(y):
        y[2 * i - 1 + j] += x[i] @ layer["kernel"][j]
  return y


def dense(x, layer):
  return x @ layer["kernel"] + layer["bias"]


def mish(x):
  return x * np.tanh(np.log1p(np.exp(x)))


def conv_block(x, layer, groups):
  x = conv(x, layer["conv"])
  for part in np.split(x, groups, axis=1):
    part[:] = (part - part.mean()) / np.sqrt(part.var() + 1e-6)
  return mish(x * layer["norm"]["scale"] + layer["norm"]["bias"])


def residual_block(x, condition, layer, groups):
  scale, shift = np.split(dense(mish(condition), layer["film"]), 2)
  hidden = conv_block(x, layer["block1"], groups)
  hidden = conv_block(hidden * scale + shift, layer["block2"], groups)
  return hidden + (dense(x, layer["residual"]) if "residual" in layer else x)


def reference(params, x, condition, time, levels, groups, time_size):
  """One sequence."""
  if time is not None:
    half = time_size // 2
    angle = time * 10_000.0 ** (-np.arange(half) / half)
    embedded = np.concatenate([np.cos(angle), np.sin(angle)])
    embedded = dense(
      mish(dense(embedded, params["time_in"])), params["time_out"]
    )
    condition = np.concatenate([embedded, condition])

  def two(name, x):
    for i in (1, 2):
      x = residual_block(x, condition, params[f"{name}_block{i}"], groups)
    return x

  skips = []
  for level in range(levels):
    x = two(f"down{level}", x)
    skips.append(x)
    if level < levels - 1:
      x = conv(x, params[f"down{level}"], stride=2)
  x = two("middle", x)
  for level in range(levels - 1, 0, -1):
    x = two(f"up{level}", np.concatenate([x, skips[level]], axis=1))
    x = transposed(x, params[f"up{level}"])
  return dense(conv_block(x, params["final"], groups), params["output"])


@pytest.mark.parametrize(
  ("widths", "steps", "time"),
  [
    pytest.param((4, 8, 12), 16, None, marks=pytest.mark.slow),
    ((4, 8), 2, (0, 7)),
    ((4,), 7, None),
  ],
)
def test_equals_loops_in_float64(widths, steps, time):
  time_size = 6 if time else 0
  params, inputs, y = call(
    steps=steps,
    widths=widths,
    time_size=time_size,
    time=None if time is None else jnp.array(time),
  )
  assert y.dtype == jnp.float32
  wide = functools.partial(jax.tree.map, lambda x: np.asarray(x, np.float64))
  x, condition = wide(inputs[:2])
  expected = [
    reference(
      wide(params),
      x[i],
      condition[i],
      time[i] if time else None,
      len(widths),
      SMALL["groups"],
      time_size,
    )
    for i in range(2)
  ]
  assert_close(y, np.stack(expected), 3e-6)


def test_published_size():
  """(256, 512, 1024) of PushT's states: 2 x 20 observed, times of 256."""
  module = ConditionalUnet1d(
    action_size=2, widths=(256, 512, 1024), time_size=256
  )
  shapes = jax.eval_shape(
    module.init,
    jax.random.key(0),
    jnp.zeros((1, 16, 2)),
    jnp.zeros((1, 40)),
    jnp.zeros(1, jnp.int32),
  )
  count = sum(x.size for x in jax.tree.leaves(shapes))
  assert count == 65_783_298


def test_first_parameters():
  """Kernels and biases are uniform in +-1 / sqrt(fan-in), as published."""
  module = ConditionalUnet1d(action_size=2, widths=(64,))
  params = jax.jit(module.init)(
    jax.random.key(0), jnp.zeros((1, 4, 2)), jnp.zeros((1, 25))
  )["params"]
  block = params["down0_block2"]
  for layer, fan_in in ((block["block1"]["conv"], 320), (block["film"], 25)):
    for values in layer.values():
      reach = np.abs(values).max() * fan_in**0.5
      assert 0.9 < reach <= 1 + 1e-6
      np.testing.assert_allclose(values.mean() * fan_in**0.5, 0, atol=0.2)


@pytest.mark.parametrize(
  ("size", "steps", "stride"), [(5, 7, 1), (5, 4, 1), (3, 3, 2), (3, 2, 2)]
)
def test_both_ways_to_convolve(size, steps, stride):
  """Their gradients also: each is linear, so its transpose is the check."""
  x, kernel = random(0, 2, steps, 3), random(1, size, 3, 4)
  padding = (size - 1) // 2

  def mine(x, kernel):
    return unet1d.convolve(x, kernel, stride=stride, padding=padding)

  def library(x, kernel):
    return jax.lax.conv_general_dilated(
      x,
      kernel,
      (stride,),
      ((padding, padding),),
      dimension_numbers=("NWC", "WIO", "NWC"),
    )

  @jax.jit
  def both(x, kernel):
    y, pull = jax.vjp(mine, x, kernel)
    expected, pull_expected = jax.vjp(library, x, kernel)
    return (y, *pull(y)), (expected, *pull_expected(y))

  for a, b in zip(*both(x, kernel), strict=True):
    assert_close(a, b, 1e-5)


def test_mish_far_from_zero():
  x = jnp.array([-70.0, -20.0, -1.0, 0.0, 1.0, 19.0, 30.0, 1e4])
  wide = np.asarray(x, np.float64)
  np.testing.assert_allclose(
    unet1d.mish(x), wide * np.tanh(np.logaddexp(0, wide)), rtol=3e-6
  )
  slope = jax.vmap(jax.grad(unet1d.mish))(x)
  assert np.isfinite(slope).all()
  np.testing.assert_allclose(slope[-2:], 1, rtol=1e-6)


def test_bfloat16_is_near():
  params, inputs, y = call(widths=(4,))
  module = ConditionalUnet1d(
    **SMALL | {"widths": (4,)}, dtype=jnp.dtype(jnp.bfloat16)
  )
  near = jax.jit(module.apply)({"params": params}, *inputs)
  assert near.dtype == jnp.float32
  assert 1e-4 < relative_error(near, y) < 0.05
