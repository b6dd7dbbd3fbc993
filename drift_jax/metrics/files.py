"""Files that appear whole or not at all."""

import contextlib
import json
import math
import os
import pathlib
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

from drift_jax.system import paths, storage
from drift_jax.system.errors import EvaluationError

PathLike = storage.PathLike
# What zipfile raises for bytes that it can't make sense of, or has no means to.
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError)


@contextlib.contextmanager
def reading_npz(path: PathLike) -> Iterator[None]:
  """Checks that a file is one zip file; names it in what reading it raises.

  Raises:
    FileNotFoundError: there is none.
    ValueError: another kind of file, a damaged one, one after another, which
      nothing would read; or any ValueError of the context.
  """
  # A missing file is no zip file either: opening it says so.
  with open(path, "rb") as file:
    is_zip = zipfile.is_zipfile(file)
  try:
    if not is_zip:
      raise ValueError("this is no .npz file, or is cut short")
    with zipfile.ZipFile(path) as archive:
      offsets = [entry.header_offset for entry in archive.infolist()]
    # The index is at the end; less than 0 is damage, which reading finds.
    if min(offsets, default=0) > 0:
      raise ValueError(
        f"the file begins with {min(offsets)} bytes that its index does not"
        " list: it is several files in one, of which only the last can be read"
      )
    yield
  except _DAMAGED as error:
    raise ValueError(f"{path} is damaged: {error}") from error
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


@contextlib.contextmanager
def replacing(path: PathLike) -> Iterator[pathlib.Path]:
  """Yields a temporary name in path's folder, renamed to path on success.

  Readers of `path` see the old file or the complete new one, also when the
  process dies in between. The folder is made when it is missing; after an
  exception the temporary file is removed and `path` is untouched.

  A path in a bucket has its temporary file on the local disk.

  Raises:
    PathError: `~USER` of nobody.
    StorageError: a bucket that can't be written to.
  """
  if storage.is_remote(path):
    with tempfile.TemporaryDirectory() as folder:
      temporary = pathlib.Path(folder) / "file"
      yield temporary
      storage.upload(temporary, path)
    return
  path = pathlib.Path(paths.expand(path))
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
  try:
    with storage.naming_errors(path):
      yield temporary
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def report_text(report: Any) -> str:
  """A report as indented JSON, of finite numbers only.

  Raises:
    EvaluationError: a number that is not finite, which JSON has not; it names
      the number's place.
  """
  for place, number in _numbers(report, ""):
    if not math.isfinite(number):
      raise EvaluationError(
        f"{place[1:]} is {number}: a report holds finite numbers only; is what "
        "it was computed from finite?"
      )
  return json.dumps(report, indent=2, allow_nan=False)


def write_report(path: PathLike, report: Any) -> None:
  """Writes `report_text`; the file appears whole or not at all.

  Raises:
    EvaluationError: as `report_text`, naming the file too.
    StorageError: a bucket that can't be written to.
  """
  try:
    text = report_text(report)
  except EvaluationError as error:
    raise EvaluationError(f"{path} is not written: {error}") from error
  with replacing(path) as temporary:
    temporary.write_text(text + "\n", encoding="utf-8")


def _numbers(value: Any, place: str) -> Iterator[tuple[str, float]]:
  """(place, number) of every float, as /KEY/KEY."""
  if isinstance(value, float):
    yield place, value
  elif isinstance(value, dict):
    for key, part in value.items():
      yield from _numbers(part, f"{place}/{key}")
  elif isinstance(value, (list, tuple)):
    for number, part in enumerate(value):
      yield from _numbers(part, f"{place}/{number}")
