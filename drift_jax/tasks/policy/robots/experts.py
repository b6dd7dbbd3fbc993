"""Scripted experts, which see what a policy sees, and their demonstrations.

An expert is a function rng -> act of one episode; act: state [D] float64 ->
action [A]. It has several ways to its goal and takes one by chance: the
demonstrations have more than one mode, on purpose.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from drift_jax.tasks.policy.demonstrations import Demonstrations
from drift_jax.tasks.policy.robots.environments import make
from drift_jax.tasks.policy.robots.interface import (
  Environment,
  Observations,
  RobotError,
)
from drift_jax.tasks.policy.robots.obstacle import GOAL

Array = np.ndarray
Rng = np.random.Generator
Act = Callable[[Array], Array]
Expert = Callable[[Rng], Act]

# Steps of holding still after success, see collect.
_HOLD = 12
# So many failures are forgiven if few episodes are asked for.
_MIN_FAILURES = 5


def _obstacle(rng: Rng) -> Act:
  """Follows y = +-h cos(pi x / 2), the side by a fair coin."""
  side = rng.choice([-1.0, 1.0])
  height = side * rng.uniform(0.6, 0.85)

  def act(position: Array) -> Array:
    x = min(position[0] + 0.1, GOAL[0])
    move = np.array([x, height * np.cos(np.pi * x / 2)]) - position
    return np.clip(move + rng.normal(0, 0.01, 2), -0.2, 0.2)

  return act


# A gripper's displacement per step, in metres, for an action of 1.
_UNIT = 0.05
# Of an action's components, which are within [-1, 1].
_FETCH_NOISE = 0.05
# What the fingers do.
_CLOSE, _STAY, _OPEN = -1.0, 0.0, 1.0

# Of the gripper: the offset [3] of its next place in metres, the part of it to
# go, and what the fingers do.
Move = tuple[Array, float, float]
# (gripper [3], object [3], goal [3]) -> move.
Plan = Callable[[Array, Array, Array], Move]


def _arm(planner: Callable[[Rng], Plan]) -> Expert:
  """The expert of the Fetch arm that goes by a plan, with noise."""

  def expert(rng: Rng) -> Act:
    plan = planner(rng)

    def act(state: Array) -> Array:
      offset, gain, fingers = plan(state[:3], state[3:6], state[-3:])
      move = gain * offset / _UNIT
      # As a whole, so that the direction stays.
      move = move / max(1.0, float(np.abs(move).max()))
      noise = rng.normal(0, _FETCH_NOISE, 3)
      return np.clip(np.append(move + noise, fingers), -1, 1)

    return act

  return expert


def _reach(rng: Rng) -> Plan:
  """Goes straight, or by a point beside the way."""
  detour = rng.uniform() < 0.5
  side = rng.normal(size=3)
  side *= rng.uniform(0.06, 0.1) / np.linalg.norm(side)
  point: Array | None = None

  def plan(gripper: Array, _: Array, goal: Array) -> Move:
    nonlocal detour, point
    if point is None:
      point = (gripper + goal) / 2 + side
    detour = detour and bool(np.linalg.norm(point - gripper) > 0.03)
    if detour:
      return point - gripper, 0.5, _STAY
    return goal - gripper, 0.3, _STAY

  return plan


def _pick_and_place(rng: Rng) -> Plan:
  """Goes above the object, down, closes, and carries it: straight, by a high
  arc, or from one side."""
  way = ("straight", "high", "side")[rng.integers(3)]
  high = rng.uniform(0.1, 0.16)
  side = rng.choice([-1.0, 1.0]) * rng.uniform(0.06, 0.1)
  above = False
  closing = 0
  point: Array | None = None

  def waypoint(thing: Array, goal: Array) -> Array:
    middle = (thing + goal) / 2
    if way == "high":
      middle[2] = max(thing[2], goal[2]) + high
      return middle
    along = (goal - thing)[:2]
    across = np.array([-along[1], along[0]])
    across /= max(float(np.linalg.norm(across)), 1e-6)
    middle[:2] += side * across
    middle[2] += 0.04
    return middle

  def plan(gripper: Array, thing: Array, goal: Array) -> Move:
    nonlocal way, above, closing, point
    offset = thing - gripper
    distance = np.linalg.norm(offset)
    # 1. Above the object, and down; again if it slipped away.
    if distance > 0.05:
      closing = 0
    if not closing:
      above = bool(np.linalg.norm(offset[:2]) <= (0.03 if above else 0.015))
      if not above:
        return offset + [0, 0, 0.08], 0.8, _OPEN
      if distance > 0.015:
        return offset, 0.8, _OPEN
    # 2. Closing takes three steps.
    closing += 1
    if closing <= 3:
      return offset, 0.6, _CLOSE
    # 3. By the point on the way, if there is one, to the goal.
    if point is None:
      point = waypoint(thing, goal)
    if way != "straight" and np.linalg.norm(point - thing) > 0.04:
      return point - thing, 0.6, _CLOSE
    way = "straight"
    return goal - thing, 0.6, _CLOSE

  return plan


def _push(rng: Rng) -> Plan:
  """Goes round the object, on either side, to the point opposite of the goal,
  pushes, and goes round again if the object slips away."""
  side = rng.choice([-1.0, 1.0])
  pushing = False

  def plan(gripper: Array, thing: Array, goal: Array) -> Move:
    nonlocal pushing
    distance, forward, left = _directions((goal - thing)[:2])
    offset = (gripper - thing)[:2]
    # Of the gripper, from the object's point of view.
    behind = float(-offset @ forward)
    aside = float(offset @ left)
    limit = 0.025 if pushing else 0.012
    pushing = behind > 0.02 and abs(aside) < limit
    if pushing:
      # It has to stay behind the centre: the object turns away otherwise.
      move = forward * min(distance + 0.02, 0.06) - 1.5 * aside * left
    else:
      move = _round(offset, -forward, 0.095, side) - offset
    height = thing[2] - 0.005 - gripper[2]
    return np.append(move, height), 0.8, _STAY

  return plan


def _directions(way: Array) -> tuple[float, Array, Array]:
  """The length of a way [2], its direction, and the direction to its left."""
  distance = float(np.linalg.norm(way))
  forward = way / max(distance, 1e-6)
  return distance, forward, np.array([-forward[1], forward[0]])


def _round(offset: Array, target: Array, radius: float, side: float) -> Array:
  """The next point [2] of the way round an object, from its centre.

  Args:
    offset: [2], place of the pusher, from the centre.
    target: [2], the direction of its goal from the centre; of length 1.
    radius: of the circle on which it goes.
    side: 1 or -1, which way round if both will do.
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


