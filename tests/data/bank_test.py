"""The sample queue: golden states, draws from the right class, errors."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from drift_jax.data import bank as bank_lib


def make_bank(
  num_classes=4,
  class_size=5,
  unconditional_size=6,
  shape=(2, 3),
  dtype=np.float32,
):
  return bank_lib.create(
    num_classes=num_classes,
    class_size=class_size,
    unconditional_size=unconditional_size,
    sample_shape=shape,
    dtype=dtype,
  )


@pytest.fixture(scope="module")
def extras(golden):
  prefix = "bank/"
  return {
    k[len(prefix) :]: v
    for k, v in golden("extras").items()
    if k.startswith(prefix)
  }


def test_golden_states(extras):
  bank = make_bank(int(extras["num_classes"]), int(extras["max_size"]))
  first = int(extras["first_chunk"])
  samples, labels = extras["samples"], extras["labels"]
  bank_lib.push(bank, samples[:first], labels[:first])
  for name, expected in (
    ("samples", extras["after_first/bank"]),
    ("pointer", extras["after_first/ptr"]),
    ("count", extras["after_first/count"]),
  ):
    assert_array_equal(getattr(bank, name), expected)
  bank_lib.push(bank, samples[first:], labels[first:])
  assert_array_equal(bank.samples, extras["bank"])
  assert_array_equal(bank.pointer, extras["ptr"])
  assert_array_equal(bank.count, extras["count"])
  # One saved bank is copied bit by bit.
  saved = {name: x.copy()[None] for name, x in bank.arrays().items()}
  for array in bank.arrays().values():
    array[...] = 0
  bank_lib.refill(bank, saved)
  for name, array in bank.arrays().items():
    assert_array_equal(array, saved[name][0])


def test_golden_draw(extras):
  """The release's draw, from the slots that its generator chose."""
  bank = make_bank(int(extras["num_classes"]), int(extras["max_size"]))
  bank_lib.push(bank, extras["samples"], extras["labels"])
  expected = extras["sample/out_np_seed_12345"]
  flat = np.asarray(bank.samples)
  for row, label in enumerate(extras["sample/labels"]):
    slots = [
      int(np.flatnonzero((flat[label] == image).all(axis=(1, 2)))[0])
      for image in expected[row]
    ]
    taken = bank_lib.take(bank, np.array([label]), np.array([slots]))
    assert_array_equal(taken[0], expected[row])


def reference_push(rings, samples, labels, size):
  for sample, label in zip(samples, labels, strict=True):
    rings.setdefault(int(label), []).append(sample)
    rings[int(label)] = rings[int(label)][-size:]


@pytest.mark.parametrize("chunk", [1, 4, 40])
def test_rings_hold_the_newest(chunk):
  """Against lists, also when one push overruns a ring several times."""
  rng = np.random.RandomState(0)
  bank = make_bank(num_classes=3, class_size=4, unconditional_size=7, shape=())
  samples = np.arange(1, 41, dtype=np.float32)
  labels = rng.randint(0, 3, 40).astype(np.int32)
  rings: dict[int, list[float]] = {}
  for start in range(0, 40, chunk):
    part = slice(start, start + chunk)
    bank_lib.push(bank, samples[part], labels[part])
    reference_push(rings, samples[part], labels[part], 4)
  for label in range(3):
    assert bank.count[label] == len(rings[label]) == 4
    oldest_first = np.roll(bank.samples[label], -bank.pointer[label])
    assert_array_equal(oldest_first, rings[label])
  oldest_first = np.roll(bank.any_samples, -bank.any_pointer)
  assert_array_equal(oldest_first, samples[-7:])
  assert int(bank.any_count) == 7


@pytest.mark.parametrize(
  "dtype", [np.uint8, np.float16, ml_dtypes.bfloat16, np.float32]
)
def test_samples_keep_their_dtype_and_bits(dtype):
  """Every bit pattern of a byte pair comes back as it was pushed."""
  bits = np.random.default_rng(0).integers(0, 256, (6, 64), np.uint8)
  samples = bits.view(dtype)
  bank = make_bank(1, 6, 6, samples.shape[1:], dtype)
  bank_lib.push(bank, samples, np.zeros(6, np.int32))
  positives, unconditional = bank_lib.sample(
    bank,
    jax.random.key(0),
    np.zeros(2, np.int32),
    num_positives=6,
    num_unconditional=6,
  )
  assert positives.dtype == unconditional.dtype == samples.dtype
  expected = sorted(row.tobytes() for row in samples)
  for rows in (*positives, *unconditional):
    assert sorted(row.tobytes() for row in rows) == expected


def sorted_by_jax(score, count, num):
  """The definition: all filled slots in the order of their scores."""
  score = jnp.where(jnp.arange(score.shape[1]) < count[:, None], score, jnp.inf)
  order = jnp.argsort(score, axis=1)
  column = jnp.arange(num) % jnp.maximum(count, 1)[:, None]
  return jnp.take_along_axis(order, column, axis=1)


@pytest.mark.parametrize("num", [0, 1, 5, 16, 40])
def test_draws_are_the_smallest_scores(num):
  """Against JAX's stable argsort of everything, ties included."""
  rng = np.random.default_rng(num)
  for levels in (4, 2**23):  # many equal scores; as many as uniform has
    score = rng.integers(0, levels, (30, 16)).astype(np.float32) / levels
    count = rng.integers(1, 17, 30).astype(np.int32)
    assert_array_equal(
      bank_lib.draw_slots(score, count, num), sorted_by_jax(score, count, num)
    )


def test_merging_keeps_the_newest_of_each_class():
  """Rings of different fill: [3, 1, 0] of class 0, all full of class 1."""
  banks, number = [], 0
  for count in (3, 1, 0):
    bank = bank_lib.create(
      num_classes=2, class_size=4, unconditional_size=8, sample_shape=(1,)
    )
    labels = np.array([0] * count + [1] * 6, np.int32)
    samples = np.arange(number, number + len(labels), dtype=np.float32)
    bank_lib.push(bank, samples[:, None], labels)
    banks.append(bank)
    number += 100
  stacked = {
    name: np.stack([bank.arrays()[name] for bank in banks])
    for name in banks[0].arrays()
  }
  merged = banks[0]
  bank_lib.refill(merged, stacked)
  # Newest first: 2 and 100, then 1, then 0; of class 1 the last of each ring.
  assert merged.samples[0, :, 0].tolist() == [0, 1, 100, 2]
  assert merged.samples[1, :, 0].tolist() == [7, 205, 106, 8]
  assert merged.count.tolist() == [4, 4] and merged.pointer.tolist() == [0, 0]
  assert int(merged.any_count) == 8 and int(merged.any_pointer) == 0
  # The next sample takes the place of the oldest.
  bank_lib.push(merged, np.full((1, 1), -1, np.float32), np.zeros(1, np.int32))
  assert merged.samples[0, :, 0].tolist() == [-1, 1, 100, 2]
  assert merged.any_samples[0, 0] == -1
