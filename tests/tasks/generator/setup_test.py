"""Frozen networks: what they must be, and how they lie on the mesh."""

import dataclasses
import functools
import operator
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common, digits, imagenet_latent
from drift_jax import config as config_lib
from drift_jax.system import devices, sharding
from drift_jax.tasks import parse, programs
from drift_jax.tasks.generator import setup as networks
from drift_jax.tasks.generator.setup import (
  attention_kernel_for,
  generator_task,
  init_generator,
  kernel_for,
  labels_at_once,
  memory_on_chip_for,
  remat_for,
)
from drift_jax.tasks.generator.step import GeneratorBatch, draw, generator_loss
from drift_jax.training import artifacts, frozen
from drift_jax.training.frozen import load_encoders
from drift_jax.training.step import apply
from tests.builders import random_like, save_model
from tests.conftest import assert_close
from tests.models.small import RESNET

MODEL = {**digits.get_config("encoder").model, "base_channels": 8}


@pytest.fixture(scope="module")
def section(tmp_path_factory):
  """encoders.mae of a small autoencoder that is there."""
  folder = save_model(tmp_path_factory.mktemp("encoder"), "mae", MODEL)
  config = digits.get_config("features")
  config.encoders.mae.update(path=str(folder), dtype="bfloat16")
  config.encoders.mae.model = common.frozen_model("mae", MODEL)
  return parse(config).encoders["mae"]


def load(section, mesh):
  return load_encoders({"mae": section}, mesh)["mae"].params


@pytest.mark.parametrize("way", ["fsdp", "replicated"])
def test_weights_lie_as_the_config_says(section, way):
  section = dataclasses.replace(section, sharding=way)
  mesh = sharding.make_mesh(2, 4)
  params = load(section, mesh)
  kernel = params["encoder"]["stage4_block1"]["conv1"]["kernel"]
  assert kernel.dtype == jax.numpy.bfloat16
  parts = 4 if way == "fsdp" else 1
  assert kernel.addressable_shards[0].data.size * parts == kernel.size
  # compile_check compiles for the very same arrays.
  abstract = load_encoders({"mae": section}, mesh, weights=False)["mae"]
  assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), params) == (
    jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), abstract.params)
  )


def test_kernels_lie_as_cudnn_takes_them(section, tmp_path, monkeypatch):
  """The same numbers and features, of kernels in another order."""
  model = MODEL | {"layers": (5, 1, 1, 1)}
  path = str(save_model(tmp_path, "mae", model))
  section = dataclasses.replace(
    section, path=path, model={}, dtype="float32", sharding="replicated"
  )
  mesh = sharding.make_mesh(8, 1)
  usual = load_encoders({"mae": section}, mesh)["mae"]
  monkeypatch.setattr(frozen, "_CUDNN", "cpu")
  found = load(section, mesh)
  jax.tree.map(np.testing.assert_array_equal, found, usual.params)
  encoder = found["encoder"]
  for name, order in {
    "stem_conv": (0, 1, 2, 3),  # of one channel
    "stage1_blocks/conv1": (4, 0, 1, 2, 3),
    "stage2_block1/conv1": (3, 0, 1, 2),
  }.items():
    kernel = functools.reduce(operator.getitem, name.split("/"), encoder)
    assert kernel["kernel"].format.layout.major_to_minor == order, name
  encode = jax.jit(functools.partial(apply, usual.module, method="features"))
  images = random_like(jax.ShapeDtypeStruct((8, 8, 8, 1), np.float32))
  for key, want in encode(usual.params, images).items():
    assert_close(encode(found, images)[key], want, 1e-5, key)


