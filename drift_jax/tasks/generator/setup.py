"""From a config to networks: encoders, tasks, kernels, initial parameters."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from drift_jax import config as config_lib
from drift_jax.data.feed import GroupedFeed, QueueFeed
from drift_jax.data.readers import Reader
from drift_jax.drift.many import Kernel
from drift_jax.models.generator import build_generator
from drift_jax.system import devices, storage
from drift_jax.system.console import logger
from drift_jax.system.errors import naming
from drift_jax.tasks.generator import step as step_lib
from drift_jax.tasks.generator.config import GeneratorConfig, of_one_class
from drift_jax.tasks.generator.judges import are_pixels
from drift_jax.training import artifacts
from drift_jax.training.drifting import drift_arguments, init_drift
from drift_jax.training.frozen import decoding
from drift_jax.training.inputs import make_loader, with_num_classes
from drift_jax.training.run import Recipe, check_divides
from drift_jax.training.step import apply
from drift_jax.training.workdir import has_checkpoints

# Those whose `features` has the options of the config's section `features`.
_RESIDUAL = ("mae", "resnet")
# Of generators from B on, whose width is this, with blocks recomputed in full:
# bytes of a GPU for each image (generated, positive or unconditional) of the
# labels that it computes at once, and for all else. No less than what was
# compiled: docs/scaling.md has the table.
_LARGE = 768
_GPU_BYTES = {
  "latents": (4e9, 19e6),
  "latents, 640": (11e9, 41e6),
  "pixels": (12e9, 160e6),
}


def decoded_encoders(
  encoders: Mapping[str, config_lib.Encoder],
) -> frozenset[str]:
  """Names the encoders that read decoded samples."""
  return frozenset(name for name, e in encoders.items() if e.decode)


def frozen_params(
  task: step_lib.GeneratorTask,
  encoders: Mapping[str, artifacts.Artifact],
  vae: artifacts.Artifact | None,
) -> dict[str, Any]:
  """Collects the frozen parameters of the step; see FeatureSpace."""
  params = {name: encoders[name].params for name in task.features.encoders}
  if task.features.vae is not None:
    assert vae is not None  # feature_space has its module from it
    params[step_lib.VAE_KEY] = vae.params
  return params


def check_encoders(
  config: GeneratorConfig,
  task: step_lib.GeneratorTask,
  encoders: Mapping[str, artifacts.Artifact],
  vae: artifacts.Artifact | None,
) -> None:
  """Raises ConfigError for an encoder that can't read what it is given."""
  sample = jax.ShapeDtypeStruct((1, *task.sample_shape), np.float32)
  decoded = decoded_encoders(config.encoders)
  for name, artifact in encoders.items():
    in_loss = name in task.features.encoders
    image, what = sample, "samples"
    if name in decoded:
      assert vae is not None  # the config's checks ask for vae.path
      with naming(f"vae on samples of shape {task.sample_shape}"):
        image = jax.eval_shape(decoding(vae), vae.params, sample)
      what = "decoded samples"
    with naming(f"encoders.{name} on {what} of shape {image.shape[1:]}"):
      jax.eval_shape(
        functools.partial(
          apply,
          artifact.module,
          method="features" if in_loss else "pooled",
          **task.features.options.get(name, {}),
        ),
        artifact.params,
        image,
      )


def feature_space(
  config: GeneratorConfig,
  encoders: Mapping[str, artifacts.Artifact],
  vae: artifacts.Artifact | None,
) -> step_lib.FeatureSpace:
  """Describes the feature vectors that enter the loss (A.5)."""
  features = dataclasses.asdict(config.features)
  sample, tokens, shift = map(features.pop, ("sample", "tokens", "shift"))
  in_loss = {n: a for n, a in encoders.items() if config.encoders[n].in_loss}
  decoded = decoded_encoders(config.encoders) & in_loss.keys()
  decoder: Any = None
  if decoded:
    assert vae is not None  # the config's checks ask for vae.path
    decoder = vae.module
  return step_lib.FeatureSpace(
    encoders={name: a.module for name, a in in_loss.items()},
    options={
      name: features if a.kind in _RESIDUAL else {}
      for name, a in in_loss.items()
    },
    sample=sample,
    tokens=tokens,
    shift=shift,
    decoded=decoded,
    vae=decoder,
  )


