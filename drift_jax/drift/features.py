"""Feature vectors (a) to (d) of a feature map (appendix A.5)."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from drift_jax.drift.field import check_axes, wide_dtype

# Inside the square root of every standard deviation and root mean square:
# keeps its gradient finite where a patch is constant.
VARIANCE_EPSILON = 1e-6


def pooled_features(
  feature_map: Float[Array, "B H W C"],
  name: str,
  *,
  patch_mean_size: Sequence[int],
  patch_std_size: Sequence[int],
  use_mean: bool,
  use_std: bool,
) -> dict[str, Float[Array, "B _ C"]]:
  """Vectors of one feature map under the keys of the drifting loss.

  (a) `name`: the H * W locations; (b) `name_mean`, `name_std`: over all
  locations; (c, d) `name_mean_K`, `name_std_K`: over each K x K patch, only
  for K that divide H and W. std = sqrt(var + 1e-6), var the mean squared
  deviation (not N - 1). Locations and patches are in row-major order.

  Args:
    feature_map: activations, NHWC.
    name: key of the map, and prefix of the other keys.
    patch_mean_size: sides K of the patches whose means are taken.
    patch_std_size: sides K of the patches whose stds are taken.
    use_mean: whether to give `name_mean`.
    use_std: whether to give `name_std`.

  Returns:
    Key -> [B, T, C]. Locations and means have the map's dtype, stds float32;
    both are computed in float32.

  Raises:
    ValueError: a patch size below 1, or other axes than these.
  """
  check_axes(
    "of a single map [H, W, C], give x[None]",
    feature_map=("B H W C", feature_map),
  )
  for label, sizes in (("mean", patch_mean_size), ("std", patch_std_size)):
    for size in sizes:
      if size < 1:
        raise ValueError(
          f"patch_{label}_size contains {size}: patch sides must be >= 1"
        )
  batch, height, width, channels = feature_map.shape
  sizes = sorted({*patch_mean_size, *patch_std_size})
  fitting = tuple(s for s in sizes if height % s == 0 and width % s == 0)
  moments: Any = _moments(feature_map, fitting)

  wanted = [("mean", _WHOLE)] * use_mean + [("std", _WHOLE)] * use_std
  wanted += [("mean", size) for size in patch_mean_size]
  wanted += [("std", size) for size in patch_std_size]
  features = {name: feature_map.reshape(batch, height * width, channels)}
  for kind, size in wanted:
    if size in moments:
      is_std, patches = kind == "std", moments[size]
      value = patches.std if is_std else patches.mean.astype(feature_map.dtype)
      key = f"{name}_{kind}" if size == _WHOLE else f"{name}_{kind}_{size}"
      features[key] = value.reshape(batch, -1, channels)
  return features


class _Moments(NamedTuple):
  """Means and variances of patches."""

  mean: Float[Array, "B h w C"]
  variance: Float[Array, "B h w C"]

  @property
  def std(self) -> Float[Array, "B h w C"]:
    return jnp.sqrt(self.variance + VARIANCE_EPSILON)


# The key of the moments of a whole map, beside the sides of its patches.
_WHOLE = 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _moments(
  feature_map: Float[Array, "B H W C"], sizes: tuple[int, ...]
) -> dict[int, _Moments]:
  """Moments of patches of each size, ascending, and of the whole map; float32.

  Each comes from the coarsest finer patches, so that the map is read once.
  """
  moments: dict[int, _Moments] = {}
  finest = (feature_map, None)
  for size in sizes:
    finer = _finer(size, sizes)
    moments[size] = _coarser(*moments.get(finer, finest), size // finer)
  coarsest = moments[sizes[-1]] if sizes else finest
  moments[_WHOLE] = _over_all(*coarsest)
  return moments


def _finer(size: int, sizes: Sequence[int]) -> int:
  """The largest smaller size whose patches make up those of this; or 1."""
  return max((s for s in sizes if s < size and size % s == 0), default=1)


def _moments_forward(
  feature_map: Float[Array, "B H W C"], sizes: tuple[int, ...]
) -> tuple[dict[int, _Moments], Any]:
  moments: Any = _moments(feature_map, sizes)
  means = {size: patches.mean for size, patches in moments.items()}
  return moments, (feature_map, means)


def _moments_backward(
  sizes: tuple[int, ...], residuals: Any, cotangents: dict[int, _Moments]
) -> tuple[Float[Array, "B H W C"]]:
  """Sum over patch sizes of shift + (x - center) slope, from coarse to fine.

  Autodiff would make a float32 map for each part of a patch, and add them up.
  """
  feature_map, means = residuals
  x = feature_map.astype(wide_dtype(feature_map))
  # A patch's mean where every digit counts: next to it x - center is exact. To
  # narrower maps the whole one's mean is as good, and need not be upsampled.
  exact = feature_map.dtype == x.dtype
  centers = {size: means[size if exact else _WHOLE] for size in means}

  def terms(size: int, count: int) -> tuple[jax.Array, jax.Array]:
    slope = 2.0 / count * cotangents[size].variance
    shift = cotangents[size].mean / count
    return shift - (means[size] - centers[size]) * slope, slope

  height, width = feature_map.shape[1:3]
  shift, slope = terms(_WHOLE, height * width)
  gradient = shift + (x - centers[_WHOLE]) * slope
  lines = {size: terms(size, size**2) for size in sizes}
  for size in reversed(sizes):
    finer = _finer(size, sizes)
    shift, slope = (_upsample(term, size // finer) for term in lines[size])
    center = centers[size]
    if exact:
      center = _upsample(center, size // finer)
    if finer < size and finer in lines:
      shift += lines[finer][0] + (centers[finer] - center) * slope
      lines[finer] = (shift, lines[finer][1] + slope)
    else:
      gradient += shift + (x - center) * slope
  return (gradient.astype(feature_map.dtype),)


_moments.defvjp(_moments_forward, _moments_backward)


def _upsample(
  x: Float[Array, "B h w C"], factor: int
) -> Float[Array, "B H W C"]:
  return jnp.repeat(jnp.repeat(x, factor, axis=1), factor, axis=2)


def _coarser(
  mean: Float[Array, "B H W C"],
  variance: Float[Array, "B H W C"] | None,
  factor: int,
) -> _Moments:
  """Moments of patches of factor x factor parts; variance None: single values.

  The variance of a patch is the mean of its parts' plus that of their means:
  no squares are subtracted, so that features far from 0 keep their digits.
  """

  def parts(x: Float[Array, "B H W C"]) -> list[Float[Array, "B h w C"]]:
    # Cut first: a whole map in float32 would be written down.
    return [
      x[:, i::factor, j::factor].astype(wide_dtype(x))
      for i in range(factor)
      for j in range(factor)
    ]

  means = parts(mean)
  together = functools.reduce(jnp.add, means) / len(means)
  between = [jnp.square(part - together) for part in means]
  total = functools.reduce(jnp.add, between) / len(means)
  if variance is not None:
    total += functools.reduce(jnp.add, parts(variance)) / len(means)
  return _Moments(together, total)


def _over_all(
  mean: Float[Array, "B H W C"], variance: Float[Array, "B H W C"] | None
) -> _Moments:
  """Moments of the whole map."""
  mean = mean.astype(wide_dtype(mean))
  together = jnp.mean(mean, axis=(1, 2), keepdims=True)
  total = jnp.mean(jnp.square(mean - together), axis=(1, 2), keepdims=True)
  if variance is not None:
    total += jnp.mean(variance, axis=(1, 2), keepdims=True)
  return _Moments(together, total)


def root_mean_square(
  x: Float[Array, "B H W C"],
) -> Float[Array, "B 1 C"]:
  """sqrt(mean(x^2) + 1e-6) per channel, the mean over H and W; float32.

  Raises:
    ValueError: other axes than these.
  """
  check_axes("of a single map [H, W, C], give x[None]", x=("B H W C", x))
  mean_square = jnp.mean(jnp.square(x.astype(wide_dtype(x))), axis=(1, 2))
  return jnp.sqrt(mean_square + VARIANCE_EPSILON)[:, None, :]
