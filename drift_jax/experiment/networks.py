"""From a config to networks: encoders, tasks, initial parameters."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from drift_jax import artifacts, drift, models, sharding, steps
from drift_jax import config as config_lib
from drift_jax.experiment.runs import naming
from drift_jax.models.vae import Vae

# What an artifact records of how its model was run, not of what it is.
_PRECISION = ("use_bf16", "use_remat", "attn_fp32")
_ENCODERS = ("mae", "convnext")


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
    artifact = artifacts.load(section.path, dtype=section.dtype)
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
  want = _described(key, section, (artifact.kind,)).metadata["model_config"]
  have = artifact.metadata["model_config"]
  different = [
    f"{name}: {have[name]!r}, want {want[name]!r}"
    for name in sorted(set(want) & set(have) - set(_PRECISION))
    if have[name] != want[name]
  ]
  if different:
    raise artifacts.ArtifactError(
      f"{key}.path={section.path!r} holds another model than {key}.model: "
      f"{'; '.join(different)}. Give the path of that model, or describe this "
      f"one in {key}.model ({{}} takes any)"
    )


def _abstract(
  key: str,
  section: config_lib.Encoder | config_lib.Vae,
  kinds: Sequence[str],
  mesh: Mesh,
) -> artifacts.Artifact:
  if section.model:
    artifact = _as_frozen(_described(key, section, kinds), section)
  elif epath.Path(section.path).exists():
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
  if isinstance(section, config_lib.Encoder):
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


def _unroll(depth: int, mesh: Mesh) -> int:
  """Blocks in a round of the loop over the generator's depth.

  A loop copies what it keeps for the backward pass into stacks. CPUs feel it:
  on two cores the digits generator's step takes 1.6 times as long. But unrolled
  blocks take longer to compile, and blocks of parameters in parts are to be
  gathered one by one.
  """
  is_cpu = mesh.devices.flat[0].platform == "cpu"
  return depth if is_cpu and mesh.shape["fsdp"] == 1 and depth <= 4 else 1


def generator_task(
  config: config_lib.GeneratorConfig,
  encoders: Mapping[str, artifacts.Artifact],
  mesh: Mesh,
) -> steps.GeneratorTask:
  """The static part of the generator's step, for the mesh's devices.

  Raises:
    ConfigError: a model that can't be, kernels that don't run there.
  """
  model = config.model
  at_once = config.train.accum_labels or config.batch.labels
  kernel = kernel_for(config.train.kernels, mesh)
  with naming("model"):
    generator = models.build_generator(**dataclasses.asdict(model))
  generator = generator.clone(
    attention_kernel=attention_kernel_for(config.train.kernels, mesh),
    unroll=_unroll(model.depth, mesh),
  )
  return steps.GeneratorTask(
    generator=generator,
    features=feature_space(config, encoders),
    sample_shape=(model.input_size, model.input_size, model.out_channels),
    style_tokens=model.style_tokens,
    style_vocab=model.style_vocab,
    num_generated=config.batch.generated,
    drift=dataclasses.asdict(config.drift),
    guidance=dataclasses.asdict(config.guidance),
    kernel=kernel,
    groups=config.batch.labels // at_once,
    exact=config.train.accum_scalars == "exact",
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
