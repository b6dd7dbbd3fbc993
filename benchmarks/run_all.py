"""All benchmarks of this machine in one table.

  python benchmarks/run_all.py [--scripts=step.py,sample.py] [--tiny]
    [--images=DIR --small_images=DIR] [--seconds=S] [--json=FILE]

runs the scripts one after the other, each in its own process. data.py needs
both folders of images; step_tpu.py compiles for TPUs that need not be there,
and takes hours. What is measured, and how, stands at the head of each.
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
SCRIPTS = (
  "step.py",
  "fields.py",
  "sample.py",
  "evaluate.py",
  "data.py",
  "step_tpu.py",
)


def main(argv: Sequence[str] | None = None) -> None:
  """Runs and prints."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--scripts", default="step.py,sample.py,evaluate.py")
  parser.add_argument("--images", default="", help="of data.py")
  parser.add_argument("--small_images", default="", help="of data.py")
  parser.add_argument("--json", type=timing.path, help="file to write")
  parser.add_argument("--seconds", help="for each row; else each one's own")
  parser.add_argument(
    "--tiny", action="store_true", help="tiny sizes: shows that it runs"
  )
  flags = parser.parse_args(argv)
  timed = ["--tiny"] * flags.tiny
  if flags.seconds is not None:
    timed.append(f"--seconds={flags.seconds}")
  images = [f"--images={flags.images}", f"--small_images={flags.small_images}"]
  own = {"data.py": [*images, *timed], "step_tpu.py": []}
  chosen = flags.scripts.split(",")
  for script in chosen:
    if script not in SCRIPTS:
      parser.error(f"--scripts: {script!r} is none of {', '.join(SCRIPTS)}")
  if "data.py" in chosen and not (flags.images and flags.small_images):
    parser.error("data.py needs both --images and --small_images")
  report = timing.Report(0)
  facts = {}
  for script in chosen:
    print(f"{script} ...", file=sys.stderr, flush=True)
    found = run(script, own.get(script, timed))
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
    figure or {"ms": "estimated time"}.get(unit, "operations"),
    unit,
    row["ours"],
    release,
    release and release / row["ours"],
    "plain: the authors' release" if release else "",
  )


if __name__ == "__main__":
  main()
