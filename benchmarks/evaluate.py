"""How fast and how small evaluation is, beside what a short script would do.

  python benchmarks/evaluate.py [--json=FILE] [--seconds=2]

runs from the repository's root and prints a Markdown table; all weights, images
and features are random. Ours and plain are measured in turns, and each is the
median of its turns; "times" is the median over the turns of plain time / our
time, or plain memory / our memory: above 1 where ours is the better one. Times
are by the clock. What takes a minute has one turn.

Inception-v3 runs on JAX's device, beside pytorch-fid's network in torch if that
is installed; all else runs on the host, and its memory is what comes on top of
the features that it is given.
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
  parser.add_argument("--seconds", type=float, default=2, help="for each row")
  parser.add_argument(
    "--tiny", action="store_true", help="tiny sizes: shows that it runs"
  )
  flags = parser.parse_args(argv)
  from benchmarks import features, inception

  facts = timing.machine()
  report = timing.Report(flags.seconds)
  sizes = inception.TINY if flags.tiny else inception.Sizes()
  inception.rows(
    report,
    width=sizes.width,
    num_classes=sizes.num_classes,
    size=sizes.pixels,
    batches=sizes.batches,
  )
  compared = features.TINY if flags.tiny else features.Sizes()
  features.rows(report, compared, flags.seconds)
  print(f"{report.table()}\n\n{timing.in_words(facts)}")
  if flags.json:
    flags.json.write_text(report.json(facts))


if __name__ == "__main__":
  main()
