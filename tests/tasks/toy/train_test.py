"""Toys end to end: particles, resume, files, configs, and what refuses them."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import digits, toy
from drift_jax import config as config_lib
from drift_jax import drift
from drift_jax.metrics.writers import read_jsonl
from drift_jax.tasks import parse, programs
from drift_jax.tasks.generator.restore import open_generator
from drift_jax.tasks.toy import train as train_toy
from drift_jax.tasks.toy.data import draw_points
from drift_jax.tasks.toy.setup import (
  init_toy,
  make_field,
  toy_feed,
  toy_recipe,
  toy_sampler,
  toy_task,
)
from drift_jax.tasks.toy.step import ToyBatch
from drift_jax.training.run import make_training, open_mesh
from tests import process
from tests.conftest import assert_close

DEVICES = 8


def small(variant="", **changes):
  """The smoke variant with a problem for each device of the tests."""
  config = toy.get_config(f"{variant},smoke")
  config.batch.labels = DEVICES
  config.batch.update(generated=16, positives=24)
  config.update_from_flattened_dict(
    {key.replace("__", "."): value for key, value in changes.items()}
  )
  return config


def trained(config, count):
  """(particles at first, after `count` steps), by the step of a run."""
  config = parse(config)
  mesh = open_mesh(config.mesh)
  task = toy_task(config)
  training = make_training(config, mesh, toy_recipe(config, task))
  feed = toy_feed(config)
  state = training.init()
  first = np.asarray(state.params["positions"])
  for _ in range(count):
    state, _ = training.step(state, ToyBatch(**next(feed)), {})
    # Eight devices on few cores: steps that queue up may starve each other.
    jax.block_until_ready(state)
  return first, np.asarray(state.params["positions"])


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"drift__temperatures": (0.05, 0.2), "drift__repulsion": 0.5},
    {"optim__schedule": "cosine", "drift__normalization": "y"},
  ],
)
def test_particles_follow_the_field(changes):
  """x <- x + eta V, V the mean over independent problems."""
  eta = 0.7
  config = small("particles", optim__learning_rate=eta, **changes)
  x, got = trained(config, 3)
  field = jax.jit(
    functools.partial(
      drift.compute_v,
      mask_self=True,
      normalization=config.drift.normalization,
      attraction=config.drift.attraction,
      repulsion=config.drift.repulsion,
    ),
    static_argnums=3,
  )
  feed = toy_feed(parse(config))
  for step in range(3):
    batch = next(feed)
    v = np.zeros_like(x)
    for positives in batch["positives"]:
      for tau in config.drift.temperatures:
        v += np.asarray(field(x, positives, x, tau)) / DEVICES
    rate = eta
    if config.optim.schedule == "cosine":
      rate *= (1 + np.cos(np.pi * step / config.train.num_steps)) / 2
    x = x + rate * v
  moved = np.abs(got - trained(config, 0)[0]).max()
  assert moved > 0.01
  assert_close(got, x, 1e-5)


def test_all_particles_are_evaluated():
  """As they are, each once, whatever eval.num_samples is."""
  config = parse(small("particles"))
  mesh = open_mesh(config.mesh)
  task = toy_task(config)
  params = jax.jit(init_toy(task))(jax.random.key(0))
  got = toy_sampler(config, task, mesh)(params)
  np.testing.assert_array_equal(got, params["positions"])


def test_without_repulsion_particles_collapse():
  """Table 1: (1, 0). With it they keep the data's spread."""
  spread = {}
  for variant in ("", "attraction_only"):
    config = small(f"particles,{variant}", model__spread=0.5)
    config.batch.update(generated=64, positives=64)
    _, x = trained(config, 150)
    nearest = np.linalg.norm(x[:, None] - x, axis=-1) + 9 * np.eye(len(x))
    spread[variant] = np.median(nearest.min(axis=1))
  assert spread["attraction_only"] < 0.1 * spread[""]


@pytest.mark.parametrize("changes", [{}, {"normalize_features": True}])
@pytest.mark.parametrize("negatives", ["own", "independent"])
def test_the_drawn_field_is_that_of_training(negatives, changes):
  """Each point of the grid as one more sample, which its own term spares."""
  config = small(drift__temperatures=(0.05, 0.3), drift__negatives=negatives)
  config.drift.update(changes)
  rng = np.random.default_rng(0)
  samples, queries = 0.3 * rng.normal(size=(2, 7, 2)).astype(np.float32)
  positives = jnp.asarray(draw_points("bimodal", 9, 0.1, rng))
  task = toy_task(parse(config))
  got = make_field(task)(samples, positives, queries, 1.5)
  own = negatives == "own"
  for query, v in zip(queries, got, strict=True):
    x = jnp.concatenate([samples, query[None]])
    repelling = x if own else jnp.asarray(samples)
    unit = 1.0
    if changes:  # temperatures are in units of the mean distance
      targets = np.concatenate([repelling, positives])
      unit = np.linalg.norm(np.asarray(x)[:, None] - targets, axis=-1).mean()
    expected = sum(
      drift.compute_v(
        x, positives, repelling, float(1.5 * tau * unit), mask_self=own
      )[-1]
      for tau in (0.05, 0.3)
    )
    # The loss takes coinciding points as 1e-4 apart: independent samples here.
    assert_close(v, expected, 1e-4 if own else 2e-3)


