"""Memory and time of loading a frozen encoder from the authors' format.

  python benchmarks/load.py [--width=640] [--dtype=bfloat16] [--folder=DIR]
    [--json=FILE]

runs from the repository's root and prints a Markdown table. It writes a file of
the latent MAE's names and shapes at this width, 10.75 GB at the published 640,
with random numbers, and loads its encoder in a new process. Memory is all that
the process has resident at the most, so on a CPU the loaded encoder is part of
it; what it held before, the packages above all, stands beside it. The file is
removed at the end.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

if not __package__:
  # Python looks for a script's imports in the script's folder.
  sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from benchmarks import timing
from drift_jax.system import options

_NUMBERS = 2**22  # random ones, repeated
_GIGABYTE = 1e9


def main(argv: Sequence[str] | None = None) -> None:
  """Writes the file, measures and prints."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--width", type=int, default=640, help="base_channels")
  parser.add_argument(
    "--dtype", default="bfloat16", choices=options.DTYPES, help="of the encoder"
  )
  parser.add_argument("--folder", type=timing.path, help="of the file, for now")
  parser.add_argument("--json", type=timing.path, help="file to write")
  parser.add_argument("--load", type=timing.path, help=argparse.SUPPRESS)
  flags = parser.parse_args(argv)
  if flags.load:
    print(json.dumps(_loaded(flags.load, flags.dtype)))
    return
  with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
    size = write(pathlib.Path(folder), flags.width)
    # Imported packages differ from what this process has.
    command = [sys.executable, __file__, f"--load={folder}"]
    command += [f"--dtype={flags.dtype}"]
    output = subprocess.run(command, check=True, capture_output=True, text=True)
  facts = timing.machine()
  report = timing.Report(0)
  section = f"MAE of width {flags.width}, {flags.dtype}"
  rows = {"file": size} | json.loads(output.stdout.splitlines()[-1])
  for name, value in rows.items():
    unit = "s" if name == "time" else "GB"
    report.rows.append(timing.Row(section, name, unit, value))
  print(f"{report.table()}\n\n{timing.in_words(facts)}")
  if flags.json:
    values = [dataclasses.asdict(row) for row in report.rows]
    flags.json.write_text(json.dumps({"machine": facts, "rows": values}))


def write(folder: pathlib.Path, width: int) -> float:
  """Writes an artifact of the release's format; returns its file's GB."""
  import jax
  import numpy as np

  from configs import models
  from drift_jax.models import release

  arguments = models.mae_640_latent().to_dict() | {"base_channels": width}
  config = release.published_config("mae", arguments)
  tree = jax.eval_shape(
    lambda params: release.to_release("mae", config, params),
    release.describe("mae", config)[1],
  )
  numbers = np.random.default_rng(0).normal(0, 0.02, _NUMBERS)
  path = folder / "ema_params.msgpack"
  with path.open("wb") as file:
    _pack(file, tree, numbers.astype(np.float32).tobytes())
  metadata = {"kind": "mae", "backend": "jax", "model_config": config}
  (folder / "metadata.json").write_text(json.dumps(metadata))
  return path.stat().st_size / _GIGABYTE


def _pack(file: BinaryIO, tree: Mapping[str, Any], block: bytes) -> None:
  """Writes what flax would write of a tree of float32 arrays."""
  import msgpack

  packer = msgpack.Packer()
  file.write(packer.pack_map_header(len(tree)))
  for name, leaf in tree.items():
    file.write(packer.pack(name))
    if isinstance(leaf, Mapping):
      _pack(file, leaf, block)
      continue
    count = 4 * math.prod(leaf.shape)
    head = packer.pack_array_header(3) + packer.pack(list(leaf.shape))
    head += packer.pack("float32") + struct.pack(">BI", 0xC6, count)
    file.write(struct.pack(">BIb", 0xC9, len(head) + count, 1) + head)
    for start in range(0, count, len(block)):
      file.write(block[: count - start])


def _loaded(folder: pathlib.Path, dtype: str) -> dict[str, float]:
  """Loads the encoder on one device; what that took."""
  import jax

  from drift_jax import config as config_lib
  from drift_jax.system import sharding
  from drift_jax.training import frozen

  chosen: Any = dtype
  section = config_lib.Encoder(
    path=str(folder),
    dtype=chosen,
    sharding="replicated",
    remat=False,
    model={},
    in_loss=True,
    decode=False,
  )
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  before, start = timing.resident(), time.perf_counter()
  encoders = frozen.load_encoders({"mae": section}, mesh)
  seconds = time.perf_counter() - start
  leaves = jax.tree.leaves(encoders["mae"].params)
  jax.block_until_ready(leaves)
  return {
    "before": before / _GIGABYTE,
    "encoder": sum(leaf.nbytes for leaf in leaves) / _GIGABYTE,
    "most": timing.highest() / _GIGABYTE,
    "time": seconds,
  }


if __name__ == "__main__":
  main()
