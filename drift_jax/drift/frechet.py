"""The Frechet distance as a loss: its value and gradient in closed form.

FD = |m - m_r|^2 + tr(S) + tr(S_r) - 2 tr((S_r^1/2 S S_r^1/2)^1/2) between the
Gaussians of generated (m, S) and real features (m_r, S_r). As a loss it needs
moments of far more samples than a step makes: arXiv:2604.28190 takes them from
a large population, and the gradient from the step's batch alone.

Features are whitened by the real moments. In them a matched S is the identity
however unlike the variances are, and float32 is enough; the product above, of
the squared range of variances, would need float64.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

# Real variances below this part of the largest count as none.
RANK = 1e-6
# Least eigenvalue of the correlations of generated features, and their least
# variance in units of the real one: where samples have collapsed, the gradient
# is that of a thousandth of the real spread, and not infinite.
LEAST = 1e-6
# Least singular value that is divided by, as part of the largest.
_SINGULAR = 1e-9

_HIGHEST = jax.lax.Precision.HIGHEST


class Reference(NamedTuple):
  """Moments of real features, as the loss needs them.

  Attributes:
    mean: m_r.
    whiten: to K <= D coordinates of variance 1: eigenvectors of S_r over the
      roots of their eigenvalues.
    variances: those eigenvalues.
    trace: of S_r.
  """

  mean: Float[Any, " D"]
  whiten: Float[Any, "D K"]
  variances: Float[Any, " K"]
  trace: Float[Any, ""]


class Moments(NamedTuple):
  """Means over samples of y = x - m_r and z = y whiten.

  Attributes:
    square: of |y|^2, which is |m - m_r|^2 + tr(S).
    mean: of z.
    second: of z z^T.
  """

  square: Float[Array, ""]
  mean: Float[Array, " K"]
  second: Float[Array, "K K"]


def reference(
  mean: Float64[np.ndarray, " D"], covariance: Float64[np.ndarray, "D D"]
) -> Reference:
  """Decomposes real moments in float64; the result is float32, on the host."""
  values, vectors = np.linalg.eigh(covariance)
  kept = values > RANK * values[-1]
  whiten = vectors[:, kept] / np.sqrt(values[kept])
  parts = mean, whiten, values[kept], np.trace(covariance)
  return Reference(*(np.asarray(part, np.float32) for part in parts))


def moments_of(features: Float[Array, "n D"], real: Reference) -> Moments:
  """Moments of a batch of features."""
  y = features.astype(jnp.float32) - real.mean
  z = jnp.matmul(y, real.whiten, precision=_HIGHEST)
  second = jnp.matmul(z.T, z, precision=_HIGHEST) / len(z)
  return Moments(jnp.mean(jnp.sum(y * y, axis=1)), jnp.mean(z, axis=0), second)


def blend(
  before: Moments, new: Moments, weight: Float[Array, ""] | float
) -> Moments:
  """before + weight (new - before)."""
  return jax.tree.map(lambda a, b: a + weight * (b - a), before, new)


def distance(
  moments: Moments, real: Reference
) -> tuple[Float[Array, ""], Moments]:
  """Returns the Frechet distance >= 0, and its derivative by each moment.

  With C the covariance of z and L the real variances, the last term of FD is
  -2 tr((L C L)^1/2), its derivative by C is -L (L C L)^-1/2 L: both come from
  the singular values and left vectors of L C^1/2.
  """
  # 1. C = d H d with correlations H: a scale for each coordinate costs no
  # digits, as that of eigenvectors between them would.
  c = moments.second - jnp.outer(moments.mean, moments.mean)
  spread = jnp.sqrt(jnp.maximum(jnp.diagonal(c), LEAST))
  values, vectors = jnp.linalg.eigh(c / jnp.outer(spread, spread))
  # 2. The singular values of L d H^1/2.
  scale = (real.variances * spread)[:, None]
  root = scale * (vectors * jnp.sqrt(jnp.maximum(values, LEAST)))
  left, singular, _ = jnp.linalg.svd(root, full_matrices=False)
  value = moments.square + real.trace - 2.0 * jnp.sum(singular)
  # 3. Derivatives, C = E zz^T - Ez Ez^T.
  divisor = jnp.maximum(singular, _SINGULAR * singular[0])
  half = real.variances[:, None] * left / jnp.sqrt(divisor)
  by_c = -jnp.matmul(half, half.T, precision=_HIGHEST)
  by_mean = -2.0 * jnp.matmul(by_c, moments.mean, precision=_HIGHEST)
  one = jnp.ones((), jnp.float32)
  return jnp.maximum(value, 0.0), Moments(one, by_mean, by_c)


def linear(gradient: Moments, moments: Moments) -> Float[Array, ""]:
  """The change of the distance to first order: the sum of products."""
  products = jax.tree.map(lambda a, b: jnp.sum(a * b), gradient, moments)
  return sum(jax.tree.leaves(products), jnp.zeros(()))
