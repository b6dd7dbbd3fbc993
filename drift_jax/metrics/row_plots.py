"""Rows of a table of runs as a picture."""

import dataclasses
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from drift_jax.metrics import files, plots

_ABOVE = {
  "xytext": (0, 7),
  "textcoords": "offset points",
  "ha": "center",
  "fontsize": 8,
}


@dataclasses.dataclass(frozen=True)
class PlottedRow:
  """A row of `plot_rows`.

  Attributes:
    label: its name.
    values: one of each seed.
    paper: the paper's value, or the range (lowest, highest) that it lies in;
      None if nothing is known of it.
  """

  label: str
  values: tuple[float, ...]
  paper: float | tuple[float, float] | None


def plot_rows(
  rows: Sequence[PlottedRow],
  path: files.PathLike,
  *,
  figure: str,
  title: str,
  source: str,
  real: float | None = None,
) -> None:
  """Draws rows of a table: each seed, mean and deviation; the paper's FID.

  The two have axes of their own: they are of different data and scales. Points
  on a logarithmic axis if values differ by more than a factor of 5.

  Args:
    rows: from top to bottom; those without finite values stay empty.
    path: PNG file to write.
    figure: what the values are.
    title: of which runs.
    source: whose values `paper` are.
    real: the figure of real images, a dashed line.
  """
  size = 10.0, 1.7 + 0.42 * len(rows)
  drawing, ((ours, paper),) = plots.new_figure(
    size, 1, 2, grid="x", sharey=True, width_ratios=(3, 2)
  )
  # 1. What was measured, and what was published.
  shown: list[float] = [] if real is None else [real]
  known: list[float] = []
  for y, row in enumerate(rows):
    shown += _draw_seeds(ours, y, row.values)
    if row.paper is not None:
      known += _draw_published(paper, y, row.paper)
  if real is not None:
    plots.dashed_line(ours, real, vertical=True)
  # 2. Axes and their names.
  for axis, values in ((ours, shown), (paper, known)):
    axis.margins(x=0.12)
    if values and min(values) > 0 and max(values) > 5 * min(values):
      plots.log_scale(axis, "x")
  ours.set_yticks(range(len(rows)), [row.label for row in rows])
  ours.set_ylim(len(rows) - 0.5, -0.7)
  name = f"{figure}, Fréchet distance" if figure.startswith("fd_") else figure
  dashed = "" if real is None else f"; dashed: real images, {real:.3g}"
  ours.set_xlabel(
    f"{name}{dashed}\ndots: seeds; mean ± sample standard deviation"
  )
  ours.set_title(title, fontsize=10)
  wrapped = textwrap.fill(source, 34)
  paper.set_xlabel(f"FID-50K, ImageNet 256 px\n{wrapped}")
  paper.set_title("published", fontsize=10)
  if not known:
    paper.text(
      0.5, 0.5, "not given here", transform=paper.transAxes, ha="center"
    )
    paper.set_xticks([])
  plots.save_figure(drawing, path)


def _draw_seeds(axis: Any, y: int, values: Sequence[float]) -> list[float]:
  """Draws dots, their mean and deviation; returns the finite ones."""
  finite = np.asarray(values, np.float64)
  finite = finite[np.isfinite(finite)]
  if len(finite):
    mean = float(finite.mean())
    spread = float(finite.std(ddof=1)) if len(finite) > 1 else 0.0
    colour = plots.COLOURS[0]
    axis.plot(finite, np.full(len(finite), y), "o", color=colour, alpha=0.35)
    axis.errorbar(mean, y, xerr=spread, fmt="D", color=colour, capsize=4)
    text = f"{mean:.3g}" + (f" ± {spread:.2g}" if len(finite) > 1 else "")
    axis.annotate(text, (mean, y), **_ABOVE)
  elif len(values):
    place = axis.get_yaxis_transform()
    axis.text(0.02, y, "not finite", transform=place, va="center", fontsize=8)
  return finite.tolist()


def _draw_published(
  axis: Any, y: int, value: float | tuple[float, float]
) -> tuple[float, float]:
  """Draws a value or a range; returns the ends."""
  low, high = value if isinstance(value, tuple) else (value, value)
  if low == high:
    axis.plot(low, y, "D", color=plots.COLOURS[1])
    text = f"{low:.2f}"
  else:
    axis.plot(
      (low, high), (y, y), color=plots.COLOURS[1], linewidth=4, alpha=0.4
    )
    text = f"within {low:g} to {high:g}"
  axis.annotate(text, ((low * high) ** 0.5, y), **_ABOVE)
  return low, high
