"""Frozen networks: autoencoders and encoders, loaded and placed on the mesh."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh

from drift_jax import config as config_lib
from drift_jax.config.sections import ImageConfig, ImageModel
from drift_jax.data.sources import readable_classes
from drift_jax.metrics.images import as_shown
from drift_jax.system import sharding, storage
from drift_jax.system.console import logger
from drift_jax.training import artifacts
from drift_jax.training.facts import renamed
from drift_jax.training.step import apply

# Arguments of an artifact that say how its model was run, not which it is.
_PRECISION = ("use_bf16", "use_remat", "attn_fp32")


# Platform of JAX whose convolutions are cuDNN's.
_CUDNN = "gpu"
# Kinds of models whose features a generator may drift in.
ENCODERS = ("mae", "convnext", "resnet")


def load_vae(
  section: config_lib.Vae, mesh: Mesh, *, weights: bool = True
) -> artifacts.Artifact | None:
  """Loads the autoencoder of latents, on the mesh; None if there is none.

  Diffusers' are converted, see autoencoders.local. A dtype of '' is its own, as
  it is stored. For `weights`, see load_encoders.

  Raises:
    ArtifactError: for anything that can't be loaded.
    WeightsError: weights of diffusers' that can't be converted.
  """
  if not section.path:
    return None
  on_hub = section.path.startswith(storage.HUB)
  if on_hub and (weights or not section.model):
    from drift_jax.training import autoencoders  # converters take a while

    try:
      path = autoencoders.local(section.path)
    except artifacts.ArtifactError as error:
      raise artifacts.ArtifactError(f"vae: {error}") from error
    section = dataclasses.replace(section, path=path)
  return _open("vae", section, ("vae",), mesh, weights)


def load_encoders(
  sections: Mapping[str, config_lib.Encoder],
  mesh: Mesh,
  *,
  weights: bool = True,
) -> dict[str, artifacts.Artifact]:
  """Loads the frozen encoders, their parameters on the mesh.

  Args:
    sections: {name: section} of the config.
    mesh: where the parameters go.
    weights: False gives shapes for parameters; no weights need be there if
      `model` describes the encoder.

  Raises:
    ArtifactError: naming the encoder, for anything that can't be loaded.
  """
  return {
    name: _open(f"encoders.{name}", section, ENCODERS, mesh, weights)
    for name, section in sections.items()
  }


def _open(
  key: str,
  section: config_lib.Frozen,
  kinds: Sequence[str],
  mesh: Mesh,
  weights: bool,
) -> artifacts.Artifact:
  # 1. The model: its description, if that is enough, or its weights' names.
  if section.model and not weights:
    opened, artifact = None, _described(key, section, kinds)
  else:
    opened = _opened(key, section, kinds, weights)
    artifact = opened.artifact
  # 2. What a step needs: of a 'mae' only the encoder.
  params = artifact.params
  if artifact.kind == "mae":
    params = {"encoder": params["encoder"]}
  module = artifact.module.clone(remat=section.remat)
  # 3. On the mesh, one parameter after the other.
  if section.sharding == "fsdp":
    shardings = sharding.infer_sharding(params, mesh)
  else:
    shardings = jax.tree.map(lambda _: sharding.replicated(mesh), params)
  params = sharding.abstract(params, shardings)
  # Not an autoencoder, which is small, and exported from the mesh.
  by_cudnn = mesh.devices.flat[0].platform == _CUDNN and artifact.kind != "vae"
  if by_cudnn and section.sharding != "fsdp":
    params = jax.tree.map(_as_cudnn_takes, params)
  if weights and opened is not None:
    logger.info("%s: the weights of %s.", key, section.path)
    with _naming(key):
      params = opened.read(params)
  return dataclasses.replace(artifact, module=module, params=params)


def _as_cudnn_takes(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  """A kernel [..., H, W, I, O] that lies in memory as [O, ..., H, W, I].

  cuDNN's convolutions take no other order, and a step would copy all kernels;
  in a stack XLA has O first. Anything else is as it was.
  """
  if len(x.shape) < 4 or x.shape[-2] == 1:
    return x
  *others, outputs = range(len(x.shape))
  order = (outputs, *others)
  return jax.ShapeDtypeStruct(
    x.shape, x.dtype, sharding=Format(Layout(order), x.sharding)
  )


def _opened(
  key: str,
  section: config_lib.Frozen,
  kinds: Sequence[str],
  weights: bool,
) -> artifacts.Opened:
  """The weights' files, checked against the config; nothing is read yet."""
  path = f"{key}.path={section.path!r}"
  on_hub = section.path.startswith(storage.HUB)
  if not (weights or on_hub or artifacts.exists(section.path)):
    raise artifacts.ArtifactError(
      f"{path} is not there and {key}.model is empty: "
      "nothing says which model it will be. Train or convert it first, or "
      f"describe it in {key}.model, as configs/imagenet_latent.py does"
    )
  with _naming(key):
    opened = artifacts.opened(section.path, dtype=section.dtype or None)
  artifact = opened.artifact
  check_kind(f"{path} holds", artifact.kind, kinds)
  if section.model:
    _check_same(
      path,
      artifact,
      _described(key, section, (artifact.kind,)),
      f"give the path of that model, or describe this one in {key}.model ({{}} "
      "takes any)",
    )
  return opened


