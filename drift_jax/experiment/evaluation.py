"""Samplers and pictures; generators restored from a run."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from drift_jax import (
  artifacts,
  checkpoint,
  hub,
  metrics,
  models,
  numerics,
  processes,
  sharding,
  steps,
  storage,
)
from drift_jax import config as config_lib
from drift_jax.experiment import places
from drift_jax.experiment.data_facts import read_facts
from drift_jax.experiment.networks import (
  attention_kernel_for,
  frozen_sums,
  init_generator,
  kernels_there,
  load_vae,
  unroll_for,
)
from drift_jax.experiment.runs import (
  CONFIG_FILE,
  check_frozen,
  make_checkpointer,
  naming,
)
from drift_jax.metrics.images import Images

_LISTED = 3


def jit_sampler(task: steps.GeneratorTask, mesh: Mesh) -> Any:
  """Jitted (params, seed, style, labels, alpha, index) -> samples.

  Samples and what there is one of for each are split over the mesh; of seed
  and style, see steps.sample_step, all have the same.
  """

  def sample(
    params: Any, seed: jax.Array, style: jax.Array, *of_each: jax.Array
  ) -> jax.Array:
    layout = sharding.Layout(mesh, sharding.infer_specs(params, mesh))
    return steps.sample_step(
      params, *of_each, seed=seed, style=style, task=task, layout=layout
    )

  return jax.jit(sample, out_shardings=sharding.batch_sharding(mesh))


def jit_interpolator(task: steps.GeneratorTask, mesh: Mesh) -> Any:
  """Jitted (params, seed, style, angle, labels, alpha, index, other) -> images.

  Of noise cos(angle) a + sin(angle) b, where a is that of the number `index`
  and b that of `other`; the style is a's. A standard normal's for any angle.
  """

  def sample(
    params: Any,
    seed: jax.Array,
    style: jax.Array,
    angle: jax.Array,
    labels: jax.Array,
    alpha: jax.Array,
    index: jax.Array,
    other: jax.Array,
  ) -> jax.Array:
    draw = functools.partial(
      steps.sample_inputs, seed=seed, style=style, task=task
    )
    noise, style = draw(index)
    noise = jnp.cos(angle) * noise + jnp.sin(angle) * draw(other)[0]
    layout = sharding.Layout(mesh, sharding.infer_specs(params, mesh))
    return steps.generate(
      params, labels, alpha, noise, style, task=task, layout=layout
    )

  return jax.jit(sample, out_shardings=sharding.batch_sharding(mesh))


def jit_mae_evaluation(task: steps.MaeTask, mesh: Mesh, vae_params: Any) -> Any:
  """Jitted steps.mae_eval_step; its sums are on every device."""
  frozen = sharding.specs(vae_params)

  def evaluate(params: Any, *others: Any) -> steps.Metrics:
    layout = sharding.Layout(mesh, sharding.infer_specs(params, mesh), frozen)
    return steps.mae_eval_step(params, *others, task=task, layout=layout)

  return jax.jit(evaluate, out_shardings=sharding.replicated(mesh))


def make_sampler(
  task: steps.GeneratorTask, mesh: Mesh, seed: int
) -> Callable[[Any], metrics.SampleFn]:
  """params -> sample_fn(labels, alpha, index) -> images; compiled once."""
  step = jit_sampler(task, mesh)
  return lambda params: bind_sampler(step, params, task, mesh, seed)


def bind_sampler(
  step: Any,
  params: Any,
  task: steps.GeneratorTask,
  mesh: Mesh,
  seed: int,
  style: Sequence[int] | np.ndarray | None = None,
) -> metrics.SampleFn:
  """sample_fn(labels, alpha, index) of a step that `jit_sampler` made.

  Args:
    step: compiled for all seeds and styles.
    params: on the mesh.
    task: of the step.
    mesh: where it runs.
    seed: of noise and style.
    style: indices that all samples share; -1 leaves one to chance. None: all.
  """
  shared = (
    np.uint32(seed),
    np.array([-1] * task.style_tokens if style is None else style, np.int32),
  )
  shared = jax.device_put(shared, sharding.replicated(mesh))

  def sample(
    labels: np.ndarray, alpha: np.ndarray, index: np.ndarray
  ) -> jax.Array:
    of_each = sharding.put_batch((labels, alpha, index), mesh)
    return step(params, *shared, *of_each)

  return sample


def sample_grid(
  sample_fn: metrics.SampleFn,
  decode: Callable[[Images], Images],
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
    gathered(batch, decode(batch.samples))
    for batch in metrics.generate(
      sample_fn,
      np.repeat(shown.astype(np.int32), per_class),
      alpha,
      batch_size=batch_size,
    )
  ]
  return grid_image(np.concatenate(images), per_class)


def gathered(batch: metrics.Batch, values: Images) -> np.ndarray:
  """The rows of a batch that count, of all processes, in order: float32."""
  own = batch.rows(values).astype(np.float32)
  return np.concatenate(processes.gather(own))


def grid_image(images: np.ndarray, columns: int) -> np.ndarray:
  """A grid that is legible on a screen: small images are magnified."""
  scale = max(1, 48 // images.shape[1])
  return metrics.image_grid(images, columns=columns, padding=2, scale=scale)


@dataclasses.dataclass(frozen=True)
class ExportedGenerator:
  """A generator's exported weights, ready to sample.

  Attributes:
    task: the static part.
    params: on the mesh.
    num_classes: labels lie in [0, num_classes).
    vae: the autoencoder behind its latents, or None.
    artifact: where they come from.
  """

  task: steps.GeneratorTask
  params: Any
  num_classes: int
  vae: artifacts.Artifact | None
  artifact: artifacts.Artifact


@jax.jit
def _finite(params: Any) -> Any:
  return jax.tree.map(lambda x: jnp.isfinite(x).all(), params)


def not_finite(params: Any) -> list[str]:
  """Names of the arrays that hold NaN or infinity."""
  return [
    sharding.path_name(path)
    for path, fine in jax.tree.leaves_with_path(jax.device_get(_finite(params)))
    if not fine
  ]


def sampled_on(module: Any, mesh: Mesh, kernels: str) -> Any:
  """A generator as it is computed on the devices of a mesh."""
  return module.clone(
    attention_kernel=attention_kernel_for(kernels, mesh),
    unroll=unroll_for(module.depth, mesh),
  )


def sampling_task(module: Any) -> steps.GeneratorTask:
  """The static part of a generator that is sampled and not trained."""
  return steps.GeneratorTask(
    generator=module,
    features=steps.FeatureSpace(encoders={}, options={}, sample=True),
    sample_shape=(module.input_size, module.input_size, module.out_channels),
    noise_shape=(module.input_size, module.input_size, module.in_channels),
    style_tokens=module.style_tokens,
    style_vocab=module.style_vocab,
    num_generated=1,
    drift={},
    guidance={},
  )


def load_exported(weights: str, vae: str, mesh: Mesh) -> ExportedGenerator:
  """A generator of ours or of the release, from its folder.

  Args:
    weights: folder of kind 'gen', or what else artifacts.load reads.
    vae: of the autoencoder behind its latents; '' takes that of an export, and
      means pixels where there is none.
    mesh: where the parameters go.

  Raises:
    ArtifactError: weights that can't be loaded or are no generator's.
  """
  numerics.require()
  artifact = artifacts.load(weights)
  if artifact.kind != "gen":
    raise artifacts.ArtifactError(
      f"{weights} holds a model of kind {artifact.kind!r}, want 'gen'"
    )
  module: Any = artifact.module
  task = sampling_task(sampled_on(module, mesh, "auto"))
  params = jax.device_put(
    artifact.params, sharding.infer_sharding(artifact.params, mesh)
  )
  dtype = "float32"
  if not vae and not weights.startswith(hub.SCHEME):
    own = epath.Path(weights) / artifacts.EXPORTED_VAE
    # In the precision in which it decodes the export's images.
    vae, dtype = (str(own), "") if own.exists() else ("", dtype)
  section = config_lib.Vae(
    path=vae, dtype=dtype, sharding="fsdp", remat=False, model={}
  )
  return ExportedGenerator(
    task, params, module.num_classes, load_vae(section, mesh), artifact
  )


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
  workdir: str,
  mesh: Mesh,
  *,
  step: int | None,
  ema_decay: float | None,
  paths: Mapping[str, str] | None = None,
) -> TrainedGenerator:
  """Restores one EMA of a run, without optimiser, queue or encoders.

  Args:
    workdir: of the run.
    mesh: where the parameters go.
    step: checkpoint; None takes the best one if the run ranks them, else the
      newest.
    ema_decay: which average; None takes the one that the run evaluates.
    paths: {dotted key of the config: where it is now}, of what is not found;
      see `places.of_run`.

  Raises:
    ConfigError: no run there, not a generator's, an unknown decay, or an
      autoencoder that is not there or not the one that the run began with.
    ArtifactError: an autoencoder that can't be loaded.
    CheckpointError: no such checkpoint, a damaged one, or parameters that are
      not finite.
    StorageError: a bucket that can't be read.
  """
  numerics.require()
  storage.check(workdir)
  file = epath.Path(workdir) / CONFIG_FILE
  if not file.exists():
    raise config_lib.ConfigError(f"no run in {workdir}: {file} is missing")
  config = config_lib.parse(
    places.of_run(read_facts(file, dict), workdir, paths or {})
  )
  if not isinstance(config, config_lib.GeneratorConfig):
    raise config_lib.ConfigError(
      f"{workdir} holds a run of task {config.task!r}, want 'generator'"
    )
  decay = config.eval.ema_decay if ema_decay is None else ema_decay
  if decay not in config.ema.decays:
    raise config_lib.ConfigError(
      f"ema_decay={decay} was not kept: valid options are {config.ema.decays}"
    )
  places.check_there(config, workdir, ["vae.path"])
  vae = load_vae(config.vae, mesh)
  check_frozen(epath.Path(workdir), frozen_sums({}, vae))
  with naming("model"):
    module = models.build_generator(**dataclasses.asdict(config.model))
  task = sampling_task(
    sampled_on(module, mesh, kernels_there(config.train.kernels, mesh))
  )
  shapes = jax.eval_shape(init_generator(task), jax.random.key(0))
  abstract = sharding.abstract(shapes, sharding.infer_sharding(shapes, mesh))
  checkpointer = make_checkpointer(
    config.checkpoint, epath.Path(workdir), read_only=True
  )
  try:
    if step is None:
      step = processes.from_first(checkpointer.best_step)
    step, restored = checkpointer.restore_subtree(
      {"ema": {str(decay): abstract}}, step
    )
  finally:
    checkpointer.close()
  params = restored["ema"][str(decay)]
  bad = not_finite(params)
  if bad:
    raise checkpoint.CheckpointError(
      f"step {step} of {workdir}, ema/{decay}: {', '.join(bad[:_LISTED])} "
      f"({len(bad)} arrays in all) are not finite: take another step"
    )
  return TrainedGenerator(config, task, params, step, vae)


def check_alpha(alpha: float, trained: tuple[float, float]) -> None:
  """Raises ConfigError for an alpha outside the trained range."""
  if not trained[0] <= alpha <= trained[1]:
    raise config_lib.ConfigError(
      f"alpha={alpha}: this generator was trained for alpha in "
      f"[{trained[0]}, {trained[1]}]"
    )