def test_a_decoder_is_not_read(section, tmp_path):
  """Its names and shapes count, its numbers don't."""
  mesh = sharding.make_mesh(8, 1)
  saved = artifacts.load(section.path)
  params = jax.tree.map(np.copy, saved.params)
  params["decoder"]["head"]["kernel"][:] = np.nan
  artifacts.save(
    tmp_path,
    kind="mae",
    model_config=saved.metadata["model_config"],
    params=params,
    step=1,
    ema_decay=0.9,
  )
  spoiled = dataclasses.replace(section, path=str(tmp_path))
  jax.tree.map(
    np.testing.assert_array_equal, load(spoiled, mesh), load(section, mesh)
  )
  with pytest.raises(artifacts.ArtifactError, match="decoder/head/kernel hold"):
    artifacts.load(tmp_path)


def test_encoders_recompute_if_the_config_says_so(section):
  mesh = sharding.make_mesh(8, 1)
  for remat in (False, True):
    changed = {"mae": dataclasses.replace(section, remat=remat)}
    for weights in (True, False):
      encoders = load_encoders(changed, mesh, weights=weights)
      assert encoders["mae"].module.remat == remat


@pytest.mark.slow
def test_a_generator_of_pixels_drifts_in_a_resnets_features(tmp_path):
  model = RESNET | {"layers": (1, 2, 1, 1)}
  save_model(tmp_path, "resnet", model)
  raw = digits.get_config()
  raw.model.update(in_channels=3, out_channels=3, hidden_size=8, cond_dim=8)
  raw.model.update(depth=1, num_heads=2)
  raw.batch.update(labels=1, generated=2, positives=1, unconditional=1)
  raw.features.update(patch_mean_size=(), patch_std_size=(), sample=False)
  raw.features.update(use_mean=False, use_std=False)
  common.add_encoder(raw, "moco", str(tmp_path), "resnet", ConfigDict(model))
  raw.encoders.moco.dtype = "float32"
  config = parse(raw)
  mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
  encoders = load_encoders(config.encoders, mesh)
  task = generator_task(config, encoders, mesh)
  networks.check_encoders(config, task, encoders, None)
  frozen = {name: artifact.params for name, artifact in encoders.items()}
  params = random_like(jax.eval_shape(init_generator(task), jax.random.key(0)))
  images = np.random.RandomState(0).uniform(-1, 1, (2, 1, 1, 8, 8, 3))
  batch = GeneratorBatch(np.zeros(1, np.int32), *np.float32(images))
  draws = draw(jax.random.key(1), task, 1)

  def loss(params):
    value, aux = generator_loss(params, batch, draws, frozen, task)
    return value, aux["losses"]

  (value, losses), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(
    params
  )
  assert losses.shape == (1 + 6,)  # norm_x, and the locations of six maps
  assert np.isfinite(losses).all()
  assert np.isclose(value, np.sum(losses), rtol=1e-5)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
  assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(gradients))


def test_other_models_are_refused(section):
  mesh = sharding.make_mesh(8, 1)
  for model, weights, message in (
    ({**section.model, "base_channels": 16}, True, "channels: 8, want 16"),
    ({"kind": "gen"}, False, "a model of kind 'gen', want one of"),
    ({"kind": "mae"}, False, r"encoders\.mae\.model: arguments of 'mae' lack"),
  ):
    changed = {"mae": dataclasses.replace(section, model=model)}
    with pytest.raises(artifacts.ArtifactError, match=message):
      load_encoders(changed, mesh, weights=weights)
  load(dataclasses.replace(section, model={}), mesh)  # takes any


class _Device(NamedTuple):
  platform: str
  compute_capability: str = ""
  device_kind: str = ""


class _Mesh(NamedTuple):
  devices: np.ndarray


@pytest.mark.parametrize(
  ("kernels", "device", "expected", "attention"),
  [
    ("auto", _Device("tpu"), "pallas", "pallas"),
    ("auto", _Device("gpu", "10.0"), "early", "cudnn"),
    ("auto", _Device("gpu", "7.5"), "early", "xla"),
    ("auto", _Device("gpu", "gfx90a"), "early", "xla"),
    ("xla", _Device("gpu", "10.0"), "xla", "xla"),
    ("auto", _Device("cpu"), "xla", "xla_by_head"),
    ("xla", _Device("cpu"), "xla", "xla"),
    ("xla", _Device("tpu"), "xla", "xla"),
    ("pallas", _Device("tpu"), "pallas", "pallas"),
  ],
)
def test_kernels_follow_the_devices(kernels, device, expected, attention):
  devices = np.empty(1, object)
  devices[0] = device
  mesh: Any = _Mesh(devices)
  assert kernel_for(kernels, mesh) == expected
  assert attention_kernel_for(kernels, mesh) == attention
  on_gpu = device.platform == "gpu"
  assert remat_for("auto", mesh) == ("full" if on_gpu else "attention")
  assert remat_for("branches", mesh) == "branches"


