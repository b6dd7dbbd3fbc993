"""Encodes a data set: see drift_jax.tools.cache_latents."""

import argparse
import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import pathlib
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from drift_jax.data import latent_format, latent_writer, transforms
from drift_jax.data.drawn import ArrayLatents, DrawnLatents
from drift_jax.data.encoded import EncodedSource
from drift_jax.data.latent_format import LatentCacheError, Settings
from drift_jax.data.order import check_labels
from drift_jax.data.sources import (
  ArraySource,
  Source,
  described,
  labels_sha256,
  open_source,
)
from drift_jax.system import console, options, paths, sharding, storage
from drift_jax.system.console import logger
from drift_jax.system.devices import find_devices
from drift_jax.tools.cache_latents import SPLITS
from drift_jax.training import artifacts, autoencoders, released
from drift_jax.training.inputs import Splits

# Batches decoded ahead of the device, and batches that the device has besides
# the one whose result is fetched.
_DECODED_AHEAD = 3
_ENCODED_AHEAD = 1
# Sources of latents that were drawn before.
_DRAWN: dict[str, type[DrawnLatents] | type[ArrayLatents]] = {
  options.DRAWN_SOURCE: DrawnLatents,
  options.ARRAYS_SOURCE: ArrayLatents,
}


class Piece(NamedTuple):
  """A batch of one shard.

  Attributes:
    shard: its number.
    indices: in the source.
    values: [b, ...] of these images: pixels, later moments; or what becomes
      that, as futures or an array of JAX.
  """

  shard: int
  indices: range
  values: Any


def _finished(
  pieces: Iterable[Piece], ahead: int, finish: Callable[[Piece], np.ndarray]
) -> Iterator[Piece]:
  """The pieces in order, finished while the next `ahead` are worked on."""
  pending: collections.deque[Piece] = collections.deque()
  for piece in pieces:
    pending.append(piece)
    if len(pending) > ahead:
      first = pending.popleft()
      yield first._replace(values=finish(first))
  for piece in pending:
    yield piece._replace(values=finish(piece))


@functools.partial(jax.jit, static_argnames=("module", "precision"))
def moments_of(
  params: Any, pixels: jax.Array, *, module: nn.Module, precision: str
) -> jax.Array:
  """uint8 [B, H, W, 3] -> float32 [B, 2, h, w, 2 c], image and mirror image."""
  images = pixels.astype(jnp.float32) / 127.5 - 1.0
  both = jnp.stack([images, images[:, :, ::-1]], axis=1)
  flat = both.reshape(-1, *images.shape[1:])
  with jax.default_matmul_precision(precision):
    moments: Any = module.apply({"params": params}, flat, method="encode")
  moments = moments.astype(jnp.float32)
  return moments.reshape(*both.shape[:2], *moments.shape[1:])


def _crop(source: Source, size: int, index: int) -> np.ndarray:
  """The centre crop of an image, uint8 [size, size, 3]."""
  return np.asarray(transforms.center_crop(source.image(index), size))


def read_batches(
  read: Callable[[int], np.ndarray],
  settings: Settings,
  shards: Sequence[int],
  batch_size: int,
  pool: concurrent.futures.Executor,
) -> Iterator[Piece]:
  """What `read` gives of each image, stacked; the pool works ahead."""

  def started() -> Iterator[Piece]:
    for shard in shards:
      images = settings.images(shard)
      for start in range(0, len(images), batch_size):
        indices = images[start : start + batch_size]
        yield Piece(shard, indices, [pool.submit(read, i) for i in indices])

  return _finished(
    started(),
    _DECODED_AHEAD,
    lambda piece: np.stack([future.result() for future in piece.values]),
  )


