"""Exported parameters: a directory of msgpack and JSON, as the release has it.

  DIR/params_ema/ema_params.msgpack   the parameter tree, published names
  DIR/params_ema/metadata.json        kind, model_config, step, EMA decay

Ours carry the file's SHA-256 in the metadata as well; it is checked on
loading. Loading executes nothing: msgpack holds arrays and names only.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from drift_jax import storage
from drift_jax.models import release

SUBDIRECTORY = "params_ema"
PARAMS_FILE = "ema_params.msgpack"
METADATA_FILE = "metadata.json"
KINDS = ("gen", "mae", "convnext", "vae", "inception", "vit")


class ArtifactError(ValueError):
  """Exported parameters that can't be loaded; the message says why."""


@dataclasses.dataclass(frozen=True)
class Artifact:
  """A model with its parameters.

  Attributes:
    kind: 'gen', 'mae', 'convnext', 'vae', 'inception' or 'vit'.
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
) -> epath.Path:
  """Writes an artifact; the metadata comes last, so a torn one has none.

  One that was there before stays whole until the new one is on the disk.

  Args:
    directory: gets a folder params_ema.
    kind: 'gen', 'mae', 'convnext', 'vae', 'inception' or 'vit'.
    model_config: the release's own names (release.published_config).
    params: this package's names.
    step: training steps behind the parameters; None if not trained here.
    ema_decay: of the average that these are; None if not trained here.
    source: where converted parameters came from; plain values.

  Returns:
    The directory.
  """
  folder = epath.Path(directory) / SUBDIRECTORY
  folder.mkdir(parents=True, exist_ok=True)
  tree = release.to_release(kind, model_config, jax.device_get(params))
  data = flax.serialization.msgpack_serialize(jax.tree.map(np.asarray, tree))
  metadata = {
    "format": "flax.msgpack",
    "kind": kind,
    "backend": "jax",
    "ema_decay": ema_decay,
    "step": step,
    "path": f"{SUBDIRECTORY}/{PARAMS_FILE}",
    "model_config": dict(model_config),
    "sha256": hashlib.sha256(data).hexdigest(),
  }
  if source is not None:
    metadata["source"] = dict(source)
  contents = {
    PARAMS_FILE: data,
    METADATA_FILE: json.dumps(metadata, indent=2).encode(),
  }
  temporaries = {name: folder / (name + ".tmp") for name in contents}
  try:
    for name, temporary in temporaries.items():
      temporary.write_bytes(contents[name])
    (folder / METADATA_FILE).unlink(missing_ok=True)
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
    directory: holds params_ema, or is that folder.
    dtype: 'float32' or 'bfloat16': computation and storage in it; None keeps
      float32 parameters and the model's own precision.

  Raises:
    ArtifactError: files missing, truncated, of an unknown kind, or parameters
      that do not fit the model (the first differences are listed).
    StorageError: a bucket that can't be read.
  """
  storage.check(directory)
  folder = epath.Path(directory)
  if (folder / SUBDIRECTORY).is_dir():
    folder = folder / SUBDIRECTORY
  metadata_path = folder / METADATA_FILE
  if not metadata_path.exists():
    raise ArtifactError(
      f"no exported model in {directory}: {metadata_path} is missing (encoder "
      "training writes WORKDIR/encoder when it ends; python -m "
      "drift_jax.tools.convert_weights makes one of published weights)"
    )
  try:
    metadata = json.loads(metadata_path.read_text())
    kind, model_config = metadata["kind"], dict(metadata["model_config"])
  except (ValueError, KeyError, TypeError) as error:
    raise ArtifactError(f"{metadata_path} can't be read: {error!r}") from error
  if kind not in KINDS:
    raise ArtifactError(
      f"{metadata_path}: kind={kind!r}, valid options are {list(KINDS)}"
    )
  params_path = folder / PARAMS_FILE
  if not params_path.exists():
    raise ArtifactError(
      f"{params_path} is missing beside its {METADATA_FILE}: copy the whole "
      "folder, or export it again"
    )
  data = params_path.read_bytes()
  digest = hashlib.sha256(data).hexdigest()
  if metadata.get("sha256", digest) != digest:
    raise ArtifactError(
      f"{params_path} ({len(data)} bytes) is damaged: its SHA-256 is "
      f"not the one in {METADATA_FILE}; export it again"
    )
  try:
    tree: Any = flax.serialization.msgpack_restore(data)
  except (ValueError, TypeError, KeyError) as error:
    raise ArtifactError(
      f"{params_path} ({len(data)} bytes) is no complete msgpack: {error!r}"
    ) from error
  try:
    module, params = release.from_release(
      kind, _in_dtype(model_config, dtype), tree
    )
  except ValueError as error:
    raise ArtifactError(f"{folder}: {error}") from error
  if dtype is not None:
    params = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), params)
  return Artifact(kind, module, params, metadata, digest)


def abstract(
  kind: str, arguments: Mapping[str, Any], *, dtype: str | None = None
) -> Artifact:
  """What `load` would give of a model, with the shapes of its parameters.

  Args:
    kind: 'gen', 'mae', 'convnext', 'vae', 'inception' or 'vit'.
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
  params = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype or x.dtype)), shapes
  )
  return Artifact(kind, module, params, {"model_config": model_config}, "")


def _in_dtype(
  model_config: Mapping[str, Any], dtype: str | None
) -> dict[str, Any]:
  if dtype is None:
    return dict(model_config)
  return {**model_config, "use_bf16": dtype == "bfloat16"}
