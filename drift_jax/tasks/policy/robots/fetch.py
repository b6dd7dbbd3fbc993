"""The Fetch arm of gymnasium-robotics, simulated by MuJoCo: reach, push, pick
and place."""

import importlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from drift_jax.tasks.policy.robots import interface

_SIZE = 192
# Nearer than gymnasium-robotics' own: pictures are small. Metres and degrees.
_CAMERA = {
  "distance": 1.6,
  "azimuth": 132.0,
  "elevation": -20.0,
  "lookat": np.array([1.3, 0.75, 0.5]),
}


class Fetch(interface.Environment):
  """FetchReach-v4, FetchPush-v4 or FetchPickAndPlace-v4.

  Observations: 'state', gymnasium-robotics' observation and then the goal, in
  metres. The gripper's position comes first.

    fetch_reach           [13]: gripper 3, fingers 2, velocities 5, goal 3
    others                [28]: gripper 3, object 3, object - gripper 3,
                          fingers 2, angles 3, velocities 11, goal 3

  Actions: [4] within [-1, 1], a displacement of the gripper in units of 5 cm
  and what its fingers do: -1 closes, 1 opens them. The reward is 1 while the
  gripper, or the object, is within 5 cm of the goal.
  """

  action_low = np.full(4, -1, np.float32)
  action_high = np.full(4, 1, np.float32)
  max_steps = 50

  def __init__(
    self, name: str, observations: Sequence[str], stop_at_success: bool
  ):
    """See Environment.

    Args:
      name: 'fetch_reach', 'fetch_push' or 'fetch_pick_and_place'.
      observations, stop_at_success: see Environment.

    Raises:
      ExtraError: a missing package.
    """
    self.name = name
    super().__init__(observations, stop_at_success)
    # gymnasium-robotics is imported without mujoco too, and fails later.
    module = interface.import_extras(
      name,
      "gymnasium",
      "mujoco",
      f"gymnasium_robotics.envs.fetch.{name.removeprefix('fetch_')}",
    )
    # Not by gymnasium.make, which would wrap it into checks that are ours too.
    make = getattr(module, f"Mujoco{name.title().replace('_', '')}Env")
    self._simulator: Any = make(
      render_mode="rgb_array",
      width=_SIZE,
      height=_SIZE,
      default_camera_config=_CAMERA,
    )

  def _observe(self, values: dict[str, np.ndarray]) -> interface.Observations:
    state = np.concatenate([values["observation"], values["desired_goal"]])
    return {"state": state.astype(np.float32)}

  def _start(self, seed: int) -> interface.Observations:
    return self._observe(self._simulator.reset(seed=seed)[0])

  def _advance(self, action: np.ndarray) -> interface.Step:
    values, _, _, _, info = self._simulator.step(action)
    success = bool(info["is_success"])
    return interface.Step(self._observe(values), float(success), success, False)

  def render(self) -> np.ndarray:
    """The scene, uint8 [192, 192, 3]; always call it from the same thread.

    Raises:
      RobotError: OpenGL can't be used on this machine.
    """
    # MuJoCo reads it when the first scene is drawn. EGL is common and needs no
    # screen.
    backend = os.environ.setdefault("MUJOCO_GL", "egl")
    renderer = self._simulator.mujoco_renderer
    try:
      if renderer.viewer is None:
        # If this failed inside gymnasium, a half-made viewer would stay that
        # complains when it is deleted.
        module = importlib.import_module(f"mujoco.{backend}")
        module.GLContext(_SIZE, _SIZE).free()
      else:
        # Another environment may have drawn last.
        renderer.viewer.make_context_current()
      image = self._simulator.render()
    # MuJoCo, PyOpenGL and ctypes have no exception in common but Exception.
    except Exception as error:
      raise interface.RobotError(
        f"{self.name} can't be drawn with MUJOCO_GL={backend}: "
        f"{type(error).__name__}: {error}. Install its library (libegl1, "
        "libosmesa6 or libglfw3), set MUJOCO_GL to another of 'egl', 'osmesa' "
        "and 'glfw', or record no episodes (eval.videos=0)"
      ) from error
    return np.ascontiguousarray(image)

  def close(self) -> None:
    """Frees the simulator and what draws it."""
    self._simulator.close()
