"""Files that get their name when they are whole and on disk."""

import contextlib
import os
import pathlib
import secrets
from collections.abc import Iterator


def temporary_name(path: pathlib.Path) -> pathlib.Path:
  """A name beside `path`, another one for every process on every machine."""
  return path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"


def sync(path: pathlib.Path) -> None:
  """Wait until a file or the names in a folder are on the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def publish(temporary: pathlib.Path, path: pathlib.Path) -> None:
  """Give a complete file its name, durably."""
  sync(temporary)
  os.replace(temporary, path)
  sync(path.parent)


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yield a temporary path; what is written there becomes `path`."""
  temporary = temporary_name(path)
  try:
    yield temporary
    publish(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
