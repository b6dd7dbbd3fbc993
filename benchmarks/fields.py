"""What each drifting field costs: loss and gradient of one feature key.

  python benchmarks/fields.py [--tiny] [--seconds=S] [--json=FILE]

Each row is the jitted loss with its gradient, three temperatures, on random
features; "plain" is the default field on the same features, in turns with it,
so that "times" above 1 is cheaper than the default. Shapes: one of the digits
generator (raw pixels), and one layer of a latent encoder on one label. The
second batch of sinkhorn, two batches, is given: what its generator costs is in
benchmarks/step.py's forward pass.
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
  parser.add_argument("--seconds", type=float, default=3.0)
  parser.add_argument("--json", type=timing.path, help="file to write")
  parser.add_argument(
    "--tiny", action="store_true", help="tiny sizes: shows that it runs"
  )
  flags = parser.parse_args(argv)
  from benchmarks import field_rows

  report = timing.Report(0.01 if flags.tiny else flags.seconds)
  facts = timing.machine()
  field_rows.rows(report, field_rows.TINY if flags.tiny else field_rows.SHAPES)
  print(timing.in_words(facts), report.table(), sep="\n\n")
  if flags.json:
    flags.json.write_text(report.json(facts))


if __name__ == "__main__":
  main()
