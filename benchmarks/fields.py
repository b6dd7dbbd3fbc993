"""What drifting fields cost: loss and gradient of a feature key, and steps.

  python benchmarks/fields.py [--tiny] [--seconds=S] [--json=FILE]

Each row is the jitted loss with its gradient, three temperatures, on random
features; "plain" is the default field on the same features, in turns with it,
so that "times" above 1 is cheaper than the default. Shapes: one of the digits
generator (raw pixels), and one layer of a latent encoder on one label. The
second batch of sinkhorn, two batches, is given there. The last rows are whole
steps of cifar10.py:cpu in an encoder's features, the second batch made.
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
  field_rows.step_rows(report, flags.tiny)
  print(timing.in_words(facts), report.table(), sep="\n\n")
  if flags.json:
    flags.json.write_text(report.json(facts))


if __name__ == "__main__":
  main()
