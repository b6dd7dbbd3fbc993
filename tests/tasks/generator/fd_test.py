"""Generators tuned by Frechet distances: step, run, errors."""

import dataclasses
import functools
import json
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import drift_jax
from configs import digits
from drift_jax.drift import frechet
from drift_jax.metrics.reference import load_reference
from drift_jax.metrics.writers import read_jsonl
from drift_jax.system import sharding
from drift_jax.system.errors import UserError
from drift_jax.tasks import parse, programs
from drift_jax.tasks.generator import fd_step, train
from drift_jax.tasks.generator.judges import load_judge, network_fn
from drift_jax.tasks.generator.setup import init_generator
from drift_jax.training import artifacts
from drift_jax.training.run import Recipe, make_training
from tests.builders import random_like, save_model
from tests.conftest import assert_close
from tests.judges import save_inception, save_vit
from tests.small_generator import arguments, save_generator
from tests.tasks.generator.step_test import (
  OPTIM,
  assert_same_histories,
  random_params,
  toy_task,
)

WIDTH = 6  # of the toy encoder's features


class Pooled(nn.Module):
  """A layer on an image."""

  @nn.compact
  def pooled(self, x):
    return nn.tanh(nn.Dense(WIDTH, name="dense")(x.reshape(len(x), -1)))


def toy(population=64) -> fd_step.FdTask:
  base = dataclasses.replace(
    toy_task(),
    num_generated=2,
    guidance={"minimum": 1.0, "maximum": 1.0, "exponent": 1.0}
    | {"no_cfg_frac": 0.0},
  )
  spaces = fd_step.Spaces({"toy": Pooled()}, (), {}, sample=True, vae=None)
  return fd_step.FdTask(base, spaces, population=population, trust=0.5)


def history(mesh, task, steps=5):
  """(metrics of each step, last state) of the jitted step on a mesh."""
  rng = np.random.default_rng(0)
  references = {
    name: frechet.reference(x.mean(0), np.cov(x.T))
    for name, x in (
      ("sample", rng.normal(size=(100, 16))),
      ("toy", 0.5 * rng.normal(size=(100, WIDTH))),
    )
  }
  image = jax.ShapeDtypeStruct((1, 4, 4, 1), np.float32)
  shapes = jax.eval_shape(
    functools.partial(Pooled().init, method="pooled"), jax.random.key(0), image
  )
  params = random_params(task.base)
  trees = {"toy": random_like(shapes["params"])}, references, params
  frozen = fd_step.Frozen(
    *(jax.device_put(x, sharding.infer_sharding(x, mesh)) for x in trees)
  )
  recipe = Recipe(
    name="generator",
    init_params=init_generator(task.base),
    init_drift=functools.partial(fd_step.init_moments, references),
    step=functools.partial(fd_step.train_step, task=task),
    batch=fd_step.LabelBatch,
    frozen=frozen,
  )
  config = dataclasses.replace(parse(digits.get_config()), optim=OPTIM)
  training = make_training(config, mesh, recipe)
  at_start = jax.device_put(params, sharding.infer_sharding(params, mesh))
  state, found = dataclasses.replace(training.init(), params=at_start), []
  for step in range(steps):
    labels = np.random.default_rng(step).integers(0, 3, 16).astype(np.int32)
    batch = fd_step.LabelBatch(sharding.put_batch(labels, mesh))
    state, metrics = training.step(state, batch, frozen)
    found.append(jax.device_get(metrics))
  return found, state


@pytest.mark.slow
def test_every_mesh_tunes_the_same():
  one = sharding.make_mesh(1, 1, jax.devices()[:1])
  expected, state = history(one, toy())
  for shape in ((8, 1), (2, 4)):
    many, other = history(sharding.make_mesh(*shape), toy())
    assert_same_histories(many, expected, 1e-4)
    pairs = zip(*map(jax.tree.leaves, (other.drift, state.drift)), strict=True)
    for a, b in pairs:
      assert_close(a, b, 1e-4)
  # Two steps fill the population; what moves after them is the samples.
  norms = [metrics["grad_norm"] for metrics in expected]
  assert norms[0] == norms[1] == 0 and min(norms[2:]) > 0
  assert len({float(metrics["trust"]) for metrics in expected[2:]}) == 3


