"""The pictures of docs/method.md and docs/troubleshooting.md, and a table.

  python benchmarks/method_pictures.py OUT [WORKDIR]

writes method_field.png and method_temperatures.png into the folder OUT, and
with the workdir of the digits generator digits_levels.png; prints the drift of
reals, of a collapsed generator and of an untrained one.
"""

import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

if not __package__:
  # Python looks for a script's imports in the script's folder.
  sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import jax
import jax.numpy as jnp
import numpy as np

from drift_jax import drift
from drift_jax.data.sources import digits
from drift_jax.metrics.writers import read_jsonl

REALS, SAMPLES = "#4c78a8", "#f58518"
TEMPERATURES = (0.02, 0.05, 0.2)
# Batch sizes of configs/digits.py.
LABELS, GENERATED, POSITIVES = 16, 32, 96


def main(argv: Sequence[str]) -> None:
  """Draws and prints."""
  if len(argv) not in (1, 2):
    raise SystemExit(__doc__)
  out = pathlib.Path(argv[0])
  out.mkdir(parents=True, exist_ok=True)
  draw_field(out / "method_field.png")
  draw_temperatures(out / "method_temperatures.png")
  levels = digits_levels(affinity_floor=0.0)
  names = levels["held-out reals"]
  print(f"| in place of the samples | {' | '.join(names)} |")
  print("|---" * (1 + len(names)) + "|")
  for name, values in levels.items():
    print(f"| {name} | {' | '.join(f'{x:.3g}' for x in values.values())} |")
  if argv[1:]:
    records = read_jsonl(pathlib.Path(argv[1]) / "metrics.jsonl")
    draw_levels(out / "digits_levels.png", records, levels["held-out reals"])


def points(seed: int, centers: Any, count: int, spread: float) -> np.ndarray:
  """[len(centers) * count, 2] normal around the centers."""
  rng = np.random.default_rng(seed)
  around = np.repeat(np.asarray(centers, np.float32), count, axis=0)
  noise = rng.normal(size=around.shape).astype(np.float32)
  return around + spread * noise


def draw_field(path: pathlib.Path) -> None:
  """Attraction, repulsion and their sum at the samples of a small problem."""
  real = points(0, [(-0.8, 0.5), (0.8, 0.5), (0.0, -0.9)], 12, 0.15)
  samples = points(1, [(-0.3, 0.1)], 14, 0.25)
  figure, axes = _panels(3)
  panels = {
    "attraction $V^+$": (1.0, 0.0),
    "repulsion $-V^-$": (0.0, 1.0),
    "drift $V = V^+ - V^-$": (1.0, 1.0),
  }
  for axis, (title, (attraction, repulsion)) in zip(
    axes, panels.items(), strict=True
  ):
    v = drift.compute_v(
      jnp.asarray(samples),
      jnp.asarray(real),
      jnp.asarray(samples),
      0.4,
      mask_self=True,
      attraction=attraction,
      repulsion=repulsion,
    )
    axis.scatter(*real.T, s=14, color=REALS, label="positives")
    axis.scatter(*samples.T, s=14, color=SAMPLES, label="generated")
    arrows = {"angles": "xy", "scale_units": "xy", "width": 0.005}
    axis.quiver(*samples.T, *np.asarray(v).T, scale=1.0, zorder=3, **arrows)
    axis.set_title(title)
  axes[0].legend(loc="lower left", fontsize=8)
  _save(figure, path)


def draw_temperatures(path: pathlib.Path) -> None:
  """Whom one sample feels: each positive's share, at three temperatures."""
  real = points(2, [(0.0, 0.0)], 96, 0.5)
  sample = np.array([[0.55, 0.15]], np.float32)
  squared = drift.squared_distances(jnp.asarray(sample), jnp.asarray(real))
  scale = float(np.sqrt(squared).mean())
  figure, axes = _panels(3)
  for axis, tau in zip(axes, TEMPERATURES, strict=True):
    share = np.asarray(
      drift.affinities(squared, tau * scale, normalization="y")
    )[0]
    axis.scatter(*real.T, s=6, color="0.8")
    axis.scatter(*real.T, s=4 + 400 * share, color=REALS, alpha=0.7)
    axis.scatter(*sample.T, s=40, color=SAMPLES, marker="x")
    count = 1.0 / np.sum(share**2)
    axis.set_title(f"temperature {tau}: {count:.1f} neighbours", fontsize=11)
  _save(figure, path)