def generator_task(
  config: GeneratorConfig,
  encoders: Mapping[str, artifacts.Artifact],
  mesh: Mesh,
  vae: artifacts.Artifact | None = None,
) -> step_lib.GeneratorTask:
  """Makes the static part of the step, for the mesh's devices.

  Args:
    config: config of the run.
    encoders: its encoders; none if only samples are drawn.
    mesh: where it runs.
    vae: decodes samples for encoders that ask for it.

  Raises:
    ConfigError: a model that can't be, kernels that don't run there.
  """
  model = config.model
  at_once = labels_at_once(config, mesh)
  kernel = kernel_for(config.train.kernels, mesh)
  of_drift = drift_arguments(config.drift)
  has_kernel = of_drift["variant"].has_kernel
  if config.train.kernels == "pallas" and (
    not has_kernel or of_drift["temperature"]
  ):
    raise config_lib.ConfigError(
      "train.kernels='pallas': the kernel is of the paper's drifting field and "
      "of W-Flow's, config.drift asks for another; 'auto' and 'xla' compute it"
    )
  with naming("model"):
    generator = build_generator(**dataclasses.asdict(model))
  generator = generator.clone(
    attention_kernel=attention_kernel_for(config.train.kernels, mesh),
    memory_on_chip=memory_on_chip_for(config.train.kernels, mesh),
    remat=remat_for(model.remat, mesh),
    unroll=unroll_for(model.depth, mesh),
  )
  return step_lib.GeneratorTask(
    generator=generator,
    features=feature_space(config, encoders, vae),
    sample_shape=(model.input_size, model.input_size, model.out_channels),
    pixels=are_pixels(config),
    noise_shape=(model.input_size, model.input_size, model.in_channels),
    style_tokens=model.style_tokens,
    style_vocab=model.style_vocab,
    condition_shape=generator.condition_shape,
    num_generated=config.batch.generated,
    **of_drift,
    guidance=dataclasses.asdict(config.guidance),
    kernel=kernel,
    groups=config.batch.labels // at_once,
    exact=config.train.accum_scalars == "exact",
    num_negatives=config.batch.negatives,
    detached_at_once=config.train.detached_at_once,
  )


def init_generator(task: step_lib.GeneratorTask) -> Callable[[jax.Array], Any]:
  """key -> the generator's initial parameters."""

  def init(key: jax.Array) -> Any:
    params_key, noise_key = jax.random.split(key)
    return task.generator.init(
      {"params": params_key, "noise": noise_key},
      np.zeros(1, np.int32),
      np.ones(1, np.float32),
      **task.of_conditions(lambda shape: np.zeros((1, *shape), np.float32)),
    )["params"]

  return init


def generator_recipe(task: step_lib.GeneratorTask, frozen: Any) -> Recipe:
  """How a generator is trained.

  Args:
    task: the static part of its step.
    frozen: parameters; see frozen_params.
  """
  generator: Any = task.generator
  return Recipe(
    name="generator",
    init_params=init_generator(task),
    init_drift=functools.partial(init_drift, task.temperature),
    step=functools.partial(step_lib.train_step, task=task),
    batch=step_lib.GeneratorBatch,
    frozen=frozen,
    computed=f"{np.dtype(generator.dtype)}, kernels: "
    f"{generator.attention_kernel} for "
    f"{'blocks' if generator.memory_on_chip else 'attention'}, "
    f"{task.kernel} for losses, "
    f"remat: {generator.remat}"
    + f", in {task.groups} groups of labels"
    * (task.groups > 1),
  )


