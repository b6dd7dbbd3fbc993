"""Rolls out a trained policy: see drift_jax.tools.rollout."""

import dataclasses
import functools
from collections.abc import Sequence

from absl import flags

from drift_jax import config as config_lib
from drift_jax.tasks.policy import diffusion, robots
from drift_jax.tasks.policy.evaluation import (
  TrainedPolicy,
  chunk_latency,
  environments,
  load_policy,
  make_act,
  policy_samplers,
  run_episodes,
)
from drift_jax.training.run import open_mesh


def run(values: flags.FlagValues) -> dict[str, dict[str, float]]:
  """{sampler: figures}; writes what the flags ask for.

  Raises:
    ConfigError: no policy's run, or a flag that does not fit it.
    RobotError: an environment that can't be opened or drawn.
    CheckpointError: a checkpoint that can't be read.
  """
  if values.video:
    robots.video_ending(values.video)  # A mistake there, before it is drawn.
  mesh = open_mesh(config_lib.Mesh(data=-1, fsdp=1))
  policy = load_policy(values.workdir, mesh, step=values.step)
  config, changes = policy.config, {}
  for name in ("episodes", "seed"):
    if getattr(values, name) is not None:
      changes[name] = getattr(values, name)
  if values.samplers is not None:
    changes["samplers"] = tuple(values.samplers)
  evaluation = dataclasses.replace(config.eval, **changes)
  videos = min(values.videos, evaluation.episodes) if values.video else 0
  config = dataclasses.replace(
    config, eval=dataclasses.replace(evaluation, videos=videos)
  )
  config.check()
  if not config.environment:
    raise config_lib.ConfigError(
      f"{values.workdir}: environment='' has nothing to roll out in; valid "
      f"options are {list(robots.ENVIRONMENTS)}"
    )
  samplers = policy_samplers(config)
  if values.video and len(samplers) > 1:
    raise config_lib.ConfigError(
      f"--video is of one sampler, the run has {list(samplers)}: choose one by "
      "--samplers"
    )
  report = {}
  policy = policy._replace(config=config)
  with environments(config) as opened:
    for name, sampler in samplers.items():
      report[name] = _one(policy, opened, sampler, values.video)
  return {"step": {"checkpoint": policy.step}, **report}


def _one(
  policy: TrainedPolicy,
  opened: Sequence[robots.Environment],
  sampler: diffusion.Sampler | None,
  video: str,
) -> dict[str, float]:
  config = policy.config
  act = functools.partial(
    make_act(policy.task, policy.normalizer, sampler, seed=config.seed),
    policy.params,
  )
  count = config.eval.videos
  episodes = run_episodes(config, opened, act, record=count)
  figures = robots.summarize(episodes)
  latency = chunk_latency(config, opened[0], act)
  if video:
    robots.save_video(video, episodes[:count])
  return {**figures, "milliseconds_per_chunk": 1e3 * latency}
