"""The policy's step: loss against float64, meshes, baselines, acting."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from drift_jax.drift import Variant
from drift_jax.system import sharding
from drift_jax.tasks.policy import diffusion
from drift_jax.tasks.policy.step import (
  PolicyBatch,
  PolicyTask,
  act_step,
  draw_policy,
  policy_loss,
  policy_step,
)
from drift_jax.training import state as state_lib
from drift_jax.training.drifting import Temperature
from drift_jax.training.step import gradients_over
from tests.conftest import assert_close, precise_jit

B, G, T, A = 8, 4, 4, 3
TEMPERATURES = (0.1, 0.5)


class Tiny(nn.Module):
  """As models.Policy, in a few products."""

  def encode(self, observations, offsets=None):
    states = observations["state"]
    x = states.reshape(len(states), -1)
    if offsets is not None:
      x += 0.1 * offsets.sum(axis=1, keepdims=True).astype(jnp.float32)
    return x

  @nn.compact
  def act(self, noise, condition, time=None):
    x = jnp.concatenate([noise.reshape(len(noise), -1), condition], axis=1)
    if time is not None:
      x = jnp.concatenate([x, 0.01 * time[:, None].astype(jnp.float32)], axis=1)
    x = jnp.tanh(nn.Dense(16, name="in")(x))
    return nn.Dense(T * A, name="out")(x).reshape(-1, T, A)

  def __call__(self, observations, noise, time=None):
    return self.act(noise, self.encode(observations), time)


TASK = PolicyTask(
  policy=Tiny(),
  method="drifting",
  problem="step",
  num_generated=G,
  diffusion_steps=0,
  action_shape=(T, A),
  crop=None,
  drift={"temperatures": TEMPERATURES, "affinity_floor": 1e-6},
)
make_task = functools.partial(dataclasses.replace, TASK)


def make_batch(seed=0, size=B):
  rng = np.random.default_rng(seed)
  return PolicyBatch(
    {"state": rng.normal(size=(size, 2, 5)).astype(np.float32)},
    rng.uniform(-1, 1, size=(size, T, A)).astype(np.float32),
  )


def make_params(task):
  time = np.zeros(B, np.int32) if task.method == "diffusion" else None
  noise = np.zeros((B, T, A), np.float32)
  init = functools.partial(task.policy.init, jax.random.key(3))
  shapes = jax.eval_shape(init, make_batch().observations, noise, time=time)
  rng = np.random.default_rng(3)
  return jax.tree.map(
    lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), shapes["params"]
  )


def make_draws(task, size=B):
  return jax.jit(functools.partial(draw_policy, task=task, batch_size=size))(
    jax.random.key(0)
  )


def field(x, y, problem_scale, tau, floor=1e-6):
  """The paper's V of G samples x and one positive y, in normalised units."""
  n = len(x)
  targets = np.concatenate([x, y])
  d = np.linalg.norm(x[:, None] - targets, axis=-1)
  d = np.maximum(d, 1e-4)
  unit = max(problem_scale, 1e-3)
  logits = -d / unit / tau
  logits[np.arange(n), np.arange(n)] -= 100 / tau

  def softmax(a, axis):
    e = np.exp(a - a.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)

  affinity = np.sqrt(np.maximum(softmax(logits, 0) * softmax(logits, 1), floor))
  negative, positive = affinity[:, :n], affinity[:, n:]
  w_pos = positive * negative.sum(axis=1, keepdims=True)
  w_neg = negative * positive.sum(axis=1, keepdims=True)
  s = max(problem_scale / np.sqrt(x.shape[1]), 1e-3)
  z, zt = x / s, targets / s
  return (
    w_pos @ zt[n:]
    - w_pos.sum(1, keepdims=True) * z
    - (w_neg @ zt[:n] - w_neg.sum(1, keepdims=True) * z)
  )


def oracle(generated, actions, problem):
  """Gradient of the loss with respect to the generated chunks, in float64."""
  x = np.asarray(generated, np.float64).reshape(B, G, T, A)
  y = np.asarray(actions, np.float64)[:, None]
  if problem == "chunk":
    x, y = x.reshape(B, G, 1, -1), y.reshape(B, 1, 1, -1)
  elif problem == "batch":
    x, y = x.reshape(1, B * G, T, A), y.reshape(1, B, T, A)
  problems = [
    (x[b, :, t], y[b, :, t]) for b in range(len(x)) for t in range(x.shape[2])
  ]
  d = [
    np.linalg.norm(p[:, None] - np.concatenate([p, q]), axis=-1)
    for p, q in problems
  ]
  scale = np.mean(np.maximum(d, 1e-4))
  s = max(scale / np.sqrt(x.shape[3]), 1e-3)
  total = 0.0
  for tau in TEMPERATURES:
    v = np.stack([field(p, q, scale, tau) for p, q in problems])
    total = total + v / np.sqrt(max(np.mean(v**2), 1e-8))
  total = total.reshape(len(x), x.shape[2], x.shape[1], x.shape[3])
  gradient = -2 * total.swapaxes(1, 2) / (x.size * s)
  return np.mean(total**2), gradient.reshape(B * G, T, A)


