"""Evaluation of a generator in the loop: figures, sample grid, plots."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from drift_jax.metrics.evaluators import Evaluator, baselines
from drift_jax.metrics.generation import evaluate, evaluation_scalars
from drift_jax.metrics.images import save_image
from drift_jax.metrics.plots import plot_diagnostics, plot_drift, plot_frechet
from drift_jax.metrics.writers import MetricWriter, read_jsonl
from drift_jax.system import processes, sharding
from drift_jax.system.console import logger
from drift_jax.system.errors import EvaluationError, naming
from drift_jax.tasks.generator.config import GeneratorConfig
from drift_jax.tasks.generator.evaluators import (
  evaluation_conditions,
  evaluation_labels,
  run_evaluators,
)
from drift_jax.tasks.generator.judges import (
  are_images,
  make_decoder,
  make_pixels,
)
from drift_jax.tasks.generator.samplers import (
  draw_images,
  evenly,
  grid_image,
  make_sampler,
  sample_grid,
)
from drift_jax.tasks.generator.step import GeneratorTask
from drift_jax.training import artifacts
from drift_jax.training.inputs import Readers
from drift_jax.training.run import pad_to_mesh
from drift_jax.training.state import TrainState


class Evaluation:
  """The evaluation in the loop: figures, sample grid and plots."""

  def __init__(
    self,
    config: GeneratorConfig,
    encoders: dict[str, artifacts.Artifact],
    task: GeneratorTask,
    readers: Readers,
    vae: artifacts.Artifact | None,
    mesh: jax.sharding.Mesh,
  ):
    self._config = config
    self._drawn = are_images(config, vae)
    self._decode = make_decoder(vae, mesh)
    self._to_pixels = make_pixels(self._decode, config.eval.pixels)
    self._sampler = make_sampler(task, mesh, config.seed)
    self._batch_size = pad_to_mesh(config.eval.batch_size, mesh)
    self._readers, self._mesh = readers, mesh
    self._evaluators: list[Evaluator] = []
    self._conditions: dict[str, np.ndarray] = {}
    self._baselines: dict[str, float] = {}
    if config.eval.every and config.eval.metrics:
      with naming("eval"):
        self._labels = evaluation_labels(
          config.eval, config.model.num_classes, readers
        )
        self._conditions = evaluation_conditions(config.eval, readers)
        self._evaluators, _ = run_evaluators(
          config, encoders, readers, self._labels, vae, mesh
        )
        self._baselines = baselines(self._evaluators)

  def __call__(
    self,
    step: int,
    state: TrainState,
    check: Callable[[], None],
    writer: MetricWriter,
    path: epath.Path,
  ) -> dict[str, float]:
    """Scalars under eval/; writes the sample grid, of images, and the plots.

    Raises:
      EvaluationError: samples that are not finite, naming the step.
    """
    try:
      results, grid = self._judge(state, check)
    except EvaluationError as error:
      raise EvaluationError(f"evaluation of step {step}: {error}") from error
    if grid is not None:
      if processes.is_first():
        save_image(grid, path / "samples" / f"step_{step:07d}.png")
      writer.write_images(step, {"samples": grid})
    for alpha, figures in results.items():
      logger.info(
        "eval step %d, alpha %g: %s", step, alpha, self._describe(figures)
      )
    self.plot(path)
    return evaluation_scalars(results, self._baselines)

  def _judge(
    self, state: TrainState, check: Callable[[], None]
  ) -> tuple[dict[float, dict[str, float]], np.ndarray | None]:
    """(figures for each alpha, grid of samples that are images)."""
    config = self._config.eval
    params = state.ema[str(config.ema_decay)]
    sample_fn = self._sampler(params, **self._conditions)
    results = {}
    if self._evaluators:
      results = evaluate(
        self._evaluators,
        sample_fn,
        self._labels,
        config.alphas,
        self._batch_size,
        to_pixels=self._to_pixels,
        check=check,
      )
    check()
    if not self._drawn:
      return results, None
    if self._readers.train.conditions is not None:
      return results, self._grid_of_conditions(params)
    grid = sample_grid(
      sample_fn,
      self._decode,
      num_classes=self._config.model.num_classes,
      classes=config.grid_classes,
      per_class=config.grid_per_class,
      alpha=config.alphas[0],
      batch_size=self._batch_size,
    )
    return results, grid

  def _grid_of_conditions(self, params: Any) -> np.ndarray:
    """A row for each of some held-out images: itself, samples of its condition.

    They are of training images if none are held out.
    """
    config = self._config.eval
    images = self._readers.train
    if self._conditions:
      images = self._readers.test()
    rows = evenly(len(images), min(config.grid_classes, len(images)))
    each = np.repeat(rows, config.grid_per_class)
    draw = functools.partial(
      draw_images, decode=self._decode, alpha=config.alphas[0]
    )
    samples = draw(
      self._sampler(params, conditions=images.conditions[each]),
      labels=images.labels[each].astype(np.int32),
      batch_size=self._batch_size,
    )
    reals = draw(
      lambda labels, alpha, index: sharding.put_batch(
        images.fixed(rows[index]), self._mesh
      ),
      labels=images.labels[rows].astype(np.int32),
      batch_size=pad_to_mesh(len(rows), self._mesh),
    )
    samples = samples.reshape(len(rows), -1, *samples.shape[1:])
    table = np.concatenate([reals[:, None], samples], axis=1)
    return grid_image(np.concatenate(table), table.shape[1])

  def _describe(self, figures: dict[str, float]) -> str:
    return ", ".join(
      f"{name} {value:.4g} (real {self._baselines[name]:.4g})"
      if name in self._baselines
      else f"{name} {value:.4g}"
      for name, value in figures.items()
    )

  def best_metric(self, scalars: dict[str, float]) -> dict[str, float] | None:
    """The smallest value over alpha of checkpoint.best_metric."""
    name = self._config.checkpoint.best_metric
    values = [
      value
      for key, value in scalars.items()
      if key.startswith(f"eval/{name}/alpha_")
    ]
    return {name: float(np.min(values))} if values else None

  def plot(self, path: epath.Path) -> None:
    """Draws plots/ from what metrics.jsonl holds so far, if anything."""
    if not processes.is_first() or not (path / "metrics.jsonl").exists():
      return
    records = read_jsonl(path / "metrics.jsonl")
    keys = {key for record in records for key in record}
    if any(key.startswith("drift_rms/") for key in keys):
      plot_drift(records, path / "plots" / "drift_rms.png")
    if any(key.startswith("alignment/") for key in keys):
      plot_diagnostics(records, path / "plots" / "diagnostics.png")
    if any(key.startswith(("eval/fd_", "eval/fid/")) for key in keys):
      plot_frechet(records, path / "plots" / "frechet.png")
