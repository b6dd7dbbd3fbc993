"""Robots: control tasks, experts that solve them, and what judges policies.

Without the packages of requirements-robots.txt there is 'obstacle'; the others
say what to install.

  ENVIRONMENTS, make      control tasks by name
  Environment, Step       what one is, and what an action leads to
  select                  observations by name, 'state[:2]' too
  make_expert, Expert     scripted experts
  collect                 their demonstrations
  rollouts, Act, Episode  episodes of a policy of action chunks
  summarize               success, score, length and modes of episodes
  save_video              recorded episodes as GIF or MP4
  RobotError, ExtraError  what is wrong; a package is missing
"""

from drift_jax.tasks.policy.robots.environments import ENVIRONMENTS, make
from drift_jax.tasks.policy.robots.errors import ExtraError, RobotError
from drift_jax.tasks.policy.robots.experts import Expert, collect, make_expert
from drift_jax.tasks.policy.robots.interface import Environment, Step, select
from drift_jax.tasks.policy.robots.rollouts import (
  Act,
  Episode,
  rollouts,
  summarize,
)
from drift_jax.tasks.policy.robots.video import save_video, video_ending

__all__ = [
  "Act",
  "ENVIRONMENTS",
  "Environment",
  "Episode",
  "Expert",
  "ExtraError",
  "RobotError",
  "Step",
  "collect",
  "make",
  "make_expert",
  "rollouts",
  "save_video",
  "video_ending",
  "select",
  "summarize",
]
