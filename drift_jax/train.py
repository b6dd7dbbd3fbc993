"""Generator training: `train_and_evaluate(config, workdir)`."""

import functools
from typing import Any

import jax
import numpy as np

from drift_jax import config as config_lib
from drift_jax import (
  data,
  experiment,
  loop,
  metrics,
  sharding,
  steps,
)
from drift_jax import state as state_lib
from drift_jax.console import logger
from drift_jax.state import TrainState


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
    ConfigError: a config that can't be run.
    CheckpointError: a damaged checkpoint.
    NonFiniteError: a loss or gradient that is not finite.
  """
  config = config_lib.parse(config)
  if not isinstance(config, config_lib.GeneratorConfig):
    raise config_lib.ConfigError(f"task={config.task!r}, want 'generator'")
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
  experiment.check_divides("batch.labels", config.batch.labels, mesh)
  train = data.make_source(config.data.source, "train")
  encoders = experiment.load_encoders(config.encoders, mesh)
  task = experiment.generator_task(config, encoders)
  experiment.check_source(train, task.sample_shape, config.model.num_classes)
  path = experiment.open_workdir(workdir, config)

  optimizer, schedule = experiment.make_optimizer(
    config.optim, config.train.num_steps
  )
  abstract, init = state_lib.abstract_and_init(
    experiment.init_generator(task),
    optimizer,
    ema_decays=config.ema.decays,
    seed=config.seed,
    mesh=mesh,
  )
  experiment.log_parameters("generator", abstract.params)
  feed = experiment.generator_feed(config, train)
  checkpointer = experiment.make_checkpointer(config.checkpoint, path)
  state = loop.restore_or_start(checkpointer, abstract, init, feed)
  writer = metrics.create_writer(
    path,
    resume_step=int(state.step) or -1,
    is_main=jax.process_index() == 0,
    console=False,
  )
  encoder_params = {name: a.params for name, a in encoders.items()}
  jitted = jax.jit(
    functools.partial(
      steps.train_step, task=task, optimizer=optimizer, schedule=schedule
    ),
    donate_argnums=0,
    out_shardings=(
      jax.tree.map(lambda x: x.sharding, abstract),
      sharding.replicated(mesh),
    ),
  )

  def step_fn(state: TrainState, batch: Any) -> tuple[TrainState, Any]:
    return jitted(state, batch, encoder_params)

  def put(batch: Any) -> steps.GeneratorBatch:
    return steps.GeneratorBatch(**sharding.put_batch(batch, mesh))

  evaluation = Evaluation(config, encoders, task, train, mesh, writer, path)
  try:
    state = loop.fit(
      state,
      step_fn=step_fn,
      feed=feed,
      put=put,
      schedule=loop.Schedule(
        num_steps=config.train.num_steps,
        log_every=config.train.log_every,
        eval_every=config.eval.every,
        checkpoint_every=config.checkpoint.every,
      ),
      evaluate=evaluation,
      best_metric=evaluation.best_metric,
      checkpointer=checkpointer,
      writer=writer,
    )
  finally:
    checkpointer.close()
    writer.close()
  evaluation.plot()
  return state


class Evaluation:
  """The evaluation in the loop: figures, sample grid and plots."""

  def __init__(
    self,
    config: config_lib.GeneratorConfig,
    encoders: Any,
    task: steps.GeneratorTask,
    train: data.ImageSource,
    mesh: jax.sharding.Mesh,
    writer: Any,
    path: Any,
  ):
    self._config = config
    self._writer = writer
    self._path = path
    self._sampler = experiment.make_sampler(task, mesh, config.seed)
    self._batch_size = experiment.pad_to_mesh(config.eval.batch_size, mesh)
    self._labels = metrics.balanced_labels(
      config.eval.num_images, config.model.num_classes
    )
    self._evaluators: list[metrics.Evaluator] = []
    self._baselines: dict[str, float] = {}
    if config.eval.every:
      test = data.make_source(config.data.source, "test")
      self._evaluators = experiment.make_evaluators(
        config, encoders, train, test, mesh
      )
      self._baselines = metrics.baselines(self._evaluators)

  def __call__(self, step: int, state: TrainState) -> dict[str, float]:
    """Scalars under eval/; writes the sample grid and the plots."""
    config = self._config.eval
    sample_fn = self._sampler(state.ema[str(config.ema_decay)])
    results = metrics.evaluate(
      self._evaluators,
      sample_fn,
      self._labels,
      config.alphas,
      self._batch_size,
    )
    grid = experiment.sample_grid(
      sample_fn,
      num_classes=self._config.model.num_classes,
      per_class=config.grid_per_class,
      alpha=config.alphas[0],
      batch_size=self._batch_size,
    )
    if jax.process_index() == 0:
      folder = self._path / "samples"
      folder.mkdir(parents=True, exist_ok=True)
      metrics.save_png(grid, folder / f"step_{step:07d}.png")
      self._writer.write_images(step, {"samples": grid})
    for alpha, figures in results.items():
      text = ", ".join(
        f"{name} {value:.4g} (real {self._baselines[name]:.4g})"
        if name in self._baselines
        else f"{name} {value:.4g}"
        for name, value in figures.items()
      )
      logger.info("eval step %d, alpha %g: %s", step, alpha, text)
    return metrics.evaluation_scalars(results, self._baselines)

  def best_metric(self, scalars: dict[str, float]) -> dict[str, float] | None:
    """The smallest value over alpha of checkpoint.best_metric."""
    name = self._config.checkpoint.best_metric
    values = [
      value
      for key, value in scalars.items()
      if key.startswith(f"eval/{name}/alpha_")
    ]
    return {name: float(np.min(values))} if values else None

  def plot(self) -> None:
    """Draws plots/ from metrics.jsonl."""
    if jax.process_index():
      return
    records = metrics.read_jsonl(self._path / "metrics.jsonl")
    folder = self._path / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    metrics.plot_drift(records, folder / "drift_rms.png")
    if self._evaluators:
      metrics.plot_frechet(records, folder / "frechet.png")
