"""Evaluation of the encoder in the loop, and its curves."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from drift_jax.metrics.batches import local_batches
from drift_jax.metrics.plots import plot_mae
from drift_jax.metrics.writers import MetricWriter, read_jsonl
from drift_jax.system import processes, sharding
from drift_jax.system.console import logger
from drift_jax.system.streams import stream
from drift_jax.tasks.mae.config import MaeConfig
from drift_jax.tasks.mae.setup import (
  jit_mae_evaluation,
)
from drift_jax.tasks.mae.step import MaeBatch, MaeTask
from drift_jax.training.inputs import Readers
from drift_jax.training.run import (
  Evaluate,
  pad_to_mesh,
)
from drift_jax.training.state import TrainState


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


def plot(path: epath.Path) -> None:
  """Draws plots/mae.png from what metrics.jsonl holds so far, if anything."""
  if not processes.is_first() or not (path / "metrics.jsonl").exists():
    return
  records = read_jsonl(path / "metrics.jsonl")
  if any("accuracy" in record for record in records):
    plot_mae(records, path / "plots" / "mae.png")
