"""Our training step beside the same step written plainly, on this machine.

  python benchmarks/step.py [--config=FILE:VARIANT] [--set KEY=VALUE ...] \\
    [--json=FILE] [--seconds=10]

runs from the repository's root and prints a Markdown table; weights and reals
are random. Without --config: configs/digits.py:features on a CPU, the latent
ablation (B/2 in the features of MAE-256) on anything else, and 8 labels, of
which --set batch.labels=N changes the number. "Plain" is
benchmarks/plain_step.py: Alg. 2 feature by feature, autodiff, attention without
kernels, nothing unrolled, recomputed or donated, float32 features. Both are
measured in turns, "times" is the median over the turns of plain time / our
time, or plain memory / our memory. The drifting losses alone are those of 16
labels, on features like MAE-64's.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

if not __package__:
  # Python looks for a script's imports in the script's folder.
  sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from benchmarks import timing


def main(argv: Sequence[str] | None = None) -> None:
  """Measures and prints."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--config", default="", help="FILE:VARIANT")
  parser.add_argument(
    "--set", nargs="*", default=[], help="KEY=VALUE of the config"
  )
  parser.add_argument("--json", type=timing.path, help="file to write")
  parser.add_argument("--seconds", type=float, default=10, help="for each row")
  parser.add_argument(
    "--tiny", action="store_true", help="tiny sizes: shows that it runs"
  )
  flags = parser.parse_args(argv)
  import jax

  from benchmarks import step_rows

  facts = timing.machine()
  report = timing.Report(flags.seconds)
  on_cpu = jax.default_backend() == "cpu"
  name = flags.config or (
    "configs/digits.py"
    if flags.tiny
    else "configs/digits.py:features"
    if on_cpu
    else "configs/imagenet_latent.py"
  )
  smaller = () if on_cpu else ("batch.labels=8",)
  if flags.tiny:
    smaller = ("batch.labels=2", "model.depth=1")
  step_rows.rows(report, name, (*smaller, *flags.set))
  sizes = step_rows.TINY if flags.tiny else step_rows.LossSizes()
  step_rows.loss_rows(report, sizes)
  print(f"{report.table()}\n\n{timing.in_words(facts)}")
  if flags.json:
    flags.json.write_text(report.json(facts))


if __name__ == "__main__":
  main()
