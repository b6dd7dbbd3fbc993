"""Runs a table of ablations with several seeds, and writes the table.

  python -m drift_jax.tools.ablate table1 --config=configs/digits.py \\
      --workdir=runs/ablations --seeds=0,1,2 [--rows=antisymmetric,...]
      [--config.KEY=VALUE ...]

Tables, rows and the paper's values: configs/ablations.py, beside the base
config. Each row and seed is a run of drift_jax.main in a folder of --workdir
named by what the row changes, so that a row that tables share is trained once.
Runs are evaluated at their end (--config.eval.every=N: on the way too). After
each, TABLE.md, TABLE.csv and TABLE.png are written. The same command goes on
after an interruption: what is finished stays, what was interrupted continues.
"""

from collections.abc import Sequence

from absl import app, flags
from ml_collections import config_flags

from drift_jax import config as config_lib
from drift_jax.system import paths, programs
from drift_jax.tools.table import Values


def define_flags() -> None:
  """Defines the flags: not on import, as other programs have the same names."""
  config_flags.DEFINE_config_file(
    "config", None, "The base: e.g. configs/digits.py or configs/mnist.py:cpu."
  )
  paths.define_flag(
    "workdir", None, "Folder of the runs and the tables.", required=True
  )
  flags.DEFINE(Values(int), "seeds", "0,1,2", "Seeds of each row.")
  flags.DEFINE_list("rows", None, "Only these; all if not given.")
  flags.DEFINE_string(
    "figure", None, "Compares rows; the first Frechet distance if not given."
  )
  flags.DEFINE_float(
    "alpha", None, "Its guidance scale; each row's best if not given."
  )
  flags.DEFINE_bool(
    "commands",
    False,
    "Print the commands of the runs that are not finished, and run none: for "
    "machines where something else starts processes.",
  )
  flags.mark_flag_as_required("config")


def main(argv: Sequence[str]) -> None:
  """Runs what is left of the table; a mistake is one line."""
  with programs.checking(argv[1:]):  # what comes after the table's name
    table = argv[1:]

  def program() -> None:
    from drift_jax.tools.work import ablate

    ablate.run(table)

  programs.run(program, errors=(ValueError,))


if __name__ == "__main__":
  define_flags()
  app.run(main, flags_parser=config_lib.parse_flags)
