"""From a typed config to the objects of a run: models, steps, evaluators."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh

from drift_jax import (
  artifacts,
  checkpoint,
  data,
  metrics,
  models,
  optim,
  sharding,
  steps,
)
from drift_jax import config as config_lib
from drift_jax.console import logger

CONFIG_FILE = "config.json"


def open_workdir(
  workdir: str, config: config_lib.GeneratorConfig | config_lib.MaeConfig
) -> epath.Path:
  """Creates the workdir and writes the resolved config into it.

  Raises:
    ConfigError: if the workdir holds a run of another experiment.
  """
  path = epath.Path(workdir)
  path.mkdir(parents=True, exist_ok=True)
  file = path / CONFIG_FILE
  text = config_lib.to_json(config)
  if file.exists():
    config_lib.check_resumable(file.read_text(), text)
  if jax.process_index() == 0:
    temporary = path / (CONFIG_FILE + ".tmp")
    temporary.write_text(text)
    temporary.replace(file)
  return path


def make_optimizer(
  config: config_lib.Optim, num_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """The optimiser and the schedule that it follows."""
  schedule = optim.learning_rate_schedule(
    kind=config.schedule,
    peak=config.learning_rate,
    warmup_steps=config.warmup_steps,
    total_steps=num_steps,
  )
  optimizer = optim.make_optimizer(
    schedule,
    b1=config.b1,
    b2=config.b2,
    eps=config.eps,
    weight_decay=config.weight_decay,
    grad_clip=config.grad_clip,
  )
  return optimizer, schedule


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
    if artifact.kind == "gen":
      raise artifacts.ArtifactError(
        f"encoders.{name}.path={encoder.path!r} holds a generator, want an "
        "encoder ('mae' or 'convnext')"
      )
    shardings = sharding.infer_sharding(artifact.params, mesh)
    params = jax.device_put(artifact.params, shardings)
    loaded[name] = dataclasses.replace(artifact, params=params)
  return loaded


def feature_space(
  features: config_lib.Features, encoders: Mapping[str, artifacts.Artifact]
) -> steps.FeatureSpace:
  """Which feature vectors of which encoders enter the loss (A.5)."""
  mae_options = {
    "every_k_block": features.every_k_block,
    "patch_mean_size": features.patch_mean_size,
    "patch_std_size": features.patch_std_size,
    "use_mean": features.use_mean,
    "use_std": features.use_std,
  }
  return steps.FeatureSpace(
    encoders={name: a.module for name, a in encoders.items()},
    options={
      name: mae_options if a.kind == "mae" else {}
      for name, a in encoders.items()
    },
    sample=features.sample,
  )


def generator_task(
  config: config_lib.GeneratorConfig,
  encoders: Mapping[str, artifacts.Artifact],
) -> steps.GeneratorTask:
  """The static part of the generator's step."""
  model = config.model
  return steps.GeneratorTask(
    generator=models.build_generator(**dataclasses.asdict(model)),
    features=feature_space(config.features, encoders),
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


def mae_task(config: config_lib.MaeConfig) -> steps.MaeTask:
  """The static part of the encoder's step."""
  return steps.MaeTask(
    mae=models.build_mae(**dataclasses.asdict(config.model)),
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


def make_loader(
  config: config_lib.GeneratorConfig | config_lib.MaeConfig,
  source: data.ImageSource,
  batch_size: int,
) -> data.Loader:
  """This process' share of the training images."""
  return data.Loader(
    source,
    batch_size=batch_size,
    seed=config.seed,
    num_threads=config.data.num_threads,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )


def make_checkpointer(
  config: config_lib.Checkpoint, path: epath.Path
) -> checkpoint.Checkpointer:
  """The checkpoints of a workdir."""
  return checkpoint.Checkpointer(
    path / "checkpoints",
    keep_latest=config.keep_latest,
    keep_every=config.keep_every,
    best_metric=config.best_metric,
    on_corrupt=config.on_corrupt,
  )


def generator_feed(
  config: config_lib.GeneratorConfig, source: data.ImageSource
) -> data.QueueFeed:
  """The sample queue over the training images."""
  return data.QueueFeed(
    make_loader(config, source, config.queue.push_per_step),
    num_classes=config.model.num_classes,
    sample_shape=source.sample_shape,
    seed=config.seed,
    num_labels=config.batch.labels,
    num_positives=config.batch.positives,
    num_unconditional=config.batch.unconditional,
    **dataclasses.asdict(config.queue),
  )


def check_source(
  source: data.ImageSource, shape: tuple[int, ...], num_classes: int
) -> None:
  """Raises ConfigError where the data do not fit the model."""
  if source.sample_shape != shape:
    raise config_lib.ConfigError(
      f"the data have images of shape {source.sample_shape}, the model makes "
      f"{shape}: set model.input_size and the channels to match"
    )
  if len(source.class_names) != num_classes:
    raise config_lib.ConfigError(
      f"the data have {len(source.class_names)} classes, model.num_classes="
      f"{num_classes}"
    )


def check_divides(name: str, size: int, mesh: Mesh) -> None:
  """Raises ConfigError where a batch axis can't be split over the mesh."""
  if size % mesh.size:
    raise config_lib.ConfigError(
      f"{name}={size} can't be split over the {mesh.size} devices of mesh "
      f"{dict(mesh.shape)}: use a multiple of {mesh.size}"
    )


def pad_to_mesh(size: int, mesh: Mesh) -> int:
  """The smallest multiple of the device count that is at least `size`."""
  return -(-size // mesh.size) * mesh.size


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


def pooled_features(
  encoder: artifacts.Artifact, mesh: Mesh
) -> Callable[[np.ndarray], np.ndarray]:
  """images [n, H, W, C] -> [n, D]: the frozen encoder's pooled features."""
  apply = jax.jit(
    functools.partial(steps.apply, encoder.module, method="pooled"),
    out_shardings=sharding.batch_sharding(mesh),
  )

  def features(images: np.ndarray) -> np.ndarray:
    count = len(images)
    padding = pad_to_mesh(count, mesh) - count
    images = np.concatenate([images, np.repeat(images[-1:], padding, 0)])
    out = apply(encoder.params, sharding.put_batch(images, mesh))
    return np.asarray(jax.device_get(out))[:count]

  return features


def _flatten(images: np.ndarray) -> np.ndarray:
  return np.asarray(images).reshape(len(images), -1)


def make_evaluators(
  config: config_lib.GeneratorConfig,
  encoders: Mapping[str, artifacts.Artifact],
  train: data.ImageSource,
  test: data.ImageSource,
  mesh: Mesh,
) -> list[metrics.Evaluator]:
  """The evaluators that config.eval.metrics names."""
  chosen = config.eval
  reals = (train.images, train.labels, test.images, test.labels)
  per_class = chosen.num_images // config.model.num_classes
  frechet = {
    "per_class": per_class,
    "batch_size": chosen.batch_size,
    "seed": config.seed,
  }

  def fd_encoder() -> metrics.Evaluator:
    pooled = [a for a in encoders.values() if a.kind == "mae"]
    if not pooled:
      raise config_lib.ConfigError(
        "eval.metrics holds 'fd_encoder', which needs an encoder of kind "
        f"'mae'; encoders: {[(n, a.kind) for n, a in encoders.items()]}"
      )
    function = pooled_features(pooled[0], mesh)
    return metrics.FrechetEvaluator("fd_encoder", function, *reals, **frechet)

  factories: dict[str, Callable[[], metrics.Evaluator]] = {
    "fd_encoder": fd_encoder,
    "fd_pixel": lambda: metrics.FrechetEvaluator(
      "fd_pixel", _flatten, *reals, **frechet
    ),
    "coverage": lambda: metrics.CoverageEvaluator(
      *reals, k=chosen.coverage_k, per_class=per_class, seed=config.seed
    ),
    "label_accuracy": lambda: metrics.LabelAccuracyEvaluator(*reals),
    "duplicates": lambda: metrics.DuplicatesEvaluator(*reals, grid=train.grid),
  }
  return [factories[name]() for name in chosen.metrics]


def sample_grid(
  sample_fn: metrics.SampleFn,
  *,
  num_classes: int,
  per_class: int,
  alpha: float,
  batch_size: int,
) -> np.ndarray:
  """One row of samples for each class: uint8 [H, W, 3]."""
  labels = np.repeat(np.arange(num_classes, dtype=np.int32), per_class)
  images = [
    batch
    for batch, _ in metrics.generate(
      sample_fn, labels, alpha, batch_size=batch_size
    )
  ]
  return grid_image(np.concatenate(images), per_class)


def grid_image(images: np.ndarray, columns: int) -> np.ndarray:
  """A grid that is legible on a screen: small images are magnified."""
  scale = max(1, 48 // images.shape[1])
  return metrics.image_grid(images, columns=columns, padding=2, scale=scale)


def log_parameters(name: str, params: Any) -> None:
  """Logs a parameter count."""
  count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))
  logger.info("%s: %s parameters", name, f"{count:,}")


@dataclasses.dataclass(frozen=True)
class TrainedGenerator:
  """A generator restored from a workdir, ready to sample.

  Attributes:
    config: of its run.
    task: the static part.
    params: one EMA of the parameters, on the mesh.
    step: training steps behind them.
  """

  config: config_lib.GeneratorConfig
  task: steps.GeneratorTask
  params: Any
  step: int


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
    ConfigError: no run there, not a generator's, or an unknown decay.
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
  task = generator_task(config, encoders={})
  shapes = jax.eval_shape(init_generator(task), jax.random.key(0))
  abstract = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    sharding.infer_sharding(shapes, mesh),
  )
  checkpointer = make_checkpointer(config.checkpoint, epath.Path(workdir))
  try:
    if step is None:
      step = checkpointer.best_step()
    step, restored = checkpointer.restore_subtree(
      {"ema": {str(decay): abstract}}, step
    )
  finally:
    checkpointer.close()
  return TrainedGenerator(config, task, restored["ema"][str(decay)], step)


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
