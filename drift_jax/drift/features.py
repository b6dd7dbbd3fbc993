"""Feature vectors (a) to (d) of a feature map (appendix A.5)."""

from collections.abc import Sequence

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
  batch, height, width, channels = feature_map.shape
  features = {name: feature_map.reshape(batch, height * width, channels)}
  if use_mean:
    features[f"{name}_mean"] = _mean(feature_map, (1, 2))[:, None]
  if use_std:
    features[f"{name}_std"] = _std(feature_map, (1, 2))[:, None]
  for statistic, label, sizes in (
    (_mean, "mean", patch_mean_size),
    (_std, "std", patch_std_size),
  ):
    for size in sizes:
      if size < 1:
        raise ValueError(
          f"patch_{label}_size contains {size}: patch sides must be >= 1"
        )
      if height % size or width % size:
        continue
      rows, columns = height // size, width // size
      patches = feature_map.reshape(batch, rows, size, columns, size, channels)
      pooled = statistic(patches, (2, 4))
      features[f"{name}_{label}_{size}"] = pooled.reshape(
        batch, rows * columns, channels
      )
  return features


def root_mean_square(
  x: Float[Array, "B H W C"],
) -> Float[Array, "B 1 C"]:
  """sqrt(mean(x^2) + 1e-6) per channel, the mean over H and W; float32."""
  mean_square = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=(1, 2))
  return jnp.sqrt(mean_square + VARIANCE_EPSILON)[:, None, :]


def _mean(x: Float[Array, "..."], axis: tuple[int, ...]) -> Float[Array, "..."]:
  return jnp.mean(x.astype(jnp.float32), axis=axis).astype(x.dtype)


def _std(x: Float[Array, "..."], axis: tuple[int, ...]) -> Float[Array, "..."]:
  variance = jnp.var(x.astype(jnp.float32), axis=axis)
  return jnp.sqrt(variance + VARIANCE_EPSILON)
