"""Files of published weights: finds, downloads and reads them."""

import hashlib
import http.client
import importlib
import json
import pathlib
import re
import shutil
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.serialization
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from drift_jax.metrics import files
from drift_jax.system import hub, paths, storage
from drift_jax.system.console import logger
from drift_jax.system.errors import one_line
from drift_jax.training.conversions.layouts import CONFIG_FILE, WeightsError

TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".tar")  # MoCo: .pth.tar
SUFFIXES = (".safetensors", ".msgpack", *TORCH_SUFFIXES)
# Keys under which a checkpoint holds its weights.
_STATE_DICTS = ("state_dict", "model")

_URL = re.compile(r"https?://")
_TIMEOUT = 60  # seconds without an answer


class Located(NamedTuple):
  """Weights found on this machine, with the revision if from the hub."""

  weights: pathlib.Path
  config: pathlib.Path | None
  revision: str | None


def locate(source: str, names: Sequence[str], sha256: str | None) -> Located:
  """Finds the weights and the config.json beside them.

  A file on the hub is downloaded into its cache (HF_HOME, HF_ENDPOINT and
  HF_HUB_OFFLINE are respected), one elsewhere into paths.user_cache(); see
  `download`.

  Args:
    source: a file, a folder, hf://OWNER/NAME[@REVISION][/FILE or /FOLDER], or a
      URL.
    names: files to look for in a folder or repository, in this order; none
      takes only a file.
    sha256: of the published file, in hexadecimal; None refuses URLs.

  Raises:
    WeightsError: nothing there; the message says where it looked.
  """
  if _URL.match(source):
    if sha256 is None:
      raise WeightsError(
        f"{source}: only weights whose SHA-256 is known here are downloaded"
        " from a URL; download the file and give its path"
      )
    return Located(download(source, sha256, paths.user_cache()), None, None)
  if source.startswith(storage.HUB):
    return _locate_on_hub(source, names)
  path = pathlib.Path(source)
  if path.is_dir():
    _require_names(source, names)
    path = next((path / x for x in names if (path / x).is_file()), None)
    if path is None:
      raise WeightsError(f"{source} holds none of {list(names)}")
  if not path.is_file():
    raise WeightsError(f"there is no file or folder {source}")
  config = path.parent / CONFIG_FILE
  return Located(path, config if config.is_file() else None, None)


def _locate_on_hub(source: str, names: Sequence[str]) -> Located:
  address = hub.parse(source)
  if address is None:
    raise WeightsError(
      f"--from={source}: want hf://OWNER/NAME, hf://OWNER/NAME/FILE or"
      " hf://OWNER/NAME@REVISION/FILE"
    )
  places = candidates(address, names)
  _require_names(source, places)
  try:
    for place in places:
      weights = hub.fetch(place)
      if weights is not None:
        commit = hub.commit_of(weights, place.path)
        config = str(pathlib.PurePosixPath(place.path).with_name(CONFIG_FILE))
        pinned = address._replace(revision=commit, path=config)
        return Located(weights, hub.fetch(pinned), commit)
  except hub.HubError as error:
    raise WeightsError(f"{source}: {error}") from None
  raise WeightsError(f"{source}: the repository holds none of {list(names)}")


def _require_names(source: str, names: Sequence[Any]) -> None:
  if not names:
    raise WeightsError(f"{source} may hold several: name the file, or --size")


def candidates(address: hub.Address, names: Sequence[str]) -> list[hub.Address]:
  """Where the files may be: at an address of a file there, else in a folder."""
  path = pathlib.PurePosixPath(address.path)
  if path.suffix in SUFFIXES:
    return [address]
  return [address._replace(path=str(path / name)) for name in names]


def sha256_of(path: pathlib.Path) -> str:
  """SHA-256 of a file, in hexadecimal."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def download(url: str, sha256: str, folder: pathlib.Path) -> pathlib.Path:
  """Downloads a file into a folder, unless it is there already.

  It appears whole and with the right checksum, or not at all.

  Raises:
    WeightsError: not reached, cut off, or another file.
  """
  path = folder / pathlib.PurePosixPath(urllib.parse.urlsplit(url).path).name
  if path.is_file() and sha256_of(path) == sha256:
    logger.info("Taking %s, downloaded before.", path)
    return path
  logger.info("Downloading %s to %s.", url, path)
  try:
    with files.replacing(path) as temporary:
      with (
        urllib.request.urlopen(url, timeout=_TIMEOUT) as response,
        temporary.open("wb") as file,
      ):
        shutil.copyfileobj(response, file)
        length = response.headers["Content-Length"]
      size = temporary.stat().st_size
      if length is not None and size != int(length):
        raise WeightsError(
          f"{url}: the connection ended after {size} of {length} bytes; try"
          " again"
        )
      if (digest := sha256_of(temporary)) != sha256:
        raise WeightsError(
          f"{url} has {size} bytes with SHA-256 {digest}, not the published"
          f" file's {sha256}"
        )
  except (OSError, http.client.HTTPException) as error:
    raise WeightsError(
      f"{url}: {one_line(error)} (or download the file elsewhere and give"
      " its path)"
    ) from error
  return path


def read_weights(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Arrays by name from .safetensors, or from a torch file if torch is there.

  Those of a .msgpack file, which Flax writes, are in Flax' layout, and their
  names are joined with '/'.

  Raises:
    WeightsError: another suffix, a damaged file, a file that is not what its
      suffix says, or a torch file where torch is not installed.
  """
  if path.suffix == ".safetensors":
    try:
      return safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
      with path.open("rb") as file:
        beginning = file.read(8)
      raise WeightsError(
        f"{path} ({path.stat().st_size} bytes, beginning with {beginning!r})"
        f" is no complete safetensors file: {one_line(error)}"
      ) from error
  if path.suffix == ".msgpack":
    return _read_flax(path)
  if path.suffix in TORCH_SUFFIXES:
    return _first_state_dict(path)
  raise WeightsError(
    f"{path}: unknown suffix {path.suffix!r}, valid options are"
    f" {list(SUFFIXES)}"
  )


