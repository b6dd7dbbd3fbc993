"""Every field on every toy, with several seeds, as a table.

  python -m drift_jax.tools.toy_table --workdir=runs/toys \\
      [--toys=moons,spiral] [--fields=softmax,kl] [--temperatures=0.05,0.01]
      [--seeds=0,1,2,3,4] [--variant=quick] [--config.KEY=VALUE ...]

Each run is that of configs/toy.py:TOY,VARIANT with drift.field changed; with
'sinkhorn' a second batch repels, as that field wants it. All are trained in
this process, one compilation for those that share it; pictures are drawn of the
first seed. After each run toys.md, toys.csv and toys.png are written. The same
command goes on after an interruption; finished runs are left alone.
"""

import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from absl import app, flags

from drift_jax import config as config_lib
from drift_jax.system import paths, programs

_Number = TypeVar("_Number", int, float)


def define_flags() -> None:
  """Defines the flags: not on import, as other programs have the same names."""
  paths.define_flag("config", "configs/toy.py", "Where toys are.")
  paths.define_flag(
    "workdir", None, "Folder of the runs and the table.", required=True
  )
  toys = [
    "bimodal_between",
    "bimodal_far",
    "bimodal_collapsed",
    "checkerboard",
    "swiss_roll",
    "eight_gaussians",
    "moons",
    "spiral",
  ]
  flags.DEFINE_list("toys", toys, "Variants of the config, columns.")
  flags.DEFINE_list("fields", None, "Rows of the table; all if not given.")
  flags.DEFINE_list("temperatures", ["0.05"], "A table of each.")
  flags.DEFINE_list("seeds", ["0", "1", "2", "3", "4"], "A run each.")
  flags.DEFINE_string("variant", "quick", "Of all runs.")


def _numbers(
  flag: str, texts: Sequence[str], kind: Callable[[str], _Number]
) -> list[_Number]:
  """Of a list flag; ConfigError names the entry that is none."""
  numbers = []
  for text in texts:
    try:
      numbers.append(kind(text))
    except ValueError:
      what = "integer" if kind is int else "number"
      raise config_lib.ConfigError(f"--{flag}: {text!r} is no {what}") from None
  return numbers


def main(argv: Sequence[str]) -> None:
  """Runs the table of the command line."""
  values = flags.FLAGS
  with programs.checking(argv):
    temperatures = _numbers("temperatures", values.temperatures, float)
    seeds = _numbers("seeds", values.seeds, int)
    for name, found in (
      ("toys", values.toys),
      ("fields", values.fields),
      ("temperatures", temperatures),
      ("seeds", seeds),
    ):
      if found is not None and (not found or len(set(found)) < len(found)):
        raise config_lib.ConfigError(
          f"--{name}={found} must hold at least one value and none twice"
        )
  _, overrides = config_lib.config_arguments(sys.argv[1:])
  changed = " ".join(f"--config.{k}={v}" for k, v in overrides.items())

  def program() -> None:
    from drift_jax.tools.work import toy_table

    failed = toy_table.run(
      pathlib.Path(values.workdir),
      config=values.config,
      variant=values.variant,
      toys=values.toys,
      fields=values.fields,
      temperatures=temperatures,
      seeds=seeds,
      overrides=overrides,
      about=f"Variant `{values.variant}`{', ' * bool(changed)}{changed}.",
    )
    if failed:
      sys.exit("Failed:\n" + "\n".join(failed))

  programs.run(program, resumes=True)


def _flags(argv: Sequence[str]) -> list[str]:
  """--config.KEY=VALUE are read by main itself: each toy has its own config."""
  own = [a for a in argv if not a.startswith(("--config.", "-config."))]
  try:
    return flags.FLAGS(own)
  except flags.Error as error:
    sys.exit(f"Error: {error}")


if __name__ == "__main__":
  define_flags()
  app.run(main, flags_parser=_flags)
