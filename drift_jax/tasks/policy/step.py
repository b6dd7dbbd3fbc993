"""The policy's step (5.3): drifting loss on raw actions; baselines; acting."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

from drift_jax.drift.many import DriftReport, drift_losses
from drift_jax.drift.variant import PAPER, Variant
from drift_jax.system import sharding, streams
from drift_jax.tasks.policy import diffusion
from drift_jax.tasks.policy.observations import crop_offsets
from drift_jax.training import state as state_lib
from drift_jax.training.drifting import Temperature, drift_update
from drift_jax.training.step import Metrics, apply, gradients_over, update


class PolicyBatch(NamedTuple):
  """Observation histories and the action chunks that followed them.

  Attributes:
    observations: normalised vectors, or uint8 images, of each name.
    actions: normalised, in [-1, 1].
  """

  observations: dict[str, Shaped[Array, "B To ..."]]
  actions: Float[Array, "B T A"]


class PolicyDraws(NamedTuple):
  """The random numbers of one policy step.

  Attributes:
    noise: one for each chunk; the G of an observation follow each other.
    repelling: noise of independent chunks that repel, if the variant has them.
    time: step of each noise's diffusion; 0 for other methods.
    offsets: corner of each observation's crop; None if nothing is cropped.
  """

  noise: Float[Array, "n T A"]
  repelling: Float[Array, "n T A"] | None
  time: Int[Array, " n"]
  offsets: Int[Array, "B 2"] | None


@dataclasses.dataclass(frozen=True)
class PolicyTask:
  """The static part of a policy's training step.

  Attributes:
    policy: a models.Policy.
    method: 'drifting', or a baseline of the same network: 'diffusion' (noise
      prediction) or 'regression' (mean squared error).
    problem: points of one drift problem: the actions of an observation at a
      time 'step', its whole 'chunk' as a vector, or the actions at a time step
      of all the 'batch', blind to the observations.
    num_generated: G, chunks of an observation: generated ones, or noisy ones of
      'diffusion'; 1 for 'regression'.
    diffusion_steps: noise levels of 'diffusion'; 0 for other methods.
    action_shape: (T, A).
    crop: (side of the images, side of their random crops); None: no crop.
    drift: keyword arguments of drift.drift_losses.
    variant: of drift.drift_losses.
    average: whether the loss is the mean over features: there is one.
    temperature: how the temperatures change in time.
  """

  policy: nn.Module
  method: str
  problem: str
  num_generated: int
  diffusion_steps: int
  action_shape: tuple[int, int]
  crop: tuple[int, int] | None
  drift: Mapping[str, Any]
  variant: Variant = PAPER
  average: bool = False
  temperature: Temperature | None = None


def draw_policy(
  key: PRNGKeyArray, task: PolicyTask, batch_size: int
) -> PolicyDraws:
  """Noise, times and crops of a batch: a stream for each use."""
  noise_key, repelling_key, time_key, crop_key = jax.random.split(key, 4)
  shape = (batch_size * task.num_generated, *task.action_shape)
  if task.method == "regression":
    noise = jnp.zeros(shape)
  else:
    noise = jax.random.normal(noise_key, shape)
  repelling = None
  if task.method == "drifting" and task.variant.negatives == "independent":
    repelling = jax.random.normal(repelling_key, shape)
  time = jnp.zeros(len(noise), jnp.int32)
  if task.method == "diffusion":
    time = jax.random.randint(time_key, time.shape, 0, task.diffusion_steps)
  offsets = task.crop and crop_offsets(crop_key, batch_size, *task.crop)
  return PolicyDraws(noise, repelling, time, offsets)


def policy_loss(
  params: Any,
  axis_name: tuple[str, ...],
  batch: PolicyBatch,
  draws: PolicyDraws,
  temperature_scale: Float[Array, ""] | None = None,
  *,
  task: PolicyTask,
) -> tuple[Float[Array, ""], DriftReport | None]:
  """The loss of a batch, or of its part on a device.

  drifting: drift.drift_losses of G chunks of each observation with the
    demonstrated one as the single positive, scalars shared by all problems;
  diffusion: mean |eps - eps(x_t, t)|^2 over G noises and times t of each
    demonstrated chunk;
  regression: mean |action - f(observation)|^2.

  Returns:
    (loss, report of the drift or None).
  """
  bound = functools.partial(apply, task.policy, params)
  act = functools.partial(bound, method="act")
  seen, offsets = batch.observations, draws.offsets
  condition = bound(seen, offsets=offsets, method="encode")
  # 1. Baselines.
  if task.method == "regression":
    return jnp.mean((act(draws.noise, condition) - batch.actions) ** 2), None
  repeated = jnp.repeat(condition, task.num_generated, axis=0)
  if task.method == "diffusion":
    x = diffusion.add_noise(
      jnp.repeat(batch.actions, task.num_generated, axis=0),
      draws.noise,
      draws.time,
      num_steps=task.diffusion_steps,
    )
    eps = act(x, repeated, time=draws.time)
    return jnp.mean((eps - draws.noise) ** 2), None

  def by_observation(chunks: Float[Array, "n T A"]) -> Float[Array, "B G T A"]:
    return chunks.reshape(-1, task.num_generated, *chunks.shape[1:])

  # 2. Generated chunks, the demonstrated ones, and those that repel.
  real = batch.actions[:, None]
  if draws.repelling is not None:
    repelling = act(draws.repelling, jax.lax.stop_gradient(repeated))
    repelling = jax.lax.stop_gradient(repelling)
    real = jnp.concatenate([real, by_observation(repelling)], axis=1)
  generated = by_observation(act(draws.noise, repeated))
  # 3. The axes of the drift problems: labels, points, locations, channels.
  if task.problem == "chunk":
    generated = generated.reshape(*generated.shape[:2], 1, -1)
    real = real.reshape(*real.shape[:2], 1, -1)
  elif task.problem == "batch":
    # Positives of all observations first, as drift_losses wants them.
    generated = generated.reshape(1, -1, *task.action_shape)
    real = real.swapaxes(0, 1).reshape(1, -1, *task.action_shape)
  losses, report = drift_losses(
    {"actions": generated},
    {"actions": real},
    jnp.ones(len(generated)),
    num_positives=len(batch.actions) if task.problem == "batch" else 1,
    num_unconditional=0,
    **task.drift,
    axis_name=axis_name,
    variant=task.variant,
    temperature_scale=temperature_scale,
  )
  return jnp.mean(losses) if task.average else jnp.sum(losses), report


def policy_step(
  state: state_lib.TrainState,
  batch: PolicyBatch,
  frozen: Any,
  *,
  task: PolicyTask,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
  layout: sharding.Layout | None = None,
) -> tuple[state_lib.TrainState, Metrics]:
  """One training step, whose random numbers follow from state.key().

  Metrics: see drift_update; of a baseline 'loss' and update's. There is nothing
  frozen.
  """
  del frozen
  draws = draw_policy(state.key(), task, len(batch.actions))
  temperature = task.temperature
  scale = None if temperature is None else temperature.scale(state)
  loss, report, grads = gradients_over(
    functools.partial(policy_loss, task=task),
    state.params,
    (batch, draws),
    (scale,),
    layout,
  )
  if report is None:
    state, metrics = update(state, grads, optimizer, schedule)
    return state, metrics | {"loss": loss}
  return drift_update(
    state,
    loss,
    report,
    grads,
    temperature=temperature,
    scale=scale,
    optimizer=optimizer,
    schedule=schedule,
  )


def act_step(
  params: Any,
  observations: Mapping[str, Shaped[Array, "n To ..."]],
  episodes: Int[Array, " n"],
  call: Int[Array, ""],
  *,
  seed: int | Int[Array, ""],
  task: PolicyTask,
  sampler: diffusion.Sampler | None = None,
) -> Float[Array, "n T A"]:
  """Action chunks in [-1, 1]; row i's noise follows from (seed, episode, call).

  Args:
    params: of the policy.
    observations: histories, as in PolicyBatch.
    episodes: numbers of the episodes.
    call: how many chunks they have had before.
    seed: in [0, 2**32).
    task: of the run.
    sampler: of a diffusion policy; the others need one evaluation.
  """
  root = streams.stream(seed, "sample")

  def normal(number: Any) -> jax.Array:
    def of(episode: jax.Array) -> jax.Array:
      key = jax.random.fold_in(jax.random.fold_in(root, episode), call)
      key = jax.random.fold_in(key, number)
      return jax.random.normal(key, task.action_shape)

    return jax.vmap(of)(episodes)

  condition = apply(task.policy, params, observations, method="encode")
  act = functools.partial(apply, task.policy, params, method="act")
  start = normal(0)
  if task.method == "regression":
    start = jnp.zeros_like(start)
  if sampler is None:
    return jnp.clip(act(start, condition), -1.0, 1.0)

  def denoise(x: jax.Array, time: jax.Array) -> jax.Array:
    return act(x, condition, time=jnp.broadcast_to(time, len(x)))

  return diffusion.sample(
    denoise,
    start,
    lambda number: normal(number + 1),
    sampler,
    num_steps=task.diffusion_steps,
  )
