"""The rows of benchmarks/peers.md, ours: on this machine, in float32.

  python benchmarks/peers.py [--json=FILE] [--seconds=5] [--tiny]

runs from the repository's root and prints a Markdown table. Weights and inputs
are random. Memory is what the compiler plans beside arguments. "Plain" is
drift.paper_loss, the paper's loss as its text has it.
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
  parser.add_argument("--json", type=timing.path, help="file to write")
  parser.add_argument("--seconds", type=float, default=5, help="for each row")
  parser.add_argument(
    "--tiny", action="store_true", help="tiny sizes: shows that it runs"
  )
  flags = parser.parse_args(argv)
  from benchmarks import peer_rows

  report = timing.Report(flags.seconds)
  facts = timing.machine()
  peer_rows.rows(report, flags.tiny)
  print(timing.in_words(facts), report.table(), sep="\n\n")
  if flags.json:
    flags.json.write_text(report.json(facts))


if __name__ == "__main__":
  main()
