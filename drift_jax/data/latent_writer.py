"""Writing the latent cache: nothing is named before it is whole and on disk."""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
from array_record.python.array_record_module import (
  ArrayRecordReader,
  ArrayRecordWriter,
)

from drift_jax.data.latent_format import (
  LABELS_FILE,
  MANIFEST_FILE,
  SETTINGS_FILE,
  TOOL,
  LatentCacheError,
  Manifest,
  Settings,
  Shard,
  check_settings,
  dtype_of,
  file_sha256,
  finished_shard,
  load,
  record_path,
  to_json,
)

# Compression (zstd) would save 12 % of the bytes and slow reading down by a
# quarter, measured on normally distributed float16.
WRITER_OPTIONS = "group_size:1,uncompressed"


def prepare(
  directory: os.PathLike[str] | str, settings: Settings
) -> pathlib.Path:
  """Makes the split's folder, or checks that it was made for these settings.

  Returns:
    DIR/SPLIT.

  Raises:
    LatentCacheError: settings that no cache can have, or others than those of
      the cache that is there (each difference is named).
  """
  check_settings(settings)
  folder = pathlib.Path(directory) / settings.split
  path = folder / SETTINGS_FILE
  with _disk_errors(path):
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
      _write(path, to_json(settings))
  old = load(Settings, path)
  differences = [
    f"{field.name}: cached {_short(a)}, now {_short(b)}"
    for field in dataclasses.fields(Settings)
    if (a := getattr(old, field.name)) != (b := getattr(settings, field.name))
  ]
  if differences:
    raise LatentCacheError(
      f"{folder} is a cache of other settings ({'; '.join(differences)}): give "
      "the cached ones again, or another --out, or remove that folder"
    )
  return folder


def require_space(
  folder: pathlib.Path, settings: Settings, shards: Sequence[int]
) -> None:
  """Raises LatentCacheError if the shards do not fit on the disk."""
  images = sum(len(settings.images(shard)) for shard in shards)
  needed = 2 * images * settings.record_bytes
  free = shutil.disk_usage(folder).free
  if needed > free:
    raise LatentCacheError(
      f"{folder} has {_size(free)} free, but {len(shards)} shards to write "
      f"take {_size(needed)}: free space or give another --out"
    )