def generator_feed(
  config: GeneratorConfig, reader: Reader
) -> QueueFeed | GroupedFeed:
  """Makes the feed of reals that config.batch.reals names.

  Raises:
    ConfigError: too few images of a class, or labels that the processes
      can't share.
  """
  batch, feed = config.batch, GroupedFeed
  sizes = {
    "seed": config.seed,
    "num_labels": batch.labels,
    "num_positives": batch.positives,
    "num_unconditional": batch.unconditional,
  }
  with naming("data"):
    if batch.reals == "condition_grouped":
      from drift_jax.data.conditions import ConditionFeed as feed  # seldom
    if batch.reals != "queue":
      return feed(
        reader,
        **sizes,
        num_threads=config.data.num_threads,
        num_workers=config.data.num_workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
      )
    queue = dataclasses.asdict(config.queue)
    pushed = config.queue.push_per_step * jax.process_count()
    return QueueFeed(make_loader(config, reader, pushed), **sizes, **queue)


def with_classes(
  config: GeneratorConfig, reader: Reader, workdir: str
) -> GeneratorConfig:
  """Returns the config with the data's classes; see `of_one_class`.

  Raises:
    ConfigError: see inputs.with_num_classes; a damaged config in the workdir.
  """
  if not config.model.num_classes and len(reader.class_names) == 1:
    file = epath.Path(workdir) / config_lib.CONFIG_FILE
    goes_on = has_checkpoints(epath.Path(workdir)) and file.exists()
    written = storage.read_json(file, dict) if goes_on else None
    new = of_one_class(config, written)
    if new != config:
      logger.info(
        "data: one class %r, so there is no guidance: guidance.maximum=1, "
        "batch.unconditional=0, eval.alphas=(1.0,).",
        *reader.class_names,
      )
    config = new
  return with_num_classes(_with_conditions(config, reader), reader)


def _with_conditions(
  config: GeneratorConfig, reader: Reader
) -> GeneratorConfig:
  """Returns the config with the sizes of the data's conditions.

  Raises:
    ConfigError: other sizes than the data's.
  """
  if reader.conditions is None:
    return config
  *tokens, size = reader.conditions.shape[1:]
  found = {"condition_size": size, "condition_tokens": sum(tokens)}
  for name, value in found.items():
    if getattr(config.model, name) not in (0, value):
      raise config_lib.ConfigError(
        f"data.conditions={config.data.conditions!r} holds conditions of shape "
        f"{reader.conditions.shape[1:]}, model.{name}="
        f"{getattr(config.model, name)}: set it to {value}, or to 0 for what "
        "the data have"
      )
  model = dataclasses.replace(config.model, **found)
  return dataclasses.replace(config, model=model)


def check_condition_size(config: GeneratorConfig) -> None:
  """Raises ConfigError if the data would have to tell model.condition_size."""
  if config.data.conditions and not config.model.condition_size:
    raise config_lib.ConfigError(
      "model.condition_size=0 takes what data.conditions has, but no data are "
      "read here: set it"
    )


def check_labels(config: GeneratorConfig, mesh: Mesh) -> None:
  """Raises ConfigError if labels can't be split over the mesh."""
  check_divides("batch.labels", config.batch.labels, mesh)
  check_divides("train.accum_labels", labels_at_once(config, mesh), mesh)


def attention_kernel_for(kernels: str, mesh: Mesh) -> str:
  """Names the kernel of attention on the mesh's devices; see layers.Attention.

  cuDNN's needs NVIDIA's Ampere or newer; AMD's devices are 'gpu' as well, but
  their capability is no number.
  """
  capability = str(getattr(mesh.devices.flat[0], "compute_capability", ""))
  major = capability.partition(".")[0]
  if kernels == "auto" and major.isdigit() and int(major) >= 8:
    return "cudnn"
  if kernels == "auto" and mesh.devices.flat[0].platform == "cpu":
    return "xla_by_head"
  return "pallas" if kernel_for(kernels, mesh) == "pallas" else "xla"


# Bytes on chip that a kernel may take, of those that have enough for an MLP's
# weights and their gradients: 128 and 64 MiB, less what the compiler needs.
_MEMORY_ON_CHIP = {
  "TPU v5 lite": 110 * 2**20,
  "TPU v6 lite": 110 * 2**20,
  "TPU v5": 56 * 2**20,
}