@pytest.mark.parametrize("problem", ["step", "chunk", "batch"])
def test_loss_and_gradient_follow_the_field(problem):
  task = make_task(problem=problem)
  batch, params = make_batch(), make_params(task)
  draws = make_draws(task)
  condition = np.repeat(task.policy.encode(batch.observations), G, axis=0)

  def generate(params):
    return task.policy.apply(
      {"params": params}, draws.noise, condition, method="act"
    )

  want_loss, upstream = oracle(
    precise_jit(generate)(params), batch.actions, problem
  )
  (want,) = precise_jit(lambda params, up: jax.vjp(generate, params)[1](up))(
    params, np.float32(upstream)
  )
  loss, report, gradients = precise_jit(
    lambda *args: gradients_over(
      functools.partial(policy_loss, task=task), params, args, (), None
    )
  )(batch, draws)
  assert_close(loss, want_loss, 2e-5)
  assert report.keys == ("actions",)
  for found, wanted in zip(
    jax.tree.leaves(gradients), jax.tree.leaves(want), strict=True
  ):
    assert_close(found, wanted, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
  "changes",
  [
    {
      "problem": "chunk",
      "crop": (9, 6),
      "variant": Variant(negatives="independent"),
    },
    {"method": "regression", "num_generated": 1},
    {"method": "diffusion", "diffusion_steps": 10},
    {
      "variant": Variant(learned=True),
      "temperature": Temperature("learned", 1e-2, 1e-6),
    },
  ],
  ids=["chunk", "regression", "ddpm", "step"],
)
def test_one_device_is_eight(changes):
  task = make_task(**changes)
  schedule = state_lib.learning_rate_schedule(
    kind="constant", peak=1e-2, warmup_steps=0, total_steps=3
  )
  optimizer = optax.sgd(schedule)
  results = []
  for devices in (1, 8):
    shape = (devices // 2 or 1, min(2, devices))
    chosen = np.array(jax.devices()[:devices]).reshape(shape)
    mesh = jax.sharding.Mesh(chosen, sharding.BATCH_AXES)
    abstract, init = state_lib.abstract_and_init(
      lambda key: jax.tree.map(jnp.asarray, make_params(task)),
      optimizer,
      ema_decays=(0.9,),
      seed=0,
      mesh=mesh,
      init_drift=task.temperature.init if task.temperature else dict,
    )
    layout = sharding.Layout(mesh, sharding.specs(abstract.params), {})
    step = jax.jit(
      functools.partial(
        policy_step,
        task=task,
        optimizer=optimizer,
        schedule=schedule,
        layout=layout,
      )
    )
    state = init()
    for number in range(3):
      batch = jax.device_put(
        make_batch(number), NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
      )
      state, metrics = step(state, batch, {})
    results.append((jax.device_get(state.params), jax.device_get(metrics)))
  (params, metrics), (many_params, many_metrics) = results
  assert metrics["grad_norm"] > 0
  assert metrics.keys() == many_metrics.keys()
  for name, value in metrics.items():
    np.testing.assert_allclose(many_metrics[name], value, rtol=2e-4, atol=1e-6)
  for found, wanted in zip(
    jax.tree.leaves(many_params), jax.tree.leaves(params), strict=True
  ):
    assert_close(found, wanted, 2e-4)


def loss_of(params, batch, draws, *, task):
  return jax.jit(
    lambda *args: policy_loss(args[0], (), *args[1:], task=task)[0]
  )(params, batch, draws)


def test_baselines_are_their_formulas():
  regression = make_task(method="regression", num_generated=1)
  batch, params = make_batch(), make_params(regression)
  draws = draw_policy(jax.random.key(0), regression, B)
  assert not np.any(draws.noise)
  found = loss_of(params, batch, draws, task=regression)
  chunks = jax.jit(regression.policy.apply)(
    {"params": params}, batch.observations, draws.noise
  )
  assert_close(found, np.mean((np.float64(chunks) - batch.actions) ** 2), 1e-6)

  task = make_task(method="diffusion", diffusion_steps=10)
  params = make_params(task)
  draws = make_draws(task)
  assert len(set(draws.time.tolist())) > 1 and draws.time.max() < 10
  found = loss_of(params, batch, draws, task=task)
  bars = diffusion.alpha_bars(10)[np.asarray(draws.time)][:, None, None]
  clean, observations = jax.tree.map(
    lambda x: np.repeat(x, G, axis=0), (batch.actions, batch.observations)
  )
  noisy = np.sqrt(bars) * clean + np.sqrt(1 - bars) * draws.noise
  eps = jax.jit(task.policy.apply)(
    {"params": params}, observations, np.float32(noisy), time=draws.time
  )
  assert_close(found, np.mean((np.float64(eps) - draws.noise) ** 2), 1e-5)


def test_draws():
  task = make_task(crop=(9, 6), variant=Variant(negatives="independent"))
  draws = make_draws(task, 64)
  assert draws.noise.shape == draws.repelling.shape == (64 * G, T, A)
  assert not np.any(np.equal(draws.noise, draws.repelling))
  assert set(np.unique(draws.offsets)) == {0, 1, 2, 3}
  assert make_draws(make_task(), 2).offsets is None


@pytest.mark.parametrize("method", ["drifting", "diffusion", "regression"])
def test_a_row_acts_by_its_episode_and_call_alone(method):
  changes = {"method": method}
  sampler = None
  if method == "diffusion":
    changes["diffusion_steps"] = 10
    sampler = diffusion.parse_sampler("ddpm:10", 10)
  task = make_task(**changes)
  params, observations = make_params(task), make_batch().observations
  act = jax.jit(functools.partial(act_step, task=task, seed=1, sampler=sampler))
  episodes = np.arange(B)
  chunks = act(params, observations, episodes, 0)
  assert chunks.shape == (B, T, A)
  assert np.abs(chunks).max() <= 1
  turned = jax.tree.map(lambda x: x[::-1], observations)
  assert_close(act(params, turned, episodes[::-1], 0)[::-1], chunks, 1e-6)
  again = act(params, observations, episodes, 1)
  # Only a regression has no noise.
  assert np.array_equal(again, chunks) == (method == "regression")
