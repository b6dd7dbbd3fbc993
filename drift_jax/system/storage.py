"""Buckets used as folders: gs://BUCKET/PATH.

etils.epath reads a bucket as it reads a disk. What differs is here: whether
the bucket can be used at all, and writing, since an object can't be appended
to and appears only when it is whole.
"""

import contextlib
import errno
import importlib
import importlib.util
import io
import json
import logging
import os
import tokenize
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from etils import epath

from drift_jax.system.errors import ConfigError

if TYPE_CHECKING:
  import numpy as np

PathLike = str | os.PathLike[str]
_Json = TypeVar("_Json", dict[str, Any], list[Any])
# Start of an address on the hub; see system.hub.
HUB = "hf:"

# A library's attempt to reach a bucket; `check` makes three at most.
_SECONDS = 15
# Characters of patterns, with the escape; further ones of URLs.
_PATTERN, _URL = "*?[\\", "#%]"
_HINT = (
  "Credentials come from GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth "
  "application-default login` or the machine's service account; their project "
  "from GOOGLE_CLOUD_PROJECT"
)


class StorageError(OSError):
  """A bucket that can't be used; the message says which, why, what now."""


@contextlib.contextmanager
def naming_errors(path: PathLike) -> Iterator[None]:
  """Gives OSErrors the path, which those of a full disk lack."""
  try:
    yield
  except OSError as error:
    if error.errno is None or error.filename is not None:
      raise
    text = error.strerror or os.strerror(error.errno)
    raise OSError(error.errno, text, os.fspath(path)) from error


def is_remote(path: PathLike) -> bool:
  """Whether a path is a URL."""
  return "://" in os.fspath(path)


def without_scheme(path: PathLike) -> str:
  """BUCKET/PATH of a URL; a local path as it is."""
  return os.fspath(path).rpartition("://")[2]


def entries(folder: PathLike, ending: str = "") -> list[epath.Path]:
  """Entries of a folder whose names end so, sorted; [] if it isn't there.

  epath's glob would take characters of the folder's own path for a pattern.
  """
  folder = epath.Path(folder)
  if not folder.is_dir():
    return []
  return sorted(path for path in folder.iterdir() if path.name.endswith(ending))


def read_json(file: epath.Path, kind: type[_Json]) -> _Json:
  """Reads a JSON file of this package, a dict or a list.

  Raises:
    ConfigError: it is damaged.
  """
  try:
    values = json.loads(file.read_text())
  except ValueError as error:
    raise ConfigError(f"{file} is no JSON: {error}") from error
  if not isinstance(values, kind):
    raise ConfigError(
      f"{file} is damaged: it holds {type(values).__name__}, want "
      f"{kind.__name__}"
    )
  return values


def check_characters(path: PathLike) -> None:
  """Refuses a path with characters that Orbax and TensorStore misread.

  Orbax gathers the parts of a checkpoint by a pattern that begins with its
  path: none would be found, or those of another run. Locally that is of the
  whole path, the working directory included.

  Raises:
    StorageError: naming the character.
  """
  text = os.fspath(path)
  whole = text if is_remote(text) else os.path.abspath(text)
  refused = _PATTERN + (_URL if is_remote(text) else "")
  for character in whole:
    if character in refused or not character.isprintable():
      raise StorageError(
        f"{whole!r} holds {character!r}, with which no checkpoint can be "
        "written: use letters, digits and any of -_.=,+"
      )


def check(path: PathLike, *, write: bool = False) -> None:
  """Makes sure that the bucket of a path, if it is in one, can be used.

  Three libraries work on a run's bucket, and each finds credentials by itself:
  gcsfs, TensorStore for a checkpoint's arrays, and google-cloud-storage, which
  Orbax asks before it deletes a checkpoint. Each is tried here, so that none
  fails when the first checkpoint is due.

  Args:
    path: local ones are not looked at.
    write: whether a run will be written there; else it is only read.

  Raises:
    StorageError: a URL that is not gs://, a missing package, no such bucket, no
      permission to use it, or a name that no checkpoint can have.
  """
  if write:
    check_characters(path)
  if not is_remote(path):
    return
  client = _client(path)
  bucket, _, name = without_scheme(path).partition("/")
  if not bucket:
    raise StorageError(f"{os.fspath(path)} names no bucket")
  try:
    with _one_line(path, f". {_HINT}"):
      client.ls(bucket, max_results=1, timeout=_SECONDS)
      store = open_store(f"gs://{bucket}").result(_SECONDS)
      store.read(f"{name}/config.json").result(_SECONDS)
      if write:
        google = importlib.import_module("google.cloud.storage")
        google.Client().get_bucket(bucket, timeout=_SECONDS, retry=None)
  except FileNotFoundError as error:
    raise StorageError(
      f"{os.fspath(path)}: there is no bucket {bucket!r}"
    ) from error