def encode_batches(
  pieces: Iterable[Piece],
  vae: artifacts.Artifact,
  batch_size: int,
  mesh: jax.sharding.Mesh,
  compute_dtype: str,
) -> Iterator[Piece]:
  """Moments [b, 2, h, w, 2 c] float32 of pieces of pixels.

  Every batch is filled up to `batch_size`: one program is compiled. The device
  has the next batch before the last one's result is fetched.
  """
  params = jax.device_put(vae.params, sharding.replicated(mesh))
  # Matrix units would otherwise round the factors of float32 products.
  precision = "highest" if compute_dtype == "float32" else "default"
  encode = functools.partial(moments_of, module=vae.module, precision=precision)

  def started() -> Iterator[Piece]:
    for piece in pieces:
      fill = [(0, batch_size - len(piece.indices))] + [(0, 0)] * 3
      batch = sharding.put_batch(np.pad(piece.values, fill), mesh)
      moments = encode(params, batch)
      yield piece._replace(values=moments)

  return _finished(
    started(),
    _ENCODED_AHEAD,
    lambda piece: np.asarray(piece.values)[: len(piece.indices)],
  )


def _unfinished(
  folder: pathlib.Path, settings: Settings, shards: Sequence[int]
) -> list[int]:
  """The shards to write; those that are there are read and compared."""
  progress = console.Progress("Checking", settings.num_images)
  todo = []
  for shard in shards:
    if not latent_format.finished_shard(folder, settings, shard, checksum=True):
      todo.append(shard)
    progress.update(len(settings.images(shard)))
  progress.close()
  finished = len(shards) - len(todo)
  logger.info("%d of %d shards are finished.", finished, len(shards))
  return todo


def _write(
  pieces: Iterable[Piece], folder: pathlib.Path, settings: Settings, total: int
) -> None:
  """Writes the shards; each is completed while the next is computed."""
  progress = console.Progress("Encoding", total)
  with concurrent.futures.ThreadPoolExecutor(1) as background:
    finishing = background.submit(lambda: None)
    for shard, group in itertools.groupby(pieces, lambda piece: piece.shard):
      with latent_writer.ShardWriter(folder, settings, shard) as writer:
        for piece in group:
          for index, moments in zip(piece.indices, piece.values, strict=True):
            writer.add(index, moments)
          progress.update(len(piece.indices))
        finishing.result()
        finishing = background.submit(writer.finish)
    finishing.result()
  logger.info("Encoded %d images at %.4g images/s.", total, progress.close())


def open_images(arguments: argparse.Namespace) -> EncodedSource:
  """The source of images, or of drawn latents, that the command line names.

  Raises:
    LatentCacheError: no such source, one that does not hold 8-bit RGB, a label
      without a class name, or torch missing where it is needed.
  """
  try:
    prefix, _, rest = arguments.source.partition(":")
    if kind := _DRAWN.get(f"{prefix}:"):
      storage.check_local("--source", rest, arguments.data_dir)
      source = kind(
        pathlib.Path(arguments.data_dir) / paths.expand(rest),
        split=arguments.split,
        class_order=arguments.class_order,
      )
    elif arguments.held_out:
      train_split, test_split = SPLITS
      names = dict(train_split=train_split, test_split=test_split)
      settings: Any = argparse.Namespace(
        **vars(arguments), **names, decoder="pillow"
      )
      divided = Splits(settings)
      is_test = arguments.split == test_split
      source = divided.test() if is_test else divided.train()
    else:
      source = open_source(
        arguments.source,
        split=arguments.split,
        data_dir=arguments.data_dir,
        class_order=arguments.class_order,
        max_corrupt=arguments.max_corrupt,
        decoder="pillow",
        exif=arguments.exif,
      )
    check_labels(source.labels, source.class_names)
  except ValueError as error:
    raise LatentCacheError(
      f"--source={arguments.source} --split={arguments.split}: {error}"
    ) from error
  if isinstance(source, ArraySource):
    raise LatentCacheError(
      f"--source={arguments.source}: these images are no 8-bit RGB, which the "
      "autoencoder takes; valid options are "
      f"{[name for name in options.IMAGE_SOURCES if name != 'digits']}"
    )
  return cast(EncodedSource, source)


def _open_vae(arguments: argparse.Namespace) -> Any:
  """The autoencoder that --vae names, its parameters not read yet."""
  on_hub = arguments.vae.startswith(storage.HUB)
  if not on_hub and not artifacts.exists(arguments.vae):
    raise artifacts.ArtifactError(
      f"no exported model in {arguments.vae}, which is --vae: python -m "
      f"drift_jax.tools.convert_weights vae --from={released.AUTOENCODER} "
      f"--out={shlex.quote(arguments.vae)}"
    )
  opened = artifacts.opened(
    autoencoders.local(arguments.vae), dtype=arguments.compute_dtype
  )
  kind = opened.artifact.kind
  if kind != "vae":
    raise LatentCacheError(
      f"{arguments.vae} holds a model of kind {kind!r}, want 'vae': make "
      "one with python -m drift_jax.tools.convert_weights vae"
    )
  return opened


