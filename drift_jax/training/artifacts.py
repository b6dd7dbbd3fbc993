"""Exported parameters: a folder of arrays and JSON, in one of two formats.

  'release', as the authors' workdirs have it; on the hub, theirs are in DIR:
  DIR/params_ema/ema_params.msgpack   the parameter tree, published names
  DIR/params_ema/metadata.json        kind, model_config, step, EMA decay

  'safetensors':
  DIR/model.safetensors               the parameters, names of this package
  DIR/config.json                     the same facts

The JSON of our own artifacts also has the SHA-256 of the parameters' file;
loading checks it. Loading executes nothing: both kinds of file hold arrays and
names only.

A folder, or an export, may be on the hub: hf://OWNER/NAME[@REVISION][/FOLDER],
or hf://NAME for an artifact of the release.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import flax.serialization
import jax
import numpy as np
import safetensors.numpy
from etils import epath
from flax import traverse_util

from drift_jax import models
from drift_jax.system import paths, storage
from drift_jax.system.errors import UserError

SUBDIRECTORY = "params_ema"
PARAMS_FILE = "ema_params.msgpack"
METADATA_FILE = "metadata.json"
TENSORS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
# An export (tools/export.py) is a folder of such folders.
MANIFEST_FILE = "manifest.json"
RUN_CONFIG_FILE = "run_config.json"
EXPORTED, EXPORTED_VAE = "generator", "vae"

Format = Literal["release", "safetensors"]


class Layout(NamedTuple):
  """The files of a format, with a folder before them or none.

  Attributes:
    subdirectory, params, metadata: the folder and its files.
    name: as the metadata has it.
    entries: name of models.release' function that gives the model and what its
      parameters are made from.
  """

  subdirectory: str
  params: str
  metadata: str
  name: str
  entries: str


_LAYOUTS: dict[Format, Layout] = {
  "release": Layout(
    SUBDIRECTORY,
    PARAMS_FILE,
    METADATA_FILE,
    "flax.msgpack",
    "published_entries",
  ),
  "safetensors": Layout(
    "",
    TENSORS_FILE,
    CONFIG_FILE,
    "safetensors",
    "own_entries",
  ),
}
# Where to look, in this order: a folder may be given with or without
# `subdirectory`.
PLACES = [
  (layout, folder)
  for layout in _LAYOUTS.values()
  for folder in dict.fromkeys((layout.subdirectory, ""))
]


class ArtifactError(UserError, ValueError):
  """Exported parameters that can't be loaded; the message says why."""


class Described(NamedTuple):
  """What an artifact's metadata say, before its parameters are read.

  Attributes:
    kind: one of release.KINDS.
    metadata: what metadata.json says.
    missing: hub.Need of what is to be downloaded.
  """

  kind: str
  metadata: Mapping[str, Any]
  missing: Sequence[Any] = ()


@dataclasses.dataclass(frozen=True)
class Artifact:
  """A model with its parameters.

  Attributes:
    kind: one of release.KINDS.
    module: the linen module.
    params: its parameters under this package's names.
    metadata: what metadata.json says.
    sha256: of the parameters' file, in hexadecimal.
  """

  kind: str
  module: nn.Module
  params: Any
  metadata: Mapping[str, Any]
  sha256: str


def save(
  directory: os.PathLike[str] | str,
  *,
  kind: str,
  model_config: Mapping[str, Any],
  params: Any,
  step: int | None,
  ema_decay: float | None,
  source: Mapping[str, Any] | None = None,
  facts: Mapping[str, Any] | None = None,
  format: Format = "release",
) -> epath.Path:
  """Writes an artifact, its metadata last: an incomplete one has none.

  An artifact that was there stays whole until the new one is on the disk.

  Args:
    directory: gets the files, those of 'release' in a folder params_ema.
    kind: one of release.KINDS.
    model_config: the release's own names (release.published_config).
    params: this package's names; float32, in 'safetensors' bfloat16 as well.
    step: training steps of the parameters; None if not trained here.
    ema_decay: of the parameters' average; None if not trained here.
    source: where converted parameters came from; plain values.
    facts: more metadata, plain values: a generator's 'alpha_range' and
      'class_names'.
    format: 'release' or 'safetensors'.

  Returns:
    The directory.
  """
  # 1. Parameters
  layout = _LAYOUTS[format]
  directory = paths.expand(directory)
  folder = epath.Path(directory) / layout.subdirectory
  params = jax.tree.map(np.asarray, jax.device_get(params))
  # In both formats: it checks names and shapes.
  tree = models.release.to_release(kind, model_config, params)
  if format == "release":
    data = flax.serialization.msgpack_serialize(tree)
  else:
    flat = traverse_util.flatten_dict(params, sep="/")
    data = safetensors.numpy.save(jax.tree.map(np.ascontiguousarray, flat))
  # 2. Metadata
  metadata = {
    "format": layout.name,
    "kind": kind,
    "backend": "jax",
    "ema_decay": ema_decay,
    "step": step,
    "path": str(pathlib.PurePosixPath(layout.subdirectory, layout.params)),
    "model_config": dict(model_config),
    "sha256": hashlib.sha256(data).hexdigest(),
  }
  if source is not None:
    metadata["source"] = dict(source)
  metadata |= facts or {}
  # 3. Both files under temporary names, then in place
  folder.mkdir(parents=True, exist_ok=True)
  contents = {
    layout.params: data,
    layout.metadata: json.dumps(metadata, indent=2).encode(),
  }
  temporaries = {name: folder / (name + ".tmp") for name in contents}
  try:
    for name, temporary in temporaries.items():
      with storage.naming_errors(folder / name):
        temporary.write_bytes(contents[name])
    (folder / layout.metadata).unlink(missing_ok=True)
    for name, temporary in temporaries.items():
      temporary.replace(folder / name)
  finally:
    for temporary in temporaries.values():
      temporary.unlink(missing_ok=True)
  return epath.Path(directory)


