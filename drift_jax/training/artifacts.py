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
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath
from flax import traverse_util

from drift_jax import models
from drift_jax.models.precision import rounded
from drift_jax.system import paths, storage
from drift_jax.system.errors import UserError

SUBDIRECTORY = "params_ema"
PARAMS_FILE = "ema_params.msgpack"
METADATA_FILE = "metadata.json"
TENSORS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
_TENSOR_DTYPES = {"F32": jnp.dtype("float32"), "BF16": jnp.dtype("bfloat16")}
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


_LAYOUTS: dict[Format, _Layout] = {
  "release": _Layout(SUBDIRECTORY, PARAMS_FILE, METADATA_FILE, "flax.msgpack"),
  "safetensors": _Layout("", TENSORS_FILE, CONFIG_FILE, "safetensors"),
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
  """Reads an artifact of ours or of the release.

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
  folder, layout = _find(os.fspath(directory))
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
  data = params_path.read_bytes()
  digest = hashlib.sha256(data).hexdigest()
  if metadata.get("sha256", digest) != digest:
    raise ArtifactError(
      f"{params_path} ({len(data)} bytes) is damaged: its SHA-256 is "
      f"not the one in {layout.metadata}; export it again"
    )
  what = f"{params_path} ({len(data)} bytes, beginning with {data[:8]!r})"
  published = layout.params == PARAMS_FILE
  tree = (_read_release if published else _read_safetensors)(data, what)
  del data
  try:
    module, params = _fitted(
      kind, _in_dtype(model_config, dtype), tree, published
    )
  except ValueError as error:
    raise ArtifactError(f"{folder}: {error}") from error
  if dtype is not None:
    params = rounded(module, params)
  return Artifact(kind, module, params, metadata, digest)


def _read_release(data: bytes, what: str) -> Any:
  try:
    return flax.serialization.msgpack_restore(data)
  # Bytes that are no msgpack raise errors of many kinds.
  except Exception as error:
    raise ArtifactError(f"{what} is no complete msgpack: {error!r}") from error


def _read_safetensors(data: bytes, what: str) -> Any:
  try:
    entries = safetensors.deserialize(data)
  except (safetensors.SafetensorError, ValueError) as error:
    raise ArtifactError(
      f"{what} is no complete safetensors file: {error}"
    ) from error
  flat = {}
  for name, entry in entries:
    if entry["dtype"] not in _TENSOR_DTYPES:
      raise ArtifactError(
        f"{what}: {name} has dtype {entry['dtype']}, valid options are "
        f"{list(_TENSOR_DTYPES)}"
      )
    dtype = _TENSOR_DTYPES[entry["dtype"]]
    flat[name] = np.frombuffer(entry["data"], dtype).reshape(entry["shape"])
  return traverse_util.unflatten_dict(flat, sep="/")


def _fitted(
  kind: str, model_config: Mapping[str, Any], tree: Any, published: bool
) -> tuple[nn.Module, Any]:
  """The module and its parameters.

  Args:
    kind, model_config: of the model.
    tree: parameters as they are stored.
    published: whether they have the release's names, or ours.

  Raises:
    ValueError: parameters that don't fit, or are no floating-point arrays of
      finite numbers.
  """
  if not isinstance(tree, Mapping):
    raise ValueError(f"it holds {type(tree).__name__}, want arrays by name")
  flat = traverse_util.flatten_dict(dict(tree), sep="/")
  for name, leaf in flat.items():
    dtype = getattr(leaf, "dtype", np.dtype(object))
    if not jnp.issubdtype(dtype, jnp.floating):
      raise ValueError(f"{name} is of {dtype}, want floating-point arrays only")
    if not np.isfinite(np.asarray(leaf)).all():
      raise ValueError(f"{name} holds numbers that are not finite")
  if published:
    return models.release.from_release(kind, model_config, tree)
  # Checks names and shapes.
  models.release.to_release(kind, model_config, tree)
  return models.release.describe(kind, model_config)[0], tree


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
  if source.startswith(storage.HUB):
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
  from drift_jax.system import hub  # its library takes a while to import

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
    model_config = models.release.published_config(kind, named)
    module, shapes = models.release.describe(
      kind, _in_dtype(model_config, dtype)
    )
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
