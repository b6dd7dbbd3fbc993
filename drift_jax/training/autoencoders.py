"""Autoencoders of latents on the hub: diffusers' are converted once.

What is converted is kept in paths.user_cache(), a folder for each commit.
"""

import fcntl
import os
import pathlib
import shutil
import tempfile
from collections.abc import Sequence

from drift_jax.system import hub, paths, storage
from drift_jax.system.console import logger
from drift_jax.training import artifacts, released
from drift_jax.training.conversions import convert, weight_files
from drift_jax.training.conversions.published import MODELS

# Of the latents of the authors' generators.
_CHANNELS = 4


def belonging_to(source: str, generator: artifacts.Described) -> str:
  """Where the autoencoder of a generator's latents is; '' if nothing says so.

  Its metadata may name one as `vae`. What the authors' code published is of
  theirs, if it is of latents.

  Raises:
    ArtifactError: a name that is none.
  """
  metadata = generator.metadata
  named = metadata.get("vae", "")
  if not isinstance(named, str):
    raise artifacts.ArtifactError(
      f"{source}: its metadata have vae={named!r}, want hf://OWNER/NAME or a "
      "folder"
    )
  channels = metadata["model_config"].get("out_channels")
  is_theirs = metadata.get("artifact_type") == "ema_model"
  if not named and is_theirs and channels == _CHANNELS:
    return released.AUTOENCODER
  return named


def missing(source: str) -> Sequence[hub.Need]:
  """What is to be downloaded and written until `local` has an autoencoder.

  Raises:
    ArtifactError: there is none, or the hub can't be reached.
  """
  weights = _find(source)
  if weights is None:
    return artifacts.describe(source).missing
  return _needs(source, weights)


def _needs(source: str, weights: hub.Remote) -> Sequence[hub.Need]:
  folder = _folder(weights.address)
  if artifacts.exists(folder):
    return []
  return [
    hub.Need(source, weights.missing, hub.downloads()),
    hub.Need("its conversion", weights.size, folder),
  ]


def check_space(generator: artifacts.Described, vae: str) -> None:
  """Says what is to be downloaded of a generator and its autoencoder.

  Raises:
    ArtifactError: it can't be reached, or a disk can't take it.
  """
  needs = [*generator.missing]
  if vae.startswith(storage.HUB):
    try:
      needs += missing(vae)
    except artifacts.ArtifactError as error:
      raise artifacts.ArtifactError(
        f"{error}; it is the autoencoder of latents: vae=FOLDER or "
        "hf://OWNER/NAME takes another of the same"
      ) from error
  require_space(needs)


def require_space(needs: Sequence[hub.Need]) -> None:
  """Says what is to be downloaded and written, if anything is.

  Raises:
    ArtifactError: a disk can't take it.
  """
  if not (wanted := hub.listed(needs)):
    return
  logger.info("To be downloaded and written: %s.", wanted)
  _require_space(needs)


def _require_space(needs: Sequence[hub.Need]) -> None:
  """Raises ArtifactError for a disk that can't take all that goes to it."""
  try:
    hub.require_space(needs)
  except hub.HubError as error:
    raise artifacts.ArtifactError(str(error)) from None


def local(source: str) -> str:
  """A source of an autoencoder that artifacts.load reads.

  It is the folder of a converted one if the source is diffusers' on the hub,
  else the source itself.

  Raises:
    ArtifactError: the hub can't be reached, the autoencoder not be kept, or a
      disk not take it.
    WeightsError: weights that are no AutoencoderKL's.
  """
  weights = _find(source)
  if weights is None:
    return source
  folder = _folder(weights.address)
  if needs := _needs(source, weights):
    logger.info("Converting %s into %s.", source, folder)
    _require_space(needs)
    try:
      folder = _convert(source, weights)
    except OSError as error:
      raise artifacts.ArtifactError(
        f"{source}: its conversion can't be kept: {error}; set XDG_CACHE_HOME "
        "to a folder that can be written to"
      ) from error
  return str(folder)


def _convert(source: str, weights: hub.Remote) -> pathlib.Path:
  """Converts weights into their folder, which appears whole.

  One process at a time: what is temporary then, a killed one has left.
  """
  parent = _parent()
  parent.mkdir(parents=True, exist_ok=True)
  with open(parent / ".lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    folder = _folder(weights.address)
    if artifacts.exists(folder):
      return folder
    for left in list(parent.rglob(".*.tmp")):
      shutil.rmtree(left)
    with tempfile.TemporaryDirectory(
      prefix=".", suffix=".tmp", dir=parent, ignore_cleanup_errors=True
    ) as temporary:
      artifact = convert.convert("vae", source, temporary)
      commit = artifact.metadata["source"]["revision"]
      folder = _folder(weights.address._replace(revision=commit))
      folder.parent.mkdir(parents=True, exist_ok=True)
      if not artifacts.exists(folder):
        os.rename(temporary, folder)
  return folder


def _find(source: str) -> hub.Remote | None:
  """Diffusers' weights at an address of the hub; None if there are none."""
  address = hub.parse(source)
  if address is None:
    return None
  try:
    for place in weight_files.candidates(address, MODELS["vae"].files):
      weights = hub.find(place)
      if weights is not None:
        return weights
  except hub.HubError as error:
    raise artifacts.ArtifactError(f"{source}: {error}") from None
  return None


def _parent() -> pathlib.Path:
  return paths.user_cache() / "autoencoders"


def _folder(weights: hub.Address) -> pathlib.Path:
  """The folder of converted weights."""
  assert weights.revision is not None
  return _parent() / weights.repository / weights.revision / weights.path
