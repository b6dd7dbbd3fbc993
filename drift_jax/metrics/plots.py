"""Curves of a run as PNG files, drawn from the records of metrics.jsonl.

Figures are made with Matplotlib's objects and its Agg canvas: no pyplot, no
global state, no display. It is imported where something is drawn: it takes most
of a second.
"""

import dataclasses
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from drift_jax.metrics import files
from drift_jax.system import paths

Records = Sequence[Mapping[str, float | int]]

_DRIFT_KEY = re.compile(r"drift_rms/([0-9.eE+-]+)")
_FRECHET_KEY = re.compile(
  r"eval/(fid|fd_[^/]+)/(?:alpha_([0-9.eE+-]+)|baseline)"
)
_TITLES = {"fid": "FID", "inception_score": "Inception score"}
# Axis label and limits of each figure of the field; None: logarithmic.
_DIAGNOSTICS: dict[str, tuple[str, tuple[float, float] | None]] = {
  "neighbours": ("effective positives\nof a sample", None),
  "alignment": ("cosine of attraction\nand repulsion", (-1.02, 1.02)),
  "self_mass": ("own share of a\nsample's repulsion", (-0.02, 1.02)),
  "marginal_error": ("how unequally\npositives attract", (-0.02, 1.02)),
  "temperature_scale": ("scale of the\ntemperatures", None),
}
_COLOURS = (
  "#1f6fb4",
  "#d1632a",
  "#2f8f5b",
  "#8a56a8",
  "#b08a1e",
  "#3aa5b5",
  "#b3446c",
)


def _series(records: Records, key: str) -> tuple[np.ndarray, np.ndarray]:
  """(steps, finite values) of one key in ascending order of steps."""
  points = sorted(
    (record["step"], record[key])
    for record in records
    if key in record and np.isfinite(record[key])
  )
  steps, values = zip(*points, strict=True) if points else ((), ())
  return np.asarray(steps), np.asarray(values)


def _keys(records: Records) -> list[str]:
  return sorted({key for record in records for key in record})


def _figure(panels: int, height: float) -> tuple[Any, list[Any]]:
  from matplotlib import ticker
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(7.5, height * panels), layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
  for axis in axes:
    axis.grid(True, which="major", color="0.88", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
  axes[-1].set_xlabel("training step")
  axes[-1].xaxis.set_major_locator(
    ticker.MaxNLocator(8, steps=[1, 2, 5, 10], integer=True)
  )
  return figure, list(axes)


def _draw(
  axis: Any, steps: np.ndarray, values: np.ndarray, label: str, colour: str
) -> None:
  marker = "o" if len(steps) <= 30 else ""
  axis.plot(
    steps,
    values,
    label=label,
    color=colour,
    linewidth=1.6,
    marker=marker,
    markersize=4,
  )


def _log_scale(axis: Any, which: str = "y") -> None:
  """A logarithmic axis with plain numbers, also within a single decade."""
  from matplotlib import ticker

  axis.set(**{f"{which}scale": "log"})
  scaled = getattr(axis, f"{which}axis")
  low, high = getattr(axis, f"get_{which}lim")()
  # Over many decades the locator leaves out all ticks if it has to choose.
  subs = (1.0, 2.0, 5.0) if high < 1e3 * low else (1.0,)
  scaled.set_major_locator(ticker.LogLocator(subs=subs))
  scaled.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:g}"))
  scaled.set_minor_formatter(ticker.NullFormatter())


def save_figure(figure: Any, path: files.PathLike) -> None:
  """Writes a figure of Matplotlib; the path's suffix says in which format.

  Raises:
    ValueError: a suffix that Matplotlib does not write.
  """
  valid = [f".{name}" for name in figure.canvas.get_supported_filetypes()]
  suffix = paths.check_suffix(path, valid)
  with files.replacing(path) as temporary:
    figure.savefig(temporary, format=suffix[1:], dpi=130)


