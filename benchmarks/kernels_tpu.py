"""How long a generator's kernels take by the compiler's schedule for a TPU v6e.

  python benchmarks/kernels_tpu.py [--setting=b2] [--kernels=attention,mlp]
      [--json=FILE] [--tiny]

needs the package libtpu, but no TPU: run from the repository's root on Linux.
Prints a Markdown table of the kernels of one block, with 64 samples: the
instructions that the compiler schedules, one a cycle at an assumed 1.75 GHz,
beside the roofline of what the kernel declares, which step_tpu.py counts. The
schedule knows the units of a core and their latencies, but waits for no memory.
'attention' and 'mlp' are the branches of a block, 'alone' is attention without
its projections.
"""

import argparse
import glob
import json
import math
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

if not __package__:
  # Python looks for a script's imports in the script's folder.
  sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from benchmarks import timing
from drift_jax.tools import compile_check, hlo

# Samples, tokens, channels, heads, width of the MLP.
SETTINGS = {
  "b2": (64, 272, 768, 12, 2048),
  "l2": (64, 272, 1024, 16, 2752),
  "tiny": (4, 16, 128, 2, 256),
}
KERNELS = ("attention", "mlp", "alone")
_BUNDLE = re.compile(r"^ *(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:\s*(>*)")


def main(argv: Sequence[str] | None = None) -> None:
  """Compiles and prints."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--setting", choices=SETTINGS, default="b2")
  parser.add_argument("--kernels", default=",".join(KERNELS))
  parser.add_argument("--json", type=timing.path, help="file to write")
  parser.add_argument(
    "--tiny", action="store_true", help="tiny sizes: shows that it runs"
  )
  flags = parser.parse_args(argv)
  chosen = flags.kernels.split(",")
  if unknown := sorted(set(chosen) - set(KERNELS)):
    parser.error(f"--kernels: {unknown} are none of {', '.join(KERNELS)}")
  with tempfile.TemporaryDirectory() as folder:
    # libtpu reads them when it is loaded.
    os.environ["LIBTPU_INIT_ARGS"] = (
      f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
      "--xla_jf_dump_llo_pass_label_regex=final.*"
    )
    compile_check.prepare_compilers()
    facts = timing.machine()
    from benchmarks import kernel_rows

    sizes = SETTINGS["tiny" if flags.tiny else flags.setting]
    rows: list[dict[str, Any]] = []
    for name in chosen:
      for kernel in kernel_rows.compiled(name, sizes):
        cycles = scheduled(folder, kernel.trips)
        rows.append(
          {
            "name": kernel.name,
            "roofline_ms": kernel.roofline * 1e3,
            "scheduled_ms": cycles / hlo.CYCLES_PER_SECOND * 1e3,
          }
        )
  print(timing.in_words(facts), table(rows), sep="\n\n")
  if flags.json:
    flags.json.write_text(
      json.dumps({"machine": facts, "rows": rows}, indent=1)
    )


def scheduled(folder: str, trips: Sequence[int]) -> int:
  """Cycles of the largest program that was written, and removes all.

  Args:
    folder: where the compiler writes.
    trips: how often each loop runs, from the outermost.
  """
  files = glob.glob(f"{folder}/*final_bundles.txt")
  largest = max(
    (name for name in files if "schedule-analysis" not in name),
    key=os.path.getsize,
  )
  total = 0
  with open(largest) as lines:
    for line in lines:
      if match := _BUNDLE.match(line):
        total += math.prod(trips[: len(match[1])])
  for name in glob.glob(f"{folder}/*"):
    os.remove(name)
  return total


def table(rows: Sequence[dict[str, Any]]) -> str:
  """Markdown: a line for each kernel."""
  lines = ["| | roofline, ms | scheduled, ms |", "|---|---|---|"]
  lines += [
    f"| {row['name']} | {row['roofline_ms']:.3g} | {row['scheduled_ms']:.3g} |"
    for row in rows
  ]
  return "\n".join(lines)


if __name__ == "__main__":
  main()
