"""The point and the disc."""

import numpy as np
import pytest

from drift_jax.tasks.policy import robots
from drift_jax.tasks.policy.robots.obstacle import touches


def go(*actions, seed=0, **options):
  """The last step of an episode, and the start."""
  environment = robots.make("obstacle", **options)
  start = environment.reset(seed)["state"]
  step = None
  for action in actions:
    step = environment.step(np.array(action, np.float32))
  return start, step


def around(side):
  """Actions up or down, along and back: by the far corners of a square."""
  up = [(0, side * 0.2)] * 3
  return [*up, *[(0.2, 0)] * 10, *[(0, -side * 0.2)] * 3]


def test_segments_against_points_on_them():
  rng = np.random.default_rng(0)
  starts, ends = rng.uniform(-1, 1, (2, 300, 2))
  ends[:20] = starts[:20]  # No move at all.
  t = np.linspace(0, 1, 4001)[:, None]
  for start, end in zip(starts, ends, strict=True):
    closest = np.linalg.norm(start + t * (end - start), axis=1).min()
    if abs(closest - 0.4) > 1e-3:
      assert touches(start, end) is bool(closest < 0.4)


@pytest.mark.parametrize("side, mode", [(1, "above"), (-1, "below")])
def test_either_way_leads_to_the_goal(side, mode):
  _, step = go(*around(side))
  assert step.success and step.done and step.reward == 1 and step.mode == mode
  assert np.linalg.norm(step.observations["state"] - [1, 0]) <= 0.1 + 1e-6


def test_touching_is_the_end():
  _, step = go(*[(0.2, 0)] * 3)
  assert step.done and not step.success and step.reward == 0
  # Steps that would jump over the edge of the disc touch it too.
  start = np.array([-0.35, 0.35])
  assert np.linalg.norm(start) > 0.4 and touches(start, start + [0.2, 0.0])
