"""Evaluation of a toy: figures against fresh data, and pictures."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from drift_jax.metrics.files import replacing, report_text, write_report
from drift_jax.metrics.plots import plot_diagnostics, plot_toy
from drift_jax.metrics.writers import MetricWriter, read_jsonl
from drift_jax.system import processes, sharding, storage, streams
from drift_jax.system.console import logger
from drift_jax.system.errors import naming
from drift_jax.system.storage import read_npy
from drift_jax.tasks.toy import figures as toy_figures
from drift_jax.tasks.toy import plots as toy_plots
from drift_jax.tasks.toy.config import ToyConfig
from drift_jax.tasks.toy.data import fixed_points, modes_of
from drift_jax.tasks.toy.setup import make_field, toy_sampler
from drift_jax.tasks.toy.step import ToyTask
from drift_jax.training.state import TrainState

# Decay of the loss average per step: about the last 50 steps count.
_LOSS_DECAY = 0.98
# Points of a side of the grid on which the field is drawn, and of each set
# that it is computed from, at most.
_GRID = 17
_FIELD_POINTS = 256
# Number of data sets that are compared with each other for the baselines.
_BASELINE_SETS = 6
# Figures of two sets, each reported with its ratio to the baseline.
_DISTANCES = {
  "energy_distance": toy_figures.energy_distance,
  "sliced_wasserstein": toy_figures.sliced_wasserstein,
}
_MODE_ERROR = "worst_mode_error"


class Evaluation:
  """Figures against fresh data, samples on disk, and the pictures of them."""

  def __init__(
    self,
    config: ToyConfig,
    task: ToyTask,
    mesh: jax.sharding.Mesh,
    path: epath.Path,
    draw: bool,
  ):
    self._drawn = draw and processes.is_first()
    self._config = config
    self._task = task
    self._mesh = mesh
    self._path = path
    self._sample = toy_sampler(config, task, mesh)
    sets = [
      fixed_points(config, config.num_samples, number)
      for number in range(_BASELINE_SETS)
    ]
    self._data = sets[0]
    self._baselines = {
      name: toy_figures.baseline(distance, sets)
      for name, distance in _DISTANCES.items()
    }
    self._modes = modes_of(config.data.distribution, config.data.noise)
    if self._modes is not None:
      covered = [toy_figures.mode_coverage(s, *self._modes) for s in sets]
      errors = [coverage.worst_error for coverage in covered]
      self._baselines[_MODE_ERROR] = float(np.mean(errors))

  def __call__(
    self,
    step: int,
    state: TrainState,
    check: Callable[[], None],
    writer: MetricWriter,
  ) -> dict[str, float]:
    """Scalars under eval/; keeps the samples for the pictures."""
    del writer  # the loop writes the scalars
    points = self._take(step, state)
    check()
    figures, masses = self._judge(points)
    described = (
      f"{name} {value:.4g}"
      + (f" (data {base:.4g})" if (base := self._baselines.get(name)) else "")
      for name, value in figures.items()
    )
    logger.info("eval step %d: %s", step, ", ".join(described))
    scalars = figures | {f"{k}/baseline": v for k, v in self._baselines.items()}
    if self._modes is not None:
      for mode, ratio in enumerate(masses / self._modes.masses):
        scalars[f"mode_ratio/{mode}"] = float(ratio)
    return {f"eval/{name}": value for name, value in scalars.items()}

  def _take(self, step: int, state: TrainState) -> np.ndarray:
    points = self._sample(state.ema[str(self._config.eval.ema_decay)])
    self._save(step, points)
    return points

  def _save(self, step: int, points: np.ndarray) -> None:
    if processes.is_first():
      name = self._path / "samples" / f"step_{step:07d}.npy"
      with replacing(name) as temporary, open(temporary, "wb") as file:
        np.save(file, points)

  def save_first(self, init: Any) -> None:
    """Keeps the samples of a new run's parameters."""
    if not (self._path / "samples" / "step_0000000.npy").exists():
      params = jax.jit(init)(streams.stream(self._config.seed, "params"))
      shardings = sharding.infer_sharding(params, self._mesh)
      self._save(0, self._sample(jax.device_put(params, shardings)))

  def _judge(self, points: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
    """Figures by name, and the mass of each mode."""
    figures = {
      name: distance(points, self._data)
      for name, distance in _DISTANCES.items()
    }
    if self._modes is None:
      return figures, np.zeros(0)
    coverage = toy_figures.mode_coverage(points, *self._modes)
    figures |= {
      "modes_reached": float(coverage.reached),
      _MODE_ERROR: coverage.worst_error,
      "outside_modes": coverage.outside,
    }
    return figures, coverage.masses

  def finish(self, state: TrainState, seconds: float) -> None:
    """Writes figures.json of the final state, and the pictures.

    Args:
      state: final state.
      seconds: time that this process has taken so far.
    """
    step = int(state.step)
    figures, masses = self._judge(self._take(step, state))
    report: dict[str, Any] = {"step": step, "seconds": seconds}
    loss = self._loss_ema()
    if loss is not None:
      report |= {"loss_ema": loss, "loss_ema_decay": _LOSS_DECAY}
    for name, value in figures.items():
      report[name] = value
      if name in self._baselines:
        report[f"{name}_baseline"] = self._baselines[name]
      if name in _DISTANCES:
        report[f"{name}_ratio"] = value / self._baselines[name]
    if self._modes is not None:
      report["mode_masses"] = masses.tolist()
      report["true_mode_masses"] = self._modes.masses.tolist()
    report["num_samples"] = len(self._data)
    report["ema_decay"] = self._config.eval.ema_decay
    if processes.is_first():
      write_report(self._path / "figures.json", report)
      logger.info("Final figures: %s", report_text(report))
    if self._drawn:
      self._draw()

  def _series(self, key: str) -> list[tuple[int, float]]:
    """(step, value) of the lines of metrics.jsonl that have a key."""
    return [
      (int(r["step"]), float(r[key])) for r in self._records() if key in r
    ]

  def _records(self) -> list[dict[str, Any]]:
    file = self._path / "metrics.jsonl"
    return read_jsonl(file) if file.exists() else []

  def _loss_ema(self) -> float | None:
    """Average of the logged losses; a loss k steps later weighs 1 - d^k."""
    average, last = None, 0
    for step, loss in self._series("loss"):
      if step <= last:
        continue
      kept = _LOSS_DECAY ** (step - last)
      average = loss if average is None else kept * average + (1 - kept) * loss
      last = step
    return average

  def plot_curves(self) -> None:
    """Draws the curves that metrics.jsonl has data for."""
    records = self._records() if self._drawn else []
    keys = {key for record in records for key in record}
    if "loss" in keys:
      plot_toy(records, self._path / "plots" / "curves.png")
    if any(key.startswith("alignment/") for key in keys):
      plot_diagnostics(records, self._path / "plots" / "diagnostics.png")

  def _draw(self) -> None:
    """Draws the animation and the field from the samples that were kept."""
    plots, config = self._path / "plots", self._config
    files = storage.entries(self._path / "samples", ".npy")
    with naming("samples"):
      frames = [
        (int(file.stem.removeprefix("step_")), read_npy(file)) for file in files
      ]
    title = config.data.distribution
    toy_plots.save_evolution(
      frames, self._data, plots / "evolution.gif", title=title
    )
    limit = toy_plots.plane_limit(self._data, frames)
    # Cell centres.
    side = (
      np.arange(_GRID, dtype=np.float32) + 0.5
    ) / _GRID * 2 * limit - limit
    grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    count = min(_FIELD_POINTS, len(self._data))
    positives = fixed_points(config, count, _BASELINE_SETS)
    field = make_field(self._task)
    scales = self._series("temperature_scale")
    panels = []
    for step, points in _three(frames):
      # An annealed or learned temperature is logged; take the newest by then.
      scale = ([1.0] + [v for logged, v in scales if logged <= step])[-1]
      v = field(points[:count], positives, grid, scale)
      panels.append((step, points, np.asarray(v)))
    toy_plots.plot_field(
      panels, grid, self._data, plots / "field.png", limit=limit
    )


def _three(frames: toy_plots.Frames) -> toy_plots.Frames:
  """The first frame, one at a tenth of the steps or so, and the last."""
  first, *others, last = frames
  between = sorted(others, key=lambda frame: abs(frame[0] - last[0] / 10))
  return [first, *between[:1], last]
