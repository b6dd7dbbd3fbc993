"""Finished runs of one task side by side, as a table over seeds.

  python -m drift_jax.tools.table --out=runs/table \\
      --from=runs/push-0,runs/push-1,runs/diffusion-0,runs/diffusion-1

Reads what runs leave (config.json, figures.json, metrics.jsonl) and writes
table.md, a row for all runs that differ in their seed alone, and table.csv, a
line for each run. Policies get policies.md, .csv and .png as Table 7 has them,
a row for each environment, method and sampler, and the curves. Policies of one
environment must differ in method and seed alone.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags

from drift_jax import config as config_lib
from drift_jax.system import paths, programs


class Values(flags.ListParser):
  """Parses a list flag of distinct values, at least one, of one kind."""

  def __init__(self, kind: Callable[[str], Any]):
    super().__init__()
    self._kind = kind

  def parse(self, argument: Any) -> list[Any]:
    values = [self._kind(text) for text in super().parse(argument)]
    if not values or len(set(values)) < len(values):
      raise ValueError("it must hold at least one value and none twice")
    return values


def define_flags() -> None:
  """Defines the flags: not on import, as other programs have the same names."""
  config_lib.define_source_flag(
    "Workdirs of finished runs.", "workdirs", parser=flags.ListParser()
  )
  paths.define_flag("out", None, "Folder of the table.", required=True)


def main(argv: Sequence[str], task: str | None = None) -> None:
  """Writes and prints the table; with a task, runs of others are refused."""
  with programs.checking(argv):
    workdirs = [paths.expand(workdir) for workdir in config_lib.source()]

  def program() -> None:
    from drift_jax.tools.work import table

    sys.stdout.write(table.run(workdirs, flags.FLAGS.out, task))

  programs.run(program)


if __name__ == "__main__":
  define_flags()
  app.run(main, flags_parser=config_lib.parse_flags)
