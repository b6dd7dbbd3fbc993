"""Kernels against the plain form of their module."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.conftest import assert_close


def params_like(shapes: Any) -> Any:
  """Parameters at which nothing is flat: norms' scales are about 1."""
  rng = np.random.default_rng(1)

  def draw(path, leaf):
    fan_in = leaf.shape[-2] if leaf.ndim > 1 else 12
    values = rng.normal(size=leaf.shape) / fan_in**0.5
    return np.float32(values + (path[-1].key == "scale"))

  return jax.tree_util.tree_map_with_path(draw, shapes)


def assert_same(
  plain: Sequence[Any], fused: Sequence[Any], tolerances: Sequence[float]
) -> None:
  """Compares (result, gradients), each leaf by the tolerance of its part."""
  for form, other, rtol in zip(plain, fused, tolerances, strict=True):
    leaves = jax.tree_util.tree_leaves_with_path(form)
    for (path, a), b in zip(leaves, jax.tree.leaves(other), strict=True):
      assert a.dtype == b.dtype
      a, b = a.astype(jnp.float32), b.astype(jnp.float32)
      assert_close(b, a, rtol, jax.tree_util.keystr(path))
