"""Feature vectors (a) to (d) of a feature map (appendix A.5)."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

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
    ValueError: a patch size below 1.
  """
  for label, sizes in (("mean", patch_mean_size), ("std", patch_std_size)):
    for size in sizes:
      if size < 1:
        raise ValueError(
          f"patch_{label}_size contains {size}: patch sides must be >= 1"
        )
  batch, height, width, channels = feature_map.shape
  fitting = [
    size
    for size in sorted({*patch_mean_size, *patch_std_size})
    if height % size == 0 and width % size == 0
  ]
  # Each from the finest that it is made of, so that the map is read once.
  exact = _Moments(feature_map.astype(jnp.float32), None)
  moments: dict[int, _Moments] = {}
  for size in fitting:
    finer = max((s for s in moments if size % s == 0), default=1)
    moments[size] = _coarser(moments.get(finer, exact), size // finer)

  features = {name: feature_map.reshape(batch, height * width, channels)}

  def add(key: str, value: Float[Array, "B h w C"]) -> None:
    features[key] = value.reshape(batch, -1, channels)

  if use_mean or use_std:
    whole = _over_all(moments[fitting[-1]] if fitting else exact)
    if use_mean:
      add(f"{name}_mean", whole.mean.astype(feature_map.dtype))
    if use_std:
      add(f"{name}_std", whole.std)
  for size in patch_mean_size:
    if size in moments:
      value = moments[size].mean.astype(feature_map.dtype)
      add(f"{name}_mean_{size}", value)
  for size in patch_std_size:
    if size in moments:
      add(f"{name}_std_{size}", moments[size].std)
  return features


class _Moments(NamedTuple):
  """Means and variances of patches; None for variances of single values."""

  mean: Float[Array, "B h w C"]
  variance: Float[Array, "B h w C"] | None

  @property
  def std(self) -> Float[Array, "B h w C"]:
    variance = self.variance
    if variance is None:
      variance = jnp.zeros_like(self.mean)
    return jnp.sqrt(variance + VARIANCE_EPSILON)


def _coarser(finer: _Moments, factor: int) -> _Moments:
  """Of patches of factor x factor patches.

  The variance of a patch is the mean of its parts' plus that of their means:
  no squares are subtracted, so that features far from 0 keep their digits.
  """

  def parts(x: Float[Array, "B H W C"]) -> list[Float[Array, "B h w C"]]:
    return [
      x[:, i::factor, j::factor] for i in range(factor) for j in range(factor)
    ]

  means = parts(finer.mean)
  mean = functools.reduce(jnp.add, means) / len(means)
  between = [jnp.square(part - mean) for part in means]
  variance = functools.reduce(jnp.add, between) / len(means)
  if finer.variance is not None:
    variance += functools.reduce(jnp.add, parts(finer.variance)) / len(means)
  return _Moments(mean, variance)


def _over_all(patches: _Moments) -> _Moments:
  """Of the whole map."""
  mean = jnp.mean(patches.mean, axis=(1, 2), keepdims=True)
  variance = jnp.mean(
    jnp.square(patches.mean - mean), axis=(1, 2), keepdims=True
  )
  if patches.variance is not None:
    variance += jnp.mean(patches.variance, axis=(1, 2), keepdims=True)
  return _Moments(mean, variance)


def root_mean_square(
  x: Float[Array, "B H W C"],
) -> Float[Array, "B 1 C"]:
  """sqrt(mean(x^2) + 1e-6) per channel, the mean over H and W; float32."""
  mean_square = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=(1, 2))
  return jnp.sqrt(mean_square + VARIANCE_EPSILON)[:, None, :]