def memory_on_chip_for(kernels: str, mesh: Mesh) -> int:
  """Bytes for the kernel of a branch on the mesh's devices: layers.Block."""
  if kernel_for(kernels, mesh) != "pallas":
    return 0
  return _MEMORY_ON_CHIP.get(mesh.devices.flat[0].device_kind, 0)


def remat_for(remat: str, mesh: Mesh) -> str:
  """What 'auto' is on the mesh's devices, see Generator; others as they are.

  GPUs have less memory for what they compute: docs/scaling.md has the table.
  """
  if remat != "auto":
    return remat
  on_gpu = mesh.devices.flat[0].platform == "gpu"
  return "full" if on_gpu else "attention"


def labels_at_once(config: GeneratorConfig, mesh: Mesh) -> int:
  """Labels of a step that are computed at once, over all devices.

  train.accum_labels, or where that is -1: on GPUs whose memory is known, as
  many as fit, of generators in the published sizes; else all. Groups cost
  operations, and groups with scalars of their own are another loss, which
  nobody gets unasked.

  Raises:
    DeviceError: see devices.memory_fraction.
  """
  batch, asked = config.batch, config.train.accum_labels
  device = mesh.devices.flat[0]
  if asked > 0:
    return asked
  if (
    asked == 0
    or device.platform != "gpu"
    or config.model.hidden_size < _LARGE
    or config.train.accum_scalars == "group"
  ):
    return batch.labels
  memory, _ = devices.available_memory(device)
  if memory is None:
    return batch.labels
  rest, an_image = _GPU_BYTES[_load(config)]
  images = batch.generated + batch.positives + batch.unconditional
  images += batch.negatives

  def takes(labels: int) -> float:
    return rest + labels / mesh.size * images * an_image

  if takes(batch.labels) <= memory:
    return batch.labels
  # Small groups cost no more than large ones: room is left.
  sizes = range(mesh.size, batch.labels, mesh.size)
  return max(
    (n for n in sizes if batch.labels % n == 0 and takes(n) <= 0.8 * memory),
    default=mesh.size,
  )


def _load(config: GeneratorConfig) -> str:
  """A key of _GPU_BYTES: the larger one in doubt."""
  encoders = [e for e in config.encoders.values() if e.in_loss]
  if not config.vae.path or any(e.decode for e in encoders):
    return "pixels"
  widths = [e.model.get("base_channels", math.inf) for e in encoders]
  return "latents" if max(widths, default=0) <= 256 else "latents, 640"


def kernels_there(kernels: str, mesh: Mesh) -> str:
  """Adapts train.kernels of a run to the devices that sample from it.

  A kernel changes how a network is computed, not its numbers: 'pallas' becomes
  'auto' if there are no TPUs.
  """
  on_tpu = mesh.devices.flat[0].platform == "tpu"
  return "auto" if kernels == "pallas" and not on_tpu else kernels


def kernel_for(kernels: str, mesh: Mesh) -> Kernel:
  """Names the kernel of the drifting losses on the mesh's devices.

  Raises:
    ConfigError: kernels that these devices don't run.
  """
  platform = mesh.devices.flat[0].platform
  if kernels == "pallas" and platform != "tpu":
    raise config_lib.ConfigError(
      f"train.kernels='pallas' needs TPUs, but this mesh is of {platform} "
      "devices: 'auto' takes what there is, 'xla' runs anywhere"
    )
  if kernels == "auto":
    theirs: dict[str, Kernel] = {"tpu": "pallas", "gpu": "early"}
    return theirs.get(platform, "xla")
  return "xla" if kernels == "xla" else "pallas"


def unroll_for(depth: int, mesh: Mesh) -> int:
  """Returns how many blocks a round of the loop over the depth holds.

  A loop copies what it keeps for the backward pass into stacks. CPUs feel it:
  on two cores the digits generator's step takes 1.6 times as long. But unrolled
  blocks take longer to compile, and blocks of parameters in parts are to be
  gathered one by one.
  """
  is_cpu = mesh.devices.flat[0].platform == "cpu"
  return depth if is_cpu and mesh.shape["fsdp"] == 1 and depth <= 4 else 1
