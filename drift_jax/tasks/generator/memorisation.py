"""Nearest training images of generated ones (B.4): does a run memorise?"""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from drift_jax.data.readers import Reader
from drift_jax.metrics.batches import PixelsFn, local_batches
from drift_jax.metrics.evaluators import FeatureFn, features_of
from drift_jax.metrics.generation import SampleFn, generate
from drift_jax.metrics.images import Images, real_pixels
from drift_jax.metrics.neighbours import (
  Neighbours,
  distance_summary,
  nearest_neighbours,
  neighbour_grid,
)
from drift_jax.system import processes, sharding
from drift_jax.system.devices import check_fits
from drift_jax.tasks.generator import judges
from drift_jax.tasks.generator.samplers import gathered
from drift_jax.training import artifacts
from drift_jax.training.inputs import Readers

# Rows of the picture: the samples nearest to the training set, then others.
NEAREST_ROWS, OTHER_ROWS = 5, 5
# Numbers in the training images' features that are compared at a time.
_BLOCK_ENTRIES = 2**23


class Space(NamedTuple):
  """A feature space in which distances are taken.

  Attributes:
    name: label of axes and reports.
    of_samples: samples on the mesh -> features [B, D] on the mesh.
    of_reals: this process' part of a batch of reals, on the host -> the same.
  """

  name: str
  of_samples: FeatureFn
  of_reals: FeatureFn


def feature_space(
  name: str,
  encoders: Mapping[str, artifacts.Artifact],
  vae: artifacts.Artifact | None,
  to_pixels: PixelsFn,
  mesh: Mesh,
  decoded: Collection[str] = (),
) -> Space:
  """Makes the space that --neighbour_space names.

  Args:
    name: 'encoder': pooled features of the run's autoencoder; 'pixel': the
      samples themselves; else the folder of a converted network, e.g. CLIP's,
      whose features are scaled to unit length (cosine similarity) unless it is
      an Inception.
    encoders: of the run.
    vae: decodes the samples, or None.
    to_pixels: samples -> 8-bit RGB images.
    mesh: where the network runs.
    decoded: names of the encoders that read decoded samples.

  Raises:
    ArtifactError: a network that can't be loaded.
    ConfigError: no such encoder.
  """
  if name in ("encoder", "pixel"):
    features = (
      judges.encoder_fn(encoders, decoded, vae, mesh)
      if name == "encoder"
      else judges.flatten_fn(mesh)
    )
    return Space(name, features, features)
  artifact = judges.load_judge(name, mesh)
  network = judges.network_fn(artifact, mesh)

  def of_pixels(pixels: Images) -> jax.Array:
    features = network(pixels)[0]
    return features if artifact.kind == "inception" else _unit(features)

  def of_samples(samples: Images) -> jax.Array:
    if isinstance(samples, np.ndarray):
      samples = sharding.put_batch(samples, mesh)
    return of_pixels(to_pixels(samples))

  return Space(
    judges.name_of(artifact),
    of_samples,
    # Latents are decoded like samples; pixels are those of the files.
    of_samples
    if vae is not None
    else lambda images: of_pixels(real_pixels(np.asarray(images))),
  )


@jax.jit
def _unit(features: jax.Array) -> jax.Array:
  return features / jnp.linalg.norm(features, axis=1, keepdims=True)


class Memorisation(NamedTuple):
  """The result of a search among the training images.

  Attributes:
    neighbours: those of the generated samples, then of the held-out images.
    generated: number of generated samples.
    summary: see neighbours.distance_summary.
    picture: uint8 [H, W, 3]: samples, each beside its neighbours.
    shown: numbers of the samples in the picture, from top to bottom.
    space: where distances were taken.
  """

  neighbours: Neighbours
  generated: int
  summary: dict[str, float]
  picture: np.ndarray
  shown: np.ndarray
  space: str

  @property
  def nearest(self) -> tuple[np.ndarray, np.ndarray]:
    """Distance to the nearest, of generated samples and of held-out images."""
    nearest = self.neighbours.distance[:, 0]
    return nearest[: self.generated], nearest[self.generated :]


def check_searchable(readers: Readers, k: int) -> None:
  """Checks before anything is generated that neighbours can be found.

  Raises:
    ConfigError: there are no held-out images.
    ValueError: fewer than k training images.
  """
  readers.test()
  if len(readers.train.labels) < k:
    raise ValueError(
      f"{k} nearest training images are asked for, there are "
      f"{len(readers.train.labels)}"
    )


