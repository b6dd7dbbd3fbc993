"""Rollouts: a policy of action chunks, judged in many environments at once."""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from drift_jax.tasks.policy.robots.interface import (
  Environment,
  Observations,
  RobotError,
)

# (observations {name: [n, To, ...]}, episodes [n] int64, call) -> [n, T, A]
Act = Callable[[Mapping[str, np.ndarray], np.ndarray, int], np.ndarray]


@dataclasses.dataclass
class Episode:
  """An episode of a policy.

  Attributes:
    seed: of its start.
    success: whether the task was solved.
    score: the largest reward, in [0, 1].
    length: steps.
    mode: the way that was taken; "" if there is one only, or none was.
    frames: uint8 images [H, W, 3], the first one before the first step; empty
      if none were recorded.
  """

  seed: int
  success: bool = False
  score: float = 0.0
  length: int = 0
  mode: str = ""
  frames: list[np.ndarray] = dataclasses.field(default_factory=list)


class _Row:
  """An environment in its episode, with the latest observations."""

  def __init__(
    self, environment: Environment, seed: int, horizon: int, recorded: bool
  ):
    self.environment = environment
    self.episode = Episode(seed)
    self.recorded = recorded
    self.done = False
    start = environment.reset(seed)
    self._history = collections.deque([start] * horizon, maxlen=horizon)
    self._draw()

  def _draw(self) -> None:
    if self.recorded:
      self.episode.frames.append(self.environment.render())

  def observations(self) -> Observations:
    """{name: [To, ...]}, the latest last."""
    return {
      name: np.stack([seen[name] for seen in self._history])
      for name in self._history[0]
    }

  def run(self, actions: np.ndarray) -> None:
    """Takes actions [executed, A], until the episode is done."""
    episode = self.episode
    for action in actions:
      if self.done:
        return
      step = self.environment.step(action)
      self._history.append(step.observations)
      episode.length += 1
      episode.score = max(episode.score, step.reward)
      episode.success = step.success
      episode.mode = step.mode
      self._draw()
      self.done = step.done


def rollouts(
  environments: Sequence[Environment],
  act: Act,
  *,
  seeds: Sequence[int],
  observation_horizon: int,
  executed: int,
  threads: int,
  record: int = 0,
) -> list[Episode]:
  """Episodes of a policy, each until it is done.

  The policy sees the latest To observations and gives a chunk of T actions, of
  which the first belongs to the first of these observations. Of each chunk the
  actions [To - 1, To - 1 + executed) are taken, then it is asked again. At the
  start the first observation stands To times.

  The episodes are worked on in groups of as many as there are environments, all
  of a group in step. If act's rows do not depend on each other, neither their
  number nor `threads` changes an episode.

  Args:
    environments: of one kind; they stay open.
    act: (observations {name: [n, To, ...]}, episodes [n] int64, call) ->
      actions [n, T, A], within the environment's bounds. n is always the number
      of environments: rows of episodes that are over, or that there are too few
      of, have the last observations of one, and their actions are ignored.
      `episodes` are positions among the seeds, `call` counts from 0 within an
      episode: together they seed a row's noise.
    seeds: of the starts, one episode each.
    observation_horizon: To.
    executed: actions of each chunk that are taken.
    threads: that step them.
    record: so many of the first episodes have frames. These are stepped and
      drawn in the calling thread, to which OpenGL is tied.

  Returns:
    An episode for each seed, in their order.

  Raises:
    RobotError: sizes below 1, chunks of another shape or too short, actions
      out of bounds.
  """
  sizes = len(environments), len(seeds), observation_horizon, executed, threads
  if min(sizes) < 1:
    raise RobotError(
      "rollouts: environments, seeds, observation_horizon, executed, threads "
      f"are {sizes}, must each be at least 1"
    )
  parallel, size = len(environments), len(environments[0].action_low)
  used = slice(observation_horizon - 1, observation_horizon - 1 + executed)
  episodes: list[Episode] = []
  with ThreadPoolExecutor(threads) as pool:
    for start in range(0, len(seeds), parallel):
      # 1. The next group; its last row stands in for missing ones.
      group = zip(environments, seeds[start:], strict=False)
      rows = [
        _Row(environment, int(seed), observation_horizon, number < record)
        for number, (environment, seed) in enumerate(group, start)
      ]
      episodes += [row.episode for row in rows]
      chosen = np.minimum(np.arange(parallel), len(rows) - 1)
      for call in itertools.count():
        if all(row.done for row in rows):
          break
        # 2. A chunk for each row, whether it goes on or not.
        seen = [rows[i].observations() for i in chosen]
        batch = {name: np.stack([x[name] for x in seen]) for name in seen[0]}
        chunks = np.asarray(act(batch, start + chosen, call))
        fits = chunks.ndim == 3 and chunks.shape[::2] == (parallel, size)
        if not fits or chunks.shape[1] < used.stop:
          raise RobotError(
            f"{environments[0].name}: action chunks of shape {chunks.shape}, "
            f"want ({parallel}, at least {used.stop}, {size})"
          )
        # 3. Recorded rows in this thread; they are the first ones, so that the
        # others are sent to the pool before.
        waiting = []
        actions = zip(rows, chunks[:, used], strict=False)
        for row, taken in reversed(list(actions)):
          if row.recorded:
            row.run(taken)
          else:
            waiting.append(pool.submit(row.run, taken))
        for future in waiting:
          future.result()
  return episodes


def summarize(episodes: Sequence[Episode]) -> dict[str, float]:
  """Means over episodes.

  Returns:
    success_rate; score, of the largest rewards; mean_length, in steps; and
    mode/NAME for each mode seen, as a fraction of all episodes.
  """
  modes = collections.Counter(episode.mode for episode in episodes)
  return {
    "success_rate": float(np.mean([each.success for each in episodes])),
    "score": float(np.mean([each.score for each in episodes])),
    "mean_length": float(np.mean([each.length for each in episodes])),
    **{
      f"mode/{mode}": count / len(episodes)
      for mode, count in sorted(modes.items())
      if mode
    },
  }