def test_judges_see_what_they_see_in_an_evaluation(tmp_path):
  """Of 8-bit images, that is; beyond black and white nothing counts."""
  mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
  paths = {"dinov2": save_vit(tmp_path / "vit")}
  paths |= {"inception": save_inception(tmp_path / "inception")}
  judges = {name: load_judge(str(path), mesh) for name, path in paths.items()}
  spaces = fd_step.Spaces(
    *({}, (), {name: judge.module for name, judge in judges.items()}),
    sample=False,
    vae=None,
  )
  params = {name: judge.params for name, judge in judges.items()}
  rgb = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1), np.uint8)
  rgb[0, 0, 0], rgb[0, 0, 1] = 0, 255
  images = np.float32(rgb) / 127.5 - 1
  beyond = images.copy()
  beyond[0, 0, 0], beyond[0, 0, 1] = -1.5, 1.5
  see = jax.jit(lambda params, images: spaces(params, images))
  for seen in (see(params, images), see(params, beyond)):
    for name, judge in judges.items():
      expected, *_ = network_fn(judge, mesh)(np.repeat(rgb, 3, axis=3))
      assert_close(seen[name], expected, 1e-5, name)
  slope = jax.jit(
    jax.grad(lambda x: sum(map(jnp.sum, see(params, x).values())))
  )
  assert np.all(slope(beyond)[0, 0, :2] == 0) and np.any(slope(images) != 0)


