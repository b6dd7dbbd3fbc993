"""Vision Transformer encoders of images: DINOv2 and CLIP's image half.

Features for evaluation: Frechet distances in DINOv2's (arXiv:2304.07193, chosen
by arXiv:2306.04675), nearest neighbours in CLIP's (arXiv:2103.00020). Both are
blocks of arXiv:2010.11929; they differ in a normalisation before the blocks,
in learned scales of the branches, and in what follows the class token.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Shaped

from drift_jax.models.arguments import (
  build,
  require_multiple,
  require_rgb,
)

# Accelerators round float32 factors by default; the published figures are of
# float32.
_PRECISION = jax.lax.Precision.HIGHEST


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
  """x sigmoid(1.702 x), which OpenAI's CLIP has in place of GELU."""
  return x * nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "gelu": functools.partial(nn.gelu, approximate=False),  # x Phi(x), by erf
  "quick_gelu": quick_gelu,
}


def resize_bicubic(
  images: Float[Array, "B H W C"], size: int
) -> Float[Array, "B size size C"]:
  """Cubic convolution with a = -0.5, widened by the factor of shrinking.

  Pixel centres are aligned; weights beyond the border are dropped and the rest
  scaled to a sum of 1, as Pillow's BICUBIC does. The result is neither rounded
  nor clipped, as in Pillow's mode 'F'. Each side has its own factor.
  """
  batch, _, _, channels = images.shape
  shape = (batch, size, size, channels)
  return jax.image.resize(images, shape, "cubic", antialias=True)


def preprocess(
  images: Shaped[ArrayLike, "..."],
  *,
  image_size: int,
  image_mean: Sequence[float],
  image_std: Sequence[float],
) -> Float[Array, "B {image_size} {image_size} C"]:
  """(resized / 255 - mean) / std, float32.

  resized is resize_bicubic(images, image_size), rounded and clipped to
  [0, 255]: the published figures were computed from 8-bit images. (Pillow
  rounds after the rows too: a few pixels differ by a grey level.)

  Args:
    images: uint8 [B, H, W, 3] RGB; if not square they are squeezed, not
      cropped.
    image_size: pixels of the result's side.
    image_mean: of each channel, of pixels in [0, 1].
    image_std: of each channel, of pixels in [0, 1].

  Raises:
    ValueError: another dtype or shape.
  """
  images = require_rgb(images, "the Vision Transformer's")
  pixels = resize_bicubic(images.astype(jnp.float32), image_size)
  return _normalized(jnp.round(pixels), image_mean, image_std)


def _normalized(
  pixels: Float[Array, "B H W C"], mean: Sequence[float], std: Sequence[float]
) -> Float[Array, "B H W C"]:
  pixels = jnp.clip(pixels, 0, 255) / 255
  pixels = pixels - jnp.asarray(mean, jnp.float32)
  return pixels / jnp.asarray(std, jnp.float32)


def _dense(features: int, name: str) -> nn.Dense:
  return nn.Dense(features, precision=_PRECISION, name=name)


def _norm(epsilon: float, name: str) -> nn.LayerNorm:
  """(x - mean) / sqrt(var + epsilon) * scale + bias over the channels."""
  return nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, name=name)


class Attention(nn.Module):
  """out(softmax(q k^T / sqrt(D)) v), D channels a head, all of it float32."""

  num_heads: int

  @nn.compact
  def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
    batch, tokens, channels = x.shape
    query, key, value = (
      _dense(channels, name)(x).reshape(batch, tokens, self.num_heads, -1)
      for name in ("query", "key", "value")
    )
    logits = jnp.einsum("bthd,bshd->bhts", query, key, precision=_PRECISION)
    weights = jax.nn.softmax(logits * query.shape[-1] ** -0.5, axis=-1)
    out = jnp.einsum("bhts,bshd->bthd", weights, value, precision=_PRECISION)
    return _dense(channels, "out")(out.reshape(x.shape))


class Mlp(nn.Module):
  """project(activation(expand(x)))."""

  width: int
  activation: str

  @nn.compact
  def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
    hidden = ACTIVATIONS[self.activation](_dense(self.width, "expand")(x))
    return _dense(x.shape[-1], "project")(hidden)


class Block(nn.Module):
  """x + scale * f(norm(x)), f attention and then the MLP.

  The scales are one number a channel, or absent. Shaped as the body of a scan
  over depth: the carry is x, there is no output of each block.
  """

  num_heads: int
  mlp_size: int
  activation: str
  layer_scale: bool
  epsilon: float

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T C"]
  ) -> tuple[Float[Array, "B T C"], None]:
    branches = {
      "attention": Attention(self.num_heads, name="attention"),
      "mlp": Mlp(self.mlp_size, self.activation, name="mlp"),
    }
    for name, branch in branches.items():
      hidden = branch(_norm(self.epsilon, f"{name}_norm")(x))
      if self.layer_scale:
        ones = nn.initializers.ones
        hidden *= self.param(f"{name}_scale", ones, (x.shape[-1],))
      x = x + hidden
    return x, None


