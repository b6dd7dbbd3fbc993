"""Conditions other than a class, from the step to a run, an export, samples."""

import dataclasses
import json
import runpy
import types

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import drift_jax
from drift_jax.config import ConfigError
from drift_jax.models import release
from drift_jax.system import sharding
from drift_jax.tasks import parse
from drift_jax.tasks.generator.evaluators import (
  evaluation_conditions,
  evaluation_labels,
)
from drift_jax.tasks.generator.programs import programs
from drift_jax.tasks.generator.reports import (
  Request,
  report_on_run,
  report_on_weights,
)
from drift_jax.tasks.generator.setup import init_generator
from drift_jax.tasks.generator.step import (
  FeatureSpace,
  GeneratorBatch,
  GeneratorTask,
  draw,
  generator_loss,
)
from drift_jax.tasks.policy.step import (
  PolicyBatch,
  PolicyDraws,
  PolicyTask,
  policy_loss,
)
from drift_jax.tools.work import export
from tests.builders import random_like
from tests.conftest import assert_close, precise_jit
from tests.small_generator import save_generator
from tests.tasks.generator import train_test
from tests.tasks.generator.step_test import (
  assert_same_histories,
  random_params,
  run_toy,
  toy_batch,
  toy_task,
)
from tests.tools.export_test import call
from tests.training.conditions_test import save

L, N, SHAPE, SIZE = 6, 4, (4, 4, 1), 3
DRIFT = {"temperatures": (0.1, 0.5), "affinity_floor": 0.0}


class Lines(nn.Module):
  """A generator of conditions and a policy of observations in one."""

  def __call__(self, labels, alpha, conditions, *, noise, style):
    return self.act(noise.reshape(len(noise), 4, 4), conditions)[..., None]

  def encode(self, observations, offsets=None):
    return observations["state"][:, 0]

  @nn.compact
  def act(self, noise, condition, time=None):
    x = jnp.concatenate([noise.reshape(len(noise), -1), condition], axis=1)
    x = jnp.tanh(nn.Dense(16, name="in")(x))
    return nn.Dense(16, name="out")(x).reshape(-1, 4, 4)


def test_a_condition_is_a_problem_of_its_own_as_a_policys_observation_is():
  """One positive, N samples: loss and gradients are the policy task's."""
  rng = np.random.default_rng(0)

  def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)

  conditions, positives = (
    jnp.array(normal(L, SIZE)),
    jnp.array(normal(L, *SHAPE)),
  )
  noise = normal(L * N, *SHAPE)
  task = GeneratorTask(
    generator=Lines(),
    features=FeatureSpace(encoders={}, options={}, sample=True),
    sample_shape=SHAPE,
    noise_shape=SHAPE,
    style_tokens=0,
    style_vocab=0,
    num_generated=N,
    drift=DRIFT,
    guidance=dict(minimum=1.0, maximum=1.0, exponent=3.0, no_cfg_frac=0.0),
    condition_shape=(SIZE,),
  )
  batch = GeneratorBatch(
    labels=np.zeros(L, np.int32),
    positives=positives[:, None],
    unconditional=np.zeros((L, 0, *SHAPE), np.float32),
    conditions=conditions,
  )
  draws = draw(jax.random.key(0), task, L)._replace(noise=noise)
  policy = PolicyTask(
    policy=Lines(),
    method="drifting",
    problem="chunk",
    num_generated=N,
    diffusion_steps=0,
    action_shape=(4, 4),
    crop=None,
    drift=DRIFT,
  )
  seen = PolicyBatch({"state": conditions[:, None]}, positives[..., 0])
  of_policy = PolicyDraws(noise[..., 0], None, np.zeros(L * N, np.int32), None)
  params = random_like(
    jax.eval_shape(
      lambda: Lines().init(
        jax.random.key(0), noise[..., 0], conditions[:1].repeat(L * N, 0),
        method="act",
      )
    )["params"]
  )  # fmt: skip
  (found, grads), (want, of_want) = (
    precise_jit(jax.value_and_grad(loss))(params)
    for loss in (
      lambda params: generator_loss(params, batch, draws, {}, task)[0],
      lambda params: policy_loss(params, (), seen, of_policy, task=policy)[0],
    )
  )
  assert_close(found, want, 1e-5)
  for ours, theirs in zip(
    jax.tree.leaves(grads), jax.tree.leaves(of_want), strict=True
  ):
    assert_close(ours, theirs, 1e-5)


