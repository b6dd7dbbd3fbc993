"""Encodes a data set: see drift_jax.tools.cache_latents."""

import argparse
import collections
import concurrent.futures
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from drift_jax.data import (
  latent_format,
  latent_writer,
  order,
  sources,
  transforms,
)
from drift_jax.data.latent_format import (
  LatentCacheError,
  Manifest,
  Settings,
  Shard,
)
from drift_jax.system import console, options, sharding, storage
from drift_jax.system.console import logger
from drift_jax.system.devices import find_devices
from drift_jax.training import artifacts

# Batches decoded ahead of the device, and batches that the device works on.
_DECODED_AHEAD = 3
_IN_FLIGHT = 2

Encoder = Callable[[np.ndarray], jax.Array]


class Piece(NamedTuple):
  """A batch of one shard.

  Attributes:
    shard: its number.
    indices: in the source.
    values: [b, ...] of these images: pixels, later moments.
  """

  shard: int
  indices: range
  values: Any


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
  return moments.astype(jnp.float32).reshape(
    *both.shape[:2], *moments.shape[1:]
  )


def make_encoder(
  vae: artifacts.Artifact, mesh: jax.sharding.Mesh, compute_dtype: str
) -> Encoder:
  """`moments_of` a host batch, which is split over the devices of the mesh.

  Returns:
    uint8 [B, H, W, 3] -> float32 [B, 2, h, w, 2 c], still being computed. B is
    a multiple of the number of devices.
  """
  params = jax.device_put(vae.params, sharding.replicated(mesh))
  # Matrix units would otherwise round the factors of float32 products.
  precision = "highest" if compute_dtype == "float32" else "default"

  def encode(pixels: np.ndarray) -> jax.Array:
    batch = sharding.put_batch(pixels, mesh)
    return moments_of(params, batch, module=vae.module, precision=precision)

  return encode


def decode_batches(
  source: sources.Source,
  settings: Settings,
  shards: Sequence[int],
  *,
  batch_size: int,
  pool: concurrent.futures.Executor,
) -> Iterator[Piece]:
  """Batches of centre crops, uint8 [b, size, size, 3], in order.

  The pool works ahead while the caller does something else.
  """

  def load(index: int) -> np.ndarray:
    image = sources.image_of(source, index)
    return np.asarray(transforms.center_crop(image, settings.image_size))

  pending: collections.deque[tuple[int, range, list[Any]]] = collections.deque()
  for shard in shards:
    images = settings.images(shard)
    for start in range(0, len(images), batch_size):
      indices = images[start : start + batch_size]
      pending.append((shard, indices, [pool.submit(load, i) for i in indices]))
      if len(pending) > _DECODED_AHEAD:
        yield _collect(*pending.popleft())
  while pending:
    yield _collect(*pending.popleft())


def _collect(shard: int, indices: range, futures: Sequence[Any]) -> Piece:
  images = np.stack([future.result() for future in futures])
  return Piece(shard, indices, images)


def encode_batches(
  pieces: Iterable[Piece], encode: Encoder, batch_size: int
) -> Iterator[Piece]:
  """Moments [b, 2, h, w, 2 c] float32 of batches of pixels, in order.

  Every batch is filled up to `batch_size`: one program is compiled. The device
  has the next batch before the last one's result is fetched.
  """
  running: collections.deque[Piece] = collections.deque()
  for piece in pieces:
    fill = [(0, batch_size - len(piece.indices))] + [(0, 0)] * 3
    running.append(piece._replace(values=encode(np.pad(piece.values, fill))))
    if len(running) >= _IN_FLIGHT:
      yield _fetch(running.popleft())
  while running:
    yield _fetch(running.popleft())


def _fetch(piece: Piece) -> Piece:
  moments = np.asarray(jax.device_get(piece.values))
  return piece._replace(values=moments[: len(piece.indices)])


