"""W-Flow's loss (arXiv:2605.11755) against its formulas in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drift_jax import drift
from drift_jax.drift import Variant, drift_loss, drift_losses, family
from tests.conftest import assert_close


def variant(iterations, **changes):
  given = {
    "field": "sinkhorn",
    "options": {"cost": "quadratic", "iterations": iterations},
    "negatives": "independent",
    "guidance": "velocity",
    "own_in_scale": True,
  }
  return Variant(**given | changes)


def costs(x, y):
  return ((x[:, None] - y[None]) ** 2).sum(-1) / 2


def barycentric_map(x, y, eps, iterations):
  """T(x_i) = sum_j P_ij y_j / sum_j P_ij of the entropic plan P."""
  kernel = np.exp(-costs(x, y) / eps)
  a, b = np.full(len(x), 1 / len(x)), np.full(len(y), 1 / len(y))
  u, v = a, b
  for _ in range(iterations):
    u = a / (kernel @ v)
    v = b / (u @ kernel)
  plan = u[:, None] * kernel * v
  return plan @ y / plan.sum(1, keepdims=True)


def oracle(x, pos, unc, second, alpha, temperatures, iterations):
  """(loss, its gradient in x, S, mean squares of V) of a feature.

  Arrays are [labels, samples, locations, channels], alpha is [labels].
  """
  x, pos, unc, second = map(np.float64, (x, pos, unc, second))
  labels, n, locations, c = x.shape
  problems = list(np.ndindex(labels, locations))
  squares = [
    2 * costs(x[i, :, t], y[i, :, t])
    for i, t in problems
    for y in (x, second, pos)
  ]
  scale = math.sqrt(np.mean(np.concatenate([s.ravel() for s in squares])))
  s = scale / math.sqrt(c)
  total, mean_squares = np.zeros_like(x), []
  for temperature in temperatures:
    v = np.zeros_like(x)
    for i, t in problems:
      here = x[i, :, t] / s
      to_data, to_second, to_all = (
        barycentric_map(here, y[i, :, t] / s, temperature * c, iterations)
        for y in (pos, second, unc)
      )
      v[i, :, t] = to_data - to_second + (alpha[i] - 1) * (to_data - to_all)
    mean_squares.append((v**2).mean())
    total += v / math.sqrt(mean_squares[-1])
  gradient = -2 * total / (s * total.size)
  return (total**2).mean(), gradient, scale, mean_squares


SHAPES = {"rows": (3, 8), "mean": (1, 70), "sample": (1, 16)}
ALPHA = np.float32([1.0, 2.5, 4.0])


def features(seed=0):
  """{key: generated, positives, unconditional, second batch}."""
  rng = np.random.default_rng(seed)
  found = {}
  for key, (locations, channels) in SHAPES.items():
    center = rng.normal(size=(3, 1, locations, channels))
    found[key] = [
      (center + shift + rng.normal(size=(3, count, locations, channels)))
      .astype(np.float32)
      for count, shift in ((6, 0.4), (9, 0.0), (5, -0.3), (6, 0.4))
    ]  # fmt: skip
  return found


@pytest.mark.parametrize(
  ("temperatures", "iterations"),
  [((0.05,), 10), ((0.01,), 1), ((0.05, 0.2), 3)],
)
def test_values_and_gradients(temperatures, iterations):
  """Of several features, of several labels and locations."""
  given = features()

  @functools.partial(jax.value_and_grad, has_aux=True)
  def mean_loss(generated):
    real = {
      key: jnp.concatenate(arrays[1:], axis=1) for key, arrays in given.items()
    }
    losses, report = drift_losses(
      generated,
      real,
      jnp.asarray((ALPHA - 1) / 5),
      num_positives=9,
      num_unconditional=5,
      temperatures=temperatures,
      variant=variant(iterations),
    )
    return losses.mean(), (losses, report)

  generated = {key: arrays[0] for key, arrays in given.items()}
  (_, (losses, report)), gradients = jax.jit(mean_loss)(generated)
  for loss, key in zip(losses, report.keys, strict=True):
    expected, gradient, scale, mean_squares = oracle(
      *given[key], ALPHA, temperatures, iterations
    )
    assert_close(loss, expected, 1e-5, key)
    assert_close(gradients[key], gradient / len(given), 1e-5, key)
    assert_close(report.of(key)["scale"], scale, 1e-6, key)
    found = [report.of(key)["drift_ms"][t] for t in temperatures]
    assert_close(found, mean_squares, 1e-5, key)


def test_one_iteration_in_closed_form():
  """P_ij ~ K_ij / sum_k (K_kj / sum_l K_kl): each row normalised, each column.

  Uniform marginals cancel; the barycentric map normalises the rows again.
  """
  rng = np.random.default_rng(0)
  exponent = rng.uniform(0, 20, size=(7, 11))
  kernel = np.exp(-exponent)
  rows = kernel / kernel.sum(1, keepdims=True)
  expected = kernel / rows.sum(0)
  expected /= expected.sum(1, keepdims=True)
  found = family.transport(
    jnp.asarray(exponent, jnp.float32), jnp.ones(11, jnp.float32), 1
  )
  assert_close(found, expected, 2e-6)


@pytest.mark.parametrize("cost", ["quadratic", "l2"])
def test_the_scale_counts_the_own_batch(cost):
  """The mean of d^2, or of d, and not less than its value without."""
  x, pos, unc, second = (jnp.asarray(a[:, :, 0]) for a in features()["mean"])
  power = 2 if cost == "quadratic" else 1

  def scale_of(**changes):
    options = {"cost": cost, "iterations": 1}
    chosen = variant(1, **{"options": options} | changes)
    _, info = drift_loss(
      *(x, pos, unc),
      temperatures=(0.05,),
      variant=chosen,
      independent=second,
    )
    return float(info["scale"])

  def expected(*sets):
    squares = [2 * costs(x[i], y[i]) for y in sets for i in range(len(x))]
    joined = np.concatenate([s.ravel() for s in squares])
    return np.mean(joined ** (power / 2)) ** (1 / power)

  assert_close(scale_of(), expected(x, second, pos), 1e-6)
  assert_close(scale_of(own_in_scale=False), expected(second, pos), 1e-6)
  with pytest.raises(ValueError, match="own_in_scale=True needs .*'own'"):
    drift.Variant(own_in_scale=True)
