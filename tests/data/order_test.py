"""Orders: coverage, distinctness and random access, by exhaustive counting."""

import grain
import numpy as np
import pytest

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
    np.testing.assert_array_equal(order.records(batch, 0, 7), expected)
    np.testing.assert_array_equal(order.records(batch, 2, 5), expected[2:5])
  assert order[123] == pipeline[123]


def test_shuffled_covers_every_record_each_epoch():
  order = order_lib.Shuffled(24, size=8, seed=1)
  epochs = [
    np.concatenate([order.records(3 * e + b, 0, 8) for b in range(3)])
    for e in range(4)
  ]
  for epoch in epochs:
    assert sorted(epoch) == list(range(24))
  assert len({tuple(epoch) for epoch in epochs}) == 4


def test_no_data():
  with pytest.raises(ValueError, match="no record"):
    order_lib.Shuffled(0, size=1, seed=0)


def make_stream(size, block, window, seed=0):
  return order_lib.DistinctStream(
    size, block=block, window=window, seed=seed, use=(1, 2)
  )


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
    np.testing.assert_array_equal(
      stream.take(start, stop), expected[start:stop]
    )
    fresh = make_stream(size, block, window)
    np.testing.assert_array_equal(fresh.take(start, stop), expected[start:stop])
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


def test_stream_too_short():
  with pytest.raises(ValueError, match="2 x 4 distinct elements of 7"):
    make_stream(7, 4, 2)


def make_grouped(labels, classes, **changes):
  arguments = {
    "seed": 0,
    "num_labels": 4,
    "num_positives": 3,
    "num_unconditional": 2,
  } | changes
  names = tuple(f"class{c}" for c in range(classes))
  return order_lib.ClassGrouped(labels, names, **arguments)


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


@pytest.fixture(scope="module", params=GROUPS)
def group(request):
  sizes, num_labels, num_positives, num_unconditional = GROUPS[request.param]
  labels = np.repeat(np.arange(len(sizes)), sizes)
  labels = np.random.default_rng(5).permutation(labels).astype(np.int32)
  order = make_grouped(
    labels,
    len(sizes),
    num_labels=num_labels,
    num_positives=num_positives,
    num_unconditional=num_unconditional,
  )
  steps = 150
  return {
    "name": request.param,
    "data": labels,
    "order": order,
    "labels": np.array([order.labels(s) for s in range(steps)]),
    "positives": np.array([order.positives(s) for s in range(steps)]),
    "unconditional": np.array([order.unconditional(s) for s in range(steps)]),
  }


def test_grouped_positives_are_of_their_class(group):
  np.testing.assert_array_equal(
    group["data"][group["positives"]],
    np.broadcast_to(group["labels"][..., None], group["positives"].shape),
  )


def test_grouped_steps_repeat_no_image(group):
  for name in ("positives", "unconditional"):
    for step in group[name]:
      assert len(np.unique(step)) == step.size


def test_grouped_steps_repeat_no_label_where_they_can(group):
  most = max(np.bincount(step).max() for step in group["labels"])
  expected = {"straddling": 2, "several": 3, "single": 2}
  assert most == expected.get(group["name"], 1)


def test_grouped_draws_are_even_at_every_step(group):
  """Labels, each class' images and unconditional reals within one."""
  data = group["data"]
  drawn = np.zeros(data.max() + 1, int)
  positives, unconditional = np.zeros(len(data), int), np.zeros(len(data), int)
  for step in range(len(group["labels"])):
    np.add.at(drawn, group["labels"][step], 1)
    np.add.at(positives, group["positives"][step].ravel(), 1)
    np.add.at(unconditional, group["unconditional"][step].ravel(), 1)
    assert np.ptp(drawn) <= 1 and np.ptp(unconditional) <= 1
    assert all(np.ptp(positives[data == c]) <= 1 for c in range(len(drawn)))
  assert positives.min() >= 2  # so ends of passes have been seen


