"""Windows of demonstrations, their normalisation and their feed."""

import numpy as np
import orbax.checkpoint as ocp
import pytest

from drift_jax.data.errors import DataError
from drift_jax.tasks.policy.demonstrations import Demonstrations
from drift_jax.tasks.policy.windows import Normalizer, PolicyFeed, Windows

LENGTHS = (9, 3, 12)
HORIZONS = {
  "observation_horizon": 2,
  "prediction_horizon": 8,
  "executed": 4,
}


def demonstrations(seed=0, lengths=LENGTHS):
  """Vectors, small images and actions that all tell their step."""
  rng = np.random.default_rng(seed)
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
  shown = shown or demonstrations()
  arguments = HORIZONS | {"batch_size": 6, "seed": 3} | changes
  return PolicyFeed(shown, Normalizer.fit(shown), **arguments)


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
  shown = demonstrations()
  windows = Windows(shown, *horizons)
  steps = np.array(reference_steps(LENGTHS, *horizons))
  assert len(windows) == len(steps)
  observations, actions = windows.take(np.arange(len(windows)))
  np.testing.assert_array_equal(actions, shown.actions[steps])
  observed = steps[:, : horizons[0]]
  np.testing.assert_array_equal(observations["state[:3]"][..., 0], observed)
  np.testing.assert_array_equal(observations["image"][..., 3, 1, 2], observed)
  assert observations["image"].shape == (*observed.shape, 4, 4, 3)
  # Any of them, in any order.
  chosen = np.array([5, 0, 5])
  np.testing.assert_array_equal(
    windows.take(chosen)[1], shown.actions[steps[chosen]]
  )


def test_every_observation_is_acted_upon():
  """Each step is the last observed one of one window, if 8 + 4 - 1 long."""
  windows = Windows(demonstrations(lengths=(30,)), 2, 8, 4)
  last = windows.take(np.arange(len(windows)))[0]["state[:3]"][:, 1, 0]
  # Behind them, fewer than T - To + 1 - (executed - 1) actions are left.
  np.testing.assert_array_equal(last, np.arange(30 - (8 - 2 + 1 - 3) + 1))


@pytest.mark.parametrize(
  ("horizons", "message"),
  [
    ((2, 8, 8), r"prediction_horizon=8 must hold .*=2 .* executed=8: .* = 9"),
    ((0, 8, 4), "observation_horizon=0"),
    ((1, 8, 0), "executed=0"),
    ((1, 40, 1), "no episode of 3 is as long as .*prediction_horizon=40"),
  ],
)
def test_horizons_that_fit_nothing(horizons, message):
  with pytest.raises(DataError, match=message):
    Windows(demonstrations(), *horizons)


def test_the_normaliser_spans_the_range():
  shown = demonstrations()
  normalizer = Normalizer.fit(shown)
  assert set(normalizer.ranges) == {"state[:3]", "actions"}
  for name, values in (
    ("state[:3]", shown.observations["state[:3]"]),
    ("actions", shown.actions),
  ):
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


def test_what_stands_still_is_shifted_only():
  actions = np.array([[5, 3, 0], [5, 3.00005, 1]], np.float32)
  shown = Demonstrations({}, actions, np.array([2]))
  normalizer = Normalizer.fit(shown)
  normal = normalizer.normalize("actions", actions)
  np.testing.assert_array_equal(normal[:, 0], 0)
  assert 0 < np.abs(normal[:, 1]).max() < 1e-4
  np.testing.assert_array_equal(normal[:, 2], [-1, 1])
  # What a model makes up there goes nowhere.
  back = normalizer.unnormalize("actions", np.full((1, 3), 0.7))
  np.testing.assert_allclose(back, [[5, 3.000025, 0.85]], rtol=1e-6)


def test_normalisers_are_kept():
  normalizer = Normalizer.fit(demonstrations())
  again = Normalizer.from_tree(normalizer.as_tree())
  assert set(again.ranges) == {"state[:3]", "actions"}
  for name, pair in normalizer.ranges.items():
    for old, new in zip(pair, again.ranges[name], strict=True):
      assert new.dtype == np.float32
      np.testing.assert_array_equal(old, new)


def test_names_and_dimensions_are_checked():
  normalizer = Normalizer.fit(demonstrations())
  with pytest.raises(DataError, match="'velocity' has no range: .*'state"):
    normalizer.normalize("velocity", np.zeros((1, 3)))
  for call in (normalizer.normalize, normalizer.unnormalize):
    with pytest.raises(
      DataError, match=r"'state\[:3\]' .*\(1, 2\), want 3 dim"
    ):
      call("state[:3]", np.zeros((1, 2)))


def test_actions_nobody_showed():
  shown = demonstrations()
  normalizer = Normalizer.fit(shown)
  low, high = normalizer.ranges["actions"]
  span = high - low
  for edge in (low - 9e-4 * span, high + 9e-4 * span):
    normalizer.check_actions(np.stack([edge, low]), "episode 3")
  actions = shown.actions.reshape(2, 12, 2).copy()
  normalizer.check_actions(actions, "episode 3")
  actions[1, 7, 1] = high[1] + 2e-3 * span[1]
  with pytest.raises(
    DataError,
    match=rf"episode 3: step 7 has {actions[1, 7, 1]:g} in dimension 1, "
    rf"outside .* \[{low[1]:g}, {high[1]:g}\]",
  ):
    normalizer.check_actions(actions, "episode 3")
  with pytest.raises(DataError, match="step 0 has nan in dimension 0"):
    normalizer.check_actions(np.full((1, 2), np.nan), "it")
  with pytest.raises(DataError, match="step 0 has -inf in dimension 0"):
    normalizer.check_actions(np.full(2, -np.inf)[None], "it")


def same(a, b):
  assert a.keys() == b.keys()
  np.testing.assert_array_equal(a["actions"], b["actions"])
  assert a["observations"].keys() == b["observations"].keys()
  for name, values in a["observations"].items():
    np.testing.assert_array_equal(values, b["observations"][name])


def test_batches_are_normalised_windows():
  shown = demonstrations()
  batch = next(feed())
  assert batch["observations"]["image"].dtype == np.uint8
  assert batch["observations"]["state[:3]"].dtype == np.float32
  assert batch["actions"].shape == (6, 8, 2)
  normalizer = Normalizer.fit(shown)
  # The images tell which windows they are: what is observed belongs together.
  steps = batch["observations"]["image"][:, :, 0, 0, 0]
  np.testing.assert_array_equal(
    batch["observations"]["state[:3]"],
    normalizer.normalize("state[:3]", shown.observations["state[:3]"][steps]),
  )
  np.testing.assert_array_equal(
    batch["actions"][:, :2],
    normalizer.normalize("actions", shown.actions[steps]),
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


def test_a_batch_may_span_epochs():
  running = feed(batch_size=50)
  count = len(running.windows)
  rows = next(running)["actions"].reshape(50, -1)
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
    same(next(restored), next(running))


def test_other_demonstrations_do_not_go_on():
  state = feed().state()
  shown = demonstrations()
  shown.actions[4, 1] += 1_000
  with pytest.raises(
    DataError, match="began with other demonstrations: 'actions' was in"
  ):
    feed(shown).restore(state)
  fewer = Demonstrations(
    {"state[:3]": shown.observations["state[:3]"][:, :2]},
    shown.actions,
    shown.ends,
  )
  for call in (feed(fewer).restore, feed(fewer).abstract):
    with pytest.raises(DataError, match="began with other demonstrations"):
      call(state)
