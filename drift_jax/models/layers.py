"""Layers of the generator: normalisation, rotary positions, attention, MLP.

All activations are [batch, tokens, channels]; parameters are float32 and the
matrix products run in the `dtype` of their module.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

NORM_EPSILON = 1e-6
ROPE_THETA = 10_000.0
# The [T, T] matrices of more tokens don't fit on chip; see attention_kernel.
MAX_TOKENS_ON_CHIP = 1024
# Of fewer tokens all heads together are as fast; see attention_by_head.
_FEWEST_TOKENS_BY_HEAD = 32

embedding_init = nn.initializers.normal(stddev=0.02)
linear_init = nn.initializers.xavier_uniform()


# Names for jax.checkpoint policies: the input of attention's last layer, the
# MLP's two wide products, and the MLP's result.
ATTENTION = "attention"
# cuDNN's attention has its result, and what its gradient needs besides, from
# this primitive.
CUDNN_ATTENTION = "dot_product_attention_fwd_wrapper"
WIDE = "wide"
MLP = "mlp"


class Dense(nn.Module):
  """x W + b: float32 parameters, the product in `dtype`; nn.Dense's tree.

  The bias is added in float32. On TPUs its gradient is then the sum of a
  product's epilogue, or one fast pass; in bfloat16 it is neither.
  """

  features: int
  dtype: jnp.dtype
  kernel_init: nn.initializers.Initializer = linear_init

  def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B F"]:
    product, bias = self.parts(x)
    return (product.astype(jnp.float32) + bias).astype(self.dtype)

  def parts(
    self, x: Float[Array, "*B C"]
  ) -> tuple[Float[Array, "*B F"], Float[Array, " F"]]:
    """(x W, b): the bias in float32."""
    kernel, bias = self.weights(x.shape[-1])
    return jnp.dot(x.astype(self.dtype), kernel.astype(self.dtype)), bias

  @nn.compact
  def weights(
    self, channels: int
  ) -> tuple[Float[Array, "C F"], Float[Array, " F"]]:
    """(W, b): the bias in float32."""
    shape = (channels, self.features)
    kernel = self.param("kernel", self.kernel_init, shape)
    bias = self.param("bias", nn.initializers.zeros, (self.features,))
    return jnp.asarray(kernel), jnp.asarray(bias, jnp.float32)


class RMSNorm(nn.Module):
  """x / sqrt(mean_c(x^2) + 1e-6) * scale, in float32.

  The mean is over the last axis. The result is float32 whatever the input's
  dtype; the caller casts it if it needs less.
  """

  def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
    scale = self.weights(x.shape[-1])
    x = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(mean_square + NORM_EPSILON)
    return x * scale

  @nn.compact
  def weights(self, channels: int) -> Float[Array, " C"]:
    """The scale, float32."""
    scale = self.param("scale", nn.initializers.ones, (channels,))
    return jnp.asarray(scale, jnp.float32)


def rotary_angles(tokens: int, head_dim: int) -> np.ndarray:
  """Angles [tokens, head_dim / 2] in radians: t * 10000^(-2 i / head_dim)."""
  frequencies = ROPE_THETA ** (-np.arange(0, head_dim, 2) / head_dim)
  return np.arange(tokens)[:, None] * frequencies[None, :]


def apply_rotary(x: Float[Array, "B T H D"]) -> Float[Array, "B T H D"]:
  """Rotates the channel pairs (i, i + D/2) of position t by t * theta_i.

  Rotary position embedding with half-split pairs over one axis of positions
  0..T-1 (T counts the context tokens too), in float32, returned in x's dtype.
  """
  angles = rotary_angles(x.shape[1], x.shape[3])[None, :, None, :]
  cos = jnp.asarray(np.cos(angles), jnp.float32)
  sin = jnp.asarray(np.sin(angles), jnp.float32)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def attention(
  query: Float[Array, "B T H D"],
  key: Float[Array, "B T H D"],
  value: Float[Array, "B T H D"],
  *,
  dtype: jnp.dtype,
) -> Float[Array, "B T H D"]:
  """softmax(q k^T / sqrt(D)) v over all tokens, without a mask.

  The products take operands of `dtype`; the softmax is float32 for every
  dtype. The result has `dtype`.
  """
  axes = "bthd,bshd->bhts", "bhts,bshd->bthd"
  return _attend(query, key, value, dtype, axes)


def _attend(
  query: Array,
  key: Array,
  value: Array,
  dtype: jnp.dtype,
  axes: tuple[str, str],
) -> Array:
  """See attention; `axes` are those of its two products."""
  query, key, value = (x.astype(dtype) for x in (query, key, value))
  logits = jnp.einsum(axes[0], query, key, preferred_element_type=jnp.float32)
  weights = jax.nn.softmax(logits * query.shape[-1] ** -0.5, axis=-1)
  return jnp.einsum(axes[1], weights.astype(dtype), value)


def attention_by_head(
  query: Float[Array, "B T H D"],
  key: Float[Array, "B T H D"],
  value: Float[Array, "B T H D"],
  *,
  dtype: jnp.dtype,
) -> Float[Array, "B T H D"]:
  """`attention` of one head after the other, for CPUs.

  XLA's products of all heads together take up to three times as long there, if
  they are float32 and of many tokens: docs/performance.md. Others are left.
  """
  if query.shape[1] < _FEWEST_TOKENS_BY_HEAD or dtype != jnp.float32:
    return attention(query, key, value, dtype=dtype)
  axes = "btd,bsd->bts", "bts,bsd->btd"
  heads = [
    _attend(query[:, :, i], key[:, :, i], value[:, :, i], dtype, axes)
    for i in range(query.shape[2])
  ]
  return jnp.stack(heads, axis=2)


class Attention(nn.Module):
  """Multi-head self-attention with QK-norm, then rotary positions.

  Attributes:
    kernel: who computes it. 'xla' runs everywhere, and 'xla_by_head' too, which
      is faster on CPUs, see attention_by_head. 'pallas' runs on TPUs and
      keeps everything on chip, see attention_kernel; XLA computes sequences
      that don't fit. 'interpret' is the same without a TPU. 'cudnn' is the
      fused attention of NVIDIA GPUs; XLA computes what it does not take:
      float32, odd numbers of tokens, heads of other than 8, 16, ... 128
      channels.
  """

  num_heads: int
  dtype: jnp.dtype
  attention_dtype: jnp.dtype
  kernel: str = "xla"

  def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
    batch, tokens, channels = x.shape
    project, q_norm, k_norm, out_project = self.layers(channels)
    on_cudnn = self._on_cudnn(tokens, channels // self.num_heads)
    on_chip = self.kernel in ("pallas", "interpret")
    if on_chip and tokens <= MAX_TOKENS_ON_CHIP:
      out = self._on_chip(x, *project.weights(channels), (q_norm, k_norm))
    else:
      qkv = project(x).reshape(batch, tokens, 3, self.num_heads, -1)
      query, key, value = (qkv[:, :, i] for i in range(3))
      query = apply_rotary(q_norm(query))
      key = apply_rotary(k_norm(key))
      if on_cudnn:
        out = jax.nn.dot_product_attention(
          *(x.astype(jnp.bfloat16) for x in (query, key, value)),
          implementation="cudnn",
        )
      else:
        by_head = self.kernel == "xla_by_head"
        computed = attention_by_head if by_head else attention
        out = computed(query, key, value, dtype=self.attention_dtype)
      out = out.reshape(batch, tokens, channels)
    out = out.astype(self.dtype)
    if not on_cudnn:
      out = checkpoint_name(out, ATTENTION)
    return out_project(out)

  @nn.compact
  def layers(self, channels: int) -> tuple[Dense, RMSNorm, RMSNorm, Dense]:
    """First projection, norms of queries and keys, last projection."""
    return (
      Dense(3 * channels, dtype=self.dtype, name="qkv"),
      RMSNorm(name="q_norm"),
      RMSNorm(name="k_norm"),
      Dense(channels, dtype=self.dtype, name="out"),
    )

  def _on_cudnn(self, tokens: int, head_dim: int) -> bool:
    return (
      self.kernel == "cudnn"
      and self.attention_dtype == jnp.bfloat16
      and tokens % 2 == 0
      and head_dim in range(8, 129, 8)
    )

  def _on_chip(
    self,
    x: Float[Array, "B T C"],
    kernel: Float[Array, "C _"],
    bias: Float[Array, " _"],
    norms: tuple[RMSNorm, RMSNorm],
  ) -> Float[Array, "B T C"]:
    # Pallas takes a while to import.
    from drift_jax.models import attention_kernel

    _, tokens, channels = x.shape
    head_dim = channels // self.num_heads
    kernel, bias = (
      attention_kernel.by_groups(x, self.num_heads) for x in (kernel, bias)
    )
    x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
    out: Any = attention_kernel.fused_attention(
      jnp.einsum("btc,cf->bft", x, kernel),
      bias[:, None],
      jnp.stack([norm.weights(head_dim) for norm in norms], axis=1),
      _rotary_tables(tokens, head_dim),
      _kernel_options(self.num_heads, self.attention_dtype, self.kernel),
    )
    return jnp.swapaxes(out, 1, 2)

  def matrices(self, channels: int) -> int:
    """How many numbers its matrices have."""
    return 4 * channels**2

  def branch(self, norm: Float[Array, "1 C"], tokens: int) -> tuple[Any, Any]:
    """(weights, tables) of branch_kernels."""
    from drift_jax.models import branch_kernels

    channels = norm.shape[-1]
    head_dim = channels // self.num_heads
    project, q_norm, k_norm, out_project = self.layers(channels)
    qkv, qkv_bias = project.weights(channels)
    out, out_bias = out_project.weights(channels)
    weights = branch_kernels.Attention(
      norm=norm,
      qkv=qkv.T,
      qkv_bias=qkv_bias[:, None],
      out=out,
      out_bias=out_bias[None],
      scales=jnp.stack([x.weights(head_dim) for x in (q_norm, k_norm)], axis=1),
    )
    return weights, _rotary_tables(tokens, head_dim)


def _rotary_tables(
  tokens: int, head_dim: int
) -> tuple[Float[Array, "D T"], Float[Array, "D T"]]:
  """Cosines and sines, for the kernels."""
  angles = np.tile(rotary_angles(tokens, head_dim), 2).T
  return (
    jnp.asarray(np.cos(angles), jnp.float32),
    jnp.asarray(np.sin(angles), jnp.float32),
  )


def _kernel_options(heads: int, dtype: jnp.dtype, kernel: str) -> Any:
  from drift_jax.models import attention_kernel

  return attention_kernel.Options(
    heads, dtype, NORM_EPSILON, kernel == "interpret"
  )


def swiglu_width(hidden_size: int, mlp_ratio: float) -> int:
  """Hidden width 2/3 * mlp_ratio * hidden_size, rounded up to 32."""
  return -(-int(2 / 3 * mlp_ratio * hidden_size) // 32) * 32


class SwiGLU(nn.Module):
  """down(silu(gate(x)) * up(x))."""

  width: int
  dtype: jnp.dtype

  def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
    gate, up, down = self.layers(x.shape[-1])
    hidden = nn.silu(checkpoint_name(gate(x), WIDE))
    hidden = hidden * checkpoint_name(up(x), WIDE)
    return checkpoint_name(down(hidden), MLP)

  @nn.compact
  def layers(self, channels: int) -> tuple[Dense, Dense, Dense]:
    """Gate, up and down."""
    return (
      Dense(self.width, dtype=self.dtype, name="gate"),
      Dense(self.width, dtype=self.dtype, name="up"),
      Dense(channels, dtype=self.dtype, name="down"),
    )

  def matrices(self, channels: int) -> int:
    """How many numbers its matrices have."""
    return 3 * channels * self.width

  def branch(self, norm: Float[Array, "1 C"], tokens: int) -> tuple[Any, Any]:
    """(weights, no tables) of branch_kernels."""
    from drift_jax.models import branch_kernels

    del tokens
    channels = norm.shape[-1]
    gate, up, down = self.layers(channels)
    weights = (gate.weights(channels), up.weights(channels))
    found = [norm]
    for kernel, bias in (*weights, down.weights(self.width)):
      found += [kernel, bias[None]]
    return branch_kernels.Mlp(*found), ()


class Modulation(nn.Module):
  """adaLN: `count` vectors [B, 1, width] from silu(condition), in float32.

  Zero-initialised (adaLN-zero), so that shift, scale and gate start at 0.
  """

  count: int
  width: int

  @nn.compact
  def __call__(
    self, condition: Float[Array, "B D"]
  ) -> tuple[Float[Array, "B 1 C"], ...]:
    out = Dense(
      self.count * self.width,
      dtype=jnp.dtype(jnp.float32),
      kernel_init=nn.initializers.zeros,
      name="linear",
    )(nn.silu(condition))
    return tuple(jnp.split(out[:, None, :], self.count, axis=-1))


class Block(nn.Module):
  """DiT block: x + gate * f(norm(x) * (1 + scale) + shift), f twice.

  f is attention, then SwiGLU. Shift, scale and gate come from the condition
  in float32. Shaped as the body of a scan over depth: the carry is x, there
  is no per-block output. Each output is sown as 'intermediates/output'.

  Attributes:
    kernel: of attention.
    memory_on_chip: bytes that a kernel of a branch may take, for 'pallas' and
      'interpret', see branch_kernels; 0 for no such kernel. XLA computes
      branches that don't fit.
  """

  num_heads: int
  mlp_width: int
  dtype: jnp.dtype
  attention_dtype: jnp.dtype
  kernel: str = "xla"
  memory_on_chip: int = 0

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T C"], condition: Float[Array, "B D"]
  ) -> tuple[Float[Array, "B T C"], None]:
    modulation = Modulation(6, x.shape[-1], name="modulation")(condition)
    attention = Attention(
      self.num_heads,
      self.dtype,
      self.attention_dtype,
      self.kernel,
      name="attention",
    )
    mlp = SwiGLU(self.mlp_width, self.dtype, name="mlp")
    x = self._branch(x, modulation[:3], attention)
    x = self._branch(x, modulation[3:], mlp)
    self.sow("intermediates", "output", x)
    return x, None

  def _branch(
    self,
    x: Float[Array, "B T C"],
    modulation: tuple[Float[Array, "B 1 C"], ...],
    f: Any,
  ) -> Float[Array, "B T C"]:
    """x + gate * f(norm(x) * (1 + scale) + shift)."""
    norm = RMSNorm(name=f"{f.name}_norm")
    if self.memory_on_chip:
      fused = self._on_chip(x, modulation, norm, f)
      if fused is not None:
        return fused
    shift, scale, gate = modulation
    hidden = f((norm(x) * (1 + scale) + shift).astype(self.dtype))
    return x + (gate * hidden.astype(jnp.float32)).astype(self.dtype)

  def _on_chip(
    self,
    x: Float[Array, "B T C"],
    modulation: tuple[Float[Array, "B 1 C"], ...],
    norm: RMSNorm,
    f: Any,
  ) -> Float[Array, "B T C"] | None:
    # Pallas takes a while to import.
    from drift_jax.models import branch_kernels

    channels = x.shape[-1]
    samples = branch_kernels.samples_together(
      x.shape, f.matrices(channels), self.dtype, self.memory_on_chip
    )
    if not samples:
      return None
    weights, tables = f.branch(norm.weights(channels)[None], x.shape[1])
    out = branch_kernels.fused_branch(
      x,
      jnp.concatenate(modulation, axis=1),
      weights,
      tables,
      branch_kernels.Options(
        samples,
        self.memory_on_chip,
        _kernel_options(self.num_heads, self.attention_dtype, self.kernel),
      ),
    )
    return checkpoint_name(out, f.name)


class FinalLayer(nn.Module):
  """linear(norm(x) * (1 + scale) + shift), zero-initialised; float32 out."""

  features: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T C"], condition: Float[Array, "B D"]
  ) -> Float[Array, "B T F"]:
    shift, scale = Modulation(2, x.shape[-1], name="modulation")(condition)
    x = RMSNorm(name="norm")(x) * (1 + scale) + shift
    x = Dense(
      self.features,
      dtype=self.dtype,
      kernel_init=nn.initializers.zeros,
      name="linear",
    )(x.astype(self.dtype))
    return x.astype(jnp.float32)


def sinusoidal_embedding(
  t: Float[Array, " B"], features: int
) -> Float[Array, "B F"]:
  """[cos(t w_i), sin(t w_i)], w_i = 10000^(-2 i / features), float32."""
  half = features // 2
  frequencies = 10_000.0 ** (-np.arange(half) / half)
  angles = t[:, None] * jnp.asarray(frequencies, jnp.float32)
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class ScalarEmbedding(nn.Module):
  """RMSNorm(MLP(sinusoidal(t))) in float32: 256 -> features -> features."""

  features: int

  @nn.compact
  def __call__(self, t: Float[Array, " B"]) -> Float[Array, "B F"]:
    x = sinusoidal_embedding(t, 256)
    for name in ("linear_in", "linear_out"):
      x = Dense(
        self.features,
        dtype=jnp.dtype(jnp.float32),
        kernel_init=embedding_init,
        name=name,
      )(nn.silu(x) if name == "linear_out" else x)
    return RMSNorm(name="norm")(x)


class VectorEmbedding(nn.Module):
  """MLP(v) in float32: D -> features -> features, SiLU between."""

  features: int

  @nn.compact
  def __call__(self, v: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
    dense = functools.partial(Dense, self.features, jnp.dtype(jnp.float32))
    return dense(name="linear_out")(nn.silu(dense(name="linear_in")(v)))


def sincos_position_init(side: int) -> nn.initializers.Initializer:
  """Initialiser of a [1, side^2, C] table: fixed 2-D sin-cos codes.

  The first half of the channels encodes the column, the second the row, each
  as [sin, cos] of position * 10000^(-4 i / C); C must be a multiple of 4.
  """

  def init(key: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
    del key
    quarter = shape[-1] // 4
    frequencies = 10_000.0 ** (-np.arange(quarter) / quarter)
    row, column = np.divmod(np.arange(side * side), side)
    codes = []
    for position in (column, row):
      angles = position[:, None] * frequencies[None, :]
      codes += [np.sin(angles), np.cos(angles)]
    return jnp.asarray(np.concatenate(codes, axis=1)[None], dtype)

  return init


def patchify(
  x: Float[Array, "B H W C"], patch: int
) -> Float[Array, "B H//{patch} W//{patch} C*{patch}**2"]:
  """Folds patches of pixels into channels, ordered (row, column, channel)."""
  batch, height, width, channels = x.shape
  x = x.reshape(batch, height // patch, patch, width // patch, patch, channels)
  x = x.transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(
    batch, height // patch, width // patch, patch * patch * channels
  )


def unpatchify(
  x: Float[Array, "B H W C"], patch: int
) -> Float[Array, "B H*{patch} W*{patch} C//{patch}**2"]:
  """Inverse of `patchify`."""
  batch, height, width, folded = x.shape
  channels = folded // patch**2
  x = x.reshape(batch, height, width, patch, patch, channels)
  x = x.transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(batch, height * patch, width * patch, channels)