def test_an_average_has_the_variance_of_its_population():
  """Weights sum to 1, and their squares to 1 / P of a batch's variance."""
  population, batch = 640, 32
  task = toy(population)
  weights = np.zeros(0)
  for step in range(400):
    weight, full = task.weight(jnp.int32(step), batch)
    weights = np.append(weights * (1 - float(weight)), float(weight))
    samples = batch / np.sum(weights**2)
    assert bool(full) == (step >= population // batch)
    assert np.isclose(weights.sum(), 1, rtol=1e-5)
    assert samples <= population * (1 + 1e-5)
  assert np.isclose(samples, population, rtol=1e-3)
  # As old as the members of a queue of so many samples, on average.
  ages = np.arange(400)[::-1]
  assert np.isclose(np.sum(weights * ages), population / batch / 2, atol=1)


def small(folder, **changes):
  """A config of some steps; its encoder and first weights are in the folder."""
  config = digits.get_config("fd_tune,smoke")
  config.model.update(arguments(num_classes=10))
  config.encoders.mae.path = str(folder / "encoder")
  config.init_from = str(folder / "start")
  config.features.sample = False
  config.batch.update(labels=40, generated=2)
  config.fd_loss.update(population=160, reals=500)
  config.train.update(num_steps=4, log_every=1)
  config.optim.warmup_steps = 0
  config.eval.every = 0
  config.checkpoint.update(every=2, best_metric="")
  config.update_from_flattened_dict(changes)
  return config


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  """Folders 'encoder' and 'start'."""
  folder = tmp_path_factory.mktemp("weights")
  model = digits.get_config("encoder").model.to_dict()
  model |= {"base_channels": 4, "norm_groups": 2}
  save_model(folder / "encoder", "mae", model)
  save_generator(folder / "start", num_classes=10)
  return folder


@pytest.mark.slow
def test_a_run_of_an_earlier_version_is_drawn_from_and_goes_on(
  weights, tmp_path, monkeypatch
):
  """It may have keys that a new run is refused."""
  earlier = small(weights, **{"features.shift": 2})
  with monkeypatch.context() as patch:
    patch.setattr(train, "check_tuned", lambda config: None)
    before = train.train_and_evaluate(earlier, str(tmp_path / "run"))
  samples = drift_jax.load(tmp_path / "run").sample([3])
  assert samples.images.shape == (1, 8, 8, 1)
  after = train.train_and_evaluate(earlier, str(tmp_path / "run"))
  jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_equal(weights, tmp_path):
  """State and moments; the real ones are those of the first start."""
  whole = train.train_and_evaluate(small(weights), str(tmp_path / "whole"))
  shutil.copytree(tmp_path / "whole", tmp_path / "parts")
  shutil.rmtree(tmp_path / "parts" / "checkpoints" / "4")
  parts = train.train_and_evaluate(small(weights), str(tmp_path / "parts"))
  jax.tree.map(np.testing.assert_array_equal, parts, whole)
  moments = whole.drift["mae"]
  assert np.any(moments.second != 0) and set(whole.drift) == {"mae"}
  kept = load_reference(tmp_path / "whole" / "fd_references" / "mae.npz")
  assert kept.count == 500 and len(kept.mean) == 32
  lines = read_jsonl(tmp_path / "whole" / "metrics.jsonl")
  steps = [line for line in lines if "loss" in line]
  assert [line["trust"] == 0 for line in steps] == [True, True, True, False]
  sums = json.loads((tmp_path / "parts" / "frozen_weights.json").read_text())
  start = artifacts.load(weights / "start")
  assert sums["init_from"] == start.sha256
  # The weights that it keeps close to may not be others.
  save_generator(weights / "other", num_classes=10, seed=1)
  other = small(weights, init_from=str(weights / "other"))
  with pytest.raises(UserError, match="init_from"):
    train.train_and_evaluate(other, str(tmp_path / "parts"))


ERRORS = (
  ({"init_from": ""}, "init_from is empty"),
  ({"fd_loss.population": 0}, "population=0 leaves out"),
  ({"fd_loss.population": 79}, r"population=79 is less than the 80 samples"),
  ({"guidance.maximum": 2.0}, r"guidance.minimum=1.0, .*set both"),
  ({"train.accum_labels": 8}, "train.accum_labels=8"),
  ({"eval.metrics": ("fd_encoder",)}, r"no distance but .*'fd_encoder'"),
  (
    {"checkpoint.best_metric": "fd_encoder", "eval.every": 2},
    "best_metric='fd_encoder' is what",
  ),
)


@pytest.mark.parametrize(("changes", "message"), ERRORS)
def test_what_is_refused(tmp_path, changes, message):
  with pytest.raises(UserError, match=message) as error:
    parse(small(tmp_path, **changes))
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"features.shift": 2}, "features.shift=2 .* set it to 0"),
    ({"features.tokens": True}, "features.tokens=True .* set it to False"),
    ({"features.sample": True, "fd_loss.population": 100}, "100, too few.*64"),
    ({"fd_loss.reals": 63}, "63, too few .* 32 dimensions .*'mae'"),
    ({"fd_loss.dinov2.path": "/nowhere"}, "fd_loss.dinov2.*/nowhere"),
    ({"init_from": "/nowhere"}, "init_from.*/nowhere"),
    (
      {"fd_loss.inception.path": "SELF", "eval.metrics": ()},
      "fd_loss.inception: .* kind 'mae', want one of",
    ),
  ],
)
def test_what_is_found_before_the_first_step(
  weights, tmp_path, changes, message
):
  encoder = str(weights / "encoder")
  changes = {k: encoder if v == "SELF" else v for k, v in changes.items()}
  with pytest.raises(UserError, match=message) as error:
    train.train_and_evaluate(small(weights, **changes), str(tmp_path / "run"))
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("encoders", [{"mae"}, set()])
def test_a_tuned_run_is_described_without_data_or_judges(weights, encoders):
  """compile_check's programs, the step's arguments among them."""
  changes = {"fd_loss.inception.path": "/later", "fd_loss.population": 5000}
  changes["encoders.mae.in_loss"] = len(encoders) > 0
  config = parse(small(weights, **changes))
  train_program, *_ = programs(config, sharding.make_mesh(2, 4))
  state, batch, frozen = train_program.arguments.values()
  assert batch.labels.shape == (40,)
  assert set(frozen.references) == {"inception"} | encoders == set(state.drift)
  assert state.drift["inception"].second.shape == (2048, 2048)
  kernels = [x for x in jax.tree.leaves(frozen.start) if len(x.shape) > 2]
  assert any("fsdp" in x.sharding.spec for x in kernels)
