"""Writing the latent cache: nothing is named before it is whole and on disk."""

import contextlib
import dataclasses
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
from array_record.python.array_record_module import (
  ArrayRecordReader,
  ArrayRecordWriter,
)

from drift_jax.data import latent_format
from drift_jax.data.files import publish, replacing, temporary_name
from drift_jax.data.latent_format import LatentCacheError, Settings, Shard
from drift_jax.system.storage import PathLike

# Compression (zstd) would save 12 % of the bytes and slow reading down by a
# quarter, measured on normally distributed float16.
WRITER_OPTIONS = "group_size:1,uncompressed"


def check_settings(settings: Settings) -> None:
  """Raises LatentCacheError for settings that no cache can have."""
  size, count = settings.image_size, settings.num_images
  if size < 1 or size % settings.downsampling:
    raise LatentCacheError(
      f"image_size={size} must be a positive multiple of the autoencoder's "
      f"downsampling {settings.downsampling}"
    )
  if count < 1:
    where = f"{settings.source}, split {settings.split!r}"
    raise LatentCacheError(f"{where}, holds no images")
  least = -(-count // latent_format.MAX_SHARDS)
  if settings.images_per_shard < least:
    raise LatentCacheError(
      f"images_per_shard={settings.images_per_shard} must be at least {least}: "
      f"readers keep at most {latent_format.MAX_SHARDS} shards open"
    )


def prepare(directory: PathLike, settings: Settings) -> Path:
  """Makes the split's folder, or checks that it was made for these settings.

  Returns:
    DIR/SPLIT.

  Raises:
    LatentCacheError: settings that no cache can have, or others than those of
      the cache that is there (each difference is named).
  """
  check_settings(settings)
  folder = Path(directory) / settings.split
  path = folder / latent_format.SETTINGS_FILE
  new = dataclasses.asdict(settings)
  with _disk_errors(path):
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
      _write(path, new)
  old = dataclasses.asdict(latent_format.load(path, latent_format.as_settings))
  differences = [
    f"{name}: cached {old[name]!r:.80}, now {new[name]!r:.80}"
    for name in old
    if old[name] != new[name]
  ]
  if differences:
    raise LatentCacheError(
      f"{folder} is a cache of other settings ({'; '.join(differences)}): give "
      "the cached ones again, or another --out, or remove that folder"
    )
  return folder


def require_space(folder: Path, settings: Settings, shards: list[int]) -> None:
  """Raises LatentCacheError if the shards do not fit on the disk."""
  images = sum(len(settings.images(shard)) for shard in shards)
  needed = 2 * images * settings.record_bytes
  free = shutil.disk_usage(folder).free
  if needed > free:
    raise LatentCacheError(
      f"{folder} has {free / 1e9:.3g} GB free, but {len(shards)} shards to "
      f"write take {needed / 1e9:.3g} GB: free space or give another --out"
    )


class ShardWriter:
  """Writes one shard; it gets its name only when it is complete on disk.

  As a context manager it is aborted on an exception; `finish` is always the
  caller's.
  """

  def __init__(self, folder: Path, settings: Settings, shard: int):
    """Opens a temporary file in the folder that `prepare` gave.

    Temporary files that a killed job left of this shard are removed, and so is
    the shard itself if there is one.
    """
    self._settings = settings
    self._shard = settings.shard(shard)
    self._path = folder / self._shard["file"]
    self._content = hashlib.sha256()
    self._temporary = temporary_name(self._path)
    with _disk_errors(self._path):
      latent_format.record_path(self._path).unlink(missing_ok=True)
      self._path.unlink(missing_ok=True)
      for leftover in folder.glob(f".{self._path.stem}.*.tmp"):
        leftover.unlink(missing_ok=True)
      self._writer = ArrayRecordWriter(str(self._temporary), WRITER_OPTIONS)

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
        mean, then logarithm of the variance, along the last axis; [2, h, w, c]
        of latents that were drawn before.

    Raises:
      LatentCacheError: moments that are not finite, or too large for the
        stored dtype.
    """
    with np.errstate(over="ignore"):
      stored = moments.astype(latent_format.dtype_of(self._settings.dtype))
    # 'isfinite' of what is stored: an overflow shows as well.
    if not np.isfinite(stored.astype(np.float32)).all():
      raise LatentCacheError(
        f"moments of image {index} of {self._settings.source} reach "
        f"{np.abs(moments).max():g}, which {self._settings.dtype} can't hold: "
        "check the autoencoder's weights, or store bfloat16 (--dtype=bfloat16)"
      )
    height, width, channels = self._settings.latent_shape
    stored = stored.reshape(2, height, width, -1, channels)
    with _disk_errors(self._path):
      for record in np.moveaxis(stored, 3, 1):  # [1 or 2, h, w, c]
        data = record.tobytes()
        self._content.update(data)
        self._writer.write(data)

  def finish(self) -> Shard:
    """Makes the shard durable, reads it back and gives it its name.

    Raises:
      LatentCacheError: the disk is full or failing; nothing is left behind.
    """
    with self, _disk_errors(self._path):
      self._writer.close()
      self._read_back()
      done = {
        "file": self._path.name,
        "num_images": self._shard["num_images"],
        "bytes": self._temporary.stat().st_size,
        "sha256": latent_format.file_sha256(self._temporary),
        "settings_sha256": self._shard["settings_sha256"],
      }
      publish(self._temporary, self._path)
      # Only what has this record counts as finished.
      _write(latent_format.record_path(self._path), done)
    return done

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
        f"({total} records): the disk is failing"
      )


def write_manifest(
  folder: Path, settings: Settings, labels: np.ndarray
) -> bool:
  """Completes the cache, if all its shards are there.

  Args:
    folder: DIR/SPLIT.
    settings: of the cache.
    labels: [num_images] of the whole source.

  Returns:
    Whether it is complete: False while shards of other processes are missing.

  Raises:
    LatentCacheError: the disk is full.
  """
  shards = [
    latent_format.finished_shard(folder, settings, number)
    for number in range(settings.num_shards)
  ]
  if None in shards:
    return False
  path = folder / latent_format.LABELS_FILE
  with _disk_errors(path):
    with replacing(path) as temporary, temporary.open("wb") as file:
      np.save(file, np.asarray(labels, "<i4"))
    manifest = {"settings": dataclasses.asdict(settings), "shards": shards}
    _write(folder / latent_format.MANIFEST_FILE, manifest)
  return True


def _write(path: Path, content: dict[str, Any]) -> None:
  with replacing(path) as temporary:
    temporary.write_bytes(latent_format.to_json(content))


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
  """Turns failures of writing into LatentCacheError."""
  try:
    yield
  except (OSError, RuntimeError) as error:
    raise LatentCacheError(
      f"can't write {path}: {error}; finished shards are kept: make space, "
      f"then run {latent_format.TOOL} with the same flags again"
    ) from error
