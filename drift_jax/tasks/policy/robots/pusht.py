"""PushT: a T-shaped block that a round pusher moves onto its place."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from drift_jax.tasks.policy.robots import interface

_SIZE = 192


class PushT(interface.Environment):
  """gym_pusht/PushT-v0.

  Observations: 'state' [5]: x and y of the pusher, x and y of the block,
  within [0, 512], the block's angle within [0, 2 pi); 'img' uint8 [96, 96, 3],
  a picture of it. Actions: [2] within [0, 512], the pusher's next place.
  The reward is clip(coverage / 0.95, 0, 1) of the block's coverage of its
  place; beyond 0.95 the task is solved.
  """

  name = "pusht"
  action_low = np.zeros(2, np.float32)
  action_high = np.full(2, 512, np.float32)
  max_steps = 300
  sources = ("state", "img")

  def __init__(self, observations: Sequence[str], stop_at_success: bool):
    """See Environment; pictures are drawn only if 'img' is observed.

    Raises:
      ExtraError: a missing package.
    """
    super().__init__(observations, stop_at_success)
    # Pygame draws into memory, but wants a screen without these; and it greets.
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    module = interface.import_extras(self.name, "gymnasium", "gym_pusht.envs")
    pictures = "img" in self._wanted
    self._simulator: Any = module.PushTEnv(
      obs_type="pixels_agent_pos" if pictures else "state",
      render_mode="rgb_array",
      visualization_width=_SIZE,
      visualization_height=_SIZE,
    )

  def _observe(
    self, values: Any, info: dict[str, Any]
  ) -> interface.Observations:
    x, y, angle = info["block_pose"]
    state = [*info["pos_agent"], x, y, angle % (2 * np.pi)]
    observations = {"state": np.array(state, np.float32)}
    if "img" in self._wanted:
      observations["img"] = values["pixels"].copy()
    return observations

  def _start(self, seed: int) -> interface.Observations:
    return self._observe(*self._simulator.reset(seed=seed))

  def _advance(self, action: np.ndarray) -> interface.Step:
    values, reward, _, _, info = self._simulator.step(action)
    seen = self._observe(values, info)
    return interface.Step(seen, float(reward), bool(info["is_success"]), False)

  def render(self) -> np.ndarray:
    """The scene, uint8 [192, 192, 3]."""
    return self._simulator.render()

  def close(self) -> None:
    """Frees the simulator."""
    self._simulator.close()
