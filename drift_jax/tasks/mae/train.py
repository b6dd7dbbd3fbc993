"""Encoder pretraining (A.3): `train_and_evaluate(config, workdir)`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from drift_jax.metrics.batches import local_batches
from drift_jax.metrics.plots import plot_mae
from drift_jax.metrics.writers import MetricWriter, read_jsonl
from drift_jax.models import release
from drift_jax.system import processes, sharding
from drift_jax.system.console import logger
from drift_jax.system.streams import stream
from drift_jax.tasks import parse_as
from drift_jax.tasks.mae.config import MaeConfig
from drift_jax.tasks.mae.setup import (
  jit_mae_evaluation,
  mae_feed,
  mae_input_shape,
  mae_recipe,
  mae_task,
)
from drift_jax.tasks.mae.step import MaeBatch, MaeTask
from drift_jax.training import artifacts
from drift_jax.training.alone import alone
from drift_jax.training.frozen import frozen_sums, load_vae, start_params
from drift_jax.training.inputs import Readers, open_readers, with_num_classes
from drift_jax.training.places import of_resumed
from drift_jax.training.run import (
  Evaluate,
  at_end,
  check_divides,
  open_mesh,
  pad_to_mesh,
  run,
)
from drift_jax.training.state import TrainState
from drift_jax.training.workdir import open_workdir

# Folder of the trained encoder in the workdir: encoders.NAME.path of a
# generator's config points at it.
EXPORT = "encoder"


@alone
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
    ConfigError: a config that can't be run, or a workdir in use.
    CheckpointError: a damaged checkpoint.
    DataError, OSError: images that can't be read.
    NonFiniteError: a loss or gradient that is not finite.
    PeerError: any of these, in the first of several processes.
    Preempted: by SIGTERM, with the step saved.
  """
  config = parse_as(config, MaeConfig)
  mesh = open_mesh(config.mesh)
  check_divides("mae.batch_size", config.mae.batch_size, mesh)
  config = of_resumed(config, workdir)
  vae = load_vae(config.vae, mesh)
  readers = open_readers(config, vae)
  config = with_num_classes(config, readers.train)
  # Images are encoded on the device, cached latents are not.
  encoding = None if readers.train.grid is None else vae
  task = mae_task(config, encoding)
  vae_params = None if encoding is None else encoding.params
  input_shape = mae_input_shape(
    task, vae_params, readers.train.sample_shape, config.model.in_channels
  )
  feed = mae_feed(config, readers.train)
  evaluate = held_out_evaluation(config, task, readers, vae_params, mesh)
  path = open_workdir(
    workdir,
    config,
    frozen_sums({}, vae),
    readers.train.class_names,
    readers.facts,
  )

  with at_end(functools.partial(_plot, path)):
    state = run(
      config,
      path,
      mesh,
      mae_recipe(task, input_shape, vae_params),
      start_params=start_params(config, readers.train.class_names),
      feed=feed,
      evaluate=evaluate,
    )
  decay = config.eval.ema_decay
  params = processes.fetch(state.ema[str(decay)])
  if processes.is_first():
    where = artifacts.save(
      path / EXPORT,
      kind="mae",
      model_config=release.published_config(
        "mae", dataclasses.asdict(config.model)
      ),
      params=params,
      step=int(state.step),
      ema_decay=decay,
    )
    logger.info("Exported the encoder to %s.", where)
  return state


def _plot(path: epath.Path) -> None:
  if not processes.is_first() or not (path / "metrics.jsonl").exists():
    return
  records = read_jsonl(path / "metrics.jsonl")
  if any("recon_loss" in record for record in records):
    plot_mae(records, path / "plots" / "mae.png")


def held_out_evaluation(
  config: MaeConfig,
  task: MaeTask,
  readers: Readers,
  vae_params: Any,
  mesh: jax.sharding.Mesh,
) -> Evaluate:
  """Makes the evaluation: reconstruction and accuracy on held-out images.

  The mask is the same at every evaluation, so that figures are comparable.
  """
  if not config.eval.every:
    return lambda step, state, check, writer: {}
  test = readers.test()
  batch_size = pad_to_mesh(config.eval.batch_size, mesh)
  key = stream(config.seed, "mask")
  jitted = jit_mae_evaluation(task, mesh, vae_params)

  def evaluate(
    step: int,
    state: TrainState,
    check: Callable[[], None],
    writer: MetricWriter,
  ) -> dict[str, float]:
    del writer  # the loop writes the scalars
    params = state.ema[str(config.eval.ema_decay)]
    totals: dict[str, float] = {}
    batches = local_batches(len(test), batch_size)
    for number, (index, count) in enumerate(batches):
      check()
      images, labels, valid = sharding.put_batch(
        (
          test.fixed(index),
          test.labels[index],
          np.arange(len(index)) < count,
        ),
        mesh,
      )
      sums = jitted(
        params,
        MaeBatch(images, labels),
        valid,
        key,
        np.int32(number * batch_size),
        vae_params,
      )
      for name, value in jax.device_get(sums).items():
        totals[name] = totals.get(name, 0.0) + float(value)
    figures = {name: value / len(test) for name, value in totals.items()}
    text = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    logger.info("eval step %d: %s", step, text)
    return {f"eval/{name}": value for name, value in figures.items()}

  return evaluate
