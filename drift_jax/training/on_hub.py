"""Artifacts on the hub: hf://NAME of the release, or any repository's."""

import json
import pathlib
from typing import Any

from etils import epath

from drift_jax.system import hub
from drift_jax.training import artifacts, released


def sha256_of(path: epath.Path) -> str | None:
  """See hub.sha256_of."""
  return hub.sha256_of(pathlib.Path(path))


def metadata(source: str) -> tuple[epath.Path, list[hub.Need]]:
  """The file of an artifact's metadata, and what is to be downloaded yet.

  Raises:
    ArtifactError: there is none, or the hub can't be reached.
  """
  path, params, _ = find(source)
  return path, [hub.Need(source, params.missing, hub.downloads())]


def fetch(source: str) -> tuple[epath.Path, artifacts.Layout]:
  """Downloads an artifact's two files, if the cache lacks them."""
  metadata, params, layout = find(source)
  try:
    hub.fetch(params.address)
  except hub.HubError as error:
    raise artifacts.ArtifactError(f"{source}: {error}") from None
  return metadata.parent, layout


def manifest(source: str) -> dict[str, Any] | None:
  """An export's manifest.json; None if no export is there, or none known of."""
  address = hub.parse(source)
  if address is None:
    return None
  name = str(pathlib.PurePosixPath(address.path, artifacts.MANIFEST_FILE))
  try:
    file = hub.fetch(address._replace(path=name))
    return parse_manifest(file.read_text()) if file is not None else None
  # Offline it may be unknown: what else is asked for says what is wrong.
  except (hub.HubError, ValueError):
    return None


def parse_manifest(text: str) -> dict[str, Any] | None:
  """What an export's manifest.json holds; None of another program's file.

  Raises:
    ValueError: no JSON.
  """
  found = json.loads(text)
  is_ours = isinstance(found, dict) and "drift_jax" in found
  return found if is_ours else None


def find(source: str) -> tuple[epath.Path, hub.Remote, artifacts.Layout]:
  """Finds an artifact's two files; downloads its metadata only."""
  address = hub.parse(source)
  name, _, revision = source.removeprefix("hf://").partition("@")
  there = f"the authors' release has {released.listed()}"
  names = [entry.name for entry in released.released()]
  # Of the release's own artifacts: there may be newer ones.
  is_new = address is None and name not in names
  hint = f"; {name!r} is none of the known names {names}" * is_new
  if address is not None:
    if manifest(source) is not None:
      folder = pathlib.PurePosixPath(address.path, artifacts.EXPORTED)
      address = address._replace(path=str(folder))
    places = [address]
  elif name and not set("/:") & set(f"{name}{revision}"):
    places = [
      hub.Address(released.REPOSITORY, revision or None, f"{folder}/{name}")
      for folder in released.FOLDERS.values()
    ]
  else:
    raise artifacts.ArtifactError(
      f"{source}: want hf://NAME[@REVISION] or hf://OWNER/NAME[@REVISION]"
      f"[/FOLDER]; {there}"
    )
  try:
    for place in places:
      for layout, subdirectory in artifacts.PLACES:
        folder = pathlib.PurePosixPath(place.path, subdirectory)
        name = str(folder / layout.metadata)
        metadata = hub.fetch(place._replace(path=name))
        if metadata is None:
          continue
        params = hub.find(
          hub.Address(
            place.repository,
            hub.commit_of(metadata, name),
            str(folder / layout.params),
          )
        )
        if params is not None:
          return epath.Path(metadata), params, layout
    if address is not None:
      has = {
        folder.removesuffix(f"/{artifacts.SUBDIRECTORY}")
        for folder in hub.folders(address)
      }
      there = f"it has {sorted(has)}"
  except hub.HubError as error:
    raise artifacts.ArtifactError(f"{source}: {error}{hint}") from None
  raise artifacts.ArtifactError(
    f"{source}: {places[0].repository} holds no artifact "
    f"{' or '.join(place.path or '.' for place in places)}; {there}"
  )
