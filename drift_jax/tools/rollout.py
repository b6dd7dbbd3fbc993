"""Rolls out a trained policy: python -m drift_jax.tools.rollout ...

  python -m drift_jax.tools.rollout --from=runs/push --episodes=100 \\
    --video=push.gif

Prints the success rate and the latency of an action chunk as JSON. The
demonstrations are not needed: the checkpoint has their normaliser.
"""

import sys
from collections.abc import Sequence

from absl import app, flags

from drift_jax import config as config_lib
from drift_jax.system import paths, programs


def define_flags() -> None:
  """Defines the flags: not on import, as other programs have the same names."""
  config_lib.define_source_flag("The run's workdir.", "workdir")
  for name, default, least, text in (
    ("step", None, None, "Checkpoint; the newest if not given."),
    ("episodes", None, 1, "Number of episodes; the config's if not given."),
    ("seed", None, 0, "Seed of the first; the config's if not given."),
    ("videos", 4, 1, "Number of episodes in the video."),
  ):
    flags.DEFINE_integer(name, default, text, lower_bound=least)
  flags.DEFINE_list(
    "samplers", None, "Of a diffusion policy, e.g. ddim:20; the config's."
  )
  paths.define_flag("video", "", "GIF or MP4 of the first episodes.")
  paths.define_flag("json", "", "File for the printed report.")


def main(argv: Sequence[str]) -> None:
  """Prints the figures."""
  with programs.checking(argv):
    values = flags.FLAGS

  def program() -> None:
    from drift_jax.metrics.files import report_text, write_report
    from drift_jax.tools.work import rollout

    report = rollout.run(config_lib.source(), values)
    sys.stdout.write(report_text(report) + "\n")
    if values.json:
      write_report(values.json, report)

  programs.run(program)


if __name__ == "__main__":
  define_flags()
  app.run(main, flags_parser=config_lib.parse_flags)