def without_clock(workdir):
  """(records, figures) of a run, without what depends on the clock."""
  records = [
    {k: v for k, v in record.items() if not k.startswith("perf/")}
    for record in read_jsonl(workdir / "metrics.jsonl")
  ]
  figures = json.loads((workdir / "figures.json").read_text())
  del figures["seconds"]
  return records, figures


@pytest.mark.slow
def test_a_run_and_one_that_is_resumed(tmp_path):
  """As if the run had ended after step 2's checkpoint, and step 3."""
  run = train_toy.train_and_evaluate
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  state = run(small(), str(whole))
  # 1. What it leaves
  records, figures = without_clock(whole)
  assert all(np.isfinite(value).all() for value in figures.values())
  assert figures["step"] == 4 and len(figures["mode_masses"]) == 2
  assert figures["energy_distance_baseline"] > 0
  last = {key: value for record in records for key, value in record.items()}
  assert last["eval/energy_distance"] == figures["energy_distance"]
  assert last["eval/mode_ratio/1"] == 2 * figures["mode_masses"][1]
  losses = [record["loss"] for record in records if "loss" in record]
  average = losses[0]
  for loss in losses[1:]:
    average = 0.98 * average + 0.02 * loss
  assert figures["loss_ema"] == pytest.approx(average, rel=1e-12)
  for name, frames in (("evolution.gif", 3), ("field.png", 1)):
    with Image.open(whole / "plots" / name) as picture:
      assert min(picture.size) > 300
      assert getattr(picture, "n_frames", 1) == frames
  # What reads images' generators says that this is none.
  mesh = open_mesh(config_lib.Mesh(data=-1, fsdp=1))
  with pytest.raises(config_lib.ConfigError, match="'toy', want 'generator'"):
    open_generator(str(whole), mesh)
  # 2. The resumed one
  shutil.copytree(whole, parts)
  shutil.rmtree(parts / "checkpoints" / "4")
  for name in ("figures.json", "samples/step_0000004.npy", "plots/curves.png"):
    (parts / name).unlink()
  jax.tree.map(np.testing.assert_array_equal, run(small(), str(parts)), state)
  assert without_clock(parts) == (records, figures)
  for step in (0, 2, 4):
    name = f"samples/step_{step:07d}.npy"
    points = np.load(parts / name)
    assert points.shape == (64, 2)
    np.testing.assert_array_equal(points, np.load(whole / name))
  assert (parts / "plots" / "curves.png").exists()


@pytest.mark.system
def test_the_command_line(tmp_path):
  done = process.call(
    *("-m", "drift_jax.main", "--config=configs/toy.py:smoke"),
    f"--workdir={tmp_path / 'run'}",
  )
  assert done.returncode == 0, done.stderr[-3000:]
  figures = json.loads((tmp_path / "run" / "figures.json").read_text())
  assert figures["step"] == 4


def test_what_can_not_be():
  config = parse(small())
  with pytest.raises(config_lib.ConfigError, match="task='toy' needs no check"):
    programs(config, open_mesh(config.mesh))
  for config, message in (
    (small(batch__labels=3), "batch.labels=3 can't be split over the 8"),
    (digits.get_config("encoder"), "task='mae', want 'toy'"),
  ):
    with pytest.raises(config_lib.ConfigError, match=message):
      train_toy.train_and_evaluate(config, "/nowhere")


@pytest.mark.parametrize(
  ("key", "value", "message"),
  [
    ("data.distribution", "moon", r"'moon': .*'moons'.*did you mean 'moons'"),
    ("model.location", (1.0, 2.0, 3.0), "two coordinates"),
    ("model.spread", 0.0, r"model\.spread=0\.0 must be positive"),
    ("batch.generated", 1, r"generated=1: .*nothing repels it"),
    ("checkpoint.best_metric", "fid", r"'fid': valid options are \[''\]"),
    ("drift.normalize_features", True, "on raw distances; set it to False"),
    ("drift.negatives", "independent", "no noise to draw a second batch from"),
  ],
)
def test_bad_values_are_named(key, value, message):
  """The last two are of particles alone."""
  variant = "particles" if key.startswith("drift") else ""
  values = toy.get_config(variant).to_dict()
  section, leaf = key.split(".")
  values[section][leaf] = value
  with pytest.raises(config_lib.ConfigError, match=message):
    parse(values)
  if variant:
    values["model"]["kind"] = "mlp"
    parse(values)


@pytest.mark.parametrize("name", toy.EXPERIMENTS)
def test_variants(name):
  full = parse(toy.get_config(name))
  bimodal = name.startswith("bimodal_")
  assert full.data.distribution == ("bimodal" if bimodal else name)
  again = parse(json.loads(config_lib.to_json(full)))
  assert again == full
  for option in toy.OPTIONS:
    parse(toy.get_config(f"{name},{option}"))