def _read_flax(path: pathlib.Path) -> dict[str, np.ndarray]:
  flat: dict[str, Any] = {}
  try:
    tree = flax.serialization.msgpack_restore(path.read_bytes())
    flat |= traverse_util.flatten_dict(tree, sep="/")
  # Bytes that are no msgpack of a tree raise errors of many kinds.
  except Exception as error:
    raise WeightsError(
      f"{path} ({path.stat().st_size} bytes) is no complete msgpack of arrays"
      f" by name: {one_line(error)}"
    ) from error
  for name, array in flat.items():
    if not isinstance(array, np.ndarray):
      raise WeightsError(f"{path}: {name} is {array!r:.60}, want an array")
  return flat


def read_checkpoint(
  path: pathlib.Path, name: str
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """One state dict of a torch checkpoint, and what else it holds but tensors.

  The arrays are views of the mapped file: what is not used is not read.

  Raises:
    WeightsError: another suffix, a file that can't be read, or none of that
      name: another one is never taken in its place.
  """
  if path.suffix not in TORCH_SUFFIXES:
    raise WeightsError(
      f"{path} is no torch checkpoint: want one of {list(TORCH_SUFFIXES)}"
    )
  checkpoint = _read_torch(path)
  if not isinstance(checkpoint, Mapping) or name not in checkpoint:
    holds = list(checkpoint) if isinstance(checkpoint, Mapping) else checkpoint
    raise WeightsError(
      f"{path} has no {name!r}, but {holds!r:.200}: want a whole checkpoint, as"
      " its authors publish it"
    )
  rest = {k: v for k, v in checkpoint.items() if not isinstance(v, Mapping)}
  return _arrays(f"{name} of {path}", checkpoint[name]), rest


def require_torch(source: str) -> Any:
  """The module torch; WeightsError if it is not installed."""
  try:
    return importlib.import_module("torch")
  except ImportError as error:
    raise WeightsError(
      f"{source}: reading torch's files needs torch, which is not installed;"
      " take the .safetensors file of the same model if there is one, or pip"
      " install torch"
    ) from error


def _first_state_dict(path: pathlib.Path) -> dict[str, np.ndarray]:
  tensors = _read_torch(path)
  if isinstance(tensors, Mapping):
    inner = [tensors[key] for key in _STATE_DICTS if key in tensors]
    tensors = inner[0] if inner else tensors
  return _arrays(str(path), tensors)


def _read_torch(path: pathlib.Path) -> Any:
  torch = require_torch(str(path))
  try:
    return torch.load(
      path,
      map_location="cpu",
      weights_only=True,
      mmap=zipfile.is_zipfile(path),  # not before torch 1.6
    )
  # A bad file raises errors of many kinds, KeyError too. Their messages advise
  # to load the file unsafely, so they are not repeated.
  except Exception as error:
    raise WeightsError(
      f"{path} ({path.stat().st_size} bytes) can't be read as a torch file of"
      f" arrays only ({type(error).__name__}): it is damaged or holds more than"
      " arrays; take the .safetensors file of the same model if there is one"
    ) from error


def _arrays(what: str, tensors: Any) -> dict[str, np.ndarray]:
  """Arrays by name; WeightsError if it is no state dict."""
  torch = require_torch(what)
  if not isinstance(tensors, Mapping) or not all(
    isinstance(tensor, torch.Tensor) for tensor in tensors.values()
  ):
    raise WeightsError(f"{what} holds no arrays by name: it is no state dict")
  return {
    # NumPy lacks bfloat16.
    str(k): (v.float() if v.dtype == torch.bfloat16 else v).numpy()
    for k, v in tensors.items()
  }


def read_config(path: pathlib.Path) -> dict[str, Any]:
  try:
    config = json.loads(path.read_bytes())
  except ValueError as error:
    raise WeightsError(f"{path} is no JSON: {error}") from error
  if not isinstance(config, dict):
    raise WeightsError(f"{path} holds {config!r}, want a dict")
  return config
