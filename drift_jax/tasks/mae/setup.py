"""From a config to what encoder training needs."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from drift_jax import config as config_lib
from drift_jax.data.loader import Loader
from drift_jax.data.readers import Reader
from drift_jax.models.mae import build_mae
from drift_jax.models.vae import Vae
from drift_jax.system import sharding
from drift_jax.system.errors import naming
from drift_jax.tasks.mae.config import MaeConfig
from drift_jax.tasks.mae.step import (
  MaeBatch,
  MaeTask,
  mae_eval_step,
  mae_inputs,
  mae_step,
)
from drift_jax.training import artifacts
from drift_jax.training.inputs import make_loader
from drift_jax.training.run import Recipe
from drift_jax.training.step import Metrics


def mae_task(config: MaeConfig, vae: artifacts.Artifact | None) -> MaeTask:
  """Makes the static part of the encoder's step.

  Args:
    config: config of the run.
    vae: encodes the images first; None if the encoder takes them as they come.
  """
  vae_module = None
  if vae is not None:
    assert isinstance(vae.module, Vae)  # load_vae saw to it
    vae_module = vae.module
  with naming("model"):
    mae = build_mae(**dataclasses.asdict(config.model))
  return MaeTask(
    mae=mae,
    vae=vae_module,
    mask_ratio=config.mae.mask_ratio,
    classification_start=config.train.num_steps
    - config.mae.classification_steps,
    classification_ramp=config.mae.classification_ramp,
    classification_weight=config.mae.classification_weight
    if config.mae.classification_steps
    else 0.0,
  )


def init_mae(
  task: MaeTask, sample_shape: tuple[int, ...]
) -> Callable[[jax.Array], Any]:
  """key -> the encoder's initial parameters."""

  def init(key: jax.Array) -> Any:
    params_key, mask_key = jax.random.split(key)
    return task.mae.init(
      {"params": params_key, "mask": mask_key},
      np.zeros((1, *sample_shape), np.float32),
    )["params"]

  return init


def mae_recipe(
  task: MaeTask, sample_shape: tuple[int, ...], vae_params: Any
) -> Recipe:
  """How an encoder is trained.

  Args:
    task: the static part of its step.
    sample_shape: (H, W, C) of what it takes.
    vae_params: of the autoencoder that makes that of images; None without.
  """
  return Recipe(
    name="encoder with decoder",
    init_params=init_mae(task, sample_shape),
    step=functools.partial(mae_step, task=task),
    batch=lambda image, label: MaeBatch(image, label),
    frozen=vae_params,
    computed=str(np.dtype(task.mae.dtype)),
  )


def mae_input_shape(
  task: MaeTask,
  vae_params: Any,
  sample_shape: tuple[int, ...],
  in_channels: int,
) -> tuple[int, ...]:
  """Returns the shape (H, W, C) of the encoder's inputs.

  Raises:
    ConfigError: images that the autoencoder or the encoder can't take.
  """
  images = jax.ShapeDtypeStruct((1, *sample_shape), np.float32)
  with naming(f"vae on images of shape {sample_shape}"):
    inputs = jax.eval_shape(
      functools.partial(mae_inputs, noise=None, task=task),
      images,
      vae_params,
    )
  shape = inputs.shape[1:]
  if shape[-1] != in_channels:
    raise config_lib.ConfigError(
      f"the encoder would read inputs of shape {shape}, but "
      f"model.in_channels={in_channels}: change it, data.channels, or vae.path "
      "(with one, images are encoded into its latents first)"
    )
  return shape


def mae_feed(config: MaeConfig, reader: Reader) -> Loader:
  """Makes the feed of training images."""
  with naming("data"):
    return make_loader(config, reader, config.mae.batch_size)


def jit_mae_evaluation(task: MaeTask, mesh: Mesh, vae_params: Any) -> Any:
  """Jits step.mae_eval_step; its sums are on every device."""
  frozen = sharding.specs(vae_params)

  def evaluate(params: Any, *others: Any) -> Metrics:
    layout = sharding.Layout(mesh, sharding.infer_specs(params, mesh), frozen)
    return mae_eval_step(params, *others, task=task, layout=layout)

  return jax.jit(evaluate, out_shardings=sharding.replicated(mesh))
