"""A picture of where the step's time goes, ours beside the authors' release.

  python benchmarks/step_picture.py OUT.png ablation=FOLDER l2=FOLDER

with FOLDER what compile_check's --hlo (or step_tpu.py's) wrote for the whole
step. The release's shares are those recorded of cycles by libtpu 0.0.52.
"""

import pathlib
import sys
from collections.abc import Sequence

if not __package__:
  # Python looks for a script's imports in the script's folder.
  sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from drift_jax.tools import hlo

PARTS = ("generator", "encoder", "losses and rest")
# Milliseconds of the whole step, and the shares of the parts.
RELEASE = {
  "ablation": (149.0, (0.59, 0.23, 0.18)),
  "l2": (442.0, (0.54, 0.34, 0.12)),
}
TITLES = {"ablation": "ablation (B/2, MAE-256)", "l2": "L/2 (MAE-640)"}


def main(argv: Sequence[str]) -> None:
  """Draws it."""
  if len(argv) < 2:
    raise SystemExit(__doc__)
  from matplotlib import pyplot as plt

  target, *given = argv
  bars = {}
  for pair in given:
    name, _, folder = pair.partition("=")
    if name not in RELEASE:
      raise SystemExit(f"{name!r}: valid names are {list(RELEASE)}")
    total, shares = RELEASE[name]
    bars[f"{TITLES[name]}\nrelease"] = [total * share for share in shares]
    text = (pathlib.Path(folder) / "train.txt").read_text()
    bars[f"{TITLES[name]}\nours"] = milliseconds(text)
  figure, axes = plt.subplots(figsize=(7, 0.4 + 0.6 * len(bars)))
  left = [0.0] * len(bars)
  for i, part in enumerate(PARTS):
    widths = [values[i] for values in bars.values()]
    axes.barh(list(bars), widths, left=left, label=part, height=0.6)
    left = [a + b for a, b in zip(left, widths, strict=True)]
  for row, total in enumerate(left):
    axes.text(total + 4, row, f"{total:.0f} ms", va="center")
  axes.invert_yaxis()
  axes.set_xlim(0, 1.12 * max(left))
  axes.set_xlabel("compiler's estimate for one v6e chip, ms")
  axes.spines[["top", "right"]].set_visible(False)
  axes.legend(loc="upper right", frameon=False)
  figure.tight_layout()
  figure.savefig(target, dpi=120)


def milliseconds(text: str) -> list[float]:
  """Of PARTS, in a program's optimised HLO."""
  parts = {
    name: 1e3 * cycles / hlo.CYCLES_PER_SECOND
    for name, (cycles, _) in hlo.analyse(text).parts.items()
  }
  generator = parts.pop("Generator")
  encoders = ("MAE", "ConvNext", "ResNet")
  encoder = sum(parts.pop(name, 0.0) for name in encoders)
  return [generator, encoder, sum(parts.values())]


if __name__ == "__main__":
  main(sys.argv[1:])
