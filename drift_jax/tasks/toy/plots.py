"""Pictures of points in the plane: their evolution, and the field among them.

Figures are made as in metrics/plots.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from drift_jax.metrics import files
from drift_jax.metrics.plots import save_figure

Points = Float[np.ndarray, "N 2"]
# (training step, samples then).
Frames = Sequence[tuple[int, np.ndarray]]

_DATA_COLOUR, _SAMPLE_COLOUR = "0.62", "#d1632a"
# Milliseconds: the first and the last frame are to be looked at.
_FRAME_MS, _FIRST_MS, _LAST_MS = 120, 800, 2500
# A colour for each shade that matters: the files stay small.
_PALETTE = 48
# Cells of a side of the histogram that a density is drawn from.
_BINS = 80


def plane_limit(data: np.ndarray, frames: Frames) -> float:
  """Half the side of the square about 0 that shows the data and the frames.

  All data, and most of what is generated: in between, samples may fly far.
  """
  sets = [(data, 1.0), *((points, 0.9) for _, points in frames)]
  reach = [np.quantile(np.abs(x).max(axis=1), share) for x, share in sets]
  return 1.15 * float(np.max(reach))


def _panels(
  rows: int, columns: int, size: tuple[float, float], **options: Any
) -> tuple[Any, list[Any]]:
  """(figure, axes row by row)."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=size, layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.subplots(rows, columns, squeeze=False, **options)
  for axis in axes.flat:
    axis.tick_params(labelsize=8)
  return figure, list(axes.flat)


def _plane(panels: int, limit: float) -> tuple[Any, list[Any]]:
  """(figure, square axes side by side, with one unit for x and y)."""
  figure, axes = _panels(1, panels, (4.4 * panels, 4.6))
  for axis in axes:
    axis.set(
      xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xlabel="x"
    )
  axes[0].set_ylabel("y")
  return figure, axes


def _dots(axis: Any, points: np.ndarray, colour: str, label: str) -> Any:
  """Draws points as small dots; returns them."""
  return axis.scatter(
    *np.asarray(points).T,
    s=5,
    linewidths=0,
    color=colour,
    alpha=0.65,
    label=label,
    rasterized=True,
  )


def save_evolution(
  frames: Frames, data: Points, path: files.PathLike, *, title: str
) -> None:
  """An animated GIF of the samples over training, the data in grey below.

  Axes are the same in all frames; each says its step.

  Args:
    frames: in the order of steps, at least one.
    data: [N, 2], drawn under every frame.
    path: GIF file to write.
    title: name of the distribution.
  """
  # 1. The parts that stand still
  figure, (axis,) = _plane(1, plane_limit(data, frames))
  _dots(axis, data, _DATA_COLOUR, "data")
  moving = _dots(axis, frames[0][1], _SAMPLE_COLOUR, "generated")
  axis.legend(
    loc="upper right", fontsize=8, markerscale=2.5, framealpha=0.9, ncols=2
  )
  digits = len(str(frames[-1][0]))
  axis.set_title(title, family="monospace", size=9)
  figure.canvas.draw()
  figure.set_layout_engine("none")  # nothing moves but the samples
  # 2. The frames
  images = []
  for step, points in frames:
    moving.set_offsets(points)
    axis.set_title(
      f"{title}, step {step:>{digits}}", family="monospace", size=9
    )
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]
    images.append(Image.fromarray(pixels.copy()))
  # 3. One palette: the last frame has all the colours of the others
  palette = images[-1].quantize(_PALETTE)
  first, *others = (
    image.quantize(palette=palette, dither=Image.Dither.NONE)
    for image in images
  )
  durations = [_FRAME_MS] * len(images)
  durations[0], durations[-1] = _FIRST_MS, _LAST_MS
  with files.replacing(path) as temporary:
    first.save(
      temporary,
      format="GIF",
      save_all=True,
      append_images=others,
      duration=durations,
      loop=0,
    )


def _density(points: np.ndarray, limit: float) -> np.ndarray:
  """[y, x] of a smoothed histogram over the square; its maximum is 1."""
  from scipy import ndimage

  bins = np.linspace(-limit, limit, _BINS + 1)
  counts, _, _ = np.histogram2d(points[:, 1], points[:, 0], bins=(bins, bins))
  smooth = ndimage.gaussian_filter(counts, 1.5)
  return smooth / max(smooth.max(), 1e-12)


