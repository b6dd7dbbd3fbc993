"""The step that tunes a generator by Frechet distances (drift.frechet).

  loss = sum over spaces of FD / tr(S_r) + trust * mean (x - x_0)^2

FD is between the moments of real features and those of many generated samples:
running means over steps. x_0 is what the generator made of the same noise,
label and alpha before it was tuned.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from drift_jax.drift import frechet
from drift_jax.drift.frechet import Moments, Reference
from drift_jax.system import sharding
from drift_jax.tasks.generator.step import VAE_KEY, GeneratorTask, draw
from drift_jax.training import state as state_lib
from drift_jax.training import step as step_lib

# The space of the sample itself, flattened; no encoder has that name.
SAMPLE = "sample"


class LabelBatch(NamedTuple):
  """One step's labels."""

  labels: Int[Array, " L"]


class Frozen(NamedTuple):
  """What a step reads and never changes.

  Attributes:
    networks: {name: parameters}, the autoencoder's as VAE_KEY.
    references: {name of a space: moments of real features}.
    start: the generator's first parameters; None without a trust term.
  """

  networks: Mapping[str, Any]
  references: Mapping[str, Reference]
  start: Any


@dataclasses.dataclass(frozen=True)
class Spaces:
  """One feature vector of each image from each network.

  Attributes:
    encoders: {name: module with a `pooled` method}, of samples as they are.
    decoded: names of the encoders that read decoded samples.
    judges: {name: module with a `smooth` method}, of decoded 8-bit RGB.
    sample: whether the flattened sample is a space as well.
    vae: decodes samples; None if they are pixels.
  """

  encoders: Mapping[str, nn.Module]
  decoded: Collection[str]
  judges: Mapping[str, nn.Module]
  sample: bool
  vae: nn.Module | None

  def __call__(
    self, networks: Mapping[str, Any], samples: Float[Array, "n H W C"]
  ) -> dict[str, Float[Array, "n D"]]:
    """{name: features}; gradients flow to the samples."""
    pixels = samples
    if self.vae is not None and (self.decoded or self.judges):
      pixels = step_lib.apply(
        self.vae, networks[VAE_KEY], samples, method="decode"
      )
    out = {}
    if self.sample:
      out[SAMPLE] = samples.reshape(len(samples), -1)
    for name, module in self.encoders.items():
      images = pixels if name in self.decoded else samples
      out[name] = step_lib.apply(
        module, networks[name], images, method="pooled"
      )
    for name, module in self.judges.items():
      # As judges see them: 8 bits end at black and white.
      rgb = (jnp.clip(pixels.astype(jnp.float32), -1, 1) + 1) * 127.5
      rgb = jnp.broadcast_to(rgb, (*rgb.shape[:3], 3))
      out[name] = step_lib.apply(module, networks[name], rgb, method="smooth")
    return out


@dataclasses.dataclass(frozen=True)
class FdTask:
  """The static part of the step.

  Attributes:
    base: generator and how its inputs are drawn.
    spaces: where distances are measured.
    population: samples that the running moments stand for.
    trust: weight of the distance from the first generator's samples.
  """

  base: GeneratorTask
  spaces: Spaces
  population: int
  trust: float

  def weight(
    self, step: Int[Array, ""], batch: int
  ) -> tuple[Float[Array, ""], jax.Array]:
    """Returns (weight of a step's moments, whether the population is full).

    First all steps count alike. Of a population P of batches of B, an average
    with weight w = 2B / (P + B) has the variance of a mean over P samples, and
    their mean age.
    """
    full = step >= -(-self.population // batch)
    alike = 1.0 / (step.astype(jnp.float32) + 1.0)
    weight = jnp.where(full, 2.0 * batch / (self.population + batch), alike)
    return weight, full


def init_moments(
  references: Mapping[str, Reference],
) -> dict[str, Moments]:
  """TrainState.drift at the start."""
  return {
    name: Moments(*(jnp.zeros(real.variances.shape * n) for n in range(3)))
    for name, real in references.items()
  }


def fd_loss(
  params: Any,
  axes: tuple[str, ...],
  labels: Int[Array, " n"],
  alpha: Float[Array, " n"],
  noise: Float[Array, "n H W C"],
  style: Int[Array, "n S"],
  held: Mapping[str, Moments],
  weight: Float[Array, ""],
  frozen: Frozen,
  *,
  task: FdTask,
) -> tuple[Float[Array, ""], Any]:
  """Loss of a batch, or of this device's part of it.

  The value is that at the running moments, this batch's included. The gradient
  is that of FD there, by the moments of the batch alone and whatever its weight
  in them: in the mean over batches, the gradient of a population's FD.

  Returns:
    (loss, (running moments, metrics)); metrics are 'fd/SPACE' in squared units
    of its features and 'trust', the mean square.
  """

  def generate(params: Any) -> jax.Array:
    return step_lib.apply(
      task.base.generator, params, labels, alpha, noise=noise, style=style
    )

  # 1. Samples and their features.
  samples = generate(params)
  features = task.spaces(frozen.networks, samples)
  loss, running, metrics = jnp.zeros(()), {}, {}
  for name, vectors in features.items():
    # 2. Moments here, over all devices, and over steps.
    real = frozen.references[name]
    here = frechet.moments_of(vectors, real)
    whole = jax.lax.stop_gradient(here)
    if axes:
      whole = jax.lax.pmean(whole, axes)
    running[name] = frechet.blend(held[name], whole, weight)
    # 3. FD there, and its change by this batch's moments.
    value, slope = frechet.distance(running[name], real)
    change = frechet.linear(slope, here)
    change -= jax.lax.stop_gradient(change)
    loss += (value + change) / real.trace
    metrics[f"fd/{name}"] = value
  # 4. The distance from what the first generator makes.
  if frozen.start is not None:
    before = jax.lax.stop_gradient(generate(frozen.start))
    square = jnp.mean(jnp.square(samples - before).astype(jnp.float32))
    loss += task.trust * square
    metrics["trust"] = jax.lax.pmean(square, axes) if axes else square
  return loss, (running, metrics)


def train_step(
  state: state_lib.TrainState,
  batch: LabelBatch,
  frozen: Frozen,
  *,
  task: FdTask,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
  layout: sharding.Layout | None = None,
) -> tuple[state_lib.TrainState, step_lib.Metrics]:
  """One step; until the population is full its gradient is zero.

  Metrics: 'loss', fd_loss's and step_lib.update's.
  """
  base = task.base
  draws = draw(state.key(), base, len(batch.labels))
  labels, alpha = (
    jnp.repeat(x, base.num_generated) for x in (batch.labels, draws.alpha)
  )
  weight, full = task.weight(state.step, len(labels))

  def loss_of(params: Any, axes: tuple[str, ...], *arguments: Any) -> Any:
    return fd_loss(params, axes, *arguments, task=task)

  loss, (running, metrics), grads = step_lib.gradients_over(
    loss_of,
    state.params,
    (labels, alpha, draws.noise, draws.style),
    (state.drift, weight, frozen),
    layout,
  )
  grads = jax.tree.map(lambda x: jnp.where(full, x, jnp.zeros_like(x)), grads)
  state, updated = step_lib.update(state, grads, optimizer, schedule)
  state = dataclasses.replace(state, drift=running)
  return state, {"loss": loss, **metrics, **updated}
