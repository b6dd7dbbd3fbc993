"""All benchmarks of this machine in one table.

  python benchmarks/run_all.py [--images=DIR --small_images=DIR] [--tpu]
    [--tiny] [--seconds=S] [--json=FILE]

runs step.py and evaluate.py one after the other, each in its own process;
data.py as well where its images are given; with --tpu, step_tpu.py, which
compiles for TPUs that need not be there and takes hours. What is measured, and
how, stands at the head of each.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

if not __package__:
  # Python looks for a script's imports in the script's folder.
  sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from benchmarks import timing

FOLDER = pathlib.Path(__file__).resolve().parent


def main(argv: Sequence[str] | None = None) -> None:
  """Runs and prints."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--images", default="", help="of data.py")
  parser.add_argument("--small_images", default="", help="of data.py")
  parser.add_argument("--tpu", action="store_true", help="step_tpu.py too")
  parser.add_argument("--json", type=pathlib.Path, help="file to write")
  parser.add_argument("--seconds", help="for each row; else each one's own")
  parser.add_argument(
    "--tiny", action="store_true", help="tiny sizes: shows that it runs"
  )
  flags = parser.parse_args(argv)
  if bool(flags.images) != bool(flags.small_images):
    parser.error("data.py needs both --images and --small_images")
  timed = ["--tiny"] * flags.tiny
  if flags.seconds is not None:
    timed.append(f"--seconds={flags.seconds}")
  scripts = {"step.py": timed, "evaluate.py": timed}
  if flags.images:
    images = [
      f"--images={flags.images}",
      f"--small_images={flags.small_images}",
    ]
    scripts["data.py"] = [*images, *timed]
  if flags.tpu:
    scripts["step_tpu.py"] = []
  report = timing.Report(0)
  facts = {}
  for script, arguments in scripts.items():
    print(f"{script} ...", file=sys.stderr, flush=True)
    found = run(script, arguments)
    facts = facts or found["machine"]
    for row in found["rows"]:
      report.rows.append(_row(script, row))
  print(f"{report.table()}\n\n{timing.in_words(facts)}")
  if flags.json:
    flags.json.write_text(report.json(facts))


def run(script: str, arguments: Sequence[str]) -> dict[str, Any]:
  """What a benchmark writes.

  Raises:
    SystemExit: it fails; it has said why.
  """
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "rows.json"
    command = [sys.executable, str(FOLDER / script), f"--json={path}"]
    done = subprocess.run(
      [*command, *arguments], cwd=FOLDER.parent, stdout=subprocess.DEVNULL
    )
    if done.returncode:
      raise SystemExit(f"{script} failed with exit code {done.returncode}")
    return json.loads(path.read_text())


def _row(script: str, row: dict[str, Any]) -> timing.Row:
  if script != "step_tpu.py":
    return timing.Row(**row | {"section": f"{script}: {row['section']}"})
  figure, _, unit = row["figure"].rpartition(" ")
  release = row.get("release")
  return timing.Row(
    f"{script}: {row['setting']}, {row['part']}",
    figure or "estimated time" if unit == "ms" else figure or "operations",
    unit,
    row["ours"],
    release,
    release and release / row["ours"],
    "plain: the authors' release" if release else "",
  )


if __name__ == "__main__":
  main()
