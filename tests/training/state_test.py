"""Keys of a step, the averages, the encoder's masks, feature names."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from drift_jax.models.mae import MAEOutput, build_mae
from drift_jax.tasks.generator.step import (
  FeatureSpace,
  GeneratorBatch,
  GeneratorTask,
  train_step,
)
from drift_jax.tasks.mae.step import (
  MaeBatch,
  MaeTask,
  mae_eval_step,
  mae_gradients,
  mae_step,
)
from drift_jax.training import state as state_lib
from tests.builders import make_state, random_like
from tests.conftest import assert_close
from tests.models.small import MAE


def at(state, step):
  return state.replace(step=jnp.asarray(step, jnp.int32))


def test_every_step_has_its_own_key():
  state = make_state({"w": jnp.zeros(2)}, optax.identity())
  data = jax.jit(lambda step: jax.random.key_data(at(state, step).key()))
  keys = {tuple(np.asarray(data(step)).tolist()) for step in range(100)}
  assert len(keys) == 100


def test_the_averages_follow_their_own_decays():
  """Two at once against e <- d e + (1 - d) p in float64, over 20 steps."""
  optimizer = state_lib.make_optimizer(
    optax.constant_schedule(0.1),
    b1=0.9,
    b2=0.95,
    eps=1e-8,
    weight_decay=0.0,
    grad_clip=2.0,
  )
  rng = np.random.RandomState(0)
  params = {"w": jnp.asarray(rng.randn(4, 3), jnp.float32)}
  decays = (0.5, 0.99)
  state = make_state(params, optimizer, decays)
  update = jax.jit(functools.partial(state_lib.update, optimizer=optimizer))
  expected = {d: np.asarray(params["w"], np.float64) for d in decays}
  for step in range(20):
    grads = {"w": rng.randn(4, 3).astype(np.float32)}
    before = state.params["w"]
    state = update(state, grads)
    assert int(state.step) == step + 1
    assert not np.array_equal(before, state.params["w"])
    now = np.asarray(state.params["w"], np.float64)
    expected = {d: d * e + (1 - d) * now for d, e in expected.items()}
  assert set(state.ema) == {"0.5", "0.99"}
  for decay, average in expected.items():
    assert_close(state.ema[str(decay)]["w"], average, 1e-6, str(decay))


class Scale(nn.Module):
  """A generator whose only parameter scales its noise: scale * noise."""

  @nn.compact
  def __call__(self, labels, alpha, *, noise, style):
    return self.param("scale", nn.initializers.ones, ()) * noise


def generator_step(learning_rate):
  """(jitted step, state, batch), in raw sample space."""
  guidance = {"minimum": 1.0, "maximum": 4.0, "exponent": 1.0}
  task = GeneratorTask(
    generator=Scale(),
    features=FeatureSpace(encoders={}, options={}, sample=True),
    sample_shape=(2, 2, 1),
    noise_shape=(2, 2, 1),
    style_tokens=1,
    style_vocab=2,
    num_generated=4,
    drift={"temperatures": (0.2,), "affinity_floor": 0.0},
    guidance=guidance | {"no_cfg_frac": 0.0},
  )
  optimizer = optax.sgd(learning_rate)
  rng = np.random.RandomState(0)
  batch = GeneratorBatch(
    labels=np.zeros(2, np.int32),
    positives=rng.randn(2, 5, 2, 2, 1).astype(np.float32),
    unconditional=rng.randn(2, 3, 2, 2, 1).astype(np.float32),
  )
  step = jitted(train_step, task, optimizer, learning_rate, frozen={})
  return step, make_state({"scale": jnp.ones(())}, optimizer), batch


def jitted(step, task, optimizer, learning_rate, **arguments):
  schedule = optax.constant_schedule(learning_rate)
  settings = {"task": task, "optimizer": optimizer, "schedule": schedule}
  return jax.jit(functools.partial(step, **settings, **arguments))


def test_every_step_draws_anew():
  """At learning rate 0 two steps of one batch differ by their draws alone."""
  step, state, batch = generator_step(0.0)
  state, first = step(state, batch)
  _, second = step(state, batch)
  _, again = step(at(state, 0), batch)
  assert float(state.params["scale"]) == 1.0
  for name in ("drift_rms/0.2", "scale/global", "grad_norm"):
    assert float(first[name]) != float(second[name]), name
    assert float(first[name]) == float(again[name]), name


def test_param_norm_is_that_of_the_updated_parameters():
  """An update that overflows shows in its own step's metrics."""
  step, state, batch = generator_step(0.5)
  state, metrics = step(state, batch)
  assert float(metrics["grad_norm"]) > 0
  assert float(metrics["param_norm"]) == abs(float(state.params["scale"])) != 1

  step, state, batch = generator_step(np.inf)
  state, metrics = step(state, batch)
  assert np.isinf(float(state.params["scale"]))
  assert np.isfinite(float(metrics["loss"] + metrics["grad_norm"]))
  assert np.isinf(float(metrics["param_norm"]))


class MeanMae(nn.Module):
  """Fills half of the positions, hidden at random, with a constant."""

  def draw_mask(self, images, mask_ratio):
    draw = jax.random.uniform(self.make_rng("mask"), images.shape[:3])
    return (draw < mask_ratio).astype(jnp.float32)[..., None]

  @nn.compact
  def __call__(self, images, mask):
    fill = self.param("fill", nn.initializers.ones, (images.shape[-1],))
    logits = jnp.stack([jnp.mean(images, (1, 2, 3)) + i for i in range(3)], -1)
    return MAEOutput(
      recon=jnp.broadcast_to(fill, images.shape),
      logits=logits,
      mask=mask,
      target=images,
    )