def conditional(task, tokens: int) -> GeneratorTask:
  generator = task.generator.clone(condition_size=SIZE, condition_tokens=tokens)
  shape = generator.condition_shape
  return dataclasses.replace(task, generator=generator, condition_shape=shape)


def batch_of(tokens: int):
  def make(num_labels: int, seed: int) -> GeneratorBatch:
    shape = (num_labels, tokens, SIZE) if tokens else (num_labels, SIZE)
    given = np.random.default_rng(seed).normal(size=shape)
    batch = toy_batch(num_labels, seed)
    return batch._replace(conditions=given.astype(np.float32))

  return make


@pytest.mark.slow
def test_one_device_is_eight():
  task = conditional(toy_task(depth=2), 2)
  (one, *many) = (
    run_toy(mesh, task, 3, batch_of=batch_of(2))
    for mesh in (None, sharding.make_mesh(8, 1), sharding.make_mesh(2, 4))
  )
  assert one[0]["loss"] != one[1]["loss"]
  for history in many:
    assert_same_histories(history, one, 1e-4)


def test_the_conditioning_vector_adds_the_conditions_network():
  """In float64; tokens enter by their mean, and one by one as tokens."""
  task = conditional(toy_task(), 2)
  params, batch = random_params(task), batch_of(2)(L, 0)
  apply = jax.jit(task.generator.apply, static_argnames="method")
  given = (batch.labels, np.full(L, 1.5, np.float32))
  draws = draw(jax.random.key(0), task, L)
  inputs = {"noise": draws.noise[:L], "style": draws.style[:L]}
  vector = task.generator.apply
  with_conditions = vector(
    {"params": params}, *given, inputs["style"], batch.conditions,
    method="condition",
  )  # fmt: skip
  alone = jax.tree.map(np.zeros_like, params["condition_embed"])
  without = vector(
    {"params": params | {"condition_embed": alone}}, *given, inputs["style"],
    batch.conditions, method="condition",
  )  # fmt: skip
  of = jax.tree.map(np.float64, params["condition_embed"])
  x = np.float64(batch.conditions).mean(axis=1)
  x = x @ of["linear_in"]["kernel"] + of["linear_in"]["bias"]
  x = x / (1 + np.exp(-x))
  want = x @ of["linear_out"]["kernel"] + of["linear_out"]["bias"]
  assert_close(with_conditions - without, want, 1e-5)
  images = [
    np.asarray(apply({"params": params}, *given, conditions, **inputs))
    for conditions in (batch.conditions, batch.conditions[:, ::-1])
  ]
  assert np.abs(images[0] - images[1]).max() > 1e-3


def test_models_without_conditions_are_as_they_were():
  task = toy_task()
  names = jax.tree.leaves_with_path(
    jax.eval_shape(init_generator(task), jax.random.key(0))
  )
  assert not any("condition" in str(path) for path, _ in names)
  config = train_test.config_of("smoke").model.to_dict()
  published = release.published_config("gen", config)
  assert not any("condition" in key for key in published)
  assert release.describe("gen", published)[0].condition_shape == ()
  with pytest.raises(ValueError, match="conditions has shape"):
    jax.eval_shape(
      task.generator.apply,
      {"params": random_params(task)},
      np.zeros(2, np.int32),
      np.float32(1),
      np.zeros((2, SIZE), np.float32),
      rngs={"noise": jax.random.key(0)},
    )


def test_what_the_release_lacks_survives_its_format():
  task = conditional(toy_task(), 2)
  arguments = train_test.config_of("smoke").model.to_dict()
  own = {"condition_size": SIZE, "condition_tokens": 2, "clip": True}
  published = release.published_config("gen", arguments | own)
  module, shapes = release.describe("gen", published)
  assert module.condition_shape == task.condition_shape and module.clip
  params = random_like(shapes)
  stored = release.to_release("gen", published, params)
  _, found = release.from_release("gen", published, stored)
  jax.tree.map(np.testing.assert_array_equal, found, params)


