"""Rolls out a trained policy: python -m drift_jax.tools.rollout ...

  python -m drift_jax.tools.rollout --workdir=runs/push --episodes=100 \
    --video=push.gif

Prints success rate and the time that an action chunk takes, as JSON; the
demonstrations are not needed, the checkpoint has their normaliser.
"""

import dataclasses
import functools
import sys
from collections.abc import Sequence

from absl import app, flags

from drift_jax import config as config_lib
from drift_jax import (
  console,
  diffusion,
  exits,
  experiment,
  metrics,
  numerics,
  paths,
  robots,
)


def define_flags() -> None:
  """Defines the flags: not on import, as other tools have the same names."""
  paths.define_flag("workdir", None, "Folder of the run.", required=True)
  flags.DEFINE_integer("step", None, "Checkpoint; the newest if not given.")
  flags.DEFINE_integer(
    "episodes", None, "How many; the config's if not given.", lower_bound=1
  )
  flags.DEFINE_integer(
    "seed", None, "Of the first episode; the config's.", lower_bound=0
  )
  flags.DEFINE_list(
    "samplers", None, "Of a diffusion policy, e.g. ddim:20; the config's."
  )
  paths.define_flag("video", "", "GIF or MP4 of the first episodes.")
  flags.DEFINE_integer("videos", 4, "How many of them.", lower_bound=1)
  paths.define_flag("json", "", "File for what is printed.")


def run(values: flags.FlagValues) -> dict[str, dict[str, float]]:
  """{sampler: figures}; writes what the flags ask for.

  Raises:
    ConfigError: no policy's run, or a flag that does not fit it.
    RobotError: an environment that can't be opened or drawn.
    CheckpointError: a checkpoint that can't be read.
  """
  if values.video:
    robots.video_ending(values.video)  # A mistake there, before it is drawn.
  mesh = experiment.open_mesh(config_lib.Mesh(data=-1, fsdp=1))
  policy = experiment.load_policy(values.workdir, mesh, step=values.step)
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
  config_lib.check(config)
  if not config.environment:
    raise config_lib.ConfigError(
      f"{values.workdir}: environment='' has nothing to roll out in; valid "
      f"options are {list(robots.ENVIRONMENTS)}"
    )
  samplers = experiment.policy_samplers(config)
  if values.video and len(samplers) > 1:
    raise config_lib.ConfigError(
      f"--video is of one sampler, the run has {list(samplers)}: choose one by "
      "--samplers"
    )
  report = {}
  policy = policy._replace(config=config)
  with experiment.environments(config) as opened:
    for name, sampler in samplers.items():
      report[name] = _one(policy, opened, sampler, values.video)
  return {"step": {"checkpoint": policy.step}, **report}


def _one(
  policy: experiment.TrainedPolicy,
  opened: Sequence[robots.Environment],
  sampler: diffusion.Sampler | None,
  video: str,
) -> dict[str, float]:
  config = policy.config
  act = functools.partial(
    experiment.make_act(
      policy.task, policy.normalizer, sampler, seed=config.seed
    ),
    policy.params,
  )
  count = config.eval.videos
  episodes = experiment.run_episodes(config, opened, act, record=count)
  figures = robots.summarize(episodes)
  latency = experiment.chunk_latency(config, opened[0], act)
  if video:
    shown = episodes[:count]
    with metrics.replacing(video) as temporary:
      robots.save_video(temporary, shown, ending=robots.video_ending(video))
  return {**figures, "milliseconds_per_chunk": 1e3 * latency}


def main(argv: Sequence[str]) -> None:
  """Prints the figures."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {list(argv[1:])}")
  console.setup()
  numerics.pin()

  def program() -> None:
    report = run(flags.FLAGS)
    sys.stdout.write(metrics.report_text(report) + "\n")
    if flags.FLAGS.json:
      metrics.write_report(flags.FLAGS.json, report)

  exits.run(program, experiment.ERRORS)


if __name__ == "__main__":
  define_flags()
  app.run(main, flags_parser=config_lib.parse_flags)
