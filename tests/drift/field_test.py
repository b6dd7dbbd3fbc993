"""Alg. 2 against golden arrays, a float64 oracle, and its own symmetries."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drift_jax.drift import coefficients, compute_v, squared_distances
from tests.conftest import assert_close, precise_jit

GOLDEN_CASES = (
  "self_neg_D2",
  "self_neg_D16",
  "separate_neg",
  "three_T",
  "small_T_far",
  "large_T",
  "pos_equals_x",
  "duplicates",
  "one_sample",
)
STATIC = ("temperature", "mask_self", "normalization")
jitted_v = jax.jit(
  compute_v, static_argnames=(*STATIC, "attraction", "repulsion")
)
# What sums of many terms need.
precise_v = precise_jit(
  compute_v, static_argnames=(*STATIC, "attraction", "repulsion")
)
jitted_coefficients = jax.jit(coefficients, static_argnames=STATIC)


@functools.partial(jax.jit, static_argnames=STATIC)
def v_and_coefficients(*arguments, **options):
  return compute_v(*arguments, **options), coefficients(*arguments, **options)


def oracle_affinities(distance, temperature, normalization, floor=0.0):
  """A [..., N, T] in float64, from softmaxes as the paper writes them."""
  kernel = np.exp(-distance / temperature)
  if normalization == "xy":
    rows = np.exp(-(distance - distance.min(-1, keepdims=True)) / temperature)
    cols = np.exp(-(distance - distance.min(-2, keepdims=True)) / temperature)
    rows = rows / rows.sum(-1, keepdims=True)
    cols = cols / cols.sum(-2, keepdims=True)
    squared = rows * cols
  elif normalization == "y":
    squared = (kernel / kernel.sum(-1, keepdims=True)) ** 2
  else:
    squared = kernel**2
  return np.sqrt(np.maximum(squared, floor))


def oracle_v(x, y_pos, y_neg, temperature, mask_self, normalization, a, b):
  """V in float64 by explicit differences y_j - x_i."""
  x, y_pos, y_neg = (np.float64(array) for array in (x, y_pos, y_neg))
  y = np.concatenate([y_pos, y_neg])
  difference = y[None] - x[:, None]
  distance = np.sqrt((difference**2).sum(-1))
  p = len(y_pos)
  if mask_self:
    distance[:, p:] += np.where(np.eye(len(x)), 1e6, 0.0)
  affinity = oracle_affinities(distance, temperature, normalization)
  w_pos = affinity[:, :p] * affinity[:, p:].sum(1, keepdims=True)
  w_neg = affinity[:, p:] * affinity[:, :p].sum(1, keepdims=True)
  v_pos = (w_pos[..., None] * difference[:, :p]).sum(1)
  v_neg = (w_neg[..., None] * difference[:, p:]).sum(1)
  return a * v_pos - b * v_neg


def problem(n=7, p=9, m=7, d=3, seed=0):
  """x, y_pos, y_neg on a grid of 2^-10: integer shifts are exact."""
  rng = np.random.default_rng(seed)
  return tuple(
    jnp.asarray(np.round(rng.normal(size=(k, d)) * 1024) / 1024, jnp.float32)
    for k in (n, p, m)
  )


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_golden(golden, case):
  arrays = golden("compute_v")
  x, y_pos, y_neg = (
    jnp.asarray(arrays[f"{case}/{name}"], jnp.float32)
    for name in ("x", "y_pos", "y_neg")
  )
  mask_self = bool(arrays[f"{case}/y_neg_is_x"])
  # Below this a product of two float32 affinities underflows to 0.
  tiny = 1e-37
  for i, temperature in enumerate(arrays[f"{case}/T"]):
    v, (w_pos, w_neg, a) = v_and_coefficients(
      x, y_pos, y_neg, temperature=float(temperature), mask_self=mask_self
    )
    expected = {
      "V": (v, arrays[f"{case}/V"][i]),
      "A": (a, arrays[f"{case}/A_{i}"]),
      "W_pos": (w_pos, arrays[f"{case}/W_pos_{i}"]),
      "W_neg": (w_neg, arrays[f"{case}/W_neg_{i}"]),
    }
    for name, (actual, wanted) in expected.items():
      if np.abs(wanted).max() > tiny:
        assert_close(actual, wanted, 2e-6, f"{case} {temperature} {name}")
      else:
        assert np.abs(actual).max() <= tiny, (case, temperature, name)


def test_golden_cases_are_complete(golden):
  cases = {key.split("/")[0] for key in golden("compute_v")}
  assert cases == set(GOLDEN_CASES)


@pytest.mark.parametrize("normalization", ["xy", "y", "none"])
@pytest.mark.parametrize(
  ("n", "p", "m", "d", "mask_self", "a", "b"),
  [
    (7, 9, 7, 3, True, 1.0, 1.0),
    (5, 2, 8, 20, False, 2.0, 1.0),
    (6, 4, 6, 100, True, 1.0, 1.5),  # beyond 64 channels: gram expansion
    (1, 3, 2, 4, False, 1.0, 0.0),
  ],
)
def test_float64_oracle(n, p, m, d, mask_self, a, b, normalization):
  x, y_pos, y_neg = problem(n, p, m, d, seed=d)
  if mask_self:
    y_neg = x
  temperature = 0.3 * d**0.5
  actual = jitted_v(
    x,
    y_pos,
    y_neg,
    temperature,
    mask_self=mask_self,
    normalization=normalization,
    attraction=a,
    repulsion=b,
  )
  expected = oracle_v(
    x, y_pos, y_neg, temperature, mask_self, normalization, a, b
  )
  assert actual.dtype == jnp.float32
  assert_close(actual, expected, 2e-6)


@pytest.mark.parametrize("normalization", ["xy", "y", "none"])
@pytest.mark.parametrize("mask_self", [True, False])
def test_coefficient_rows_sum_to_zero(normalization, mask_self):
  w_pos, w_neg, _ = jitted_coefficients(
    *problem(), 0.5, mask_self=mask_self, normalization=normalization
  )
  positive, negative = np.float64(w_pos).sum(1), np.float64(w_neg).sum(1)
  assert (np.abs(positive - negative) <= 5e-7 * positive).all()


@pytest.mark.parametrize("normalization", ["xy", "y", "none"])
def test_population_form_is_antisymmetric(normalization):
  x, y_pos, y_neg = problem()
  v = functools.partial(
    jitted_v, temperature=0.5, mask_self=False, normalization=normalization
  )
  assert_close(v(x, y_pos, y_neg), -v(x, y_neg, y_pos), 1e-6)
  assert np.abs(v(x, y_pos, y_pos)).max() <= 1e-6  # V = 0 where q = p


@pytest.mark.parametrize("normalization", ["y", "none"])
def test_self_mask_leaves_one_out(normalization):
  """The masked field at x_i is the population field without negative i.

  So positives and negatives no longer play the same part: where both are x,
  the population field vanishes and the masked one does not. (With "xy" the
  masked pair also leaves the softmax over samples, which couples the rows.)
  """
  x, y_pos, _ = problem()
  v = functools.partial(precise_v, temperature=0.5, normalization=normalization)
  masked = v(x, y_pos, x, mask_self=True)
  for i in range(x.shape[0]):
    others = np.delete(x, i, axis=0)
    one = v(x[i : i + 1], y_pos, others, mask_self=False)
    assert_close(masked[i : i + 1], one, 1e-6)
  assert np.abs(v(x, x, x, mask_self=False)).max() <= 1e-6
  assert np.abs(v(x, x, x, mask_self=True)).max() >= 1e-3


def test_translation_invariance():
  x, y_pos, y_neg = problem()
  options = {"mask_self": True, "attraction": 2.0, "repulsion": 1.0}
  shift = np.float32([64.0, -512.0, 7.0])
  v = precise_v(x, y_pos, y_neg, 0.5, **options)
  moved = precise_v(x + shift, y_pos + shift, y_neg + shift, 0.5, **options)
  assert_close(moved, v, 1e-6)


def test_permutation_equivariance():
  x, y_pos, y_neg = problem()
  v = functools.partial(jitted_v, temperature=0.5)
  order = np.random.default_rng(1).permutation(7)
  plain = v(x, y_pos, y_neg, mask_self=False)
  shuffled = v(x[order], y_pos[::-1], y_neg[order[::-1]], mask_self=False)
  assert_close(shuffled, plain[order], 1e-6)
  masked = v(x, y_pos, x, mask_self=True)
  shuffled = v(x[order], y_pos[::-1], x[order], mask_self=True)
  assert_close(shuffled, masked[order], 1e-6)


def test_rotation_equivariance():
  x, y_pos, y_neg = problem()
  rotation, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))
  rotation = jnp.asarray(rotation, jnp.float32)
  v = functools.partial(jitted_v, temperature=0.5, mask_self=True)
  turned = v(x @ rotation, y_pos @ rotation, y_neg @ rotation)
  assert_close(turned, v(x, y_pos, y_neg) @ rotation, 2e-6)


def test_low_precision_input_is_computed_in_float32():
  low = tuple(array.astype(jnp.bfloat16) for array in problem())
  high = tuple(array.astype(jnp.float32) for array in low)
  v = jitted_v(*low, 0.5, mask_self=True)
  assert v.dtype == jnp.float32
  assert np.array_equal(v, jitted_v(*high, 0.5, mask_self=True))


def test_float64_is_computed_in_float64():
  arrays = tuple(np.random.default_rng(0).normal(size=(5, 3)) for _ in range(3))
  with jax.enable_x64(True):
    v = jitted_v(*map(jnp.asarray, arrays), 0.5, mask_self=False)
  assert v.dtype == np.float64
  assert_close(v, oracle_v(*arrays, 0.5, False, "xy", 1.0, 1.0), 1e-13)


def test_derivative_is_finite_at_coincident_points():
  x, y_pos, _ = problem()
  y_pos = y_pos.at[0].set(x[0])
  jacobian = jax.jit(
    jax.jacrev(lambda x: compute_v(x, y_pos, x, 0.5, mask_self=True))
  )
  assert np.isfinite(jacobian(x)).all()


@pytest.mark.parametrize("channels", [64, 65, 256])
def test_squared_distances(channels):
  rng = np.random.default_rng(3)
  x, y = (rng.normal(size=(2, k, channels)) + 30.0 for k in (5, 6))
  x, y = np.float32(x), np.float32(y)
  y[:, 0] = x[:, 1]
  expected = ((np.float64(x)[:, :, None] - np.float64(y)[:, None]) ** 2).sum(-1)
  actual = np.asarray(squared_distances(jnp.asarray(x), jnp.asarray(y)))
  assert_close(actual, expected, 1e-6)
  assert (actual >= 0).all()
  # Coincident points: exact by subtraction, rounding of the norms by gram.
  limit = 0.0 if channels <= 64 else 2e-6 * channels
  assert np.abs(actual[:, 1, 0]).max() <= limit
