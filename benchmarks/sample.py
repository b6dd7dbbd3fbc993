"""Sampling beside the same model called plainly, on this machine.

  python benchmarks/sample.py [--models=digits,b2] [--batch=64] [--json=FILE]
    [--seconds=10] [--tiny]

runs from the repository's root and prints a Markdown table; weights are
random. "Ours" is drift_jax.load's sampler: --batch images at a time
(throughput) or one (latency), until their pixels are on the host. "Plain" is
the module called without jit, one image at a time. Without --models: digits and
b2 on a CPU, in float32; on anything else b2, b2_vae (with Stable Diffusion's
decoder), b16 and l16 in bfloat16. "times" compares the same number of images.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

if not __package__:
  # Python looks for a script's imports in the script's folder.
  sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from benchmarks import timing

BATCH = 64
MODELS = ("digits", "b2", "b2_vae", "b16", "l16")


def main(argv: Sequence[str] | None = None) -> None:
  """Measures and prints."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--models", default="", help=f"of {','.join(MODELS)}")
  parser.add_argument("--json", type=timing.path, help="file to write")
  parser.add_argument("--seconds", type=float, default=10, help="for each row")
  parser.add_argument(
    "--tiny", action="store_true", help="tiny sizes: shows that it runs"
  )
  parser.add_argument("--batch", type=int, default=BATCH, help="images")
  flags = parser.parse_args(argv)
  names = [name for name in flags.models.split(",") if name]
  for name in names:
    if name not in MODELS:
      parser.error(f"--models: {name!r} is none of {', '.join(MODELS)}")
  import jax

  from benchmarks import sample_rows

  on_cpu = jax.default_backend() == "cpu"
  if flags.tiny:
    names = ["digits"]
  elif not names:
    names = ["digits", "b2"] if on_cpu else ["b2", "b2_vae", "b16", "l16"]
  facts = timing.machine()
  report = timing.Report(flags.seconds)
  for name in names:
    dtype = "float32" if on_cpu else "bfloat16"
    count = 8 if flags.tiny else flags.batch
    sample_rows.rows(report, name, dtype, count, flags.tiny)
  print(f"{report.table()}\n\n{timing.in_words(facts)}")
  if flags.json:
    flags.json.write_text(report.json(facts))


if __name__ == "__main__":
  main()
