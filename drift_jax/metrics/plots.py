"""Curves of a run as PNG files, drawn from the records of metrics.jsonl.

Figures are made with Matplotlib's objects and its Agg canvas: no pyplot, no
global state, no display. It is imported at use: it takes most of a second.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from drift_jax.metrics import files
from drift_jax.system import paths

Records = Sequence[Mapping[str, float | int]]


class Panel(NamedTuple):
  """A panel of curves over steps.

  Attributes:
    title: of its y axis.
    keys: regular expression of the records' keys, a line for each; its group,
      if there is one, is what a line is of.
    line: a line's name, formatted with the group; '': the group or key itself.
    limits: of the y axis; None: logarithmic.
    dashed: (key of the level, or the level itself; name) of a dashed line.
  """

  title: str
  keys: str
  line: str = ""
  limits: tuple[float | None, float | None] | None = None
  dashed: tuple[str | float, str] | None = None


_NUMBER = "([0-9.eE+-]+)"
_TEMPERATURE = "temperature {}"
_SHARE = (-0.03, 1.03)
_DRIFT = (
  Panel(
    "raw drift, RMS\n(normalised feature units)",
    f"drift_rms/{_NUMBER}",
    _TEMPERATURE,
  ),
)
_DIAGNOSTICS = tuple(
  # A learned scale is of all temperatures.
  Panel(title, f"{name}(?:/{_NUMBER})?", _TEMPERATURE, limits)
  for name, title, limits in (
    ("neighbours", "effective positives\nof a sample", None),
    ("alignment", "cosine of attraction\nand repulsion", (-1.02, 1.02)),
    ("self_mass", "own share of a\nsample's repulsion", _SHARE),
    ("marginal_error", "how unequally\npositives attract", _SHARE),
    ("temperature_scale", "scale of the\ntemperatures", None),
  )
)
_MAE = (
  Panel(
    "reconstruction loss\n(squared error per masked position)", "recon_loss"
  ),
  Panel("classification accuracy\n(fraction)", "accuracy", limits=_SHARE),
)
_TOY = (
  Panel("loss\n(mean of squares of V)", "loss", "generated"),
  *(
    Panel(
      name.replace("_", " "),
      f"eval/{name}",
      "generated",
      dashed=(f"eval/{name}/baseline", "data vs data"),
    )
    for name in ("energy_distance", "sliced_wasserstein")
  ),
  Panel(
    "mass of each mode\n(over its true one)",
    f"eval/mode_ratio/{_NUMBER}",
    "mode {}",
    (0, None),
    dashed=(1.0, "true"),
  ),
)
_POLICY = (
  Panel("success rate", "eval/(.*)/success_rate", limits=_SHARE),
  Panel("share of episodes", "eval/(.*/mode/.*)", limits=_SHARE),
)
_POLICY_DRIFT = Panel("RMS of the raw drift", "drift_rms/[^/]+")
_LOSS = Panel("loss", "loss")

_TITLES = {"fid": "FID", "inception_score": "Inception score"}
COLOURS = "#1f6fb4 #d1632a #2f8f5b #8a56a8 #b08a1e #3aa5b5 #b3446c".split()
_BESIDE = {"loc": "upper left", "bbox_to_anchor": (1, 1)}


def new_figure(
  size: tuple[float, float], *shape: int, grid: str = "both", **options: Any
) -> tuple[Any, Any]:
  """(figure of that many inches, axes [rows, columns]) in the house's style.

  Args:
    size: width and height.
    shape: rows and columns.
    grid: axis whose grid is drawn.
    options: of Matplotlib's Figure.subplots.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=size, layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.subplots(*shape, squeeze=False, **options)
  for axis in axes.flat:
    axis.grid(True, axis=grid, color="0.88", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
  return figure, axes


def save_figure(figure: Any, path: files.PathLike) -> None:
  """Writes a figure of Matplotlib; the path's suffix says in which format.

  Raises:
    ValueError: a suffix that Matplotlib does not write.
  """
  valid = [f".{name}" for name in figure.canvas.get_supported_filetypes()]
  suffix = paths.check_suffix(path, valid)
  with files.replacing(path) as temporary:
    figure.savefig(temporary, format=suffix[1:], dpi=130)


def dashed_line(
  axis: Any, level: float, label: str = "", *, vertical: bool = False
) -> None:
  """Draws the level that values are compared with."""
  line = axis.axvline if vertical else axis.axhline
  line(level, color="0.3", linestyle="--", linewidth=1.2, label=label)


def _curves(panels: int, height: float) -> tuple[Any, list[Any]]:
  """(figure, axes) of panels one below the other, over training steps."""
  from matplotlib import ticker

  figure, axes = new_figure((7.5, height * panels), panels, 1, sharex=True)
  axes[-1, 0].set_xlabel("training step")
  axes[-1, 0].xaxis.set_major_locator(
    ticker.MaxNLocator(8, steps=[1, 2, 5, 10], integer=True)
  )
  return figure, list(axes[:, 0])


def _draw(
  axis: Any, steps: np.ndarray, values: np.ndarray, label: str, number: int
) -> None:
  style = {"linewidth": 1.6, "markersize": 4, "label": label}
  marker = "o" if len(steps) <= 30 else ""
  colour = COLOURS[number % len(COLOURS)]
  axis.plot(steps, values, color=colour, marker=marker, **style)


def log_scale(axis: Any, which: str = "y") -> None:
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


def _keys(records: Records) -> list[str]:
  return sorted({key for record in records for key in record})


def _series(records: Records, key: str) -> tuple[np.ndarray, np.ndarray]:
  """(steps, finite values) of one key in ascending order of steps."""
  points = sorted(
    (record["step"], record[key])
    for record in records
    if key in record and np.isfinite(record[key])
  )
  steps, values = zip(*points, strict=True) if points else ((), ())
  return np.asarray(steps), np.asarray(values)


def _lines(panel: Panel, keys: Sequence[str]) -> list[tuple[str, str]]:
  """(key, name) of a panel's lines, by number and then by name."""
  lines = []
  for match in filter(None, (re.fullmatch(panel.keys, key) for key in keys)):
    name = match[1] or "all" if match.re.groups else match[0]
    try:
      order, name = float(name), f"{float(name):g}"
    except ValueError:
      order = float("inf")
    lines.append((order, match[0], (panel.line or "{}").format(name)))
  return [line[1:] for line in sorted(lines)]


def _plot(
  records: Records,
  panels: Sequence[Panel],
  path: files.PathLike,
  *,
  height: float,
  legend: Mapping[str, Any] | None = None,
) -> None:
  """Draws those of the panels that the records have keys of.

  Raises:
    ValueError: there are none.
  """
  keys = _keys(records)
  shown = [(panel, lines) for panel in panels if (lines := _lines(panel, keys))]
  if not shown:
    expected = [repr(panel.keys.replace(_NUMBER, "NUMBER")) for panel in panels]
    dots = " ..." if len(keys) > 20 else ""
    raise ValueError(
      f"{path}: no {' or '.join(expected) or 'distance'} in {len(records)}"
      f" records; their keys are {', '.join(keys[:20]) or 'none'}{dots}"
    )
  figure, axes = _curves(len(shown), height)
  for axis, (panel, lines) in zip(axes, shown, strict=True):
    for i, (key, name) in enumerate(lines):
      _draw(axis, *_series(records, key), name, i)
    level, name = panel.dashed or ("", "")
    if isinstance(level, str):
      level = next(reversed(_series(records, level)[1].tolist()), None)
    if level is not None:
      dashed_line(axis, level, f"{name}: {level:.3g}")
    axis.set_ylabel(panel.title)
    if panel.limits is None:
      log_scale(axis)
    else:
      axis.set_ylim(*panel.limits)
    if panel.line or len(lines) > 1:
      axis.legend(frameon=False, **(legend or {}))
  save_figure(figure, path)


def plot_drift(records: Records, path: files.PathLike) -> None:
  """Draws the raw drift's RMS of each temperature over steps, logarithmic.

  Each ends near the level that a batch of reals has in the samples' place, from
  above or, if its kernels reached nothing at first, from below.

  Args:
    records: dicts with "step" and `drift_rms/TEMPERATURE`, the root mean square
      of the drift before its normalisation; other keys are ignored.
    path: PNG file to write.

  Raises:
    ValueError: when no record holds such a key.
  """
  _plot(records, _DRIFT, path, height=4.2)


def plot_diagnostics(records: Records, path: files.PathLike) -> None:
  """Draws diagnostics of the field over steps, a panel for each.

  Args:
    records: dicts with "step" and NAME/TEMPERATURE; NAME is one of
      neighbours (effective positives of a sample), alignment (cosine of
      attraction and repulsion), self_mass (share of a sample's repulsion that
      is its own), marginal_error (how unequally positives attract, 0 to 1),
      temperature_scale; or temperature_scale, of all.
    path: PNG file to write.

  Raises:
    ValueError: when no record holds such a key.
  """
  _plot(records, _DIAGNOSTICS, path, height=2.6)


def plot_frechet(records: Records, path: files.PathLike) -> None:
  """Draws Frechet distances over steps, a panel for each feature space.

  Args:
    records: dicts with "step", `eval/fd_NAME/alpha_A` (a line for each guidance
      scale A) and `eval/fd_NAME/baseline` (real training images against
      held-out ones: a dashed line).
    path: PNG file to write.

  Raises:
    ValueError: when no record holds such a key.
  """
  matches = (re.match("eval/(fid|fd_[^/]+)/", key) for key in _keys(records))
  panels = [
    Panel(
      f"{space}\nFréchet distance (squared feature units)",
      f"eval/{re.escape(space)}/alpha_{_NUMBER}",
      "α = {}",
      dashed=(f"eval/{space}/baseline", "real train vs held-out"),
    )
    for space in sorted({match[1] for match in matches if match})
  ]
  _plot(records, panels, path, height=3.6)


def plot_mae(records: Records, path: files.PathLike) -> None:
  """Draws reconstruction loss and accuracy of encoder training over steps.

  Args:
    records: dicts with "step" and `recon_loss` (squared error summed over
      channels, averaged over masked positions), `accuracy` in [0, 1], or both.
    path: PNG file to write.

  Raises:
    ValueError: when no record holds either key.
  """
  _plot(records, _MAE, path, height=3.2)


def plot_toy(records: Records, path: files.PathLike) -> None:
  """Draws loss and figures of a toy run over steps, a panel for each.

  Args:
    records: dicts with "step", `loss`, `eval/energy_distance` and
      `eval/sliced_wasserstein` with their `.../baseline` (data against data:
      dashed), and `eval/mode_ratio/K`, the mass of each mode over its true one.
      Those that are there are drawn.
    path: PNG file to write.

  Raises:
    ValueError: when no record holds any of them.
  """
  _plot(records, _TOY, path, height=2.5)


def plot_policy(records: Records, path: files.PathLike) -> None:
  """Draws success and training of a policy's run over steps.

  Args:
    records: dicts with "step", `eval/SAMPLER/success_rate` of each sampler,
      `eval/SAMPLER/mode/NAME`, `drift_rms/TAU` or, if nothing drifts, `loss`.
      Those that are there are drawn.
    path: PNG file to write.

  Raises:
    ValueError: when no record holds any of them.
  """
  training = _POLICY_DRIFT if _lines(_POLICY_DRIFT, _keys(records)) else _LOSS
  _plot(records, (*_POLICY, training), path, height=2.5, legend=_BESIDE)


def plot_policies(
  curves: Mapping[str, Mapping[str, Sequence[Records]]], path: files.PathLike
) -> None:
  """Draws success of methods over steps, a panel for each environment.

  Args:
    curves: {environment: {method: records of each seed}}; records are dicts
      with "step" and "success_rate". Seeds are thin lines, their mean is thick
      at the steps that all of them have.
    path: PNG file to write.
  """
  figure, axes = _curves(len(curves), 3.0)
  for axis, (environment, methods) in zip(axes, curves.items(), strict=True):
    for i, (method, seeds) in enumerate(methods.items()):
      colour = COLOURS[i % len(COLOURS)]
      series = [_series(records, "success_rate") for records in seeds]
      for steps, values in series:
        axis.plot(steps, values, color=colour, linewidth=0.7, alpha=0.5)
      by_step = [dict(zip(*each, strict=True)) for each in series]
      common = sorted(set.intersection(*map(set, by_step)))
      means = [np.mean([seed[step] for seed in by_step]) for step in common]
      _draw(axis, np.asarray(common), np.asarray(means), method, i)
    axis.set_title(environment, loc="left", fontsize=10)
    axis.set_ylabel("success rate")
    axis.set_ylim(*_SHARE)
    axis.legend(frameon=False, **_BESIDE)
  save_figure(figure, path)


def plot_alphas(
  results: Mapping[float, Mapping[str, float]], path: files.PathLike
) -> None:
  """Draws figures over the guidance scale, a panel for each (Fig. 5).

  Args:
    results: {alpha: {figure: value}}, at least two alphas: Frechet distances
      and the Inception score are drawn, with a mark at each one's best alpha.
    path: PNG file to write.

  Raises:
    ValueError: fewer than two alphas, or no such figure.
  """
  from matplotlib import ticker

  alphas = sorted(results)
  names = [
    name
    for name in results[alphas[0]]
    if name in _TITLES or name.startswith("fd_")
  ]
  if len(alphas) < 2 or not names:
    raise ValueError(
      f"{path}: a plot over alpha needs at least two alphas, and a Frechet"
      f" distance or an Inception score; got alphas {alphas} and figures"
      f" {sorted(results[alphas[0]])}"
    )
  figure, axes = _curves(len(names), 3.0)
  for axis, name in zip(axes, names, strict=True):
    values = np.asarray([results[alpha][name] for alpha in alphas])
    highest = name == "inception_score"
    _draw(axis, np.asarray(alphas), values, name, int(highest))
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
