"""Converts published weights: see drift_jax.tools.convert_weights."""

import pathlib
from typing import Any

from drift_jax.system.console import logger
from drift_jax.training import artifacts
from drift_jax.training.conversions import (
  convnext,
  inception,
  published,
  resnet,
  vae,
  vit,
  weight_files,
  wflow,
)
from drift_jax.training.conversions.layouts import CONFIG_FILE, WeightsError

# Of the file's checksum, in the names of published files.
_NAMED_DIGITS = 8
# {model: (weights by name, config.json or None if there is none) -> Converted}.
# Of a model of several sizes: (weights, the checkpoint's facts, size or None).
_CONVERT = {
  "vae": vae.convert_vae,
  "inception": inception.convert_inception,
  "convnext": convnext.convert_convnext,
  "moco": resnet.convert_moco,
  "simclr": resnet.convert_simclr,
  "dinov2": vit.convert_dinov2,
  "clip": vit.convert_clip,
  "wflow": wflow.convert_wflow,
}


def convert(
  name: str, source: str, out: str, size: str | None = None
) -> artifacts.Artifact:
  """Converts a model's published weights and writes them as an artifact.

  The metadata says where they came from. If the model has one published file,
  `published` says whether this was it, by its SHA-256. If the kind has another
  name than the model, `family` is the model's.

  Args:
    name: of published.MODELS.
    source: a file, a folder, hf://OWNER/NAME[@REVISION][/FILE], or the URL of
      the published file.
    out: folder of the artifact; one that is there is replaced.
    size: of a model that has several; None if the weights tell.

  Returns:
    The artifact, read back from `out`.

  Raises:
    WeightsError: weights that are not there, can't be read, or are not those
      of the model (the first differences are listed).
    OSError: `out` can't be written.
  """
  # 1. Read
  model = published.MODELS[name]
  names = model.files
  if size:
    file = pathlib.PurePosixPath(model.sizes[size].file)
    names = (str(file), file.name)
  if model.state_dict:
    weight_files.require_torch(source)  # said before gigabytes are fetched
  located = weight_files.locate(source, names, model.sha256)
  digest = weight_files.sha256_of(located.weights)
  if model.sha256 is not None:
    _check_name(located.weights, digest, model.sha256)
  config = None
  if model.state_dict:
    weights, config = weight_files.read_checkpoint(
      located.weights, model.state_dict
    )
  else:
    weights = weight_files.read_weights(located.weights)
  if model.has_config and located.config is not None:
    config = weight_files.read_config(located.config)
  # 2. Convert
  sizes = [size] if model.sizes else []
  try:
    converted = _CONVERT[name](weights, config, *sizes)
  except WeightsError as error:
    raise WeightsError(f"{source}: {error}") from error
  if model.has_config and config is None:
    logger.warning("%s: no %s, took its defaults.", source, CONFIG_FILE)
  # 3. Write, with where they came from
  provenance: dict[str, Any] = {
    "location": source,
    "file": located.weights.name,
    "revision": located.revision,
    "sha256": digest,
  }
  if model.kind != name:
    provenance["family"] = name
  if model.sha256 is not None:
    provenance["published"] = digest == model.sha256
    if digest != model.sha256:
      logger.warning(
        "%s is not the published file: figures made with it are comparable"
        " among themselves only.",
        located.weights,
      )
  artifacts.save(
    out,
    kind=model.kind,
    model_config=converted.model_config,
    params=converted.params,
    step=converted.step,
    ema_decay=converted.ema_decay,
    source=provenance,
    facts=converted.facts,
  )
  del weights, converted
  return artifacts.load(out)


def _check_name(path: pathlib.Path, digest: str, published: str) -> None:
  """Refuses a torch file that is called the published one and isn't it."""
  digits = published[:_NAMED_DIGITS]
  if (
    path.suffix in weight_files.TORCH_SUFFIXES
    and path.stem.endswith(f"-{digits}")
    and digest != published
  ):
    raise WeightsError(
      f"{path} ({path.stat().st_size} bytes) has SHA-256 {digest}, but its name"
      f" says that it begins with {digits}: it is damaged or another file"
    )
