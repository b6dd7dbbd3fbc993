"""Classifier-free guidance at training time (3.5, A.7).

Negatives are a mixture (1 - gamma) q + gamma p_uncond of generated samples and
unconditional real ones; alpha = 1 / (1 - gamma) >= 1 is the guidance scale.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from drift_jax.drift.field import wide_dtype

# Below this the density is log-uniform to float32's precision.
_MIN_LOG_RANGE = 1e-12


def alpha_from_uniform(
  u: Float[Array, "*B"], *, minimum: float, maximum: float, exponent: float
) -> Float[Array, "*B"]:
  """Guidance scale alpha from a uniform draw u (A.7 of arXiv:2602.04770).

  The inverse of the distribution function of p(alpha) ~ alpha^-k on
  [minimum, maximum], with k = exponent:
    alpha = (m^(1-k) + u (M^(1-k) - m^(1-k)))^(1/(1-k)),  m (M/m)^u if k = 1.

  Args:
    u: uniform draws in [0, 1]; 0 maps to minimum, 1 to maximum.
    minimum: smallest alpha, >= 1 (1 is no guidance).
    maximum: largest alpha, >= minimum.
    exponent: k, any finite real number; the larger, the closer to minimum.

  Returns:
    alpha in [minimum, maximum], float32 (float64 of draws that are).

  Raises:
    ValueError: minimum < 1, maximum < minimum, or a non-finite argument.
  """
  if not 1 <= minimum <= maximum < math.inf:
    raise ValueError(
      f"minimum={minimum}, maximum={maximum}: guidance needs "
      "1 <= minimum <= maximum, both finite"
    )
  if not math.isfinite(exponent):
    raise ValueError(f"exponent={exponent} must be finite")
  u = u.astype(wide_dtype(u))
  power = 1.0 - exponent
  log_ratio = math.log(maximum / minimum)
  if abs(power) * log_ratio < _MIN_LOG_RANGE:
    alpha = minimum * jnp.exp(u * log_ratio)
  elif power < 0:
    # m^power is the larger of the two powers; factoring it out, here and M's
    # below, cannot overflow and has no cancellation as k -> 1.
    alpha = minimum * jnp.exp(
      jnp.log1p(u * math.expm1(power * log_ratio)) / power
    )
  else:
    alpha = maximum * jnp.exp(
      jnp.log1p((1.0 - u) * math.expm1(-power * log_ratio)) / power
    )
  return jnp.clip(alpha, minimum, maximum)


def drop_guidance(
  alpha: Float[Array, "*B"], u: Float[Array, "*B"], no_cfg_frac: float
) -> Float[Array, "*B"]:
  """Sets alpha to 1 (no guidance) where the uniform draw u < no_cfg_frac.

  Raises:
    ValueError: no_cfg_frac outside [0, 1].
  """
  if not 0 <= no_cfg_frac <= 1:
    raise ValueError(f"no_cfg_frac={no_cfg_frac} must be in [0, 1]")
  return jnp.where(u < no_cfg_frac, jnp.ones_like(alpha), alpha)


def sample_alpha(
  key: PRNGKeyArray,
  shape: tuple[int, ...],
  *,
  minimum: float,
  maximum: float,
  exponent: float,
  no_cfg_frac: float,
) -> Float[Array, "..."]:
  """Draws guidance scales: p(alpha) ~ alpha^-exponent, or 1 (A.7).

  Args:
    key: typed random key.
    shape: shape of the result, one alpha per label.
    minimum: smallest alpha, >= 1.
    maximum: largest alpha, >= minimum.
    exponent: see `alpha_from_uniform`.
    no_cfg_frac: probability, in [0, 1], of alpha = 1 instead.

  Returns:
    alpha, float32, in [minimum, maximum] or 1.

  Raises:
    ValueError: as `alpha_from_uniform` and `drop_guidance`.
  """
  alpha_key, drop_key = jax.random.split(key)
  alpha = alpha_from_uniform(
    jax.random.uniform(alpha_key, shape, jnp.float32),
    minimum=minimum,
    maximum=maximum,
    exponent=exponent,
  )
  u = jax.random.uniform(drop_key, shape, jnp.float32)
  return drop_guidance(alpha, u, no_cfg_frac)


def unconditional_weight(
  alpha: Float[Array, "*B"], n_gen: int, n_unc: int
) -> Float[Array, "*B"]:
  """Weight of each unconditional negative (3.5).

    w_unc = (alpha - 1) (N - 1) / N_unc
  makes the unconditional share of a sample's N - 1 + N_unc w_unc negatives
  gamma = 1 - 1 / alpha.

  Args:
    alpha: guidance scale per label, >= 1; 1 gives weight 0.
    n_gen: N, generated samples per label, >= 1.
    n_unc: N_unc, unconditional real samples per label, >= 1.

  Returns:
    The weight, >= 0, in alpha's shape and dtype.

  Raises:
    ValueError: n_gen or n_unc below 1.
  """
  if n_gen < 1 or n_unc < 1:
    raise ValueError(
      f"n_gen={n_gen}, n_unc={n_unc}: both must be at least 1 (without "
      "unconditional samples there is nothing to weight)"
    )
  return (alpha - 1.0) * ((n_gen - 1) / n_unc)
