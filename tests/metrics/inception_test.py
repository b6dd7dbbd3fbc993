import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from drift_jax.metrics import inception
from drift_jax.metrics.inception import InceptionScore, inception_score


def logits(seed: int, count: int, classes: int, peak: float = 3.0):
  random = np.random.default_rng(seed)
  return (peak * random.normal(size=(count, classes))).astype(np.float32)


@pytest.mark.parametrize("case", ["splits10", "splits1", "splits5_peaked"])
def test_golden(golden, case):
  arrays = golden("metrics")
  splits = int(arrays[f"is/{case}/splits"])
  mean, deviation = inception_score(arrays[f"is/{case}/logits"], splits)
  # The golden probabilities are float32.
  assert mean == pytest.approx(float(arrays[f"is/{case}/mean"]), rel=3e-8)
  expected = float(arrays[f"is/{case}/std"])
  assert deviation == pytest.approx(expected, rel=3e-7)


@pytest.mark.parametrize("shuffle", [True, False])
def test_oracle(shuffle):
  values = logits(0, 47, 9)
  values -= 40.0  # which the softmax does not see
  probability = np.exp(values.astype(np.float64))
  probability /= probability.sum(axis=1, keepdims=True)
  if shuffle:
    probability = probability[np.random.RandomState(2020).permutation(47)]
  scores = [
    np.exp(np.mean([stats.entropy(row, part.mean(axis=0)) for row in part]))
    for part in np.split(probability[:45], 5)
  ]
  score = InceptionScore(47, 9, 5, shuffle)
  score.update(values, np.arange(47))
  mean, deviation = score.result()
  assert shuffle == (mean == inception_score(values, 5)[0])
  assert mean == pytest.approx(np.mean(scores), rel=1e-13)
  assert deviation == pytest.approx(np.std(scores), rel=1e-11)


@pytest.mark.parametrize("seed", [1, 2])
def test_batches_and_their_order_do_not_matter(monkeypatch, seed):
  monkeypatch.setattr(inception, "_ROWS", 16)
  values = logits(1, 103, 7)
  expected = inception_score(values, 4)
  random = np.random.default_rng(seed)
  order = random.permutation(103)
  score = InceptionScore(103, 7, 4)
  for part in np.split(order, np.sort(random.integers(1, 103, 6))):
    with pytest.raises(ValueError, match="103 samples got only"):
      score.result()
    if len(part):
      score.update(values[part], part)
  assert score.result() == pytest.approx(expected, rel=1e-13)


def test_ends_of_the_scale():
  # Certain of one class each, all classes equally often: C.
  certain = np.tile(1e4 * np.eye(8, dtype=np.float32), (5, 1))
  assert inception_score(certain, 1)[0] == pytest.approx(8.0, rel=1e-13)
  # The same prediction for all, however certain: 1.
  for row in (np.zeros(8), np.arange(8.0), 1e4 * np.eye(8)[0]):
    same = np.tile(row, (40, 1))
    assert inception_score(same, 5) == pytest.approx((1.0, 0.0), abs=1e-13)


def test_bfloat16_logits_are_widened():
  rounded = jnp.asarray(logits(3, 40, 5), jnp.bfloat16)
  wide = np.asarray(rounded).astype(np.float64)
  assert inception_score(np.asarray(rounded), 2) == inception_score(wide, 2)


def test_bad_input():
  values = logits(4, 20, 6)
  for count, classes, splits in ((20, 6, 0), (20, 0, 2), (20, 6, 21)):
    with pytest.raises(ValueError, match=f"splits={splits}, count={count}"):
      InceptionScore(count, classes, splits)
  with pytest.raises(ValueError, match="splits=21"):
    inception_score(values, 21)
  with pytest.raises(ValueError, match="non-empty"):
    inception_score(values[:0], 1)
  broken = values.copy()
  broken[3, 1] = np.inf
  with pytest.raises(ValueError, match="the first is row 3"):
    inception_score(broken, 2)
  score = InceptionScore(20, 6, 2)
  score.update(values, np.arange(20))
  assert score.result() == pytest.approx(inception_score(values, 2), rel=1e-13)
  score.update(values[:1], np.array([7]))
  with pytest.raises(ValueError, match="number 7 came twice"):
    score.result()
