"""The two branches of a DiT block on chip (Pallas, TPU).

The same numbers as the plain form of `layers.Block`, up to rounding:

  out = x + gate * f(n(x) * scale_n * (1 + scale) + shift),  n(x) = x / rms(x)

where f is attention (see attention_kernel) between its projections, or SwiGLU.
Norm, modulation and SiLU are float32; the operands of all products have the
dtype of x, those of attention its own, and products are summed in float32.

A program of the grid is a group of samples. The weights stay on chip for all of
them, and nothing that is wider than x leaves it: the backward pass computes
that again from x, and adds up the gradients of the weights on chip.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from drift_jax.models import attention_kernel
from drift_jax.models.attention_kernel import dot

# Rows of a program: the gradients of the weights are products over rows, which
# the matrix unit takes 256 at once.
_MOST_ROWS = 1152
# Channels that are computed at once.
_CHUNK = 512
# Arrays of all rows that are on chip at once, in float32 of x's channels and a
# chunk's, and in the dtype of x of x's channels: measured by what compiles.
_WIDE, _NARROW = 4, 8


class Attention(NamedTuple):
  """Weights of the branch of attention, float32."""

  norm: Float[Array, "1 C"]
  qkv: Float[Array, "3*C C"]
  qkv_bias: Float[Array, "3*C 1"]
  out: Float[Array, "C C"]
  out_bias: Float[Array, "1 C"]
  scales: Float[Array, "D 2"]  # of the norms of queries and keys


class Mlp(NamedTuple):
  """Weights of the branch of the MLP, float32."""

  norm: Float[Array, "1 C"]
  gate: Float[Array, "C W"]
  gate_bias: Float[Array, "1 W"]
  up: Float[Array, "C W"]
  up_bias: Float[Array, "1 W"]
  down: Float[Array, "W C"]
  down_bias: Float[Array, "1 C"]


class Options(NamedTuple):
  """How a branch is computed.

  Attributes:
    samples: of a program, see samples_together.
    memory: bytes on chip.
    attention: of the branch of attention; the MLP takes its epsilon.
  """

  samples: int
  memory: int
  attention: attention_kernel.Options


def _chunks(width: int) -> list[slice]:
  return [slice(i, min(i + _CHUNK, width)) for i in range(0, width, _CHUNK)]


def _slices(x_ref: Any, modulation_ref: Any) -> list[slice]:
  """Rows of each sample of the group."""
  samples = modulation_ref.shape[0]
  tokens = x_ref.shape[0] // samples
  return [slice(i * tokens, (i + 1) * tokens) for i in range(samples)]


def _normal(x: Any, epsilon: float) -> tuple[Any, Any]:
  """(n(x), 1 / rms(x)) in float32."""
  x = x.astype(jnp.float32)
  mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
  inverse = jax.lax.rsqrt(mean_square + epsilon)
  return x * inverse, inverse


def _hidden(x_ref: Any, modulation_ref: Any, norm: Any, epsilon: float) -> Any:
  """What f is applied to, of all rows."""
  parts = []
  for i, rows in enumerate(_slices(x_ref, modulation_ref)):
    normal, _ = _normal(x_ref[rows], epsilon)
    shift, scale = modulation_ref[i, 0:1], modulation_ref[i, 1:2]
    parts.append(normal * norm * (1 + scale) + shift)
  return jnp.concatenate(parts, axis=0).astype(x_ref.dtype)


def _forward_kernel(x_ref, modulation_ref, *refs, branch, options):
  weights, tables, (out_ref, *scratch) = branch.split(refs)
  epsilon = options.attention.epsilon
  hidden = _hidden(x_ref, modulation_ref, weights.norm[...], epsilon)
  y = branch.forward(hidden, weights, tables, scratch, options.attention)
  for i, rows in enumerate(_slices(x_ref, modulation_ref)):
    gated = modulation_ref[i, 2:3] * y[rows]
    out_ref[rows] = x_ref[rows] + gated.astype(x_ref.dtype)


def _backward_kernel(x_ref, modulation_ref, *refs, branch, options):
  weights, tables, (dout_ref, dx_ref, dmodulation_ref, *refs) = branch.split(
    refs
  )
  grads, _, scratch = branch.split(refs, tables=0)

  # Programs run in turn, and all add to the same sums of the weights.
  @pl.when(pl.program_id(0) == 0)
  def _():
    for ref in grads:
      ref[...] = jnp.zeros_like(ref)

  epsilon = options.attention.epsilon
  norm = weights.norm[...]
  hidden = _hidden(x_ref, modulation_ref, norm, epsilon)
  groups = _slices(x_ref, modulation_ref)
  # 1. Through the gate to the branch's result, and through the branch.
  dys = [
    modulation_ref[i, 2:3] * dout_ref[rows].astype(jnp.float32)
    for i, rows in enumerate(groups)
  ]
  y, dhidden = branch.backward(
    hidden,
    jnp.concatenate(dys, axis=0),
    weights,
    grads,
    tables,
    scratch,
    options.attention,
  )
  # 2. Through modulation and norm: dx / dn(x) is (d - n(x) mean(d n(x))) / rms
  for i, rows in enumerate(groups):
    dout, d = dout_ref[rows].astype(jnp.float32), dhidden[rows]
    normal, inverse = _normal(x_ref[rows], epsilon)
    slope = 1 + modulation_ref[i, 1:2]
    dmodulation_ref[i] = jnp.concatenate(
      [
        jnp.sum(part, axis=0, keepdims=True)
        for part in (d, d * normal * norm, dout * y[rows])
      ],
      axis=0,
    )
    grads.norm[...] += jnp.sum(d * normal * slope, axis=0, keepdims=True)
    d *= slope * norm
    shift = normal * jnp.mean(d * normal, axis=-1, keepdims=True)
    dx_ref[rows] = (dout + inverse * (d - shift)).astype(dx_ref.dtype)


def _wide(hidden: Any, weights: Mlp, at: slice) -> tuple[Any, Any]:
  """h W_gate + b_gate and h W_up + b_up, of some channels."""
  gate = dot(hidden, weights.gate[:, at], (1, 0)) + weights.gate_bias[:, at]
  up = dot(hidden, weights.up[:, at], (1, 0)) + weights.up_bias[:, at]
  return gate, up


def _mlp_forward(hidden, weights, tables, scratch, options):
  del tables, scratch, options
  y = jnp.zeros(hidden.shape, jnp.float32)
  for at in _chunks(weights.gate.shape[1]):
    gate, up = _wide(hidden, weights, at)
    wide = (jax.nn.silu(gate) * up).astype(hidden.dtype)
    y += dot(wide, weights.down[at], (1, 0))
  return y + weights.down_bias[...]


def _mlp_backward(hidden, dy, weights, grads, tables, scratch, options):
  del tables, scratch, options
  dtype = hidden.dtype
  grads.down_bias[...] += jnp.sum(dy, axis=0, keepdims=True)
  dy = dy.astype(dtype)
  y = jnp.zeros(hidden.shape, jnp.float32)
  dhidden = jnp.zeros(hidden.shape, jnp.float32)
  for at in _chunks(weights.gate.shape[1]):
    gate, up = _wide(hidden, weights, at)
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    wide = (silu * up).astype(dtype)
    y += dot(wide, weights.down[at], (1, 0))
    grads.down[at] += dot(wide, dy, (0, 0))
    dwide = dot(dy, weights.down[at], (1, 1))
    dgate = dwide * up * (sigmoid + silu * (1 - sigmoid))
    dup = dwide * silu
    for d, kernel, dkernel, dbias in (
      (dgate, weights.gate, grads.gate, grads.gate_bias),
      (dup, weights.up, grads.up, grads.up_bias),
    ):
      dbias[:, at] += jnp.sum(d, axis=0, keepdims=True)
      d = d.astype(dtype)
      dkernel[:, at] += dot(hidden, d, (0, 0))
      dhidden += dot(d, kernel[:, at], (1, 1))
  return y + weights.down_bias[...], dhidden


def _spread(part: Any, ref: Any, at: slice) -> None:
  """Writes some channels of all samples, [F, samples T] to [samples, F, T]."""
  samples, _, tokens = ref.shape
  part = part.astype(ref.dtype)
  for i in range(samples):
    ref[i, at] = part[:, i * tokens : (i + 1) * tokens]


def _joined(ref: Any, at: slice) -> Any:
  """Reads what _spread writes."""
  return jnp.concatenate([ref[i, at] for i in range(ref.shape[0])], axis=1)


def _project(hidden: Any, weights: Attention, qkv_ref: Any) -> None:
  """Writes queries, keys and values of all heads, [samples, 3 C, T]."""
  for at in _chunks(qkv_ref.shape[1]):
    part = dot(weights.qkv[at], hidden, (1, 1)) + weights.qkv_bias[at]
    _spread(part, qkv_ref, at)


def _results(out_ref: Any, weights: Attention) -> Any:
  """The last projection of all samples."""
  parts = [
    dot(out_ref[i], weights.out[...], (0, 0)) for i in range(out_ref.shape[0])
  ]
  return jnp.concatenate(parts, axis=0) + weights.out_bias[...]


def _attention_forward(hidden, weights, tables, scratch, options):
  qkv_ref, out_ref = scratch
  _project(hidden, weights, qkv_ref)
  scales, tables = weights.scales[...], tuple(table[...] for table in tables)

  def attend(i, _):
    attention_kernel.attend(qkv_ref, i, scales, tables, out_ref, options)
    return 0

  jax.lax.fori_loop(0, qkv_ref.shape[0], attend, 0)
  return _results(out_ref, weights)


def _attention_backward(hidden, dy, weights, grads, tables, scratch, options):
  qkv_ref, out_ref, dqkv_ref, dout_ref = scratch
  _project(hidden, weights, qkv_ref)
  scales, tables = weights.scales[...], tuple(table[...] for table in tables)
  # 1. Through the last projection, but for its gradient.
  grads.out_bias[...] += jnp.sum(dy, axis=0, keepdims=True)
  dy = dy.astype(hidden.dtype)
  for at in _chunks(hidden.shape[1]):
    _spread(dot(weights.out[at], dy, (1, 1)), dout_ref, at)

  # 2. Through attention, whose result is made again.
  def attend(i, _):
    attention_kernel.attend_gradients(
      *(qkv_ref, i, scales, tables, dout_ref),
      *(dqkv_ref, grads.qkv_bias, grads.scales, options),
      out_ref=out_ref,
    )
    return 0

  jax.lax.fori_loop(0, qkv_ref.shape[0], attend, 0)
  # 3. The projections' own.
  for at in _chunks(hidden.shape[1]):
    grads.out[at] += dot(_joined(out_ref, at), dy, (1, 0))
  dhidden = jnp.zeros(hidden.shape, jnp.float32)
  for at in _chunks(qkv_ref.shape[1]):
    part = _joined(dqkv_ref, at)
    grads.qkv[at] += dot(part, hidden, (1, 0))
    dhidden += dot(part, weights.qkv[at], (0, 0))
  return _results(out_ref, weights), dhidden


class _Branch(NamedTuple):
  """f of the module's equation.

  Attributes:
    weights: their type.
    kernels: names of those that are matrices.
    tables: constants beside them.
    forward: (hidden, weights, tables, scratch, options) -> y, float32.
    backward: (hidden, dy, weights, grads, tables, scratch, options) -> (y,
      dhidden), float32; adds the gradients of the weights.
    scratch: channels over x's of arrays [samples, _, T] on chip: what `forward`
      has, and what `backward` has twice.
  """

  weights: Any
  kernels: tuple[str, ...]
  tables: int
  forward: Callable[..., Any]
  backward: Callable[..., Any]
  scratch: tuple[int, ...]

  def split(
    self, refs: Sequence[Any], tables: int | None = None
  ) -> tuple[Any, Sequence[Any], Sequence[Any]]:
    """(weights, tables, what follows)"""
    count = len(self.weights._fields)
    end = count + (self.tables if tables is None else tables)
    return self.weights(*refs[:count]), refs[count:end], refs[end:]


_BRANCHES = {
  Attention: _Branch(
    weights=Attention,
    kernels=("qkv", "out"),
    tables=2,
    forward=_attention_forward,
    backward=_attention_backward,
    scratch=(3, 1),
  ),
  Mlp: _Branch(
    weights=Mlp,
    kernels=("gate", "up", "down"),
    tables=0,
    forward=_mlp_forward,
    backward=_mlp_backward,
    scratch=(),
  ),
}


def samples_together(
  shape: tuple[int, ...],
  numbers: int,
  dtype: jnp.dtype,
  memory: int,
) -> int:
  """Samples of a program: a divisor of all, as many as fit; 0: none does.

  Args:
    shape: [B, T, C] of the tokens.
    numbers: in the branch's matrices.
    dtype: of the tokens.
    memory: bytes on chip.
  """
  samples, tokens, channels = shape
  # Rows of a sample begin where a register does.
  if tokens % (32 // dtype.itemsize):
    return 0
  # The weights and their gradients, float32, are there all the time.
  weights = numbers * (dtype.itemsize + 4)
  row = 4 * _WIDE * (channels + _CHUNK) + dtype.itemsize * _NARROW * channels
  fit = (memory - weights) // row
  most = max(min(fit, _MOST_ROWS), min(fit, tokens)) // tokens
  return max((n for n in range(1, most + 1) if samples % n == 0), default=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def fused_branch(
  x: Float[Array, "B T C"],
  modulation: Float[Array, "B 3 C"],
  weights: Attention | Mlp,
  tables: tuple[Float[Array, "D T"], ...],
  options: Options,
) -> Float[Array, "B T C"]:
  """x + gate * f(n(x) * scale_n * (1 + scale) + shift), see the module.

  Args:
    x: tokens.
    modulation: shift, scale and gate of each sample, float32.
    weights: float32; their type is the branch.
    tables: of attention, see fused_attention.
    options: the result's dtype is that of x.
  """
  return _forward(x, modulation, weights, tables, options)[0]


def _call(
  kernel: Any,
  operands: Sequence[Any],
  results: Sequence[Any],
  branch: _Branch,
  passes: int,
  options: Options,
) -> Any:
  """Runs the kernel for each group of samples.

  Args:
    kernel: takes references to operands, results and scratch.
    operands: arrays with a leading axis of groups, the first [G, N, C]; those
      with two axes are shared by all.
    results: their shapes and dtypes, likewise.
    branch: which one.
    passes: products over those of the forward kernel.
    options: of the branch.
  """
  x, weights = operands[0], branch.split(operands[2:])[0]
  groups, rows, channels = x.shape
  tokens = rows // options.samples
  # For a row; the last kernel's rows are SwiGLU's width.
  products = sum(getattr(weights, name).size for name in branch.kernels)
  exponentials = len(getattr(weights, branch.kernels[-1]))
  if branch.tables:
    products += 2 * tokens * channels
    exponentials = options.attention.heads * tokens

  def spec(array: Any) -> pl.BlockSpec:
    if array.ndim > 2:
      shape = (None, *array.shape[1:])
      return pl.BlockSpec(shape, lambda i: (i, *[0] * (len(shape) - 1)))
    # One for all groups needs no second buffer for the next one's.
    return pl.BlockSpec(
      array.shape, lambda i: (0, 0), pipeline_mode=pl.Buffered(1)
    )

  return pl.pallas_call(
    functools.partial(kernel, branch=branch, options=options),
    grid=(groups,),
    in_specs=[spec(operand) for operand in operands],
    out_specs=[spec(result) for result in results],
    out_shape=results,
    scratch_shapes=[
      pltpu.VMEM((options.samples, n * channels, tokens), x.dtype)
      for n in branch.scratch * min(passes, 2)
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("arbitrary",), vmem_limit_bytes=options.memory
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * groups * rows * products * passes,
      bytes_accessed=sum(
        array.size * array.dtype.itemsize for array in (*operands, *results)
      ),
      transcendentals=groups * rows * exponentials,
    ),
    interpret=options.attention.interpret,
  )(*operands)


def _grouped(array: Any, options: Options) -> Any:
  """[B, ..., C] -> [G, rows, C]"""
  return array.reshape(len(array) // options.samples, -1, array.shape[-1])


def _operands(
  x: Any, modulation: Any, weights: Any, tables: Any, options: Options
) -> tuple[Any, ...]:
  """Of each group; matrices in the dtype of the products."""
  kernels = {
    name: getattr(weights, name).astype(x.dtype)
    for name in _BRANCHES[type(weights)].kernels
  }
  return (
    _grouped(x, options),
    modulation.reshape(-1, options.samples, *modulation.shape[1:]),
    *weights._replace(**kernels),
    *tables,
  )


def _forward(
  x: Any, modulation: Any, weights: Any, tables: Any, options: Options
) -> tuple[Any, Any]:
  operands = _operands(x, modulation, weights, tables, options)
  result = jax.ShapeDtypeStruct(operands[0].shape, x.dtype)
  branch = _BRANCHES[type(weights)]
  (out,) = _call(_forward_kernel, operands, [result], branch, 1, options)
  return out.reshape(x.shape), (x, modulation, weights, tables)


def _backward(options: Options, residuals: Any, cotangent: Any) -> Any:
  x, modulation, weights, tables = residuals
  operands = _operands(x, modulation, weights, tables, options)
  results = [
    jax.ShapeDtypeStruct(array.shape, array.dtype) for array in operands[:2]
  ]
  # Sums of many: float32, even if the weights are not.
  results += [jax.ShapeDtypeStruct(w.shape, jnp.float32) for w in weights]
  inputs = (*operands, _grouped(cotangent, options))
  branch = _BRANCHES[type(weights)]
  # Each product has two in its gradient, and is made again.
  dx, dmodulation, *grads = _call(
    _backward_kernel, inputs, results, branch, 3, options
  )
  return (
    dx.reshape(x.shape),
    dmodulation.reshape(modulation.shape),
    jax.tree.map(
      lambda d, w: d.astype(w.dtype), branch.weights(*grads), weights
    ),
    tuple(None for _ in tables),
  )


fused_branch.defvjp(_forward, _backward)
