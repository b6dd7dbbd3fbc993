import numpy as np
import pytest

from drift_jax.metrics import memory, small_sets
from drift_jax.metrics.errors import EvaluationError
from drift_jax.metrics.frechet import FeatureStream, check_frechet_width
from tests.metrics.conftest import ImageSet, batch_of


def test_a_container_has_what_it_is_given(tmp_path, monkeypatch):
  machine = memory.machine_memory()
  assert machine > 2**28
  limits = [tmp_path / name for name in ("none", "max", "bytes")]
  limits[1].write_text("max\n")
  limits[2].write_text("123456789\n")
  monkeypatch.setattr(memory, "_LIMITS", limits[:2])
  assert memory.machine_memory() >= machine
  monkeypatch.setattr(memory, "_LIMITS", limits)
  assert memory.machine_memory() == 123456789


def test_a_distance_of_large_pictures_is_refused_anywhere():
  """A matrix of 256 px alone takes 309 GB."""
  check_frechet_width(2048, "fid")
  with pytest.raises(
    EvaluationError, match="fd_pixel.* 196608 x 196608 .*2.47e.03 GB"
  ):
    check_frechet_width(256 * 256 * 3, "fd_pixel")


def test_a_stream_says_so_before_it_allocates(monkeypatch):
  monkeypatch.setattr(memory, "machine_memory", lambda: 10**6)
  stream = FeatureStream()
  stream.update(np.zeros((3, 80)))
  with pytest.raises(EvaluationError, match="100 x 100 .*this machine"):
    FeatureStream().update(np.zeros((3, 100)))


class Unread(ImageSet):
  """Of which one image may be looked at."""

  def fixed(self, indices):
    assert len(indices) == 1
    return super().fixed(indices)


@pytest.mark.parametrize("name", ["coverage", "label_accuracy", "duplicates"])
def test_small_sets_of_large_images_are_refused(monkeypatch, name):
  """Before they are read, and while they are generated."""
  images = np.zeros((40, 8, 8, 3), np.float32)
  labels = np.arange(40, dtype=np.int32) % 2

  def build(reals):
    pair = reals(images, labels), reals(images, labels)
    if name == "coverage":
      return small_sets.CoverageEvaluator(*pair, k=1, labels=labels, seed=0)
    if name == "label_accuracy":
      return small_sets.LabelAccuracyEvaluator(*pair)
    return small_sets.DuplicatesEvaluator(*pair, grid=[0.0, 1.0])

  monkeypatch.setattr(memory, "machine_memory", lambda: 2 * 12 * 40 * 192)
  evaluator = build(ImageSet)
  evaluator.update(batch_of(images, labels))
  with pytest.raises(EvaluationError, match=f"{name}: 80 generated"):
    evaluator.update(batch_of(images, labels, start=40))
  monkeypatch.setattr(memory, "machine_memory", lambda: 2 * 12 * 40 * 191)
  with pytest.raises(
    EvaluationError, match=f"{name}: 40 .* images of 192 values"
  ):
    build(Unread)
