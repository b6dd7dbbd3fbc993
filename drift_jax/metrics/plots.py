"""Curves of a run as PNG files, drawn from the records of metrics.jsonl.

Figures are made with Matplotlib's objects and its Agg canvas: no pyplot, no
global state, no display. It is imported where something is drawn: it takes most
of a second.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from drift_jax.metrics import files

Records = Sequence[Mapping[str, float | int]]

_DRIFT_KEY = re.compile(r"drift_rms/([0-9.eE+-]+)")
_FRECHET_KEY = re.compile(
  r"eval/(fid|fd_[^/]+)/(?:alpha_([0-9.eE+-]+)|baseline)"
)
_TITLES = {"fid": "FID", "inception_score": "Inception score"}
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


def _log_scale(axis: Any) -> None:
  """Logarithmic y axis with plain numbers, also within a single decade."""
  from matplotlib import ticker

  axis.set_yscale("log")
  axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
  axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:g}"))
  axis.yaxis.set_minor_formatter(ticker.NullFormatter())


def _save(figure: Any, path: files.PathLike) -> None:
  with files.replacing(path) as temporary:
    figure.savefig(temporary, format="png", dpi=130)


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
  _save(figure, path)


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
  _save(figure, path)


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
  _save(figure, path)


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
  _save(figure, path)


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
  _save(figure, path)


def _dashed(axis: Any, level: float, label: str) -> None:
  axis.axhline(level, color="0.3", linestyle="--", linewidth=1.2, label=label)
