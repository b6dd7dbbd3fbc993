"""Self-attention with QK-norm and rotary positions on chip (Pallas, TPU).

The same numbers as the plain form of `layers.Attention`, up to rounding. For
each head, with R the rotation by position and n(x) = x / rms(x):

  q' = R(n(q) * scale_q / sqrt(D)),  k' = R(n(k) * scale_k)
  w = softmax(q' k'^T),  out = w v

Norm, rotation and softmax are float32; the operands of all products have the
dtype of the options, and products are summed in float32.

Tokens lie along the lanes of registers: queries are [D, T], and w is [keys,
queries]. So norm and softmax reduce over whole registers, and a rotation moves
none. No [T, T] matrix leaves the chip: the backward pass computes w again.

`fused_attention` is attention alone: a program of its grid is some heads of one
sample. It reads them once, straight from the projection's product, and adds the
projection's bias: elsewhere the bias' gradient would be another pass over all
heads. With what is around it, it is a kernel of branch_kernels.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

# Rows of a register of bfloat16.
_TILE = 16
# Heads of a group, at most.
_TOGETHER = 4
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


def dot(a: Any, b: Any, contract: tuple[int, int]) -> Any:
  """Sums over axis contract[0] of a and contract[1] of b, in float32."""
  return jax.lax.dot_general(
    a,
    b,
    (((contract[0],), (contract[1],)), ((), ())),
    preferred_element_type=jnp.float32,
  )


def _rotate(x: Any, cos: Any, sin: Any) -> Any:
  """Rotates the channel pairs (i, i + D/2); with -sin, back again."""
  half = x.shape[0] // 2
  turned = jnp.concatenate([-x[half:], x[:half]], axis=0)
  return x * cos + turned * sin


def heads_together(heads: int, head_dim: int) -> int:
  """Heads of a group: they fill each other's gaps in the schedule."""
  divisors = [n for n in range(1, _TOGETHER + 1) if heads % n == 0]
  # Groups begin where registers do.
  fits = [n for n in divisors if n * head_dim % _TILE == 0]
  return max(fits, default=heads)


def by_groups(qkv: Any, heads: int) -> Any:
  """[..., 3 C] of a projection as fused_attention takes it: group by group."""
  head_dim = qkv.shape[-1] // (3 * heads)
  groups = heads // heads_together(heads, head_dim)
  split = qkv.reshape(*qkv.shape[:-1], 3, groups, -1)
  return jnp.swapaxes(split, -3, -2).reshape(qkv.shape)