# PushT: the centre of mass in the block's frame, and the block's goal.
_CENTRE = np.array([0.0, 45.0])
_PLACE = np.array([256.0, 256.0])
_ANGLE = np.pi / 4
# The pusher's largest step.
_REACH = 25.0


def _pusht(rng: Rng) -> Act:
  """Crude: goes round the block to behind its centre, as seen from its place,
  and pushes; beside the centre if the block has to turn. Many episodes fail.
  """
  side = rng.choice([-1.0, 1.0])
  pushing = False
  before: Array | None = None

  def act(state: Array) -> Array:
    nonlocal side, pushing, before
    pusher, angle = state[:2], state[4]
    if before is not None and np.linalg.norm(pusher - before) < 4:
      side = -side  # A wall is in the way.
    before = pusher
    centre = state[2:4] + _turn(_CENTRE, angle)
    way = _PLACE + _turn(_CENTRE, _ANGLE) - centre
    _, forward, left = _directions(way)
    turn = (_ANGLE - angle + np.pi) % (2 * np.pi) - np.pi
    # Pushed on the right of its centre, the block turns to the left.
    lever = float(np.clip(-40 * turn, -40, 40))
    offset = pusher - centre
    behind = float(-offset @ forward)
    aside = float(offset @ left) - lever
    pushing = behind > 0 and abs(aside) < (30 if pushing else 10)
    if pushing:
      move = forward * _REACH - 0.5 * aside * left
    elif behind > 80 and abs(aside) < 60:
      move = -aside * left
    else:
      move = _round(offset, -forward, 120.0, side) - offset
    move *= min(1.0, _REACH / max(float(np.linalg.norm(move)), 1e-6))
    return np.clip(pusher + move + rng.normal(0, 2.0, 2), 0, 512)

  return act


