"""The Frechet distance as a loss, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg

from drift_jax.drift import frechet
from drift_jax.metrics.frechet import FeatureStats, frechet_distance
from tests.conftest import assert_close

DIMENSIONS, COUNT = 12, 400


def case(kind: str) -> tuple[np.ndarray, np.ndarray]:
  """(real, generated) features [COUNT, DIMENSIONS] in float64."""
  rng = np.random.default_rng(3)
  real, fake = rng.normal(size=(2, COUNT, DIMENSIONS))
  if kind == "matched":
    return real, real + 0.01 * fake
  turn = np.linalg.qr(rng.normal(size=(DIMENSIONS, DIMENSIONS)))[0]
  mix = np.eye(DIMENSIONS) + 0.1 * rng.normal(size=(DIMENSIONS, DIMENSIONS))
  # Variances over four orders of magnitude, as of encoders' features.
  spread = 10.0 ** np.linspace(0, -2, DIMENSIONS)
  if kind == "constant":  # as the corners of digits
    spread[-3:] = 0
  real = 5 + (real * spread) @ turn
  return real, 5.02 + (fake * spread) @ mix @ turn


def root(matrix: np.ndarray) -> np.ndarray:
  return np.real(linalg.sqrtm(matrix))


def oracle(real, fake, cut=0.0) -> tuple[float, np.ndarray]:
  """FD and its gradient by each generated feature, by definition.

  With T = R (R S R)^(-1/2) R, R = S_r^(1/2), it is
  (2 / n) [m - m_r + (I - T)(x - m)].
  """
  shift = fake.mean(0) - real.mean(0)
  s_r, s = (np.cov(x.T, bias=b) for x, b in ((real, False), (fake, True)))
  r = root(s_r)
  product = root(r @ s @ r)
  value = shift @ shift + np.trace(s_r + s - 2 * product)
  t = r @ np.linalg.pinv(product, rcond=cut) @ r
  centred = fake - fake.mean(0)
  return value, 2 / len(fake) * (shift + centred @ (np.eye(len(t)) - t))


def change(x, slope, reference):
  return frechet.linear(slope, frechet.moments_of(x, reference))


def ours(real, fake):
  reference = frechet.reference(real.mean(0), np.cov(real.T))

  @jax.jit
  def value_and_gradient(x):
    moments = frechet.moments_of(x, reference)
    value, slope = frechet.distance(moments, reference)
    return value, jax.grad(change)(x, slope, reference)

  return value_and_gradient(jnp.asarray(fake, jnp.float32))


@pytest.mark.parametrize("kind", ["matched", "mixed", "constant"])
def test_value_and_gradient_are_those_of_float64(kind):
  real, fake = case(kind)
  value, gradient = ours(real, fake)
  expected, slopes = oracle(real, fake, cut=1e-9)
  assert abs(value - expected) <= 1e-5 * np.trace(np.cov(real.T))
  # Against the gradient's two parts: in a match they cancel.
  scale = 2 / COUNT * np.linalg.norm(fake - fake.mean(0))
  assert np.linalg.norm(gradient - slopes) <= 1e-5 * scale
  if kind == "mixed":
    assert_close(gradient, slopes, 2e-4)


def test_the_oracle_is_the_metric_and_its_difference_quotient():
  real, fake = case("mixed")
  value, slopes = oracle(real, fake)
  direction = np.random.default_rng(0).normal(size=fake.shape) * 1e-4
  up, down = (oracle(real, fake + sign * direction)[0] for sign in (1, -1))
  assert np.isclose((up - down) / 2, np.sum(slopes * direction), rtol=1e-5)
  stats = [FeatureStats.from_features(x) for x in (fake, real)]
  assert np.isclose(value, frechet_distance(*stats), rtol=0.05)  # n, n - 1


def test_batches_add_up_to_the_population():
  """The mean of batches' gradients at a population's moments is its own."""
  real, fake = case("mixed")
  reference = frechet.reference(real.mean(0), np.cov(real.T))
  fake = jnp.asarray(fake, jnp.float32)
  _, slope = frechet.distance(frechet.moments_of(fake, reference), reference)
  gradient = jax.jit(jax.grad(change))
  parts = [gradient(x, slope, reference) / 4 for x in jnp.split(fake, 4)]
  assert_close(np.concatenate(parts), gradient(fake, slope, reference), 1e-5)


def test_collapsed_samples_are_pushed_apart():
  real, fake = case("mixed")
  fake = fake.mean(0) + 1e-4 * (fake - fake.mean(0))
  value, gradient = ours(real, fake)
  assert np.isfinite(value) and np.isfinite(gradient).all()
  assert np.sum(np.asarray(gradient) * (fake - fake.mean(0))) < 0
  _, still = ours(real, np.broadcast_to(fake[:1], fake.shape))
  assert np.isfinite(still).all()
