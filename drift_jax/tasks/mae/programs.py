"""What encoder training compiles, with abstract arguments."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from drift_jax.system.errors import results_of
from drift_jax.system.streams import stream
from drift_jax.tasks.mae import setup
from drift_jax.tasks.mae.config import MaeConfig
from drift_jax.tasks.mae.step import MaeBatch
from drift_jax.training.frozen import load_vae
from drift_jax.training.inputs import LATENTS
from drift_jax.training.programs import Program, abstract_batch, check_classes
from drift_jax.training.run import check_divides, make_training, pad_to_mesh


def programs(config: MaeConfig, mesh: Mesh) -> list[Program]:
  """Training and evaluation step of an encoder; see tasks.programs."""
  *_, vae = results_of(
    lambda: check_classes(config.model.num_classes),
    lambda: check_divides("mae.batch_size", config.mae.batch_size, mesh),
    lambda: load_vae(config.vae, mesh, weights=False),
  )
  side, channels = config.data.image_size, config.data.channels
  sample_shape = (side, side, channels)
  if config.data.source.startswith(LATENTS):
    assert vae is not None  # the config's checks ask for vae.path
    module: Any = vae.module
    sample_shape = (
      side // module.downsampling,
      side // module.downsampling,
      module.latent_channels,
    )
    vae = None
  task = setup.mae_task(config, vae)
  vae_params = None if vae is None else vae.params
  input_shape = setup.mae_input_shape(
    task, vae_params, sample_shape, config.model.in_channels
  )
  training = make_training(
    config, mesh, setup.mae_recipe(task, input_shape, vae_params)
  )

  def batch(size: int) -> MaeBatch:
    wire = jnp.dtype(config.data.wire)
    return MaeBatch(
      abstract_batch(mesh, size, *sample_shape, dtype=wire),
      abstract_batch(mesh, size, dtype=jnp.int32),
    )

  train = {
    "state": training.abstract,
    "batch": batch(config.mae.batch_size),
    "frozen": vae_params,
  }
  found = [Program("train", training.step, train)]
  if config.eval.every:
    count = pad_to_mesh(config.eval.batch_size, mesh)
    evaluation = {
      "params": training.abstract.params,
      "batch": batch(count),
      "valid": abstract_batch(mesh, count, dtype=jnp.bool_),
      "key": jax.eval_shape(lambda: stream(config.seed, "mask")),
      "number": jax.ShapeDtypeStruct((), jnp.int32),
      "frozen": vae_params,
    }
    evaluate = setup.jit_mae_evaluation(task, mesh, vae_params)
    found.append(Program("evaluate", evaluate, evaluation))
  return found