def _space(
  arguments: argparse.Namespace, source: Source, opened: Any
) -> dict[str, Any]:
  """The settings that say which latents these are."""
  if isinstance(source, ArrayLatents):
    side, _, channels = source.latent_shape
    return {
      "image_size": side,
      "vae_sha256": "",
      "scaling_factor": 1.0,
      "downsampling": 1,
      "latent_channels": channels,
    }
  module: Any = opened.artifact.module
  return {
    "image_size": arguments.image_size,
    "vae_sha256": opened.artifact.sha256,
    "scaling_factor": float(module.scaling_factor),
    "downsampling": module.downsampling,
    "latent_channels": module.latent_channels,
  }


def run(arguments: argparse.Namespace) -> bool:
  """Encodes this process' shards that are not finished, or verifies a cache.

  Args:
    arguments: see drift_jax.tools.cache_latents.

  Returns:
    Whether the cache is complete: False while other processes' shards are
    missing.

  Raises:
    LatentCacheError: settings that no cache can have or that differ from the
      cache's; a full disk; a damaged cache that is verified.
    ArtifactError: no autoencoder in `vae`.
    DataError: a torch file that holds something else.
    CorruptImageError: more images than allowed can't be decoded.
    DeviceError, OSError: no device; an image can't be read.
  """
  if arguments.verify:
    latent_format.verify(arguments.out, arguments.split)
    return True
  # 1. What is given: devices first, before anything is read.
  find_devices()
  storage.check_local(f"--out={arguments.out}", arguments.out)
  index, count = arguments.process_index, arguments.process_count
  if index is None:
    index, count = jax.process_index(), jax.process_count()
  source = open_images(arguments)
  is_drawn = isinstance(source, tuple(_DRAWN.values()))
  opened = None if isinstance(source, ArrayLatents) else _open_vae(arguments)
  # 2. What the cache is made from, and which shards are to be written.
  settings = Settings(
    source=described(arguments.source, arguments.exif),
    split=arguments.split,
    num_images=len(source),
    labels_sha256=labels_sha256(source.labels),
    class_names=tuple(source.class_names),
    **_space(arguments, source, opened),
    dtype=latent_format.DRAWN_DTYPE if is_drawn else arguments.dtype,
    compute_dtype="" if is_drawn else arguments.compute_dtype,
    images_per_shard=arguments.images_per_shard,
  )
  folder = latent_writer.prepare(arguments.out, settings)
  todo = _unfinished(folder, settings, range(index, settings.num_shards, count))
  latent_writer.require_space(folder, settings, todo)
  # 3. The shards, then the manifest.
  if todo:
    mesh = sharding.make_mesh(devices=find_devices(local=True))
    batch_size = -(-arguments.batch_size // mesh.size) * mesh.size
    pool = concurrent.futures.ThreadPoolExecutor(arguments.num_threads)
    try:
      if isinstance(source, DrawnLatents | ArrayLatents):
        read = functools.partial(source.latents, shape=settings.latent_shape)
      else:
        read = functools.partial(_crop, source, settings.image_size)
      moments = read_batches(read, settings, todo, batch_size, pool)
      if not is_drawn and opened is not None:
        vae = opened.artifact
        vae = dataclasses.replace(vae, params=opened.read(vae.params))
        moments = encode_batches(
          moments, vae, batch_size, mesh, arguments.compute_dtype
        )
      total = sum(len(settings.images(shard)) for shard in todo)
      _write(moments, folder, settings, total)
    finally:
      pool.shutdown(cancel_futures=True)
  is_complete = latent_writer.write_manifest(folder, settings, source.labels)
  if is_complete:
    logger.info("%s is complete: %d images.", folder, settings.num_images)
  else:
    logger.info("Done here; other processes' shards of %s are missing.", folder)
  return is_complete
