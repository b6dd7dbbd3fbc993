"""Images from an export: pip install jax flatbuffers

python run.py --labels 3 7 --count 8 --alpha 1.5 --seed 0 --out grid.png
"""

import argparse
import json
import os
import pathlib
import struct
import sys
import zlib

import jax.export
import ml_dtypes  # comes with jax
import numpy as np

DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16}


def read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  data = path.read_bytes()
  start = 8 + int.from_bytes(data[:8], "little")
  arrays = {}
  for name, entry in json.loads(data[8:start]).items():
    first, last = (start + n for n in entry["data_offsets"])
    array = np.frombuffer(data[first:last], DTYPES[entry["dtype"]])
    arrays[name] = array.reshape(entry["shape"])
  return arrays


def png(rgb: np.ndarray) -> bytes:
  def chunk(kind: bytes, body: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + body))
    return struct.pack(">I", len(body)) + kind + body + checksum

  header = struct.pack(">IIBBBBB", *rgb.shape[1::-1], 8, 2, 0, 0, 0)
  rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rgb))
  chunks = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
  return b"\x89PNG\r\n\x1a\n" + chunks


def class_index(text: str, names: list[str], count: int) -> int:
  """Of "3" or "index:3", or of "name:tench", which may be a number."""
  kind, colon, rest = text.partition(":")
  called = [i for i, name in enumerate(names) if name == (rest or text)]
  if colon and kind == "name":
    if len(called) != 1:
      sys.exit(f"Error: --labels {text}: {len(called)} classes have this name")
    return called[0]
  if not (rest if kind == "index" else text).isdecimal():
    sys.exit(f"Error: --labels {text}: want 3, index:3 or name:NAME")
  index = int(rest or text)
  if index >= count:
    sys.exit(f"Error: --labels {text}: class indices are 0 to {count - 1}")
  if not colon and called and called != [index]:
    sys.exit(
      f"Error: --labels {text} may mean class index {text} or the class "
      f"called {text}, index {called[0]}: write index:{text} or name:{text}"
    )
  return index


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--labels", nargs="+", default=["0"])
  parser.add_argument("--count", type=int, default=8)
  parser.add_argument("--alpha", type=float, default=1.0)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument(
    "--out", type=os.path.expanduser, default="grid.png", help=".png, or .npy"
  )
  asked = parser.parse_args()

  here = pathlib.Path(__file__).resolve().parent
  manifest = json.loads((here / "manifest.json").read_text())
  files = manifest["weights"].items()
  names = manifest["class_names"] or []
  count = manifest["num_classes"]
  chosen = [class_index(label, names, count) for label in asked.labels]
  print("Classes:", *(f"{i} {names[i]!r}" if names else i for i in chosen))
  labels = np.repeat(np.array(chosen, np.int32), asked.count)
  program = bytearray((here / "sample.stablehlo").read_bytes())
  images = jax.export.deserialize(program).call(
    {name: read_safetensors(here / file) for name, file in files},
    labels,
    np.full(len(labels), asked.alpha, np.float32),
    np.arange(len(labels), dtype=np.int32),  # the images' numbers
    np.uint32(asked.seed),
    np.full(manifest["style_tokens"], -1, np.int32),  # -1: at random
  )
  if asked.out.endswith(".npy"):
    return np.save(asked.out, images)
  pixels = (np.clip((np.asarray(images) + 1) / 2, 0, 1) * 255).astype(np.uint8)
  scale = max(1, 48 // pixels.shape[1])
  pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
  pixels = np.broadcast_to(pixels, (*pixels.shape[:3], 3))
  rows = pixels.reshape(len(asked.labels), asked.count, *pixels.shape[1:])
  grid = np.concatenate(np.concatenate(rows, axis=1), axis=1)
  pathlib.Path(asked.out).write_bytes(png(grid))


if __name__ == "__main__":
  main()
