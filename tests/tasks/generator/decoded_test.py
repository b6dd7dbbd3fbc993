"""Encoders of pixels on generators of latents: drifting through the decoder."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from configs import common, imagenet_latent
from drift_jax import config as config_lib
from drift_jax import drift
from drift_jax.models.vae import build_vae
from drift_jax.system import sharding
from drift_jax.tasks import parse, programs
from drift_jax.tasks.generator.judges import make_decoder
from drift_jax.tasks.generator.memorisation import feature_space
from drift_jax.tasks.generator.setup import (
  check_encoders,
  frozen_params,
  generator_task,
  init_generator,
)
from drift_jax.tasks.generator.step import (
  FeatureSpace,
  draw,
  generator_gradients,
)
from drift_jax.training import artifacts
from drift_jax.training.frozen import frozen_sums, load_encoders, load_vae
from drift_jax.training.step import apply
from tests.autoencoders import ARGUMENTS, save_vae
from tests.conftest import assert_close
from tests.tasks.generator.memorisation_test import MAE
from tests.tasks.generator.step_test import (
  ToyEncoder,
  assert_same_histories,
  encoder_params,
  run_toy,
  toy_batch,
  toy_task,
)

pytestmark = pytest.mark.slow

# Of the toy's 4x4x1 latents, which become 8x8x3 images.
VAE = build_vae(**{**ARGUMENTS, "latent_channels": 1})


def decoding_task(*others: str, remat: bool = False, **changed: Any):
  """The toy task in the features of decoded samples, and of others."""
  names = ("pixel", *others)
  space = FeatureSpace(
    encoders={name: ToyEncoder() for name in names},
    options={name: {} for name in names},
    sample=bool(others),
    decoded={"pixel"},
    vae=VAE.clone(remat=remat),
  )
  return dataclasses.replace(toy_task(), features=space, **changed)


@pytest.fixture(scope="module")
def problem():
  """(parameters, batch, draws, frozen), the parameters with no zeros."""
  task = decoding_task()

  @jax.jit
  def init():
    params = init_generator(task)(jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.05, params)
    return params, draw(jax.random.key(1), task, 2)

  params, draws = init()
  return params, toy_batch(2), draws, encoder_params(task)


def gradients(task, problem):
  """(loss, report, gradients)."""
  return jax.jit(functools.partial(generator_gradients, task=task))(*problem)


@pytest.fixture(scope="module")
def decoded(problem):
  return gradients(decoding_task(), problem)


def test_loss_and_gradient_are_those_of_the_composition(problem, decoded):
  """Decode, encode, drift, spelt out; nothing but the decoder leads back."""
  task = decoding_task()

  def plain(params, batch, draws, frozen):
    def features(latents):
      images = VAE.apply({"params": frozen["vae"]}, latents, method="decode")
      assert images.shape[1:] == (8, 8, 3)
      found: Any = ToyEncoder().apply(
        {"params": frozen["pixel"]}, images, method="features"
      )
      return {k: x.reshape(2, -1, *x.shape[1:]) for k, x in found.items()}

    repeat = functools.partial(jnp.repeat, repeats=task.num_generated)
    samples = task.generator.apply(
      {"params": params},
      repeat(batch.labels),
      repeat(draws.alpha),
      noise=draws.noise,
      style=draws.style,
    )
    reals = jnp.concatenate([batch.positives, batch.unconditional], axis=1)
    losses, _ = drift.drift_losses(
      features(samples),
      features(reals.reshape(-1, 4, 4, 1)),
      drift.unconditional_weight(draws.alpha, task.num_generated, 3),
      num_positives=5,
      **task.drift,
    )
    return jnp.sum(losses)

  loss, grads = jax.jit(jax.value_and_grad(plain))(*problem)
  found_loss, _, found = decoded
  assert_close(found_loss, loss, 1e-6)
  for (path, expected), actual in zip(
    jax.tree.leaves_with_path(grads), jax.tree.leaves(found), strict=True
  ):
    name = sharding.path_name(path)
    assert jnp.linalg.norm(expected) > 0, name
    assert_close(actual, expected, 1e-5, name)


def test_recomputed_blocks_change_nothing(problem, decoded):
  task = decoding_task(remat=True)
  loss, _, grads = gradients(task, problem)
  assert_close(loss, decoded[0], 1e-6)
  # As one vector: 4.3e-7. The smallest leaves, 1e-6 of it, are rounded more.
  grads, expected = (ravel_pytree(tree)[0] for tree in (grads, decoded[2]))
  assert_close(grads, expected, 1e-6)


def kept_activations(jaxpr) -> int:
  """Numbers of 8 samples that go into recomputed blocks."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "remat2":
      shapes = [value.aval.shape for value in equation.invars]
      total += sum(math.prod(s) for s in shapes if len(s) == 4 and s[0] == 8)
    for value in equation.params.values():
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        total += kept_activations(inner)
  return total


