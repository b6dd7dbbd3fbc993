"""Generators to sample from: a run, an export, an artifact, the release."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from drift_jax import config as config_lib
from drift_jax.data.sources import imagenet_classes, readable_classes
from drift_jax.models.generator import build_generator
from drift_jax.system import numerics, processes, sharding, storage
from drift_jax.system.errors import naming
from drift_jax.tasks import parse_as
from drift_jax.tasks.generator.config import GeneratorConfig
from drift_jax.tasks.generator.judges import are_images, are_pixels
from drift_jax.tasks.generator.setup import (
  attention_kernel_for,
  init_generator,
  kernels_there,
  memory_on_chip_for,
  unroll_for,
)
from drift_jax.tasks.generator.step import FeatureSpace, GeneratorTask
from drift_jax.training import artifacts, autoencoders, checkpoint, places
from drift_jax.training.facts import CLASSES_FILE
from drift_jax.training.frozen import frozen_sums, load_vae
from drift_jax.training.workdir import (
  check_frozen,
  make_checkpointer,
)

# The range that a published generator was trained for (A.7); its metadata don't
# say it.
PUBLISHED_ALPHAS = (1.0, 4.0)
_LISTED = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenedGenerator:
  """A generator, ready to sample, and what is known of it.

  Attributes:
    task: the static part.
    params: one average of its parameters, on the mesh.
    vae: the autoencoder of its latents, or None.
    model_config: its arguments, under the published names.
    num_classes: labels lie in [0, num_classes).
    class_names: one for each label, or () if nobody recorded them.
    alpha_range: guidance scales that it was trained for.
    step: training steps that made it, if known.
    ema_decay: of the average, if known.
    provenance: where it comes from, fit for JSON.
    config: of its run; None for an artifact.
    arrays: whether samples are arrays of an encoder's space, which nothing
      decodes; else images, or latents of an autoencoder.
  """

  task: GeneratorTask
  params: Any
  vae: artifacts.Artifact | None
  model_config: Mapping[str, Any]
  num_classes: int
  class_names: tuple[str, ...]
  alpha_range: tuple[float, float]
  step: int | None
  ema_decay: float | None
  provenance: Mapping[str, Any]
  config: GeneratorConfig | None = None
  arrays: bool = False


def open_generator(
  source: str,
  mesh: Mesh,
  *,
  vae: str = "",
  step: int | None = None,
  ema_decay: float | None = None,
  decoded: bool = False,
) -> OpenedGenerator:
  """Opens a generator, wherever it is.

  Args:
    source: a run's workdir, an export, an artifact's folder, or hf://NAME of
      the authors' release, hf://OWNER/NAME[@REVISION][/FOLDER].
    mesh: where the parameters go.
    vae: folder of the autoencoder of an artifact's latents, or
      hf://OWNER/NAME; runs, exports and the authors' release know theirs, a
      run's may be given if it is not found.
    step, ema_decay: which parameters of a run; see open_run.
    decoded: whether its samples must be images, or arrays of a run that has
      no autoencoder.

  Raises:
    ArtifactError, CheckpointError: weights that can't be loaded.
    ConfigError: an option that this kind of source has no use for, or latents
      of no known autoencoder that are to be decoded.
    StorageError: a bucket that can't be read.
  """
  if config_lib.is_run(source):
    paths = {"vae.path": vae} if vae else {}
    return open_run(source, mesh, step=step, ema_decay=ema_decay, paths=paths)
  for name, value in (("step", step), ("ema_decay", ema_decay)):
    if value is not None:
      raise config_lib.ConfigError(
        f"{name}={value!r} chooses among a run's checkpoints, but {source} is "
        "none: leave it out"
      )
  return open_artifact(source, vae, mesh, decoded=decoded)


def _check_images(model_config: Mapping[str, Any]) -> None:
  """Raises ConfigError if samples are latents, for which there is no vae."""
  channels = model_config.get("out_channels")
  if channels not in (1, 3):
    raise config_lib.ConfigError(
      f"samples of {channels} channels are the latents of an autoencoder: give "
      "it, vae=hf://OWNER/NAME of diffusers' or vae=FOLDER "
      "(drift_jax.tools.convert_weights vae writes it)"
    )


def open_run(
  workdir: str,
  mesh: Mesh,
  *,
  step: int | None = None,
  ema_decay: float | None = None,
  paths: Mapping[str, str] | None = None,
  check: Callable[[GeneratorConfig], None] | None = None,
) -> OpenedGenerator:
  """Restores one EMA of a run, without optimiser, queue or encoders.

  Args:
    workdir: of the run.
    mesh: where the parameters go.
    step: checkpoint; None takes the best one if the run ranks them, else the
      newest.
    ema_decay: which average; None takes the one that the run evaluates.
    paths: {dotted key of the config: where it is now}, of what is not found;
      see `places.of_run`.
    check: looks for the files of the run's config that will be read, vae.path
      among them; None looks for that alone.

  Raises:
    ConfigError: no run there, not a generator's, an unknown decay, or an
      autoencoder that is not there or not the one that the run began with.
    ArtifactError: an autoencoder that can't be loaded.
    CheckpointError: no such checkpoint, a damaged one, or parameters that are
      not finite.
    StorageError: a bucket that can't be read.
  """
  numerics.require()
  # 1. The config, and the autoencoder that it names.
  config = _read_config(workdir, paths or {})
  decay = config.eval.ema_decay if ema_decay is None else ema_decay
  if decay not in config.ema.decays:
    raise config_lib.ConfigError(
      f"ema_decay={decay} was not kept: valid options are {config.ema.decays}"
    )
  if check is None:
    places.check_there(config, workdir, ["vae.path"])
  else:
    check(config)
  vae = load_vae(config.vae, mesh)
  check_frozen(epath.Path(workdir), frozen_sums({}, vae))
  # 2. The network on these devices, and its parameters.
  arguments = dataclasses.asdict(config.model)
  with naming("model"):
    module = build_generator(**arguments)
  task = sampling_task(
    _computed_on(module, mesh, kernels_there(config.train.kernels, mesh)),
    pixels=are_pixels(config),
  )
  step, params = _restore(workdir, config, task, mesh, step, decay)
  # 3. What is known of it.
  file = epath.Path(workdir) / CLASSES_FILE
  names = storage.read_json(file, list) if file.exists() else []
  published = artifacts.abstract("gen", arguments).metadata["model_config"]
  return OpenedGenerator(
    task=task,
    params=params,
    vae=vae,
    model_config=published,
    num_classes=config.model.num_classes,
    class_names=readable_classes(names),
    alpha_range=(config.guidance.minimum, config.guidance.maximum),
    step=step,
    ema_decay=decay,
    provenance={"workdir": workdir, "step": step, "ema_decay": decay},
    config=config,
    arrays=not are_images(config, vae),
  )


def _read_config(workdir: str, paths: Mapping[str, str]) -> GeneratorConfig:
  storage.check(workdir)
  file = epath.Path(workdir) / config_lib.CONFIG_FILE
  if not file.exists():
    raise config_lib.ConfigError(f"no run in {workdir}: {file} is missing")
  values = places.of_run(storage.read_json(file, dict), workdir, paths)
  return parse_as(values, GeneratorConfig, workdir)


def _restore(
  workdir: str,
  config: GeneratorConfig,
  task: GeneratorTask,
  mesh: Mesh,
  step: int | None,
  decay: float,
) -> tuple[int, Any]:
  """Restores one average of the parameters; returns (step, parameters)."""
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
  bad = [
    sharding.path_name(path)
    for path, fine in jax.tree.leaves_with_path(jax.device_get(_finite(params)))
    if not fine
  ]
  if bad:
    raise checkpoint.CheckpointError(
      f"step {step} of {workdir}, ema/{decay}: {', '.join(bad[:_LISTED])} "
      f"({len(bad)} arrays in all) are not finite: take another step"
    )
  return step, params


@jax.jit
def _finite(params: Any) -> Any:
  return jax.tree.map(lambda x: jnp.isfinite(x).all(), params)


def open_artifact(
  source: str, vae: str, mesh: Mesh, *, decoded: bool = False
) -> OpenedGenerator:
  """Opens a generator of ours or of the release, from its folder.

  What will be missing is said before the parameters are downloaded: the
  autoencoder, or space on the disk.

  Args:
    source: folder of kind 'gen', or what else artifacts.load reads.
    vae: folder or hf://OWNER/NAME of the autoencoder of its latents; '' takes
      that of an export or of its metadata, and means pixels if there is none.
    mesh: where the parameters go.
    decoded: whether its samples must be images.

  Raises:
    ArtifactError: weights that can't be loaded or are no generator's.
    ConfigError: samples that are to be images, and are latents.
  """
  numerics.require()
  # 1. Its metadata, and the autoencoder.
  described = artifacts.describe(source)
  if described.kind != "gen":
    raise artifacts.ArtifactError(
      f"{source} holds a model of kind {described.kind!r}, want 'gen'"
    )
  metadata, about = described.metadata, {}
  dtype = "float32"
  if not vae and (vae := artifacts.exported_vae(source)):
    dtype = ""  # the precision in which it decodes the export's images
  if not vae:
    vae = autoencoders.belonging_to(source, described)
    about = {"vae": vae} if vae else {}
  if decoded and not (vae or metadata.get("arrays")):
    _check_images(metadata["model_config"])
  # 2. Parameters, the smaller ones first.
  autoencoders.check_space(described, vae)
  section = config_lib.Vae(
    path=vae, dtype=dtype, sharding="fsdp", remat=False, model={}
  )
  autoencoder = load_vae(section, mesh)
  if autoencoder is not None:
    _check_channels(vae, autoencoder.module, metadata["model_config"])
  opened = artifacts.opened(source)
  artifact = opened.artifact
  shardings = sharding.infer_sharding(artifact.params, mesh)
  params = opened.read(sharding.abstract(artifact.params, shardings))
  module: Any = artifact.module
  # 3. What is known of it.
  alphas = metadata.get("alpha_range", PUBLISHED_ALPHAS)
  names = metadata.get("class_names")
  _check_facts(source, module.num_classes, alphas, names)
  if names is None and module.num_classes == len(imagenet_classes()):
    names = list(imagenet_classes())
  known = artifacts.trained_for(metadata)
  arrays = not vae and bool(metadata.get("arrays"))
  pixels = not (vae or arrays) and module.out_channels in (1, 3)
  return OpenedGenerator(
    task=sampling_task(_computed_on(module, mesh, "auto"), pixels=pixels),
    params=params,
    vae=autoencoder,
    model_config=metadata["model_config"],
    num_classes=module.num_classes,
    class_names=readable_classes(names or ()),
    alpha_range=tuple(alphas),
    arrays=arrays,
    provenance={
      "weights": source,
      "sha256": artifact.sha256,
      **known,
      **about,
    },
    **known,
  )


def _check_channels(vae: str, module: Any, model_config: Any) -> None:
  """Raises ArtifactError for the autoencoder of other latents."""
  channels = model_config.get("out_channels")
  if module.latent_channels != channels:
    raise artifacts.ArtifactError(
      f"vae={vae!r} is of latents of {module.latent_channels} channels, but "
      f"the generator's samples have {channels}"
    )


def _computed_on(module: Any, mesh: Mesh, kernels: str) -> Any:
  """Returns the generator with the kernels of a mesh's devices."""
  return module.clone(
    attention_kernel=attention_kernel_for(kernels, mesh),
    memory_on_chip=memory_on_chip_for(kernels, mesh),
    unroll=unroll_for(module.depth, mesh),
  )


