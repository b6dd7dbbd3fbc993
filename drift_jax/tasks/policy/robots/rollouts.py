"""Rollouts: a policy of action chunks, judged in many environments at once."""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from drift_jax.tasks.policy.robots.errors import RobotError
from drift_jax.tasks.policy.robots.interface import Environment, Observations

# (observations {name: [n, To, ...]}, episodes [n] int64, call) -> [n, T, A]
Act = Callable[[Mapping[str, np.ndarray], np.ndarray, int], np.ndarray]


@dataclasses.dataclass
class Episode:
  """How an episode went.

  Attributes:
    seed: of its start.
    success: whether the task was solved.
    score: the largest reward, in [0, 1].
    length: steps.
    mode: which way was taken; "" where there is one only, or none was.
    frames: uint8 images [H, W, 3], the first one before the first step; empty
      where none were recorded.
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
    first = environment.reset(seed)
    self._history = collections.deque([first] * horizon, maxlen=horizon)
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
      step = self.environment.step(action)
      self._history.append(step.observations)
      episode.length += 1
      episode.score = max(episode.score, step.reward)
      episode.success = step.success
      episode.mode = step.mode
      self._draw()
      if step.done:
        self.done = True
        return


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
  of a group in step. Where act's rows do not depend on each other, neither
  their number nor `threads` changes an episode.

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
  parallel = len(environments)
  sizes = {
    "environments": parallel,
    "seeds": len(seeds),
    "observation_horizon": observation_horizon,
    "executed": executed,
    "threads": threads,
  }
  for name, size in sizes.items():
    if size < 1:
      raise RobotError(f"rollouts: {name} is {size}, must be at least 1")
  if record < 0:
    raise RobotError(f"rollouts: record is {record}, must be at least 0")
  episodes: list[Episode] = []
  with ThreadPoolExecutor(threads) as pool:
    for start in range(0, len(seeds), parallel):
      rows = [
        _Row(environment, int(seed), observation_horizon, number < record)
        for number, (environment, seed) in enumerate(
          zip(environments, seeds[start : start + parallel], strict=False),
          start,
        )
      ]
      _run(rows, act, start, parallel, observation_horizon, executed, pool)
      episodes += [row.episode for row in rows]
  return episodes


def _run(
  rows: list[_Row],
  act: Act,
  start: int,
  parallel: int,
  horizon: int,
  executed: int,
  pool: ThreadPoolExecutor,
) -> None:
  """Runs the episodes of a group until all are done.

  Args:
    rows: at most `parallel`.
    act, executed: see rollouts.
    start: the number of the first episode.
    parallel: how many observations act is given.
    horizon: To.
    pool: the threads.
  """
  # The last row stands in for those that are missing.
  chosen = np.minimum(np.arange(parallel), len(rows) - 1)
  call = 0
  while not all(row.done for row in rows):
    seen = [row.observations() for row in rows]
    batch = {
      name: np.stack([seen[row][name] for row in chosen]) for name in seen[0]
    }
    chunks = np.asarray(act(batch, start + chosen, call))
    _check_chunks(chunks, rows[0].environment, parallel, horizon, executed)
    actions = chunks[:, horizon - 1 : horizon - 1 + executed]
    going = [
      (row, taken)
      for row, taken in zip(rows, actions, strict=False)
      if not row.done
    ]
    waiting = [
      pool.submit(row.run, taken) for row, taken in going if not row.recorded
    ]
    for row, taken in going:
      if row.recorded:
        row.run(taken)
    for future in waiting:
      future.result()
    call += 1


def _check_chunks(
  chunks: np.ndarray,
  environment: Environment,
  parallel: int,
  horizon: int,
  executed: int,
) -> None:
  size = len(environment.action_low)
  wanted = horizon - 1 + executed
  if chunks.ndim != 3 or chunks.shape[::2] != (parallel, size):
    raise RobotError(
      f"{environment.name}: action chunks of shape {chunks.shape}, want "
      f"({parallel}, at least {wanted}, {size})"
    )
  if chunks.shape[1] < wanted:
    raise RobotError(
      f"{environment.name}: chunks of {chunks.shape[1]} actions are too short: "
      f"with {horizon} observations and {executed} executed actions they need "
      f"{wanted}"
    )


def summarize(episodes: Sequence[Episode]) -> dict[str, float]:
  """Means over episodes.

  Returns:
    success_rate; score, of the largest rewards; mean_length, in steps; and
    mode/NAME for each mode seen, as a fraction of all episodes.

  Raises:
    RobotError: there are none.
  """
  if not episodes:
    raise RobotError("no episodes to summarize")
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
