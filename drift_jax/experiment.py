"""From a typed config to the objects of a run: models, steps, evaluators."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh

from drift_jax import (
  artifacts,
  checkpoint,
  data,
  loop,
  metrics,
  models,
  optim,
  sharding,
  steps,
)
from drift_jax import config as config_lib
from drift_jax import state as state_lib
from drift_jax.console import logger
from drift_jax.state import TrainState

CONFIG_FILE = "config.json"


ENCODERS_FILE = "encoders.json"
CHECKPOINTS = "checkpoints"
AnyConfig = config_lib.GeneratorConfig | config_lib.MaeConfig


class Evaluate(Protocol):
  """A task's evaluation in the loop; it must leave the state alone."""

  def __call__(
    self, step: int, state: TrainState, writer: metrics.MetricWriter
  ) -> dict[str, float]: ...


@contextlib.contextmanager
def naming(section: str) -> Iterator[None]:
  """Turns a constructor's ValueError into a ConfigError of the section."""
  try:
    yield
  except ValueError as error:
    if isinstance(error, config_lib.ConfigError):
      raise
    raise config_lib.ConfigError(f"{section}: {error}") from error


def open_mesh(config: config_lib.Mesh) -> Mesh:
  """The mesh that the config describes, over this process' devices.

  Raises:
    ConfigError: sizes that do not fit the devices; several processes.
  """
  if jax.process_count() > 1:
    raise config_lib.ConfigError(
      f"{jax.process_count()} processes were started, but a run uses one: "
      "start a single process on the machine's devices"
    )
  with naming("mesh"):
    return sharding.make_mesh(config.data, config.fsdp)


def open_source(config: config_lib.Data, split: str) -> data.ImageSource:
  """A split of the data set that the config names."""
  with naming("data"):
    return data.make_source(config.source, split)


def open_workdir(
  workdir: str,
  config: AnyConfig,
  encoders: Mapping[str, artifacts.Artifact] | None = None,
) -> epath.Path:
  """Creates the workdir and writes config.json (and encoders.json) into it.

  Where the workdir holds a checkpoint already, the config and the encoders'
  content must be those of that run.

  Raises:
    ConfigError: if the workdir holds a run of another experiment.
  """
  path = epath.Path(workdir)
  text = config_lib.to_json(config)
  sums = {name: a.sha256 for name, a in (encoders or {}).items()}
  steps_seen = list((path / CHECKPOINTS).glob("[0-9]*"))
  if steps_seen and (path / CONFIG_FILE).exists():
    config_lib.check_resumable((path / CONFIG_FILE).read_text(), text)
  if steps_seen and (path / ENCODERS_FILE).exists():
    before = json.loads((path / ENCODERS_FILE).read_text())
    for name in sums:
      if before.get(name) != sums[name]:
        raise config_lib.ConfigError(
          f"encoders.{name}: the run in {workdir} began with other weights "
          f"(SHA-256 {before.get(name)}, now {sums[name]}): give it that "
          "encoder again or use a new workdir"
        )
  path.mkdir(parents=True, exist_ok=True)
  with metrics.replacing(path / CONFIG_FILE) as file:
    file.write_text(text)
  if sums:
    with metrics.replacing(path / ENCODERS_FILE) as file:
      file.write_text(json.dumps(sums, indent=2))
  return path


def run(
  config: AnyConfig,
  path: epath.Path,
  mesh: Mesh,
  *,
  name: str,
  init_params: Callable[[jax.Array], Any],
  step: Callable[..., tuple[TrainState, loop.Metrics]],
  feed: loop.Feed,
  put: Callable[[Any], Any],
  evaluate: Evaluate,
  best_metric: Callable[[dict[str, float]], dict[str, float] | None],
) -> TrainState:
  """Trains to config.train.num_steps, from a checkpoint if there is one.

  Args:
    config: of either task.
    path: the workdir.
    mesh: where the state lives.
    name: of the model, for the log.
    init_params: key -> parameters.
    step: (state, batch, *, optimizer, schedule) -> (state, metrics).
    feed, put, best_metric: see loop.fit.
    evaluate: called with the metric writer as well.

  Raises:
    ConfigError: the workdir's run is longer than config.train.num_steps.
  """
  optimizer, schedule = make_optimizer(config.optim, config.train.num_steps)
  abstract, init = state_lib.abstract_and_init(
    init_params,
    optimizer,
    ema_decays=config.ema.decays,
    seed=config.seed,
    mesh=mesh,
  )
  count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(abstract.params))
  logger.info("%s: %s parameters", name, f"{count:,}")
  jitted = jax.jit(
    functools.partial(step, optimizer=optimizer, schedule=schedule),
    donate_argnums=0,
    out_shardings=(
      jax.tree.map(lambda x: x.sharding, abstract),
      sharding.replicated(mesh),
    ),
  )
  with contextlib.ExitStack() as stack:
    checkpointer = make_checkpointer(config.checkpoint, path)
    stack.callback(checkpointer.close)
    state = loop.restore_or_start(checkpointer, abstract, init, feed)
    if int(state.step) > config.train.num_steps:
      raise config_lib.ConfigError(
        f"train.num_steps={config.train.num_steps}, but {path} holds a run of "
        f"{int(state.step)} steps: raise it or use a new workdir"
      )
    writer = metrics.create_writer(
      path, resume_step=int(state.step) or -1, is_main=True
    )
    stack.callback(writer.close)
    return loop.fit(
      state,
      step_fn=jitted,
      feed=feed,
      put=put,
      schedule=loop.Schedule(
        num_steps=config.train.num_steps,
        log_every=config.train.log_every,
        eval_every=config.eval.every,
        checkpoint_every=config.checkpoint.every,
      ),
      evaluate=functools.partial(evaluate, writer=writer),
      best_metric=best_metric,
      checkpointer=checkpointer,
      writer=writer,
    )


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
    params = artifact.params
    if artifact.kind == "mae":
      # Its features need neither the decoder nor the classifier.
      params = {"encoder": params["encoder"]}
    params = jax.device_put(params, sharding.infer_sharding(params, mesh))
    loaded[name] = dataclasses.replace(artifact, params=params)
  return loaded


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


def mae_task(config: config_lib.MaeConfig) -> steps.MaeTask:
  """The static part of the encoder's step."""
  with naming("model"):
    mae = models.build_mae(**dataclasses.asdict(config.model))
  return steps.MaeTask(
    mae=mae,
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
  config: AnyConfig, source: data.ImageSource, batch_size: int
) -> data.Loader:
  """Endless shuffled batches of the training images."""
  return data.Loader(
    source,
    batch_size=batch_size,
    seed=config.seed,
    num_threads=config.data.num_threads,
  )


def make_checkpointer(
  config: config_lib.Checkpoint, path: epath.Path, *, read_only: bool = False
) -> checkpoint.Checkpointer:
  """The checkpoints of a workdir; a run that is going on may be read."""
  return checkpoint.Checkpointer(
    path / CHECKPOINTS,
    keep_latest=config.keep_latest,
    keep_every=config.keep_every,
    best_metric=config.best_metric,
    on_corrupt=config.on_corrupt,
    read_only=read_only,
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
