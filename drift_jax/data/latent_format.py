"""The latent cache: posterior moments of an autoencoder, in ArrayRecord shards.

  DIR/SPLIT/settings.json                      what the cache is made from
  DIR/SPLIT/SPLIT-00000-of-00064.arrayrecord   shard k: images [k S, (k+1) S)
  DIR/SPLIT/SPLIT-00000-of-00064.json          its size and SHA-256
  DIR/SPLIT/labels.npy                         [N] int32, of the cached images
  DIR/SPLIT/manifest.json                      all of it; readers need this one

Record 2 i + f of a shard is its image i (f = 0) or the mirror image of that
(f = 1), which was encoded by itself: the mean [h, w, c], then the logarithm of
the variance [h, w, c], little-endian float16 or bfloat16, unscaled. Every file
gets its name only when it is complete and on disk, a shard's JSON after the
shard and the manifest after everything else: what a killed job leaves behind is
never taken for a result. Paths are local (mounted) ones.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import typing
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from drift_jax.data.errors import DataError
from drift_jax.data.npy import read_npy
from drift_jax.system import options, paths

FORMAT = "drift_jax latents"
VERSION = 1
MANIFEST_FILE = "manifest.json"
SETTINGS_FILE = "settings.json"
LABELS_FILE = "labels.npy"
# Readers keep every shard open, and 1024 open files is a common limit.
MAX_SHARDS = 512

TOOL = "python -m drift_jax.tools.cache_latents"
REDO = f"run {TOOL} with the same flags again: it redoes what is damaged only"


class LatentCacheError(DataError):
  """A latent cache that can't be written or read; the message says why."""


