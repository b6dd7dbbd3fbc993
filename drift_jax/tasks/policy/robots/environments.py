"""Environments by name."""

import functools
from collections.abc import Callable, Mapping, Sequence

from drift_jax.tasks.policy.robots.fetch import Fetch
from drift_jax.tasks.policy.robots.interface import Environment, RobotError
from drift_jax.tasks.policy.robots.obstacle import Obstacle
from drift_jax.tasks.policy.robots.pusht import PushT

ENVIRONMENTS: Mapping[str, Callable[[Sequence[str], bool], Environment]] = {
  "obstacle": Obstacle,
  "fetch_reach": functools.partial(Fetch, "fetch_reach"),
  "fetch_push": functools.partial(Fetch, "fetch_push"),
  "fetch_pick_and_place": functools.partial(Fetch, "fetch_pick_and_place"),
  "pusht": PushT,
}


def make(
  name: str,
  *,
  observations: Sequence[str] = ("state",),
  stop_at_success: bool = True,
) -> Environment:
  """An environment.

  Args:
    name: one of ENVIRONMENTS.
    observations: 'state', with 'pusht' 'img' too; NAME[:K] for the first K
      values of one.
    stop_at_success: whether success ends an episode.

  Raises:
    RobotError: an unknown name or observation.
    ExtraError: a missing package of the extra robots.
  """
  if name not in ENVIRONMENTS:
    raise RobotError(
      f"environment {name!r}: valid options are {list(ENVIRONMENTS)}"
    )
  return ENVIRONMENTS[name](observations, stop_at_success)