def plot_field(
  panels: Sequence[tuple[int, np.ndarray, np.ndarray]],
  grid: Float[np.ndarray, "Q 2"],
  data: Points,
  path: files.PathLike,
  *,
  limit: float,
) -> None:
  """The field at the points of a grid, over the densities, at some steps.

  All arrows have one length: their direction is the field's, their colour its
  length, on one logarithmic scale for all panels. There are none where the
  field is ten thousand times weaker than where it is strongest.

  Args:
    panels: (step, samples [N, 2], field [Q, 2] at the grid) each.
    grid: points at which the field is given.
    data: [M, 2], grey; the samples are drawn as contours.
    path: PNG file to write.
    limit: half the side of the square that is shown.
  """
  from matplotlib.cm import ScalarMappable
  from matplotlib.colors import LogNorm

  lengths = np.stack([np.linalg.norm(v, axis=1) for _, _, v in panels])
  top = max(float(lengths.max()), 1e-12)
  norm = LogNorm(top / 1e4, top)
  figure, axes = _plane(len(panels), limit)
  spacing = 2 * limit / len(grid) ** 0.5
  edge = limit * (1 - 1 / _BINS)
  centres = np.linspace(-edge, edge, _BINS)
  for axis, panel, length in zip(axes, panels, lengths, strict=True):
    step, samples, field = panel
    axis.imshow(
      _density(data, limit),
      extent=(-limit, limit, -limit, limit),
      origin="lower",
      cmap="Greys",
      vmax=1.8,  # grey at most, for the arrows to be seen
      interpolation="bilinear",
    )
    axis.contour(
      centres,
      centres,
      _density(samples, limit),
      levels=(0.15, 0.5),
      colors=_SAMPLE_COLOUR,
      linewidths=1.0,
    )
    shown = length >= top / 1e4
    direction = 0.8 * spacing * field[shown] / length[shown, None]
    axis.quiver(
      *grid[shown].T,
      *direction.T,
      length[shown],
      norm=norm,
      cmap="viridis_r",
      angles="xy",
      scale_units="xy",
      scale=1.0,
      pivot="mid",
      width=0.0045,
    )
    axis.set_title(f"step {step}", size=10)
  lengths_of = ScalarMappable(norm, "viridis_r")
  figure.colorbar(lengths_of, ax=axes, label="|V|", shrink=0.85, pad=0.02)
  figure.suptitle(
    "drifting field V: arrows its direction, colour its length; data grey, "
    "samples as contours",
    size=9,
    wrap=True,
  )
  save_figure(figure, path)


def plot_toy_table(
  figures: Mapping[str, Mapping[str, np.ndarray]],
  path: files.PathLike,
  *,
  title: str,
) -> None:
  """Energy distances of every field on every toy, a panel for each toy.

  Args:
    figures: {toy: {field: energy distance to fresh data over that of data to
      data, one for each seed}}.
    path: PNG file to write.
    title: title of the figure.
  """
  columns = min(len(figures), 4)
  rows = -(-len(figures) // columns)
  size = (0.8 + 2.9 * columns, 0.7 + 2.3 * rows)
  drawing, axes = _panels(rows, columns, size, sharex=True)
  for axis in axes[len(figures) :]:
    axis.axis("off")
  for axis, (toy, fields) in zip(axes, figures.items(), strict=False):
    names = list(fields)[::-1]
    for y, name in enumerate(names):
      values = fields[name][np.isfinite(fields[name])]
      axis.plot(
        values, np.full(len(values), y), "o", color=_SAMPLE_COLOUR, alpha=0.4
      )
      if len(values):
        axis.plot(values.mean(), y, "|", color="0.1", markersize=14)
    axis.axvline(1.0, color="0.3", linestyle="--", linewidth=1)
    axis.set_yticks(range(len(names)), names)
    axis.set(title=toy, xscale="log", ylim=(-0.6, len(names) - 0.4))
    axis.title.set_size(9)
    axis.grid(True, axis="x", color="0.88", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(axis="x", labelbottom=True)
  drawing.supxlabel(
    "energy distance to fresh data / data to data (dashed: 1); dots: seeds, "
    "bars: their mean",
    size=9,
  )
  drawing.suptitle(title, size=10)
  save_figure(drawing, path)
