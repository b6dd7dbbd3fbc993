"""Methods of robot control side by side, as Table 7 has them.

  python -m drift_jax.tools.policy_table --out=runs/table \\
      --workdirs=runs/push-0,runs/push-1,runs/diffusion-0,runs/diffusion-1

Reads finished runs of task 'policy' and writes policies.md, a row for each
environment, method and sampler with its success over seeds, and policies.png,
the curves. Runs of one environment must differ in method and seed alone.
"""

import sys
from collections.abc import Sequence

from absl import app, flags

from drift_jax import config as config_lib
from drift_jax.system import paths, programs


def define_flags() -> None:
  """Defines the flags: not on import, as other programs have the same names."""
  flags.DEFINE_list("workdirs", None, "Finished runs.", required=True)
  paths.define_flag("out", None, "Folder of the table.", required=True)


def main(argv: Sequence[str]) -> None:
  """Writes and prints the table."""
  with programs.checking(argv):
    workdirs = [paths.expand(workdir) for workdir in flags.FLAGS.workdirs]

  def program() -> None:
    from drift_jax.tools.work import policy_table

    sys.stdout.write(policy_table.run(workdirs, flags.FLAGS.out))

  programs.run(program)


if __name__ == "__main__":
  define_flags()
  app.run(main, flags_parser=config_lib.parse_flags)
