"""Images from an export, with jax, numpy and flatbuffers alone.

pip install jax flatbuffers
python run.py --labels 3 7 --count 8 --alpha 1.5 --seed 0 --out grid.png
"""

import argparse
import json
import pathlib
import struct
import zlib

import jax.export
import ml_dtypes  # comes with jax
import numpy as np


def read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  data = path.read_bytes()
  start = 8 + int.from_bytes(data[:8], "little")
  arrays = {}
  for name, entry in json.loads(data[8:start]).items():
    if name != "__metadata__":
      first, last = (start + n for n in entry["data_offsets"])
      dtype = {"F32": np.float32, "BF16": ml_dtypes.bfloat16}[entry["dtype"]]
      array = np.frombuffer(data[first:last], dtype)
      arrays[name] = array.reshape(entry["shape"])
  return arrays


def png(rgb: np.ndarray) -> bytes:  # uint8 [height, width, 3]
  def chunk(kind: bytes, body: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + body))
    return struct.pack(">I", len(body)) + kind + body + checksum

  header = struct.pack(">IIBBBBB", *rgb.shape[1::-1], 8, 2, 0, 0, 0)
  rows = b"".join(b"\0" + row.tobytes() for row in rgb)
  body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
  return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def main() -> None:
  here = pathlib.Path(__file__).resolve().parent
  parser = argparse.ArgumentParser()
  parser.add_argument("--labels", type=int, nargs="+", default=[0])
  parser.add_argument("--count", type=int, default=8)
  parser.add_argument("--alpha", type=float, default=1.0)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--out", default="grid.png")
  parser.add_argument("--save_array", help="also write the images as .npy")
  asked = parser.parse_args()

  manifest = json.loads((here / "manifest.json").read_text())
  weights = {
    w: read_safetensors(here / f) for w, f in manifest["weights"].items()
  }
  sample = jax.export.deserialize(
    bytearray((here / "sample.stablehlo").read_bytes())
  )
  labels = np.repeat(np.array(asked.labels, np.int32), asked.count)
  images = sample.call(
    weights,
    labels,
    np.full(len(labels), asked.alpha, np.float32),
    np.arange(len(labels), dtype=np.int32),  # the images' numbers
    np.uint32(asked.seed),
    np.full(manifest["style_tokens"], -1, np.int32),  # -1: at random
  )
  if asked.save_array:
    np.save(asked.save_array, images)
  pixels = (np.clip((np.asarray(images) + 1) / 2, 0, 1) * 255).astype(np.uint8)
  pixels = np.broadcast_to(pixels, (*pixels.shape[:3], 3))
  rows = pixels.reshape(len(asked.labels), asked.count, *pixels.shape[1:])
  grid = np.concatenate(np.concatenate(rows, axis=1), axis=1)
  pathlib.Path(asked.out).write_bytes(png(grid))
  print("Wrote", asked.out)


if __name__ == "__main__":
  main()