def test_what_a_run_compiles_is_known_without_its_data():
  config = train_test.config_of("style,smoke")
  mesh = sharding.make_mesh()
  with pytest.raises(ConfigError, match="condition_size=0 takes what"):
    programs(parse(config), mesh)
  config.model.condition_size = 2
  for program in programs(parse(config), mesh):
    out = jax.eval_shape(program.jitted, *program.arguments.values())
    assert jax.tree.leaves(out)


def readers_of(labels) -> types.SimpleNamespace:
  labels = np.asarray(labels)
  conditions = np.arange(len(labels), dtype=np.float32)[:, None]
  reader = types.SimpleNamespace(labels=labels, conditions=conditions)
  return types.SimpleNamespace(train=reader, test=lambda: reader)


@pytest.mark.parametrize(
  ("count", "order", "rows"),
  [
    (0, "given", [0, 1, 2, 3, 4, 5]),
    (0, "class", [1, 3, 5, 0, 2, 4]),
    (3, "given", [0, 2, 4]),
    (8, "given", [0, 0, 1, 2, 3, 3, 4, 5]),
  ],
)
def test_samples_are_judged_by_conditions_of_held_out_images(
  count, order, rows
):
  readers = readers_of([1, 0, 1, 0, 1, 0])
  chosen = parse(train_test.config_of("smoke")).eval
  chosen = dataclasses.replace(chosen, num_samples=count, label_order=order)
  labels = evaluation_labels(chosen, 2, readers)
  assert labels.tolist() == readers.train.labels[rows].tolist()
  (found,) = evaluation_conditions(chosen, readers).values()
  assert found[:, 0].tolist() == rows


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  folder = tmp_path_factory.mktemp("generator")
  return drift_jax.load(
    save_generator(folder, condition_size=SIZE, condition_tokens=2)
  )


def test_sampling_takes_a_condition_for_each_image(model):
  given = np.random.default_rng(0).normal(size=(3, 2, SIZE))
  all_of = model.sample([1], condition=given, count=2, seed=3)
  assert all_of.labels.tolist() == [1] * 6 and all_of.columns == 2
  each = model.sample([1, 1, 1], condition=given, count=2, seed=3)
  np.testing.assert_array_equal(each.images, all_of.images)
  first = model.sample([1], condition=given[0], count=2, seed=3)
  np.testing.assert_array_equal(first.images, all_of.images[:2])
  several = model.sample([1, 2], condition=given[0], seed=3)
  assert several.labels.tolist() == [1, 2]
  other = model.sample([1], condition=given + 1, count=2, seed=3)
  assert np.abs(other.images - all_of.images).max() > 1e-3
  ends = model.interpolate([1], condition=given, frames=2, seed=3)
  alone = model.sample([1], condition=given, seed=3)
  assert_close(ends[0].images, alone.images, 1e-5)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({}, r"needs one of shape \(2, 3\)"),
    ({"condition": np.zeros((1, 2, 4))}, r"\(1, 2, 4\), this generator was"),
    ({"condition": np.zeros((2, SIZE)), "labels": None}, "has 4 classes"),
    (
      {"condition": np.zeros((3, 2, SIZE)), "labels": [0, 1]},
      "2 labels with 3",
    ),
    ({"condition": np.full((1, 2, SIZE), np.inf)}, "condition 0 is not finite"),
    ({"condition": [[["a"] * SIZE] * 2]}, "trained on conditions of shape"),
  ],
)
def test_conditions_that_can_not_be_drawn(model, arguments, message):
  with pytest.raises(ConfigError, match=message) as error:
    model.sample(**{"labels": [0], **arguments})
  assert "\n" not in str(error.value)


def test_a_class_model_takes_no_condition(tmp_path):
  model = drift_jax.load(save_generator(tmp_path))
  with pytest.raises(ConfigError, match="knows classes alone"):
    model.sample([0], condition=np.zeros(2))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """Changes of a tiny run of conditions, and its workdir."""
  folder = tmp_path_factory.mktemp("runs")
  values = np.random.default_rng(0).normal(size=(1797, 2)).astype(np.float32)
  names = [f"train/{i}" for i in range(1257)]
  names += [f"test/{i}" for i in range(540)]
  changes = {
    "data.conditions": save(folder / "c.npz", names, values),
    "batch.labels": 8,
    "batch.generated": 4,
    "batch.positives": 2,
    "eval.num_samples": 0,
  }
  train_test.train_here(folder / "whole", changes, variant="style,smoke")
  return folder, changes


