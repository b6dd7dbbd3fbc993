"""The Fetch arm. Nothing is drawn here: that needs OpenGL."""

import os
import sys
import types

import numpy as np
import pytest

from drift_jax.tasks.policy import robots
from drift_jax.tasks.policy.robots import fetch


@pytest.fixture
def push():
  environment = robots.make("fetch_push")
  yield environment
  environment.close()


def test_the_state_is_the_observation_and_the_goal(push):
  state = push.reset(2)["state"]
  gripper, thing, relative, goal = (
    state[:3],
    state[3:6],
    state[6:9],
    state[-3:],
  )
  np.testing.assert_allclose(relative, thing - gripper, atol=1e-6)
  # On the table, like the object.
  assert goal[2] == pytest.approx(thing[2], abs=1e-3)
  np.testing.assert_allclose(push._simulator.goal, goal, rtol=1e-6)


def test_actions_move_the_gripper(push):
  before = push.reset(2)["state"]
  for _ in range(3):
    step = push.step(np.array([0, 1, 0, 0], np.float32))
  moved = step.observations["state"][:3] - before[:3]
  assert 0.05 < moved[1] < 0.15 and abs(moved[0]) < 0.02


def test_success_and_reward():
  environment = robots.make("fetch_reach", stop_at_success=False)
  state = environment.reset(0)["state"]
  rewards = []
  for number in range(20):
    goal = state[-3:]
    # There, and then away.
    move = (goal - state[:3]) / 0.05 if number < 10 else [0, 1, 1]
    step = environment.step(np.append(np.clip(move, -1, 1), 0))
    state = step.observations["state"]
    near = np.linalg.norm(state[:3] - goal) < 0.05
    assert step.reward == float(near) and not step.done
    rewards.append(step.reward)
    # What was reached stays reached.
    assert step.success == any(rewards)
  assert rewards[9] == 1 and rewards[-1] == 0
  environment.close()


def test_success_ends_an_episode():
  environment = robots.make("fetch_reach")
  state = environment.reset(0)["state"]
  for _ in range(10):
    move = np.clip((state[-3:] - state[:3]) / 0.05, -1, 1)
    step = environment.step(np.append(move, 0))
    state = step.observations["state"]
    assert step.done == step.success == bool(step.reward)
    if step.done:
      break
  assert step.done
  environment.close()


def test_what_is_said_where_nothing_can_be_drawn(push, monkeypatch):
  push.reset(0)
  monkeypatch.setitem(os.environ, "MUJOCO_GL", "vulkan")
  with pytest.raises(robots.RobotError, match="=vulkan: valid .*'osmesa'"):
    push.render()
  monkeypatch.setitem(os.environ, "MUJOCO_GL", "osmesa")
  monkeypatch.setitem(sys.modules, "mujoco.osmesa", None)
  with pytest.raises(robots.RobotError, match="=osmesa: .*libosmesa6") as info:
    push.render()
  assert "record no episodes" in str(info.value)


def test_egl_is_chosen_only_when_drawing(monkeypatch):
  monkeypatch.delenv("MUJOCO_GL", raising=False)
  environment = robots.make("fetch_reach")
  environment.reset(0)
  environment.step(np.zeros(4))
  assert "MUJOCO_GL" not in os.environ
  drawn = []
  contexts = types.SimpleNamespace(
    GLContext=lambda *_: types.SimpleNamespace(free=lambda: None)
  )
  monkeypatch.setitem(sys.modules, "mujoco.egl", contexts)
  monkeypatch.setattr(
    environment._simulator,
    "render",
    lambda: drawn.append(os.environ["MUJOCO_GL"]) or np.zeros((2, 2, 3), "u1"),
  )
  environment.render()
  assert drawn == ["egl"]
  environment.close()


def test_another_environment_may_have_drawn_last(push, monkeypatch):
  calls = []

  class Viewer:
    def make_context_current(self):
      calls.append("current")

  class Renderer:
    viewer = Viewer()

  monkeypatch.setattr(push._simulator, "mujoco_renderer", Renderer())
  monkeypatch.setattr(
    push._simulator,
    "render",
    lambda: calls.append("draw") or np.zeros((2, 2, 3), np.uint8),
  )
  push.render()
  assert calls == ["current", "draw"]
  monkeypatch.undo()


def test_all_of_them_are_named():
  names = [name for name in robots.ENVIRONMENTS if name.startswith("fetch")]
  assert names == list(fetch._CLASSES)
