"""The Fetch arm of gymnasium-robotics, simulated by MuJoCo: reach, push, pick
and place."""

import importlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from drift_jax.tasks.policy.robots.errors import RobotError, import_extras
from drift_jax.tasks.policy.robots.interface import Outcome, Simulation

_SIZE = 192
# Nearer than gymnasium-robotics' own: pictures are small. Metres and degrees.
_CAMERA = {
  "distance": 1.6,
  "azimuth": 132.0,
  "elevation": -20.0,
  "lookat": np.array([1.3, 0.75, 0.5]),
}
# MuJoCo's modules that make an OpenGL context, and values of MUJOCO_GL.
_BACKENDS = ("egl", "osmesa", "glfw")
_FOLDER = "gymnasium_robotics.envs.fetch"
# Of each name: module and class. They are made directly: gymnasium.make would
# wrap them into checks that are ours too.
_CLASSES = {
  "fetch_reach": ("reach", "MujocoFetchReachEnv"),
  "fetch_push": ("push", "MujocoFetchPushEnv"),
  "fetch_pick_and_place": ("pick_and_place", "MujocoFetchPickAndPlaceEnv"),
}


class Fetch(Simulation):
  """FetchReach-v4, FetchPush-v4 or FetchPickAndPlace-v4.

  Observations: 'state', gymnasium-robotics' observation and behind it the goal;
  metres. The gripper's position is in front.

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
    self,
    name: str,
    observations: Sequence[str] = ("state",),
    *,
    stop_at_success: bool = True,
  ):
    """
    Args:
      name: 'fetch_reach', 'fetch_push' or 'fetch_pick_and_place'.
      observations: see Simulation.
      stop_at_success: see Simulation.

    Raises:
      RobotError: unknown observations.
      ExtraError: a missing package.
    """
    self.name = name
    super().__init__(observations, stop_at_success=stop_at_success)
    module, kind = _CLASSES[name]
    # gymnasium-robotics is imported without mujoco too, and fails later.
    import_extras(name, "gymnasium", "mujoco", f"{_FOLDER}.{module}")
    maker = getattr(importlib.import_module(f"{_FOLDER}.{module}"), kind)
    self._simulator: Any = maker(
      render_mode="rgb_array",
      width=_SIZE,
      height=_SIZE,
      default_camera_config=_CAMERA,
    )
    self._state = np.zeros(0, np.float32)

  def _keep(self, values: dict[str, np.ndarray]) -> None:
    """Notes the observation of a moment."""
    self._state = np.concatenate(
      [values["observation"], values["desired_goal"]]
    ).astype(np.float32)

  def _start(self, seed: int) -> None:
    self._keep(self._simulator.reset(seed=seed)[0])

  def _advance(self, action: np.ndarray) -> Outcome:
    values, _, _, _, info = self._simulator.step(action)
    self._keep(values)
    success = bool(info["is_success"])
    return Outcome(float(success), success)

  def _observe(self, source: str) -> np.ndarray:
    return self._state.copy()

  def render(self) -> np.ndarray:
    """The scene, uint8 [192, 192, 3]; always call it from the same thread.

    Raises:
      RobotError: OpenGL can't be used on this machine.
    """
    # Read when the first scene is drawn. Only EGL does without a screen and is
    # common.
    backend = os.environ.setdefault("MUJOCO_GL", "egl")
    if backend not in _BACKENDS:
      raise RobotError(
        f"{self.name} can't be drawn with MUJOCO_GL={backend}: valid options "
        f"are {list(_BACKENDS)}"
      )
    renderer = self._simulator.mujoco_renderer
    try:
      if renderer.viewer is None:
        # Where this fails, gymnasium would leave a viewer behind that is half
        # made, and can't be deleted without a complaint.
        module = importlib.import_module(f"mujoco.{backend}")
        module.GLContext(_SIZE, _SIZE).free()
      else:
        # Another environment may have drawn last.
        renderer.viewer.make_context_current()
      image = self._simulator.render()
    # MuJoCo, PyOpenGL and ctypes have no exception in common but Exception.
    except Exception as error:
      raise RobotError(
        f"{self.name} can't be drawn with MUJOCO_GL={backend}: "
        f"{type(error).__name__}: {error}. Install its library (libegl1, "
        f"libosmesa6 or libglfw3), set MUJOCO_GL to another of "
        f"{list(_BACKENDS)}, or record no episodes: nothing else draws"
      ) from error
    return np.ascontiguousarray(image)

  def close(self) -> None:
    """Frees the simulator and what draws it."""
    self._simulator.close()