def find(key: str, path: str) -> Sequence[Any]:
  """Looks for a frozen network; returns hub.Need of what is to be downloaded.

  Raises:
    ArtifactError: it is not there, or the hub can't be reached.
  """
  with _naming(key):
    if key == "vae" and path.startswith(storage.HUB):
      from drift_jax.training import autoencoders  # converters take a while

      return autoencoders.missing(path)
    return artifacts.describe(path).missing


@contextlib.contextmanager
def _naming(key: str) -> Iterator[None]:
  """Puts a name of the config before the message of an ArtifactError."""
  try:
    yield
  except artifacts.ArtifactError as error:
    raise artifacts.ArtifactError(f"{key}: {error}") from error


def check_kind(what: str, kind: str, kinds: Sequence[str]) -> None:
  """Raises ArtifactError unless a model is of one of the kinds."""
  if kind not in kinds:
    raise artifacts.ArtifactError(
      f"{what} a model of kind {kind!r}, want one of {list(kinds)}: encoder "
      "training writes WORKDIR/encoder, and python -m "
      "drift_jax.tools.convert_weights the others"
    )


def _described(
  key: str, section: config_lib.Frozen, kinds: Sequence[str]
) -> artifacts.Artifact:
  """Makes the model that KEY.model describes, with shapes for parameters."""
  arguments = dict(section.model)
  kind = arguments.pop("kind")
  check_kind(f"{key}.model is", kind, kinds)
  with _naming(f"{key}.model"):
    return artifacts.abstract(kind, arguments, dtype=section.dtype)


def _check_same(
  what: str,
  artifact: artifacts.Artifact,
  want: artifacts.Artifact,
  remedy: str,
) -> None:
  """Raises ArtifactError if an artifact holds another model than wanted."""
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


def frozen_sums(
  encoders: Mapping[str, artifacts.Artifact], vae: artifacts.Artifact | None
) -> dict[str, str]:
  """Returns the SHA-256 of all frozen weights, by the config's section."""
  sums = {f"encoders.{name}": a.sha256 for name, a in encoders.items()}
  return sums if vae is None else sums | {"vae": vae.sha256}


def decoding(vae: artifacts.Artifact) -> Callable[[Any, jax.Array], jax.Array]:
  """(params, latents) -> images, see as_shown."""

  def decode(params: Any, latents: jax.Array) -> jax.Array:
    return as_shown(apply(vae.module, params, latents, method="decode"))

  return decode


def start_params(
  config: ImageConfig,
  class_names: Sequence[str],
) -> Callable[[], Any] | None:
  """Returns a function that loads the parameters of config.init_from.

  None if it names none. The function raises ArtifactError if they are not of
  config.model, and warns if they know their classes by other names.

  Args:
    config: config of the run.
    class_names: names of the data's classes, by label.
  """
  if not config.init_from:
    return None
  kind = "gen" if config.task == "generator" else config.task
  return functools.partial(
    _load_start, config.init_from, kind, config.model, class_names
  )


def _load_start(
  path: str,
  kind: str,
  model: ImageModel,
  class_names: Sequence[str],
) -> Any:
  with _naming("init_from"):
    opened = artifacts.opened(path, dtype="float32")
  artifact = opened.artifact
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
  with _naming("init_from"):
    return opened.read(artifact.params)
