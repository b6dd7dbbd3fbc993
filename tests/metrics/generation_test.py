import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drift_jax.metrics.evaluators import Evaluator
from drift_jax.metrics.generation import (
  balanced_labels,
  evaluate,
  evaluation_scalars,
  generate,
  in_order,
  read_labels,
)

SHAPE = (2, 2, 1)


def encode(labels, alpha, index):
  """Images that say what they were asked for: label, alpha, index, 0."""
  numbers = labels.astype(np.float32), alpha, index.astype(np.float32)
  return jnp.stack([*numbers, 0 * alpha], axis=1).reshape(-1, *SHAPE)


class Recorder:
  """An evaluator that reports how many images it saw, and keeps all."""

  name = "count"

  def __init__(self):
    self.all: list[np.ndarray] = []

  def reset(self):
    self.count = 0

  def update(self, batch):
    assert np.array_equal(batch.images[:, 0, 0, 0], batch.labels)
    assert np.array_equal(batch.images[:, 1, 0, 0], batch.index)
    self.count += len(batch.images)
    self.all.append(batch.images)

  def result(self):
    return {self.name: float(self.count)}

  def baseline(self):
    return {self.name: 0.0}


@pytest.mark.parametrize("batch_size", [1, 4, 12, 13, 50])
def test_generate_exactly_once_in_full_batches(batch_size):
  labels = np.arange(12)[::-1] % 5
  calls = []

  def sample_fn(labels, alpha, index):
    calls.append((labels, alpha, index))
    return encode(labels, alpha, index)

  batches = list(generate(sample_fn, labels, 1.5, batch_size=batch_size))
  for call in calls:
    assert [array.shape for array in call] == [(batch_size,)] * 3
    assert [array.dtype for array in call] == [np.int32, np.float32, np.int32]
    # Padding repeats a valid sample, so that label and index fit.
    assert np.array_equal(labels[call[2]], call[0])
  assert len(calls) == -(-12 // batch_size)
  images = np.concatenate([batch.images for batch in batches])
  assert images.shape == (12, *SHAPE) and images.dtype == np.float32
  assert np.array_equal(images[:, 0, 0, 0], labels)
  assert np.array_equal(images[:, 1, 0, 0], np.arange(12))
  assert (images[:, 0, 1, 0] == 1.5).all()


def test_balanced_labels():
  labels = balanced_labels(12, 4)
  assert labels.dtype == np.int32
  assert labels.tolist() == [0, 1, 2, 3] * 3
  assert in_order(labels, "given") is labels
  by_class = in_order(labels, "class")
  assert by_class.tolist() == np.repeat(range(4), 3).tolist()
  assert by_class.dtype == np.int32
  for count, valid in ((10, "8 and 12$"), (3, "are 4$"), (0, "are 4$")):
    with pytest.raises(ValueError, match=f"num_samples={count}.*{valid}"):
      balanced_labels(count, 4)


def test_labels_from_a_file(tmp_path):
  wanted = np.asarray([3, 0, 3, 1])
  (tmp_path / "a.txt").write_text("3\n0\n3\n1\n")
  np.save(tmp_path / "a.npy", wanted)
  for name in ("a.txt", "a.npy"):
    for count in (None, 4):
      labels = read_labels(tmp_path / name, num_classes=4, count=count)
      assert labels.tolist() == wanted.tolist() and labels.dtype == np.int32
    with pytest.raises(ValueError, match="lists 4 labels, but num_samples=5"):
      read_labels(tmp_path / name, num_classes=4, count=5)
    with pytest.raises(ValueError, match=r"entry 0 is 3, labels lie in \[0, 3"):
      read_labels(tmp_path / name, num_classes=3, count=None)
  (tmp_path / "one.txt").write_text("2")
  labels = read_labels(tmp_path / "one.txt", num_classes=4, count=1)
  assert labels.tolist() == [2]
  (tmp_path / "words.txt").write_text("cat\n")
  (tmp_path / "empty.txt").touch()
  np.save(tmp_path / "floats.npy", wanted / 2)
  np.save(tmp_path / "square.npy", wanted.reshape(2, 2))
  whole = (tmp_path / "a.npy").read_bytes()
  (tmp_path / "cut.npy").write_bytes(whole[:-3])
  names = "words.txt", "empty.txt", "floats.npy", "square.npy", "cut.npy"
  for name in names:
    with pytest.raises(ValueError, match=name):
      read_labels(tmp_path / name, num_classes=4, count=None)
  with pytest.raises(FileNotFoundError):
    read_labels(tmp_path / "none.txt", num_classes=4, count=None)


def test_evaluate_hands_each_image_to_all_once_per_alpha():
  traces = []

  @jax.jit
  def sample_fn(labels, alpha, index):
    traces.append(labels.shape)
    return encode(labels, alpha, index).astype(jnp.bfloat16)

  recorders = [Recorder(), Recorder()]
  assert isinstance(recorders[0], Evaluator)
  results = evaluate(recorders, sample_fn, balanced_labels(9, 3), [2.0, 1.0], 4)
  assert results == {2.0: {"count": 9.0}, 1.0: {"count": 9.0}}
  assert list(results) == [2.0, 1.0] and traces == [(4,)]
  for recorder in recorders:
    seen = np.concatenate(recorder.all)
    assert seen.dtype == np.float32
    assert seen[:, 0, 1, 0].tolist() == [2.0] * 9 + [1.0] * 9
    assert seen[:, 1, 0, 0].tolist() == [*range(9)] * 2


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_image_names_alpha_and_index(value):
  def sample_fn(labels, alpha, index):
    images = encode(labels, alpha, index)
    broken = (index == 6) & (alpha == 2.0)
    return jnp.where(broken[:, None, None, None], value, images)

  labels = balanced_labels(9, 3)
  evaluate([Recorder()], sample_fn, labels, [1.0], 4)
  with pytest.raises(ValueError, match=r"sample 6 \(label 0, alpha 2.0\)"):
    evaluate([Recorder()], sample_fn, labels, [1.0, 2.0], 4)


def test_bad_arguments():
  labels = balanced_labels(4, 2)
  with pytest.raises(ValueError, match="alphas repeat"):
    evaluate([Recorder()], encode, labels, [1.0, 1.0], 4)
  with pytest.raises(ValueError, match="batch_size"):
    list(generate(encode, labels, 1.0, batch_size=0))


def test_evaluation_scalars():
  scalars = evaluation_scalars(
    {1.0: {"fd_pixel": 2.0, "coverage": 0.5}, 1.5: {"fd_pixel": 3.0}},
    {"fd_pixel": 0.5},
  )
  assert scalars == {
    "eval/fd_pixel/alpha_1.0": 2.0,
    "eval/coverage/alpha_1.0": 0.5,
    "eval/fd_pixel/alpha_1.5": 3.0,
    "eval/fd_pixel/baseline": 0.5,
  }
