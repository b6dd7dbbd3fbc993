"""Figures of a run's evaluation: a second network's, and refused ones."""

import functools

import jax
import numpy as np
import pytest
from scipy import linalg

from configs import digits
from drift_jax import config as config_lib
from drift_jax.metrics.generation import evaluate
from drift_jax.system import devices, sharding
from drift_jax.system.errors import UserError
from drift_jax.tasks import parse
from drift_jax.tasks.generator.config import CLASSIFIER_METRICS
from drift_jax.tasks.generator.evaluators import run_evaluators
from drift_jax.training import artifacts
from drift_jax.training.inputs import open_readers
from tests.builders import save_model
from tests.conftest import assert_close
from tests.models.small import MAE, VAE

LABELS = np.repeat(np.arange(10, dtype=np.int32), 10)


def judged_by(folder, metrics=CLASSIFIER_METRICS):
  """(evaluators, facts, readers) of a run that is judged by a network."""
  config = digits.get_config("smoke")
  config.checkpoint.best_metric = ""
  config.eval.update(metrics=metrics, coverage_k=3, batch_size=64)
  config.eval.classifier.path = str(folder)
  config, mesh = parse(config), sharding.make_mesh()
  readers = open_readers(config, None)
  return *run_evaluators(config, {}, readers, LABELS, None, mesh), readers


def save_classifier(folder, **others):
  # One channel a group would make all means of a map the same.
  return save_model(
    folder, "mae", MAE | {"norm_groups": 4} | others, scale=1.0, seed=1
  )


def oracle(real, fake, k):
  """Frechet distance, density and coverage in float64, by their definitions."""
  sigmas = [np.cov(x, rowvar=False) for x in (real, fake)]
  root = linalg.sqrtm(sigmas[0] @ sigmas[1]).real
  means = np.sum((real.mean(axis=0) - fake.mean(axis=0)) ** 2)
  among, between = (
    np.linalg.norm(real[:, None] - x[None], axis=-1) for x in (real, fake)
  )
  inside = between < np.sort(among, axis=1)[:, k, None]
  return {
    "fd_classifier": means + np.trace(sigmas[0] + sigmas[1] - 2 * root),
    "density_classifier": inside.sum() / (k * len(fake)),
    "coverage_classifier": inside.any(axis=1).mean(),
  }


def test_a_second_network_judges_as_a_float64_oracle(tmp_path):
  save_classifier(tmp_path)
  (evaluator,), facts, readers = judged_by(tmp_path)
  artifact = artifacts.load(tmp_path)
  assert facts["classifier"]["sha256"] == artifact.sha256
  # Noisy held-out images in the place of samples.
  test = readers.test()
  real = test.fixed(np.arange(len(test.labels)))
  noise = np.random.default_rng(0).normal(0, 0.1, (len(LABELS), 8, 8, 1))
  fake = (real[5:105] + noise).astype(np.float32)

  see = jax.jit(functools.partial(artifact.module.apply, method="classify"))
  every = see({"params": artifact.params}, np.concatenate([real, fake]))
  seen = [np.asarray(x, np.float64) for x in every]
  features = np.split(seen[0], [len(real)])
  classes = np.split(np.argmax(seen[1], axis=1), [len(real)])
  expected = oracle(*features, 3)
  assert 0 < expected["coverage_classifier"] < 1
  mesh = sharding.make_mesh()
  found = evaluate(
    [evaluator],
    lambda labels, alpha, index: sharding.put_batch(fake[index], mesh),
    *(LABELS, [1.0], 64),
  )[1.0]
  assert found.pop("classifier_accuracy") == np.mean(classes[1] == LABELS)
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    assert_close(found[name], value, 1e-4, name)
  baseline = evaluator.baseline()
  right = np.mean(classes[0] == test.labels)
  assert baseline.pop("classifier_accuracy") == right
  assert baseline.keys() == expected.keys()


def test_a_network_that_can_not_judge_is_named(tmp_path):
  save_classifier(tmp_path / "colour", in_channels=3)
  save_classifier(tmp_path / "five", num_classes=5)
  save_model(tmp_path / "other", "vae", VAE)
  for name, metrics, message in (
    ("colour", CLASSIFIER_METRICS, "needs in_channels=3"),
    ("five", CLASSIFIER_METRICS, "knows 5 classes, the data have 10: leave"),
    ("other", CLASSIFIER_METRICS, r"eval\.classifier: .*want one of \['mae'\]"),
    ("none", CLASSIFIER_METRICS, r"eval\.classifier: .*none"),
  ):
    with pytest.raises(UserError, match=message) as caught:
      judged_by(tmp_path / name, metrics)
    assert str(caught.value).count("\n") == 0
  # Distances need no classes of these data.
  assert len(judged_by(tmp_path / "five", ("fd_classifier",))[0]) == 1


def test_a_distance_of_pixels_names_those_of_networks(monkeypatch):
  config = digits.get_config("smoke")
  config.eval.metrics = ("fd_pixel",)
  config = parse(config)
  readers = open_readers(config, None)
  mesh = sharding.make_mesh()

  def build():
    labels = np.arange(10, dtype=np.int32)
    return run_evaluators(config, {}, readers, labels, None, mesh)

  assert len(build()[0]) == 1
  monkeypatch.setattr(devices, "machine_memory", lambda: 64**2 * 64)
  with pytest.raises(
    config_lib.ConfigError,
    match="eval.metrics holds 'fd_pixel'.* 64 x 64 .*'fd_inception'",
  ):
    build()
