"""Rolls out a trained policy: python -m drift_jax.tools.rollout ...

  python -m drift_jax.tools.rollout --workdir=runs/push --episodes=100 \
    --video=push.gif

Prints success rate and the time that an action chunk takes, as JSON; the
demonstrations are not needed, the checkpoint has their normaliser.
"""

import sys
from collections.abc import Sequence

from absl import app, flags

from drift_jax import config as config_lib
from drift_jax.system import paths, programs


def define_flags() -> None:
  """Defines the flags: not on import, as other programs have the same names."""
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


def main(argv: Sequence[str]) -> None:
  """Prints the figures."""
  with programs.checking(argv):
    values = flags.FLAGS

  def program() -> None:
    from drift_jax.metrics.files import report_text, write_report
    from drift_jax.tools.work import rollout

    report = rollout.run(values)
    sys.stdout.write(report_text(report) + "\n")
    if values.json:
      write_report(values.json, report)

  programs.run(program)


if __name__ == "__main__":
  define_flags()
  app.run(main, flags_parser=config_lib.parse_flags)
