"""Computes statistics of images: see drift_jax.tools.reference_stats."""

import argparse
import dataclasses
import functools
import hashlib
import os
import pathlib
import shlex
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from drift_jax.data.images import ImageReader
from drift_jax.data.readers import ArrayReader
from drift_jax.data.sources import ArraySource, described, open_source
from drift_jax.metrics.batches import local_batches
from drift_jax.metrics.evaluators import features_of
from drift_jax.metrics.frechet import (
  FeatureStats,
  FeatureStream,
  frechet_distance,
)
from drift_jax.metrics.images import real_pixels
from drift_jax.metrics.reference import (
  Provenance,
  ReferenceStats,
  load_reference,
  save_reference,
)
from drift_jax.metrics.sample_files import open_images as open_image_file
from drift_jax.system import console, options, processes, sharding, storage
from drift_jax.system.console import logger
from drift_jax.system.devices import find_devices
from drift_jax.system.errors import UserError
from drift_jax.tasks.generator.judges import (
  is_published,
  load_judge,
  name_of,
  network_fn,
)
from drift_jax.training import artifacts
from drift_jax.training.conversions import weight_files
from drift_jax.training.run import pad_to_mesh

# How the public files' images were cut, and of which split they are.
PUBLIC_CROP, PUBLIC_SPLIT = "center", "train"


class StatsError(UserError, ValueError):
  """Statistics that can't be computed as asked for; the message says why."""


@dataclasses.dataclass(frozen=True)
class Images:
  """Real images.

  Attributes:
    pixels: indices [n] -> uint8 [n, size, size, 3].
    count: N.
    size: their side.
    facts: source, split and crop; see reference.Provenance.
  """

  pixels: Callable[[np.ndarray], np.ndarray]
  count: int
  size: int
  facts: dict[str, str]