class Vit(nn.Module):
  """An image encoder whose features are its class token's; always float32.

  Build it with `build_vit`, which checks the arguments.

  Attributes:
    image_size: pixels of the side that images are resized to; a multiple of
      patch_size.
    patch_size: pixels of a patch's side.
    hidden_size: channels of a token; a multiple of num_heads.
    depth: blocks.
    num_heads: of every attention.
    mlp_size: channels inside every MLP.
    activation: of the MLPs, 'gelu' (the exact one) or 'quick_gelu'.
    pre_norm: a LayerNorm before the blocks, as CLIP has it.
    layer_scale: a learned number for each channel of a branch's result, as
      DINOv2 has it.
    patch_bias: of the patches' embedding; DINOv2 has it, CLIP does not.
    projection_dim: features of a last linear layer without bias, as CLIP has
      it; 0: none, the features are the hidden_size channels of the last
      LayerNorm.
    epsilon: of every LayerNorm.
    image_mean: red, green and blue, of pixels in [0, 1].
    image_std: as image_mean; pixels less their mean are divided by it.
  """

  image_size: int
  patch_size: int
  hidden_size: int
  depth: int
  num_heads: int
  mlp_size: int
  activation: str
  pre_norm: bool
  layer_scale: bool
  patch_bias: bool
  projection_dim: int
  epsilon: float
  image_mean: tuple[float, ...]
  image_std: tuple[float, ...]

  # Smallest input of a call: an image.
  example_inputs = (jax.ShapeDtypeStruct((1, 1, 1, 3), jnp.uint8),)

  def __call__(self, images: Shaped[ArrayLike, "..."]) -> Float[Array, "B D"]:
    """Features of uint8 [B, H, W, 3] RGB, float32; see `preprocess`.

    They are not of unit length. D is projection_dim, or hidden_size if that
    is 0.

    Raises:
      ValueError: images of another dtype or shape.
    """
    return self.network(
      preprocess(
        images,
        image_size=self.image_size,
        image_mean=self.image_mean,
        image_std=self.image_std,
      )
    )

  def smooth(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
    """Features of RGB in [0, 255], not rounded: they have a gradient."""
    pixels = resize_bicubic(pixels, self.image_size)
    return self.network(_normalized(pixels, self.image_mean, self.image_std))

  @nn.compact
  def network(
    self, x: Float[Array, "B {self.image_size} {self.image_size} 3"]
  ) -> Float[Array, "B D"]:
    """Features of preprocessed pixels, see `preprocess`."""
    width, patch = self.hidden_size, self.patch_size
    x = nn.Conv(
      width,
      (patch, patch),
      strides=(patch, patch),
      padding="VALID",
      use_bias=self.patch_bias,
      precision=_PRECISION,
      name="patch_embed",
    )(x)
    x = x.reshape(x.shape[0], -1, width)
    init = nn.initializers.normal(stddev=0.02)
    token = self.param("class_token", init, (width,))
    token = jnp.broadcast_to(token, (x.shape[0], 1, width))
    x = jnp.concatenate([token, x], axis=1)
    x = x + self.param("position_embedding", init, x.shape[1:])
    if self.pre_norm:
      x = _norm(self.epsilon, "pre_norm")(x)
    blocks = nn.scan(
      # Of what a gradient would keep of each block, only its input.
      nn.remat(Block, prevent_cse=False),
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=self.depth,
    )
    x, _ = blocks(
      num_heads=self.num_heads,
      mlp_size=self.mlp_size,
      activation=self.activation,
      layer_scale=self.layer_scale,
      epsilon=self.epsilon,
      name="blocks",
    )(x)
    features = _norm(self.epsilon, "norm")(x[:, 0])
    if not self.projection_dim:
      return features
    return nn.Dense(
      self.projection_dim,
      use_bias=False,
      precision=_PRECISION,
      name="projection",
    )(features)


def build_vit(**arguments: Any) -> Vit:
  """Builds an image encoder from its attributes; always float32.

  Raises:
    ValueError: an unknown or missing argument, or a value out of range.
  """
  vit = build(
    Vit,
    arguments,
    minima={"projection_dim": 0},
    choices={"activation": tuple(ACTIVATIONS)},
  )
  require_multiple("image_size", vit.image_size, "patch_size", vit.patch_size)
  require_multiple("hidden_size", vit.hidden_size, "num_heads", vit.num_heads)
  return vit
