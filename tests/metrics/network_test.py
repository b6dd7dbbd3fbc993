import jax.numpy as jnp
import numpy as np
import pytest

from drift_jax.metrics import network
from drift_jax.metrics.batches import Batch
from drift_jax.metrics.coverage import density_coverage
from drift_jax.metrics.evaluators import Evaluator
from drift_jax.metrics.frechet import FeatureStats, frechet_distance
from drift_jax.metrics.inception import inception_score
from drift_jax.metrics.kid import kernel_distance, kernel_distance_subsets
from drift_jax.metrics.network import NetworkEvaluator
from drift_jax.metrics.reference import Provenance, ReferenceStats

PROVENANCE = Provenance(
  source="here",
  split="train",
  crop="center",
  resolution=1,
  network="a table",
  network_sha256="0" * 64,
)


def reference(features):
  return ReferenceStats.from_stats(
    FeatureStats.from_features(features),
    PROVENANCE,
    np.asarray(features, np.float32),
  )


def table(*rows):
  """A network that looks up rows by the number that an image encodes."""

  def network(pixels):
    number = pixels[:, 0, 0, 0].astype(jnp.int32) * 256
    number += pixels[:, 0, 0, 1].astype(jnp.int32)
    return tuple(jnp.asarray(values)[number] for values in rows)

  return network


def encode(samples):
  """Samples [B, 1, 1, 1] that are numbers -> their pixels."""
  number = jnp.asarray(samples)[..., 0].astype(jnp.int32)
  pixels = jnp.stack([number // 256, number % 256, 0 * number], axis=-1)
  return pixels.astype(jnp.uint8)


def feed(evaluator, count, size=37):
  """Samples 0 ... count - 1 in batches of one size, the last filled up."""
  for start in range(0, count, size):
    index = np.arange(start, min(start + size, count), dtype=np.int32)
    number = np.minimum(np.arange(start, start + size), count - 1)
    samples = number.astype(np.float32).reshape(-1, 1, 1, 1)
    evaluator.update(Batch(samples, index, np.zeros_like(index), encode))


def build(network, figures, real, count, **changes):
  return NetworkEvaluator(
    "inception", network, figures, real, count=count, seed=0, **changes
  )


@pytest.mark.parametrize("case", ["shifted", "same", "relu_like"])
def test_fid_of_the_release(golden, case):
  arrays = golden("metrics")
  real = arrays[f"fid/{case}/features_ref"]
  fake = arrays[f"fid/{case}/features_gen"]
  evaluator = build(table(fake), ["fid"], reference(real), len(fake))
  assert isinstance(evaluator, Evaluator)
  feed(evaluator, len(fake))
  result = evaluator.result()
  assert list(result) == ["fid"]
  assert result["fid"] == pytest.approx(
    float(arrays[f"fid/{case}/fid"]), rel=1e-6, abs=1e-9
  )
  # Again, after what a reset must forget; in batches of another size.
  feed(evaluator, len(fake) // 2)
  evaluator.reset()
  feed(evaluator, len(fake), size=10)
  assert evaluator.result() == result
  assert evaluator.baseline() == {}


def test_inception_score_of_the_release(golden):
  arrays = golden("metrics")
  names = {key.split("/")[1] for key in arrays if key.startswith("is/")}
  tens = [n for n in names if int(arrays[f"is/{n}/splits"]) == 10]
  assert tens
  for name in tens:
    logits = arrays[f"is/{name}/logits"]
    network = table(logits[:, :2], logits)
    evaluator = build(network, ["inception_score"], None, len(logits))
    feed(evaluator, len(logits))
    assert evaluator.result() == pytest.approx(
      {
        "inception_score": float(arrays[f"is/{name}/mean"]),
        "inception_score_std": float(arrays[f"is/{name}/std"]),
      },
      rel=1e-6,
    )


def test_figures_of_single_images(golden):
  arrays = golden("metrics")
  names = {key.split("/")[1] for key in arrays if key.startswith("pr/")}
  threes = [n for n in names if int(arrays[f"pr/{n}/k"]) == 3]
  assert threes
  for name in threes:
    real = arrays[f"pr/{name}/features_real"]
    fake = arrays[f"pr/{name}/features_fake"]
    figures = ["precision_recall", "coverage_inception", "kid"]
    evaluator = build(table(fake), figures, reference(real), len(fake))
    feed(evaluator, len(fake))
    density, coverage = density_coverage(real, fake, 5)
    assert evaluator.result() == {
      "precision": pytest.approx(float(arrays[f"pr/{name}/precision"])),
      "recall": pytest.approx(float(arrays[f"pr/{name}/recall"])),
      "density_inception": density,
      "coverage_inception": coverage,
      "kid": pytest.approx(kernel_distance(real, fake), rel=1e-6),
    }


def test_kid_of_many_is_that_of_subsets(monkeypatch):
  """As papers report it, but for their number: a hundred take long."""
  assert (network.KID_SUBSETS, network.KID_SUBSET_SIZE) == (100, 1000)
  monkeypatch.setattr(network, "KID_SUBSETS", 5)
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


def test_a_set_with_itself():
  features = np.random.default_rng(3).normal(size=(500, 8)).astype(np.float32)
  evaluator = build(
    table(features), ["fid", "precision_recall"], reference(features), 500
  )
  feed(evaluator, 500)
  result = evaluator.result()
  assert result["fid"] < 1e-6
  assert (result["precision"], result["recall"]) == (1.0, 1.0)


def test_what_the_reference_lacks():
  full = reference(np.random.default_rng(4).normal(size=(9, 3)))
  bare = ReferenceStats(full.mean, full.sigma, None, None)
  build(table(), ["fid"], bare, 5)
  for figure in ("precision_recall", "kid", "coverage_inception"):
    with pytest.raises(ValueError, match=f"'{figure}'.*--num_features=10000"):
      build(table(), [figure], bare, 5)


@pytest.mark.parametrize(
  ("figure", "count", "reals"),
  [("fid", 1, 50), ("inception_score", 9, 50), ("precision_recall", 50, 3)],
)
def test_too_few_samples_are_told_before_they_are_drawn(figure, count, reals):
  features = np.random.default_rng(5).normal(size=(50, 3))
  with pytest.raises(ValueError, match=rf"'{figure}' needs at least \d+ samp"):
    build(table(), [figure], reference(features[:reals]), count)
  logits = features.astype(np.float32)
  least, least_real = network.LEAST.get(figure, (2, 0))
  enough = reference(features[: least_real or 50])
  evaluator = build(table(logits, logits), [figure], enough, least)
  feed(evaluator, least)
  assert np.isfinite(list(evaluator.result().values())).all()
