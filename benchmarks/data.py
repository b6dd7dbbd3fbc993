"""How fast the data pipeline is, each part beside a plain script's way.

  python benchmarks/data.py --images=DIR_OR_TAR [--small_images=DIR_OR_TAR] \\
      [--json=FILE] [--seconds=2]

runs from the repository's root and prints a Markdown table. Images lie in class
folders (see drift_jax.data.folder); --small_images are all of one size, e.g.
CIFAR-10. Ours and plain are measured in turns, and each is the median of its
turns; "times" is the median over the turns of plain time / our time: above 1
where the pipeline is the faster one. Work of one thread is timed by its CPU
time, work of two by the clock. All files are in the page cache.
"""

import argparse
import dataclasses
import pathlib
import sys
import tempfile
from collections.abc import Sequence
from concurrent import futures

if not __package__:
  # Python looks for a script's imports in the script's folder.
  sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from benchmarks import timing


@dataclasses.dataclass(frozen=True)
class Sizes:
  """How much each section works on; the queue's and the step's are the paper's.

  Attributes:
    images, small_images: files.
    latents, latent_classes: of the cache.
    labels, positives, unconditional: of a step.
    queue_classes, queue_slots, queue_any: of the queue.
    pixel_queue_classes: of the queue of images whose memory is measured.
  """

  images: int = 128
  small_images: int = 2048
  latents: int = 8192
  latent_classes: int = 128
  labels: int = 64
  positives: int = 64
  unconditional: int = 16
  queue_classes: int = 1000
  queue_slots: int = 128
  queue_any: int = 1000
  pixel_queue_classes: int = 10


TINY = Sizes(
  images=2,
  small_images=4,
  latents=64,
  latent_classes=4,
  labels=2,
  positives=4,
  unconditional=2,
  queue_classes=8,
  queue_slots=8,
  queue_any=8,
  pixel_queue_classes=2,
)


def measure(
  report: timing.Report,
  photographs: pathlib.Path,
  small_images: pathlib.Path | None,
  sizes: Sizes,
) -> None:
  """Adds every section's rows."""
  from benchmarks import images, latents

  step = {
    "labels": sizes.labels,
    "positives": sizes.positives,
    "unconditional": sizes.unconditional,
  }
  queue = {
    "classes": sizes.queue_classes,
    "slots": sizes.queue_slots,
    "any_slots": sizes.queue_any,
  }
  with tempfile.TemporaryDirectory() as folder:
    temp = pathlib.Path(folder)
    images.photographs(report, photographs, sizes.images, temp)
    if small_images:
      images.small_images(report, small_images, sizes.small_images, temp)
    cache = latents.Cache(
      temp / "latents", images=sizes.latents, classes=sizes.latent_classes
    )
    with futures.ThreadPoolExecutor(2) as pool:
      latents.cache_rows(report, cache, pool)
      latents.grouped_rows(report, cache, pool, **step)
  latents.queue_rows(report, **queue, **step)
  latents.pixel_queue_rows(report, **queue, measured=sizes.pixel_queue_classes)
  latents.copy_rows(report, **step)


def main(argv: Sequence[str] | None = None) -> None:
  """Measures and prints."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--images", type=timing.path, required=True)
  parser.add_argument("--small_images", type=timing.path)
  parser.add_argument("--json", type=timing.path, help="file to write")
  parser.add_argument("--seconds", type=float, default=2, help="for each row")
  parser.add_argument(
    "--tiny", action="store_true", help="tiny sizes: shows that it runs"
  )
  flags = parser.parse_args(argv)
  facts = timing.machine()
  report = timing.Report(flags.seconds)
  sizes = TINY if flags.tiny else Sizes()
  measure(report, flags.images, flags.small_images, sizes)
  print(f"{report.table()}\n\n{timing.in_words(facts)}")
  if flags.json:
    flags.json.write_text(report.json(facts))


if __name__ == "__main__":
  main()