def test_branches_are_computed_on_chips_with_the_memory():
  def memory(kernels, kind):
    devices = np.empty(1, object)
    devices[0] = _Device("tpu", device_kind=kind)
    mesh: Any = _Mesh(devices)
    return memory_on_chip_for(kernels, mesh)

  assert memory("auto", "TPU v6 lite") == memory("pallas", "TPU v5 lite")
  assert 0 < memory("auto", "TPU v5") < memory("auto", "TPU v5 lite") < 2**27
  assert memory("auto", "TPU v4") == memory("xla", "TPU v6 lite") == 0


def test_kernels_of_other_devices_are_an_error():
  config = parse(digits.get_config())
  train = dataclasses.replace(config.train, kernels="pallas")
  config = dataclasses.replace(config, train=train)
  with pytest.raises(
    config_lib.ConfigError, match="train.kernels='pallas' needs TPUs, .* cpu"
  ):
    generator_task(config, {}, sharding.make_mesh())


def test_label_groups_are_the_configs():
  config = parse(digits.get_config())
  assert config.batch.labels == 16
  mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
  for at_once, scalars, expected in (
    (0, "exact", (1, True)),
    (4, "exact", (4, True)),
    (8, "group", (2, False)),
  ):
    train = dataclasses.replace(
      config.train, accum_labels=at_once, accum_scalars=scalars
    )
    task = generator_task(dataclasses.replace(config, train=train), {}, mesh)
    assert (task.groups, task.exact) == expected
  with pytest.raises(
    config_lib.ConfigError, match=r"accum_labels=4 can't be split over the 8"
  ):
    train = dataclasses.replace(config.train, accum_labels=4)
    programs(dataclasses.replace(config, train=train), sharding.make_mesh())


@pytest.mark.parametrize(
  ("card", "count", "changes", "expected"),
  [
    ("h100", 8, {}, 32),
    ("h100", 1, {"batch.labels": 4}, 4),
    ("rtx4090", 1, {}, 1),
    ("h100", 8, {"batch.negatives": 192}, 16),
    ("h100", 8, {"train.accum_labels": 8}, 8),
    ("h100", 8, {"train.accum_labels": 0}, 128),
    ("h100", 8, {"train.accum_scalars": "group"}, 128),
    ("unknown", 8, {}, 128),
    ("TPU v6 lite", 8, {}, 128),
  ],
)
def test_as_many_labels_at_once_as_fit_a_gpu(card, count, changes, expected):
  config = imagenet_latent.get_config("l2")
  config.update_from_flattened_dict(changes)
  known = devices.CARDS.get(card)
  device = mock.Mock(
    platform="tpu" if card.startswith("TPU") else "gpu",
    device_kind=known.kind if known else card,
    memory_stats=dict,
  )
  mesh = mock.Mock(devices=np.array([device] * count), size=count)
  assert labels_at_once(parse(config), mesh) == expected


def test_few_blocks_are_unrolled_on_a_cpu():
  config = parse(digits.get_config())
  one = sharding.make_mesh(1, 1, jax.devices()[:1])
  for depth, mesh, expected in (
    (3, one, 3),
    (12, one, 1),
    (3, sharding.make_mesh(1, 8), 1),
  ):
    model = dataclasses.replace(config.model, depth=depth)
    task = generator_task(dataclasses.replace(config, model=model), {}, mesh)
    assert task.generator.unroll == expected