def _nothing_to_plot(what: str, records: Records) -> ValueError:
  found = _keys(records)
  return ValueError(
    f"no {what} in {len(records)} records; their keys are"
    f" {', '.join(found[:20]) or 'none'}{' ...' if len(found) > 20 else ''}"
  )


def plot_drift(records: Records, path: files.PathLike) -> None:
  """Raw drift RMS of each temperature over steps, logarithmic.

  The loss is nearly constant by construction (each temperature's drift is
  normalised, arXiv:2602.04770, A.6), so this is the curve to watch.

  Args:
    records: dicts with "step" and `drift_rms/TEMPERATURE`, the root mean square
      of the drift before its normalisation; other keys are ignored.
    path: PNG file to write.

  Raises:
    ValueError: when no record holds such a key.
  """
  temperatures = sorted(
    (float(match[1]), key)
    for key in _keys(records)
    if (match := _DRIFT_KEY.fullmatch(key))
  )
  if not temperatures:
    raise _nothing_to_plot("'drift_rms/TEMPERATURE'", records)
  figure, (axis,) = _figure(1, 4.2)
  for i, (temperature, key) in enumerate(temperatures):
    label = f"temperature {temperature:g}"
    colour = _COLOURS[i % len(_COLOURS)]
    _draw(axis, *_series(records, key), label=label, colour=colour)
  _log_scale(axis)
  axis.set_ylabel("raw drift, RMS\n(normalised feature units)")
  axis.legend(frameon=False)
  save_figure(figure, path)


def plot_diagnostics(records: Records, path: files.PathLike) -> None:
  """What is known of the field over steps, a panel for each figure.

  Args:
    records: dicts with "step" and NAME/TEMPERATURE, where NAME is one of
      neighbours (effective positives of a sample), alignment (cosine of
      attraction and repulsion), self_mass (share of a sample's repulsion that
      is its own), marginal_error (how unequally positives attract, 0 to 1);
      temperature_scale.
    path: PNG file to write.

  Raises:
    ValueError: when no record holds such a key.
  """
  found: dict[str, list[tuple[float, str]]] = {}
  for key in _keys(records):
    name, _, temperature = key.partition("/")
    # An adaptive scale has a temperature behind it, a learned one has none.
    if name in _DIAGNOSTICS and "/" not in temperature:
      found.setdefault(name, []).append((float(temperature or "nan"), key))
  if not found:
    raise _nothing_to_plot("'alignment/TEMPERATURE' or the like", records)
  names = [name for name in _DIAGNOSTICS if name in found]
  figure, axes = _figure(len(names), 2.6)
  for axis, name in zip(axes, names, strict=True):
    label, limits = _DIAGNOSTICS[name]
    for i, (temperature, key) in enumerate(sorted(found[name])):
      text = (
        f"temperature {temperature:g}" if "/" in key else "all temperatures"
      )
      colour = _COLOURS[i % len(_COLOURS)]
      _draw(axis, *_series(records, key), label=text, colour=colour)
    axis.set_ylabel(label)
    if limits:
      axis.set_ylim(*limits)
    else:
      _log_scale(axis)
    axis.legend(frameon=False)
  save_figure(figure, path)


