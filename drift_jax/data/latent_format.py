"""The latent cache: posterior moments of an autoencoder, in ArrayRecord shards.

  DIR/SPLIT/settings.json                      what the cache is made from
  DIR/SPLIT/SPLIT-00000-of-00064.arrayrecord   shard k: images [k S, (k+1) S)
  DIR/SPLIT/SPLIT-00000-of-00064.json          its size and SHA-256
  DIR/SPLIT/labels.npy                         [N] int32, of the cached images
  DIR/SPLIT/manifest.json                      all of it; readers need this one

Record 2 i + f of a shard is its image i (f = 0) or the mirror image of that
(f = 1), which was encoded by itself: the mean [h, w, c], then the logarithm of
the variance [h, w, c], little-endian float16 or bfloat16, unscaled. In a cache
of dtype float32 it is a latent that was drawn before [h, w, c], scaled. Every
file gets its name only when it is complete and on disk, a shard's JSON after
the shard and the manifest after everything else: what a killed job leaves
behind is never taken for a result. Paths are local (mounted) ones.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any, TypeVar

import ml_dtypes
import numpy as np

from drift_jax.data.sources import labels_sha256
from drift_jax.system import console, paths
from drift_jax.system.errors import DataError
from drift_jax.system.storage import PathLike, read_npy

FORMAT = "drift_jax latents"
VERSION = 1
MANIFEST_FILE = "manifest.json"
SETTINGS_FILE = "settings.json"
LABELS_FILE = "labels.npy"
DRAWN_DTYPE = "float32"
# Readers keep every shard open, and 1024 open files is a common limit.
MAX_SHARDS = 512

TOOL = "python -m drift_jax.tools.cache_latents"
REDO = f"run {TOOL} with the same flags again: it redoes what is damaged only"

# The record of a finished shard: its file beside the manifest, num_images (two
# records each), the file's bytes and sha256, and settings_sha256.
Shard = dict[str, Any]
_T = TypeVar("_T")


class LatentCacheError(DataError):
  """A latent cache that can't be written or read; the message says why."""


@dataclasses.dataclass(frozen=True)
class Settings:
  """Facts that the content of a cache depends on.

  Attributes:
    source: where the images come from, as given to the tool.
    split: name of the source's split.
    num_images: number of the source's images.
    labels_sha256: checksum of the source's labels as little-endian int32.
    class_names: one for each label.
    image_size: side of the square centre crop (ADM's), in pixels; of arrays
      (drawn.ArrayLatents) that of their grid.
    vae_sha256: identity of the autoencoder's parameters; '' of arrays.
    scaling_factor: sampled latents are multiplied with it when read.
    downsampling: pixels for each latent, along one side.
    latent_channels: c.
    dtype: of the stored moments, 'float16' or 'bfloat16'; 'float32' of latents
      that were drawn before.
    compute_dtype: of the encoder, 'float32' or 'bfloat16'; '' if unknown.
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
  def is_drawn(self) -> bool:
    """Whether it holds one latent of each record, not moments of many."""
    return self.dtype == DRAWN_DTYPE

  @property
  def record_bytes(self) -> int:
    # Two numbers of 16 bits each, or one of 32.
    return 2 * 2 * math.prod(self.latent_shape)

  @property
  def sha256(self) -> str:
    return hashlib.sha256(to_json(dataclasses.asdict(self))).hexdigest()

  def images(self, shard: int) -> range:
    """The indices in the source of a shard's images."""
    start = shard * self.images_per_shard
    return range(start, min(start + self.images_per_shard, self.num_images))

  def shard(self, number: int) -> Shard:
    """The record of a shard, as far as it is known before it is written."""
    name = f"{self.split}-{number:05d}-of-{self.num_shards:05d}.arrayrecord"
    count = len(self.images(number))
    return {"file": name, "num_images": count, "settings_sha256": self.sha256}


def load_manifest(
  directory: PathLike, split: str
) -> tuple[pathlib.Path, Settings, list[Shard]]:
  """(DIR/SPLIT, what the cache was made from, its shards in order).

  Raises:
    LatentCacheError: no cache there, an unfinished one (says how many shards
      are missing), or a manifest that can't be read.
  """
  folder = pathlib.Path(paths.expand(directory)) / split
  if (folder / MANIFEST_FILE).exists():
    return folder, *load(folder / MANIFEST_FILE, _as_manifest)
  if (folder / SETTINGS_FILE).exists():
    settings = load(folder / SETTINGS_FILE, as_settings)
    numbers = range(settings.num_shards)
    done = [finished_shard(folder, settings, n) for n in numbers]
    raise LatentCacheError(
      f"the latent cache {folder} is not complete: {done.count(None)} of its "
      f"{len(done)} shards are missing; run {TOOL} with the same flags "
      "again: it does the missing ones"
    )
  known = folder.parent.glob(f"*/{MANIFEST_FILE}")
  splits = sorted(manifest.parent.name for manifest in known)
  raise LatentCacheError(
    f"no latent cache of split {split!r} in {directory}: "
    + (f"valid options are {splits}" if splits else f"make one with {TOOL}")
  )