def load(
  directory: os.PathLike[str] | str, *, dtype: str | None = None
) -> Artifact:
  """Reads an artifact of ours or of the release, its parameters as NumPy's.

  Args:
    directory: holds an artifact's files, or is an export, whose generator is
      read; or hf://NAME, hf://OWNER/NAME[@REVISION][/FOLDER].
    dtype: of computation, 'float32' or 'bfloat16'; parameters have the dtype
      in which the model then uses them. None keeps them as they are stored,
      and the model's own precision.

  Raises:
    ArtifactError: files missing, truncated, of an unknown kind, or parameters
      that do not fit the model (the first differences are listed) or are not
      finite.
    StorageError: a bucket that can't be read.
  """
  found = opened(directory, dtype=dtype)
  return dataclasses.replace(
    found.artifact, params=found.read(found.artifact.params)
  )


class Opened(NamedTuple):
  """An artifact whose parameters are still in their file.

  Attributes:
    artifact: with ShapeDtypeStructs in place of its parameters.
    path: the parameters' file.
    entries: {parameter here: its counterparts in the file}, naming.Entry.
    stored: arrays of the file, weights.Stored.
    state: of the file when it was summed; see _state.
  """

  artifact: Artifact
  path: epath.Path
  entries: Mapping[str, Any]
  stored: Mapping[str, Any]
  state: tuple[int, int]

  def read(self, wanted: Any) -> Any:
    """Reads parameters, the largest first; no other array is in memory.

    Args:
      wanted: the artifact's ShapeDtypeStructs or some of them. Those that have
        a sharding are placed before the next one is read.

    Raises:
      ArtifactError: numbers that are not finite, or a file that has changed.
    """
    from drift_jax.training import weights

    if _state(self.path) != self.state:
      raise ArtifactError(
        f"{self.path} has changed since its metadata were read: start again"
      )
    try:
      return weights.read_tree(self.path, self.entries, self.stored, wanted)
    except weights.Damage as error:
      raise ArtifactError(f"{self.path}: {error}") from error


def opened(
  directory: os.PathLike[str] | str, *, dtype: str | None = None
) -> Opened:
  """Checks an artifact and finds its parameters; reads none into memory.

  Arguments and errors as of `load`.
  """
  from drift_jax.training import weights

  # 1. Metadata
  source = os.fspath(directory)
  folder, layout = _find(source)
  metadata_path, params_path = folder / layout.metadata, folder / layout.params
  kind, metadata = _read_metadata(metadata_path)
  model_config = metadata["model_config"]
  if not params_path.exists():
    raise ArtifactError(
      f"{params_path} is missing beside its {layout.metadata}: copy the whole "
      "folder, or export it again"
    )
  # 2. The parameters' file
  digest, state = None, _state(params_path)
  if source.startswith(storage.HUB):
    digest = _hub().sha256_of(params_path)
  with params_path.open("rb") as opened_file:
    file: Any = opened_file
    digest = digest or hashlib.file_digest(file, "sha256").hexdigest()
    if metadata.get("sha256", digest) != digest:
      raise ArtifactError(
        f"{params_path} ({params_path.stat().length} bytes) is damaged: its "
        f"SHA-256 is not the one in {layout.metadata}; export it again"
      )
    try:
      stored = weights.INDEX[layout.name](file)
    except ValueError as error:
      raise ArtifactError(f"{params_path}: {error}") from error
  # 3. The model, and what its parameters are made from
  try:
    module, entries = getattr(models.release, layout.entries)(
      kind, _in_dtype(model_config, dtype), stored
    )
  except ValueError as error:
    raise ArtifactError(f"{folder}: {error}") from error
  params = weights.shapes(entries, stored)
  if dtype is not None:
    params = jax.eval_shape(
      functools.partial(models.precision.rounded, module), params
    )
  artifact = Artifact(kind, module, params, metadata, digest)
  return Opened(artifact, params_path, entries, stored, state)