def _over_heads(heads: int, head_dim: int, body: Any) -> None:
  """Calls body(first channel of each) for groups of heads."""
  if head_dim % _TILE:  # heads begin amid registers
    for head in range(heads):
      body([head * head_dim])
    return

  together = heads_together(heads, head_dim)

  def group(i, _):
    starts = [(i * together + head) * head_dim for head in range(together)]
    body([pl.multiple_of(start, _TILE) for start in starts])
    return 0

  jax.lax.fori_loop(0, heads // together, group, 0)


def _head(
  qkv_ref: Any, sample: Any, start: Any, head_dim: int, bias_ref: Any
) -> list[Any]:
  """q, k and v of the head [D, T], with their bias."""
  width = qkv_ref.shape[1] // 3
  found = []
  for i in range(3):
    at = pl.ds(i * width + start, head_dim)
    part = qkv_ref[sample, at]
    if bias_ref is not None:
      part = (part.astype(jnp.float32) + bias_ref[at]).astype(part.dtype)
    found.append(part)
  return found


def _prepare(
  x: Any, scale: Any, tables: tuple[Any, Any], options: Options
) -> tuple[Any, Any, Any]:
  """(R(n(x) * scale) in the dtype of the products, n(x), 1 / rms(x))"""
  x = x.astype(jnp.float32)
  mean_square = jnp.mean(jnp.square(x), axis=0, keepdims=True)
  inverse = jax.lax.rsqrt(mean_square + options.epsilon)
  normal = x * inverse
  turned = _rotate(normal * scale, *tables)
  return turned.astype(options.dtype), normal, inverse


def _exponentials(logits: Any) -> Any:
  """e [keys, queries], where w is e over its sums."""
  return jnp.exp(logits - jnp.max(logits, axis=0, keepdims=True))


def _mean(e: Any, v: Any) -> tuple[Any, Any]:
  """(e's sums of v [D, queries], 1 / e's sums [1, queries])"""
  # The sums are one more product's: v's channels don't fill the matrix unit.
  ones = jnp.ones((_TILE, v.shape[1]), v.dtype)
  sums = dot(jnp.concatenate([v, ones], axis=0), e, (1, 0))
  return sums[: len(v)], 1 / sums[len(v) : len(v) + 1]


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
    qkv_ref: [_, 3 C, T].
    sample: index into its first axis, and out_ref's.
    scales: [D, 2].
    tables: see fused_attention.
    out_ref: [_, C, T].
    options: of attention.
    bias_ref: of qkv [3 C, 1], if it has not been added.
  """
  head_dim = qkv_ref.shape[1] // (3 * options.heads)
  root = head_dim**-0.5

  def body(starts):
    heads = [_head(qkv_ref, sample, x, head_dim, bias_ref) for x in starts]
    logits = []
    for q, k, _ in heads:
      q, *_ = _prepare(q, scales[:, 0:1] * root, tables, options)
      k, *_ = _prepare(k, scales[:, 1:2], tables, options)
      logits.append(dot(k, q, (0, 0)))
    es = [_exponentials(x).astype(options.dtype) for x in logits]
    for start, e, (_, _, v) in zip(starts, es, heads, strict=True):
      sums, inverse = _mean(e, v.astype(options.dtype))
      out = (sums * inverse).astype(out_ref.dtype)
      out_ref[sample, pl.ds(start, head_dim)] = out

  _over_heads(options.heads, head_dim, body)


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
  dtype = options.dtype
  width = qkv_ref.shape[1] // 3
  head_dim = width // options.heads
  cos, sin = tables
  root = head_dim**-0.5

  def body(starts):
    spans = [pl.ds(start, head_dim) for start in starts]
    heads = [_head(qkv_ref, sample, x, head_dim, bias_ref) for x in starts]
    qs = [
      _prepare(q, scales[:, 0:1] * root, tables, options) for q, *_ in heads
    ]
    ks = [_prepare(k, scales[:, 1:2], tables, options) for _, k, _ in heads]
    vs = [v.astype(dtype) for *_, v in heads]
    douts = [dout_ref[sample, at].astype(dtype) for at in spans]
    # 1. The forward pass; dv = w^T dout, and dw = dout v^T
    pairs = zip(qs, ks, strict=True)
    es = [_exponentials(dot(k, q, (0, 0))) for (q, *_), (k, *_) in pairs]
    dweights = [dot(v, d, (0, 0)) for v, d in zip(vs, douts, strict=True)]
    dlogits, dvs = [], []
    for at, e, v, dout, dw in zip(spans, es, vs, douts, dweights, strict=True):
      sums, inverse = _mean(e.astype(dtype), v)
      out, weights = sums * inverse, e * inverse
      if out_ref is not None:
        out_ref[sample, at] = out.astype(out_ref.dtype)
      dvs.append(dot(dout, weights.astype(dtype), (1, 1)))
      # 2. Softmax: dlogits = w (dw - sum(w dw)), which sum is that of dout out
      total = jnp.sum(dout.astype(jnp.float32) * out, axis=0, keepdims=True)
      dlogits.append((weights * (dw - total)).astype(dtype))
    # 3. From q' and k' back through rotation, scale and norm:
    # d x / d n(x) is 1 / rms(x) (d - n(x) mean(d n(x)))
    for start, d, q, k, dv in zip(starts, dlogits, qs, ks, dvs, strict=True):
      grads = []
      for part, (each, (_, normal, inverse)) in enumerate(
        (
          (dot(k[0], d, (1, 0)) * root, q),
          (dot(q[0], d, (1, 1)), k),
        )
      ):
        each = _rotate(each, cos, -sin)
        dscales_ref[:, part : part + 1] += jnp.sum(
          each * normal, axis=1, keepdims=True
        )
        each *= scales[:, part : part + 1]
        shift = normal * jnp.mean(each * normal, axis=0, keepdims=True)
        grads.append(inverse * (each - shift))
      for part, grad in enumerate((*grads, dv)):
        at = pl.ds(part * width + start, head_dim)
        dqkv_ref[sample, at] = grad.astype(dqkv_ref.dtype)
        dbias_ref[at] += jnp.sum(grad, axis=1, keepdims=True)

  _over_heads(options.heads, head_dim, body)


def _forward_kernel(
  qkv_ref, bias_ref, scales_ref, cos_ref, sin_ref, out_ref, *, options
):
  options = options._replace(heads=out_ref.shape[1] // scales_ref.shape[0])
  tables = cos_ref[...], sin_ref[...]
  attend(qkv_ref, 0, scales_ref[...], tables, out_ref, options, bias_ref)


def _backward_kernel(*refs, options):
  qkv_ref, bias_ref, scales_ref, cos_ref, sin_ref, dout_ref = refs[:6]
  dqkv_ref, dbias_ref, dscales_ref = refs[6:]
  options = options._replace(heads=dout_ref.shape[1] // scales_ref.shape[0])

  # Programs run in turn, those of a group one after the other: they add to the
  # sums of its bias, and all to those of scales.
  group, sample = pl.program_id(0), pl.program_id(1)

  @pl.when(sample == 0)
  def _():
    dbias_ref[...] = jnp.zeros_like(dbias_ref)

  @pl.when(group + sample == 0)
  def _():
    dscales_ref[...] = jnp.zeros_like(dscales_ref)

  attend_gradients(
    *(qkv_ref, 0, scales_ref[...], (cos_ref[...], sin_ref[...])),
    *(dout_ref, dqkv_ref, dbias_ref, dscales_ref, options, bias_ref),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def fused_attention(
  qkv: Float[Array, "B C3 T"],
  bias: Float[Array, "C3 1"],
  scales: Float[Array, "D 2"],
  tables: tuple[Float[Array, "D T"], Float[Array, "D T"]],
  options: Options,
) -> Float[Array, "B C T"]:
  """Attention of all heads, from their joint projection.

  Args:
    qkv: queries, keys and values, see by_groups, without their bias.
    bias: of the projection, float32.
    scales: of the RMS norms of queries and keys.
    tables: cosines and sines [D, T] of the positions' angles.
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
  """Runs the kernel for each group of heads of each sample.

  Args:
    kernel: takes references to operands and results.
    operands: qkv, arrays of each sample and its heads, then what is shared.
    results: their shapes and dtypes, likewise.
    products: of [T, T] by [T, D] for each head; XLA schedules by their cost.
    options: of attention.
  """
  batch, width, tokens = operands[0].shape

  head_dim = width // (3 * options.heads)
  groups = options.heads // heads_together(options.heads, head_dim)

  def spec(array: Any) -> pl.BlockSpec:
    if array.ndim == 3:
      shape = (1, array.shape[1] // groups, tokens)
      return pl.BlockSpec(shape, lambda g, b: (b, g, 0))
    if len(array) == width:
      return pl.BlockSpec((width // groups, 1), lambda g, b: (g, 0))
    return pl.BlockSpec(array.shape, lambda g, b: (0, 0))

  matrices = batch * options.heads * tokens**2
  return pl.pallas_call(
    functools.partial(kernel, options=options),
    grid=(groups, batch),
    in_specs=[spec(operand) for operand in operands],
    out_specs=[spec(result) for result in results],
    out_shape=results,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("arbitrary", "arbitrary"),
      vmem_limit_bytes=_VMEM_LIMIT,
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * matrices * head_dim * products,
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
  batch, width, tokens = qkv.shape
  out = jax.ShapeDtypeStruct((batch, width // 3, tokens), qkv.dtype)
  operands = (qkv, bias, scales, *tables)
  (result,) = _call(_forward_kernel, operands, [out], 2, options)
  return result, operands


def _backward(
  options: Options, operands: Any, cotangent: Any
) -> tuple[Any, Any, Any, None]:
  results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands[:3]]
  inputs = (*operands, cotangent)
  return (*_call(_backward_kernel, inputs, results, 6, options), None)


fused_attention.defvjp(_forward, _backward)
