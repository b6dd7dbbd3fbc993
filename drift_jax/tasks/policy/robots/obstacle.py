"""A point that must pass a disc on either side: two ways, equally good.

Nothing but NumPy and Pillow. The mean of both ways leads into the disc, so a
policy that averages fails.
"""

import numpy as np
from PIL import Image, ImageDraw

from drift_jax.tasks.policy.robots.interface import (
  Environment,
  Observations,
  Step,
)

START = np.array([-1.0, 0.0])
GOAL = np.array([1.0, 0.0])
RADIUS = 0.4
REACHED = 0.1
# Standard deviation of the start.
_SPREAD = 0.05
_SIZE = 128
# Half of the side of the square that is drawn.
_EXTENT = 1.3


def touches(start: np.ndarray, end: np.ndarray) -> bool:
  """Whether the segment between two points [2] comes within the disc.

  The distance of the origin to start + t (end - start) is smallest at
  t = -start . (end - start) / |end - start|^2, clipped to [0, 1].
  """
  move = end - start
  length = move @ move
  t = np.clip(-(start @ move) / length, 0, 1) if length else 0.0
  return bool(np.linalg.norm(start + t * move) <= RADIUS)


class Obstacle(Environment):
  """From about (-1, 0) to within 0.1 of (1, 0) without touching the disc of
  radius 0.4 at the origin.

  Observations: 'state' [2], the position. Actions: [2], a displacement within
  [-0.2, 0.2]. Touching the disc, on the way of a step too, is the end. The mode
  is 'above' or 'below', the sign of y at the first crossing of x = 0.
  """

  name = "obstacle"
  action_low = np.full(2, -0.2, np.float32)
  action_high = np.full(2, 0.2, np.float32)
  max_steps = 40

  def _start(self, seed: int) -> Observations:
    noise = np.random.default_rng(seed).normal(0, _SPREAD, 2)
    self._trail = [START + noise]
    self._mode = ""
    return {"state": self._trail[-1].astype(np.float32)}

  def _advance(self, action: np.ndarray) -> Step:
    start = self._trail[-1]
    end = start + action
    self._trail.append(end)
    if not self._mode and start[0] < 0 <= end[0]:
      t = -start[0] / (end[0] - start[0])
      y = start[1] + t * (end[1] - start[1])
      self._mode = "above" if y > 0 else "below"
    failed = touches(start, end)
    success = not failed and bool(np.linalg.norm(end - GOAL) <= REACHED)
    seen = {"state": end.astype(np.float32)}
    return Step(seen, float(success), success, failed, self._mode)

  def render(self) -> np.ndarray:
    """The disc, the goal, the point and its trail; uint8 [128, 128, 3]."""
    # Drawn larger: Pillow's circles have hard edges.
    scale = 4 * _SIZE / (2 * _EXTENT)
    image = Image.new("RGB", (4 * _SIZE, 4 * _SIZE), "white")
    draw = ImageDraw.Draw(image)

    def pixel(point: np.ndarray) -> tuple[float, float]:
      return (point[0] + _EXTENT) * scale, (_EXTENT - point[1]) * scale

    def disc(centre: np.ndarray, radius: float, color: str) -> None:
      draw.circle(pixel(centre), radius * scale, fill=color)

    disc(GOAL, REACHED, "#86c98f")
    disc(np.zeros(2), RADIUS, "#8a8f98")
    draw.line([pixel(point) for point in self._trail], "#9db8e8", 12)
    disc(self._trail[-1], 0.05, "#1f5fd0")
    small = image.resize((_SIZE, _SIZE), Image.Resampling.BOX)
    return np.asarray(small).copy()

  def close(self) -> None:
    """Nothing is held."""