def _state(path: epath.Path) -> tuple[int, int]:
  """Size and time of change of a file: others if it is replaced."""
  if storage.is_remote(path):
    stat = path.stat()
    return stat.length, stat.mtime
  stat = os.stat(path)
  return stat.st_size, stat.st_mtime_ns


def describe(source: os.PathLike[str] | str) -> Described:
  """Reads an artifact's metadata alone: the parameters stay on the hub.

  Args:
    source: see `load`.

  Raises:
    ArtifactError: no artifact there, or metadata that can't be read.
    StorageError: a bucket that can't be read.
  """
  source = os.fspath(source)
  if source.startswith(storage.HUB):
    path, missing = _hub().metadata(source)
  else:
    folder, layout = _find(source)
    path, missing = folder / layout.metadata, []
  return Described(*_read_metadata(path), missing)


def _read_metadata(path: epath.Path) -> tuple[str, dict[str, Any]]:
  """The kind of a model, and its metadata, 'model_config' a dict."""
  try:
    metadata = json.loads(path.read_text())
    metadata["model_config"] = dict(metadata["model_config"])
    return metadata["kind"], metadata
  except (ValueError, KeyError, TypeError) as error:
    raise ArtifactError(f"{path} can't be read: {error!r}") from error


def trained_for(metadata: Mapping[str, Any]) -> dict[str, Any]:
  """The 'step' and 'ema_decay' of an artifact's parameters, None if unknown.

  The authors' have them in `source`.
  """
  theirs = metadata.get("source")
  theirs = theirs if isinstance(theirs, Mapping) else {}
  decay = re.search(r"0?\.\d+", str(theirs.get("ema_selected")))
  step = metadata.get("step", theirs.get("step_loaded"))
  return {
    "step": step if isinstance(step, int) else None,
    "ema_decay": metadata.get("ema_decay", float(decay[0]) if decay else None),
  }


def exists(directory: os.PathLike[str] | str) -> bool:
  """Whether there is an artifact to load, here or on the hub."""
  source = os.fspath(directory)
  try:
    (_hub().find if source.startswith(storage.HUB) else _find)(source)
  except ArtifactError:
    return False
  return True


def _find(source: str) -> tuple[epath.Path, Layout]:
  """The folder of an artifact's files, and their layout.

  Raises:
    ArtifactError: there is none; the message says where it looked.
  """
  if source.startswith(storage.HUB):
    return _hub().fetch(source)
  source = paths.expand(source)
  storage.check(source)
  given = epath.Path(source)
  if (given / MANIFEST_FILE).exists():
    given = given / EXPORTED
  for layout, subdirectory in PLACES:
    folder = given / subdirectory
    # Other programs have a config.json too.
    needed = {layout.metadata, layout.params} - {PARAMS_FILE}
    if all((folder / name).exists() for name in needed):
      return folder, layout
  raise ArtifactError(
    f"no exported model in {source}: "
    f"{given / SUBDIRECTORY / METADATA_FILE} is missing, and "
    f"{given / TENSORS_FILE} with its {CONFIG_FILE} (encoder training writes "
    "WORKDIR/encoder when it ends; python -m drift_jax.tools.convert_weights "
    "makes one of published weights, python -m drift_jax.tools.export of a "
    "generator's run)"
  )


def exported_vae(source: str) -> str:
  """The autoencoder of an export, here or on the hub; '' if it has none."""
  place = f"{source.rstrip('/')}/{EXPORTED_VAE}"
  if not source.startswith(storage.HUB):
    return place if epath.Path(place).exists() else ""
  manifest = _hub().manifest(source) or {}
  return place if EXPORTED_VAE in manifest.get("weights", ()) else ""


def _hub() -> Any:
  """training.on_hub: the hub's library takes a while to import."""
  from drift_jax.training import on_hub

  return on_hub


def abstract(
  kind: str, arguments: Mapping[str, Any], *, dtype: str | None = None
) -> Artifact:
  """The Artifact of a model without weights: shapes in place of parameters.

  Args:
    kind: one of release.KINDS.
    arguments: of the function that builds this kind.
    dtype: see `load`.

  Raises:
    ArtifactError: unknown kind; arguments that are missing or can't be built.
  """
  try:
    named = arguments if dtype is None else {**arguments, "dtype": dtype}
    model_config = models.release.published_config(kind, named)
    module, shapes = models.release.describe(
      kind, _in_dtype(model_config, dtype)
    )
  except ValueError as error:
    raise ArtifactError(str(error)) from error
  params = shapes
  if dtype is not None:
    params = jax.eval_shape(
      functools.partial(models.precision.rounded, module), shapes
    )
  return Artifact(kind, module, params, {"model_config": model_config}, "")


def _in_dtype(
  model_config: Mapping[str, Any], dtype: str | None
) -> dict[str, Any]:
  if dtype is None:
    return dict(model_config)
  return {**model_config, "use_bf16": dtype == "bfloat16"}
