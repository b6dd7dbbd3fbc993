"""Scripted experts, which see what a policy sees, and their demonstrations.

Each has several ways to its goal and takes one by chance: the data have more
than one mode, on purpose.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np

from drift_jax.tasks.policy.demonstrations import Demonstrations
from drift_jax.tasks.policy.robots.environments import make
from drift_jax.tasks.policy.robots.errors import RobotError
from drift_jax.tasks.policy.robots.interface import Environment, Observations
from drift_jax.tasks.policy.robots.obstacle import GOAL

# Steps of holding still behind success, see collect.
_HOLD = 12
# So many failures are forgiven where few episodes are asked for.
_MIN_FAILURES = 5


class Expert(Protocol):
  """Acts on observations, remembers what it is about to do."""

  def reset(self, rng: np.random.Generator) -> None:
    """Chooses the way of the next episode."""
    ...

  def act(
    self, observations: Observations, rng: np.random.Generator
  ) -> np.ndarray:
    """The action [A] float32 after {'state': [D]}."""
    ...


class ObstacleExpert:
  """Follows y = +-h cos(pi x / 2), the side by a fair coin."""

  _NOISE = 0.01
  _AHEAD = 0.1

  def reset(self, rng: np.random.Generator) -> None:
    side = rng.choice([-1.0, 1.0])
    self._height = side * rng.uniform(0.6, 0.85)

  def act(
    self, observations: Observations, rng: np.random.Generator
  ) -> np.ndarray:
    position = observations["state"].astype(np.float64)
    x = min(position[0] + self._AHEAD, GOAL[0])
    move = np.array([x, self._height * np.cos(np.pi * x / 2)]) - position
    move = move + rng.normal(0, self._NOISE, 2)
    return np.clip(move, -0.2, 0.2).astype(np.float32)


# A gripper's displacement per step, in metres, for an action of 1.
_UNIT = 0.05
# Of an action's components, which are within [-1, 1].
_FETCH_NOISE = 0.05


def _towards(
  offset: np.ndarray,
  fingers: float,
  rng: np.random.Generator,
  gain: float = 0.6,
) -> np.ndarray:
  """The action that goes a part of the offset [3], metres, plus noise."""
  move = gain * offset / _UNIT
  # As a whole, so that the direction stays.
  move = move / max(1.0, float(np.abs(move).max()))
  action = np.append(move, fingers)
  action[:3] += rng.normal(0, _FETCH_NOISE, 3)
  return np.clip(action, -1, 1).astype(np.float32)


class ReachExpert:
  """Goes straight, or by a point beside the way."""

  def reset(self, rng: np.random.Generator) -> None:
    self._detour = rng.uniform() < 0.5
    self._side = rng.normal(size=3)
    self._side *= rng.uniform(0.06, 0.1) / np.linalg.norm(self._side)
    self._point: np.ndarray | None = None

  def act(
    self, observations: Observations, rng: np.random.Generator
  ) -> np.ndarray:
    state = observations["state"].astype(np.float64)
    gripper, goal = state[:3], state[-3:]
    if self._detour:
      if self._point is None:
        self._point = (gripper + goal) / 2 + self._side
      if np.linalg.norm(self._point - gripper) > 0.03:
        return _towards(self._point - gripper, 0.0, rng, gain=0.5)
      self._detour = False
    return _towards(goal - gripper, 0.0, rng, gain=0.3)


class PickAndPlaceExpert:
  """Goes above the object, down, closes, and carries it: straight, by a high
  arc, or from one side."""

  _ABOVE = 0.08

  def reset(self, rng: np.random.Generator) -> None:
    self._way = ("straight", "high", "side")[rng.integers(3)]
    self._high = rng.uniform(0.1, 0.16)
    self._side = rng.choice([-1.0, 1.0]) * rng.uniform(0.06, 0.1)
    self._over = False
    self._closing = 0
    self._point: np.ndarray | None = None

  def act(
    self, observations: Observations, rng: np.random.Generator
  ) -> np.ndarray:
    state = observations["state"].astype(np.float64)
    gripper, thing, goal = state[:3], state[3:6], state[-3:]
    offset = thing - gripper
    if np.linalg.norm(offset) > 0.05:
      # Not there yet, or it slipped away.
      self._closing = 0
    flat = np.linalg.norm(offset[:2])
    if not self._closing:
      if flat > (0.03 if self._over else 0.015):
        self._over = False
        return _towards(offset + [0, 0, self._ABOVE], 1.0, rng, gain=0.8)
      self._over = True
      if np.linalg.norm(offset) > 0.015:
        return _towards(offset, 1.0, rng, gain=0.8)
    self._closing += 1
    if self._closing <= 3:
      return _towards(offset, -1.0, rng)
    if self._point is None:
      self._point = self._waypoint(thing, goal)
    if self._way != "straight":
      if np.linalg.norm(self._point - thing) > 0.04:
        return _towards(self._point - thing, -1.0, rng)
      self._way = "straight"
    return _towards(goal - thing, -1.0, rng)

  def _waypoint(self, thing: np.ndarray, goal: np.ndarray) -> np.ndarray:
    middle = (thing + goal) / 2
    if self._way == "high":
      middle[2] = max(thing[2], goal[2]) + self._high
      return middle
    along = (goal - thing)[:2]
    across = np.array([-along[1], along[0]])
    across /= max(float(np.linalg.norm(across)), 1e-6)
    middle[:2] += self._side * across
    middle[2] += 0.04
    return middle


def _round(
  offset: np.ndarray, target: np.ndarray, radius: float, side: float
) -> np.ndarray:
  """The next point [2] of the way round an object, from its centre.

  Args:
    offset: [2], where the pusher is, from the centre.
    target: [2], the direction of where it should be; of length 1.
    radius: of the circle on which it goes.
    side: 1 or -1, which way round where both will do.
  """
  angle = np.arctan2(offset[1], offset[0])
  left = np.arctan2(target[1], target[0]) - angle
  left = (left + np.pi) % (2 * np.pi) - np.pi
  if abs(left) < 0.6:
    return target * radius
  if abs(left) > 1.2:
    left = side * ((side * left) % (2 * np.pi))
  angle += np.clip(left, -0.7, 0.7)
  return radius * np.array([np.cos(angle), np.sin(angle)])


class PushExpert:
  """Goes round the object, on either side, to the point opposite of the goal,
  pushes, and goes round again where the object slipped away."""

  # Of the circle round the object, from its centre to the gripper's.
  _CIRCLE = 0.095

  def reset(self, rng: np.random.Generator) -> None:
    self._side = rng.choice([-1.0, 1.0])
    self._pushing = False

  def act(
    self, observations: Observations, rng: np.random.Generator
  ) -> np.ndarray:
    state = observations["state"].astype(np.float64)
    gripper, thing, goal = state[:3], state[3:6], state[-3:]
    way = (goal - thing)[:2]
    distance = float(np.linalg.norm(way))
    forward = way / max(distance, 1e-6)
    left = np.array([-forward[1], forward[0]])
    offset = (gripper - thing)[:2]
    # Of the gripper, from the object's point of view.
    behind = float(-offset @ forward)
    aside = float(offset @ left)
    limit = 0.025 if self._pushing else 0.012
    self._pushing = behind > 0.02 and abs(aside) < limit
    if self._pushing:
      # It has to stay behind the centre: the object turns away otherwise.
      move = forward * min(distance + 0.02, 0.06) - 1.5 * aside * left
    else:
      move = _round(offset, -forward, self._CIRCLE, self._side) - offset
    height = thing[2] - 0.005 - gripper[2]
    return _towards(np.append(move, height), 0.0, rng, gain=0.8)


class PushTExpert:
  """Crude: goes round the block to behind its centre, as seen from its place,
  and pushes; beside the centre where the block has to turn. Many episodes fail.
  """

  # The centre of mass, in the block's frame; where the block has to be.
  _CENTRE = np.array([0.0, 45.0])
  _PLACE = np.array([256.0, 256.0])
  _ANGLE = np.pi / 4
  _CIRCLE = 120.0
  _REACH = 25.0
  _NOISE = 2.0

  def reset(self, rng: np.random.Generator) -> None:
    self._side = rng.choice([-1.0, 1.0])
    self._pushing = False
    self._before: np.ndarray | None = None

  def act(
    self, observations: Observations, rng: np.random.Generator
  ) -> np.ndarray:
    state = observations["state"].astype(np.float64)
    pusher, angle = state[:2], state[4]
    if self._before is not None:
      if np.linalg.norm(pusher - self._before) < 4:
        # A wall is in the way.
        self._side = -self._side
    self._before = pusher
    centre = state[2:4] + _turn(self._CENTRE, angle)
    way = self._PLACE + _turn(self._CENTRE, self._ANGLE) - centre
    distance = float(np.linalg.norm(way))
    forward = way / max(distance, 1e-6)
    left = np.array([-forward[1], forward[0]])
    turn = (self._ANGLE - angle + np.pi) % (2 * np.pi) - np.pi
    # Pushed on the right of its centre, the block turns to the left.
    lever = float(np.clip(-40 * turn, -40, 40))
    offset = pusher - centre
    behind = float(-offset @ forward)
    aside = float(offset @ left) - lever
    self._pushing = behind > 0 and abs(aside) < (30 if self._pushing else 10)
    if self._pushing:
      move = forward * self._REACH - 0.5 * aside * left
    elif behind > 80 and abs(aside) < 60:
      move = -aside * left
    else:
      move = _round(offset, -forward, self._CIRCLE, self._side) - offset
    move *= min(1.0, self._REACH / max(float(np.linalg.norm(move)), 1e-6))
    target = pusher + move + rng.normal(0, self._NOISE, 2)
    return np.clip(target, 0, 512).astype(np.float32)


def _turn(point: np.ndarray, angle: float) -> np.ndarray:
  """A point [2] turned about the origin."""
  cos, sin = np.cos(angle), np.sin(angle)
  return np.array([[cos, -sin], [sin, cos]]) @ point


_EXPERTS: Mapping[str, Callable[[], Expert]] = {
  "obstacle": ObstacleExpert,
  "fetch_reach": ReachExpert,
  "fetch_push": PushExpert,
  "fetch_pick_and_place": PickAndPlaceExpert,
  "pusht": PushTExpert,
}


def make_expert(name: str) -> Expert:
  """The expert of an environment.

  Raises:
    RobotError: it has none.
  """
  if name not in _EXPERTS:
    raise RobotError(
      f"no expert for environment {name!r}: valid options are {list(_EXPERTS)}"
    )
  return _EXPERTS[name]()


def collect(
  name: str,
  *,
  episodes: int,
  seed: int,
  observations: Sequence[str] = ("state",),
  keep: Literal["successes", "all"] = "successes",
) -> tuple[Demonstrations, float]:
  """Demonstrations of an expert; the same for the same arguments.

  An episode goes on for 12 steps behind success, where there are as many: what
  holding still at the goal looks like.

  Args:
    name: of the environment.
    episodes: so many are kept.
    seed: of the starts and of the expert.
    observations: those to record, see make.
    keep: 'successes', or 'all' episodes.

  Returns:
    The demonstrations, and how many of the tries succeeded, as a fraction.

  Raises:
    RobotError: unknown names; no episodes; only successes are kept, but fewer
      than half of the tries succeed.
    ExtraError: a missing package.
  """
  if keep not in ("successes", "all"):
    raise RobotError(f"keep {keep!r}: valid options are 'successes' and 'all'")
  if episodes < 1 or seed < 0:
    raise RobotError(
      f"{episodes} episodes of seed {seed}: want at least 1, and at least 0"
    )
  expert = make_expert(name)
  environment = make(
    name,
    # The expert looks at all of the state, whatever is recorded.
    observations=tuple(dict.fromkeys(("state", *observations))),
    stop_at_success=False,
  )
  kept: list[_Recording] = []
  tries = successes = 0
  try:
    while len(kept) < episodes:
      recording = _record(environment, expert, (seed, tries))
      tries += 1
      successes += recording.success
      if recording.success or keep == "all":
        kept.append(recording)
      elif tries - successes > max(episodes, _MIN_FAILURES):
        raise RobotError(
          f"{name}: the expert succeeds in {successes} of {tries} tries, which "
          "is too seldom; keep='all' keeps failures too"
        )
  finally:
    environment.close()
  steps = [step for recording in kept for step in recording.observations]
  demonstrations = Demonstrations(
    {
      observation: np.stack([step[observation] for step in steps])
      for observation in observations
    },
    np.stack([action for recording in kept for action in recording.actions]),
    np.cumsum([len(recording.actions) for recording in kept], dtype=np.int64),
  )
  return demonstrations, successes / tries


class _Recording(NamedTuple):
  """An episode: what was seen, what was done then, and what came of it."""

  observations: list[Observations]
  actions: list[np.ndarray]
  success: bool


def _record(
  environment: Environment, expert: Expert, seed: tuple[int, int]
) -> _Recording:
  """The episode of a seed and the number of the try."""
  start, noise = np.random.SeedSequence(seed).spawn(2)
  rng = np.random.default_rng(noise)
  expert.reset(rng)
  seen = environment.reset(int(start.generate_state(1)[0]))
  recording = _Recording([], [], False)
  left = _HOLD
  while True:
    action = expert.act(seen, rng)
    recording.observations.append(seen)
    recording.actions.append(action)
    step = environment.step(action)
    if step.done or (step.success and left == 0):
      return recording._replace(success=step.success)
    left -= step.success
    seen = step.observations