def test_recomputed_blocks_keep_as_little_where_weights_come_in_parts():
  mesh = sharding.make_mesh(2, 2, jax.devices()[:4])
  task = decoding_task(remat=True)
  params = jax.eval_shape(init_generator(task), jax.random.key(0))
  frozen = jax.eval_shape(lambda: encoder_params(task))
  draws = jax.eval_shape(lambda: draw(jax.random.key(1), task, 8))
  kept = []
  for specs in (
    jax.tree.map(lambda _: jax.sharding.PartitionSpec(), frozen),
    sharding.infer_specs(frozen, mesh),
  ):
    layout = sharding.Layout(mesh, sharding.infer_specs(params, mesh), specs)
    step = functools.partial(generator_gradients, task=task, layout=layout)
    jaxpr = jax.make_jaxpr(step)(params, toy_batch(8), draws, frozen)
    kept.append(kept_activations(jaxpr.jaxpr))
  assert kept[0] == kept[1] > 0


def test_meshes_and_groups_of_labels_train_the_same():
  """Frozen weights in parts, beside an encoder of the latents themselves."""
  task = decoding_task("latent")
  expected = run_toy(None, task, 2)
  mesh = sharding.make_mesh(2, 2, jax.devices()[:4])
  task = dataclasses.replace(task, groups=2, exact=True)
  assert_same_histories(run_toy(mesh, task, 2), expected, 1e-5)
  names = {key.split("/")[-2] for key in expected[0] if "scale/" in key}
  assert {"pixel", "latent"} <= names


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  """A run of 4x4x2 latents with a MAE of their decoded 8x8x3 images."""
  folder = tmp_path_factory.mktemp("frozen")
  save_vae(folder / "vae")
  described = {**MAE, "in_channels": 3}
  config = imagenet_latent.get_config("smoke")
  config.vae.update(path=str(folder / "vae"), dtype="float32")
  config.model.update(input_size=4, in_channels=2, out_channels=2)
  config.model.num_classes = 3
  config.batch.labels = 8
  config.encoders.mae.update(path="nowhere", decode=True, dtype="float32")
  config.encoders.mae.model = common.frozen_model("mae", described)
  return config


def open_networks(config):
  """(config, task, encoders, vae, mesh), encoders' parameters abstract."""
  config = parse(config)
  mesh = sharding.make_mesh(2, 4)
  vae = load_vae(config.vae, mesh)
  encoders = load_encoders(config.encoders, mesh, weights=False)
  task = generator_task(config, encoders, mesh, vae)
  return config, task, encoders, vae, mesh


def test_the_autoencoder_is_among_the_frozen_weights(config):
  config = config.copy_and_resolve_references()
  config.vae.sharding = "fsdp"
  typed, task, encoders, vae, mesh = open_networks(config)
  check_encoders(typed, task, encoders, vae)
  assert task.features.decoded == {"mae"} and task.features.vae.remat
  frozen = frozen_params(task, encoders, vae)
  assert frozen.keys() == {"mae", "vae"} and frozen["vae"] is vae.params
  kernel = frozen["vae"]["decoder"]["conv_in"]["kernel"]
  assert kernel.addressable_shards[0].data.size * 4 == kernel.size
  sums = frozen_sums(encoders, vae)
  assert sums.keys() == {"encoders.mae", "vae"} and sums["vae"] == vae.sha256
  # What is compiled ahead of time takes the same.
  train = programs(typed, mesh)[0]
  assert jax.tree.map(
    lambda x: (x.shape, x.dtype, x.sharding), train.arguments["frozen"]
  ) == jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), frozen)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"encoders.mae.model.in_channels": 2},
      r"mae on decoded samples of shape \(8, 8, 3\).*in_channels=2",
    ),
    (
      {"encoders.mae.decode": False},
      r"mae on samples of shape \(4, 4, 2\).*in_channels=3",
    ),
    (
      {"model.in_channels": 4, "model.out_channels": 4},
      r"vae on samples of shape \(4, 4, 4\).*takes 2",
    ),
  ],
)
def test_encoders_are_checked_on_what_they_read(config, changes, message):
  config = config.copy_and_resolve_references()
  config.update_from_flattened_dict(changes)
  typed, task, encoders, vae, _ = open_networks(config)
  with pytest.raises(config_lib.ConfigError, match=message):
    check_encoders(typed, task, encoders, vae)


def test_judges_look_at_decoded_samples(config):
  """Neighbours in the encoder's space, and fd_encoder, which shares it."""
  _, _, encoders, vae, mesh = open_networks(config)
  module = encoders["mae"].module
  images = np.zeros((1, 8, 8, 3), np.float32)
  keys = {"params": jax.random.key(0), "mask": jax.random.key(0)}
  params = {"encoder": jax.jit(module.init)(keys, images)["params"]["encoder"]}
  params = jax.device_put(params, sharding.replicated(mesh))
  encoder = artifacts.Artifact("mae", module, params, {}, "0")
  space = feature_space(
    "encoder", {"mae": encoder}, vae, lambda x: x, mesh, {"mae"}
  )
  latents = np.random.default_rng(0).normal(size=(8, 4, 4, 2))
  latents = latents.astype(np.float32)
  decoded = make_decoder(vae, mesh)(latents)
  expected = apply(module, params, np.asarray(decoded), method="pooled")
  assert_close(space.of_reals(latents), expected, 1e-5)
  assert_close(space.of_samples(latents), expected, 1e-5)
