"""PushT."""

import numpy as np
import pytest

from drift_jax.tasks.policy import robots


@pytest.fixture
def environment():
  made = robots.make("pusht", observations=["state", "img", "state[:2]"])
  yield made
  made.close()


def test_observations(environment):
  observations = environment.reset(1)
  assert list(observations) == ["state", "img", "state[:2]"]
  state, picture = observations["state"], observations["img"]
  assert state.shape == (5,) and picture.shape == (96, 96, 3)
  assert picture.dtype == np.uint8 and np.ptp(picture) > 100
  np.testing.assert_array_equal(observations["state[:2]"], state[:2])
  # The pusher is blue, where the state says: x to the right, y downwards.
  column, row = (state[:2] * 96 / 512).astype(int)
  red, _, blue = picture[row, column].astype(int)
  assert blue > red + 50
  drawn = environment.render()
  assert drawn.shape == (192, 192, 3) and drawn.dtype == np.uint8


def test_the_pusher_goes_where_it_is_told(environment):
  environment.reset(1)
  target = np.array([60, 450], np.float32)
  for _ in range(15):
    step = environment.step(target)
  np.testing.assert_allclose(step.observations["state"][:2], target, atol=3)


def test_rewards_are_coverage(environment):
  environment.reset(1)
  simulator = environment._simulator
  for shift, least, most in ((0, 1, 1), (10, 0.5, 0.9), (300, 0, 0)):
    environment.reset(1)
    simulator.agent.position = (60, 450)
    simulator.block.angle = np.pi / 4
    simulator.block.position = (256, 256 - shift)
    step = environment.step(np.array([60, 450]))
    covered = simulator._get_coverage()
    assert step.reward == pytest.approx(np.clip(covered / 0.95, 0, 1))
    assert least <= step.reward <= most
    assert step.success == step.done == (shift == 0)
