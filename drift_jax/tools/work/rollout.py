"""Rolls out a trained policy: see drift_jax.tools.rollout."""

import dataclasses
import functools

from absl import flags

from drift_jax import config as config_lib
from drift_jax.tasks.policy import evaluation, robots
from drift_jax.training.run import open_mesh


def run(workdir: str, values: flags.FlagValues) -> dict[str, dict[str, float]]:
  """Rolls out the policy; returns {sampler: figures}.

  Raises:
    ConfigError: the run is no policy, or a flag does not fit it.
    RobotError: an environment that can't be opened or drawn.
    CheckpointError: a checkpoint that can't be read.
  """
  # 1. The policy, with the flags in place of its config's values
  if values.video:  # A mistake there, before it is drawn.
    robots.video_ending(values.video)
  policy = evaluation.load_policy(
    workdir,
    open_mesh(config_lib.Mesh(data=-1, fsdp=1)),
    step=values.step,
  )
  changes = {
    name: tuple(value) if isinstance(value, list) else value
    for name in ("episodes", "seed", "samplers")
    if (value := getattr(values, name)) is not None
  }
  config = dataclasses.replace(
    policy.config,
    eval=dataclasses.replace(policy.config.eval, **changes, videos=0),
  )
  config.check()
  if not config.environment:
    raise config_lib.ConfigError(
      f"{workdir}: environment='' has nothing to roll out in; valid "
      f"options are {list(robots.ENVIRONMENTS)}"
    )
  samplers = evaluation.policy_samplers(config)
  if values.video and len(samplers) > 1:
    raise config_lib.ConfigError(
      f"--video is of one sampler, the run has {list(samplers)}: choose one by "
      "--samplers"
    )
  # 2. Its episodes
  report: dict[str, dict[str, float]] = {"step": {"checkpoint": policy.step}}
  videos = min(values.videos, config.eval.episodes) if values.video else 0
  with evaluation.environments(config) as opened:
    for name, sampler in samplers.items():
      act = functools.partial(
        evaluation.make_act(
          policy.task, policy.normalizer, sampler, seed=config.seed
        ),
        policy.params,
      )
      episodes = evaluation.run_episodes(config, opened, act, record=videos)
      figures = robots.summarize(episodes)
      latency = evaluation.chunk_latency(config, opened[0], act)
      if values.video:
        robots.save_video(values.video, episodes[:videos])
      report[name] = {**figures, "milliseconds_per_chunk": 1e3 * latency}
  return report
