"""The one-step generator: a DiT from noise to samples (appendix A.2)."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from drift_jax.models import layers
from drift_jax.models.arguments import NOT_IN_PAPER, build, require_multiple

# Weight of the guidance scale's embedding in the conditioning vector.
ALPHA_EMBEDDING_WEIGHT = 0.02


def _saved(*names: str) -> Callable[..., Any]:
  """Policy of jax.checkpoint: keeps these, and what cuDNN's attention gives."""
  named = jax.checkpoint_policies.save_only_these_names(*names)

  def policy(primitive: Any, *inputs: Any, **parameters: Any) -> Any:
    if primitive.name == layers.CUDNN_ATTENTION:
      return True
    return named(primitive, *inputs, **parameters)

  return policy


_ATTENTION = _saved(layers.ATTENTION, layers.WIDE, layers.MLP)
# What a block keeps for its backward pass besides its input. The rest is
# computed again, and gathered parameters are gathered again.
_REMAT_POLICIES = {
  "none": None,
  "attention": _ATTENTION,
  "branches": _saved(layers.ATTENTION, layers.MLP),
  "full": jax.checkpoint_policies.nothing_saveable,
  "auto": _ATTENTION,
}
REMATS = tuple(_REMAT_POLICIES)


class Generator(nn.Module):
  """The DiT generator of arXiv:2602.04770, appendix A.2.

  x = f(noise; class, style, alpha) in one forward pass, without iteration: a
  transformer with SwiGLU, RMSNorm, QK-norm, rotary positions and adaLN-zero on
  patches of noise, which follow in-context conditioning tokens. Parameters are
  float32; those of the blocks are stacked, [depth, ...].

  Build it with `build_generator`, which checks the arguments. Calls:

    samples = generator.apply({'params': p}, labels, alpha,
                              noise=noise, style=style)
    samples = generator.apply({'params': p}, labels, alpha,
                              rngs={'noise': key})
    samples = generator.apply({'params': p}, labels, alpha, conditions, ...)

  The second draws noise and style: the same numbers that method='draw' returns
  for the batch size and the same key. The third is of a model of conditions,
  condition_size > 0.

  Attributes:
    input_size: height and width of noise and samples, in pixels.
    in_channels: channels of the noise.
    out_channels: channels of the samples.
    patch_size: side of a patch, in pixels; divides input_size.
    hidden_size: width of a token; a multiple of 4 and of 2 * num_heads.
    depth: number of blocks.
    num_heads: attention heads.
    mlp_ratio: SwiGLU's width is 2/3 of it times hidden_size, rounded up to 32.
    num_classes: labels are in [0, num_classes).
    cond_dim: width of the conditioning vector.
    context_tokens: in-context tokens before the patches; 0 for none.
    style_vocab: size of each style token's table.
    style_tokens: number of random style indices; 0 for no style embedding.
    dtype: of activations and matrix products, 'float32' or 'bfloat16'.
    attention_dtype: of the attention products; its softmax is float32.
    remat: what a block keeps for its backward pass; the rest is recomputed.
      'none': everything is kept; 'attention': the results of attention and
      MLP, and the MLP's wide products; 'branches': without these products;
      'full': only the block's input; 'auto': as 'attention', but a run on GPUs
      takes 'full'. The numbers are the same for all.
    condition_size: D, numbers of a condition, or of each of its tokens; 0: the
      class is the only condition.
    condition_tokens: T, tokens of a condition [T, D], which are in-context
      tokens; 0: it is one vector [D].
    clip: whether samples end at black and white, -1 and 1; a value that is
      beyond has no gradient.
    gather: applied by each block to its parameters before it uses them, e.g.
      to gather them from several devices.
    attention_kernel: see layers.Attention.
    memory_on_chip: see layers.Block.
    unroll: how many blocks are one round of the loop over depth.
  """

  input_size: int
  in_channels: int
  out_channels: int
  patch_size: int
  hidden_size: int
  depth: int
  num_heads: int
  mlp_ratio: float
  num_classes: int
  cond_dim: int
  context_tokens: int
  style_vocab: int
  style_tokens: int
  dtype: jnp.dtype
  attention_dtype: jnp.dtype
  remat: str
  condition_size: int
  condition_tokens: int
  clip: bool
  gather: Callable[[Any], Any] | None = None
  attention_kernel: str = "xla"
  memory_on_chip: int = 0
  unroll: int = 1

  @property
  def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Smallest inputs of a call: labels, alpha, conditions if any."""
    inputs = (
      jax.ShapeDtypeStruct((1,), jnp.int32),
      jax.ShapeDtypeStruct((), jnp.float32),
    )
    if not self.condition_size:
      return inputs
    shape = (1, *self.condition_shape)
    return (*inputs, jax.ShapeDtypeStruct(shape, jnp.float32))

  @property
  def condition_shape(self) -> tuple[int, ...]:
    """Shape of a condition: (D,) or (T, D); () if the model has none."""
    tokens, size = self.condition_tokens, self.condition_size
    return tuple(n for n in (tokens, size) if n)

  def setup(self) -> None:
    # 1. Embeddings of class, style and guidance scale
    side = self.input_size // self.patch_size
    self.class_embed = nn.Embed(
      self.num_classes,
      self.cond_dim,
      dtype=jnp.float32,
      embedding_init=layers.embedding_init,
    )
    if self.style_tokens:
      self.style_embed = self.param(
        "style_embed",
        layers.embedding_init,
        (self.style_tokens, self.style_vocab, self.cond_dim),
      )
    self.alpha_embed = layers.ScalarEmbedding(self.cond_dim)
    if self.condition_size:
      self.condition_embed = layers.VectorEmbedding(self.cond_dim)
    # 2. Tokens: patches with positions, and context
    project = functools.partial(
      nn.Dense, dtype=self.dtype, kernel_init=layers.linear_init
    )
    self.patch_embed = project(self.hidden_size)
    self.pos_embed = self.param(
      "pos_embed",
      layers.sincos_position_init(side),
      (1, side * side, self.hidden_size),
    )
    if self.context_tokens:
      self.context_proj = project(self.hidden_size)
      self.context_embed = self.param(
        "context_embed",
        layers.embedding_init,
        (1, self.context_tokens, self.hidden_size),
      )
    if self.condition_tokens:
      self.condition_proj = project(self.hidden_size)
      self.condition_pos = self.param(
        "condition_pos",
        layers.embedding_init,
        (1, self.condition_tokens, self.hidden_size),
      )
    # 3. Blocks, as a loop over depth
    block = layers.Block
    if self.gather is not None:
      block = nn.map_variables(block, "params", trans_in_fn=self.gather)
    if self.remat != "none":
      # XLA might merge the recomputed block with the stored one. In a rolled
      # loop it can't, so prevent_cse is needed only in an unrolled one.
      block = nn.remat(
        block,
        prevent_cse=self.unroll > 1,
        policy=_REMAT_POLICIES[self.remat],
      )
    self.blocks = nn.scan(
      block,
      variable_axes={"params": 0, "intermediates": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
      length=self.depth,
      unroll=self.unroll,
    )(
      num_heads=self.num_heads,
      mlp_width=layers.swiglu_width(self.hidden_size, self.mlp_ratio),
      dtype=self.dtype,
      attention_dtype=self.attention_dtype,
      kernel=self.attention_kernel,
      memory_on_chip=self.memory_on_chip,
    )
    self.final = layers.FinalLayer(
      self.patch_size**2 * self.out_channels, self.dtype
    )

  def draw(
    self, batch: int
  ) -> tuple[Float[Array, "B H W C"], Int[Array, "B S"]]:
    """Noise ~ N(0, 1) and uniform style indices from the stream 'noise'.

    Raises:
      ValueError: there is no such stream.
    """
    if not (self.has_rng("noise") or self.is_initializing()):
      raise ValueError(
        "the generator needs noise and style: pass noise= and style=, or"
        " rngs={'noise': key} to draw them"
      )
    noise_key, style_key = jax.random.split(self.make_rng("noise"))
    noise = jax.random.normal(
      noise_key, (batch, self.input_size, self.input_size, self.in_channels)
    )
    style = jax.random.randint(
      style_key, (batch, self.style_tokens), 0, max(self.style_vocab, 1)
    )
    return noise, style

  def condition(
    self,
    labels: Int[ArrayLike, " B"],
    alpha: Float[ArrayLike, "*B"] | float | int,
    style: Int[ArrayLike, "B S"],
    conditions: Float[ArrayLike, "B ... E"] | None = None,
  ) -> Float[Array, "B D"]:
    """Conditioning vector, float32.

    class embedding + sum of the style tokens' embeddings
    + 0.02 RMSNorm(MLP(sinusoidal(alpha))) + MLP(condition), of tokens their
    mean.

    Args:
      labels: class indices in [0, num_classes); others give NaN.
      alpha: guidance scale >= 1, one for all samples or one each.
      style: index in [0, style_vocab) into each style token's own table.
      conditions: if the model has any.
    """
    labels = jnp.asarray(labels)
    style = jnp.asarray(style)
    alpha = jnp.broadcast_to(jnp.asarray(alpha, jnp.float32), labels.shape)
    out = self.class_embed(labels)
    if self.style_tokens:
      rows = self.style_embed[jnp.arange(self.style_tokens), style]
      out = out + jnp.sum(rows.astype(jnp.float32), axis=1)
    if self.condition_size:
      given = jnp.asarray(conditions, jnp.float32)
      if self.condition_tokens:
        given = jnp.mean(given, axis=1)
      out = out + self.condition_embed(given)
    return out + ALPHA_EMBEDDING_WEIGHT * self.alpha_embed(alpha)

  def __call__(
    self,
    labels: Int[ArrayLike, " B"],
    alpha: Float[ArrayLike, "*B"] | float | int,
    conditions: Float[ArrayLike, "B ... E"] | None = None,
    *,
    noise: Float[ArrayLike, "B H W C"] | None = None,
    style: Int[ArrayLike, "B S"] | None = None,
  ) -> Float[Array, "B H W F"]:
    """Samples [B, input_size, input_size, out_channels], NHWC, float32.

    Args:
      labels: class indices in [0, num_classes).
      alpha: guidance scale >= 1, one for all samples or one each; may be
        traced.
      conditions: [B, condition_size], or [B, condition_tokens, condition_size];
        None if the model has none.
      noise: standard normal, [B, input_size, input_size, in_channels].
      style: [B, style_tokens], uniform in [0, style_vocab).

    Raises:
      ValueError: shapes that disagree with the model or with each other;
        neither noise and style nor the random stream 'noise' was given.
    """
    labels = jnp.asarray(labels)
    batch = labels.shape[0]
    if noise is None or (style is None and self.style_tokens):
      drawn_noise, drawn_style = self.draw(batch)
      noise = drawn_noise if noise is None else noise
      style = drawn_style if style is None else style
    if style is None:
      style = jnp.zeros((batch, 0), jnp.int32)
    noise, style = jnp.asarray(noise), jnp.asarray(style)
    given = None if conditions is None else jnp.asarray(conditions)
    self._check_shapes(
      *(batch, noise.shape, style.shape, jnp.asarray(alpha).shape),
      () if given is None else given.shape,
    )
    condition = self.condition(labels, alpha, style, given)

    x = layers.patchify(noise.astype(self.dtype), self.patch_size)
    side = x.shape[1]
    x = self.patch_embed(x.reshape(batch, side * side, -1))
    x = x + self.pos_embed.astype(self.dtype)
    if self.condition_tokens:
      assert given is not None  # its shape has been checked
      tokens = self.condition_proj(given.astype(self.dtype))
      tokens = tokens + self.condition_pos.astype(self.dtype)
      x = jnp.concatenate([tokens, x], axis=1)
    if self.context_tokens:
      context = self.context_proj(condition)[:, None, :]
      context = context + self.context_embed.astype(self.dtype)
      x = jnp.concatenate([context, x], axis=1)
    x, _ = self.blocks(x, condition)
    x = self.final(x, condition)
    self.sow("intermediates", "final_output", x)
    first = self.context_tokens + self.condition_tokens
    x = x[:, first:].reshape(batch, side, side, -1)
    x = layers.unpatchify(x, self.patch_size)
    return jnp.clip(x, -1, 1) if self.clip else x

  def _check_shapes(
    self,
    batch: Any,  # a symbol where a batch of any size is exported
    noise: tuple[Any, ...],
    style: tuple[Any, ...],
    alpha: tuple[Any, ...],
    conditions: tuple[Any, ...],
  ) -> None:
    size = self.input_size
    of_each = self.condition_shape
    for name, shape, valid in (
      ("noise", noise, [(batch, size, size, self.in_channels)]),
      ("style", style, [(batch, self.style_tokens)]),
      ("alpha", alpha, [(), (batch,)]),
      ("conditions", conditions, [(batch, *of_each) if of_each else ()]),
    ):
      if shape not in valid:
        raise ValueError(
          f"{name} has shape {shape}, but {batch} labels and this model need"
          f" {' or '.join(map(str, valid))}"
        )


def build_generator(**arguments: Any) -> Generator:
  """Builds the generator from its attributes, dtypes by name.

  Attributes that have a default are not arguments: `clone` sets them. Those of
  NOT_IN_PAPER may be left out.

  Raises:
    ValueError: an unknown or missing argument, or values that contradict each
      other.
  """
  arguments = {**NOT_IN_PAPER, **arguments}
  style_tokens = arguments.get("style_tokens", 0)
  generator = build(
    Generator,
    arguments,
    minima={
      "context_tokens": 0,
      "style_tokens": 0,
      "style_vocab": 1 if style_tokens else 0,
      "condition_size": 1 if arguments["condition_tokens"] else 0,
      "condition_tokens": 0,
    },
    choices={"remat": REMATS},
  )
  width, heads = generator.hidden_size, generator.num_heads
  require_multiple(
    "input_size", generator.input_size, "patch_size", generator.patch_size
  )
  # Rotary positions turn pairs of channels of a head; the position table has
  # sine and cosine for row and column.
  require_multiple("hidden_size", width, "2 * num_heads", 2 * heads)
  require_multiple("hidden_size", width, "4 (sin-cos positions)", 4)
  if generator.dtype == jnp.float32 != generator.attention_dtype:
    raise ValueError(
      "attention_dtype='bfloat16' with dtype='float32' would round a float32"
      " model's attention: set attention_dtype='float32' or dtype='bfloat16'"
    )
  return generator
