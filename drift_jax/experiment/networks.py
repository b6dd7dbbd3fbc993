"""From a config to networks: encoders, tasks, initial parameters."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from drift_jax import artifacts, models, sharding, steps
from drift_jax import config as config_lib
from drift_jax.experiment.runs import naming
from drift_jax.models.vae import Vae


def load_encoders(
  encoders: Mapping[str, config_lib.Encoder], mesh: Mesh
) -> dict[str, artifacts.Artifact]:
  """The frozen encoders, their parameters on the mesh.

  Raises:
    ArtifactError: naming the encoder, for anything that can't be loaded.
  """
  loaded = {}
  for name, encoder in encoders.items():
    try:
      artifact = artifacts.load(encoder.path, dtype=encoder.dtype)
    except artifacts.ArtifactError as error:
      raise artifacts.ArtifactError(f"encoders.{name}: {error}") from error
    if artifact.kind not in ("mae", "convnext"):
      raise artifacts.ArtifactError(
        f"encoders.{name}.path={encoder.path!r} holds a model of kind "
        f"{artifact.kind!r}, want an encoder ('mae' or 'convnext')"
      )
    params = artifact.params
    if artifact.kind == "mae":
      # Its features need neither the decoder nor the classifier.
      params = {"encoder": params["encoder"]}
    loaded[name] = _place(dataclasses.replace(artifact, params=params), mesh)
  return loaded


def load_vae(config: config_lib.Vae, mesh: Mesh) -> artifacts.Artifact | None:
  """The autoencoder behind latents, on the mesh; None where there is none.

  Raises:
    ArtifactError: for anything that can't be loaded.
  """
  if not config.path:
    return None
  try:
    artifact = artifacts.load(config.path, dtype=config.dtype)
  except artifacts.ArtifactError as error:
    raise artifacts.ArtifactError(f"vae: {error}") from error
  if artifact.kind != "vae":
    raise artifacts.ArtifactError(
      f"vae.path={config.path!r} holds a model of kind {artifact.kind!r}, want "
      "'vae': python -m drift_jax.tools.convert_weights vae writes one"
    )
  return _place(artifact, mesh)


def _place(artifact: artifacts.Artifact, mesh: Mesh) -> artifacts.Artifact:
  placed = jax.device_put(
    artifact.params, sharding.infer_sharding(artifact.params, mesh)
  )
  return dataclasses.replace(artifact, params=placed)


def frozen_sums(
  encoders: Mapping[str, artifacts.Artifact], vae: artifacts.Artifact | None
) -> dict[str, str]:
  """SHA-256 of all frozen weights, by the config's section."""
  sums = {f"encoders.{name}": a.sha256 for name, a in encoders.items()}
  return sums if vae is None else sums | {"vae": vae.sha256}


def check_encoders(
  task: steps.GeneratorTask, encoders: Mapping[str, artifacts.Artifact]
) -> None:
  """Raises ConfigError for an encoder that can't read the samples."""
  image = jax.ShapeDtypeStruct((1, *task.sample_shape), np.float32)
  for name, artifact in encoders.items():
    in_loss = name in task.features.encoders
    with naming(f"encoders.{name} on samples of shape {task.sample_shape}"):
      jax.eval_shape(
        functools.partial(
          steps.apply,
          artifact.module,
          method="features" if in_loss else "pooled",
          **task.features.options.get(name, {}),
        ),
        artifact.params,
        image,
      )


def feature_space(
  config: config_lib.GeneratorConfig,
  encoders: Mapping[str, artifacts.Artifact],
) -> steps.FeatureSpace:
  """Which feature vectors of which encoders enter the loss (A.5)."""
  features = dataclasses.asdict(config.features)
  sample = features.pop("sample")
  in_loss = {n: a for n, a in encoders.items() if config.encoders[n].in_loss}
  return steps.FeatureSpace(
    encoders={name: a.module for name, a in in_loss.items()},
    options={
      name: features if a.kind == "mae" else {} for name, a in in_loss.items()
    },
    sample=sample,
  )


def generator_task(
  config: config_lib.GeneratorConfig,
  encoders: Mapping[str, artifacts.Artifact],
) -> steps.GeneratorTask:
  """The static part of the generator's step."""
  model = config.model
  with naming("model"):
    generator = models.build_generator(**dataclasses.asdict(model))
  return steps.GeneratorTask(
    generator=generator,
    features=feature_space(config, encoders),
    sample_shape=(model.input_size, model.input_size, model.out_channels),
    style_tokens=model.style_tokens,
    style_vocab=model.style_vocab,
    num_generated=config.batch.generated,
    drift=dataclasses.asdict(config.drift),
    guidance=dataclasses.asdict(config.guidance),
  )


def init_generator(task: steps.GeneratorTask) -> Callable[[jax.Array], Any]:
  """key -> the generator's initial parameters."""

  def init(key: jax.Array) -> Any:
    params_key, noise_key = jax.random.split(key)
    return task.generator.init(
      {"params": params_key, "noise": noise_key},
      np.zeros(1, np.int32),
      np.ones(1, np.float32),
    )["params"]

  return init


def mae_task(
  config: config_lib.MaeConfig, vae: artifacts.Artifact | None
) -> steps.MaeTask:
  """The static part of the encoder's step.

  Args:
    config: of the run.
    vae: encodes the images first; None where they come as the encoder takes
      them.
  """
  vae_module = None
  if vae is not None:
    assert isinstance(vae.module, Vae)  # load_vae saw to it
    vae_module = vae.module
  with naming("model"):
    mae = models.build_mae(**dataclasses.asdict(config.model))
  return steps.MaeTask(
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
  task: steps.MaeTask, sample_shape: tuple[int, ...]
) -> Callable[[jax.Array], Any]:
  """key -> the encoder's initial parameters."""

  def init(key: jax.Array) -> Any:
    params_key, mask_key = jax.random.split(key)
    return task.mae.init(
      {"params": params_key, "mask": mask_key},
      np.zeros((1, *sample_shape), np.float32),
    )["params"]

  return init


def mae_input_shape(
  task: steps.MaeTask,
  vae_params: Any,
  sample_shape: tuple[int, ...],
  in_channels: int,
) -> tuple[int, ...]:
  """(H, W, C) of what an encoder of in_channels takes of images of a shape.

  Raises:
    ConfigError: images that the autoencoder or the encoder can't take.
  """
  batch = steps.MaeBatch(
    jax.ShapeDtypeStruct((1, *sample_shape), np.float32),  # pyright: ignore[reportArgumentType]
    jax.ShapeDtypeStruct((1,), np.int32),  # pyright: ignore[reportArgumentType]
  )
  with naming(f"vae on images of shape {sample_shape}"):
    inputs = jax.eval_shape(
      functools.partial(steps.mae_inputs, key=None, task=task),
      batch,
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
