"""From a config to networks: encoders, tasks, initial parameters."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from drift_jax import artifacts, drift, models, sharding, steps
from drift_jax import config as config_lib
from drift_jax.console import logger
from drift_jax.data import readable_classes
from drift_jax.experiment.data_facts import renamed
from drift_jax.experiment.runs import naming
from drift_jax.models.vae import Vae

# What an artifact records of how its model was run, not of what it is.
_PRECISION = ("use_bf16", "use_remat", "attn_fp32")
_ENCODERS = ("mae", "convnext", "resnet")
# Those whose `features` has the options of the config's section `features`.
_RESIDUAL = ("mae", "resnet")


def load_encoders(
  encoders: Mapping[str, config_lib.Encoder], mesh: Mesh
) -> dict[str, artifacts.Artifact]:
  """The frozen encoders, their parameters on the mesh.

  Raises:
    ArtifactError: naming the encoder, for anything that can't be loaded.
  """
  return {
    name: _place(_load(f"encoders.{name}", encoder, _ENCODERS), encoder, mesh)
    for name, encoder in encoders.items()
  }


def load_vae(config: config_lib.Vae, mesh: Mesh) -> artifacts.Artifact | None:
  """The autoencoder behind latents, on the mesh; None where there is none.

  A dtype of '' is its own, as it is stored.

  Raises:
    ArtifactError: for anything that can't be loaded.
  """
  if not config.path:
    return None
  return _place(_load("vae", config, ("vae",)), config, mesh)


def abstract_encoders(
  encoders: Mapping[str, config_lib.Encoder], mesh: Mesh
) -> dict[str, artifacts.Artifact]:
  """`load_encoders` with shapes for parameters: no weights need be there.

  Raises:
    ArtifactError: neither weights nor a model that says what they will be.
  """
  return {
    name: _abstract(f"encoders.{name}", encoder, _ENCODERS, mesh)
    for name, encoder in encoders.items()
  }


def abstract_vae(
  config: config_lib.Vae, mesh: Mesh
) -> artifacts.Artifact | None:
  """`load_vae` with shapes for parameters; see abstract_encoders."""
  if not config.path:
    return None
  return _abstract("vae", config, ("vae",), mesh)


def _load(
  key: str, section: config_lib.Encoder | config_lib.Vae, kinds: Sequence[str]
) -> artifacts.Artifact:
  try:
    artifact = artifacts.load(section.path, dtype=section.dtype or None)
  except artifacts.ArtifactError as error:
    raise artifacts.ArtifactError(f"{key}: {error}") from error
  _check_kind(f"{key}.path={section.path!r} holds", artifact.kind, kinds)
  if section.model:
    _check_model(key, section, artifact)
  return _as_frozen(artifact, section)


def _check_kind(what: str, kind: str, kinds: Sequence[str]) -> None:
  if kind not in kinds:
    raise artifacts.ArtifactError(
      f"{what} a model of kind {kind!r}, want one of {list(kinds)}: encoder "
      "training writes WORKDIR/encoder, and python -m "
      "drift_jax.tools.convert_weights the others"
    )


def _described(
  key: str, section: config_lib.Encoder | config_lib.Vae, kinds: Sequence[str]
) -> artifacts.Artifact:
  """What KEY.model describes."""
  arguments = dict(section.model)
  kind = arguments.pop("kind")
  _check_kind(f"{key}.model is", kind, kinds)
  try:
    return artifacts.abstract(kind, arguments, dtype=section.dtype)
  except artifacts.ArtifactError as error:
    raise artifacts.ArtifactError(f"{key}.model: {error}") from error


def _check_model(
  key: str,
  section: config_lib.Encoder | config_lib.Vae,
  artifact: artifacts.Artifact,
) -> None:
  """Raises ArtifactError where the weights are not of KEY.model."""
  _check_same(
    f"{key}.path={section.path!r}",
    artifact,
    _described(key, section, (artifact.kind,)),
    f"give the path of that model, or describe this one in {key}.model ({{}} "
    "takes any)",
  )


def _check_same(
  what: str,
  artifact: artifacts.Artifact,
  want: artifacts.Artifact,
  remedy: str,
) -> None:
  """Raises ArtifactError where an artifact is of another model than wanted."""
  have, wanted = (x.metadata["model_config"] for x in (artifact, want))
  different = [
    f"{name}: {have[name]!r}, want {wanted[name]!r}"
    for name in sorted(set(wanted) & set(have) - set(_PRECISION))
    if have[name] != wanted[name]
  ]
  if different:
    raise artifacts.ArtifactError(
      f"{what} holds another model than the config describes: "
      f"{'; '.join(different)}; {remedy}"
    )
  # What the metadata of a published model leave out shows in the shapes.
  shapes = [
    {
      jax.tree_util.keystr(path, simple=True, separator="/"): x.shape
      for path, x in jax.tree.leaves_with_path(x.params)
    }
    for x in (artifact, want)
  ]
  different = [
    f"{name}: {shapes[0].get(name)}, want {shape}"
    for name, shape in shapes[1].items()
    if shapes[0].get(name) != shape
  ]
  if different:
    raise artifacts.ArtifactError(
      f"{what} has parameters of other shapes than the config describes: "
      f"{'; '.join(different[:5])}; {remedy}"
    )


def _abstract(
  key: str,
  section: config_lib.Encoder | config_lib.Vae,
  kinds: Sequence[str],
  mesh: Mesh,
) -> artifacts.Artifact:
  if section.model:
    artifact = _as_frozen(_described(key, section, kinds), section)
  elif artifacts.exists(section.path):
    artifact = _load(key, section, kinds)
  else:
    raise artifacts.ArtifactError(
      f"{key}.path={section.path!r} is not there and {key}.model is empty: "
      "nothing says which model it will be. Train or convert it first, or "
      f"describe it in {key}.model, as configs/imagenet_latent.py does"
    )
  params = sharding.abstract(
    artifact.params, _frozen_sharding(artifact, section, mesh)
  )
  return dataclasses.replace(artifact, params=params)


def _as_frozen(
  artifact: artifacts.Artifact, section: config_lib.Encoder | config_lib.Vae
) -> artifacts.Artifact:
  """What a step needs of it: of a 'mae' only the encoder gives features."""
  params, module = artifact.params, artifact.module
  if artifact.kind == "mae":
    params = {"encoder": params["encoder"]}
  module = module.clone(remat=section.remat)
  return dataclasses.replace(artifact, module=module, params=params)


def _frozen_sharding(
  artifact: artifacts.Artifact,
  section: config_lib.Encoder | config_lib.Vae,
  mesh: Mesh,
) -> Any:
  if section.sharding == "fsdp":
    return sharding.infer_sharding(artifact.params, mesh)
  return jax.tree.map(lambda _: sharding.replicated(mesh), artifact.params)


def _place(
  artifact: artifacts.Artifact,
  section: config_lib.Encoder | config_lib.Vae,
  mesh: Mesh,
) -> artifacts.Artifact:
  placed = jax.device_put(
    artifact.params, _frozen_sharding(artifact, section, mesh)
  )
  return dataclasses.replace(artifact, params=placed)


def frozen_sums(
  encoders: Mapping[str, artifacts.Artifact], vae: artifacts.Artifact | None
) -> dict[str, str]:
  """SHA-256 of all frozen weights, by the config's section."""
  sums = {f"encoders.{name}": a.sha256 for name, a in encoders.items()}
  return sums if vae is None else sums | {"vae": vae.sha256}