def sampling_task(module: Any, *, pixels: bool) -> GeneratorTask:
  """The static part of a generator that is sampled and not trained."""
  return GeneratorTask(
    generator=module,
    features=FeatureSpace(encoders={}, options={}, sample=True),
    sample_shape=(module.input_size, module.input_size, module.out_channels),
    pixels=pixels,
    noise_shape=(module.input_size, module.input_size, module.in_channels),
    style_tokens=module.style_tokens,
    style_vocab=module.style_vocab,
    condition_shape=module.condition_shape,
    num_generated=1,
    drift={},
    guidance={},
  )


def _check_facts(
  source: str, num_classes: int, alphas: Any, names: Any
) -> None:
  """Raises ArtifactError for damaged facts beside the weights."""
  numbers = isinstance(alphas, (list, tuple)) and all(
    isinstance(alpha, (int, float)) for alpha in alphas
  )
  if not numbers or len(alphas) != 2 or not alphas[0] <= alphas[1]:
    raise artifacts.ArtifactError(
      f"{source}: its metadata have alpha_range={alphas!r}, want [LOW, HIGH]"
    )
  if names is None:
    return
  texts = isinstance(names, list) and all(isinstance(n, str) for n in names)
  if not texts or len(names) != num_classes:
    raise artifacts.ArtifactError(
      f"{source}: its metadata have class_names={names!r:.60}, want a name for "
      f"each of its {num_classes} classes, or null"
    )


