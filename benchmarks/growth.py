"""How a step grows: time and memory as each size of it doubles.

  python benchmarks/growth.py [--topology=v6e:2x2] [--doublings=2]
      [--quantities=labels,generated,...] [--seconds=5] [--json=FILE] [--tiny]

runs from the repository's root and prints a Markdown table. The step is that of
configs/cifar10.py:cpu in the features of its encoder, with random weights and
images. Without --topology it is timed here, several devices being simulated;
with it, it is compiled for TPUs that need not be there, as compile_check does.
"Slope" is the logarithm to base 2 of the last doubling's ratio: 1 is
proportional, 2 quadratic. Memory is one device's, arguments included.
"""

import argparse
import json
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

if not __package__:
  # Python looks for a script's imports in the script's folder.
  sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from benchmarks import timing
from drift_jax import config as config_lib
from drift_jax.tools import compile_check

# Largest number of devices that is simulated.
DEVICES = 8


def main(argv: Sequence[str] | None = None) -> None:
  """Measures and prints."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--json", type=timing.path, help="file to write")
  parser.add_argument("--topology", default="", help="of TPUs, e.g. v6e:2x2")
  parser.add_argument("--quantities", help="of the table; default: all")
  parser.add_argument("--doublings", type=int, default=2, help="of each")
  parser.add_argument("--seconds", type=float, default=5, help="for each step")
  parser.add_argument(
    "--tiny", action="store_true", help="tiny sizes: shows that it runs"
  )
  flags = parser.parse_args(argv)
  if flags.doublings < 1:
    parser.error(f"--doublings={flags.doublings}: want 1 or more")
  try:
    compile_check.check_topology(flags.topology)
  except config_lib.ConfigError as error:
    parser.error(str(error))
  if flags.topology:
    compile_check.prepare_compilers()
  else:
    import jax

    jax.config.update("jax_num_cpu_devices", DEVICES)
  from benchmarks import growth_rows

  names = list(growth_rows.QUANTITIES)
  chosen = flags.quantities.split(",") if flags.quantities else names
  if unknown := sorted(set(chosen) - set(names)):
    parser.error(f"--quantities: {unknown} are none of {', '.join(names)}")
  facts = timing.machine()
  try:
    rows = growth_rows.rows(
      chosen, flags.doublings, flags.topology, flags.seconds, flags.tiny
    )
  except config_lib.ConfigError as error:
    parser.error(str(error))
  print(timing.in_words(facts), table(rows), sep="\n\n")
  if flags.json:
    flags.json.write_text(
      json.dumps({"machine": facts, "rows": rows}, indent=1)
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
  """Markdown: a line for each quantity."""
  lines = [
    "| | sizes | ms | slope | memory, MB | slope | it must | |",
    "|---" * 8 + "|",
  ]
  for row in rows:
    cells = [row["name"], ", ".join(map(str, row["sizes"]))]
    for figure, scale in (("seconds", 1e3), ("memory", 1e-6)):
      values = row[figure]
      cells.append(", ".join(f"{scale * x:.3g}" for x in values))
      cells.append(f"{slope(values):.2f}")
    lines.append("| " + " | ".join([*cells, row["must"], row["note"]]) + " |")
  return "\n".join(lines)


def slope(values: Sequence[float]) -> float:
  """Of the last doubling, in logarithms."""
  return math.log2(values[-1] / values[-2]) if min(values) > 0 else math.nan


if __name__ == "__main__":
  main()
