"""What an environment is, and what all of them do alike."""

import abc
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from drift_jax.tasks.policy.robots.errors import RobotError

Observations = dict[str, np.ndarray]

# An action may leave its range by so much of the range: float32 rounding of
# actions that were scaled into it.
_ROUNDING = 1e-5
_NAME = re.compile(r"(?P<source>[^\[\]]+)(\[:(?P<count>[1-9][0-9]*)\])?")


class Step(NamedTuple):
  """What an action led to.

  Attributes:
    observations: {name: array} after it.
    reward: in [0, 1].
    success: whether the task was solved, now or at an earlier step.
    done: whether the episode is over.
    mode: which way was taken, once it is known; else "".
  """

  observations: Observations
  reward: float
  success: bool
  done: bool
  mode: str = ""


class Environment(Protocol):
  """A control task, one episode at a time.

  Attributes:
    name: of the task.
    action_low, action_high: [A] float32, the bounds of an action.
    max_steps: of an episode.
  """

  name: str
  action_low: np.ndarray
  action_high: np.ndarray
  max_steps: int

  def reset(self, seed: int) -> Observations:
    """Starts the episode of a seed, whatever was done before."""
    ...

  def step(self, action: np.ndarray) -> Step:
    """Takes an action [A]."""
    ...

  def render(self) -> np.ndarray:
    """The scene as it is, uint8 [H, W, 3]."""
    ...

  def close(self) -> None:
    """Frees what the environment holds."""
    ...


class Outcome(NamedTuple):
  """What an action led to, by the rules of the task alone.

  Attributes:
    reward: in [0, 1].
    success: whether the task is solved now.
    failed: whether it can't be solved any more.
    mode: which way was taken, once it is known; else "".
  """

  reward: float
  success: bool
  failed: bool = False
  mode: str = ""


def parse(name: str) -> tuple[str, int | None]:
  """The source of an observation and how many of its values are wanted.

  Args:
    name: 'state', or 'state[:2]' for the first two values of 'state'.

  Returns:
    ('state', None) or ('state', 2).

  Raises:
    RobotError: another form.
  """
  match = _NAME.fullmatch(name)
  if match is None:
    raise RobotError(
      f"observation {name!r}: write NAME, or NAME[:K] for its first K values"
    )
  count = match["count"]
  return match["source"], None if count is None else int(count)


def select(
  observations: Mapping[str, np.ndarray], names: Sequence[str]
) -> Observations:
  """The observations of these names, which stay the keys.

  Args:
    observations: {name: [..., D]}.
    names: NAME, or NAME[:K] for the first K of the last axis.

  Raises:
    RobotError: an unknown name, another form, or fewer than K values.
  """
  selected = {}
  for name in names:
    source, count = parse(name)
    if source not in observations:
      raise RobotError(
        f"observation {name!r}: valid options are {list(observations)}, and "
        "NAME[:K] for the first K values of one"
      )
    values = observations[source]
    if count is not None and count > values.shape[-1]:
      raise RobotError(
        f"observation {name!r}: {source!r} has {values.shape[-1]} values"
      )
    selected[name] = values if count is None else values[..., :count]
  return selected


def check_action(
  action: np.ndarray, low: np.ndarray, high: np.ndarray, name: str
) -> np.ndarray:
  """The action [A] float32, within its bounds.

  Args:
    action: [A], may be outside by rounding.
    low, high: [A], the bounds.
    name: of the environment, for the messages.

  Raises:
    RobotError: a shape other than [A], a component that is not finite, or
      outside its bounds.
  """
  action = np.asarray(action, np.float32)
  if action.shape != low.shape:
    raise RobotError(
      f"{name}: an action of shape {action.shape}, want {low.shape}"
    )
  slack = _ROUNDING * (high - low)
  # Written so that nan is outside.
  inside = (action >= low - slack) & (action <= high + slack)
  if not inside.all():
    at = int(np.argmin(inside))
    raise RobotError(
      f"{name}: component {at} of the action is {action[at]:g}, must be within "
      f"[{low[at]:g}, {high[at]:g}]"
    )
  return np.clip(action, low, high)


class Simulation(abc.ABC):
  """An environment but for its rules: checks, counts steps, ends episodes.

  Attributes:
    name, action_low, action_high, max_steps: see Environment.
    sources: names of the observations that there are.
  """

  name: str
  action_low: np.ndarray
  action_high: np.ndarray
  max_steps: int
  sources: tuple[str, ...] = ("state",)

  def __init__(self, observations: Sequence[str], *, stop_at_success: bool):
    """
    Args:
      observations: those wanted, NAME or NAME[:K]; the others are not computed.
      stop_at_success: whether success ends an episode.

    Raises:
      RobotError: no or unknown names.
    """
    if not observations:
      raise RobotError(
        f"{self.name}: no observations; valid options are {list(self.sources)}"
      )
    for name in observations:
      if parse(name)[0] not in self.sources:
        raise RobotError(
          f"{self.name}: observation {name!r}: valid options are "
          f"{list(self.sources)}, and NAME[:K] for the first K values of one"
        )
    self._names = tuple(observations)
    self._wanted = tuple(dict.fromkeys(parse(name)[0] for name in observations))
    self._stop_at_success = stop_at_success
    self._steps = 0
    self._success = False
    self._done: bool | None = None

  def reset(self, seed: int) -> Observations:
    """Starts the episode of a seed, whatever was done before.

    Raises:
      RobotError: a negative seed.
    """
    if seed < 0:
      raise RobotError(f"{self.name}: seed {seed} must be at least 0")
    self._steps = 0
    self._success = self._done = False
    self._start(seed)
    return self._observations()

  def step(self, action: np.ndarray) -> Step:
    """Takes an action [A] float32, within the bounds.

    Raises:
      RobotError: an action of another shape, not finite or out of bounds; no
        episode that goes on.
    """
    if self._done is None or self._done:
      state = "has no episode" if self._done is None else "is done"
      raise RobotError(f"{self.name} {state}: reset(seed) starts one")
    action = check_action(action, self.action_low, self.action_high, self.name)
    outcome = self._advance(action)
    self._steps += 1
    self._success |= outcome.success
    self._done = (
      outcome.failed
      or self._steps >= self.max_steps
      or (self._success and self._stop_at_success)
    )
    return Step(
      self._observations(),
      outcome.reward,
      self._success,
      self._done,
      outcome.mode,
    )

  def _observations(self) -> Observations:
    values = {source: self._observe(source) for source in self._wanted}
    return select(values, self._names)

  @abc.abstractmethod
  def _start(self, seed: int) -> None:
    """Draws the start of an episode."""

  @abc.abstractmethod
  def _advance(self, action: np.ndarray) -> Outcome:
    """Takes an action, which is within its bounds."""

  @abc.abstractmethod
  def _observe(self, source: str) -> np.ndarray:
    """The observation of this name, an array of its own."""

  @abc.abstractmethod
  def render(self) -> np.ndarray:
    """The scene as it is, uint8 [H, W, 3].

    Raises:
      RobotError: it can't be drawn.
    """

  @abc.abstractmethod
  def close(self) -> None:
    """Frees what the environment holds."""
