"""Every field on every toy, with several seeds, as a table.

  python -m drift_jax.tools.toy_table --workdir=runs/toys \\
      [--toys=moons,spiral] [--fields=softmax,kl] [--temperatures=0.05,0.01]
      [--seeds=0,1,2,3,4] [--variant=quick] [--config.KEY=VALUE ...]

Each run is configs/toy.py:TOY,VARIANT with another drift.field; with 'sinkhorn'
a second batch repels, as that field needs. All runs are trained in this process
and share compilations; only runs of the first seed draw pictures. After each
run toys_TEMPERATURE.md, .csv and .png are written. The same command goes on
after an interruption; finished runs are left alone.
"""

import sys
from collections.abc import Sequence

from absl import app, flags

from drift_jax import config as config_lib
from drift_jax.system import paths, programs
from drift_jax.tools.table import Values


def define_flags() -> None:
  """Defines the flags: not on import, as other programs have the same names."""
  paths.define_flag("config", "configs/toy.py", "File of the toys.")
  paths.define_flag(
    "workdir", None, "Folder of the runs and the table.", required=True
  )
  toys = "bimodal_between,bimodal_far,bimodal_collapsed,checkerboard,swiss_roll"
  toys += ",eight_gaussians,moons,spiral"
  for name, kind, default, text in (
    ("toys", str, toys, "Rows: variants of the config."),
    ("fields", str, None, "Columns: fields; all if not given."),
    ("temperatures", float, "0.05", "One table each."),
    ("seeds", int, "0,1,2,3,4", "Seeds of each cell."),
  ):
    flags.DEFINE(Values(kind), name, default, text)
  flags.DEFINE_string("variant", "quick", "Variant of all runs.")


def main(argv: Sequence[str]) -> None:
  """Runs the table of the command line."""
  with programs.checking(argv):
    _, overrides = config_lib.config_arguments(sys.argv[1:])

  def program() -> None:
    from drift_jax.tools.work import toy_table

    if failed := toy_table.run(flags.FLAGS, overrides):
      sys.exit("\n- ".join(["Failed:", *failed]))

  programs.run(program, resumes=True)


def _flags(argv: Sequence[str]) -> list[str]:
  """--config.KEY=VALUE are read by main itself: each toy has its own config."""
  return config_lib.parse_flags(
    [a for a in argv if not a.startswith(("--config.", "-config."))]
  )


if __name__ == "__main__":
  define_flags()
  app.run(main, flags_parser=_flags)
