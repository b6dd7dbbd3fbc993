"""A toy's training step: pure, the drifting loss in the plane itself."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from drift_jax.drift.many import DriftReport, drift_losses
from drift_jax.drift.variant import PAPER, Variant
from drift_jax.system import sharding
from drift_jax.training.drifting import Temperature, drift_update
from drift_jax.training.state import TrainState
from drift_jax.training.step import Metrics, apply, gradients_over

# The key of the points themselves among the features of drift_losses.
POINTS_KEY = "global"


class ToyBatch(NamedTuple):
  """One step's data: points of L independent problems."""

  positives: Float[Array, "L P 2"]


class ToyDraws(NamedTuple):
  """The random numbers of one step.

  Attributes:
    noise: noise of the generated samples.
    repelling: noise of the independent samples that repel, if the variant has
      them.
  """

  noise: Float[Array, "LN Z"]
  repelling: Float[Array, "LN Z"] | None = None


@dataclasses.dataclass(frozen=True)
class ToyTask:
  """The static part of a toy's training step.

  Attributes:
    model: from noise [n, Z] to points [n, 2].
    noise_size: Z.
    num_generated: N, samples of a problem.
    drift: keyword arguments of drift.drift_losses.
    variant: variant of drift.drift_losses.
    average: whether the loss is the mean over features; a toy has one.
    temperature: how the temperatures change in time.
  """

  model: nn.Module
  noise_size: int
  num_generated: int
  drift: Mapping[str, Any]
  variant: Variant = PAPER
  average: bool = False
  temperature: Temperature | None = None


def draw_toy(key: PRNGKeyArray, task: ToyTask, num_labels: int) -> ToyDraws:
  """Noise of all samples: a stream for each use."""
  shape = (num_labels * task.num_generated, task.noise_size)
  noise = jax.random.normal(jax.random.split(key, 3)[1], shape)
  repelling = None
  if task.variant.negatives == "independent":
    repelling_key, _ = jax.random.split(jax.random.fold_in(key, 1))
    repelling = jax.random.normal(repelling_key, shape)
  return ToyDraws(noise, repelling)


def plane_loss(
  task: ToyTask,
  points: Float[Array, "L N 1 2"],
  positives: Float[Array, "L P 2"],
  repelling: Float[Array, "L N 1 2"] | None = None,
  axis_name: tuple[str, ...] = (),
  temperature_scale: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], DriftReport]:
  """The mean drifting loss of L problems (eq. 6), and its report.

  Args:
    task: static.
    points: generated samples.
    positives: data.
    repelling: independent samples that repel, if the variant has them.
    axis_name: mesh axes over which the problems are split.
    temperature_scale: multiplies the temperatures; None for 1.
  """
  real = positives[:, :, None]
  if repelling is not None:
    real = jnp.concatenate([real, repelling], axis=1)
  losses, report = drift_losses(
    {POINTS_KEY: points},
    {POINTS_KEY: real},
    jnp.ones(len(positives)),
    num_positives=positives.shape[1],
    num_unconditional=0,
    **task.drift,
    axis_name=axis_name,
    variant=task.variant,
    temperature_scale=temperature_scale,
  )
  return jnp.sum(losses), report


def toy_loss(
  params: Any,
  axis_name: tuple[str, ...],
  batch: ToyBatch,
  draws: ToyDraws,
  temperature_scale: Float[Array, ""] | None,
  *,
  task: ToyTask,
) -> tuple[Float[Array, ""], DriftReport]:
  """plane_loss of the model's samples, as gradients_over calls it."""

  def points(noise: Float[Array, "n Z"]) -> Float[Array, "L N 1 2"]:
    shape = (len(batch.positives), -1, 1, 2)
    return apply(task.model, params, noise).reshape(shape)

  repelling = None
  if draws.repelling is not None:
    repelling = jax.lax.stop_gradient(points(draws.repelling))
  return plane_loss(
    task,
    points(draws.noise),
    batch.positives,
    repelling,
    axis_name,
    temperature_scale,
  )


def toy_step(
  state: TrainState,
  batch: ToyBatch,
  frozen: Any = None,
  *,
  task: ToyTask,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
  layout: sharding.Layout | None = None,
) -> tuple[TrainState, Metrics]:
  """One step of a toy, with draws from state.key(); nothing is frozen.

  Metrics: see drift_update.
  """
  del frozen
  draws = draw_toy(state.key(), task, len(batch.positives))
  scale = None
  if task.temperature is not None:
    scale = task.temperature.scale(state)
  loss, report, grads = gradients_over(
    functools.partial(toy_loss, task=task),
    state.params,
    (batch, draws),
    (scale,),
    layout,
  )
  return drift_update(
    state,
    loss,
    report,
    grads,
    temperature=task.temperature,
    scale=scale,
    optimizer=optimizer,
    schedule=schedule,
  )
