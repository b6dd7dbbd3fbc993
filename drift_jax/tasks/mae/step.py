"""The encoder's step (A.3): masked reconstruction and classification."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from drift_jax.models import mae as mae_lib
from drift_jax.models import vae as vae_lib
from drift_jax.system import sharding
from drift_jax.training import state as state_lib
from drift_jax.training import step as step_lib


class MaeBatch(NamedTuple):
  """Images and their labels; images are as they travel, see from_wire."""

  images: Shaped[Array, "B H W C"]
  labels: Int[Array, " B"]


@dataclasses.dataclass(frozen=True)
class MaeTask:
  """The static part of an encoder's training step.

  Attributes:
    mae: the encoder with its decoder.
    vae: encodes the images into the latents that the encoder takes, or None.
    mask_ratio: probability that a patch is hidden; 0 leaves the decoder out.
    classification_start: step at which the fine-tune begins.
    classification_ramp: steps until its weight is full.
    classification_weight: the full weight.
  """

  mae: nn.Module
  vae: vae_lib.Vae | None
  mask_ratio: float
  classification_start: int
  classification_ramp: int
  classification_weight: float


def classification_lambda(
  step: Int[Array, ""], task: MaeTask
) -> Float[Array, ""]:
  """Weight of the classification loss: 0, then linear to its final value."""
  ramp = (step - task.classification_start) / task.classification_ramp
  return task.classification_weight * jnp.clip(ramp, 0.0, 1.0)


def mae_inputs(
  images: Shaped[Array, "B H W C"],
  vae_params: Any,
  noise: Float[Array, "B h w c"] | None,
  task: MaeTask,
) -> Float[Array, "B h w c"]:
  """Returns the encoder's inputs: images, or their latents under task.vae.

  With noise, latents are drawn from their distribution; without, they are its
  means.
  """
  images = step_lib.from_wire(images)
  if task.vae is None:
    return images
  moments = step_lib.apply(task.vae, vae_params, images, method="encode")
  scaling = task.vae.scaling_factor
  if noise is None:
    return vae_lib.latent_mean(moments, scaling_factor=scaling)
  return vae_lib.sample_latents(moments, noise, scaling_factor=scaling)


def _latent_shape(
  images: Shaped[Array, "B H W C"], task: MaeTask
) -> tuple[int, ...]:
  """Returns the shape of the encoder's inputs."""
  if task.vae is None:
    return images.shape
  batch, height, width, _ = images.shape
  factor = task.vae.downsampling
  channels = task.vae.latent_channels
  return (batch, height // factor, width // factor, channels)


def _draw_mask(
  key: PRNGKeyArray, images: Shaped[Array, "B H W C"], task: MaeTask
) -> Float[Array, "B h w 1"]:
  """Draws the masks of a whole batch."""
  mask: Any = task.mae.apply(
    {},
    jnp.zeros(_latent_shape(images, task)),
    task.mask_ratio,
    method="draw_mask",
    rngs={"mask": key},
  )
  return mask


class _MaeRest(NamedTuple):
  """Labels, masks and noise of latents that go with a batch of images."""

  labels: Int[Array, " B"]
  mask: Float[Array, "B h w 1"]
  noise: Float[Array, "B h w c"] | None


def _mae_parts(
  params: Any,
  vae_params: Any,
  images: Shaped[Array, "B H W C"],
  rest: _MaeRest,
  lam: Any,
  task: MaeTask,
) -> dict[str, Float[Array, " B"]]:
  """Returns the parts of the loss of each image."""
  inputs = mae_inputs(images, vae_params, rest.noise, task)
  if task.mask_ratio:
    output = step_lib.apply(task.mae, params, inputs, mask=rest.mask)
  else:  # nothing is hidden, so there is nothing to reconstruct
    _, logits = step_lib.apply(task.mae, params, inputs, method="classify")
    output = mae_lib.MAEOutput(rest.mask, logits, rest.mask, rest.mask)
  parts = mae_lib.mae_loss(output, rest.labels, lam)
  if not task.mask_ratio:
    del parts["recon_loss"]
  return parts


def mae_eval_step(
  params: Any,
  batch: MaeBatch,
  valid: Bool[Array, " B"],
  key: PRNGKeyArray,
  number: Int[Array, ""],
  vae_params: Any = None,
  *,
  task: MaeTask,
  layout: sharding.Layout | None = None,
) -> step_lib.Metrics:
  """Sums over the valid images of reconstruction loss and accuracy.

  The masks depend on (key, number) alone.
  """
  key = jax.random.fold_in(key, number)
  rest = _MaeRest(batch.labels, _draw_mask(key, batch.images, task), None)

  def parts_of(
    params: Any, vae_params: Any, images: jax.Array, rest: _MaeRest
  ) -> dict[str, jax.Array]:
    return _mae_parts(params, vae_params, images, rest, 0.0, task)

  if layout is not None:
    parts_of = sharding.over_devices(
      _on_whole(parts_of, layout, task),
      layout.mesh,
      (layout.params, layout.frozen, step_lib.SPLIT, step_lib.SPLIT),
      step_lib.SPLIT,
    )
  parts = parts_of(params, vae_params, batch.images, rest)
  return {
    name: jnp.sum(jnp.where(valid, parts[name], 0.0))
    for name in ("recon_loss", "accuracy")
    if name in parts
  }


def _on_whole(
  function: Callable[..., Any], layout: sharding.Layout, task: MaeTask
) -> Callable[..., Any]:
  """Makes a function of whole parameters one of parts of them."""

  def on_parts(params: Any, vae_params: Any, *others: Any) -> Any:
    return function(
      sharding.gather(params, layout.params, step_lib.early_dtype(task.mae)),
      sharding.gather(vae_params, layout.frozen),
      *others,
    )

  return on_parts


def mae_gradients(
  params: Any,
  batch: MaeBatch,
  vae_params: Any,
  key: PRNGKeyArray,
  lam: Any,
  task: MaeTask,
  layout: sharding.Layout | None = None,
) -> tuple[step_lib.Metrics, Any]:
  """Returns (means over the batch of the loss' parts, gradients of 'loss').

  The loss is lam * CE + (1 - lam) * reconstruction (A.3).
  """
  # The mask's key is the step's own, with or without an autoencoder.
  noise = None
  if task.vae is not None:
    noise = jax.random.normal(
      jax.random.fold_in(key, 1), _latent_shape(batch.images, task)
    )
  rest = _MaeRest(batch.labels, _draw_mask(key, batch.images, task), noise)

  def loss(
    params: Any, vae_params: Any, images: jax.Array, rest: _MaeRest, lam: Any
  ) -> tuple[jax.Array, step_lib.Metrics]:
    parts = _mae_parts(params, vae_params, images, rest, lam, task)
    means = {name: jnp.mean(value) for name, value in parts.items()}
    return means["loss"], means

  if layout is None:
    grads, metrics = jax.grad(loss, has_aux=True)(
      params, vae_params, batch.images, rest, lam
    )
    return metrics, grads
  on_parts = sharding.regather(
    _on_whole(loss, layout, task), (layout.params, layout.frozen)
  )

  def local(
    params: Any, vae_params: Any, images: jax.Array, rest: _MaeRest, lam: Any
  ) -> tuple[step_lib.Metrics, Any]:
    def share(params: Any) -> tuple[jax.Array, step_lib.Metrics]:
      value, metrics = on_parts(params, vae_params, images, rest, lam)
      return value / layout.mesh.size, metrics

    grads, metrics = jax.grad(share, has_aux=True)(params)
    grads = sharding.sum_gradients(grads, layout.params)
    return jax.lax.pmean(metrics, sharding.BATCH_AXES), grads

  return sharding.over_devices(
    local,
    layout.mesh,
    (
      layout.params,
      layout.frozen,
      step_lib.SPLIT,
      step_lib.SPLIT,
      step_lib.WHOLE,
    ),
    (step_lib.WHOLE, layout.params),
  )(params, vae_params, batch.images, rest, lam)


def mae_step(
  state: state_lib.TrainState,
  batch: MaeBatch,
  vae_params: Any = None,
  *,
  task: MaeTask,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
  layout: sharding.Layout | None = None,
) -> tuple[state_lib.TrainState, step_lib.Metrics]:
  """One step of encoder training (A.3); vae_params are task.vae's."""
  lam = classification_lambda(state.step, task)
  metrics, grads = mae_gradients(
    state.params, batch, vae_params, state.key(), lam, task, layout
  )
  state, more = step_lib.update(state, grads, optimizer, schedule)
  return state, metrics | {"classification_lambda": lam} | more