@pytest.mark.slow
def test_a_run_goes_on_bit_equal(whole):
  folder, changes = whole
  train_test.train_here(
    folder / "parts", changes, {"train.num_steps": 8}, variant="style,smoke"
  )
  train_test.train_here(folder / "parts", changes, variant="style,smoke")
  train_test.assert_same_run(folder / "whole", folder / "parts")
  config = json.loads((folder / "parts" / "config.json").read_text())
  assert config["model"]["condition_size"] == 2
  with np.load(changes["data.conditions"]) as archive:
    other = save(
      folder / "other.npz", archive["names"], archive["conditions"] + 1
    )
  with pytest.raises(ConfigError, match="their conditions are others|other"):
    train_test.train_here(
      *(folder / "parts", changes, {"data.conditions": other}),
      variant="style,smoke",
    )


def call_example(folder, monkeypatch, *arguments) -> str:
  """What an export's run.py ends with; '' if all is well."""
  monkeypatch.setattr("sys.dont_write_bytecode", True)
  monkeypatch.setattr("sys.argv", ["run.py", *arguments])
  try:
    runpy.run_path(str(folder / "run.py"), run_name="__main__")
  except SystemExit as ended:
    return str(ended.code)
  return ""


@pytest.mark.slow
def test_a_runs_export_gives_its_samples(whole, tmp_path, monkeypatch):
  folder, changes = whole
  workdir = str(folder / "whole")
  model = drift_jax.load(workdir)
  with np.load(changes["data.conditions"]) as archive:
    given = archive["conditions"][:5]
  labels = np.arange(5, dtype=np.int32)
  want = model.sample(labels, condition=given, seed=7)
  out = tmp_path / "out"
  manifest = export.export(workdir, str(out), platforms=("cpu",))
  assert manifest["conditions"] == ["b", 2]
  loaded = drift_jax.load(out)
  assert loaded.condition_shape == (2,)
  same = loaded.sample(labels, condition=given, seed=7)
  np.testing.assert_array_equal(same.images, want.images)
  found = call(
    *(out, "sample", ["generator"], labels, np.ones(5, np.float32), labels),
    *(np.uint32(7), np.full(manifest["style_tokens"], -1, np.int32), given),
  )
  assert_close(found, want.images, 1e-5)
  np.savez(tmp_path / "given.npz", conditions=given)
  asked = ["--labels=3", "--count=2", f"--out={tmp_path / 'a.npy'}"]
  file = f"--conditions={tmp_path / 'given.npz'}"
  assert call_example(out, monkeypatch, *asked) == (
    "Error: --conditions None: want an .npz of ['n', 2]"
  )
  assert call_example(out, monkeypatch, *asked, "--labels=0,1", file) == (
    "Error: 2 labels with 5 conditions"
  )
  assert call_example(out, monkeypatch, *asked, file, "--seed=7") == ""
  want = model.sample([3], condition=given, count=2, seed=7)
  assert_close(np.load(tmp_path / "a.npy"), want.images, 1e-5)
  with pytest.raises(ConfigError, match="give its run"):
    report_on_weights(str(out), Request(metrics=()))


@pytest.mark.slow
def test_a_report_asks_for_the_held_out_conditions(whole, tmp_path):
  """As the run's own evaluation with the same seed does."""
  folder, _ = whole
  request = Request(
    seed=0, alphas=(1.0,), neighbours=2, neighbour_space="pixel",
    neighbour_samples=600, out=str(tmp_path / "report.json"),
  )  # fmt: skip
  report = report_on_run(str(folder / "whole"), request, step=8)
  assert report["num_samples"] == 540
  evaluated = train_test.records(folder / "whole")[8]
  for name, value in report["results"][1.0].items():
    assert_close(value, evaluated[f"eval/{name}/alpha_1.0"], 1e-6, name)
