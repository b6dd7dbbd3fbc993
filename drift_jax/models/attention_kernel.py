"""Self-attention with QK-norm and rotary positions on chip (Pallas, TPU).

The same numbers as the plain form of `layers.Attention`, up to rounding. For
each head, with R the rotation by position and n(x) = x / rms(x):

  q' = R(n(q) * scale_q),  k' = R(n(k) * scale_k)
  w = softmax(q' k'^T / sqrt(D)),  out = w v

Norm, rotation and softmax are float32; the operands of all products have the
dtype of the options, and products are summed in float32.

A program of the grid is one sample. It reads all heads once, straight from the
projection's product, and adds the projection's bias: elsewhere the bias'
gradient would be another pass over all heads. No [T, T] matrix leaves the chip:
the backward pass computes the weights again from q and k.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

_LANES = 128
# All of a group is on chip at once: 16 heads of 72 and 272 tokens take 28 MB of
# a v4's 16.
_MOST_TOGETHER = 4
_VMEM_LIMIT = 64 * 2**20


class Options(NamedTuple):
  """How attention is computed.

  Attributes:
    heads: number of heads.
    dtype: of the products' operands.
    epsilon: of the norms.
    interpret: without a TPU.
  """

  heads: int
  dtype: jnp.dtype
  epsilon: float
  interpret: bool = False


def _rotate(x: Any, cos: Any, sin: Any) -> Any:
  """Rotates the channel pairs (i, i + D/2); with -sin, back again."""
  half = x.shape[-1] // 2
  turned = jnp.concatenate([-x[..., half:], x[..., :half]], axis=-1)
  return x * cos + turned * sin


def inverse_rms(x: Any, epsilon: float) -> Any:
  mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
  return jax.lax.rsqrt(mean_square + epsilon)


def dot(a: Any, b: Any, contract: tuple[int, int]) -> Any:
  """Sums over axis contract[0] of a and contract[1] of b, in float32."""
  return jax.lax.dot_general(
    a,
    b,
    (((contract[0],), (contract[1],)), ((), ())),
    preferred_element_type=jnp.float32,
  )


def _over_heads(heads: int, head_dim: int, body: Any) -> None:
  """Calls body(first channel, number of heads) for groups of heads.

  A read at a multiple of 128 channels, the lanes of a register, is one load:
  a group is the fewest heads whose channels fill whole registers. If there are
  no whole groups, or they are of many heads, each head is read on its own.
  """
  together = math.lcm(head_dim, _LANES) // head_dim
  if heads % together or together > _MOST_TOGETHER:
    for head in range(heads):
      body(head * head_dim, 1)
    return

  def group(i, _):
    body(pl.multiple_of(i * (together * head_dim), _LANES), together)
    return 0

  jax.lax.fori_loop(0, heads // together, group, 0)


def _part(
  ref: Any,
  sample: Any,
  start: Any,
  heads: int,
  head_dim: int,
  bias_ref: Any = None,
) -> list[Any]:
  """Reads the [T, D] matrices of a group of heads, with their bias."""
  at = pl.ds(start, heads * head_dim)
  block = ref[sample, :, at]
  if bias_ref is not None:
    block = (block.astype(jnp.float32) + bias_ref[:, at]).astype(block.dtype)
  return [block[:, i * head_dim : (i + 1) * head_dim] for i in range(heads)]


def _forward_kernel(
  qkv_ref, bias_ref, scales_ref, cos_ref, sin_ref, out_ref, *, options
):
  tables = cos_ref[...], sin_ref[...]
  attend(qkv_ref, 0, scales_ref[...], tables, out_ref, options, bias_ref)


def attend(
  qkv_ref: Any,
  sample: Any,
  scales: Any,
  tables: tuple[Any, Any],
  out_ref: Any,
  options: Options,
  bias_ref: Any = None,
) -> None:
  """Writes a sample's attention: heads of qkv_ref[sample] to out_ref[sample].

  Args:
    qkv_ref: [_, T, 3 C].
    sample: index into its first axis, and out_ref's.
    scales: [2, D].
    tables: see fused_attention.
    out_ref: [_, T, C].
    options: of attention.
    bias_ref: of qkv [1, 3 C], if it has not been added.
  """
  heads, dtype, epsilon, _ = options
  width = qkv_ref.shape[-1] // 3
  head_dim = width // heads

  def body(start, count):
    qs, ks, vs = (
      _part(qkv_ref, sample, i * width + start, count, head_dim, bias_ref)
      for i in range(3)
    )
    outs = []
    for q, k, v in zip(qs, ks, vs, strict=True):
      weights, *_ = _weights(q, k, scales, *tables, dtype, epsilon)
      outs.append(dot(weights.astype(dtype), v.astype(dtype), (1, 0)))
    at = pl.ds(start, count * head_dim)
    out = jnp.concatenate(outs, axis=-1)
    out_ref[sample, :, at] = out.astype(out_ref.dtype)

  _over_heads(heads, head_dim, body)


def _weights(q, k, scales, cos, sin, dtype, epsilon):
  """(w, q', k', n(q), n(k), 1 / rms(q), 1 / rms(k)), see the module."""
  q, k = q.astype(jnp.float32), k.astype(jnp.float32)
  rq, rk = inverse_rms(q, epsilon), inverse_rms(k, epsilon)
  nq, nk = q * rq, k * rk
  q = _rotate(nq * scales[0:1], cos, sin).astype(dtype)
  k = _rotate(nk * scales[1:2], cos, sin).astype(dtype)
  logits = dot(q, k, (1, 1)) * q.shape[-1] ** -0.5
  kernel = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
  weights = kernel / jnp.sum(kernel, axis=-1, keepdims=True)
  return weights, q, k, nq, nk, rq, rk


def _backward_kernel(*refs, options):
  qkv_ref, bias_ref, scales_ref, cos_ref, sin_ref, dout_ref = refs[:6]
  dqkv_ref, dbias_ref, dscales_ref = refs[6:]

  # Programs run in turn, and all add to the same sums of bias and scales.
  @pl.when(pl.program_id(0) == 0)
  def _():
    dbias_ref[...] = jnp.zeros_like(dbias_ref)
    dscales_ref[...] = jnp.zeros_like(dscales_ref)

  attend_gradients(
    *(qkv_ref, 0, scales_ref[...], (cos_ref[...], sin_ref[...])),
    *(dout_ref, dqkv_ref, dbias_ref, dscales_ref, options, bias_ref),
  )


def attend_gradients(
  qkv_ref: Any,
  sample: Any,
  scales: Any,
  tables: tuple[Any, Any],
  dout_ref: Any,
  dqkv_ref: Any,
  dbias_ref: Any,
  dscales_ref: Any,
  options: Options,
  bias_ref: Any = None,
  out_ref: Any = None,
) -> None:
  """Gradients of `attend`: writes that of qkv, adds those of bias and scales.

  Writes attention's result again if there is an out_ref.
  """
  heads, dtype, epsilon, _ = options
  width = qkv_ref.shape[-1] // 3
  head_dim = width // heads
  cos, sin = tables

  def body(start, count):
    qs, ks, vs = (
      _part(qkv_ref, sample, i * width + start, count, head_dim, bias_ref)
      for i in range(3)
    )
    douts = _part(dout_ref, sample, start, count, head_dim)
    grads, outs = ([], [], []), []
    for q, k, v, dout in zip(qs, ks, vs, douts, strict=True):
      weights, q, k, nq, nk, rq, rk = _weights(
        q, k, scales, cos, sin, dtype, epsilon
      )
      # 1. dv = w^T dout, and dw = dout v^T
      dout, v, narrow = (x.astype(dtype) for x in (dout, v, weights))
      grads[2].append(dot(narrow, dout, (0, 0)))
      dweights = dot(dout, v, (1, 1))
      if out_ref is not None:
        outs.append(dot(narrow, v, (1, 0)))
      # 2. Softmax: dlogits = w (dw - sum(w dw)), then the 1 / sqrt(D)
      dlogits = weights * dweights
      dlogits -= weights * jnp.sum(dlogits, axis=-1, keepdims=True)
      dlogits = (dlogits * head_dim**-0.5).astype(dtype)
      # 3. From q' and k' back through rotation, scale and norm:
      # d x / d n(x) is 1 / rms(x) (d - n(x) mean(d n(x)))
      for part, (d, normal, inverse) in enumerate(
        (
          (dot(dlogits, k, (1, 0)), nq, rq),
          (dot(dlogits, q, (0, 0)), nk, rk),
        )
      ):
        d = _rotate(d, cos, -sin)
        dscales_ref[part : part + 1] += jnp.sum(
          d * normal, axis=0, keepdims=True
        )
        d *= scales[part : part + 1]
        shift = normal * jnp.mean(d * normal, axis=-1, keepdims=True)
        grads[part].append(inverse * (d - shift))
    for part, grad in enumerate(grads):
      at = pl.ds(part * width + start, count * head_dim)
      joined = jnp.concatenate(grad, axis=-1)
      dqkv_ref[sample, :, at] = joined.astype(dqkv_ref.dtype)
      dbias_ref[:, at] += jnp.sum(joined, axis=0, keepdims=True)
    if out_ref is not None:
      at = pl.ds(start, count * head_dim)
      out = jnp.concatenate(outs, axis=-1)
      out_ref[sample, :, at] = out.astype(out_ref.dtype)

  _over_heads(heads, head_dim, body)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def fused_attention(
  qkv: Float[Array, "B T C3"],
  bias: Float[Array, "1 C3"],
  scales: Float[Array, "2 D"],
  tables: tuple[Float[Array, "T D"], Float[Array, "T D"]],
  options: Options,
) -> Float[Array, "B T C"]:
  """Attention of all heads, from the joint projection [3, heads, D].

  Args:
    qkv: queries, keys and values, without their bias.
    bias: of the projection, float32.
    scales: of the RMS norms of queries and keys.
    tables: cosines and sines [T, D] of the positions' angles.
    options: the result's dtype is that of qkv, whatever that of the products.
  """
  return _forward(qkv, bias, scales, tables, options)[0]


def _call(
  kernel: Callable[..., None],
  operands: Sequence[Any],
  results: Sequence[Any],
  products: int,
  options: Options,
) -> Any:
  """Runs the kernel for each sample.

  Args:
    kernel: takes references to operands and results.
    operands: arrays with a leading axis of samples, or shared by all.
    results: their shapes and dtypes, likewise.
    products: of [T, T] by [T, D] for each head; XLA schedules by their cost.
    options: of attention.
  """
  batch, tokens, width = operands[0].shape

  def spec(array: Any) -> pl.BlockSpec:
    if array.ndim == 3:
      return pl.BlockSpec((1, *array.shape[1:]), lambda b: (b, 0, 0))
    return pl.BlockSpec(array.shape, lambda b: (0, 0))

  matrices = batch * options.heads * tokens**2
  return pl.pallas_call(
    functools.partial(kernel, options=options),
    grid=(batch,),
    in_specs=[spec(operand) for operand in operands],
    out_specs=[spec(result) for result in results],
    out_shape=results,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("arbitrary",), vmem_limit_bytes=_VMEM_LIMIT
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * matrices * (width // (3 * options.heads)) * products,
      bytes_accessed=sum(
        array.size * array.dtype.itemsize for array in (*operands, *results)
      ),
      transcendentals=matrices,
    ),
    interpret=options.interpret,
  )(*operands)


def _forward(
  qkv: Any, bias: Any, scales: Any, tables: Any, options: Options
) -> tuple[Any, Any]:
  out = jax.ShapeDtypeStruct((*qkv.shape[:2], qkv.shape[2] // 3), qkv.dtype)
  operands = (qkv, bias, scales, *tables)
  (result,) = _call(_forward_kernel, operands, [out], 2, options)
  return result, operands


def _backward(
  options: Options, operands: Any, cotangent: Any
) -> tuple[Any, Any, Any, None]:
  results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands[:3]]
  inputs = (*operands, cotangent)
  return (*_call(_backward_kernel, inputs, results, 5, options), None)


fused_attention.defvjp(_forward, _backward)
