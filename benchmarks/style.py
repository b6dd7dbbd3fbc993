"""Style of handwritten digits as a condition: slant and thickness, measured.

  python benchmarks/style.py write --source=digits --out=runs/digits_style.npz
  python -m drift_jax.main --config=digits:style --workdir=runs/digits_style \\
    --config.data.conditions=runs/digits_style.npz
  python benchmarks/style.py judge --from=runs/digits_style

`write` measures every image of a data source and writes the file of conditions,
of mean 0 and variance 1 over the training images. `judge` asks a run for the
styles and classes of its held-out images, measures its samples, and prints how
they follow (docs/conditions.md).
"""

import argparse
import json
import pathlib
import sys
from typing import Any

import numpy as np

if not __package__:
  # Python looks for a script's imports in the script's folder.
  sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import drift_jax
from drift_jax.data import sources
from drift_jax.training.conditions import Conditions, image_names

STYLES = ("slant", "thickness")
_EACH = 16  # samples of a condition, and real images near it, for the spread


def grey(images: np.ndarray) -> np.ndarray:
  """[n, h, w] ink in [0, 1] of uint8 images, or of floats in [-1, 1]."""
  ink = images.mean(axis=-1, dtype=np.float64)
  return ink / 255 if images.dtype == np.uint8 else (ink + 1) / 2


def measure(ink: np.ndarray) -> np.ndarray:
  """[n, 2]: slant and thickness of digits [n, h, w], ink in [0, 1].

  Slant is the shear that would set the digit upright, by its second moments:
  how far it leans to the right for each pixel upwards. Thickness, in pixels, is
  twice the area over the length of the edge, which is the total variation.
  """
  ink = np.pad(np.clip(ink, 0, 1), ((0, 0), (1, 1), (1, 1)))
  area = ink.sum(axis=(1, 2)) + 1e-6
  rows, columns = np.mgrid[: ink.shape[1], : ink.shape[2]].astype(np.float64)

  def mean(values: np.ndarray) -> np.ndarray:
    return (ink * values).sum(axis=(1, 2)) / area

  down, right = (x - mean(x)[:, None, None] for x in (rows, columns))
  slant = -mean(down * right) / (mean(down**2) + 1e-6)
  slopes = np.gradient(ink, axis=(1, 2))
  edge = np.hypot(*slopes).sum(axis=(1, 2)) + 1e-6
  return np.stack([slant, 2 * area / edge], axis=1)


def styles(source: sources.Source) -> np.ndarray:
  """[N, 2] of every image."""
  return np.concatenate(
    [measure(grey(source[i][None])) for i in range(len(source))]
  )


def write(out: str, splits: dict[str, sources.Source]) -> None:
  """Writes the conditions of the splits, the training split first."""
  found = {name: styles(source) for name, source in splits.items()}
  first = next(iter(found.values()))
  mean, deviation = first.mean(axis=0), first.std(axis=0)
  values = np.concatenate(list(found.values()))
  names = [name for s, x in splits.items() for name in image_names(x, s)]
  np.savez_compressed(
    out,
    names=np.array(names),
    conditions=((values - mean) / deviation).astype(np.float32),
    mean=mean,
    deviation=deviation,
  )


def distance(images: np.ndarray) -> float:
  """Root mean square difference between two of images [n, h, w] of ink."""
  flat = images.reshape(len(images), -1)
  pairs = 2 * len(flat) / (len(flat) - 1) * flat.var(axis=0).mean()
  return float(np.sqrt(pairs))


def followed(asked: np.ndarray, ink: np.ndarray, scale: Any) -> dict[str, Any]:
  """How the measured styles of samples follow those that were asked for."""
  mean, deviation = scale
  got = (measure(ink) - mean) / deviation
  return {
    name: {
      "correlation": float(np.corrcoef(asked[:, i], got[:, i])[0, 1]),
      "error": float(np.sqrt(np.mean((asked[:, i] - got[:, i]) ** 2))),
    }
    for i, name in enumerate(STYLES)
  }


def judge(
  workdir: str, path: str, splits: dict[str, sources.Source], step: int | None
) -> Any:
  """Figures of a run's samples of the held-out styles and classes."""
  with np.load(path) as archive:
    scale = archive["mean"], archive["deviation"]
  (train, trained), (test, held_out) = splits.items()
  conditions = Conditions(path)
  near, asked = conditions.of(trained, train), conditions.of(held_out, test)
  model = drift_jax.load(workdir, step=step)
  rng = np.random.default_rng(0)
  # 1. One sample of each held-out image's style and class. By chance: of the
  # styles of other images of the class.
  labels = held_out.labels
  samples = grey(model.sample(labels, condition=asked).pixels())
  order = rng.permutation(len(labels))
  same = np.argsort(labels[order], kind="stable")
  by_class = np.argsort(labels, kind="stable")
  others = np.empty_like(asked)
  others[by_class] = asked[order[same]]
  # 2. Several samples of some conditions, and the real images nearest to them.
  chosen = rng.permutation(len(labels))[:200]
  many = model.sample(
    labels[chosen], condition=asked[chosen], count=_EACH, seed=1
  )
  many = grey(many.pixels()).reshape(len(chosen), _EACH, *samples.shape[1:])
  spread = {"generated": [], "real": [], "class": []}
  frame = (
    many.shape[-1] - held_out[0].shape[0]
  ) // 2  # of config.data.crop=pad
  for images, i in zip(many, chosen, strict=True):
    members = np.flatnonzero(trained.labels == labels[i])
    far = np.sum((near[members] - asked[i]) ** 2, axis=1)
    reals = {
      "real": members[np.argsort(far)[:_EACH]],
      "class": rng.choice(members, _EACH, replace=False),
    }
    spread["generated"].append(distance(images))
    for name, rows in reals.items():
      real = np.concatenate([grey(trained[int(r)][None]) for r in rows])
      real = np.pad(real, ((0, 0), (frame, frame), (frame, frame)))
      spread[name].append(distance(real))
  return {
    "samples": len(labels),
    "step": model.generator.step,
    "asked": followed(asked, samples, scale),
    "other styles of the class": followed(others, samples, scale),
    "spread": {name: float(np.mean(x)) for name, x in spread.items()},
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
  parser.add_argument("what", choices=("write", "judge"))
  parser.add_argument("--source", default="", help="default: the run's")
  parser.add_argument("--splits", default="train,test")
  parser.add_argument("--out", default="", help="of write: the .npz")
  parser.add_argument("--from", default="", dest="workdir", help="of judge")
  parser.add_argument("--step", type=int, help="of judge: default: the best")
  parser.add_argument("--json", default="", help="of judge: written too")
  asked = parser.parse_args()
  data = {"source": asked.source, "conditions": asked.out}
  if asked.what == "judge":
    file = pathlib.Path(asked.workdir, "config.json")
    data = json.loads(file.read_text())["data"]
  splits = {
    split: sources.open_source(
      asked.source or data["source"],
      split=split,
      data_dir="",
      class_order="",
      max_corrupt=0,
      decoder="pillow",
    )
    for split in asked.splits.split(",")
  }
  if asked.what == "write":
    return write(asked.out, splits)
  found = judge(asked.workdir, data["conditions"], splits, asked.step)
  print(json.dumps(found, indent=1))
  if asked.json:
    pathlib.Path(asked.json).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
  main()