def decoded_encoders(
  encoders: Mapping[str, config_lib.Encoder],
) -> frozenset[str]:
  """Names of those that read what the autoencoder makes of samples."""
  return frozenset(name for name, e in encoders.items() if e.decode)


def frozen_params(
  task: steps.GeneratorTask,
  encoders: Mapping[str, artifacts.Artifact],
  vae: artifacts.Artifact | None,
) -> dict[str, Any]:
  """The frozen parameters of the generator's step; see FeatureSpace."""
  params = {name: encoders[name].params for name in task.features.encoders}
  if task.features.vae is not None:
    assert vae is not None  # feature_space has its module from it
    params[steps.VAE_KEY] = vae.params
  return params


def check_encoders(
  config: config_lib.GeneratorConfig,
  task: steps.GeneratorTask,
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
          steps.apply,
          artifact.module,
          method="features" if in_loss else "pooled",
          **task.features.options.get(name, {}),
        ),
        artifact.params,
        image,
      )


def decoding(vae: artifacts.Artifact) -> Callable[[Any, jax.Array], jax.Array]:
  """(params, latents) -> images."""
  return functools.partial(steps.apply, vae.module, method="decode")


def feature_space(
  config: config_lib.GeneratorConfig,
  encoders: Mapping[str, artifacts.Artifact],
  vae: artifacts.Artifact | None,
) -> steps.FeatureSpace:
  """Which feature vectors of which encoders enter the loss (A.5)."""
  features = dataclasses.asdict(config.features)
  sample = features.pop("sample")
  in_loss = {n: a for n, a in encoders.items() if config.encoders[n].in_loss}
  decoded = decoded_encoders(config.encoders) & in_loss.keys()
  decoder: Any = None
  if decoded:
    assert vae is not None  # the config's checks ask for vae.path
    decoder = vae.module
  return steps.FeatureSpace(
    encoders={name: a.module for name, a in in_loss.items()},
    options={
      name: features if a.kind in _RESIDUAL else {}
      for name, a in in_loss.items()
    },
    sample=sample,
    decoded=decoded,
    vae=decoder,
  )