def _damage(folder: pathlib.Path, shard: Shard, checksum: bool) -> str:
  """The damage of a shard's file in words, '' if there is none."""
  path, size = folder / shard["file"], shard["bytes"]
  if not path.exists():
    return f"{path} is missing"
  if path.stat().st_size != size:
    return f"{path} has {path.stat().st_size} bytes instead of {size}"
  if checksum and file_sha256(path) != shard["sha256"]:
    return f"{path} is damaged: its SHA-256 is not the recorded one"
  return ""


def verify(
  directory: PathLike, split: str, *, checksum: bool = True
) -> tuple[pathlib.Path, Settings, list[Shard], np.ndarray]:
  """`load_manifest` and the labels [N] int32 of a cache that is whole.

  Args:
    directory: of the cache.
    split: of the cache.
    checksum: read every shard and compare its SHA-256, not only its size.

  Raises:
    LatentCacheError: naming every damaged shard.
  """
  folder, settings, shards = load_manifest(directory, split)
  labels = _load_labels(folder, settings)
  progress = console.Progress("Verifying", len(labels)) if checksum else None
  damages = []
  for shard in shards:
    damages.append(_damage(folder, shard, checksum))
    if progress is not None:
      progress.update(shard["num_images"])
  damages = list(filter(None, damages))
  if damages:
    more = f" and {len(damages) - 8} more" if len(damages) > 8 else ""
    raise LatentCacheError(
      f"{len(damages)} of {len(shards)} shards: {'; '.join(damages[:8])}{more};"
      f" {REDO}"
    )
  if progress is not None:
    rate = progress.close()
    console.logger.info("%s is whole (%.4g images/s).", folder, rate)
  return folder, settings, shards, labels


def _load_labels(folder: pathlib.Path, settings: Settings) -> np.ndarray:
  """[N] int32, checked against the settings.

  Raises:
    LatentCacheError: missing or damaged labels.
  """
  path = folder / LABELS_FILE
  try:
    labels = read_npy(path)
  except (OSError, ValueError) as error:
    raise LatentCacheError(f"{path} can't be read: {error}; {REDO}") from error
  same = labels_sha256(labels) == settings.labels_sha256
  if labels.dtype != np.int32 or not same:
    raise LatentCacheError(
      f"{path} ({labels.dtype} {labels.shape}) does not hold the "
      f"{settings.num_images} labels of the manifest; {REDO}"
    )
  return labels


def finished_shard(
  folder: pathlib.Path, settings: Settings, number: int, checksum: bool = False
) -> Shard | None:
  """The record of a shard, None if it is to be made (again).

  Args:
    folder: DIR/SPLIT.
    settings: that it must have been made with.
    number: of the shard.
    checksum: read the shard and compare its SHA-256, not only its size.
  """
  expected = settings.shard(number)
  try:
    shard = load(record_path(folder / expected["file"]), Shard)
  except LatentCacheError:
    return None
  is_ours = expected.items() <= shard.items()
  return shard if is_ours and not _damage(folder, shard, checksum) else None


def dtype_of(name: str) -> np.dtype:
  return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def record_path(path: pathlib.Path) -> pathlib.Path:
  return path.with_suffix(".json")


def to_json(content: dict[str, Any]) -> bytes:
  content = {"format": FORMAT, "version": VERSION} | content
  return json.dumps(content, indent=1).encode()


def load(path: pathlib.Path, make: Callable[[Any], _T]) -> _T:
  """Read a file that `to_json` made; `make` turns its content into a value."""
  try:
    content = json.loads(path.read_bytes())
    head = (content.pop("format"), content.pop("version"))
    value = make(content) if head == (FORMAT, VERSION) else None
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    text = f"{path} can't be read: {error!r}; {REDO}"
    raise LatentCacheError(text) from error
  if value is None:
    raise LatentCacheError(
      f"{path} has format {head[0]!r}, version {head[1]!r}, but this program "
      f"reads {FORMAT!r}, version {VERSION}: run {TOOL} into another folder"
    )
  return value


def as_settings(content: Any) -> Settings:
  return Settings(**content | {"class_names": tuple(content["class_names"])})


def _as_manifest(content: Any) -> tuple[Settings, list[Shard]]:
  settings, shards = as_settings(content["settings"]), content["shards"]
  expected = [settings.shard(number) for number in range(settings.num_shards)]
  # Any change of the settings changes their checksum.
  if [{k: shard[k] for k in expected[0]} for shard in shards] != expected:
    raise ValueError(f"its {len(shards)} shards are not those of its settings")
  return settings, shards


def file_sha256(path: pathlib.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