class ShardWriter:
  """Writes one shard; it gets its name only when it is complete on disk.

  As a context manager it is aborted on an exception; `finish` is always the
  caller's.
  """

  def __init__(self, folder: pathlib.Path, settings: Settings, shard: int):
    """Opens a temporary file in the folder that `prepare` gave.

    Temporary files that a killed job left of this shard are removed, and so is
    the shard itself if there is one.
    """
    self.shard = shard
    self._folder = folder
    self._settings = settings
    self._path = folder / settings.shard_file(shard)
    self._num_images = 0
    self._content = hashlib.sha256()
    self._temporary = _temporary_name(self._path)
    with _disk_errors(self._path):
      record_path(self._path).unlink(missing_ok=True)
      self._path.unlink(missing_ok=True)
      for leftover in folder.glob(f".{self._path.stem}.*.tmp"):
        leftover.unlink(missing_ok=True)
      try:
        self._writer = ArrayRecordWriter(str(self._temporary), WRITER_OPTIONS)
      except RuntimeError:
        self._temporary.unlink(missing_ok=True)
        raise

  def __enter__(self) -> Self:
    return self

  def __exit__(self, error_type: Any, error: Any, trace: Any) -> None:
    if error_type is not None:
      self.abort()

  def add(self, index: int, moments: np.ndarray) -> None:
    """Appends one image.

    Args:
      index: in the source, for messages.
      moments: [2, h, w, 2 c] float32, of the image and of its mirror image:
        mean, then logarithm of the variance, along the last axis.

    Raises:
      LatentCacheError: moments that are not finite, or too large for the
        stored dtype.
    """
    height, width, channels = self._settings.latent_shape
    shape = (2, height, width, 2 * channels)
    if moments.shape != shape:
      raise LatentCacheError(
        f"moments of image {index} have shape {moments.shape}, expected {shape}"
      )
    with np.errstate(over="ignore"):
      stored = moments.astype(dtype_of(self._settings.dtype))
    # 'isfinite' of what is stored: an overflow shows as well.
    if not np.isfinite(stored.astype(np.float32)).all():
      raise LatentCacheError(
        f"moments of image {index} of {self._settings.source} reach "
        f"{np.abs(moments).max():g}, which {self._settings.dtype} can't hold: "
        "check the autoencoder's weights, or store bfloat16 (--dtype=bfloat16)"
      )
    planes = np.moveaxis(
      stored.reshape(2, height, width, 2, channels), 3, 1
    )  # [2, 2, h, w, c]
    with self._guard():
      for record in planes:
        data = record.tobytes()
        self._content.update(data)
        self._writer.write(data)
    self._num_images += 1

  def finish(self) -> Shard:
    """Makes the shard durable, reads it back and gives it its name.

    Raises:
      LatentCacheError: the disk is full or failing; nothing is left behind.
    """
    with self._guard():
      self._writer.close()
      _sync(self._temporary)
      self._read_back()
      shard = Shard(
        file=self._path.name,
        num_images=self._num_images,
        bytes=self._temporary.stat().st_size,
        sha256=file_sha256(self._temporary),
        settings_sha256=self._settings.sha256,
      )
      os.replace(self._temporary, self._path)
      _sync(self._folder)
      # Only what has this record counts as finished.
      _write(record_path(self._path), to_json(shard))
    return shard

  def abort(self) -> None:
    """Removes what was written."""
    # A writer on a full disk fails again when it closes.
    with contextlib.suppress(RuntimeError):
      self._writer.close()
    self._temporary.unlink(missing_ok=True)

  def _read_back(self) -> None:
    reader = ArrayRecordReader(str(self._temporary))
    content = hashlib.sha256()
    total = reader.num_records()
    for start in range(0, total, 256):
      for data in reader.read(start, min(start + 256, total)):
        content.update(data)
    reader.close()
    if content.digest() != self._content.digest():
      raise LatentCacheError(
        f"{self._temporary} reads back otherwise than it was written "
        f"({total} records of {2 * self._num_images}): the disk is failing"
      )

  @contextlib.contextmanager
  def _guard(self) -> Iterator[None]:
    try:
      with _disk_errors(self._path):
        yield
    except LatentCacheError:
      self.abort()
      raise


def write_manifest(
  folder: pathlib.Path, settings: Settings, labels: np.ndarray
) -> Manifest | None:
  """Completes the cache, if all its shards are there.

  Args:
    folder: DIR/SPLIT.
    settings: of the cache.
    labels: [num_images] of the whole source.

  Returns:
    The manifest; None while shards of other processes are missing.

  Raises:
    LatentCacheError: the disk is full.
  """
  shards = []
  for number in range(settings.num_shards):
    shard = finished_shard(folder, settings, number, checksum=False)
    if shard is None:
      return None
    shards.append(shard)
  manifest = Manifest(settings=settings, shards=tuple(shards))
  with _disk_errors(folder / LABELS_FILE):
    with _replacing(folder / LABELS_FILE) as temporary:
      with temporary.open("wb") as file:
        np.save(file, np.asarray(labels, "<i4"))
    _write(folder / MANIFEST_FILE, to_json(manifest))
  return manifest


def _write(path: pathlib.Path, data: bytes) -> None:
  with _replacing(path) as temporary:
    temporary.write_bytes(data)


@contextlib.contextmanager
def _replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a temporary path; it becomes `path` when it is on disk."""
  temporary = _temporary_name(path)
  try:
    yield temporary
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)
  finally:
    temporary.unlink(missing_ok=True)


def _temporary_name(path: pathlib.Path) -> pathlib.Path:
  """Beside path; another one for every process on every machine."""
  return path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"


def _sync(path: pathlib.Path) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


@contextlib.contextmanager
def _disk_errors(path: pathlib.Path) -> Iterator[None]:
  """Turns failures of writing into LatentCacheError."""
  try:
    yield
  except (OSError, RuntimeError) as error:
    raise LatentCacheError(
      f"can't write {path}: {error} ({_free(path.parent)}); finished shards "
      f"are kept: make space, then run {TOOL} with the same flags again"
    ) from error


def _free(folder: pathlib.Path) -> str:
  try:
    return f"{_size(shutil.disk_usage(folder).free)} free"
  except OSError as error:
    return str(error)


def _size(count: int) -> str:
  return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
