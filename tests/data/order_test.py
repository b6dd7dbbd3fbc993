"""Orders: coverage, distinctness and random access, by exhaustive counting."""

import grain
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from drift_jax.data import order as order_lib


@pytest.mark.parametrize(("count", "seed"), [(30, 0), (1257, 3), (5, 2**31)])
def test_shuffled_is_grains_shuffle(count, seed):
  """Record for record what a Grain pipeline over the records would give."""
  pipeline = (
    grain.MapDataset.source(range(count)).seed(seed).shuffle().repeat(None)
  )
  order = order_lib.Shuffled(count, size=7, seed=seed)
  for batch in (0, 1, count // 7, count, 10**6):
    expected = [pipeline[batch * 7 + i] for i in range(7)]
    assert_array_equal(order.records(batch, 0, 7), expected)
    assert_array_equal(order.records(batch, 2, 5), expected[2:5])


def make_stream(size, block, window, seed=0):
  return order_lib.DistinctStream(size, block, window, seed, "test")


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("block", [1, 2, 3, 5])
def test_stream_repeats_nothing_within_a_window(block, window):
  """Every size from the smallest to well above where passes are fresh."""
  span = window * block
  for size in range(span, 4 * span + 3):
    stream = make_stream(size, block, window)
    blocks = 6 * size // block + window
    elements = stream.take(0, blocks * block)
    for first in range(blocks - window + 1):
      seen = elements[first * block : first * block + span]
      assert len(set(seen)) == span, (size, first)
    for number in range(5):
      part = elements[number * size : (number + 1) * size]
      assert sorted(part) == list(range(size))
    # Always within one of each other, whatever the number of draws.
    for count in range(0, len(elements), max(1, block // 2)):
      used = np.bincount(elements[:count], minlength=size)
      assert used.max() - used.min() <= 1
    assert stream.fresh or size < (3 * window - 1) * block - 1
    passes = {tuple(stream.permutation(k)) for k in range(6)}
    assert size < 6 or (len(passes) == 1) == (not stream.fresh)


@pytest.mark.parametrize(
  ("size", "block", "window"), [(9, 5, 1), (13, 7, 1), (14, 3, 2), (40, 7, 1)]
)
def test_stream_at_random_places(size, block, window):
  """Any element can be asked for first, in any pieces."""
  expected = make_stream(size, block, window).take(0, size * 9)
  rng = np.random.default_rng(0)
  stream = make_stream(size, block, window)
  assert stream.fresh
  for _ in range(200):
    start, stop = sorted(rng.integers(0, size * 9, 2))
    assert_array_equal(stream.take(start, stop), expected[start:stop])
    fresh = make_stream(size, block, window)
    assert_array_equal(fresh.take(start, stop), expected[start:stop])
  other = make_stream(size, block, window, seed=1)
  assert not np.array_equal(other.take(0, size), expected[:size])


def test_stream_is_uniform_at_every_place():
  """Rearranging heads prefers no element: counts within 5 sigma of 1/13."""
  stream = make_stream(13, 5, 1)
  assert stream.fresh
  passes = np.array([stream.permutation(k) for k in range(4000)])
  sigma = np.sqrt(4000 / 13 * 12 / 13)
  for place in range(13):
    counts = np.bincount(passes[:, place], minlength=13)
    assert np.abs(counts - 4000 / 13).max() < 5 * sigma, place


# Class sizes, N_c, N_pos, N_unc: more classes than labels, labels in whole
# passes, fewer classes than labels, one class, classes of unequal size.
GROUPS = {
  "distinct": ([9, 12, 10, 9, 14, 9, 11, 30, 9], 4, 4, 5),
  "straddling": ([13, 12, 17, 20, 12], 4, 6, 3),
  "whole": ([7, 9, 8, 7], 4, 7, 1),
  "several": ([19, 22, 40], 5, 4, 6),
  "single": ([11], 2, 5, 4),
  "unequal": ([6, 200, 7, 31], 2, 6, 7),
}


def make_grouped(name, seed=0):
  """Labels of every record, and their order."""
  sizes, num_labels, num_positives, num_unconditional = GROUPS[name]
  labels = np.repeat(np.arange(len(sizes)), sizes)
  labels = np.random.default_rng(5).permutation(labels).astype(np.int32)
  return labels, order_lib.ClassGrouped(
    labels,
    tuple(f"class{c}" for c in range(len(sizes))),
    seed=seed,
    num_labels=num_labels,
    num_positives=num_positives,
    num_unconditional=num_unconditional,
  )


@pytest.mark.parametrize("name", GROUPS)
def test_grouped(name):
  """Positives of their class, no repeats in a step, even at every step."""
  data, order = make_grouped(name)
  sizes, num_labels, each, _ = GROUPS[name]
  first = num_labels * each
  drawn, positives, others = (
    np.zeros(n, int) for n in (len(sizes), *[len(data)] * 2)
  )
  most = 0
  for step in range(150):
    labels = order.labels(step)
    records = order.records(step, 0, order.size)
    assert len(np.unique(records[:first])) == first
    assert len(np.unique(records[first:])) == order.size - first
    assert_array_equal(data[records[:first]], np.repeat(labels, each))
    np.add.at(drawn, labels, 1)
    np.add.at(positives, records[:first], 1)
    np.add.at(others, records[first:], 1)
    assert np.ptp(drawn) <= 1 and np.ptp(others) <= 1
    assert all(np.ptp(positives[data == c]) <= 1 for c in range(len(sizes)))
    most = max(most, np.bincount(labels).max())
  assert positives.min() >= 2  # so ends of passes have been seen
  # No label comes twice where that can be.
  assert most == {"straddling": 2, "several": 3, "single": 2}.get(name, 1)


@pytest.mark.parametrize("name", GROUPS)
def test_grouped_steps_in_any_order(name):
  """A new order asked for one step gives that step, whole or in pieces."""
  _, every = make_grouped(name)
  steps = [every.records(step, 0, every.size) for step in range(150)]
  for step in (149, 3, 77):
    _, order = make_grouped(name)
    for start in range(0, order.size, 5):
      stop = min(start + 5, order.size)
      assert_array_equal(
        order.records(step, start, stop), steps[step][start:stop]
      )
  _, other = make_grouped(name, seed=1)
  assert not np.array_equal(other.records(0, 0, other.size), steps[0])


def test_labels_out_of_range():
  with pytest.raises(
    ValueError, match=r"record 2 .* label 4, outside \[0, 4\).*2 of 5 records"
  ):
    order_lib.check_labels(np.array([0, 3, 4, -1, 2]), tuple("abcd"))


def draws(seed, numbers):
  rngs = order_lib.record_generators(seed, np.asarray(numbers))
  return np.array([rng.random(4) for rng in rngs])


def test_record_generators_depend_on_seed_and_number_alone():
  together = draws(0, [5, 9, 2**40])
  for row, number in zip(together, [5, 9, 2**40], strict=True):
    assert_array_equal(draws(0, [number])[0], row)
  assert not np.isclose(draws(1, [5, 9, 2**40]), together).any()
  # A resumed run must go on with the same crops, whatever the versions.
  expected = [0.5585868796266302, 0.18749018462751144]
  assert_array_equal(draws(0, [0, 1])[:, 0], expected)