def _turn(point: Array, angle: float) -> Array:
  """A point [2] turned about the origin."""
  cos, sin = np.cos(angle), np.sin(angle)
  return np.array([[cos, -sin], [sin, cos]]) @ point


_EXPERTS: dict[str, Expert] = {
  "obstacle": _obstacle,
  "fetch_reach": _arm(_reach),
  "fetch_push": _arm(_push),
  "fetch_pick_and_place": _arm(_pick_and_place),
  "pusht": _pusht,
}


def make_expert(name: str, rng: Rng) -> Callable[[Observations], Array]:
  """The expert of an environment, for one episode.

  Args:
    name: of the environment.
    rng: for its way and its noise.

  Returns:
    act: observations with 'state' [D] -> action [A] float32.
  """
  act = _EXPERTS[name](rng)
  return lambda seen: act(seen["state"].astype(np.float64)).astype(np.float32)


def collect(
  name: str,
  *,
  episodes: int,
  seed: int,
  observations: Sequence[str] = ("state",),
  keep: Literal["successes", "all"] = "successes",
) -> tuple[Demonstrations, float]:
  """Demonstrations of an expert; the same for the same arguments.

  An episode goes on for 12 steps after success, if there are as many: they show
  holding still at the goal.

  Args:
    name: of the environment.
    episodes: so many are kept.
    seed: of the starts and of the expert.
    observations: names to record, see make.
    keep: 'successes', or 'all' episodes.

  Returns:
    The demonstrations, and the fraction of the tries that succeeded.

  Raises:
    RobotError: unknown names; no episodes; only successes are kept, but fewer
      than half of the tries succeed.
    ExtraError: a missing package.
  """
  if keep not in ("successes", "all") or episodes < 1 or seed < 0:
    raise RobotError(
      f"keep={keep!r}, episodes={episodes}, seed={seed}: want 'successes' or "
      "'all', at least 1, and at least 0"
    )
  # The expert looks at all of the state, whatever is recorded.
  seen = tuple(dict.fromkeys(("state", *observations)))
  kept: list[Demonstrations] = []
  tries = successes = 0
  environment = make(name, observations=seen, stop_at_success=False)
  with contextlib.closing(environment):
    while len(kept) < episodes:
      shown, success = _record(environment, (seed, tries), observations)
      tries += 1
      successes += success
      if success or keep == "all":
        kept.append(shown)
      elif tries - successes > max(episodes, _MIN_FAILURES):
        raise RobotError(
          f"{name}: the expert succeeds in {successes} of {tries} tries only; "
          "keep='all' keeps failures too"
        )
  return Demonstrations.joined(kept), successes / tries


def _record(
  environment: Environment, seed: tuple[int, int], names: Sequence[str]
) -> tuple[Demonstrations, bool]:
  """The episode of a seed and the number of the try, and its success."""
  start, noise = np.random.SeedSequence(seed).spawn(2)
  act = make_expert(environment.name, np.random.default_rng(noise))
  seen = environment.reset(int(start.generate_state(1)[0]))
  steps, actions, left = [], [], _HOLD
  while True:
    steps.append(seen)
    actions.append(act(seen))
    step = environment.step(actions[-1])
    if step.done or (step.success and left == 0):
      break
    left -= step.success
    seen = step.observations
  recorded = {name: np.stack([seen[name] for seen in steps]) for name in names}
  ends = np.array([len(actions)])
  return Demonstrations(recorded, np.stack(actions), ends), step.success
