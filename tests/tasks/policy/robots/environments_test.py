"""Environments by name, and what is the same in all of them."""

import numpy as np
import pytest

from drift_jax.tasks.policy import robots

STATES = {
  "obstacle": 2,
  "fetch_reach": 13,
  "fetch_push": 28,
  "fetch_pick_and_place": 28,
  "pusht": 5,
}
EVERY = pytest.mark.parametrize("name", robots.ENVIRONMENTS)


@pytest.fixture
def environment(name):
  made = robots.make(name)
  yield made
  made.close()


def states(environment, seed, count=10):
  """[1 + count, D] of an episode of random actions."""
  low, high = environment.action_low, environment.action_high
  draws = np.random.default_rng(0).uniform(size=(count, len(low)))
  seen = [environment.reset(seed)["state"]]
  first = seen[0].copy()
  for action in (low + draws * (high - low)).astype(np.float32):
    step = environment.step(action)
    seen.append(step.observations["state"])
    if step.done:
      break
  # Observations are not overwritten.
  np.testing.assert_array_equal(seen[0], first)
  return np.stack(seen)


@EVERY
def test_episodes(name, environment):
  assert environment.name == name
  assert environment.action_low.dtype == environment.action_high.dtype
  assert environment.action_low.dtype == np.float32
  first = states(environment, 3)
  assert first.shape[1] == STATES[name] and first.dtype == np.float32
  assert not np.array_equal(first[0], first[-1])
  # Neither what was before nor the object matters, only the seed.
  assert not np.array_equal(states(environment, 4)[0], first[0])
  np.testing.assert_array_equal(states(environment, 3), first)
  fresh = robots.make(name, observations=["state[:2]", "state"])
  np.testing.assert_array_equal(states(fresh, 3), first)
  observations = fresh.reset(3)
  assert list(observations) == ["state[:2]", "state"]
  np.testing.assert_array_equal(observations["state[:2]"], first[0, :2])
  fresh.close()


@EVERY
def test_episodes_have_an_end(name, environment):
  with pytest.raises(robots.RobotError, match=f"{name} has no episode: reset"):
    environment.step(environment.action_low)
  environment.reset(0)
  # What solves no task and touches nothing.
  still = (environment.action_low + environment.action_high) / 2
  if name == "pusht":
    still = environment.reset(0)["state"][:2]
  steps = []
  while not steps or not steps[-1].done:
    steps.append(environment.step(still))
    assert not steps[-1].success and 0 <= steps[-1].reward < 1
  assert len(steps) == environment.max_steps
  with pytest.raises(robots.RobotError, match=f"{name} is done: reset"):
    environment.step(still)


@EVERY
def test_what_is_refused(name, environment):
  with pytest.raises(robots.RobotError, match="seed -1"):
    environment.reset(-1)
  for names in (["depth"], ["state[2:]"], ["state[:0]"], []):
    with pytest.raises(robots.RobotError, match=r"\[.*\]: valid .*'state'"):
      robots.make(name, observations=names)
  short = robots.make(name, observations=[f"state[:{STATES[name] + 1}]"])
  with pytest.raises(robots.RobotError, match=f"has {STATES[name]} values"):
    short.reset(0)
  short.close()


@pytest.mark.parametrize(
  ("action", "message"),
  [
    ([0.0], r"obstacle: an action of shape \(1,\), want \(2,\)"),
    ([np.nan, 0], r"component 0 of the action is nan.*\[-0.2, 0.2\]"),
    ([-0.2001, 0], "component 0 of the action is -0.2001"),
  ],
)
def test_actions_have_bounds(action, message):
  environment = robots.make("obstacle")
  start = environment.reset(0)["state"]
  with pytest.raises(robots.RobotError, match=message):
    environment.step(np.array(action))
  # What rounding added is cut off.
  step = environment.step(np.array([-0.2 - 1e-6, 0.1]))
  np.testing.assert_allclose(
    step.observations["state"], start + np.float32([-0.2, 0.1]), rtol=1e-7
  )