class Network:
  """An evaluation network on this process' devices.

  Each process works by itself until statistics are merged: none waits for
  another one's images.

  Attributes:
    artifact: the network.
    path: where it was loaded from.
  """

  def __init__(self, path: str):
    """Loads it.

    Raises:
      ArtifactError: there is none.
    """
    self._mesh = sharding.make_mesh(devices=find_devices(local=True))
    try:
      self.artifact = load_judge(path, self._mesh)
    except artifacts.ArtifactError as error:
      if path.startswith(storage.HUB) or artifacts.exists(path):
        raise
      raise artifacts.ArtifactError(
        f"no exported model in {path}, which is --network: python -m "
        "drift_jax.tools.convert_weights inception "
        f"--out={shlex.quote(path)} makes the Inception-v3 of FID"
      ) from error
    self.path = path
    self._outputs = network_fn(self.artifact, self._mesh)

  def _features(self, pixels: Any) -> jax.Array:
    return self._outputs(pixels)[0]

  def dimensions(self, size: int) -> int:
    """Number of features of an image of this size."""
    shape = (self._mesh.size, size, size, 3)
    pixels = jax.ShapeDtypeStruct(shape, np.uint8)
    return jax.eval_shape(self._features, pixels).shape[1]

  def features(
    self, images: Images, indices: np.ndarray, batch_size: int
  ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Features of images, batch by batch.

    Args:
      images: of one size.
      indices: [n], of all processes.
      batch_size: of this process; rounded up to a multiple of its devices.

    Yields:
      (indices [b], features [b, D] float32) of this process' part.

    Raises:
      StatsError: features that are not finite.
      DataError, OSError: images that can't be read.
    """
    sharing = jax.process_count()
    batch_size = min(batch_size, -(-len(indices) // sharing))
    total = sharing * pad_to_mesh(batch_size, self._mesh)
    parts = [
      indices[numbers[:valid]]
      for numbers, valid in local_batches(len(indices), total)
    ]
    rows = features_of(self._features, images.pixels, indices, batch_size=total)
    progress = console.Progress("Features", sum(map(len, parts)))
    for numbers, features in zip(parts, rows, strict=True):
      bad = ~np.isfinite(features).all(axis=1)
      if bad.any():
        raise StatsError(
          f"--network={self.path}: the features of image {numbers[bad][0]} of "
          f"{images.facts['source']} are not finite"
        )
      yield numbers, features.astype(np.float32)
      progress.update(len(numbers))
    logger.info("%.4g images/s.", progress.close())


def statistics(
  images: Images,
  network: Network,
  *,
  num_features: int = options.NUM_FEATURES,
  batch_size: int = 64,
  seed: int = 0,
  public: ReferenceStats | None = None,
) -> ReferenceStats:
  """Mean and covariance of all images' features, and some single ones.

  Each image is read once, by one of the processes; all return the same.

  Args:
    images: at least two.
    network: whose features.
    num_features: single images whose features are kept, in the order of the
      images, drawn without replacement; all if there are fewer.
    batch_size: images on all devices of a process.
    seed: of the draw.
    public: mean and covariance that are there; only features of single images
      are computed then.

  Raises:
    StatsError: fewer than two images, processes that see different ones, or
      features that are not finite.
    DataError, OSError: images that can't be read.
  """
  # 1. Which images are looked at
  provenance = Provenance(
    **images.facts,
    resolution=images.size,
    network=name_of(network.artifact),
    network_sha256=network.artifact.sha256,
  )
  _check_same(provenance, images.count)
  kept = _drawn(images, num_features, seed)
  dimensions = network.dimensions(images.size)
  if public is None and images.count <= dimensions:
    logger.warning(
      "%d images, but %d are needed for a covariance of full rank: it will be "
      "singular.",
      images.count,
      dimensions + 1,
    )
  looked_at = np.arange(images.count) if public is None else kept
  # 2. Their features
  stream = FeatureStream()
  singles = [(np.empty(0, np.int64), np.empty((0, dimensions), np.float32))]
  batches = network.features(images, looked_at, batch_size)
  for numbers, features in batches if len(looked_at) else ():
    stream.update(features)
    chosen = np.isin(numbers, kept)
    singles.append((numbers[chosen], features[chosen]))
  # 3. Those of all processes, in the order of the images
  numbers, features = (
    np.concatenate(processes.gather(np.concatenate(part)))
    for part in zip(*singles, strict=True)
  )
  features = features[np.argsort(numbers)] if len(kept) else None
  if public is None:
    return ReferenceStats.from_stats(stream.result(), provenance, features)
  if features is not None and len(features) > dimensions:
    logger.info(
      "The features of the %d images are at a Frechet distance of %.4g from "
      "the mean and covariance.",
      len(features),
      frechet_distance(FeatureStats.from_features(features), public),
    )
  return dataclasses.replace(public, provenance=provenance, features=features)


def open_public(
  path: str, network: Network, singles: str | None
) -> tuple[Images, ReferenceStats]:
  """Single images, and the mean and covariance in a published file.

  Args:
    path: .npz with mu and sigma, or a file of this program with `singles`.
    network: the published Inception-v3, which public files are of.
    singles: .npz of arr_0 [N, size, size, 3] or a folder of such images; None
      for those in the file.

  Raises:
    StatsError: another network, or a file that is not as above.
    OSError: a file that can't be read.
  """
  # 1. Mean and covariance.
  place = f"--public={path}"
  try:
    public = load_reference(path)
  except ValueError as error:
    raise StatsError(f"--public: {error}") from error
  if public.provenance is None and not is_published(network.artifact):
    raise StatsError(
      f"{place} is of the published Inception-v3, which --network="
      f"{network.path} is not: python -m drift_jax.tools.convert_weights "
      "inception writes it"
    )
  if public.provenance is not None and not singles:
    raise StatsError(
      f"{place} records already what it was computed from: use it as it is, or "
      "give other single images by --images"
    )
  # 2. The images.
  try:
    images = open_image_file(singles or path)
  except ValueError as error:
    raise StatsError(
      f"--images: {error}"
      if singles
      else f"--public: {error}. Without single images there is nothing to add "
      "(--images names others): the file can be used as it is for FID"
    ) from error
  # 3. That they belong together.
  facts = {"source": _named(path), "split": PUBLIC_SPLIT, "crop": PUBLIC_CROP}
  if public.provenance is not None:
    facts = {key: getattr(public.provenance, key) for key in facts}
    try:
      load_reference(
        path,
        resolution=images.shape[0],
        network_sha256=network.artifact.sha256,
      )
    except ValueError as error:
      raise StatsError(f"--public with --images: {error}") from error
  dimensions = network.dimensions(images.shape[0])
  if dimensions != len(public.mean):
    raise StatsError(
      f"{place} is of features of {len(public.mean)} dimensions, "
      f"--network={network.path} has {dimensions}"
    )
  if singles:
    facts["source"] += f"; single images of {_named(singles)}"
  return Images(images.pixels, len(images), images.shape[0], facts), public


def _named(path: str) -> str:
  """Name of a file, and its checksum; that of a folder alone."""
  file = pathlib.Path(path)
  if file.is_dir():
    return str(file)
  return f"{file.name}, SHA-256 {weight_files.sha256_of(file)}"


def open_images(
  spec: str,
  *,
  split: str = "train",
  image_size: int = 256,
  crop: str = "center",
  channels: int = 3,
  data_dir: str = "",
  class_order: str = "",
  max_corrupt: int = 0,
  exif: bool = False,
  num_threads: int | None = None,
) -> Images:
  """The images that the command line names, none of them read.

  Args:
    spec, split, data_dir, class_order, max_corrupt, exif: see
      `data.open_source`.
    image_size, crop, channels: see `data.ImageReader`; grey images become
      three equal channels for the network.
    num_threads: that decode; None for one for each core.

  Raises:
    StatsError: no such source, or images that the other arguments do not fit.
  """
  name = described(spec, exif)
  try:
    source = open_source(
      spec,
      split=split,
      data_dir=data_dir,
      class_order=class_order,
      max_corrupt=max_corrupt,
      decoder="pillow",
      exif=exif,
    )
    if isinstance(source, ArraySource):
      pixels = _array_pixels(source, image_size, crop, channels)
    else:
      reader = ImageReader(
        source,
        size=image_size,
        channels=channels,
        crop=crop,
        crop_scale=(1.0, 1.0),
        flip=False,
        wire="uint8",
        num_threads=num_threads or os.cpu_count() or 1,
      )
      pixels = functools.partial(_rgb, reader)
      name += ", grey" * (channels == 1)
  except ValueError as error:
    raise StatsError(f"--source={spec} --split={split}: {error}") from error
  facts = {"source": name, "split": split, "crop": crop}
  return Images(pixels, len(source), image_size, facts)


def _rgb(reader: ImageReader, indices: np.ndarray) -> np.ndarray:
  """uint8 [n, size, size, 3]."""
  pixels = reader.pixels(indices)
  return pixels.repeat(3 // pixels.shape[-1], axis=-1)


def _array_pixels(
  source: ArraySource, image_size: int, crop: str, channels: int
) -> Callable[[np.ndarray], np.ndarray]:
  height, width, depth = source.sample_shape
  if (height, width, depth, crop) != (image_size, image_size, channels, "none"):
    raise StatsError(
      f"these images are {height} x {width} px and are not cut: give "
      f"--image_size={height} --channels={depth} --crop=none"
    )
  reader = ArrayReader(source, wire="float32")
  return lambda indices: real_pixels(reader.fixed(indices))


def _drawn(images: Images, count: int, seed: int) -> np.ndarray:
  """Indices, ascending, of the images whose features are kept.

  Raises:
    StatsError: fewer than two images.
  """
  if images.count < 2:
    raise StatsError(
      f"{images.facts['source']} has {images.count} images of split "
      f"{images.facts['split']!r}: statistics need at least 2"
    )
  if count > images.count:
    logger.info(
      "%d single images were asked for; the features of all %d are kept.",
      count,
      images.count,
    )
    count = images.count
  drawn = np.random.default_rng(seed).choice(images.count, count, replace=False)
  return np.sort(drawn)


def _check_same(provenance: Provenance, count: int) -> None:
  """Raises StatsError where processes see other images or networks."""
  digest = hashlib.sha256(f"{provenance} {count}".encode()).digest()
  digests = processes.gather(np.frombuffer(digest, np.uint8)[None])
  for process, other in enumerate(digests):
    if not np.array_equal(other, digests[0]):
      raise StatsError(
        f"process {process} has other images or another network than process "
        f"0; this one has {count} images of {provenance}"
      )


def run(arguments: argparse.Namespace, of_source: Mapping[str, Any]) -> None:
  """Computes and writes what the command line asks for, with all processes.

  Args:
    arguments: of the command line.
    of_source: those of `open_images` among them.

  Raises:
    StatsError, DataError, ArtifactError, OSError: see `statistics`.
  """
  out = pathlib.Path(arguments.out)
  if out.is_dir():
    raise StatsError(f"--out={out} is a folder, want the name of a file")
  if arguments.source is not None:
    images, public = open_images(arguments.source, **of_source), None
    network = Network(arguments.network)
  else:
    network = Network(arguments.network)
    images, public = open_public(arguments.public, network, arguments.images)
  if processes.is_first():  # before the work is done, not after it
    out.parent.mkdir(parents=True, exist_ok=True)
  reference = statistics(
    images,
    network,
    num_features=arguments.num_features,
    batch_size=arguments.batch_size,
    seed=arguments.seed,
    public=public,
  )
  if processes.is_first():
    save_reference(out, reference)
  logger.info(
    "Wrote %s: %s images, features of %d single ones, %s.",
    out,
    "?" if reference.count is None else reference.count,
    0 if reference.features is None else len(reference.features),
    reference.provenance,
  )
