"""Images from an export: pip install jax flatbuffers

python run.py --labels 3,7 --count 8 --alpha 1.5 --seed 0 --out grid.png
"""

import argparse
import hashlib
import json
import os
import pathlib
import struct
import sys
import zlib
from typing import Any, NoReturn

import ml_dtypes  # comes with jax
import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16}


def read_file(name: str, manifest: dict[str, Any]) -> bytes:
  data = (HERE / name).read_bytes()
  if hashlib.sha256(data).hexdigest() != manifest["files"][name]["sha256"]:
    raise ValueError(f"{HERE / name} is damaged: copy the export again")
  return data


def read_safetensors(data: bytes) -> dict[str, np.ndarray]:
  start = 8 + int.from_bytes(data[:8], "little")
  arrays = {}
  for name, entry in json.loads(data[8:start]).items():
    first, last = (start + n for n in entry["data_offsets"])
    array = np.frombuffer(data[first:last], DTYPES[entry["dtype"]])
    arrays[name] = array.reshape(entry["shape"])
  return arrays


def check(asked: argparse.Namespace, manifest: dict[str, Any]) -> None:
  """Raises ValueError for what is out of range, or can't be written."""
  low, high = manifest["alpha_range"]
  for name, valid, want in (
    ("alpha", low <= asked.alpha <= high, f"{low} to {high}"),
    ("seed", 0 <= asked.seed < 2**32, f"0 to {2**32 - 1}"),
    ("count", asked.count >= 1, "at least 1"),
    ("out", asked.out.endswith((".png", ".npy")), ".png or .npy"),
  ):
    if not valid:
      raise ValueError(f"--{name} {getattr(asked, name)}: want {want}")


def png(rgb: np.ndarray) -> bytes:
  def chunk(kind: bytes, body: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + body))
    return struct.pack(">I", len(body)) + kind + body + checksum

  header = struct.pack(">IIBBBBB", *rgb.shape[1::-1], 8, 2, 0, 0, 0)
  rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rgb))
  chunks = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
  return b"\x89PNG\r\n\x1a\n" + chunks


def class_index(text: str, names: list[str], count: int) -> int:
  """Index of the class "3", "index:3" or "name:tench".

  Raises:
    ValueError: there is none, or an index and another class' name.
  """
  kind, colon, rest = text.partition(":")
  called = [i for i, name in enumerate(names) if name == (rest or text)]
  by_name, number = colon and kind == "name", rest if kind == "index" else text
  if by_name and len(called) != 1:
    raise ValueError(f"--labels {text}: {len(called)} classes have this name")
  if not by_name and not number.isdecimal():
    raise ValueError(f"--labels {text}: want 3, index:3 or name:NAME")
  index = called[0] if by_name else int(number)
  if index >= count:
    raise ValueError(f"--labels {text}: class indices are 0 to {count - 1}")
  if not colon and called and called != [index]:
    raise ValueError(
      f"--labels {text} may mean class index {text} or the class called {text},"
      f" index {called[0]}: write index:{text} or name:{text}"
    )
  return index


def read_conditions(
  path: str | None, manifest: dict[str, Any]
) -> list[np.ndarray]:
  """The conditions of a model that has any, in a list.

  Raises:
    ValueError: a file without need, none, or another shape.
  """
  _, *shape = manifest.get("conditions", ["b"])
  if not shape and path is None:
    return []
  if not shape or path is None:
    want = f"want an .npz of {['n', *shape]}" if shape else "there are none"
    raise ValueError(f"--conditions {path}: {want}")
  with np.load(path) as archive:
    given = archive["conditions"].astype(np.float32)
  if list(given.shape[1:]) != shape or not np.isfinite(given).all():
    raise ValueError(
      f"--conditions {path}: {given.shape}, want {['n', *shape]}"
    )
  return [given]


class Parser(argparse.ArgumentParser):
  def error(self, message: str) -> NoReturn:
    sys.exit(f"Error: {message} (see --help)")


def main() -> None:
  parser = Parser(allow_abbrev=False)
  parser.add_argument("--labels", nargs="+", default=["0"])
  parser.add_argument("--conditions", help=".npz of an array 'conditions'")
  parser.add_argument("--count", type=int, default=8)
  parser.add_argument("--alpha", type=float, default=1.0)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument(
    "--out", type=os.path.expanduser, default="grid.png", help=".png, or .npy"
  )
  asked = parser.parse_args()
  try:
    draw(asked)
  except ImportError as error:
    sys.exit(f"Error: pip install jax flatbuffers ({error})")
  except (OSError, ValueError, KeyError) as error:
    sys.exit(f"Error: {error}")
  print("Wrote", asked.out)


def draw(asked: argparse.Namespace) -> None:
  import jax.export  # here, so that --help does not wait for it

  manifest = json.loads((HERE / "manifest.json").read_text())
  check(asked, manifest)
  names, count = manifest["class_names"] or [], manifest["num_classes"]
  chosen = [
    class_index(label, names, count)
    for text in asked.labels
    # A name may hold a comma.
    for label in (
      [text] if text.removeprefix("name:") in names else text.split(",")
    )
  ]
  print("Classes:", *(f"{i} {names[i]!r}" if names else i for i in chosen))
  conditions = read_conditions(asked.conditions, manifest)
  for given in conditions:
    if len(chosen) not in (1, len(given)):
      raise ValueError(f"{len(chosen)} labels with {len(given)} conditions")
    chosen = chosen * len(given) if len(chosen) == 1 else chosen
  labels = np.repeat(np.array(chosen, np.int32), asked.count)
  weights = {
    name: read_safetensors(read_file(file, manifest))
    for name, file in manifest["weights"].items()
  }
  program = bytearray(read_file("sample.stablehlo", manifest))
  images = jax.export.deserialize(program).call(
    weights,
    labels,
    np.full(len(labels), asked.alpha, np.float32),
    np.arange(len(labels), dtype=np.int32),  # the images' numbers
    np.uint32(asked.seed),
    np.full(manifest["style_tokens"], -1, np.int32),  # -1: at random
    *(given.repeat(asked.count, axis=0) for given in conditions),
  )
  images = np.asarray(images)
  if not np.isfinite(images).all():
    raise ValueError("the images are not finite")
  out = pathlib.Path(asked.out)
  if out.suffix == ".npy":
    return np.save(out, images)
  if images.shape[-1] not in (1, 3):
    raise ValueError("these are latents without their decoder: take .npy")
  pixels = (np.clip((images + 1) / 2, 0, 1) * 255).astype(np.uint8)
  scale = max(1, 48 // pixels.shape[1])
  pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
  pixels = np.broadcast_to(pixels, (*pixels.shape[:3], 3))
  rows = pixels.reshape(len(chosen), asked.count, *pixels.shape[1:])
  grid = np.concatenate(np.concatenate(rows, axis=1), axis=1)
  out.write_bytes(png(grid))


if __name__ == "__main__":
  main()
