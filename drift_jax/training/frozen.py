"""Frozen networks: autoencoders and encoders, loaded and placed on the mesh."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from drift_jax import config as config_lib
from drift_jax.config.sections import ImageModel
from drift_jax.data.encoded import readable_classes
from drift_jax.system import sharding
from drift_jax.system.console import logger
from drift_jax.training import artifacts
from drift_jax.training.facts import renamed
from drift_jax.training.step import apply

# Arguments of an artifact that say how its model was run, not which it is.
_PRECISION = ("use_bf16", "use_remat", "attn_fp32")


def load_vae(config: config_lib.Vae, mesh: Mesh) -> artifacts.Artifact | None:
  """Loads the autoencoder of latents, on the mesh; None if there is none.

  A dtype of '' is its own, as it is stored.

  Raises:
    ArtifactError: for anything that can't be loaded.
  """
  if not config.path:
    return None
  return place(load_frozen("vae", config, ("vae",)), config, mesh)


def abstract_vae(
  config: config_lib.Vae, mesh: Mesh
) -> artifacts.Artifact | None:
  """As `load_vae`, with shapes for parameters; see abstract_encoders."""
  if not config.path:
    return None
  return abstract("vae", config, ("vae",), mesh)


def load_frozen(
  key: str, section: config_lib.Frozen, kinds: Sequence[str]
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
  key: str, section: config_lib.Frozen, kinds: Sequence[str]
) -> artifacts.Artifact:
  """Makes the model that KEY.model describes, with shapes for parameters."""
  arguments = dict(section.model)
  kind = arguments.pop("kind")
  _check_kind(f"{key}.model is", kind, kinds)
  try:
    return artifacts.abstract(kind, arguments, dtype=section.dtype)
  except artifacts.ArtifactError as error:
    raise artifacts.ArtifactError(f"{key}.model: {error}") from error


def _check_model(
  key: str,
  section: config_lib.Frozen,
  artifact: artifacts.Artifact,
) -> None:
  """Raises ArtifactError if the weights are not of KEY.model."""
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


def abstract(
  key: str,
  section: config_lib.Frozen,
  kinds: Sequence[str],
  mesh: Mesh,
) -> artifacts.Artifact:
  if section.model:
    artifact = _as_frozen(_described(key, section, kinds), section)
  elif artifacts.exists(section.path):
    artifact = load_frozen(key, section, kinds)
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
  artifact: artifacts.Artifact, section: config_lib.Frozen
) -> artifacts.Artifact:
  """Keeps what a step needs: of a 'mae' only the encoder."""
  params, module = artifact.params, artifact.module
  if artifact.kind == "mae":
    params = {"encoder": params["encoder"]}
  module = module.clone(remat=section.remat)
  return dataclasses.replace(artifact, module=module, params=params)


def _frozen_sharding(
  artifact: artifacts.Artifact,
  section: config_lib.Frozen,
  mesh: Mesh,
) -> Any:
  if section.sharding == "fsdp":
    return sharding.infer_sharding(artifact.params, mesh)
  return jax.tree.map(lambda _: sharding.replicated(mesh), artifact.params)


def place(
  artifact: artifacts.Artifact,
  section: config_lib.Frozen,
  mesh: Mesh,
) -> artifacts.Artifact:
  placed = jax.device_put(
    artifact.params, _frozen_sharding(artifact, section, mesh)
  )
  return dataclasses.replace(artifact, params=placed)


def frozen_sums(
  encoders: Mapping[str, artifacts.Artifact], vae: artifacts.Artifact | None
) -> dict[str, str]:
  """Returns the SHA-256 of all frozen weights, by the config's section."""
  sums = {f"encoders.{name}": a.sha256 for name, a in encoders.items()}
  return sums if vae is None else sums | {"vae": vae.sha256}


def decoding(vae: artifacts.Artifact) -> Callable[[Any, jax.Array], jax.Array]:
  """(params, latents) -> images."""
  return functools.partial(apply, vae.module, method="decode")


def start_params(
  config: config_lib.ImageConfig,
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
