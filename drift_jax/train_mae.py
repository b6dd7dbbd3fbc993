"""Encoder pretraining (A.3): `train_and_evaluate(config, workdir)`."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from drift_jax import (
  artifacts,
  data,
  experiment,
  loop,
  metrics,
  sharding,
  steps,
)
from drift_jax import config as config_lib
from drift_jax import state as state_lib
from drift_jax.console import logger
from drift_jax.models import release
from drift_jax.state import TrainState

# Where the trained encoder lies in the workdir: what encoders.NAME.path of a
# generator's config points at.
EXPORT = "encoder"


def train_and_evaluate(config: Any, workdir: str) -> TrainState:
  """Trains the encoder that a config describes and exports its EMA.

  Continues from the newest checkpoint in the workdir if there is one.

  Args:
    config: ConfigDict of task 'mae'.
    workdir: gets config.json, checkpoints/, metrics.jsonl, TensorBoard
      events, plots/mae.png and, at the end, encoder/.

  Returns:
    The final state.

  Raises:
    ConfigError: a config that can't be run.
    CheckpointError: a damaged checkpoint.
    NonFiniteError: a loss or gradient that is not finite.
  """
  config = config_lib.parse(config)
  if not isinstance(config, config_lib.MaeConfig):
    raise config_lib.ConfigError(f"task={config.task!r}, want 'mae'")
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
  experiment.check_divides("mae.batch_size", config.mae.batch_size, mesh)
  train = data.make_source(config.data.source, "train")
  task = experiment.mae_task(config)
  experiment.check_source(
    train,
    (*train.sample_shape[:2], config.model.in_channels),
    config.model.num_classes,
  )
  path = experiment.open_workdir(workdir, config)

  optimizer, schedule = experiment.make_optimizer(
    config.optim, config.train.num_steps
  )
  abstract, init = state_lib.abstract_and_init(
    experiment.init_mae(task, train.sample_shape),
    optimizer,
    ema_decays=config.ema.decays,
    seed=config.seed,
    mesh=mesh,
  )
  experiment.log_parameters("encoder with decoder", abstract.params)
  feed = data.ImageFeed(
    experiment.make_loader(config, train, config.mae.batch_size)
  )
  checkpointer = experiment.make_checkpointer(config.checkpoint, path)
  state = loop.restore_or_start(checkpointer, abstract, init, feed)
  writer = metrics.create_writer(
    path,
    resume_step=int(state.step) or -1,
    is_main=jax.process_index() == 0,
    console=False,
  )
  step_fn = jax.jit(
    functools.partial(
      steps.mae_step, task=task, optimizer=optimizer, schedule=schedule
    ),
    donate_argnums=0,
    out_shardings=(
      jax.tree.map(lambda x: x.sharding, abstract),
      sharding.replicated(mesh),
    ),
  )

  def put(batch: Any) -> steps.MaeBatch:
    batch = sharding.put_batch(batch, mesh)
    return steps.MaeBatch(batch["image"], batch["label"])

  evaluate = held_out_evaluation(config, task, mesh)
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
      evaluate=evaluate,
      best_metric=lambda scalars: None,
      checkpointer=checkpointer,
      writer=writer,
    )
  finally:
    checkpointer.close()
    writer.close()
  decay = config.eval.ema_decay
  where = artifacts.save(
    path / EXPORT,
    kind="mae",
    model_config=release.published_config(
      "mae", dataclasses.asdict(config.model)
    ),
    params=state.ema[str(decay)],
    step=int(state.step),
    ema_decay=decay,
  )
  logger.info("Exported the encoder to %s.", where)
  if jax.process_index() == 0:
    records = metrics.read_jsonl(path / "metrics.jsonl")
    (path / "plots").mkdir(parents=True, exist_ok=True)
    metrics.plot_mae(records, path / "plots" / "mae.png")
  return state


def held_out_evaluation(
  config: config_lib.MaeConfig, task: steps.MaeTask, mesh: jax.sharding.Mesh
) -> Any:
  """(step, state) -> reconstruction and accuracy on the held-out images.

  The mask is the same at every evaluation, so that figures are comparable.
  """
  test = data.make_source(config.data.source, "test")
  batch_size = experiment.pad_to_mesh(config.eval.batch_size, mesh)
  key = jax.random.key(config.seed)
  jitted = jax.jit(
    functools.partial(steps.mae_eval_step, task=task),
    out_shardings=sharding.replicated(mesh),
  )

  def evaluate(step: int, state: TrainState) -> dict[str, float]:
    params = state.ema[str(config.eval.ema_decay)]
    totals: dict[str, float] = {}
    for start in range(0, len(test), batch_size):
      images = test.images[start : start + batch_size]
      labels = test.labels[start : start + batch_size]
      valid = np.arange(batch_size) < len(images)
      padding = batch_size - len(images)
      batch = sharding.put_batch(
        (
          np.concatenate([images, np.repeat(images[-1:], padding, 0)]),
          np.concatenate([labels, np.repeat(labels[-1:], padding, 0)]),
          valid,
        ),
        mesh,
      )
      sums = jitted(
        params, steps.MaeBatch(*batch[:2]), batch[2], key, np.int32(start)
      )
      for name, value in jax.device_get(sums).items():
        totals[name] = totals.get(name, 0.0) + float(value)
    scalars = {f"eval/{k}": v / len(test) for k, v in totals.items()}
    logger.info(
      "eval step %d: %s",
      step,
      ", ".join(f"{k[5:]} {v:.4g}" for k, v in scalars.items()),
    )
    return scalars

  return evaluate
