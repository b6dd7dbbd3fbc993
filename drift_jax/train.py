"""Generator training: `train_and_evaluate(config, workdir)`."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from drift_jax import (
  artifacts,
  experiment,
  metrics,
  processes,
  sharding,
  steps,
)
from drift_jax import config as config_lib
from drift_jax.console import logger
from drift_jax.state import TrainState


@experiment.alone
def train_and_evaluate(config: Any, workdir: str) -> TrainState:
  """Trains the generator that a config describes, evaluating as it goes.

  Continues from the newest checkpoint in the workdir if there is one.

  Args:
    config: ConfigDict of task 'generator'.
    workdir: gets config.json, checkpoints/, metrics.jsonl, TensorBoard
      events, samples/*.png and plots/*.png.

  Returns:
    The final state.

  Raises:
    ConfigError: a config that can't be run, or a workdir in use.
    ArtifactError: an encoder that can't be loaded.
    CheckpointError: a damaged checkpoint.
    DataError, OSError: images that can't be read.
    NonFiniteError: a loss or gradient that is not finite.
    PeerError: any of these, in the first of several processes.
    Preempted: by SIGTERM, with the step saved.
  """
  config = config_lib.parse(config)
  if not isinstance(config, config_lib.GeneratorConfig):
    raise config_lib.ConfigError(f"task={config.task!r}, want 'generator'")
  experiment.drift_arguments(config.drift)  # a mistake there, before data
  mesh = experiment.open_mesh(config.mesh)
  experiment.check_labels(config, mesh)
  config = experiment.of_resumed(config, workdir)
  vae = experiment.load_vae(config.vae, mesh)
  readers = experiment.open_readers(config, vae)
  config = experiment.with_num_classes(config, readers.train)
  encoders = experiment.load_encoders(config.encoders, mesh)
  task = experiment.generator_task(config, encoders, mesh, vae)
  experiment.check_encoders(config, task, encoders, vae)
  experiment.check_shape(readers.train, task.sample_shape, "the model makes")
  feed = experiment.generator_feed(config, readers.train)
  evaluation = Evaluation(config, encoders, task, readers, vae, mesh)
  path = experiment.open_workdir(
    workdir,
    config,
    experiment.frozen_sums(encoders, vae),
    readers.train.class_names,
    readers.facts,
  )

  def put(batch: Any) -> steps.GeneratorBatch:
    return steps.GeneratorBatch(**sharding.put_batch(batch, mesh))

  with experiment.at_end(functools.partial(evaluation.plot, path)):
    return experiment.run(
      config,
      path,
      mesh,
      name="generator",
      init_params=experiment.init_generator(task),
      init_drift=functools.partial(experiment.init_drift, task),
      start_params=experiment.start_params(config, readers.train.class_names),
      step=functools.partial(steps.train_step, task=task),
      frozen=experiment.frozen_params(task, encoders, vae),
      feed=feed,
      put=put,
      evaluate=functools.partial(evaluation, path=path),
      best_metric=evaluation.best_metric,
    )


class Evaluation:
  """The evaluation in the loop: figures, sample grid and plots."""

  def __init__(
    self,
    config: config_lib.GeneratorConfig,
    encoders: dict[str, artifacts.Artifact],
    task: steps.GeneratorTask,
    readers: experiment.Readers,
    vae: artifacts.Artifact | None,
    mesh: jax.sharding.Mesh,
  ):
    self._config = config
    self._decode = experiment.make_decoder(vae, mesh)
    self._to_pixels = experiment.make_pixels(self._decode)
    self._sampler = experiment.make_sampler(task, mesh, config.seed)
    self._batch_size = experiment.pad_to_mesh(config.eval.batch_size, mesh)
    self._evaluators: list[metrics.Evaluator] = []
    self._baselines: dict[str, float] = {}
    if config.eval.every and config.eval.metrics:
      with experiment.naming("eval"):
        self._labels = experiment.evaluation_labels(
          config.eval, config.model.num_classes, readers
        )
        self._evaluators, _ = experiment.run_evaluators(
          config, encoders, readers, self._labels, vae, mesh
        )
        self._baselines = metrics.baselines(self._evaluators)

  def __call__(
    self,
    step: int,
    state: TrainState,
    check: Callable[[], None],
    writer: metrics.MetricWriter,
    path: epath.Path,
  ) -> dict[str, float]:
    """Scalars under eval/; writes the sample grid and the plots.

    Raises:
      EvaluationError: samples that are not finite, naming the step.
    """
    try:
      results, grid = self._judge(state, check)
    except metrics.EvaluationError as error:
      raise metrics.EvaluationError(
        f"evaluation of step {step}: {error}"
      ) from error
    if processes.is_first():
      metrics.save_image(grid, path / "samples" / f"step_{step:07d}.png")
    writer.write_images(step, {"samples": grid})
    for alpha, figures in results.items():
      logger.info(
        "eval step %d, alpha %g: %s", step, alpha, self._describe(figures)
      )
    self.plot(path)
    return metrics.evaluation_scalars(results, self._baselines)

  def _judge(
    self, state: TrainState, check: Callable[[], None]
  ) -> tuple[dict[float, dict[str, float]], np.ndarray]:
    """(figures for each alpha, grid of samples)."""
    config = self._config.eval
    sample_fn = self._sampler(state.ema[str(config.ema_decay)])
    results = {}
    if self._evaluators:
      results = metrics.evaluate(
        self._evaluators,
        sample_fn,
        self._labels,
        config.alphas,
        self._batch_size,
        to_pixels=self._to_pixels,
        check=check,
      )
    check()
    grid = experiment.sample_grid(
      sample_fn,
      self._decode,
      num_classes=self._config.model.num_classes,
      classes=config.grid_classes,
      per_class=config.grid_per_class,
      alpha=config.alphas[0],
      batch_size=self._batch_size,
    )
    return results, grid

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
    records = metrics.read_jsonl(path / "metrics.jsonl")
    keys = {key for record in records for key in record}
    if any(key.startswith("drift_rms/") for key in keys):
      metrics.plot_drift(records, path / "plots" / "drift_rms.png")
    if any(key.startswith("alignment/") for key in keys):
      metrics.plot_diagnostics(records, path / "plots" / "diagnostics.png")
    if any(key.startswith(("eval/fd_", "eval/fid/")) for key in keys):
      metrics.plot_frechet(records, path / "plots" / "frechet.png")
