"""Guidance scales against golden arrays and their distribution function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drift_jax.drift import (
  alpha_from_uniform,
  sample_alpha,
  unconditional_weight,
)
from tests.conftest import assert_close


def distribution(alpha, minimum, maximum, exponent):
  """P(a <= alpha) of the density a^-exponent on [minimum, maximum]."""
  if exponent == 1:
    return np.log(alpha / minimum) / np.log(maximum / minimum)
  power = 1.0 - exponent
  low, high = minimum**power, maximum**power
  return (np.float64(alpha) ** power - low) / (high - low)


@pytest.mark.parametrize(
  ("minimum", "maximum", "exponent", "name"),
  [
    (1.0, 4.0, 1.0, "min1_max4_pw1"),
    (1.0, 4.0, 3.0, "min1_max4_pw3"),
    (1.0, 4.0, 5.0, "min1_max4_pw5"),
    (1.5, 3.0, 2.0, "min1.5_max3_pw2"),
  ],
)
def test_golden(golden, minimum, maximum, exponent, name):
  arrays = golden("extras")
  alpha = alpha_from_uniform(
    jnp.asarray(arrays["cfg/frac"]),
    minimum=minimum,
    maximum=maximum,
    exponent=exponent,
  )
  assert alpha.dtype == jnp.float32
  np.testing.assert_allclose(alpha, arrays[f"cfg/{name}"], rtol=1e-6)


@pytest.mark.parametrize(
  "exponent", [-100.0, -1.0, 0.0, 0.5, 1 - 1e-6, 1.0, 1 + 1e-9, 2.0, 5.0, 80.0]
)
def test_inverts_the_distribution_function(exponent):
  u = jnp.linspace(0.0, 1.0, 1001)
  alpha = alpha_from_uniform(u, minimum=1.25, maximum=4.0, exponent=exponent)
  np.testing.assert_allclose(
    alpha[jnp.asarray([0, -1])], [1.25, 4.0], rtol=2e-7
  )
  assert alpha.min() >= 1.25 and alpha.max() <= 4.0
  assert (jnp.diff(alpha) >= 0).all()
  # Within 1e-6 of 1 the powers of the formula cancel; the limit is exact.
  exact = 1.0 if abs(exponent - 1.0) < 1e-5 else exponent
  back = distribution(np.float64(alpha), 1.25, 4.0, exact)
  # Rounding of alpha, magnified by the density where it is concentrated.
  tolerance = 2e-6 * max(1.0, abs(exponent))
  np.testing.assert_allclose(back, u, atol=tolerance)


def test_equal_bounds():
  alpha = alpha_from_uniform(
    jnp.linspace(0.0, 1.0, 5), minimum=2.0, maximum=2.0, exponent=3.0
  )
  assert (alpha == 2.0).all()


@pytest.mark.parametrize("exponent", [1.0, 3.0])
def test_samples_follow_the_distribution(exponent):
  options = {"minimum": 1.0, "maximum": 4.0, "exponent": exponent}
  key = jax.random.key(0)
  alpha = sample_alpha(key, (200, 50), **options, no_cfg_frac=0.0)
  assert alpha.shape == (200, 50)
  sorted_alpha = np.sort(np.asarray(alpha).ravel())
  empirical = (np.arange(10000) + 0.5) / 10000
  gap = np.abs(distribution(sorted_alpha, 1.0, 4.0, exponent) - empirical)
  assert gap.max() < 0.0163  # Kolmogorov-Smirnov, 1 %
  dropped = sample_alpha(key, (200, 50), **options, no_cfg_frac=0.3)
  fraction = float((dropped == 1.0).mean())
  assert abs(fraction - 0.3) < 0.014  # 3 standard errors
  # Whether alpha is dropped does not depend on alpha.
  kept = np.asarray(dropped != 1.0)
  assert np.array_equal(np.asarray(alpha)[kept], np.asarray(dropped)[kept])
  gap = np.asarray(alpha)[kept].mean() - np.asarray(alpha).mean()
  assert abs(gap) < 4 * np.asarray(alpha).std() / 100
  always = sample_alpha(key, (8,), **options, no_cfg_frac=1.0)
  assert (always == 1.0).all()


@pytest.mark.parametrize(("n_gen", "n_unc"), [(64, 16), (64, 32), (2, 1)])
def test_unconditional_weight_gives_share_gamma(n_gen, n_unc):
  alpha = jnp.asarray([1.0, 1.5, 2.75, 4.0])
  weight = unconditional_weight(alpha, n_gen, n_unc)
  unconditional = n_unc * np.float64(weight)
  share = unconditional / (n_gen - 1 + unconditional)
  np.testing.assert_allclose(share, 1.0 - 1.0 / np.float64(alpha), atol=1e-6)


def test_unconditional_weight_of_golden_loss(golden):
  arrays = golden("drift_loss")
  weight = unconditional_weight(jnp.asarray([1.0, 1.5, 2.75, 4.0]), 5, 3)
  expected = arrays["neg_cfg_weights/weight_neg"]
  assert_close(jnp.broadcast_to(weight[:, None], (4, 3)), expected, 1e-6)
