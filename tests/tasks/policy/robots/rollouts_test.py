"""Rollouts of action chunks."""

import dataclasses
import threading

import numpy as np
import pytest

from drift_jax.tasks.policy import robots
from drift_jax.tasks.policy.robots.interface import Step


class Recorder:
  """Notes the actions it gets; observes (seed, steps); lasts 3 + seed % 4."""

  name = "recorder"
  action_low = np.full(1, -1e6, np.float32)
  action_high = np.full(1, 1e6, np.float32)
  max_steps = 10

  def __init__(self):
    self.taken = {}
    self.threads = set()
    self.rendered_in = set()

  def reset(self, seed):
    self.seed = seed
    self.steps = 0
    self.taken[seed] = []
    return self.observe()

  def observe(self):
    return {"state": np.array([self.seed, self.steps], np.float32)}

  def step(self, action):
    self.threads.add(threading.get_ident())
    self.taken[self.seed].append(float(action[0]))
    self.steps += 1
    done = self.steps >= 3 + self.seed % 4
    success = done and self.seed % 2 == 0
    reward = 0.5 if self.steps == 1 else 0.25
    return Step(self.observe(), reward, success, done, "even" * success)

  def render(self):
    self.rendered_in.add(threading.get_ident())
    return np.full((4, 4, 3), self.steps, np.uint8)


class Policy:
  """Chunks that say which they are: 1000 episode + 100 call + place."""

  def __init__(self, length=6):
    self.length = length
    self.calls = []

  def __call__(self, observations, episodes, call):
    self.calls.append((observations, episodes.copy(), call))
    assert episodes.dtype == np.int64
    value = 1000 * episodes[:, None] + 100 * call + np.arange(self.length)
    return value[..., None].astype(np.float32)


def roll(policy, seeds, parallel=2, **changes):
  """(episodes, environments)."""
  environments = [Recorder() for _ in range(parallel)]
  sizes = {"observation_horizon": 2, "executed": 3, "threads": 2}
  return robots.rollouts(
    environments, policy, seeds=seeds, **{**sizes, **changes}
  ), environments


def test_which_actions_of_a_chunk_are_taken():
  policy = Policy()
  [episode], [environment] = roll(policy, [7], parallel=1)
  assert episode.length == 6
  # From the place of the latest observation on, three of each chunk.
  assert environment.taken[7] == [1, 2, 3, 101, 102, 103]
  _, [environment] = roll(
    policy, [7], parallel=1, observation_horizon=1, executed=4
  )
  # The rest of the last chunk is not.
  assert environment.taken[7] == [0, 1, 2, 3, 100, 101]


def test_what_the_policy_sees():
  policy = Policy()
  roll(policy, [7], parallel=1, observation_horizon=3)
  (first, _, zero), (second, _, one) = policy.calls
  assert (zero, one) == (0, 1) and first["state"].shape == (1, 3, 2)
  # The first observation stands for those before it.
  np.testing.assert_array_equal(first["state"][0], [[7, 0]] * 3)
  np.testing.assert_array_equal(second["state"][0], [[7, 1], [7, 2], [7, 3]])


def test_rows_are_always_as_many():
  policy = Policy()
  episodes, environments = roll(policy, [0, 3, 4], parallel=2)
  assert [each.seed for each in episodes] == [0, 3, 4]
  assert [each.length for each in episodes] == [3, 6, 3]
  assert all(seen["state"].shape == (2, 2, 2) for seen, _, _ in policy.calls)
  chosen = [(rows.tolist(), call) for _, rows, call in policy.calls]
  # Of the last group there is one only, which is there twice.
  assert chosen == [([0, 1], 0), ([0, 1], 1), ([2, 2], 0)]
  # Row 0 was over at the second call: its last observations stay.
  np.testing.assert_array_equal(
    policy.calls[1][0]["state"][0], [[0, 2], [0, 3]]
  )
  assert environments[0].taken == {0: [1, 2, 3], 4: [2001, 2002, 2003]}


