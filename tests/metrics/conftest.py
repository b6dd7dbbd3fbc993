"""Real images for the tests of metrics: scikit-learn's digits."""

import contextlib
import dataclasses
import resource

import numpy as np
import pytest
from matplotlib.figure import Figure
from sklearn import datasets
from sklearn.neighbors import NearestNeighbors

from drift_jax.metrics import distances
from drift_jax.metrics.batches import Batch
from drift_jax.metrics.frechet import FeatureStats
from drift_jax.metrics.images import to_rgb
from drift_jax.metrics.reference import Provenance

GRID = np.linspace(-1.0, 1.0, 17)


@dataclasses.dataclass(frozen=True)
class ImageSet:
  """Images in memory, as evaluators.Reals."""

  images: np.ndarray
  labels: np.ndarray

  def fixed(self, indices: np.ndarray) -> np.ndarray:
    return self.images[indices]


@dataclasses.dataclass(frozen=True)
class Digits:
  """1797 images [N, 8, 8, 1] in [-1, 1]; 54 of each class are held out."""

  train_images: np.ndarray
  train_labels: np.ndarray
  test_images: np.ndarray
  test_labels: np.ndarray

  @property
  def reals(self):
    return (
      ImageSet(self.train_images, self.train_labels),
      ImageSet(self.test_images, self.test_labels),
    )


@pytest.fixture(scope="session")
def digits() -> Digits:
  bunch = datasets.load_digits()
  images = (bunch.images / 8.0 - 1.0).astype(np.float32)[..., None]
  labels = bunch.target.astype(np.int32)
  order = np.random.default_rng(0).permutation(len(labels))
  heldout = np.concatenate(
    [order[labels[order] == label][:54] for label in range(10)]
  )
  train = np.setdiff1d(np.arange(len(labels)), heldout)
  return Digits(images[train], labels[train], images[heldout], labels[heldout])


def labels_of(per_class: int) -> np.ndarray:
  """Labels of as many digits of each class."""
  return np.arange(10 * per_class, dtype=np.int32) % 10


def batch_of(images, labels, start=0, padding=0):
  """A batch of samples numbered from `start`; `padding` rows don't count."""
  index = np.arange(start, start + len(labels), dtype=np.int32)
  filled = np.concatenate([images, *[images[-1:]] * padding])
  return Batch(filled, index, np.asarray(labels), to_rgb)


def feed(evaluator, images, labels, start=0):
  """Hands an evaluator one batch."""
  evaluator.update(batch_of(images, labels, start))


PROVENANCE = Provenance(
  source="imagenet2012",
  split="train",
  crop="adm",
  resolution=256,
  network="inception-v3-2015 pool3",
  network_sha256="0123456789abcdef" * 4,
)


def random_features(seed: int, count: int, dimensions: int) -> np.ndarray:
  random = np.random.default_rng(seed)
  mixing = random.normal(size=(dimensions, dimensions))
  return random.normal(size=(count, dimensions)) @ mixing + random.normal()


def stats(seed: int, count: int = 60, dimensions: int = 6) -> FeatureStats:
  return FeatureStats.from_features(random_features(seed, count, dimensions))


def points(seed: int, count: int, dimensions: int = 5) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=(count, dimensions))


def radii_of(points: np.ndarray, k: int) -> np.ndarray:
  """Distances [N] to the k-th other point, by scikit-learn's tree search."""
  search = NearestNeighbors(algorithm="kd_tree").fit(points)
  # With no query, a point is not its own neighbour, but its copies are.
  return search.kneighbors(n_neighbors=k)[0][:, -1]


@pytest.fixture
def block(request, monkeypatch) -> None:
  """Sets the numbers in a block of distances."""
  monkeypatch.setattr(distances, "BLOCK_ENTRIES", request.param)


@contextlib.contextmanager
def full_disk(most: int):
  """A file can have so many bytes."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def figures(monkeypatch):
  """Figures that were saved, in order."""
  saved = []
  save = Figure.savefig

  def keep(figure, *args, **kwargs):
    saved.append(figure)
    save(figure, *args, **kwargs)

  monkeypatch.setattr(Figure, "savefig", keep)
  return saved