def test_grouped_steps_in_any_order(group):
  """A new order asked for one step gives that step, whole or in pieces."""
  settings = GROUPS[group["name"]]
  for step in (149, 3, 77):
    order = make_grouped(
      group["data"],
      len(settings[0]),
      num_labels=settings[1],
      num_positives=settings[2],
      num_unconditional=settings[3],
    )
    whole = np.concatenate(
      [group["positives"][step].ravel(), group["unconditional"][step].ravel()]
    )
    assert order.size == len(whole)
    for start in range(0, order.size, 5):
      stop = min(start + 5, order.size)
      np.testing.assert_array_equal(
        order.records(step, start, stop), whole[start:stop]
      )


def test_grouped_seeds_differ():
  labels = np.arange(90) % 9
  a, b = make_grouped(labels, 9), make_grouped(labels, 9, seed=1)
  assert not np.array_equal(a.labels(0), b.labels(0))
  assert not np.array_equal(a.unconditional(0), b.unconditional(0))


def test_grouped_without_unconditional_reals():
  order = make_grouped(np.arange(90) % 9, 9, num_unconditional=0)
  assert order.unconditional(2).shape == (4, 0)
  assert order.positives(2).shape == (4, 3)


def test_too_few_images_of_a_class_names_it():
  labels = np.repeat([0, 1, 2], [9, 5, 30])
  with pytest.raises(
    ValueError,
    match=r"class 1 \(class1\) has 5 images.*labels=4.*positives=3.*draw 6 "
    r"of it, coming up to 2 times.*1 of the 3 classes.*lower batch.positives",
  ):
    make_grouped(labels, 3)
  with pytest.raises(ValueError, match=r"class 3 \(class3\) has 0 images"):
    make_grouped(labels, 4, num_positives=1)


def test_too_few_images_in_all():
  with pytest.raises(ValueError, match="hold 24 images.*4 x .*=7 = 28"):
    make_grouped(np.arange(24) % 8, 8, num_unconditional=7)


def test_labels_out_of_range():
  with pytest.raises(
    ValueError, match=r"record 2 .* label 4, outside \[0, 4\).*2 of 5 records"
  ):
    order_lib.check_labels(np.array([0, 3, 4, -1, 2]), tuple("abcd"))
  with pytest.raises(ValueError, match="record 0 .* label -1"):
    order_lib.check_labels(np.array([-1]), tuple("abcd"))
  with pytest.raises(ValueError, match="label 9"):
    make_grouped(np.array([9, 0, 1]), 2)


def draws(seed, numbers):
  rngs = order_lib.record_generators(seed, np.asarray(numbers))
  return np.array([rng.random(4) for rng in rngs])


def test_record_generators_depend_on_seed_and_number_alone():
  together = draws(0, [5, 9, 2**40])
  for row, number in zip(together, [5, 9, 2**40], strict=True):
    np.testing.assert_array_equal(draws(0, [number])[0], row)
  assert not np.isclose(draws(1, [5, 9, 2**40]), together).any()
  # A resumed run must go on with the same crops, whatever the versions.
  expected = [0.5585868796266302, 0.18749018462751144]
  np.testing.assert_array_equal(draws(0, [0, 1])[:, 0], expected)


def test_record_generators_are_uniform_and_independent():
  """First draws of 20 000 successive records, within 5 sigma."""
  drawn = draws(7, np.arange(20_000))
  scale = 5 / np.sqrt(20_000)
  assert np.abs(drawn.mean(0) - 0.5).max() < scale * np.sqrt(1 / 12)
  assert np.abs(drawn.var(0) - 1 / 12).max() < scale * np.sqrt(1 / 180)
  for lag in (1, 2, 64):
    pair = np.corrcoef(drawn[:-lag, 0], drawn[lag:, 0])[0, 1]
    assert abs(pair) < scale
  counts = np.bincount((drawn[:, 0] * 50).astype(int), minlength=50)
  assert np.abs(counts - 400).max() < 5 * np.sqrt(400)