def plot_frechet(records: Records, path: files.PathLike) -> None:
  """Frechet distances over steps, a panel for each feature space.

  Args:
    records: dicts with "step", `eval/fd_NAME/alpha_A` (a line for each guidance
      scale A) and `eval/fd_NAME/baseline` (real training images against
      held-out ones: a dashed line).
    path: PNG file to write.

  Raises:
    ValueError: when no record holds such a key.
  """
  spaces: dict[str, list[tuple[float, str]]] = {}
  for key in _keys(records):
    if match := _FRECHET_KEY.fullmatch(key):
      scales = spaces.setdefault(match[1], [])
      if match[2]:
        scales.append((float(match[2]), key))
  if not spaces:
    raise _nothing_to_plot("'eval/fd_NAME/alpha_A'", records)
  figure, axes = _figure(len(spaces), 3.6)
  for axis, (space, scales) in zip(axes, sorted(spaces.items()), strict=True):
    for i, (alpha, key) in enumerate(sorted(scales)):
      colour = _COLOURS[i % len(_COLOURS)]
      _draw(axis, *_series(records, key), label=f"α = {alpha:g}", colour=colour)
    _, baseline = _series(records, f"eval/{space}/baseline")
    if len(baseline):
      axis.axhline(
        baseline[-1],
        color="0.3",
        linestyle="--",
        linewidth=1.2,
        label=f"real train vs held-out: {baseline[-1]:.3g}",
      )
    _log_scale(axis)
    axis.set_ylabel(f"{space}\nFréchet distance (squared feature units)")
    axis.legend(frameon=False)
  save_figure(figure, path)


def plot_alphas(
  results: Mapping[float, Mapping[str, float]], path: files.PathLike
) -> None:
  """Figures over the guidance scale, a panel for each (Fig. 5).

  Args:
    results: {alpha: {figure: value}}, at least two alphas: Frechet distances
      and the Inception score are drawn, with a mark at each one's best alpha.
    path: PNG file to write.

  Raises:
    ValueError: fewer than two alphas, or no such figure.
  """
  alphas = sorted(results)
  names = [
    name
    for name in results[alphas[0]]
    if name in ("fid", "inception_score") or name.startswith("fd_")
  ]
  if len(alphas) < 2 or not names:
    raise ValueError(
      "a plot over alpha needs at least two alphas, and a Frechet distance or"
      f" an Inception score; got alphas {alphas} and figures"
      f" {sorted(results[alphas[0]])}"
    )
  from matplotlib import ticker

  figure, axes = _figure(len(names), 3.0)
  for axis, name in zip(axes, names, strict=True):
    values = np.asarray([results[alpha][name] for alpha in alphas])
    colour = _COLOURS[0 if name != "inception_score" else 1]
    _draw(axis, np.asarray(alphas), values, label=name, colour=colour)
    highest = name == "inception_score"
    best = int(values.argmax() if highest else values.argmin())
    axis.annotate(
      f"{values[best]:.4g} at α = {alphas[best]:g}",
      (alphas[best], values[best]),
      xytext=(0, 7 if highest else -7),
      textcoords="offset points",
      ha="center",
      va="bottom" if highest else "top",
    )
    axis.margins(x=0.16, y=0.18)
    axis.set_ylabel(_TITLES.get(name, f"{name}\n(Fréchet distance)"))
  axes[-1].set_xlabel("guidance scale α")
  axes[-1].xaxis.set_major_locator(ticker.FixedLocator(alphas, nbins=12))
  save_figure(figure, path)


