"""The Inception-v3 of FID: TensorFlow's graph of 2015-12-05.

Modules and parameters have the names of the published weights. The pools differ
from other versions of Inception-v3: averages do not count padding, and the last
block has a maximum in place of an average.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Shaped

from drift_jax.models.arguments import build, require_rgb

IMAGE_SIZE = 299
# Accelerators round float32 factors by default; FID is of float32.
_PRECISION = jax.lax.Precision.HIGHEST


class InceptionOutput(NamedTuple):
  """Outputs of Inception-v3 for B images, float32.

  Attributes:
    pool3: means over the last block's 8 x 8 locations, >= 0; the features of
      FID, KID, precision and recall. D = 2048.
    logits_unbiased: pool3 @ kernel; the Inception score's. K = 1008.
    logits_biased: logits_unbiased + bias.
  """

  pool3: Float[Array, "B D"]
  logits_unbiased: Float[Array, "B K"]
  logits_biased: Float[Array, "B K"]


def resize_bilinear(
  images: Float[Array, "B H W C"], size: int
) -> Float[Array, "B size size C"]:
  """TensorFlow 1's bilinear resize, without corner or centre alignment.

  Pixel i of the result is taken at position i H / size of the input: pixel 0 is
  pixel 0, and beyond the last pixel the last one counts. Shrinking applies no
  low-pass filter.
  """
  for axis in (2, 1):
    length = images.shape[axis]
    position = np.arange(size, dtype=np.float32) * np.float32(length / size)
    before = position.astype(np.int32)
    after = np.minimum(before + 1, length - 1)
    weight = (position - before).astype(np.float32)
    weight = weight.reshape(-1, *(3 - axis) * (1,))
    a, b = (jnp.take(images, i, axis, mode="clip") for i in (before, after))
    images = a + (b - a) * weight
  return images


def preprocess(
  images: Shaped[ArrayLike, "..."],
) -> Float[Array, "B 299 299 C"]:
  """(resize_bilinear(images, 299) - 128) / 128, in float32.

  Args:
    images: uint8 [B, H, W, 3] RGB.

  Returns:
    Values in [-1, 127/128].

  Raises:
    ValueError: another dtype or shape.
  """
  images = require_rgb(images, "Inception's")
  return scaled(images.astype(jnp.float32))


def scaled(pixels: Float[Array, "B H W C"]) -> Float[Array, "B 299 299 C"]:
  """`preprocess` of pixels in [0, 255] that need not be whole numbers."""
  return (resize_bilinear(pixels, IMAGE_SIZE) - 128) / 128


# Pools are sums and maxima of slices: on CPUs they are faster than XLA's
# windowed reductions, and fuse with the next layer.


def _shifted(x: Array, axis: int, stride: int) -> list[Array]:
  """Three slices along an axis: element 0, 1 and 2 of each window of three."""
  last = (x.shape[axis] - 3) // stride * stride
  return [
    jax.lax.slice_in_dim(x, i, i + last + 1, stride, axis) for i in range(3)
  ]


def _pad_locations(x: Array, value: float) -> Array:
  widths = ((0, 0), (1, 1), (1, 1), (0, 0))
  return jnp.pad(x, widths, constant_values=value)


def max_pool(
  x: Float[Array, "B H W C"], stride: int
) -> Float[Array, "B h w C"]:
  """Maxima of 3 x 3 locations; padding never wins.

  Stride 1 keeps the size; with stride 2 all windows lie inside.
  """
  if stride == 1:
    x = _pad_locations(x, -jnp.inf)
  for axis in (1, 2):
    x = functools.reduce(jnp.maximum, _shifted(x, axis, stride))
  return x


def average_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
  """Means of the 4, 6 or 9 of 3 x 3 locations that lie inside."""
  inverse_counts = []
  for length in x.shape[1:3]:
    i = np.arange(length)
    count = np.minimum(i + 2, length) - np.maximum(i - 1, 0)
    inverse_counts.append(1 / count)
  inverse = np.outer(*inverse_counts).astype(np.float32)
  x = _pad_locations(x, 0.0)
  for axis in (1, 2):
    x = functools.reduce(jnp.add, _shifted(x, axis, 1))
  return x * inverse[..., None]


def _convolve(
  x: Float[Array, "B H W C"],
  kernel: Float[Array, "K L C D"],
  strides: Sequence[int],
  padding: str | Sequence[tuple[int, int]],
  **arguments: Any,
) -> Float[Array, "B h w D"]:
  """jax.lax.conv_general_dilated, on CPUs in forms that XLA runs faster.

  There a 1 x 1 kernel takes 1.5 to 2 times as long as the same matrix product,
  and a convolution without padding 2 to 3 times as long as one with a row of
  zeros at the end.
  """
  convolve = functools.partial(
    jax.lax.conv_general_dilated, x, kernel, strides, **arguments
  )
  if jax.default_backend() != "cpu":
    return convolve(padding)
  if kernel.shape[:2] == (1, 1) == tuple(strides):
    return jnp.dot(x, kernel[0, 0], precision=arguments["precision"])
  if padding != "VALID":
    return convolve(padding)
  height = (x.shape[1] - kernel.shape[0]) // strides[0] + 1
  return convolve(((0, 1), (0, 0)))[:, :height]


def _conv(
  name: str,
  channels: int,
  size: int | tuple[int, int],
  stride: int = 1,
  padding: str = "SAME",
) -> Callable[[Array], Array]:
  """relu(conv(x) + bias), BatchNorm being folded into kernel and bias."""
  conv = nn.Conv(
    channels,
    (size, size) if isinstance(size, int) else size,
    strides=(stride, stride),
    padding=padding,
    precision=_PRECISION,
    conv_general_dilated=_convolve,
    name=name,
  )
  return lambda x: nn.relu(conv(x))


def _chain(
  x: Array, name: str, *layers: tuple[int, int | tuple[int, int]]
) -> Array:
  """Convolutions NAME_1, NAME_2, ... of (channels, size) each."""
  for i, (channels, size) in enumerate(layers, start=1):
    x = _conv(f"{name}_{i}", channels, size)(x)
  return x


class Block(nn.Module):
  """Branches side by side along the channels."""

  branches: Callable[[Array], Sequence[Array]]

  @nn.compact
  def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
    return jnp.concatenate(self.branches(x), axis=-1)


def _block_a(x: Array, *, w: int, pool: int) -> Sequence[Array]:
  """Mixed_5*: 1x1, 5x5, twice 3x3 and average pool, 35 x 35 locations."""
  return [
    _conv("branch1x1", 4 * w, 1)(x),
    _chain(x, "branch5x5", (3 * w, 1), (4 * w, 5)),
    _chain(x, "branch3x3dbl", (4 * w, 1), (6 * w, 3), (6 * w, 3)),
    _conv("branch_pool", pool * w, 1)(average_pool(x)),
  ]


def _block_b(x: Array, *, w: int) -> Sequence[Array]:
  """Mixed_6a: 3x3, twice 3x3 and maximum pool, down to 17 x 17 locations."""
  three = _conv("branch3x3", 24 * w, 3, 2, "VALID")(x)
  double = _chain(x, "branch3x3dbl", (4 * w, 1), (6 * w, 3))
  double = _conv("branch3x3dbl_3", 6 * w, 3, 2, "VALID")(double)
  return [three, double, max_pool(x, 2)]


def _block_c(x: Array, *, w: int, inner: int) -> Sequence[Array]:
  """Mixed_6b to e: 1x1, 7x7, twice 7x7 and average pool; 7x7 is 1x7, 7x1."""
  c, last = inner * w, 12 * w
  row, column = (1, 7), (7, 1)
  double = ((c, 1), (c, column), (c, row), (c, column), (last, row))
  return [
    _conv("branch1x1", last, 1)(x),
    _chain(x, "branch7x7", (c, 1), (c, row), (last, column)),
    _chain(x, "branch7x7dbl", *double),
    _conv("branch_pool", last, 1)(average_pool(x)),
  ]


def _block_d(x: Array, *, w: int) -> Sequence[Array]:
  """Mixed_7a: 3x3, 7x7 then 3x3, maximum pool, down to 8 x 8 locations."""
  c = 12 * w
  three = _chain(x, "branch3x3", (c, 1))
  three = _conv("branch3x3_2", 20 * w, 3, 2, "VALID")(three)
  seven = _chain(x, "branch7x7x3", (c, 1), (c, (1, 7)), (c, (7, 1)))
  seven = _conv("branch7x7x3_4", c, 3, 2, "VALID")(seven)
  return [three, seven, max_pool(x, 2)]


def _block_e(
  x: Array, *, w: int, pool: Callable[[Array], Array]
) -> Sequence[Array]:
  """Mixed_7b, 7c: 1x1, 1x3 and 3x1, the same after 3x3, and a pool."""
  three = _chain(x, "branch3x3", (24 * w, 1))
  double = _chain(x, "branch3x3dbl", (28 * w, 1), (24 * w, 3))
  return [
    _conv("branch1x1", 20 * w, 1)(x),
    _conv("branch3x3_2a", 24 * w, (1, 3))(three),
    _conv("branch3x3_2b", 24 * w, (3, 1))(three),
    _conv("branch3x3dbl_3a", 24 * w, (1, 3))(double),
    _conv("branch3x3dbl_3b", 24 * w, (3, 1))(double),
    _conv("branch_pool", 12 * w, 1)(pool(x)),
  ]


class Classifier(nn.Module):
  """x @ kernel, and the same + bias."""

  num_classes: int

  @nn.compact
  def __call__(
    self, x: Float[Array, "B D"]
  ) -> tuple[Float[Array, "B K"], Float[Array, "B K"]]:
    shape = (x.shape[-1], self.num_classes)
    kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
    bias = self.param("bias", nn.initializers.zeros, shape[-1:])
    logits = jnp.dot(x, kernel, precision=_PRECISION)
    return logits, logits + bias


class Inception(nn.Module):
  """The network of FID and the Inception score; always float32.

  Build it with `build_inception`, which checks the arguments.

  Attributes:
    width: all numbers of channels are multiples of it, that of pool3 is 128
      width. 16 in the published network; less for tests.
    num_classes: logits; 1008 in the published network.
  """

  width: int
  num_classes: int

  # Smallest input of a call: an image.
  example_inputs = (jax.ShapeDtypeStruct((1, 1, 1, 3), jnp.uint8),)

  def __call__(self, images: Shaped[ArrayLike, "..."]) -> InceptionOutput:
    """Features and logits of uint8 [B, H, W, 3] RGB; see `preprocess`.

    Raises:
      ValueError: images of another dtype or shape.
    """
    return self.network(preprocess(images))

  def smooth(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B D"]:
    """pool3 of RGB in [0, 255], not rounded: it has a gradient."""
    return self.network(scaled(pixels)).pool3

  @nn.compact
  def network(self, x: Float[Array, "B 299 299 3"]) -> InceptionOutput:
    """Features and logits of preprocessed pixels, see `preprocess`."""
    w = self.width
    x = _conv("Conv2d_1a_3x3", 2 * w, 3, 2, "VALID")(x)
    x = _conv("Conv2d_2a_3x3", 2 * w, 3, 1, "VALID")(x)
    x = _conv("Conv2d_2b_3x3", 4 * w, 3)(x)
    x = max_pool(x, 2)
    x = _conv("Conv2d_3b_1x1", 5 * w, 1)(x)
    x = _conv("Conv2d_4a_3x3", 12 * w, 3, 1, "VALID")(x)
    x = max_pool(x, 2)
    last_pool = functools.partial(max_pool, stride=1)
    for name, block, arguments in (
      ("5b", _block_a, {"pool": 2}),
      ("5c", _block_a, {"pool": 4}),
      ("5d", _block_a, {"pool": 4}),
      ("6a", _block_b, {}),
      ("6b", _block_c, {"inner": 8}),
      ("6c", _block_c, {"inner": 10}),
      ("6d", _block_c, {"inner": 10}),
      ("6e", _block_c, {"inner": 12}),
      ("7a", _block_d, {}),
      ("7b", _block_e, {"pool": average_pool}),
      ("7c", _block_e, {"pool": last_pool}),
    ):
      branches = functools.partial(block, w=w, **arguments)
      x = Block(branches, name=f"Mixed_{name}")(x)
    pool3 = jnp.mean(x, axis=(1, 2))
    return InceptionOutput(
      pool3, *Classifier(self.num_classes, name="fc")(pool3)
    )


def build_inception(**arguments: Any) -> Inception:
  """Builds the network from its attributes; always float32.

  Raises:
    ValueError: an unknown or missing argument, or a value out of range.
  """
  return build(Inception, arguments)
