"""The Fetch arm. Nothing is drawn here: that needs OpenGL."""

import numpy as np
import pytest

from drift_jax.tasks.policy import robots


@pytest.fixture
def push():
  environment = robots.make("fetch_push")
  yield environment
  environment.close()


def test_the_state_is_the_observation_and_the_goal(push):
  state = push.reset(2)["state"]
  thing, goal = state[3:6], state[-3:]
  np.testing.assert_allclose(state[6:9], thing - state[:3], atol=1e-6)
  # On the table, like the object.
  assert goal[2] == pytest.approx(thing[2], abs=1e-3)
  np.testing.assert_allclose(push._simulator.goal, goal, rtol=1e-6)
  # Actions move the gripper.
  for _ in range(3):
    step = push.step(np.array([0, 1, 0, 0], np.float32))
  moved = step.observations["state"][:3] - state[:3]
  assert 0.05 < moved[1] < 0.15 and abs(moved[0]) < 0.02


@pytest.mark.parametrize("stop", [True, False])
def test_success_and_reward(stop):
  environment = robots.make("fetch_reach", stop_at_success=stop)
  state = environment.reset(0)["state"]
  rewards = []
  for number in range(20):
    goal = state[-3:]
    # There, and then away.
    move = (goal - state[:3]) / 0.05 if number < 10 else [0, 1, 1]
    step = environment.step(np.append(np.clip(move, -1, 1), 0))
    state = step.observations["state"]
    near = np.linalg.norm(state[:3] - goal) < 0.05
    rewards.append(step.reward)
    assert step.reward == float(near)
    # What was reached stays reached.
    assert step.success == any(rewards)
    assert step.done == (stop and step.success)
    if step.done:
      break
  assert stop or (rewards[9] == 1 and rewards[-1] == 0)
  assert step.success
  environment.close()