@dataclasses.dataclass(frozen=True)
class PlottedRow:
  """A row of `plot_rows`: its label, a value of each seed, the paper's.

  `paper` is a range (lowest, highest) where that is all that is known of it,
  None where nothing is.
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
  """Rows of a table: each seed, mean and deviation; beside it the paper's FID.

  The two have axes of their own: they are of different data and scales. Points
  on a logarithmic axis where values differ by more than a factor of 5.

  Args:
    rows: from top to bottom; those without finite values stay empty.
    path: PNG file to write.
    figure: what the values are.
    title: of which runs.
    source: whose values `paper` are.
    real: the figure of real images, a dashed line.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  drawing = Figure(figsize=(10, 1.7 + 0.42 * len(rows)), layout="constrained")
  FigureCanvasAgg(drawing)
  ours, paper = drawing.subplots(1, 2, sharey=True, width_ratios=(3, 2))
  shown: list[float] = [] if real is None else [real]
  for y, row in enumerate(rows):
    values = np.asarray(row.values, np.float64)
    values = values[np.isfinite(values)]
    shown += values.tolist()
    if len(values):
      mean = float(values.mean())
      spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
      ours.plot(
        values, np.full(len(values), y), "o", color=_COLOURS[0], alpha=0.35
      )
      ours.errorbar(mean, y, xerr=spread, fmt="D", color=_COLOURS[0], capsize=4)
      text = f"{mean:.3g}" + (f" ± {spread:.2g}" if len(values) > 1 else "")
      ours.annotate(
        text,
        (mean, y),
        xytext=(0, 7),
        textcoords="offset points",
        ha="center",
        fontsize=8,
      )
    elif row.values:
      where = ours.get_yaxis_transform()
      ours.text(0.02, y, "not finite", transform=where, va="center", fontsize=8)
    if row.paper is None:
      continue
    low, high = row.paper if isinstance(row.paper, tuple) else (row.paper,) * 2
    if low == high:
      paper.plot(low, y, "D", color=_COLOURS[1])
      text = f"{low:.2f}"
    else:
      paper.plot((low, high), (y, y), color=_COLOURS[1], linewidth=4, alpha=0.4)
      text = f"within {low:g} to {high:g}"
    paper.annotate(
      text,
      ((low * high) ** 0.5, y),
      xytext=(0, 7),
      textcoords="offset points",
      ha="center",
      fontsize=8,
    )
  if real is not None:
    ours.axvline(real, color="0.3", linestyle="--", linewidth=1.2)
  known = [x for row in rows if row.paper is not None for x in _ends(row.paper)]
  for axis, values in ((ours, shown), (paper, known)):
    axis.grid(True, axis="x", color="0.88", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.12)
    if values and min(values) > 0 and max(values) > 5 * min(values):
      _log_scale(axis, "x")
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
  save_figure(drawing, path)


def _ends(paper: float | tuple[float, float]) -> tuple[float, ...]:
  return paper if isinstance(paper, tuple) else (paper,)


def plot_mae(records: Records, path: files.PathLike) -> None:
  """Reconstruction loss and accuracy of encoder training over steps.

  Args:
    records: dicts with "step" and `recon_loss` (squared error summed over
      channels, averaged over masked positions), `accuracy` in [0, 1], or both.
    path: PNG file to write.

  Raises:
    ValueError: when no record holds either key.
  """
  labels = {
    "recon_loss": "reconstruction loss\n(squared error per masked position)",
    "accuracy": "classification accuracy\n(fraction)",
  }
  present = [key for key in labels if key in _keys(records)]
  if not present:
    raise _nothing_to_plot("'recon_loss' or 'accuracy'", records)
  figure, axes = _figure(len(present), 3.2)
  for i, (axis, key) in enumerate(zip(axes, present, strict=True)):
    _draw(axis, *_series(records, key), label=key, colour=_COLOURS[i])
    axis.set_ylabel(labels[key])
    if key == "accuracy":
      axis.set_ylim(-0.02, 1.02)
    else:
      _log_scale(axis)
  save_figure(figure, path)


def plot_toy(records: Records, path: files.PathLike) -> None:
  """Loss and figures of a toy run over steps, a panel for each.

  Args:
    records: dicts with "step", `loss`, `eval/energy_distance` and
      `eval/sliced_wasserstein` with their `.../baseline` (data against data:
      dashed), and `eval/mode_ratio/K`, the mass of each mode over its true one.
      What there is is drawn.
    path: PNG file to write.

  Raises:
    ValueError: when no record holds any of them.
  """
  labels = {
    "loss": "loss\n(mean of squares of V)",
    "eval/energy_distance": "energy distance",
    "eval/sliced_wasserstein": "sliced Wasserstein",
  }
  keys = _keys(records)
  present = [key for key in labels if key in keys]
  modes = [key for key in keys if key.startswith("eval/mode_ratio/")]
  if not present and not modes:
    raise _nothing_to_plot("'loss' or 'eval/energy_distance'", records)
  figure, axes = _figure(len(present) + bool(modes), 2.5)
  for i, (axis, key) in enumerate(zip(axes, present, strict=False)):
    _draw(axis, *_series(records, key), label="generated", colour=_COLOURS[i])
    _, base = _series(records, f"{key}/baseline")
    if len(base):
      _dashed(axis, base[-1], f"data vs data: {base[-1]:.3g}")
      axis.legend(frameon=False)
    _log_scale(axis)
    axis.set_ylabel(labels[key])
  if modes:
    for i, key in enumerate(modes):
      colour = _COLOURS[i % len(_COLOURS)]
      _draw(axes[-1], *_series(records, key), label=key, colour=colour)
    _dashed(axes[-1], 1.0, "")
    axes[-1].set_ylim(bottom=0)
    axes[-1].set_ylabel("mass of each mode\n(over its true one)")
  save_figure(figure, path)


