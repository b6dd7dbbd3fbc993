"""Trains a config's generator by flow matching instead: many evaluations.

  python benchmarks/flow_matching.py --config=configs/digits.py \\
    --workdir=runs/digits_flow --minutes=4

runs from the repository's root: the same network, data, optimiser and averages
as `python -m drift_jax.main` with these flags, for so many minutes of training,
or for config.train.num_steps; the same command goes on from the newest
checkpoint. Then it draws samples by Euler's and Heun's method and prints a JSON
line of the config's figures for each number of evaluations, which also goes
into WORKDIR/flow_matching.jsonl; the samples are in WORKDIR/samples. Plot:
benchmarks/flow_picture.py.
"""

import pathlib
import sys

if not __package__:
  # Python looks for a script's imports in the script's folder.
  sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from absl import app, flags
from ml_collections import config_flags

from drift_jax import config as config_lib
from drift_jax.system import paths, programs, storage
from drift_jax.system.errors import naming
from drift_jax.tasks import parse_as
from drift_jax.tasks.generator.config import GeneratorConfig


def define_flags() -> None:
  """Defines the flags: not on import, as other programs have the same names."""
  config_flags.DEFINE_config_file("config", None, "Config of a generator.")
  paths.define_flag("workdir", None, "Folder of the run; its own.")
  flags.DEFINE_float(
    "minutes",
    None,
    "Of training, without compilation and evaluation, at the speed of its "
    "first steps; default: config.train.num_steps.",
    lower_bound=0,
  )
  flags.DEFINE_list(
    "evaluations",
    ["1", "2", "8", "50"],
    "Evaluations of the velocity for a sample; Heun's method has even ones.",
  )
  flags.DEFINE_multi_enum(
    "solver", ["euler", "heun"], ["euler", "heun"], "Draws the samples."
  )
  flags.DEFINE_list(
    "guidance",
    ["1", "2"],
    "Scales of classifier-free guidance; any but 1 evaluates the network "
    "twice for a velocity.",
  )
  flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
  """Checks the flags, then trains and judges."""
  values = flags.FLAGS
  with programs.checking(argv):
    config = parse_as(values.config, GeneratorConfig)
    storage.check(values.workdir, write=True)
    with naming("--evaluations"):
      counts = [int(text) for text in values.evaluations]
      if min(counts, default=0) < 1:
        raise ValueError(f"{counts}: want numbers from 1 on")
    with naming("--guidance"):
      scales = [float(text) for text in values.guidance]

  def program() -> None:
    from benchmarks import flow_rows

    state, run = flow_rows.train(config, values.workdir, minutes=values.minutes)
    flow_rows.judge(state, run, counts, scales, values.solver)

  programs.run(
    program,
    resumes=True,
    workdir=values.workdir,
    keep_compiled=config.train.keep_compiled,
  )


if __name__ == "__main__":
  define_flags()
  app.run(main, flags_parser=config_lib.parse_flags)