def check_memorisation(
  sample_fn: SampleFn,
  labels: np.ndarray,
  alpha: float,
  readers: Readers,
  space: Space,
  *,
  k: int,
  batch_size: int,
  decode: Callable[[Images], Images],
  mesh: Mesh,
) -> Memorisation:
  """Searches the whole training set for neighbours of generated samples.

  The search is exact. It covers held-out images too: they show how near an
  image lies that was not trained on.

  Args:
    sample_fn, labels, alpha: see metrics.generation.generate.
    readers: training and held-out images.
    space: where distances are taken.
    k: number of neighbours of each image.
    batch_size: of all processes; a multiple of the mesh's devices.
    decode: samples -> images.
    mesh: where all runs.

  Raises:
    ConfigError: there are no held-out images.
    EvaluationError: features that the memory does not hold.
    ValueError: fewer than k training images.
  """
  train, test = readers.train, readers.test()
  generated = np.concatenate(
    [
      gathered(batch, space.of_samples(batch.samples))
      for batch in generate(sample_fn, labels, alpha, batch_size=batch_size)
    ]
  )
  # These stay in memory, twice while they are joined.
  count, width = len(generated) + len(test), generated.shape[1]
  check_fits(
    8 * count * width,
    f"the neighbours of {len(generated)} generated and {len(test)} held-out "
    f"images need two arrays of {count} x {width} float32 numbers",
    "choose another --neighbour_space, or fewer --neighbour_samples",
  )
  held_out = np.concatenate(list(_features(space, test, batch_size)))
  found = nearest_neighbours(
    np.concatenate([generated, held_out]),
    _blocks(_features(space, train, batch_size)),
    k,
  )
  nearest = found.distance[:, 0]
  count = len(generated)
  shown = _shown(nearest[:count])

  def draw(numbers: np.ndarray) -> Images:
    scales = np.full(len(numbers), alpha, np.float32)
    return sample_fn(labels[numbers], scales, numbers.astype(np.int32))

  def read(numbers: np.ndarray) -> Images:
    return sharding.put_batch(train.fixed(numbers), mesh)

  samples = _collect(lambda n: decode(draw(n)), shown, batch_size)
  originals = _collect(
    lambda n: decode(read(n)), found.index[shown].ravel(), batch_size
  )
  side = samples.shape[1]
  picture = neighbour_grid(
    samples,
    originals.reshape(len(shown), k, *originals.shape[1:]),
    padding=2,
    scale=max(1, 48 // side),
  )
  summary = distance_summary(nearest[:count], nearest[count:])
  return Memorisation(found, count, summary, picture, shown, space.name)


def _collect(
  make: Callable[[np.ndarray], Images], numbers: np.ndarray, batch_size: int
) -> np.ndarray:
  """Makes images of numbers [N], each process its part; float32 of all."""
  parts = []
  for rows, valid in local_batches(len(numbers), batch_size):
    own = sharding.local_rows(make(numbers[rows]))[:valid].astype(np.float32)
    parts.append(np.concatenate(processes.gather(own)))
  return np.concatenate(parts)


def _shown(distance: np.ndarray) -> np.ndarray:
  """Chooses the samples nearest to the training set, then others in turn."""
  nearest = np.argsort(distance, kind="stable")[:NEAREST_ROWS]
  others = np.setdiff1d(np.arange(len(distance)), nearest)
  rows = np.arange(min(OTHER_ROWS, len(others)))
  # Labels come in turn: steps that grow by one show other classes.
  spaced = np.minimum(
    rows * len(others) // max(len(rows), 1) + rows, len(others) - 1
  )
  return np.concatenate([nearest, others[np.unique(spaced)]])


def _features(
  space: Space, reader: Reader, batch_size: int
) -> Iterator[np.ndarray]:
  """Yields features of all of a reader's images, by batch, on every host."""
  for own in features_of(
    space.of_reals, reader.fixed, np.arange(len(reader)), batch_size=batch_size
  ):
    yield np.concatenate(processes.gather(own))


def _blocks(batches: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
  """Joins batches into larger blocks, for larger products of matrices."""
  waiting: list[np.ndarray] = []
  for batch in batches:
    waiting.append(batch)
    if sum(each.size for each in waiting) >= _BLOCK_ENTRIES:
      yield np.concatenate(waiting)
      waiting = []
  if waiting:
    yield np.concatenate(waiting)
