"""Experts and their demonstrations."""

import numpy as np
import pytest

from drift_jax.tasks.policy import robots
from drift_jax.tasks.policy.robots import experts


def run(name, seeds, starts=None, steps=1_000):
  """Steps [n] of each episode."""
  environment = robots.make(name)
  for seed in seeds:
    act = robots.make_expert(name, np.random.default_rng([1, seed]))
    observations = environment.reset(seed if starts is None else starts)
    episode = []
    while len(episode) < steps:
      action = act(observations)
      assert action.dtype == np.float32
      episode.append(environment.step(action))
      observations = episode[-1].observations
      if episode[-1].done:
        break
    yield episode
  environment.close()


def test_the_obstacle_is_passed_on_both_sides():
  last = [episode[-1] for episode in run("obstacle", range(100))]
  modes = [step.mode for step in last]
  assert sum(step.success for step in last) >= 98
  assert 35 <= modes.count("above") <= 65
  assert modes.count("above") + modes.count("below") == 100
  # The side does not depend on the start.
  environment = robots.make("obstacle")
  starts = [environment.reset(seed)["state"][1] for seed in range(100)]
  above = np.array([mode == "above" for mode in modes], float)
  # 3 standard deviations of a correlation of nothing.
  assert abs(np.corrcoef(starts, above)[0, 1]) < 0.3


@pytest.mark.parametrize(
  "name", ["fetch_reach", "fetch_push", "fetch_pick_and_place"]
)
def test_the_arm_does_its_tasks(name):
  # All of 200 were; one may fail where arithmetic differs.
  assert sum(episode[-1].success for episode in run(name, range(12))) >= 11


@pytest.mark.parametrize("name", ["fetch_push", "fetch_pick_and_place"])
def test_there_is_more_than_one_way(name):
  paths = [
    [step.observations["state"][:3] for step in episode]
    for episode in run(name, range(10), starts=7, steps=15)
  ]
  # [episodes, steps, 3]: as far from each other as noise would not do.
  assert np.ptp(np.array(paths), axis=0).max() > 0.08


def test_the_crude_expert_pushes_the_block_towards_its_place():
  gains = []
  for episode in run("pusht", range(8), steps=150):
    rewards = [step.reward for step in episode]
    gains.append(max(rewards) - rewards[0])
  assert np.mean(gains) > 0.4


def test_demonstrations():
  data, rate = robots.collect(
    "obstacle", episodes=5, seed=3, observations=["state[:1]", "state"]
  )
  assert len(data) == 5 and rate > 0.5
  assert list(data.observations) == ["state[:1]", "state"]
  states = data.observations["state"]
  np.testing.assert_array_equal(data.observations["state[:1]"], states[:, :1])
  for steps in data.episodes():
    path = states[steps]
    # The action of a step leads to the observation of the next.
    np.testing.assert_allclose(
      path[1:] - path[:-1], data.actions[steps][:-1], atol=1e-6
    )
    # Success, and twelve steps after it.
    near = np.linalg.norm(path - [1, 0], axis=1) <= 0.1
    assert near.argmax() == len(path) - 12 and near[-12:].all()
  starts = np.stack([states[steps.start] for steps in data.episodes()])
  assert len(np.unique(starts, axis=0)) == 5


def test_demonstrations_are_those_of_a_seed():
  first, more, other = (
    robots.collect("fetch_reach", episodes=episodes, seed=seed)[0]
    for episodes, seed in ((2, 3), (3, 3), (2, 4))
  )
  for name, values in first.arrays.items():
    np.testing.assert_array_equal(values, more.arrays[name][: first.ends[-1]])
  assert not np.array_equal(first.actions[0], other.actions[0])


@pytest.mark.parametrize(
  ("failures", "options", "rate", "lengths"),
  [
    (3, {"episodes": 8}, 8 / 11, range(1, 40)),
    (10, {"episodes": 3, "keep": "all"}, 0, [40]),
    (6, {"episodes": 5}, None, None),
  ],
)
def test_failures_are_left_out_or_kept(
  monkeypatch, failures, options, rate, lengths
):
  """An expert that fails in so many of ten tries, the last ones."""
  tries = []

  def clumsy(rng):
    tries.append(rng)
    if (len(tries) - 1) % 10 >= 10 - failures:
      return lambda state: np.zeros(2)
    return expert(rng)

  expert = experts._EXPERTS["obstacle"]
  monkeypatch.setitem(experts._EXPERTS, "obstacle", clumsy)
  if rate is None:
    with pytest.raises(robots.RobotError, match="succeeds in 4 of 10 tries"):
      robots.collect("obstacle", seed=0, **options)
    return
  data, found = robots.collect("obstacle", seed=0, **options)
  assert found == rate and len(data) == options["episodes"]
  assert set(np.diff(data.ends, prepend=0)) <= set(lengths)


@pytest.mark.parametrize(
  ("name", "options", "message"),
  [
    ("push", {}, "'push': valid .*'fetch_push'"),
    ("obstacle", {"episodes": 0}, "episodes=0"),
    ("obstacle", {"seed": -1}, "seed=-1"),
    ("obstacle", {"keep": "some"}, "keep='some'"),
  ],
)
def test_what_is_refused(name, options, message):
  with pytest.raises(robots.RobotError, match=message):
    robots.collect(name, **{"episodes": 1, "seed": 0} | options)