@pytest.fixture(scope="module")
def mae():
  """(task, parameters, batch of 6 images)."""
  rng = np.random.RandomState(0)
  batch = MaeBatch(
    images=rng.rand(6, 8, 8, 1).astype(np.float32) * 2 - 1,
    labels=np.array([0, 1, 2, 0, 1, 2], np.int32),
  )
  task = MaeTask(
    mae=MeanMae(),
    vae=None,
    mask_ratio=0.5,
    classification_start=100,
    classification_ramp=1,
    classification_weight=0.0,
  )
  return task, {"fill": jnp.ones(1)}, batch


def test_a_classifier_alone_has_the_gradients_of_masks_that_hide_nothing(mae):
  """Where no patch is ever hidden, the decoder may as well be left out."""
  _, _, batch = mae
  classify = functools.partial(
    MaeTask,
    # More groups would divide roundings by 0 on the map of 1 x 1.
    mae=build_mae(**{**MAE, "norm_groups": 2}),
    vae=None,
    classification_start=0,
    classification_ramp=1,
    classification_weight=1.0,
  )
  shapes = jax.eval_shape(
    classify(mask_ratio=0.0).mae.init, jax.random.key(0), batch.images
  )
  params = random_like(shapes)["params"]
  key = jax.random.key(0)
  grads, metrics = {}, {}
  for ratio in (0.0, 1e-30):
    gradients = functools.partial(
      mae_gradients, task=classify(mask_ratio=ratio)
    )
    metrics[ratio], grads[ratio] = jax.jit(gradients)(
      params, batch, None, key, 1.0
    )
  assert metrics[1e-30].pop("recon_loss") == 0
  for of_ratio in (metrics, grads):
    jax.tree.map(functools.partial(assert_close, rtol=1e-5), *of_ratio.values())
  assert float(metrics[0.0]["loss"]) == float(metrics[0.0]["cls_loss"]) > 0


def test_evaluation_counts_the_valid_images_alone(mae):
  """Whatever stands in the padding; all valid is the sum over all."""
  task, params, batch = mae
  evaluate = jax.jit(functools.partial(mae_eval_step, task=task))
  key, number = jax.random.key(2), jnp.asarray(0, jnp.int32)

  def sums(images, valid):
    return evaluate(
      params, batch._replace(images=images), np.array(valid), key, number
    )

  parts = [
    sums(batch.images, np.arange(6) == i)["recon_loss"] for i in range(6)
  ]
  assert min(float(part) for part in parts) > 0
  valid = [True, True, False, True, False, False]
  some = sums(batch.images, valid)
  expected = sum(float(p) for p, v in zip(parts, valid, strict=True) if v)
  assert_close(some["recon_loss"], expected, 1e-5)
  # Every image is taken for class 2: here valid ones are of classes 0 and 1.
  assert float(some["accuracy"]) == 0
  assert float(sums(batch.images, [True] * 6)["accuracy"]) == 2
  other = np.where(np.array(valid)[:, None, None, None], batch.images, 7.0)
  for name, value in sums(other, valid).items():
    assert float(value) == float(some[name]), name
  everything = sums(batch.images, [True] * 6)["recon_loss"]
  assert_close(everything, sum(float(part) for part in parts), 1e-5)
  # Another batch number, another mask.
  shifted = evaluate(
    params, batch, np.array(valid), key, jnp.asarray(6, jnp.int32)
  )
  assert float(shifted["recon_loss"]) != float(some["recon_loss"])


def test_every_encoder_step_draws_another_mask(mae):
  """At learning rate 0 two steps of one batch differ by their masks alone."""
  task, params, batch = mae
  optimizer = optax.sgd(0.0)
  step = jitted(mae_step, task, optimizer, 0.0)
  state, first = step(make_state(params, optimizer), batch)
  _, second = step(state, batch)
  _, again = step(at(state, 0), batch)
  assert float(first["recon_loss"]) != float(second["recon_loss"])
  assert float(first["recon_loss"]) == float(again["recon_loss"])
  assert_close(first["param_norm"], optax.tree.norm(params), 1e-6)


class Pooled(nn.Module):
  """An encoder with two features: gain * the mean and gain * the maximum."""

  @nn.compact
  def features(self, images: Any, gain: float = 1.0) -> dict[str, Any]:
    scale = self.param("scale", nn.initializers.ones, ())
    flat = images.reshape(len(images), 1, -1) * scale * gain
    return {
      "mean": flat.mean(-1, keepdims=True),
      "max": flat.max(-1, keepdims=True),
    }


def test_features_of_several_encoders_carry_their_names():
  """One encoder's keys stay bare; each takes its own parameters, options."""
  images = np.random.RandomState(0).randn(3, 2, 2, 1).astype(np.float32)
  params = {"a": {"scale": jnp.asarray(2.0)}, "b": {"scale": jnp.asarray(3.0)}}
  mean = images.mean((1, 2, 3)).reshape(3, 1, 1)

  alone = FeatureSpace({"a": Pooled()}, {"a": {}}, sample=True)
  features = alone(params, images)
  assert set(features) == {"global", "mean", "max"}
  assert_close(features["mean"], 2.0 * mean, 1e-6)
  np.testing.assert_array_equal(features["global"][:, 0], images.reshape(3, 4))

  both = FeatureSpace(
    {"a": Pooled(), "b": Pooled()}, {"a": {}, "b": {"gain": 5.0}}, sample=False
  )
  features = both(params, images)
  assert set(features) == {"a/mean", "a/max", "b/mean", "b/max"}
  assert_close(features["a/mean"], 2.0 * mean, 1e-6)
  assert_close(features["b/mean"], 15.0 * mean, 1e-6)
