import jax.numpy as jnp
import numpy as np
import pytest

from drift_jax.metrics import network as network_lib
from drift_jax.metrics.batches import Batch
from drift_jax.metrics.coverage import density_coverage
from drift_jax.metrics.evaluators import Evaluator
from drift_jax.metrics.frechet import FeatureStats, frechet_distance
from drift_jax.metrics.inception import inception_score
from drift_jax.metrics.kid import kernel_distance, kernel_distance_subsets
from drift_jax.metrics.network import NetworkEvaluator
from drift_jax.metrics.reference import ReferenceStats
from tests.metrics.conftest import PROVENANCE


def reference(features):
  return ReferenceStats.from_stats(
    FeatureStats.from_features(features),
    PROVENANCE,
    np.asarray(features, np.float32),
  )


def table(*rows):
  """A network that looks up rows by the number that is an image's pixel."""

  def network(pixels):
    number = pixels[:, 0, 0, 0].astype(jnp.int32)
    return tuple(jnp.asarray(values)[number] for values in rows)

  return network


def feed(evaluator, count, size=37):
  """Samples 0 ... count - 1 in batches of one size, the last filled up."""
  for start in range(0, count, size):
    index = np.arange(start, min(start + size, count), dtype=np.int32)
    number = np.minimum(np.arange(start, start + size), count - 1)
    samples = number.astype(np.float32).reshape(-1, 1, 1, 1)
    evaluator.update(Batch(samples, index, np.zeros_like(index), jnp.asarray))


def build(network, figures, real, count):
  return NetworkEvaluator(
    "inception", network, figures, real, count=count, seed=0
  )


def judge(network, figures, real, count):
  """The figures of one evaluation, and again of another after a reset."""
  evaluator = build(network, figures, real, count)
  assert isinstance(evaluator, Evaluator) and evaluator.baseline() == {}
  feed(evaluator, count)
  result = evaluator.result()
  feed(evaluator, count // 2)
  evaluator.reset()
  feed(evaluator, count, size=10)
  assert evaluator.result() == pytest.approx(result, rel=1e-12)
  return result


def cases(arrays, kind):
  return sorted({k.split("/")[1] for k in arrays if k.startswith(f"{kind}/")})


def test_figures_of_the_release(golden):
  arrays = golden("metrics")
  for name in ("shifted", "same", "relu_like"):
    real, fake = (arrays[f"fid/{name}/features_{x}"] for x in ("ref", "gen"))
    fid = pytest.approx(float(arrays[f"fid/{name}/fid"]), rel=1e-6, abs=1e-9)
    result = judge(table(fake), ["fid"], reference(real), len(fake))
    assert result == {"fid": fid}
  tens = [n for n in cases(arrays, "is") if arrays[f"is/{n}/splits"] == 10]
  for name in tens:
    logits = arrays[f"is/{name}/logits"]
    network = table(logits[:, :2], logits)
    result = judge(network, ["inception_score"], None, len(logits))
    mean, spread = (float(arrays[f"is/{name}/{x}"]) for x in ("mean", "std"))
    expected = {"inception_score": mean, "inception_score_std": spread}
    assert result == pytest.approx(expected, rel=1e-6)
  threes = [n for n in cases(arrays, "pr") if arrays[f"pr/{n}/k"] == 3]
  for name in threes:
    real, fake = (arrays[f"pr/{name}/features_{x}"] for x in ("real", "fake"))
    density, coverage = density_coverage(real, fake, 5)
    result = judge(
      table(fake), network_lib.FROM_FEATURES, reference(real), len(fake)
    )
    assert result == {
      "precision": pytest.approx(float(arrays[f"pr/{name}/precision"])),
      "recall": pytest.approx(float(arrays[f"pr/{name}/recall"])),
      "density_inception": density,
      "coverage_inception": coverage,
      "kid": pytest.approx(kernel_distance(real, fake), rel=1e-6),
    }
  assert tens and threes


def test_kid_of_many_is_that_of_subsets(monkeypatch):
  """As papers report it, but for their number: a hundred take long."""
  assert (network_lib.KID_SUBSETS, network_lib.KID_SUBSET_SIZE) == (100, 1000)
  monkeypatch.setattr(network_lib, "KID_SUBSETS", 5)
  random = np.random.default_rng(0)
  real, fake = random.normal(size=(2, 1200, 4)).astype(np.float32)
  evaluator = build(table(fake), ["kid"], reference(real), 1200)
  feed(evaluator, 1200, size=500)
  mean, spread = kernel_distance_subsets(
    real, fake, subsets=5, subset_size=1000, seed=0
  )
  assert evaluator.result() == {"kid": mean, "kid_std": spread}


def test_several_figures_see_each_image_once():
  random = np.random.default_rng(1)
  real, fake = random.normal(size=(2, 60, 3)).astype(np.float32)
  logits = random.normal(size=(60, 7)).astype(np.float32)
  seen = []
  network = table(fake, logits)

  def counted(pixels):
    seen.append(len(pixels))
    return network(pixels)

  figures = ["fd_inception", "fid", "inception_score"]
  evaluator = build(counted, figures, reference(real), 60)
  feed(evaluator, 60, size=25)
  distance = frechet_distance(FeatureStats.from_features(fake), reference(real))
  mean, spread = inception_score(logits, 10)
  assert evaluator.result() == {
    "fd_inception": pytest.approx(distance, rel=1e-12),
    "fid": pytest.approx(distance, rel=1e-12),
    "inception_score": pytest.approx(mean, rel=1e-12),
    "inception_score_std": pytest.approx(spread, rel=1e-9),
  }
  assert seen == [25, 25, 25]


def test_a_truncated_or_repeated_count_is_refused():
  features = np.random.default_rng(2).normal(size=(60, 3)).astype(np.float32)
  evaluator = build(table(features), ["fid"], reference(features), 50)
  feed(evaluator, 49)
  with pytest.raises(ValueError, match="49 samples came, 49 of them different"):
    evaluator.result()
  evaluator.reset()
  feed(evaluator, 50)
  feed(evaluator, 10)
  with pytest.raises(ValueError, match="60 samples came, 50 of them.* 0 to 49"):
    evaluator.result()


def test_what_a_figure_needs():
  features = np.random.default_rng(5).normal(size=(50, 3)).astype(np.float32)
  full = reference(features)
  bare = ReferenceStats(full.mean, full.sigma, None, None)
  build(table(), ["fid"], bare, 5)
  for figure in network_lib.FROM_FEATURES:
    with pytest.raises(ValueError, match=f"'{figure}'.*--num_features=10000"):
      build(table(), [figure], bare, 5)
  for figure, (least, reals) in {"fid": (2, 0), **network_lib.LEAST}.items():
    few = reference(features[: max(reals, 2)])
    evaluator = build(table(features, features), [figure], few, least)
    feed(evaluator, least)
    assert np.isfinite(list(evaluator.result().values())).all()
    with pytest.raises(
      ValueError, match=rf"'{figure}' needs at least {least} "
    ):
      build(table(), [figure], few, least - 1)
    if reals > 2:
      with pytest.raises(ValueError, match=f"and {reals} single real images"):
        build(table(), [figure], reference(features[: reals - 1]), least)
