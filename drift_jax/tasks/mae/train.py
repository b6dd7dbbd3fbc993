"""Encoder pretraining (A.3): `train_and_evaluate(config, workdir)`."""

import dataclasses
import functools
from typing import Any

from etils import epath

from drift_jax.models import release
from drift_jax.system import processes
from drift_jax.system.console import logger
from drift_jax.tasks import parse_as
from drift_jax.tasks.mae import setup
from drift_jax.tasks.mae.config import MaeConfig
from drift_jax.tasks.mae.evaluation import held_out_evaluation, plot
from drift_jax.training import artifacts
from drift_jax.training.frozen import frozen_sums, load_vae, start_params
from drift_jax.training.inputs import (
  check_reals,
  image_inputs,
  open_readers,
  require,
  with_num_classes,
)
from drift_jax.training.places import of_resumed
from drift_jax.training.run import at_end, check_divides, open_mesh, run
from drift_jax.training.state import TrainState
from drift_jax.training.workdir import alone, has_checkpoints, open_workdir

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
  is_new = not has_checkpoints(epath.Path(workdir))
  tested = config.eval.every > 0
  require(image_inputs(config, is_new=is_new, tested=tested), config)
  vae = load_vae(config.vae, mesh)
  readers = open_readers(config, vae)
  config = with_num_classes(config, readers.train)
  if is_new:
    check_reals(config.generator, readers, judged=tested)
  # Images are encoded on the device, cached latents are not.
  encoding = None if readers.train.grid is None else vae
  task = setup.mae_task(config, encoding)
  vae_params = None if encoding is None else encoding.params
  input_shape = setup.mae_input_shape(
    task, vae_params, readers.train.sample_shape, config.model.in_channels
  )
  feed = setup.mae_feed(config, readers.train)
  evaluate = held_out_evaluation(config, task, readers, vae_params, mesh)
  path = open_workdir(
    workdir,
    config,
    frozen_sums({}, vae),
    readers.train.class_names,
    readers.facts,
  )

  with at_end(functools.partial(plot, path)):
    state = run(
      config,
      path,
      mesh,
      setup.mae_recipe(task, input_shape, vae_params),
      start_params=start_params(config, readers.train.class_names),
      feed=feed,
      evaluate=evaluate,
      images=config.mae.batch_size,
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
