"""Episodes one behind the other."""

import numpy as np
import pytest

from drift_jax.data.errors import DataError
from drift_jax.tasks.policy.demonstrations import Demonstrations


def make(observations=None, actions=None, ends=(2, 3, 7)):
  if observations is None:
    observations = {
      "state": np.arange(21, dtype=np.float32).reshape(7, 3),
      "image": np.zeros((7, 4, 5, 3), np.uint8),
    }
  if actions is None:
    actions = np.arange(14, dtype=np.float32).reshape(7, 2)
  return Demonstrations(observations, actions, np.array(ends, np.int64))


def with_value(value):
  actions = np.zeros((7, 2), np.float32)
  actions[4, 1] = value
  return actions


def test_episodes_cover_the_steps():
  shown = make()
  assert len(shown) == 3
  assert list(shown.episodes()) == [slice(0, 2), slice(2, 3), slice(3, 7)]


def test_the_first_are_cut_off():
  first = make().first(2)
  assert len(first) == 2 and len(first.actions) == 3
  for name, values in make().observations.items():
    np.testing.assert_array_equal(first.observations[name], values[:3])
  np.testing.assert_array_equal(make().first(3).actions, make().actions)
  for count in (0, 4):
    with pytest.raises(DataError, match=f"{count} episodes .* there are 3"):
      make().first(count)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"observations": {"a": np.zeros((6, 1), np.float32)}}, "'a' has 6 .* 7:"),
    (
      {"observations": {"a": np.zeros((7, 1))}},
      r"'a' is float64 \(7, 1\): want",
    ),
    (
      {"observations": {"a": np.zeros(7, np.float32)}},
      r"'a' is float32 \(7,\)",
    ),
    (
      {"observations": {"a": np.zeros((7, 4, 4, 3), np.float32)}},
      r"'a' is float32 .* or uint8 images \[S, H, W, 3\]",
    ),
    (
      {"actions": np.zeros((7, 4, 4, 3), np.uint8)},
      r"'actions' is uint8 .*: want float32 vectors \[S, D\]$",
    ),
    ({"actions": with_value(np.nan)}, "'actions': step 4 has nan in column 1"),
    ({"actions": with_value(-np.inf)}, "step 4 has -inf in column 1"),
    ({"ends": ()}, "must grow"),
    ({"ends": (0, 7)}, r"\[0, 7\] must grow"),
    ({"ends": (3, 3, 7)}, "must grow"),
    ({"ends": (2, 6)}, "unfinished .* ends at step 6, but there are 7"),
    ({"ends": (2, 9)}, "unfinished .* ends at step 9, but there are 7"),
  ],
)
def test_what_is_no_demonstration(changes, message):
  with pytest.raises(DataError, match=message):
    make(**changes)
