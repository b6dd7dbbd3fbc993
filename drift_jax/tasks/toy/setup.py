"""Objects of a toy run, from its config: task, feed, sampler, field."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from drift_jax.system import sharding
from drift_jax.system.errors import naming
from drift_jax.system.streams import stream
from drift_jax.tasks.toy.config import ToyConfig
from drift_jax.tasks.toy.data import ToyFeed
from drift_jax.tasks.toy.model import Mlp, Particles
from drift_jax.tasks.toy.step import ToyBatch, ToyTask, plane_loss, toy_step
from drift_jax.training import state as state_lib
from drift_jax.training.drifting import drift_arguments, init_drift
from drift_jax.training.run import Recipe
from drift_jax.training.step import apply


def toy_task(config: ToyConfig) -> ToyTask:
  """The static part of a toy's step.

  Raises:
    ConfigError: a drifting field that can't be.
  """
  section = config.model
  if config.has_particles:
    model = Particles(config.batch.generated, section.location, section.spread)
  else:
    arguments = dataclasses.asdict(section)
    del arguments["kind"]
    model = Mlp(**arguments)
  return ToyTask(
    model=model,
    noise_size=config.model.noise_size,
    num_generated=config.batch.generated,
    **drift_arguments(config.drift),
  )


def init_toy(task: ToyTask) -> Callable[[jax.Array], Any]:
  """key -> initial parameters."""
  noise = jnp.zeros((task.num_generated, task.noise_size), jnp.float32)
  return lambda key: task.model.init(key, noise)["params"]


def toy_optimizer(
  config: ToyConfig,
) -> Callable[[optax.Schedule], optax.GradientTransformation] | None:
  """schedule -> optimiser of particles; None for AdamW.

  A step of particles is x <- x + eta V, eta by the schedule. The loss' gradient
  with respect to a sample is -2 V / (N C) on raw distances, with C = 2
  coordinates in the plane: this is gradient descent of rate eta N C / 2 =
  eta N.
  """
  if not config.has_particles:
    return None
  count = config.batch.generated
  return lambda schedule: state_lib.with_standard_promotion(
    optax.sgd(lambda step: schedule(step) * count)
  )


def toy_recipe(config: ToyConfig, task: ToyTask) -> Recipe:
  """How points are moved, or a network that makes them is trained."""
  return Recipe(
    name=config.model.kind,
    init_params=init_toy(task),
    init_drift=functools.partial(init_drift, task.temperature),
    make_optimizer=toy_optimizer(config),
    step=functools.partial(toy_step, task=task),
    batch=ToyBatch,
    frozen={},
  )


def toy_feed(config: ToyConfig) -> ToyFeed:
  """Points of the distribution, drawn anew for each step.

  Raises:
    ConfigError: labels that the processes can't share.
  """
  with naming("data"):
    return ToyFeed(config, jax.process_index(), jax.process_count())


def toy_sampler(
  config: ToyConfig, task: ToyTask, mesh: Mesh
) -> Callable[[Any], np.ndarray]:
  """params -> points [config.num_samples, 2].

  An MLP's noise is the same at each call.
  """
  root = stream(config.seed, "sample")

  def noise_of(number: jax.Array) -> jax.Array:
    key, _ = jax.random.split(jax.random.fold_in(root, number))
    return jax.random.normal(key, (task.noise_size,))

  @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
  def sample(params: Any) -> jax.Array:
    return apply(
      task.model, params, jax.vmap(noise_of)(jnp.arange(config.num_samples))
    )

  return lambda params: np.asarray(sample(params))


def make_field(task: ToyTask) -> Callable[..., jax.Array]:
  """(samples [N, 2], positives [P, 2], queries [Q, 2], temperature scale) -> V.

  V [Q, 2] in the units of the plane. Each query is made one more generated
  sample, and V is what the training loss moves it by: there is no second code
  for the field. The temperature scale is that of drift.drift_losses.
  """
  normalized = task.variant.normalize_features
  independent = task.variant.negatives == "independent"

  @jax.jit
  def field(
    samples: jax.Array, positives: jax.Array, queries: jax.Array, scale: float
  ) -> jax.Array:
    repelling = samples[None, :, None] if independent else None

    def of_one(query: jax.Array) -> jax.Array:
      def loss(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        value, report = plane_loss(
          task,
          x[None, :, None],
          positives[None],
          repelling,
          temperature_scale=jnp.asarray(scale, jnp.float32),
        )
        return value, report.info["scale"][0]

      x = jnp.concatenate([samples, query[None]])
      gradient, mean_distance = jax.grad(loss, has_aux=True)(x)
      # The gradient is -2 V / (N C s), with V in units of s = S / sqrt(C).
      v = gradient[-1] * (-x.size / 2)
      return v * mean_distance**2 / 2 if normalized else v

    return jax.lax.map(of_one, queries)

  return field