def plot_policy(records: Records, path: files.PathLike) -> None:
  """Success, and what training did, of a policy's run over steps.

  Args:
    records: dicts with "step", `eval/SAMPLER/success_rate` of each sampler,
      `eval/SAMPLER/mode/NAME`, `drift_rms/TAU` or, where nothing drifts,
      `loss`. What there is is drawn.
    path: PNG file to write.

  Raises:
    ValueError: when no record holds any of them.
  """
  keys = _keys(records)
  rates = [k for k in keys if k.startswith("eval/") and "success_rate" in k]
  modes = [k for k in keys if k.startswith("eval/") and "/mode/" in k]
  drifts = [k for k in keys if k.startswith("drift_rms/") and k.count("/") == 1]
  losses = drifts or [k for k in keys if k == "loss"]
  if not rates and not losses:
    raise _nothing_to_plot("'loss' or 'eval/SAMPLER/success_rate'", records)
  panels = [
    ("success rate", rates),
    ("share of episodes", modes),
    ("RMS of the raw drift" if drifts else "loss", losses),
  ]
  panels = [(label, found) for label, found in panels if found]
  figure, axes = _figure(len(panels), 2.5)
  for axis, (label, found) in zip(axes, panels, strict=True):
    for i, key in enumerate(found):
      colour = _COLOURS[i % len(_COLOURS)]
      name = key.removeprefix("eval/").removesuffix("/success_rate")
      _draw(axis, *_series(records, key), label=name, colour=colour)
    axis.set_ylabel(label)
    if found is losses:
      _log_scale(axis)
    else:
      axis.set_ylim(-0.03, 1.03)
    if len(found) > 1:
      axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
  save_figure(figure, path)


def plot_policies(
  curves: Mapping[str, Mapping[str, Sequence[Records]]], path: files.PathLike
) -> None:
  """Success of methods over steps, a panel for each environment.

  Args:
    curves: {environment: {method: records of each seed}}; records are dicts
      with "step" and "success_rate". Seeds are thin lines, their mean is thick
      at the steps that all of them have.
    path: PNG file to write.
  """
  figure, axes = _figure(len(curves), 3.0)
  for axis, (environment, methods) in zip(axes, curves.items(), strict=True):
    for i, (method, seeds) in enumerate(methods.items()):
      colour = _COLOURS[i % len(_COLOURS)]
      found = [_series(records, "success_rate") for records in seeds]
      for steps, values in found:
        axis.plot(steps, values, color=colour, linewidth=0.7, alpha=0.5)
      by_step = [
        dict(zip(steps.tolist(), values, strict=True))
        for steps, values in found
      ]
      common = sorted(set.intersection(*(set(seed) for seed in by_step)))
      means = [np.mean([seed[step] for seed in by_step]) for step in common]
      _draw(axis, np.asarray(common), np.asarray(means), method, colour)
    axis.set_title(environment, loc="left", fontsize=10)
    axis.set_ylabel("success rate")
    axis.set_ylim(-0.03, 1.03)
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
  save_figure(figure, path)


def _dashed(axis: Any, level: float, label: str) -> None:
  axis.axhline(level, color="0.3", linestyle="--", linewidth=1.2, label=label)