@dataclasses.dataclass(frozen=True)
class Settings:
  """What the content of a cache depends on.

  Attributes:
    source: where the images come from, as given to the tool.
    split: of the source.
    num_images: of the source.
    labels_sha256: of the source's labels as little-endian int32.
    class_names: one for each label.
    image_size: of the square centre crop (ADM's), in pixels.
    vae_sha256: identity of the autoencoder's parameters.
    scaling_factor: sampled latents are multiplied with it when read.
    downsampling: pixels for each latent, along one side.
    latent_channels: c.
    dtype: of the stored moments, 'float16' or 'bfloat16'.
    compute_dtype: of the encoder, 'float32' or 'bfloat16'.
    images_per_shard: S.
  """

  source: str
  split: str
  num_images: int
  labels_sha256: str
  class_names: tuple[str, ...]
  image_size: int
  vae_sha256: str
  scaling_factor: float
  downsampling: int
  latent_channels: int
  dtype: str
  compute_dtype: str
  images_per_shard: int

  @property
  def num_shards(self) -> int:
    return -(-self.num_images // self.images_per_shard)

  @property
  def latent_shape(self) -> tuple[int, int, int]:
    """(h, w, c)."""
    size = self.image_size // self.downsampling
    return size, size, self.latent_channels

  @property
  def record_bytes(self) -> int:
    return 2 * 2 * int(np.prod(self.latent_shape))

  @property
  def sha256(self) -> str:
    return hashlib.sha256(to_json(self)).hexdigest()

  def images(self, shard: int) -> range:
    """The indices in the source of a shard's images."""
    start = shard * self.images_per_shard
    return range(start, min(start + self.images_per_shard, self.num_images))

  def shard_file(self, shard: int) -> str:
    return f"{self.split}-{shard:05d}-of-{self.num_shards:05d}.arrayrecord"


@dataclasses.dataclass(frozen=True)
class Shard:
  """A finished shard.

  Attributes:
    file: name, beside the manifest.
    num_images: that it holds; two records each.
    bytes: size of the file.
    sha256: of the file.
    settings_sha256: of the settings that it was made with.
  """

  file: str
  num_images: int
  bytes: int
  sha256: str
  settings_sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
  """A complete cache of one split.

  Attributes:
    settings: what it was made from.
    shards: in the order of the images.
  """

  settings: Settings
  shards: tuple[Shard, ...]


def check_settings(settings: Settings) -> None:
  """Raises LatentCacheError for settings that no cache can have."""
  if settings.dtype not in options.LATENT_DTYPES:
    raise LatentCacheError(
      f"dtype={settings.dtype!r}: valid options are "
      f"{list(options.LATENT_DTYPES)}"
    )
  if settings.image_size < 1 or settings.image_size % settings.downsampling:
    raise LatentCacheError(
      f"image_size={settings.image_size} must be a positive multiple of the "
      f"autoencoder's downsampling {settings.downsampling}"
    )
  if settings.num_images < 1:
    raise LatentCacheError(
      f"{settings.source}, split {settings.split!r}, holds no images"
    )
  if settings.images_per_shard < 1:
    raise LatentCacheError(
      f"images_per_shard={settings.images_per_shard} must be positive"
    )
  if settings.num_shards > MAX_SHARDS:
    least = -(-settings.num_images // MAX_SHARDS)
    raise LatentCacheError(
      f"images_per_shard={settings.images_per_shard} makes "
      f"{settings.num_shards} shards of {settings.num_images} images, but "
      f"readers keep all of at most {MAX_SHARDS} open: give {least} or more"
    )


def labels_sha256(labels: np.ndarray) -> str:
  """Of labels as little-endian int32, in hexadecimal."""
  data = np.ascontiguousarray(labels, "<i4").tobytes()
  return hashlib.sha256(data).hexdigest()


def load_manifest(
  directory: os.PathLike[str] | str, split: str
) -> tuple[pathlib.Path, Manifest]:
  """(DIR/SPLIT, its manifest).

  Raises:
    LatentCacheError: no cache there, an unfinished one (says how many shards
      are missing), or a manifest that can't be read.
  """
  folder = pathlib.Path(paths.expand(directory)) / split
  path = folder / MANIFEST_FILE
  if not path.exists():
    if (folder / SETTINGS_FILE).exists():
      settings = load(Settings, folder / SETTINGS_FILE)
      missing = sum(
        finished_shard(folder, settings, shard, checksum=False) is None
        for shard in range(settings.num_shards)
      )
      raise LatentCacheError(
        f"the latent cache {folder} is not complete: {missing} of its "
        f"{settings.num_shards} shards are missing; run {TOOL} with the same "
        "flags again: it does the missing ones"
      )
    splits = sorted(
      p.parent.name for p in folder.parent.glob(f"*/{MANIFEST_FILE}")
    )
    raise LatentCacheError(
      f"no latent cache of split {split!r} in {directory}: "
      + (f"valid options are {splits}" if splits else f"make one with {TOOL}")
    )
  manifest = load(Manifest, path)
  settings = manifest.settings
  expected = [
    (settings.shard_file(n), len(settings.images(n)), settings.sha256)
    for n in range(settings.num_shards)
  ]
  found = [(s.file, s.num_images, s.settings_sha256) for s in manifest.shards]
  if found != expected:
    raise LatentCacheError(
      f"{path} was changed: its shards ({len(found)}, of "
      f"{sum(count for _, count, _ in found)} images) were not made with its "
      f"settings ({settings.num_shards}, of {settings.num_images} images); "
      f"{REDO}"
    )
  return folder, manifest


def damage(folder: pathlib.Path, shard: Shard, *, checksum: bool) -> str:
  """What is wrong with a shard's file, '' if nothing.

  Args:
    folder: DIR/SPLIT.
    shard: what is recorded of it.
    checksum: read it and compare its SHA-256, not only its size.
  """
  path = folder / shard.file
  if not path.exists():
    return f"{path} is missing"
  if path.stat().st_size != shard.bytes:
    return f"{path} has {path.stat().st_size} bytes instead of {shard.bytes}"
  if checksum and file_sha256(path) != shard.sha256:
    return f"{path} is damaged: its SHA-256 is not the recorded one"
  return ""


def verify(
  directory: os.PathLike[str] | str,
  split: str,
  *,
  checksum: bool = True,
  on_shard: Callable[[Shard], object] = lambda shard: None,
) -> Manifest:
  """Checks a cache and gives its manifest.

  Args:
    directory: of the cache.
    split: of the cache.
    checksum: read every shard and compare its SHA-256, not only its size.
    on_shard: called after each shard.

  Raises:
    LatentCacheError: naming every damaged shard.
  """
  folder, manifest = load_manifest(directory, split)
  found = []
  for shard in manifest.shards:
    problem = damage(folder, shard, checksum=checksum)
    if problem:
      found.append(problem)
    on_shard(shard)
  if found:
    more = f" and {len(found) - 8} more" if len(found) > 8 else ""
    raise LatentCacheError(
      f"{len(found)} of {len(manifest.shards)} shards: "
      f"{'; '.join(found[:8])}{more}; {REDO}"
    )
  load_labels(folder, manifest.settings)
  return manifest


def load_labels(folder: pathlib.Path, settings: Settings) -> np.ndarray:
  """[N] int32, checked against the settings.

  Raises:
    LatentCacheError: missing or damaged labels, or one without a class name.
  """
  path = folder / LABELS_FILE
  try:
    labels = read_npy(path)
  except (OSError, ValueError) as error:
    raise LatentCacheError(f"{path} can't be read: {error}; {REDO}") from error
  if (
    labels.dtype != np.int32
    or labels.shape != (settings.num_images,)
    or labels_sha256(labels) != settings.labels_sha256
  ):
    raise LatentCacheError(
      f"{path} ({labels.dtype} {labels.shape}) does not hold the "
      f"{settings.num_images} labels of the manifest; {REDO}"
    )
  num_classes = len(settings.class_names)
  wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
  if len(wrong):
    raise LatentCacheError(
      f"{path}: label {labels[wrong[0]]} of image {wrong[0]} lies outside "
      f"[0, {num_classes}), the manifest's class names: remove the cache and "
      f"run {TOOL} on a source whose labels and names match"
    )
  return labels


def finished_shard(
  folder: pathlib.Path, settings: Settings, shard: int, *, checksum: bool
) -> Shard | None:
  """What is recorded of a shard, None if it is to be done (again).

  Args:
    folder: DIR/SPLIT.
    settings: that it must have been made with.
    shard: its number.
    checksum: read the shard and compare its SHA-256, not only its size.
  """
  path = folder / settings.shard_file(shard)
  try:
    done = load(Shard, record_path(path))
  except LatentCacheError:
    return None
  expected = (path.name, settings.sha256, len(settings.images(shard)))
  found = (done.file, done.settings_sha256, done.num_images)
  if found != expected or damage(folder, done, checksum=checksum):
    return None
  return done


def dtype_of(name: str) -> np.dtype:
  return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def record_path(path: pathlib.Path) -> pathlib.Path:
  return path.with_suffix(".json")


def to_json(value: Settings | Shard | Manifest) -> bytes:
  content = {"format": FORMAT, "version": VERSION} | dataclasses.asdict(value)
  return json.dumps(content, indent=1).encode()


_Content = typing.TypeVar("_Content", Settings, Shard, Manifest)


def load(kind: type[_Content], path: pathlib.Path) -> _Content:
  """Reads a file that `to_json` made, checking names and types."""
  try:
    content = json.loads(path.read_bytes())
    head = (content.pop("format"), content.pop("version"))
    if head != (FORMAT, VERSION):
      raise LatentCacheError(
        f"{path} has format {head[0]!r}, version {head[1]!r}, but this program "
        f"reads {FORMAT!r}, version {VERSION}: run {TOOL} into another folder"
      )
    return _from_json(kind, content)
  except FileNotFoundError as error:
    raise LatentCacheError(f"{path} is missing") from error
  except (KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
    raise LatentCacheError(
      f"{path} can't be read: {error!r}; {REDO}"
    ) from error
  except json.JSONDecodeError as error:
    raise LatentCacheError(
      f"{path} is no complete JSON: {error}; {REDO}"
    ) from error


def _from_json(kind: type[Any], content: Mapping[str, Any]) -> Any:
  hints = typing.get_type_hints(kind)
  if set(content) != set(hints):
    raise KeyError(*sorted(set(content) ^ set(hints)))
  values = {}
  for name, hint in hints.items():
    value = content[name]
    if typing.get_origin(hint) is tuple:
      item = typing.get_args(hint)[0]
      value = tuple(_value(item, entry, name) for entry in list(value))
    else:
      value = _value(hint, value, name)
    values[name] = value
  return kind(**values)


def _value(kind: type[Any], value: Any, name: str) -> Any:
  if dataclasses.is_dataclass(kind):
    return _from_json(kind, value)
  if not isinstance(value, kind) or isinstance(value, bool):
    raise TypeError(f"{name}={value!r} is no {kind.__name__}")
  return value


def file_sha256(path: pathlib.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
