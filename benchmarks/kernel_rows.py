"""Programs of benchmarks/kernels_tpu.py: a kernel each."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from drift_jax.models import attention_kernel, branch_kernels, layers
from drift_jax.system import jaxprs, sharding
from drift_jax.tasks.generator.setup import memory_on_chip_for
from drift_jax.tools import compile_check, hlo

TOPOLOGY = "v6e:2x2"


class Kernel(NamedTuple):
  """A compiled kernel.

  Attributes:
    name: which, and forward or backward.
    roofline: seconds of its declared cost.
    trips: of its loops, from the outermost.
  """

  name: str
  roofline: float
  trips: tuple[int, ...]


def compiled(name: str, sizes: tuple[int, ...]) -> Iterator[Kernel]:
  """Compiles the forward pass, then the backward pass."""
  samples, tokens, channels, heads, width = sizes
  mesh = sharding.make_mesh(1, 1, compile_check.find_devices(TOPOLOGY)[:1])
  place = sharding.replicated(mesh)
  bfloat16, float32 = jnp.dtype("bfloat16"), jnp.dtype("float32")

  def shape(*sides: int, dtype: Any = float32) -> Any:
    return jax.ShapeDtypeStruct(sides, dtype, sharding=place)

  # 1. The kernel, its inputs and its loops.
  head_dim = channels // heads
  of_attention = attention_kernel.Options(heads, bfloat16, layers.NORM_EPSILON)
  groups = heads // attention_kernel.heads_together(heads, head_dim)
  qkv_bias, scales = shape(3 * channels, 1), shape(head_dim, 2)
  tables = (shape(head_dim, tokens),) * 2
  x = shape(samples, tokens, channels, dtype=bfloat16)
  kernel: Any = branch_kernels.fused_branch
  if name == "alone":
    kernel = attention_kernel.fused_attention
    qkv = shape(samples, 3 * channels, tokens, dtype=bfloat16)
    inputs: tuple[Any, ...] = (qkv, qkv_bias, scales)
    constants: tuple[Any, ...] = (tables, of_attention)
    x = shape(samples, channels, tokens, dtype=bfloat16)
    trips = (groups * samples, 1, 1)
  else:
    norm, matrix = shape(1, channels), 3 * channels * width
    weights: Any = branch_kernels.Mlp(
      *(norm, shape(channels, width), shape(1, width)),
      *(shape(channels, width), shape(1, width)),
      *(shape(width, channels), norm),
    )
    if name == "attention":
      weights = branch_kernels.Attention(
        *(norm, shape(3 * channels, channels), qkv_bias),
        *(shape(channels, channels), norm, scales),
      )
      matrix = 4 * channels**2
    memory = memory_on_chip_for("auto", mesh)
    at_once = branch_kernels.samples_together(x.shape, matrix, bfloat16, memory)
    inputs = (x, shape(samples, 3, channels), weights)
    constants = (
      tables if name == "attention" else (),
      branch_kernels.Options(at_once, memory, of_attention),
    )
    trips = (samples // at_once, at_once, groups)

  # 2. Both passes.
  *arrays, options = constants

  def forward(inputs: Any, arrays: Any) -> Any:
    return kernel(*inputs, *arrays, options)

  def backward(inputs: Any, arrays: Any, cotangent: Any) -> Any:
    _, vjp = jax.vjp(lambda inputs: forward(inputs, arrays), inputs)
    return vjp(cotangent)

  for passed, function, arguments in (
    ("forward", forward, (inputs, arrays)),
    ("backward", backward, (inputs, arrays, x)),
  ):
    traced = jax.jit(function).trace(*arguments)
    traced.lower().compile()
    *_, cost = (
      equation.params["cost_estimate"]
      for equation, *_ in jaxprs.equations(traced.jaxpr.jaxpr)
      if equation.primitive.name == "pallas_call"
    )
    roofline = max(
      cost.flops / hlo.PEAK_FLOPS, cost.bytes_accessed / hlo.PEAK_BYTES
    )
    yield Kernel(f"{name}, {passed}", roofline, trips)
