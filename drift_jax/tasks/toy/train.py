"""Toy experiments (5.1): `train_and_evaluate(config, workdir)`."""

import time
from typing import Any

from drift_jax.tasks import parse_as
from drift_jax.tasks.toy.config import ToyConfig
from drift_jax.tasks.toy.evaluation import Evaluation
from drift_jax.tasks.toy.setup import toy_feed, toy_recipe, toy_task
from drift_jax.training.run import at_end, check_divides, open_mesh, run
from drift_jax.training.state import TrainState
from drift_jax.training.workdir import alone, open_workdir


@alone
def train_and_evaluate(
  config: Any, workdir: str, *, draw: bool = True
) -> TrainState:
  """Fits the points that a config describes, and draws how they moved.

  Continues from the newest checkpoint in the workdir if there is one.

  Args:
    config: ConfigDict of task 'toy'.
    workdir: gets config.json, checkpoints/, metrics.jsonl, TensorBoard events,
      samples/*.npy [n, 2] and, at the end, figures.json, plots/evolution.gif,
      plots/field.png and plots/curves.png.
    draw: whether pictures are made.

  Returns:
    The final state.

  Raises:
    ConfigError: a config that can't be run, or a workdir in use.
    CheckpointError: a damaged checkpoint.
    OSError: a file that can't be written.
    NonFiniteError: a loss or gradient that is not finite.
    PeerError: any of these, in the first of several processes.
    Preempted: by SIGTERM, with the step saved.
  """
  start = time.perf_counter()
  config = parse_as(config, ToyConfig)
  mesh = open_mesh(config.mesh)
  check_divides("batch.labels", config.batch.labels, mesh)
  task = toy_task(config)
  feed = toy_feed(config)
  path = open_workdir(workdir, config, {}, (config.data.distribution,), {})
  evaluation = Evaluation(config, task, mesh, path, draw)
  recipe = toy_recipe(config, task)
  evaluation.save_first(recipe.init_params)
  with at_end(evaluation.plot_curves):
    state = run(config, path, mesh, recipe, feed=feed, evaluate=evaluation)
  evaluation.finish(state, time.perf_counter() - start)
  return state
