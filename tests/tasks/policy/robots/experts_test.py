"""Experts and their demonstrations."""

import numpy as np
import pytest

from drift_jax.tasks.policy import robots
from drift_jax.tasks.policy.robots import experts


def run(name, seeds):
  """(success, mode, actions) of each."""
  environment = robots.make(name)
  expert = robots.make_expert(name)
  results = []
  for seed in seeds:
    rng = np.random.default_rng([1, seed])
    observations = environment.reset(seed)
    expert.reset(rng)
    taken = []
    while True:
      taken.append(expert.act(observations, rng))
      assert taken[-1].dtype == np.float32
      step = environment.step(taken[-1])
      observations = step.observations
      if step.done:
        break
    results.append((step.success, step.mode, np.stack(taken)))
  environment.close()
  return results


def test_the_obstacle_is_passed_on_both_sides():
  successes, modes, _ = zip(*run("obstacle", range(100)), strict=True)
  assert sum(successes) >= 98
  assert 35 <= modes.count("above") <= 65
  assert modes.count("above") + modes.count("below") == 100


def test_the_side_does_not_depend_on_the_start():
  environment = robots.make("obstacle")
  starts = [environment.reset(seed)["state"][1] for seed in range(100)]
  modes = [mode for _, mode, _ in run("obstacle", range(100))]
  above = np.array([mode == "above" for mode in modes], float)
  # 3 standard deviations of a correlation of nothing.
  assert abs(np.corrcoef(starts, above)[0, 1]) < 0.3


@pytest.mark.parametrize(
  "name", ["fetch_reach", "fetch_push", "fetch_pick_and_place"]
)
def test_the_arm_does_its_tasks(name):
  results = run(name, range(12))
  # All of 200 were; one may fail where arithmetic differs.
  assert sum(success for success, _, _ in results) >= 11


@pytest.mark.parametrize("name", ["fetch_push", "fetch_pick_and_place"])
def test_there_is_more_than_one_way(name):
  environment = robots.make(name, stop_at_success=False)
  expert = robots.make_expert(name)
  paths = []
  for seed in range(10):
    rng = np.random.default_rng(seed)
    observations = environment.reset(7)
    expert.reset(rng)
    path = []
    for _ in range(15):
      step = environment.step(expert.act(observations, rng))
      observations = step.observations
      path.append(observations["state"][:3])
    paths.append(path)
  environment.close()
  # [episodes, steps, 3]: as far from each other as noise would not do.
  assert np.ptp(np.array(paths), axis=0).max() > 0.08


def test_demonstrations():
  data, rate = robots.collect(
    "obstacle", episodes=5, seed=3, observations=["state[:1]", "state"]
  )
  assert len(data) == 5 and rate > 0.5
  assert list(data.observations) == ["state[:1]", "state"]
  states = data.observations["state"]
  assert states.dtype == data.actions.dtype == np.float32
  np.testing.assert_array_equal(data.observations["state[:1]"], states[:, :1])
  for steps in data.episodes():
    path = states[steps]
    # The action of a step leads to the observation of the next.
    np.testing.assert_allclose(
      path[1:] - path[:-1], data.actions[steps][:-1], atol=1e-6
    )
    # Success, and twelve steps behind it.
    near = np.linalg.norm(path - [1, 0], axis=1) <= 0.1
    assert near.argmax() == len(path) - 12 and near[-12:].all()
  starts = np.stack([states[steps.start] for steps in data.episodes()])
  assert len(np.unique(starts, axis=0)) == 5


def test_demonstrations_are_those_of_a_seed():
  first, _ = robots.collect("fetch_reach", episodes=2, seed=3)
  again, _ = robots.collect("fetch_reach", episodes=2, seed=3)
  other, _ = robots.collect("fetch_reach", episodes=2, seed=4)
  more, _ = robots.collect("fetch_reach", episodes=3, seed=3)
  for same in (again, more.first(2)):
    np.testing.assert_array_equal(first.actions, same.actions)
    np.testing.assert_array_equal(
      first.observations["state"], same.observations["state"]
    )
  assert not np.array_equal(first.actions[0], other.actions[0])


class Clumsy(experts.ObstacleExpert):
  """Fails in so many of ten tries, the last ones."""

  failures = 0
  tries = 0

  def reset(self, rng):
    super().reset(rng)
    self._fails = self.tries % 10 >= 10 - self.failures
    self.tries += 1

  def act(self, observations, rng):
    if self._fails:
      return np.zeros(2, np.float32)
    return super().act(observations, rng)


def collect_clumsily(monkeypatch, failures, **options):
  monkeypatch.setattr(Clumsy, "failures", failures)
  monkeypatch.setitem(experts._EXPERTS, "obstacle", Clumsy)
  return robots.collect("obstacle", seed=0, **options)


def test_failures_are_left_out(monkeypatch):
  data, rate = collect_clumsily(monkeypatch, 3, episodes=8)
  assert len(data) == 8 and rate == 8 / 11
  assert max(np.diff(data.ends, prepend=0)) < 40


def test_failures_may_be_kept(monkeypatch):
  data, rate = collect_clumsily(monkeypatch, 10, episodes=3, keep="all")
  assert rate == 0
  np.testing.assert_array_equal(data.ends, [40, 80, 120])


def test_an_expert_that_fails_too_often(monkeypatch):
  with pytest.raises(robots.RobotError, match="succeeds in 4 of 10 tries"):
    collect_clumsily(monkeypatch, 6, episodes=5)


def test_pictures_of_a_crude_expert():
  data, rate = robots.collect(
    "pusht", episodes=1, seed=0, observations=["img", "state[:2]"], keep="all"
  )
  assert data.observations["img"].shape == (len(data.actions), 96, 96, 3)
  assert data.observations["state[:2]"].shape == (len(data.actions), 2)
  assert rate in (0, 1)


def test_the_crude_expert_pushes_the_block_towards_its_place():
  environment = robots.make("pusht")
  expert = robots.make_expert("pusht")
  gains = []
  for seed in range(8):
    rng = np.random.default_rng(seed)
    observations = environment.reset(seed)
    expert.reset(rng)
    rewards = []
    for _ in range(150):
      step = environment.step(expert.act(observations, rng))
      observations = step.observations
      rewards.append(step.reward)
      if step.done:
        break
    gains.append(max(rewards) - rewards[0])
  assert np.mean(gains) > 0.4
  environment.close()


def test_what_is_refused():
  with pytest.raises(robots.RobotError, match="'push': valid .*'fetch_push'"):
    robots.make_expert("push")
  with pytest.raises(robots.RobotError, match="'push': valid .*'fetch_push'"):
    robots.collect("push", episodes=1, seed=0)
  with pytest.raises(robots.RobotError, match="0 episodes"):
    robots.collect("obstacle", episodes=0, seed=0)
  with pytest.raises(robots.RobotError, match="seed -1"):
    robots.collect("obstacle", episodes=1, seed=-1)
  with pytest.raises(robots.RobotError, match="'some': valid .*'all'"):
    robots.collect("obstacle", episodes=1, seed=0, keep="some")