def attention_kernel_for(kernels: str, mesh: Mesh) -> str:
  """What computes attention on the mesh's devices: see layers.Attention.

  cuDNN's needs NVIDIA's Ampere or newer; AMD's devices are 'gpu' as well, but
  their capability is no number.
  """
  capability = str(getattr(mesh.devices.flat[0], "compute_capability", ""))
  major = capability.partition(".")[0]
  if kernels == "auto" and major.isdigit() and int(major) >= 8:
    return "cudnn"
  return kernel_for(kernels, mesh)


def kernels_there(kernels: str, mesh: Mesh) -> str:
  """train.kernels of a run whose weights are used on other devices.

  Kernels are how a network is computed, not what it is: 'pallas' becomes
  'auto' where there are no TPUs.
  """
  on_tpu = mesh.devices.flat[0].platform == "tpu"
  return "auto" if kernels == "pallas" and not on_tpu else kernels


def kernel_for(kernels: str, mesh: Mesh) -> drift.Kernel:
  """What computes the drifting losses on the mesh's devices.

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
    return "pallas" if platform == "tpu" else "xla"
  return "xla" if kernels == "xla" else "pallas"


def unroll_for(depth: int, mesh: Mesh) -> int:
  """Blocks in a round of the loop over the generator's depth.

  A loop copies what it keeps for the backward pass into stacks. CPUs feel it:
  on two cores the digits generator's step takes 1.6 times as long. But unrolled
  blocks take longer to compile, and blocks of parameters in parts are to be
  gathered one by one.
  """
  is_cpu = mesh.devices.flat[0].platform == "cpu"
  return depth if is_cpu and mesh.shape["fsdp"] == 1 and depth <= 4 else 1


# The section's keys that drift.drift_losses and drift.Variant take as they are.
_OF_LOSSES = (
  "temperatures",
  "affinity_floor",
  "normalization",
  "attraction",
  "repulsion",
)
_OF_VARIANT = (
  "field",
  "negatives",
  "guidance",
  "normalize_features",
  "normalize_drift",
  "diagnostics",
)


def drift_arguments(config: config_lib.Drift) -> dict[str, Any]:
  """What a GeneratorTask has of the drifting field.

  Raises:
    ConfigError: an unknown field or option, or what does not go together.
  """
  kind, rate = config.temperature_scale.kind, config.temperature_scale.rate
  with naming("drift"):
    for name, options in config.options.items():
      with naming(f"drift.options.{name}"):
        drift.check_field(name, options)
    if config.field != "softmax" and config.normalization != "xy":
      raise ValueError(
        f"normalization={config.normalization!r} is of the field 'softmax', "
        f"but field={config.field!r}: leave it at 'xy'"
      )
    variant = drift.Variant(
      **{name: getattr(config, name) for name in _OF_VARIANT},
      options=dict(config.options.get(config.field, {})),
      neighbours=config.temperature_scale.neighbours,
      learned=kind == "learned",
    )
  temperature = None
  if kind in ("annealed", "learned"):
    temperature = steps.Temperature(
      kind, rate, config_lib.LEAST_TEMPERATURE_SCALE
    )
  return {
    "drift": {name: getattr(config, name) for name in _OF_LOSSES},
    "variant": variant,
    "average": config.reduction == "mean",
    "temperature": temperature,
  }


def init_drift(
  task: steps.GeneratorTask | steps.PolicyTask,
) -> dict[str, Any]:
  """What the field learns, at the start: TrainState.drift."""
  return {} if task.temperature is None else task.temperature.init()


def generator_task(
  config: config_lib.GeneratorConfig,
  encoders: Mapping[str, artifacts.Artifact],
  mesh: Mesh,
  vae: artifacts.Artifact | None = None,
) -> steps.GeneratorTask:
  """The static part of the generator's step, for the mesh's devices.

  Args:
    config: of the run.
    encoders: of the run; none where only samples are drawn.
    mesh: of the run.
    vae: decodes samples for encoders that ask for it.

  Raises:
    ConfigError: a model that can't be, kernels that don't run there.
  """
  model = config.model
  at_once = config.train.accum_labels or config.batch.labels
  kernel = kernel_for(config.train.kernels, mesh)
  of_drift = drift_arguments(config.drift)
  changed = of_drift["variant"] != drift.PAPER or of_drift["temperature"]
  if config.train.kernels == "pallas" and changed:
    raise config_lib.ConfigError(
      "train.kernels='pallas': the kernel is of the paper's drifting field, "
      "config.drift asks for another; 'auto' and 'xla' compute it"
    )
  with naming("model"):
    generator = models.build_generator(**dataclasses.asdict(model))
  generator = generator.clone(
    attention_kernel=attention_kernel_for(config.train.kernels, mesh),
    unroll=unroll_for(model.depth, mesh),
  )
  return steps.GeneratorTask(
    generator=generator,
    features=feature_space(config, encoders, vae),
    sample_shape=(model.input_size, model.input_size, model.out_channels),
    noise_shape=(model.input_size, model.input_size, model.in_channels),
    style_tokens=model.style_tokens,
    style_vocab=model.style_vocab,
    num_generated=config.batch.generated,
    **of_drift,
    guidance=dataclasses.asdict(config.guidance),
    kernel=kernel,
    groups=config.batch.labels // at_once,
    exact=config.train.accum_scalars == "exact",
  )


def start_params(
  config: config_lib.GeneratorConfig | config_lib.MaeConfig,
  class_names: Sequence[str],
) -> Callable[[], Any] | None:
  """What loads the parameters that config.init_from names; None for none.

  They are checked against config.model, and raise ArtifactError where they are
  of another one. Where they know their classes by other names, it says so.

  Args:
    config: of the run.
    class_names: one for each label, of the run's data.
  """
  if not config.init_from:
    return None
  kind = "gen" if isinstance(config, config_lib.GeneratorConfig) else "mae"
  return functools.partial(
    _load_start, config.init_from, kind, config.model, class_names
  )


def _load_start(
  path: str,
  kind: str,
  model: config_lib.GeneratorModel | config_lib.MaeModel,
  class_names: Sequence[str],
) -> Any:
  try:
    artifact = artifacts.load(path, dtype="float32")
  except artifacts.ArtifactError as error:
    raise artifacts.ArtifactError(f"init_from: {error}") from error
  if artifact.kind != kind:
    raise artifacts.ArtifactError(
      f"init_from={path!r} holds a model of kind {artifact.kind!r}, but this "
      f"config trains one of kind {kind!r}"
    )
  want = artifacts.abstract(kind, dataclasses.asdict(model))
  _check_same(
    f"init_from={path!r}",
    artifact,
    want,
    "change config.model to that of the weights, or take other weights",
  )
  names = artifact.metadata.get("class_names") or ()
  others = renamed(readable_classes(names), readable_classes(class_names))
  if names and others:
    logger.warning(
      "init_from=%r: what it has learned of a class goes by its label, and "
      "the classes are others: %s.",
      path,
      "; ".join(others),
    )
  logger.info("Starting from the weights of %s.", path)
  return artifact.params


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
  images = jax.ShapeDtypeStruct((1, *sample_shape), np.float32)
  with naming(f"vae on images of shape {sample_shape}"):
    inputs = jax.eval_shape(
      functools.partial(steps.mae_inputs, noise=None, task=task),
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
