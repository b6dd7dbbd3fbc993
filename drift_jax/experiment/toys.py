"""Toy experiments (5.1): points of the plane in the place of images."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from drift_jax import config as config_lib
from drift_jax import data, drift, metrics, models, steps
from drift_jax.experiment.evaluation import gathered, make_sampler
from drift_jax.experiment.networks import drift_arguments
from drift_jax.experiment.runs import naming, pad_to_mesh

_POINT = (1, 1, 2)
# There is no guidance: one label, alpha 1, no unconditional reals.
_GUIDANCE = {
  "minimum": 1.0,
  "maximum": 1.0,
  "exponent": 1.0,
  "no_cfg_frac": 0.0,
}


def toy_task(config: config_lib.ToyConfig) -> steps.GeneratorTask:
  """The static part of a toy's step, drifting in the plane itself.

  Raises:
    ConfigError: a model that can't be.
  """
  with naming("model"):
    generator = models.build_toy(
      **dataclasses.asdict(config.model), count=config.batch.generated
    )
  return steps.GeneratorTask(
    generator=generator,
    features=steps.FeatureSpace(encoders={}, options={}, sample=True),
    sample_shape=_POINT,
    noise_shape=(1, 1, config.model.noise_size),
    style_tokens=0,
    style_vocab=0,
    num_generated=config.batch.generated,
    **drift_arguments(config.drift),
    guidance=_GUIDANCE,
  )


def init_toy(task: steps.GeneratorTask) -> Callable[[jax.Array], Any]:
  """key -> initial parameters."""

  def init(key: jax.Array) -> Any:
    count = task.num_generated
    return task.generator.init(
      key,
      jnp.zeros(count, jnp.int32),
      jnp.ones(count, jnp.float32),
      noise=jnp.zeros((count, *task.noise_shape), jnp.float32),
      style=jnp.zeros((count, 0), jnp.int32),
    )["params"]

  return init


def toy_feed(config: config_lib.ToyConfig) -> data.ToyFeed:
  """Points of the distribution, drawn anew for each step.

  Raises:
    ConfigError: labels that the processes can't share.
  """
  with naming("data"):
    return data.ToyFeed(
      config.data.distribution,
      noise=config.data.noise,
      seed=config.seed,
      num_labels=config.batch.labels,
      num_positives=config.batch.positives,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )


def toy_sampler(
  config: config_lib.ToyConfig, task: steps.GeneratorTask, mesh: Mesh
) -> Callable[[Any], np.ndarray]:
  """params -> points [n, 2]: eval.num_samples of them, or all particles.

  An MLP's noise is the same at each call.
  """
  sampler = make_sampler(task, mesh, config.seed)
  count = config.eval.num_samples
  drawn = pad_to_mesh(count, mesh)
  if config.has_particles:
    count = config.batch.generated
    drawn = count * mesh.size  # each device has them all

  def sample(params: Any) -> np.ndarray:
    batches = metrics.generate(
      sampler(params), np.zeros(drawn, np.int32), 1.0, batch_size=drawn
    )
    points = [gathered(batch, batch.samples) for batch in batches]
    return np.concatenate(points).reshape(-1, 2)[:count]

  return sample


def make_field(task: steps.GeneratorTask) -> Callable[..., jax.Array]:
  """(samples [N, 2], positives [P, 2], queries [Q, 2], temperature scale) -> V.

  V [Q, 2] in the units of the plane. Each query is made one more generated
  sample, and V is what the training loss moves it by: there is no second code
  for the field. The temperature scale is that of drift.drift_losses.
  """
  normalized = task.variant.normalize_features

  @jax.jit
  def field(
    samples: jax.Array, positives: jax.Array, queries: jax.Array, scale: float
  ) -> jax.Array:
    real = [positives]
    if task.variant.negatives == "independent":
      real.append(samples)
    problem = {"global": jnp.concatenate(real)[None, :, None]}

    def of_one(query: jax.Array) -> jax.Array:
      def loss(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        losses, report = drift.drift_losses(
          {"global": x[None, :, None]},
          problem,
          jnp.ones(1),
          num_positives=len(positives),
          num_unconditional=0,
          **task.drift,
          variant=task.variant,
          temperature_scale=jnp.asarray(scale, jnp.float32),
        )
        return losses.sum(), report.info["scale"][0]

      x = jnp.concatenate([samples, query[None]])
      gradient, mean_distance = jax.grad(loss, has_aux=True)(x)
      # It is -2 V / (N C s), of V in units of s = S / sqrt(C).
      v = gradient[-1] * (-x.size / 2)
      return v * mean_distance**2 / 2 if normalized else v

    return jax.lax.map(of_one, queries)

  return field
