"""Exported parameters: a folder of arrays and JSON, in one of two formats.

  'release', as the authors' release has it:
  DIR/params_ema/ema_params.msgpack   the parameter tree, published names
  DIR/params_ema/metadata.json        kind, model_config, step, EMA decay

  'safetensors':
  DIR/model.safetensors               the parameters, names of this package
  DIR/config.json                     the same facts

The JSON of our own artifacts also has the SHA-256 of the parameters' file;
loading checks it. Loading executes nothing: both kinds of file hold arrays and
names only.

A folder may be on the hub: hf://OWNER/NAME[@REVISION][/FOLDER], or hf://NAME
for an artifact of the release.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import flax.serialization
import jax
import numpy as np
import safetensors.numpy
from etils import epath
from flax import traverse_util

from drift_jax.models import release
from drift_jax.models.naming import Entry
from drift_jax.models.precision import rounded
from drift_jax.system import hub, paths, storage
from drift_jax.system.errors import UserError
from drift_jax.training import weights

SUBDIRECTORY = "params_ema"
PARAMS_FILE = "ema_params.msgpack"
METADATA_FILE = "metadata.json"
TENSORS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
# An export (tools/export.py) is a folder of such folders.
MANIFEST_FILE = "manifest.json"
EXPORTED, EXPORTED_VAE = "generator", "vae"

# Where the release's artifacts are.
RELEASED_REPOSITORY = "Goodeat/drifting"
RELEASED_FOLDERS = ("models/gen/jax", "models/mae/jax")

Format = Literal["release", "safetensors"]


class _Layout(NamedTuple):
  """The files of a format, with a folder before them or none."""

  subdirectory: str
  params: str
  metadata: str
  name: str  # as the metadata has it
  find_arrays: Callable[[Any], dict[str, weights.Stored]]
  entries: Callable[..., tuple[nn.Module, dict[str, Entry]]]


_LAYOUTS: dict[Format, _Layout] = {
  "release": _Layout(
    SUBDIRECTORY,
    PARAMS_FILE,
    METADATA_FILE,
    "flax.msgpack",
    weights.index_msgpack,
    release.published_entries,
  ),
  "safetensors": _Layout(
    "",
    TENSORS_FILE,
    CONFIG_FILE,
    "safetensors",
    weights.index_safetensors,
    release.own_entries,
  ),
}
# Where to look, in this order: a folder may be given with or without
# `subdirectory`.
_PLACES = [
  (layout, folder)
  for layout in _LAYOUTS.values()
  for folder in dict.fromkeys((layout.subdirectory, ""))
]


class ArtifactError(UserError, ValueError):
  """Exported parameters that can't be loaded; the message says why."""


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
  folder.mkdir(parents=True, exist_ok=True)
  params = jax.tree.map(np.asarray, jax.device_get(params))
  # In both formats: it checks names and shapes.
  tree = release.to_release(kind, model_config, params)
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
    entries: {parameter here: its counterparts in the file}.
    stored: arrays of the file.
  """

  artifact: Artifact
  path: epath.Path
  entries: Mapping[str, Entry]
  stored: Mapping[str, weights.Stored]

  def read(self, wanted: Any) -> Any:
    """Reads parameters, the largest first; no other array is in memory.

    Args:
      wanted: the artifact's ShapeDtypeStructs or some of them. Those that have
        a sharding are placed before the next one is read.

    Raises:
      ArtifactError: numbers that are not finite.
    """
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
  # 1. Metadata
  source = os.fspath(directory)
  folder, layout = _find(source)
  metadata_path, params_path = folder / layout.metadata, folder / layout.params
  try:
    metadata = json.loads(metadata_path.read_text())
    kind, model_config = metadata["kind"], dict(metadata["model_config"])
  except (ValueError, KeyError, TypeError) as error:
    raise ArtifactError(f"{metadata_path} can't be read: {error!r}") from error
  if not params_path.exists():
    raise ArtifactError(
      f"{params_path} is missing beside its {layout.metadata}: copy the whole "
      "folder, or export it again"
    )
  # 2. The parameters' file
  digest = None
  if source.startswith(hub.SCHEME):
    digest = hub.sha256_of(pathlib.Path(params_path))
  with params_path.open("rb") as opened_file:
    file: Any = opened_file
    digest = digest or hashlib.file_digest(file, "sha256").hexdigest()
    if metadata.get("sha256", digest) != digest:
      raise ArtifactError(
        f"{params_path} ({params_path.stat().length} bytes) is damaged: its "
        f"SHA-256 is not the one in {layout.metadata}; export it again"
      )
    stored = _index(params_path, file, layout)
  # 3. The model, and what its parameters are made from
  try:
    module, entries = layout.entries(
      kind, _in_dtype(model_config, dtype), stored
    )
  except ValueError as error:
    raise ArtifactError(f"{folder}: {error}") from error
  params = weights.shapes(entries, stored)
  if dtype is not None:
    params = jax.eval_shape(functools.partial(rounded, module), params)
  artifact = Artifact(kind, module, params, metadata, digest)
  return Opened(artifact, params_path, entries, stored)


def _index(
  path: epath.Path, file: Any, layout: _Layout
) -> dict[str, weights.Stored]:
  try:
    return layout.find_arrays(file)
  except weights.Damage as error:
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    kind = layout.params.rpartition(".")[2]
    raise ArtifactError(
      f"{path} ({length} bytes, beginning with {file.read(8)!r}) is no "
      f"complete {kind} file: {error}"
    ) from error
  except ValueError as error:
    raise ArtifactError(f"{path}: {error}") from error


def exists(directory: os.PathLike[str] | str) -> bool:
  """Whether there is an artifact to load, here or on the hub."""
  try:
    _find(os.fspath(directory))
  except ArtifactError:
    return False
  return True


def _find(source: str) -> tuple[epath.Path, _Layout]:
  """The folder of an artifact's files, and their layout.

  Raises:
    ArtifactError: there is none; the message says where it looked.
  """
  if source.startswith(hub.SCHEME):
    return _from_hub(source)
  source = paths.expand(source)
  storage.check(source)
  given = epath.Path(source)
  if (given / MANIFEST_FILE).exists():
    given = given / EXPORTED
  for layout, subdirectory in _PLACES:
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


def _from_hub(source: str) -> tuple[epath.Path, _Layout]:
  """Downloads an artifact's two files, if the cache lacks them."""
  address = hub.parse(source)
  name, _, revision = source.removeprefix("hf://").partition("@")
  if address is not None:
    candidates = [address]
  elif name and not set("/:") & set(f"{name}{revision}"):
    candidates = [
      hub.Address(RELEASED_REPOSITORY, revision or None, f"{folder}/{name}")
      for folder in RELEASED_FOLDERS
    ]
  else:
    raise ArtifactError(
      f"{source}: want hf://NAME[@REVISION] of the authors' release, or "
      "hf://OWNER/NAME[@REVISION][/FOLDER]"
    )
  try:
    for candidate in candidates:
      for layout, subdirectory in _PLACES:
        place = pathlib.PurePosixPath(candidate.path, subdirectory)
        name = str(place / layout.metadata)
        metadata = hub.fetch(candidate._replace(path=name))
        if metadata is None:
          continue
        params = candidate._replace(
          revision=hub.commit_of(metadata, name),
          path=str(place / layout.params),
        )
        if hub.fetch(params) is not None:
          return epath.Path(metadata.parent), layout
    has = {
      folder.removesuffix(f"/{SUBDIRECTORY}")
      for folder in hub.folders(candidates[0])
    }
  except hub.HubError as error:
    raise ArtifactError(f"{source}: {error}") from error
  raise ArtifactError(
    f"{source}: {candidates[0].repository} holds no artifact "
    f"{' or '.join(c.path or '.' for c in candidates)}; it has {sorted(has)}"
  )


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
    model_config = release.published_config(kind, named)
    module, shapes = release.describe(kind, _in_dtype(model_config, dtype))
  except ValueError as error:
    raise ArtifactError(str(error)) from error
  params = shapes
  if dtype is not None:
    params = jax.eval_shape(functools.partial(rounded, module), shapes)
  return Artifact(kind, module, params, {"model_config": model_config}, "")


def _in_dtype(
  model_config: Mapping[str, Any], dtype: str | None
) -> dict[str, Any]:
  if dtype is None:
    return dict(model_config)
  return {**model_config, "use_bf16": dtype == "bfloat16"}