def digits_levels(
  affinity_floor: float, draws: int = 5
) -> dict[str, dict[str, float]]:
  """The digits' loss and raw drift of batches that are known, not generated.

  Returns:
    {what stands in the place of the samples: {'loss', 'drift_rms/TAU',
    'neighbours/TAU': mean over draws of a batch}}.
  """
  splits = [
    (source.images.reshape(len(source.images), -1), source.labels)
    for source in map(digits, ("test", "train"))
  ]
  rng = np.random.default_rng(0)
  loss = jax.jit(
    lambda generated, real: drift.drift_loss(
      generated,
      real,
      None,
      temperatures=TEMPERATURES,
      affinity_floor=affinity_floor,
    )
  )
  rows: dict[str, list[dict[str, float]]] = {}
  for _ in range(draws):
    drawn = rng.integers(0, 10, LABELS)
    held, real = (
      np.stack([rng.permutation(x[y == label])[:count] for label in drawn])
      for (x, y), count in zip(splits, (GENERATED, POSITIVES), strict=True)
    )
    noise = 0.02 * rng.normal(size=held.shape).astype(np.float32)
    for name, samples in {
      "held-out reals": held,
      "the mean of each class": held.mean(axis=1, keepdims=True) + noise,
      "grey": noise,
    }.items():
      losses, info = loss(jnp.asarray(samples), jnp.asarray(real))
      row = {"loss": float(losses.mean())}
      for tau, mean_square in info["drift_ms"].items():
        row[f"drift_rms/{tau}"] = float(mean_square) ** 0.5
      for tau, count in info["effective_positives"].items():
        row[f"neighbours/{tau}"] = float(count)
      rows.setdefault(name, []).append(row)
  return {
    name: {key: float(np.mean([row[key] for row in kept])) for key in kept[0]}
    for name, kept in rows.items()
  }


def draw_levels(
  path: pathlib.Path,
  records: Sequence[Mapping[str, float]],
  level: Mapping[str, float],
) -> None:
  """Loss and raw drift over steps, dashed those of reals."""
  from matplotlib import pyplot as plt

  logged = [record for record in records if "loss" in record]
  steps = [record["step"] for record in logged]
  figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
  drifts = [name for name in level if name.startswith("drift_rms/")]
  for axis, names in ((left, ["loss"]), (right, drifts)):
    for number, name in enumerate(names):
      color = f"C{number}"
      values = [record[name] for record in logged]
      axis.plot(steps, values, color=color, label=name)
      axis.axhline(level[name], color=color, linestyle="--", linewidth=1)
    axis.plot([], color="0.3", linestyle="--", label="of held-out reals")
    axis.set_xlabel("step")
    axis.legend(frameon=False)
  left.set_ylim(0, 9)
  right.set_yscale("log")
  right.set_ylim(1e-2, 1)
  _save(figure, path)


def _panels(count: int) -> tuple[Any, Any]:
  from matplotlib import pyplot as plt

  figure, axes = plt.subplots(1, count, figsize=(3.4 * count, 3.4))
  for axis in axes:
    axis.set_aspect("equal")
    axis.set_xlim(-1.4, 1.4)
    axis.set_ylim(-1.4, 1.4)
    axis.set_xticks([])
    axis.set_yticks([])
  return figure, axes


def _save(figure: Any, path: pathlib.Path) -> None:
  figure.tight_layout()
  figure.savefig(path, dpi=100)


if __name__ == "__main__":
  main(sys.argv[1:])