def check_data(path: PathLike) -> bool:
  """Makes sure that data in a bucket, if they are in one, can be listed.

  Returns:
    Whether anything is there; True of local data, which are not looked at.

  Raises:
    StorageError: a URL that is not gs://, a missing package, or no permission.
  """
  if not is_remote(path):
    return True
  if not os.fspath(path).startswith("gs://"):
    raise StorageError(
      f"{os.fspath(path)}: prepared data sets are read from local disks and "
      "gs:// buckets only: copy them, or mount them as a folder"
    )
  try:
    with _one_line(path, f". {_HINT}"):
      name = without_scheme(path)
      return bool(_client(path).ls(name, max_results=1, timeout=_SECONDS))
  except FileNotFoundError:
    return False  # whoever looks there says what is missing


def check_local(what: str, *paths: str) -> None:
  """Raises StorageError for a URL among the paths of what only disks hold."""
  for path in filter(is_remote, paths):
    raise StorageError(
      f"{what}: {path} is a URL, but these are read from disks only: copy it "
      "to each machine (`gcloud storage rsync -r URL DIR`, a file with "
      "`gcloud storage cp`), or mount the bucket (gcsfuse)"
    )


def find(folder: str) -> list[str]:
  """Objects below a folder of a gs:// bucket, by their paths in it, sorted.

  Raises:
    StorageError: a missing package, or a bucket that can't be listed.
  """
  start = f"{without_scheme(folder).rstrip('/')}/"
  with _one_line(folder, f". {_HINT}"):
    names = _client(folder).find(start)
  # Programs mark empty folders by objects whose names end in a slash.
  names = [name.removeprefix(start) for name in names]
  return sorted(name for name in names if name and not name.endswith("/"))


def read(path: str) -> bytes:
  """An object of a gs:// bucket.

  Raises:
    FileNotFoundError, StorageError: it is not there, or can't be read.
  """
  try:
    with _one_line(path):
      return _client(path).cat_file(path)
  except FileNotFoundError as error:  # of another name
    raise FileNotFoundError(errno.ENOENT, "no such object", path) from error


def upload(source: PathLike, path: PathLike) -> None:
  """Writes a local file to a bucket.

  Readers see the old object or the whole new one.

  Raises:
    StorageError: it can't be written.
  """
  with _one_line(path):
    _client(path).put_file(os.fspath(source), os.fspath(path))


def _client(path: PathLike) -> Any:
  """The gcsfs file system; epath works with the same one."""
  path = os.fspath(path)
  if not path.startswith("gs://"):
    raise StorageError(
      f"{path}: runs are kept on local disks and in gs:// buckets only, since "
      "Orbax writes checkpoints nowhere else: use a local folder and copy it "
      "(for s3:// with `aws s3 sync`)"
    )
  if importlib.util.find_spec("gcsfs") is None:
    raise StorageError(f"{path}: gs:// needs a package: pip install gcsfs")
  import fsspec
  from fsspec.config import conf

  # TensorStore's files would be missing from listings that gcsfs remembers.
  conf.setdefault("gs", {}).setdefault("use_listings_cache", False)
  # It logs the traceback of every error that it raises.
  logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
  return fsspec.filesystem("gcs", finalize_on_close=True)


@contextlib.contextmanager
def _one_line(path: PathLike, hint: str = "") -> Iterator[None]:
  """Makes a StorageError of whatever the three libraries raise.

  Their errors have no base in common but Exception. FileNotFoundError stays.
  """
  try:
    yield
  except (StorageError, FileNotFoundError):
    raise
  except Exception as error:
    text = " ".join(str(error).split()) or "no answer in time"
    raise StorageError(
      f"{os.fspath(path)}: {type(error).__name__}: {text}{hint}"
    ) from error


def open_store(folder: PathLike) -> Any:
  """TensorStore's view of a folder: a future of a KvStore of its files."""
  tensorstore = importlib.import_module("tensorstore")
  if is_remote(folder):
    bucket, _, path = without_scheme(folder).partition("/")
    spec = {
      "driver": "gcs",
      "bucket": bucket,
      "path": f"{path}/" if path else "",
    }
  else:
    spec = {"driver": "file", "path": f"{os.path.abspath(folder)}/"}
  return tensorstore.KvStore.open(spec)


def read_npy(path: PathLike) -> "np.ndarray":
  """The array of an .npy file; never of objects.

  Raises:
    ValueError: anything but one whole array of numbers.
    OSError: it can't be read.
  """
  import numpy as np

  data = io.BytesIO(epath.Path(path).read_bytes())
  try:
    return np.lib.format.read_array(data)
  # The header is parsed as Python, and may name any size.
  except (ValueError, SyntaxError, tokenize.TokenError, MemoryError) as error:
    text = " ".join(str(error).split())
    raise ValueError(f"{path} is no whole .npy file: {text}") from error
