"""Robots: control tasks, experts that solve them, and judges of policies.

Without the packages of the extra robots there is 'obstacle'; the others say
what to install.

  ENVIRONMENTS, make      control tasks by name
  Environment, Step       an environment, and the result of an action
  make_expert, collect    scripted experts, and their demonstrations
  rollouts, Act, Episode  episodes of a policy of action chunks
  summarize               success, score, length and modes of episodes
  save_video              recorded episodes as GIF or MP4
  RobotError, ExtraError  what is wrong; a package is missing
"""

# ruff: noqa: F401, the names that this folder offers

from drift_jax.tasks.policy.robots.environments import ENVIRONMENTS, make
from drift_jax.tasks.policy.robots.experts import collect, make_expert
from drift_jax.tasks.policy.robots.interface import (
  Environment,
  ExtraError,
  RobotError,
  Step,
)
from drift_jax.tasks.policy.robots.rollouts import (
  Act,
  Episode,
  rollouts,
  summarize,
)
from drift_jax.tasks.policy.robots.video import save_video, video_ending