def test_what_an_episode_says():
  (odd, even), _ = roll(Policy(), [3, 6])
  assert odd == robots.Episode(3, False, 0.5, 6, "")
  assert even == robots.Episode(6, True, 0.5, 5, "even")


def test_the_first_episodes_are_recorded():
  episodes, environments = roll(Policy(), [0, 1, 2, 3], record=3)
  assert [len(each.frames) for each in episodes] == [4, 5, 6, 0]
  assert [int(frame.max()) for frame in episodes[1].frames] == [0, 1, 2, 3, 4]
  # OpenGL belongs to a thread; others are stepped by the pool's.
  here = threading.get_ident()
  assert all(each.rendered_in == {here} for each in environments)
  _, environments = roll(Policy(), range(8), parallel=4)
  threads = set.union(*[each.threads for each in environments])
  assert here not in threads and len(threads) <= 2


def follow(observations, episodes, call):
  """A noisy chunk of displacements, by (episode, call) and the row alone."""
  chunks = []
  for state, episode in zip(observations["state"], episodes, strict=True):
    rng = np.random.default_rng([episode, call])
    side = 1 if np.random.default_rng(episode).uniform() < 0.5 else -1
    x = state[-1, 0] + 0.1 * np.arange(9)
    y = side * 0.7 * np.cos(np.pi * x / 2)
    moves = np.diff(np.stack([x, y], axis=1), axis=0)
    # The chunk starts at the first observation, the path at the latest.
    moves = np.concatenate([moves[:1], moves])
    moves[1, 1] += y[0] - state[-1, 1]
    chunks.append(np.clip(moves + rng.normal(0, 0.02, moves.shape), -0.2, 0.2))
  return np.stack(chunks)


def reach(observations, episodes, call):
  state = observations["state"][:, -1:]
  move = np.clip((state[..., -3:] - state[..., :3]) / 0.1, -1, 1)
  move = np.concatenate([move, 0 * move[..., :1]], axis=-1)
  return np.repeat(move, 5, axis=1)


@pytest.mark.parametrize(
  ("name", "act", "record"),
  [("obstacle", follow, 2), ("fetch_reach", reach, 0)],
)
def test_neither_groups_nor_threads_matter(name, act, record):
  environments = [robots.make(name) for _ in range(3)]
  one, *others = (
    robots.rollouts(
      environments[:parallel],
      act,
      seeds=range(50, 57),
      observation_horizon=2,
      executed=4,
      threads=threads,
      record=record,
    )
    # The last ones in environments that have been used.
    for parallel, threads in ((1, 1), (3, 4), (3, 2))
  )
  assert len({each.length for each in one}) > 1
  assert any(each.success for each in one)
  for other in others:
    for a, b in zip(one, other, strict=True):
      np.testing.assert_array_equal(a.frames, b.frames)
      a, b = (dataclasses.replace(each, frames=[]) for each in (a, b))
      assert a == b


def test_summaries():
  episodes = [
    robots.Episode(0, True, 1.0, 10, "above"),
    robots.Episode(1, True, 1.0, 20, "below"),
    robots.Episode(2, False, 0.5, 30, "below"),
    robots.Episode(3, False, 0.0, 40, ""),
  ]
  assert robots.summarize(episodes) == {
    "success_rate": 0.5,
    "score": 0.625,
    "mean_length": 25.0,
    "mode/above": 0.25,
    "mode/below": 0.5,
  }


@pytest.mark.parametrize("shape", [(2, 3, 1), (2, 6), (1, 6, 1), (2, 6, 3)])
def test_chunks_that_do_not_fit(shape):
  roll(Policy(4), [0])
  with pytest.raises(robots.RobotError, match="want .2, at least 4, 1.$"):
    roll(lambda *_: np.zeros(shape), [0])


def test_errors_in_threads_are_raised(monkeypatch):
  def fail(self, action):
    raise robots.RobotError("out of bounds")

  monkeypatch.setattr(Recorder, "step", fail)
  with pytest.raises(robots.RobotError, match="out of bounds"):
    roll(Policy(), [0, 1])
