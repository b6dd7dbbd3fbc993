"""Runs that begin with exported weights."""

import jax
import numpy as np
import pytest

from configs import digits
from drift_jax.tasks import parse
from drift_jax.tasks.generator import train
from drift_jax.tasks.mae import train as train_mae
from drift_jax.training import artifacts, loop
from drift_jax.training.frozen import start_params
from tests.builders import save_model
from tests.small_generator import arguments, save_generator


@pytest.fixture(autouse=True)
def no_steps(monkeypatch):
  """Runs end before their first step, which takes long to compile."""
  monkeypatch.setattr(loop.Loop, "fit", lambda self, state: state)


def generator(path):
  config = digits.get_config("smoke")
  config.model.update(arguments(num_classes=10))
  config.eval.every = 0
  config.checkpoint.best_metric = ""
  config.ema.decays = (0.9, 0.99)
  config.eval.ema_decay = 0.9
  config.init_from = str(path)
  return config


@pytest.mark.slow
def test_a_generator_begins_with_them(tmp_path):
  path = save_generator(tmp_path / "weights", num_classes=10)
  state = train.train_and_evaluate(generator(path), str(tmp_path / "run"))
  weights = artifacts.load(path).params
  assert int(state.step) == 0
  for tree in (state.params, state.ema["0.9"], state.ema["0.99"]):
    jax.tree.map(np.testing.assert_array_equal, tree, weights)
  # Not one array under three names: each is donated to the step.
  leaves = jax.tree.leaves((state.params, state.ema))
  pointers = {
    leaf.addressable_data(0).unsafe_buffer_pointer() for leaf in leaves
  }
  assert len(pointers) == len(leaves)


def test_other_classes_are_said(tmp_path, caplog):
  """Digits whose classes the weights know in another order."""
  names = [str(digit) for digit in range(10)]
  facts = {"class_names": names, "alpha_range": (1.0, 3.0)}
  path = save_generator(tmp_path / "weights", num_classes=10, facts=facts)
  config = parse(generator(path))
  for now, said in ((names, False), (names[::-1], True)):
    load = start_params(config, now)
    assert load is not None and load()
    assert ("class 0 was '0', now '9'" in caplog.text) == said


@pytest.mark.slow
def test_an_encoder_begins_with_them(tmp_path):
  config = digits.get_config("encoder,smoke")
  config.model.base_channels = 4
  config.eval.every = 0
  path = save_model(tmp_path / "weights", "mae", config.model.to_dict())
  config.init_from = str(path)
  state = train_mae.train_and_evaluate(config, str(tmp_path / "run"))
  weights = artifacts.load(path).params
  jax.tree.map(np.testing.assert_array_equal, state.params, weights)
  config = generator(tmp_path / "weights")
  with pytest.raises(artifacts.ArtifactError, match="kind 'mae', but .* 'gen'"):
    train.train_and_evaluate(config, str(tmp_path / "other"))


def test_weights_of_another_model_or_nowhere(tmp_path):
  path = save_generator(tmp_path / "weights", num_classes=9)
  for place, message in (
    (path, "num_classes: 9, want 10"),
    ("/nowhere", "init_from: no exported"),
  ):
    with pytest.raises(artifacts.ArtifactError, match=message):
      train.train_and_evaluate(generator(place), str(tmp_path / "run"))
