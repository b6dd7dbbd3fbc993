"""Files that appear whole or not at all."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator

from drift_jax import storage

PathLike = storage.PathLike


@contextlib.contextmanager
def replacing(path: PathLike) -> Iterator[pathlib.Path]:
  """Yields a temporary name in path's folder, renamed to path on success.

  Whoever reads `path` sees the old file or the complete new one, also when the
  process dies in between. The folder is made when it is missing; after an
  exception the temporary file is removed and `path` is untouched.

  A path in a bucket has its temporary file on the local disk.

  Raises:
    StorageError: a bucket that can't be written to.
  """
  if storage.is_remote(path):
    with tempfile.TemporaryDirectory() as folder:
      temporary = pathlib.Path(folder) / "file"
      yield temporary
      storage.upload(temporary, path)
    return
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
  try:
    with storage.naming_errors(path):
      yield temporary
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
