"""Windows of demonstrations, their normalisation and their feed."""

import numpy as np
import orbax.checkpoint as ocp
import pytest

from drift_jax.system.errors import DataError
from drift_jax.tasks.policy.demonstrations import Demonstrations
from drift_jax.tasks.policy.windows import Normalizer, PolicyFeed, window_steps

LENGTHS = (9, 3, 12)
HORIZONS = {"observation_horizon": 2, "prediction_horizon": 8, "executed": 4}


def demonstrations(lengths=LENGTHS):
  """Vectors, small images and actions that all tell their step."""
  rng = np.random.default_rng(0)
  steps = sum(lengths)
  number = np.arange(steps)
  state = rng.normal(size=(steps, 3)).astype(np.float32)
  state[:, 0] = number
  actions = rng.uniform(-50, 200, (steps, 2)).astype(np.float32)
  images = np.tile(number.astype(np.uint8)[:, None, None, None], (1, 4, 4, 3))
  return Demonstrations(
    {"state[:3]": state, "image": images}, actions, np.cumsum(lengths)
  )


def feed(shown=None, **changes):
  arguments = HORIZONS | {"batch_size": 6, "seed": 3} | changes
  return PolicyFeed(shown or demonstrations(), **arguments)


def reference_steps(lengths, observed, predicted, executed):
  """Each window's steps, one by one: padded episodes, cut in pieces."""
  windows, begin = [], 0
  for length in lengths:
    steps = list(range(begin, begin + length))
    padded = [steps[0]] * (observed - 1) + steps + [steps[-1]] * (executed - 1)
    for start in range(len(padded) - predicted + 1):
      windows.append(padded[start : start + predicted])
    begin += length
  return windows


@pytest.mark.parametrize("horizons", [(2, 8, 4), (1, 5, 5), (3, 3, 1)])
def test_windows_are_pieces_of_padded_episodes(horizons):
  np.testing.assert_array_equal(
    window_steps(demonstrations(), *horizons),
    reference_steps(LENGTHS, *horizons),
  )


def test_horizons_that_fit_nothing():
  with pytest.raises(DataError, match="no episode of 3 .*_horizon=40"):
    window_steps(demonstrations(), 1, 40, 1)


def test_the_normaliser_spans_the_range():
  shown = demonstrations()
  normalizer = Normalizer.fit(shown)
  assert set(normalizer.ranges) == {"state[:3]", "actions"}
  for name in normalizer.ranges:
    values = shown.arrays[name]
    normal = normalizer.normalize(name, values)
    assert normal.dtype == np.float32
    np.testing.assert_allclose(normal.min(axis=0), -1, rtol=1e-6)
    np.testing.assert_allclose(normal.max(axis=0), 1, rtol=1e-6)
    low, high = (f(values.astype(np.float64), 0) for f in (np.min, np.max))
    np.testing.assert_allclose(
      normal, 2 * (values - low) / (high - low) - 1, rtol=1e-5, atol=1e-6
    )
    back = normalizer.unnormalize(name, normal.reshape(2, 12, -1))
    np.testing.assert_allclose(
      back.reshape(24, -1), values, rtol=1e-5, atol=1e-5
    )
  for call in (normalizer.normalize, normalizer.unnormalize):
    with pytest.raises(
      DataError, match=r"'state\[:3\]' .*\(1, 2\), want 3 dim"
    ):
      call("state[:3]", np.zeros((1, 2)))


def test_what_stands_still_is_shifted_only():
  actions = np.array([[5, 3, 0], [5, 3.00005, 1]], np.float32)
  normalizer = Normalizer.fit(Demonstrations({}, actions, np.array([2])))
  normal = normalizer.normalize("actions", actions)
  np.testing.assert_array_equal(normal[:, 0], 0)
  assert 0 < np.abs(normal[:, 1]).max() < 1e-4
  np.testing.assert_array_equal(normal[:, 2], [-1, 1])
  # What a model makes up there goes nowhere.
  back = normalizer.unnormalize("actions", np.full((1, 3), 0.7))
  np.testing.assert_allclose(back, [[5, 3.000025, 0.85]], rtol=1e-6)


def test_batches_are_normalised_windows():
  shown = demonstrations()
  batch = next(feed())
  observations, actions = batch["observations"], batch["actions"]
  image, state = observations["image"], observations["state[:3]"]
  assert image.dtype == np.uint8 and state.dtype == np.float32
  assert image.shape == (6, 2, 4, 4, 3) and actions.shape == (6, 8, 2)
  normalizer = Normalizer.fit(shown)
  # The images tell which windows they are: what is observed belongs together.
  steps = image[:, :, 0, 0, 0]
  for name, found in (("state[:3]", state), ("actions", actions[:, :2])):
    np.testing.assert_array_equal(
      found, normalizer.normalize(name, shown.arrays[name][steps])
    )


def test_an_epoch_has_each_window_once():
  running = feed(batch_size=7)
  count = len(running.windows)
  assert count % 7
  drawn = np.concatenate([next(running)["actions"] for _ in range(count)])
  epochs = drawn.reshape(7, count, -1)
  every = np.unique(epochs[0], axis=0)
  assert len(every) == count
  for epoch in epochs[1:]:
    np.testing.assert_array_equal(np.unique(epoch, axis=0), every)
    assert (epoch != epochs[0]).any()
  other = next(feed(batch_size=7, seed=4))["actions"]
  assert (other != drawn[:7]).any()
  # A batch may span epochs.
  rows = next(feed(batch_size=50))["actions"].reshape(50, -1)
  counts = np.unique(rows, axis=0, return_counts=True)[1]
  assert count < 25 and set(counts) <= {50 // count, 50 // count + 1}


def test_any_number_of_processes_draw_the_same():
  whole, *parts = (
    feed(process_index=i, process_count=n) for i, n in ((0, 1), (0, 2), (1, 2))
  )
  for _ in range(5):
    first, second = (next(part)["actions"] for part in parts)
    np.testing.assert_array_equal(
      np.concatenate([first, second]), next(whole)["actions"]
    )
  with pytest.raises(ValueError, match="batch_size=6 .* 4 processes"):
    feed(process_count=4)


def test_a_restored_feed_goes_on(tmp_path):
  """Through Orbax, which also has to do with the names of the ranges."""
  running = feed()
  for _ in range(7):
    next(running)
  with ocp.StandardCheckpointer() as saver:
    saver.save(tmp_path / "feed", running.state())
    saver.wait_until_finished()
    restored = feed()
    target = restored.abstract(running.state())
    restored.restore(saver.restore(tmp_path / "feed", target))
  for _ in range(3):
    old, new = next(running), next(restored)
    for tree in (old, new):
      tree |= tree.pop("observations")
    assert old.keys() == new.keys() == {"actions", "image", "state[:3]"}
    for name, values in old.items():
      np.testing.assert_array_equal(values, new[name])


def test_other_demonstrations_do_not_go_on():
  shown = demonstrations()
  state = feed(shown).state()
  moved = shown.actions.copy()
  moved[4, 1] += 1_000
  narrow = {"state[:3]": shown.observations["state[:3]"][:, :2]}
  for observations, actions, name in (
    (shown.observations, moved, "'actions'"),
    (narrow, shown.actions, "'state.:3.'"),
    ({}, shown.actions, "'state.:3.'"),
  ):
    other = feed(Demonstrations(observations, actions, shown.ends))
    with pytest.raises(DataError, match=f"other demonstrations: {name} was"):
      other.restore(state)
