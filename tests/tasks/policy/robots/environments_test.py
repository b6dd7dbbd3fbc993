"""Environments by name, and what is the same in all of them."""

import numpy as np
import pytest

from drift_jax.tasks.policy import robots
from tests import process

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


def actions(environment, count, seed=0):
  """Random ones [count, A]."""
  low, high = environment.action_low, environment.action_high
  draws = np.random.default_rng(seed).uniform(size=(count, len(low)))
  return (low + draws * (high - low)).astype(np.float32)


def states(environment, seed, taken):
  """[1 + count, D] of an episode."""
  seen = [environment.reset(seed)["state"]]
  for action in taken:
    step = environment.step(action)
    seen.append(step.observations["state"])
    if step.done:
      break
  return np.stack(seen)


def test_all_are_tested():
  assert list(STATES) == list(robots.ENVIRONMENTS)


@EVERY
def test_episodes(name, environment):
  assert environment.name == name
  assert environment.action_low.dtype == environment.action_high.dtype
  assert environment.action_low.dtype == np.float32
  taken = actions(environment, 10)
  first = states(environment, 3, taken)
  assert first.shape[1] == STATES[name] and first.dtype == np.float32
  assert not np.array_equal(first[0], first[-1])
  # Neither what was before nor the object matters, only the seed.
  other = states(environment, 4, taken)
  assert not np.array_equal(other[0], first[0])
  np.testing.assert_array_equal(states(environment, 3, taken), first)
  fresh = robots.make(name)
  np.testing.assert_array_equal(states(fresh, 3, taken), first)
  fresh.close()


@EVERY
def test_observations_are_not_overwritten(name, environment):
  first = environment.reset(0)["state"]
  kept = first.copy()
  for action in actions(environment, 3):
    environment.step(action)
  np.testing.assert_array_equal(first, kept)


@EVERY
def test_episodes_have_an_end(name, environment):
  with pytest.raises(robots.RobotError, match=f"{name} has no episode: reset"):
    environment.step(environment.action_low)
  environment.reset(0)
  # What solves no task and touches nothing.
  still = (environment.action_low + environment.action_high) / 2
  if name == "pusht":
    still = environment.reset(0)["state"][:2]
  steps = 0
  done = False
  while not done:
    step = environment.step(still)
    done = step.done
    steps += 1
    assert not step.success and 0 <= step.reward < 1
  assert steps == environment.max_steps
  with pytest.raises(robots.RobotError, match=f"{name} is done: reset"):
    environment.step(still)


@EVERY
def test_what_is_refused(name, environment):
  with pytest.raises(robots.RobotError, match="seed -1"):
    environment.reset(-1)
  environment.reset(0)
  with pytest.raises(robots.RobotError, match="component 0 .* must be within"):
    environment.step(environment.action_high * 1.5)
  with pytest.raises(robots.RobotError, match="'depth': valid .*'state'"):
    robots.make(name, observations=["depth"])
  with pytest.raises(robots.RobotError, match="no observations; valid"):
    robots.make(name, observations=[])
  too_many = STATES[name] + 1
  short = robots.make(name, observations=[f"state[:{too_many}]"])
  with pytest.raises(robots.RobotError, match=f"has {STATES[name]} values"):
    short.reset(0)
  short.close()


@EVERY
def test_parts_of_the_state(name, environment):
  part = robots.make(name, observations=["state[:2]"])
  observations = part.reset(5)
  assert list(observations) == ["state[:2]"]
  np.testing.assert_array_equal(
    observations["state[:2]"], environment.reset(5)["state"][:2]
  )
  part.close()


def test_unknown_names():
  with pytest.raises(robots.RobotError, match="'fetch': valid .*'fetch_push'"):
    robots.make("fetch")


MISSING = """
import sys

EXTRAS = "gymnasium gymnasium_robotics mujoco gym_pusht h5py".split()
sys.modules.update(dict.fromkeys(EXTRAS))

from drift_jax.tasks.policy import robots

def collect(name):
  robots.collect(name, episodes=1, seed=0)

environment = robots.make("obstacle")
environment.reset(0)
data, _ = robots.collect("obstacle", episodes=2, seed=0)
assert len(data) == 2
for name in ("fetch_reach", "fetch_push", "fetch_pick_and_place", "pusht"):
  for call in (robots.make, collect):
    try:
      call(name)
    except robots.ExtraError as error:
      print(error)
sys.modules.pop("gymnasium")
try:
  robots.make("fetch_push")
except robots.ExtraError as error:
  print(error)
"""


@pytest.mark.system
def test_missing_packages():
  result = process.call("-W", "error", "-c", MISSING)
  assert result.returncode == 0, result.stderr
  *lines, last = result.stdout.splitlines()
  assert len(lines) == 8
  for line in lines:
    assert "needs the package 'gymnasium': pip install -r" in line
  assert "'fetch_push' needs the package 'mujoco'" in last
  assert "requirements-robots.txt" in last