def cache_latents(
  source: sources.Source,
  *,
  name: str,
  split: str,
  vae: str,
  out: str,
  image_size: int = 256,
  batch_size: int = 64,
  images_per_shard: int = 4096,
  dtype: str = "float16",
  compute_dtype: str = "float32",
  num_threads: int | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> Manifest | None:
  """Encodes this process' shards that are not finished.

  Args:
    source: of the images.
    name: of the source, recorded in the cache.
    split: of the source.
    vae: folder of the exported autoencoder.
    out: folder of the cache.
    image_size: of the centre crop, in pixels.
    batch_size: images on all devices of this process; rounded up to a multiple
      of the number of devices.
    images_per_shard: the last shard may have fewer.
    dtype: of the stored moments, 'float16' or 'bfloat16'.
    compute_dtype: of the encoder, 'float32' or 'bfloat16'.
    num_threads: that decode; None for a few more than there are cores.
    process_index: of this process: it takes shards p, p + P, ...
    process_count: P.

  Returns:
    The manifest, None while other processes' shards are missing.

  Raises:
    LatentCacheError: settings that no cache can have or that differ from the
      cache's; a full disk.
    ArtifactError: no autoencoder in `vae`.
    CorruptImageError: more images than allowed can't be decoded.
    OSError: an image can't be read.
  """
  if compute_dtype not in options.DTYPES:
    raise LatentCacheError(
      f"compute_dtype={compute_dtype!r}: valid options are "
      f"{list(options.DTYPES)}"
    )
  for what, value in (("batch_size", batch_size), ("num_threads", num_threads)):
    if value is not None and value < 1:
      raise LatentCacheError(f"{what}={value} must be at least 1")
  if not 0 <= process_index < process_count:
    raise LatentCacheError(
      f"process_index={process_index} must lie in [0, process_count), "
      f"process_count={process_count}"
    )
  autoencoder = artifacts.load(vae, dtype=compute_dtype)
  if autoencoder.kind != "vae":
    raise LatentCacheError(
      f"{vae} holds a model of kind {autoencoder.kind!r}, want 'vae': make one "
      "with python -m drift_jax.tools.convert_weights vae"
    )
  module: Any = autoencoder.module
  settings = Settings(
    source=name,
    split=split,
    num_images=len(source),
    labels_sha256=latent_format.labels_sha256(source.labels),
    class_names=tuple(source.class_names),
    image_size=image_size,
    vae_sha256=autoencoder.sha256,
    scaling_factor=float(module.scaling_factor),
    downsampling=module.downsampling,
    latent_channels=module.latent_channels,
    dtype=dtype,
    compute_dtype=compute_dtype,
    images_per_shard=images_per_shard,
  )
  folder = latent_writer.prepare(out, settings)
  todo = _unfinished(
    folder, settings, range(process_index, settings.num_shards, process_count)
  )
  latent_writer.require_space(folder, settings, todo)
  if todo:
    mesh = sharding.make_mesh(devices=find_devices(local=True))
    batch_size = -(-batch_size // mesh.size) * mesh.size
    encode = make_encoder(autoencoder, mesh, compute_dtype)
    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
      try:
        pieces = decode_batches(
          source, settings, todo, batch_size=batch_size, pool=pool
        )
        _write(
          encode_batches(pieces, encode, batch_size), folder, settings, todo
        )
      finally:
        pool.shutdown(wait=False, cancel_futures=True)
  manifest = latent_writer.write_manifest(folder, settings, source.labels)
  if manifest is None:
    logger.info("Done here; other processes' shards of %s are missing.", folder)
  else:
    logger.info("%s is complete: %d images.", folder, settings.num_images)
  return manifest


def _unfinished(
  folder: pathlib.Path, settings: Settings, shards: Sequence[int]
) -> list[int]:
  """The shards to write; those that are there are read and compared."""
  total = sum(len(settings.images(shard)) for shard in shards)
  progress = console.Progress("Checking", total)
  todo = []
  for shard in shards:
    done = latent_format.finished_shard(folder, settings, shard, checksum=True)
    if done is None:
      todo.append(shard)
    progress.update(len(settings.images(shard)))
  progress.close()
  if len(todo) < len(shards):
    finished = len(shards) - len(todo)
    logger.info("%d of %d shards are finished.", finished, len(shards))
  return todo


def _write(
  pieces: Iterable[Piece],
  folder: pathlib.Path,
  settings: Settings,
  shards: Sequence[int],
) -> None:
  """Writes the shards; each is completed while the next is computed."""
  total = sum(len(settings.images(shard)) for shard in shards)
  progress = console.Progress("Encoding", total)
  finishing: concurrent.futures.Future[Shard] | None = None
  with concurrent.futures.ThreadPoolExecutor(1) as background:
    for shard, group in itertools.groupby(pieces, lambda piece: piece.shard):
      with latent_writer.ShardWriter(folder, settings, shard) as writer:
        for piece in group:
          for index, moments in zip(piece.indices, piece.values, strict=True):
            writer.add(index, moments)
          progress.update(len(piece.indices))
        if finishing is not None:
          finishing.result()
        finishing = background.submit(writer.finish)
    if finishing is not None:
      finishing.result()
  logger.info("Encoded %d images at %.4g images/s.", total, progress.close())


def open_images(
  spec: str, *, split: str, data_dir: str, class_order: str, max_corrupt: int
) -> sources.Source:
  """The source of images that the command line names.

  Raises:
    LatentCacheError: no such source, one that does not hold 8-bit RGB, or a
      label without a class name.
  """
  try:
    source = sources.open_source(
      spec,
      split=split,
      data_dir=data_dir,
      class_order=class_order,
      max_corrupt=max_corrupt,
      decoder="pillow",
    )
    order.check_labels(source.labels, source.class_names)
  except ValueError as error:
    raise LatentCacheError(
      f"--source={spec} --split={split}: {error}"
    ) from error
  if isinstance(source, sources.ArraySource):
    raise LatentCacheError(
      f"--source={spec}: these images are no 8-bit RGB, which the autoencoder "
      "takes; valid options are folder:DIR, tar:FILE and tfds:NAME"
    )
  return source


def verify(out: str, split: str) -> Manifest:
  """Reads a whole cache and compares its checksums.

  Raises:
    LatentCacheError: naming every damaged shard.
  """
  _, manifest = latent_format.load_manifest(out, split)
  progress = console.Progress("Verifying", manifest.settings.num_images)
  latent_format.verify(
    out, split, on_shard=lambda shard: progress.update(shard.num_images)
  )
  rate = progress.close()
  logger.info("%s/%s is whole (%.4g images/s).", out, split, rate)
  return manifest


def run(arguments: argparse.Namespace) -> None:
  """Does what the command line asks for.

  Raises:
    DataError, ArtifactError, DeviceError, OSError: see `cache_latents`.
  """
  if arguments.verify:
    verify(arguments.out, arguments.split)
    return
  find_devices()  # A mistake there, before anything is read.
  storage.check_local(f"--out={arguments.out}", arguments.out)
  source = open_images(
    arguments.source,
    split=arguments.split,
    data_dir=arguments.data_dir,
    class_order=arguments.class_order,
    max_corrupt=arguments.max_corrupt,
  )
  index, count = arguments.process_index, arguments.process_count
  cache_latents(
    source,
    name=arguments.source,
    split=arguments.split,
    vae=arguments.vae,
    out=arguments.out,
    image_size=arguments.image_size,
    batch_size=arguments.batch_size,
    images_per_shard=arguments.images_per_shard,
    dtype=arguments.dtype,
    compute_dtype=arguments.compute_dtype,
    num_threads=arguments.num_threads,
    process_index=jax.process_index() if index is None else index,
    process_count=jax.process_count() if count is None else count,
  )
