"""What all environments do alike."""

import numpy as np
import pytest

from drift_jax.tasks.policy import robots
from drift_jax.tasks.policy.robots.interface import check_action, parse

LOW = np.array([-1, 0], np.float32)
HIGH = np.array([1, 512], np.float32)


def test_names_of_observations():
  assert parse("state") == ("state", None)
  assert parse("state[:2]") == ("state", 2)
  for name in ("", "state[2]", "state[:0]", "state[:]", "state[:-1]", "a[:1]b"):
    with pytest.raises(robots.RobotError, match=r"write NAME, or NAME\[:K\]"):
      parse(name)


def test_select_keeps_names_and_takes_the_first_values():
  observations = {"state": np.arange(12.0).reshape(3, 4), "other": np.ones(3)}
  chosen = robots.select(observations, ["state[:2]", "other"])
  assert list(chosen) == ["state[:2]", "other"]
  np.testing.assert_array_equal(chosen["state[:2]"], [[0, 1], [4, 5], [8, 9]])
  assert chosen["other"] is observations["other"]


def test_select_says_what_there_is():
  observations = {"state": np.zeros(5)}
  with pytest.raises(robots.RobotError, match="'img': valid .*'state'"):
    robots.select(observations, ["img"])
  with pytest.raises(robots.RobotError, match="'state' has 5 values"):
    robots.select(observations, ["state[:6]"])


def test_actions_within_bounds_stay():
  action = np.array([0.25, 300], np.float32)
  np.testing.assert_array_equal(check_action(action, LOW, HIGH, "x"), action)


def test_rounding_is_cut_off():
  action = check_action(np.array([1 + 1e-6, -1e-4]), LOW, HIGH, "x")
  np.testing.assert_array_equal(action, [1, 0])
  assert action.dtype == np.float32


@pytest.mark.parametrize(
  "action, message",
  [
    ([0.0], r"x: an action of shape \(1,\), want \(2,\)"),
    ([[0.0, 0.0]], r"shape \(1, 2\)"),
    ([np.nan, 0], r"component 0 of the action is nan.*\[-1, 1\]"),
    ([0, np.inf], r"component 1 of the action is inf.*\[0, 512\]"),
    ([-1.001, 0], r"component 0 of the action is -1.001"),
    ([0, 512.1], r"component 1 of the action is 512.1"),
  ],
)
def test_other_actions_are_refused(action, message):
  with pytest.raises(robots.RobotError, match=message):
    check_action(np.array(action), LOW, HIGH, "x")
