"""Samplers, evaluators and pictures; generators restored from a run."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from drift_jax import artifacts, data, metrics, sharding, steps
from drift_jax import config as config_lib
from drift_jax.experiment.networks import (
  frozen_sums,
  generator_task,
  init_generator,
  load_vae,
)
from drift_jax.experiment.runs import (
  CONFIG_FILE,
  check_frozen,
  make_checkpointer,
  pad_to_mesh,
)


def make_sampler(
  task: steps.GeneratorTask, mesh: Mesh, seed: int
) -> Callable[[Any], metrics.SampleFn]:
  """params -> sample_fn(labels, alpha, index) -> images; compiled once."""
  batch = sharding.batch_sharding(mesh)
  step = jax.jit(
    functools.partial(steps.sample_step, seed=seed, task=task),
    out_shardings=batch,
  )

  def bind(params: Any) -> metrics.SampleFn:
    def sample(
      labels: np.ndarray, alpha: np.ndarray, index: np.ndarray
    ) -> jax.Array:
      return step(params, *sharding.put_batch((labels, alpha, index), mesh))

    return sample

  return bind


def on_batches(
  module: Any, params: Any, method: str, mesh: Mesh
) -> Callable[[np.ndarray], np.ndarray]:
  """Host arrays [n, ...] -> host arrays: a frozen network's method, jitted.

  Any n: the batch is padded to a multiple of the devices.
  """
  apply = jax.jit(
    functools.partial(steps.apply, module, method=method),
    out_shardings=sharding.batch_sharding(mesh),
  )

  def call(inputs: np.ndarray) -> np.ndarray:
    padded = np.resize(
      inputs, (pad_to_mesh(len(inputs), mesh), *inputs.shape[1:])
    )
    out = apply(params, sharding.put_batch(padded, mesh))
    return np.asarray(jax.device_get(out))[: len(inputs)]

  return call


def make_decoder(
  vae: artifacts.Artifact | None, mesh: Mesh
) -> Callable[[np.ndarray], np.ndarray]:
  """Samples [n, ...] -> images [n, H, W, C]: decodes where there is a VAE."""
  if vae is None:
    return lambda samples: samples
  return on_batches(vae.module, vae.params, "decode", mesh)


def _flatten(images: np.ndarray) -> np.ndarray:
  return np.asarray(images).reshape(len(images), -1)


def evaluation_labels(
  config: config_lib.GeneratorEval, num_classes: int, test: data.Reader
) -> np.ndarray:
  """Labels of the images that an evaluation generates.

  Balanced, or those of the held-out images where config.num_images is 0.
  """
  if config.num_images == 0:
    return np.asarray(test.labels, np.int32)
  return metrics.balanced_labels(config.num_images, num_classes)


def make_evaluators(
  config: config_lib.GeneratorConfig,
  encoders: Mapping[str, artifacts.Artifact],
  train: data.Reader,
  test: data.Reader,
  mesh: Mesh,
) -> list[metrics.Evaluator]:
  """The evaluators that config.eval.metrics names."""
  chosen = config.eval
  labels = evaluation_labels(chosen, config.model.num_classes, test)
  settings = {"labels": labels, "seed": config.seed}

  def frechet(
    name: str, features: Callable[[np.ndarray], np.ndarray]
  ) -> metrics.Evaluator:
    return metrics.FrechetEvaluator(
      name, features, train, test, batch_size=chosen.batch_size, **settings
    )

  def fd_encoder() -> metrics.Evaluator:
    pooled = [a for a in encoders.values() if a.kind == "mae"]
    if not pooled:
      raise config_lib.ConfigError(
        "eval.metrics holds 'fd_encoder', which needs an encoder of kind "
        f"'mae'; encoders: {[(n, a.kind) for n, a in encoders.items()]}"
      )
    return frechet(
      "fd_encoder",
      on_batches(pooled[0].module, pooled[0].params, "pooled", mesh),
    )

  def duplicates() -> metrics.Evaluator:
    if train.grid is None:
      raise config_lib.ConfigError(
        "eval.metrics holds 'duplicates', which compares pixels, but the data "
        f"are latents (data.source={config.data.source!r}): remove it"
      )
    return metrics.DuplicatesEvaluator(train, test, grid=train.grid)

  factories: dict[str, Callable[[], metrics.Evaluator]] = {
    "fd_encoder": fd_encoder,
    "fd_pixel": lambda: frechet("fd_pixel", _flatten),
    "coverage": lambda: metrics.CoverageEvaluator(
      train, test, k=chosen.coverage_k, **settings
    ),
    "label_accuracy": lambda: metrics.LabelAccuracyEvaluator(train, test),
    "duplicates": duplicates,
  }
  return [factories[name]() for name in chosen.metrics]


def sample_grid(
  sample_fn: metrics.SampleFn,
  decode: Callable[[np.ndarray], np.ndarray],
  *,
  num_classes: int,
  classes: int,
  per_class: int,
  alpha: float,
  batch_size: int,
) -> np.ndarray:
  """One row of samples for each of some classes: uint8 [H, W, 3].

  Args:
    sample_fn: see metrics.generate.
    decode: samples -> images.
    num_classes: of the model.
    classes: rows; these classes are evenly spaced among all.
    per_class: images in a row.
    alpha: guidance scale.
    batch_size: samples per call of sample_fn.
  """
  rows = min(classes, num_classes)
  shown = np.arange(rows, dtype=np.int32) * num_classes // rows
  images = [
    decode(batch)
    for batch, _ in metrics.generate(
      sample_fn,
      np.repeat(shown.astype(np.int32), per_class),
      alpha,
      batch_size=batch_size,
    )
  ]
  return grid_image(np.concatenate(images), per_class)


def grid_image(images: np.ndarray, columns: int) -> np.ndarray:
  """A grid that is legible on a screen: small images are magnified."""
  scale = max(1, 48 // images.shape[1])
  return metrics.image_grid(images, columns=columns, padding=2, scale=scale)


@dataclasses.dataclass(frozen=True)
class TrainedGenerator:
  """A generator restored from a workdir, ready to sample.

  Attributes:
    config: of its run.
    task: the static part.
    params: one EMA of the parameters, on the mesh.
    step: training steps behind them.
    vae: the autoencoder behind its latents, or None.
  """

  config: config_lib.GeneratorConfig
  task: steps.GeneratorTask
  params: Any
  step: int
  vae: artifacts.Artifact | None


def load_generator(
  workdir: str, mesh: Mesh, *, step: int | None, ema_decay: float | None
) -> TrainedGenerator:
  """Restores one EMA of a run, without optimiser, queue or encoders.

  Args:
    workdir: of the run.
    mesh: where the parameters go.
    step: checkpoint; None takes the best one if the run ranks them, else the
      newest.
    ema_decay: which average; None takes the one that the run evaluates.

  Raises:
    ConfigError: no run there, not a generator's, an unknown decay, or an
      autoencoder that is not the one that the run began with.
    ArtifactError: an autoencoder that can't be loaded.
    CheckpointError: no such checkpoint, or a damaged one.
  """
  file = epath.Path(workdir) / CONFIG_FILE
  if not file.exists():
    raise config_lib.ConfigError(f"no run in {workdir}: {file} is missing")
  config = config_lib.parse(json.loads(file.read_text()))
  if not isinstance(config, config_lib.GeneratorConfig):
    raise config_lib.ConfigError(
      f"{workdir} holds a run of task {config.task!r}, want 'generator'"
    )
  decay = config.eval.ema_decay if ema_decay is None else ema_decay
  if decay not in config.ema.decays:
    raise config_lib.ConfigError(
      f"ema_decay={decay} was not kept: valid options are {config.ema.decays}"
    )
  vae = load_vae(config.vae, mesh)
  check_frozen(epath.Path(workdir), frozen_sums({}, vae))
  task = generator_task(config, encoders={})
  shapes = jax.eval_shape(init_generator(task), jax.random.key(0))
  abstract = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    sharding.infer_sharding(shapes, mesh),
  )
  checkpointer = make_checkpointer(
    config.checkpoint, epath.Path(workdir), read_only=True
  )
  try:
    if step is None:
      step = checkpointer.best_step()
    step, restored = checkpointer.restore_subtree(
      {"ema": {str(decay): abstract}}, step
    )
  finally:
    checkpointer.close()
  params = restored["ema"][str(decay)]
  return TrainedGenerator(config, task, params, step, vae)


def check_alphas(
  alphas: Sequence[float], guidance: config_lib.Guidance
) -> None:
  """Raises ConfigError for an alpha outside the trained range."""
  for alpha in alphas:
    if not guidance.minimum <= alpha <= guidance.maximum:
      raise config_lib.ConfigError(
        f"alpha={alpha}: this generator was trained for alpha in "
        f"[{guidance.minimum}, {guidance.maximum}]"
      )
