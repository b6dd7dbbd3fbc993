"""Evaluation of a toy: figures against fresh data, and pictures."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from drift_jax.data.npy import read_npy
from drift_jax.metrics.files import replacing, report_text, write_report
from drift_jax.metrics.plots import plot_diagnostics, plot_toy
from drift_jax.metrics.writers import MetricWriter, read_jsonl
from drift_jax.system import processes, sharding, storage, streams
from drift_jax.system.console import logger
from drift_jax.system.errors import naming
from drift_jax.tasks.toy.config import ToyConfig
from drift_jax.tasks.toy.data import fixed_points, modes_of
from drift_jax.tasks.toy.figures import (
  baseline,
  energy_distance,
  mode_coverage,
  sliced_wasserstein,
)
from drift_jax.tasks.toy.plots import plane_limit, plot_field, save_evolution
from drift_jax.tasks.toy.setup import make_field, toy_sampler
from drift_jax.tasks.toy.step import ToyTask
from drift_jax.training.state import TrainState

# Of the loss, each step: about the last 50 steps count.
_LOSS_DECAY = 0.98


# Points of a side of the grid on which the field is drawn, and of each set
# that it is computed from, at most.
_GRID = 17


_FIELD_POINTS = 256


# Sets of data whose figures against each other are the baselines.
_BASELINE_SETS = 6


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
    self._drawn = draw
    self._config = config
    self._task = task
    self._mesh = mesh
    self._path = path
    self._sample = toy_sampler(config, task, mesh)
    section = config.data
    count = config.eval.num_samples
    if config.has_particles:
      count = config.batch.generated
    self._data, *others = [
      fixed_points(
        section.distribution,
        count,
        section.noise,
        seed=config.seed,
        number=number,
      )
      for number in range(_BASELINE_SETS)
    ]
    self._modes = modes_of(section.distribution, section.noise)
    sets = [self._data, *others]
    self._baselines = {
      "energy_distance": baseline(energy_distance, sets),
      "sliced_wasserstein": baseline(sliced_wasserstein, sets),
    }
    if self._modes is not None:
      errors = [mode_coverage(s, *self._modes).worst_error for s in sets]
      self._baselines["worst_mode_error"] = float(np.mean(errors))

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
    logger.info(
      "eval step %d: %s",
      step,
      ", ".join(
        f"{name} {value:.4g}"
        + (f" (data {base:.4g})" if (base := self._baselines.get(name)) else "")
        for name, value in figures.items()
      ),
    )
    scalars = {f"eval/{name}": value for name, value in figures.items()}
    for name, value in self._baselines.items():
      scalars[f"eval/{name}/baseline"] = value
    if self._modes is not None:
      for mode, ratio in enumerate(masses / self._modes.masses):
        scalars[f"eval/mode_ratio/{mode}"] = float(ratio)
    return scalars

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
      params = jax.device_put(params, shardings)
      self._save(0, self._sample(params))

  def _judge(self, points: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
    """Figures by name, and the mass of each mode."""
    figures = {
      "energy_distance": energy_distance(points, self._data),
      "sliced_wasserstein": sliced_wasserstein(points, self._data),
    }
    if self._modes is None:
      return figures, np.zeros(0)
    found = mode_coverage(points, *self._modes)
    figures |= {
      "modes_reached": float(found.reached),
      "worst_mode_error": found.worst_error,
      "outside_modes": found.outside,
    }
    return figures, found.masses

  def finish(self, state: TrainState, seconds: float) -> None:
    """Writes figures.json of the final state.

    Args:
      state: the final one.
      seconds: this process has taken so far.
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
        base = self._baselines[name]
        report[f"{name}_baseline"] = base
        if name != "worst_mode_error":
          report[f"{name}_ratio"] = value / base
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

  def _records(self) -> list[dict[str, Any]]:
    file = self._path / "metrics.jsonl"
    return list(read_jsonl(file)) if file.exists() else []

  def _loss_ema(self) -> float | None:
    """Of the losses in metrics.jsonl: one logged k steps on weighs 1 - d^k."""
    average, last = None, 0
    for record in self._records():
      if "loss" not in record or record["step"] <= last:
        continue
      kept = _LOSS_DECAY ** (record["step"] - last)
      loss, last = float(record["loss"]), int(record["step"])
      average = loss if average is None else kept * average + (1 - kept) * loss
    return average

  def _temperature_scale(self, step: int) -> float:
    """Of annealed and learned temperatures, at the last logged step by then."""
    scales = [
      float(record["temperature_scale"])
      for record in self._records()
      if "temperature_scale" in record and record["step"] <= step
    ]
    return scales[-1] if scales else 1.0

  def plot_curves(self) -> None:
    """Draws the curves from what metrics.jsonl holds so far, if anything."""
    drawn = self._drawn and processes.is_first()
    records = self._records() if drawn else []
    if any("loss" in record for record in records):
      plot_toy(records, self._path / "plots" / "curves.png")
    if any(key.startswith("alignment/") for r in records for key in r):
      plot_diagnostics(records, self._path / "plots/diagnostics.png")

  def _draw(self) -> None:
    """Draws the animation and the field from the samples that were kept."""
    plots = self._path / "plots"
    files = storage.entries(self._path / "samples", ".npy")
    with naming("samples"):
      frames = [
        (int(file.stem.removeprefix("step_")), read_npy(file)) for file in files
      ]
    section = self._config.data
    save_evolution(
      frames, self._data, plots / "evolution.gif", title=section.distribution
    )
    limit = plane_limit(self._data, frames)
    # Cell centres.
    side = (
      np.arange(_GRID, dtype=np.float32) + 0.5
    ) / _GRID * 2 * limit - limit
    grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    count = min(_FIELD_POINTS, len(self._data))
    positives = fixed_points(
      section.distribution,
      count,
      section.noise,
      seed=self._config.seed,
      number=_BASELINE_SETS,
    )
    field = make_field(self._task)
    panels = []
    for step, points in _three(frames):
      scale = self._temperature_scale(step)
      v = field(points[:count], positives, grid, scale)
      panels.append((step, points, np.asarray(v)))
    plot_field(panels, grid, self._data, plots / "field.png", limit=limit)


def _three(
  frames: list[tuple[int, np.ndarray]],
) -> list[tuple[int, np.ndarray]]:
  """The first frame, one at a tenth of the steps or so, and the last."""
  first, *others, last = frames
  between = sorted(others, key=lambda frame: abs(frame[0] - last[0] / 10))
  return [first, *between[:1], last]
