"""The part that all environments share, and their errors."""

import abc
import contextlib
import importlib
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from drift_jax.system import extras
from drift_jax.system.errors import UserError
from drift_jax.tasks.policy.selection import parse

Observations = dict[str, np.ndarray]

# An action may leave its range by this part of it: float32 rounding of actions
# that were scaled into the range.
_ROUNDING = 1e-5


class RobotError(UserError, ValueError):
  """An environment, an action or an episode that is not what it must be.

  The message names the value, where it came from and the valid options.
  """


class ExtraError(RobotError, extras.ExtraError):
  """A package of the extra robots is missing."""


def import_extras(environment: str, *modules: str) -> Any:
  """Imports modules that are not among drift_jax's requirements.

  Args:
    environment: what needs them, for the message.
    modules: dotted names, imported in this order.

  Returns:
    The last module.

  Raises:
    ExtraError: one is missing, or a package that it needs.
  """
  imported = None
  for module in modules:
    try:
      # gymnasium-robotics prints its news there, whatever is imported of it.
      with contextlib.redirect_stderr(io.StringIO()):
        imported = importlib.import_module(module)
    except ImportError as error:
      missing = (error.name or module).partition(".")[0]
      raise ExtraError(
        f"environment {environment!r} needs the package {missing!r}: "
        f"{extras.install_line('robots')} ({error})"
      ) from error
  return imported


class Step(NamedTuple):
  """Result of an action.

  Attributes:
    observations: {name: array} after it.
    reward: in [0, 1].
    success: whether the task was solved, now or at an earlier step.
    done: whether the episode is over.
    mode: the way that was taken, once it is known; else "".
  """

  observations: Observations
  reward: float
  success: bool
  done: bool
  mode: str = ""


class Environment(abc.ABC):
  """A control task, one episode at a time.

  A subclass has the rules, `_start` and `_advance`; this class selects
  observations, checks actions, counts steps and ends episodes.

  Attributes:
    name: of the task.
    action_low, action_high: [A] float32, the bounds of an action.
    max_steps: of an episode.
    sources: names of all its observations.
  """

  name: str
  action_low: np.ndarray
  action_high: np.ndarray
  max_steps: int
  sources: tuple[str, ...] = ("state",)

  def __init__(self, observations: Sequence[str], stop_at_success: bool):
    """
    Args:
      observations: NAME or NAME[:K] of each; others are not computed.
      stop_at_success: whether success ends an episode.

    Raises:
      RobotError: no or unknown names.
    """
    self._selected = {name: parse(name) for name in observations}
    self._wanted = {source for source, _ in self._selected.values()}
    if not self._wanted or self._wanted - set(self.sources):
      raise RobotError(
        f"{self.name}: observations {list(observations)}: valid options are "
        f"{list(self.sources)}, and NAME[:K] for the first K values of one"
      )
    self._stop_at_success = stop_at_success
    self._done: bool | None = None

  def reset(self, seed: int) -> Observations:
    """Starts the episode of a seed, whatever was done before.

    Raises:
      RobotError: a negative seed, an observation of fewer than K values.
    """
    if seed < 0:
      raise RobotError(f"{self.name}: seed {seed} must be at least 0")
    self._steps = 0
    self._success = self._done = False
    return self._select(self._start(seed))

  def step(self, action: np.ndarray) -> Step:
    """Takes an action [A] float32, within the bounds.

    Raises:
      RobotError: an action of another shape, not finite or out of bounds; no
        episode that goes on.
    """
    if self._done is None or self._done:
      state = "has no episode" if self._done is None else "is done"
      raise RobotError(f"{self.name} {state}: reset(seed) starts one")
    step = self._advance(self._bounded(action))
    self._steps += 1
    self._success |= step.success
    ends = self._success and self._stop_at_success
    self._done = step.done or ends or self._steps >= self.max_steps
    return step._replace(
      observations=self._select(step.observations),
      success=self._success,
      done=self._done,
    )

  def _bounded(self, action: np.ndarray) -> np.ndarray:
    """The action [A] float32, without what rounding added to its bounds."""
    low, high = self.action_low, self.action_high
    action = np.asarray(action, np.float32)
    if action.shape != low.shape:
      raise RobotError(
        f"{self.name}: an action of shape {action.shape}, want {low.shape}"
      )
    slack = _ROUNDING * (high - low)
    # Written so that nan is outside.
    inside = (action >= low - slack) & (action <= high + slack)
    if not inside.all():
      at = int(np.argmin(inside))
      raise RobotError(
        f"{self.name}: component {at} of the action is {action[at]:g}, must be "
        f"within [{low[at]:g}, {high[at]:g}]"
      )
    return np.clip(action, low, high)

  def _select(self, observations: Observations) -> Observations:
    selected = {}
    for name, (source, count) in self._selected.items():
      values = observations[source]
      if count is not None and count > values.shape[-1]:
        raise RobotError(
          f"{self.name}: {name!r}: {source!r} has {values.shape[-1]} values"
        )
      selected[name] = values[..., :count]
    return selected

  @abc.abstractmethod
  def _start(self, seed: int) -> Observations:
    """Draws the start of an episode; new arrays, of all wanted sources."""

  @abc.abstractmethod
  def _advance(self, action: np.ndarray) -> Step:
    """Takes an action, which is within its bounds.

    Returns:
      The step by the rules alone: success now, done if the task has failed.
    """

  @abc.abstractmethod
  def render(self) -> np.ndarray:
    """The scene as it is, uint8 [H, W, 3].

    Raises:
      RobotError: it can't be drawn.
    """

  @abc.abstractmethod
  def close(self) -> None:
    """Frees what the environment holds."""
