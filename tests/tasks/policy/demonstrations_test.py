"""Episodes one after the other."""

import numpy as np
import pytest

from drift_jax.system.errors import DataError
from drift_jax.tasks.policy.demonstrations import Demonstrations

STATE = np.arange(21, dtype=np.float32).reshape(7, 3)
ACTIONS = np.arange(14, dtype=np.float32).reshape(7, 2)


def make(observations=None, actions=ACTIONS, ends=(2, 3, 7)):
  return Demonstrations(
    observations or {"state": STATE, "image": np.zeros((7, 4, 5, 3), np.uint8)},
    actions,
    np.array(ends, np.int64),
  )


def with_value(value):
  actions = ACTIONS.copy()
  actions[4, 1] = value
  return actions


def test_episodes_cover_the_steps():
  shown = make()
  assert len(shown) == 3
  parts = list(shown.episodes())
  assert parts == [slice(0, 2), slice(2, 3), slice(3, 7)]
  single = [
    Demonstrations(
      {"state": STATE[x]}, ACTIONS[x], np.array([x.stop - x.start])
    )
    for x in parts
  ]
  joined = Demonstrations.joined(single)
  np.testing.assert_array_equal(joined.ends, shown.ends)
  np.testing.assert_array_equal(joined.actions, ACTIONS)
  np.testing.assert_array_equal(joined.observations["state"], STATE)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"observations": {"a": STATE[:6]}}, "'a' has 6 .* 7"),
    ({"observations": {"a": np.zeros((7, 1))}}, r"'a' is float64 \(7, 1\)"),
    ({"actions": with_value(np.nan)}, "'actions': step 4 has nan in column 1"),
    ({"ends": (0, 7)}, r"\[0, 7\] must grow"),
    ({"ends": (2, 6)}, "unfinished .* ends at step 6, but there are 7"),
  ],
)
def test_what_is_no_demonstration(changes, message):
  with pytest.raises(DataError, match=message):
    make(**changes)
