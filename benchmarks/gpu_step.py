"""Parts of benchmarks/gpu_check.sh: our step on one device, and the report.

  python benchmarks/gpu_step.py [KEY=VALUE ...] --json=FILE [--tiny]
  python benchmarks/gpu_step.py --report=FOLDER

The first times the step of the latent ablation with 4 labels, random weights
and reals, and compares the memory that it takes with what its program says
before it runs. The second prints what all parts have written.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

if not __package__:
  # Python looks for a script's imports in the script's folder.
  sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from benchmarks import timing

_STEPS = 20
_TINY = ("batch.labels=2", "model.depth=1", "model.dtype=bfloat16")


def main(argv: Sequence[str] | None = None) -> None:
  """Measures, or prints the report."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("changes", nargs="*", help="KEY=VALUE of the config")
  parser.add_argument("--json", type=timing.path, help="file to write")
  parser.add_argument("--report", type=timing.path, help="folder of the parts")
  parser.add_argument("--tiny", action="store_true", help="tiny sizes")
  flags = parser.parse_args(argv)
  if flags.report:
    print(json.dumps(report(flags.report), indent=1))
    return
  result = {"machine": timing.machine(), **measure(flags.changes, flags.tiny)}
  text = json.dumps(result, indent=1)
  print(text)
  if flags.json:
    flags.json.write_text(text)


def measure(changes: Sequence[str], tiny: bool) -> dict[str, Any]:
  """The step's time, its share of the peak, and its memory."""
  import jax

  from benchmarks import step_rows
  from drift_jax.system import devices, jaxprs, sharding
  from drift_jax.tasks import programs

  # 1. The program, and what it will take
  name = "configs/digits.py" if tiny else "configs/imagenet_latent.py"
  sizes = _TINY if tiny else ("batch.labels=4",)
  config = step_rows.changed(name, (*sizes, *changes))
  device = jax.devices()[0]
  program = programs(config, sharding.make_mesh(1, 1, [device]))[0]
  flops = jaxprs.matmul_flops(
    program.jitted.trace(*program.arguments.values()).jaxpr, 1
  )
  state, batch, frozen = step_rows.random_inputs(config, program)
  compiled = step_rows.Compiled(program.jitted, (state, batch, frozen))
  # 2. What it takes
  run = step_rows.Chain(compiled.run, state, (batch, frozen))
  del state
  run()
  seconds = []
  for _ in range(2 if tiny else _STEPS):
    begin = time.perf_counter()
    run()
    seconds.append(time.perf_counter() - begin)
  middle = statistics.median(seconds)
  peak = devices.PEAK_FLOPS.get(device.device_kind)
  images = config.batch.labels * config.batch.generated
  memory = device.memory_stats() or {}
  return {
    "changes": list(changes),
    "compile_seconds": compiled.seconds,
    "step_seconds": middle,
    "step_seconds_quartiles": statistics.quantiles(seconds, n=4)[::2],
    "images_per_second": images / middle,
    "tflop_per_second": flops / middle / 1e12,
    "mfu": flops / middle / peak if peak else None,
    "predicted_bytes": compiled.arguments + compiled.memory,
    "peak_bytes": memory.get("peak_bytes_in_use"),
  }


def report(folder: pathlib.Path) -> dict[str, Any]:
  """What the parts have written, and how each of them ended."""
  parts: dict[str, Any] = {}
  for name in ("step_published", "step_cudnn", "step_xla", "sampling"):
    file = folder / f"{name}.json"
    if file.exists():
      parts[name] = json.loads(file.read_text())
  # Of trainings: the last figures and speed.
  for name in ("encoder", "generator"):
    file = folder / name / "metrics.jsonl"
    if file.exists():
      lines = [json.loads(line) for line in file.read_text().splitlines()]
      last = {k: v for line in lines for k, v in line.items()}
      shown = ("step", "perf/", "eval/fd", "loss")
      parts[name] = {k: v for k, v in last.items() if k.startswith(shown)}
  picture = folder / "cifar10.png"
  if picture.exists():
    parts["picture"] = str(picture)
  ends = {}
  for file in sorted([*folder.glob("*.code"), *folder.glob("*.done")]):
    code, seconds = file.read_text().split()
    log = (folder / f"{file.stem}.log").read_text().splitlines()
    failed = {"last_line": log[-1] if log else ""} if code != "0" else {}
    ends[file.stem] = {"code": int(code), "seconds": int(seconds)} | failed
  return {"parts": parts, "ends": ends}


if __name__ == "__main__":
  main()