def identity(opened: OpenedGenerator) -> dict[str, Any]:
  """Identifies a generator: what decides its images beside the request.

  Weights are identified by their numbers, wherever they lie and however they
  are split over devices. The result is fit for JSON.
  """
  generator: Any = opened.task.generator
  found = {
    "weights": _fingerprint(opened.params),
    "dtype": str(generator.dtype),
    "attention_dtype": str(generator.attention_dtype),
    "vae": None,
    "vae_dtype": None,
  }
  if opened.vae is not None:
    module: Any = opened.vae.module
    found["vae"] = _fingerprint(opened.vae.params)
    found["vae_dtype"] = str(module.dtype)
  return found


def _fingerprint(params: Any) -> str:
  """SHA-256 of the arrays: names, shapes, dtypes and numbers."""
  checksum = hashlib.sha256()
  for path, x in jax.tree.leaves_with_path(params):
    values = processes.fetch(x)
    facts = [sharding.path_name(path), values.shape, str(values.dtype)]
    checksum.update(json.dumps(facts).encode())
    checksum.update(values.tobytes())
  return checksum.hexdigest()


def read_style(values: int | Sequence[int], task: GeneratorTask) -> np.ndarray:
  """Reads style indices [S] int32: one for all tokens, or one for each.

  -1 leaves an index to chance.

  Raises:
    ConfigError: another number of them, one out of range or no integer.
  """
  array = np.atleast_1d(np.asarray(values))
  if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
    raise config_lib.ConfigError(
      f"style={values!r}: want one index, or a list of them"
    )
  values = array.tolist()
  assert isinstance(values, list)
  given = values * (task.style_tokens if len(values) == 1 else 1)
  if len(given) != task.style_tokens:
    raise config_lib.ConfigError(
      f"style={list(values)}: want one index, or {task.style_tokens}, one for "
      "each style token of this generator"
    )
  for index in given:
    if not -1 <= index < task.style_vocab:
      raise config_lib.ConfigError(
        f"style={list(values)}: {index} is not in [0, {task.style_vocab}), "
        "nor -1, which leaves it to chance"
      )
  return np.array(given, np.int32)


def check_alpha(alpha: float, trained: tuple[float, float]) -> None:
  """Raises ConfigError for an alpha outside the trained range."""
  if not trained[0] <= alpha <= trained[1]:
    raise config_lib.ConfigError(
      f"alpha={alpha}: this generator was trained for alpha in "
      f"[{trained[0]}, {trained[1]}]"
    )
