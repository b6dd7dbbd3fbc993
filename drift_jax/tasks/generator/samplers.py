"""Sampling: numbered noise to images, jitted on a mesh, and grids of them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from drift_jax.metrics import generation
from drift_jax.metrics.batches import Batch
from drift_jax.metrics.generation import SampleFn
from drift_jax.metrics.images import Images, as_shown, image_grid
from drift_jax.system import processes, sharding, streams
from drift_jax.tasks.generator.step import GeneratorTask, gather_blockwise
from drift_jax.training.step import SPLIT, apply


def sample_inputs(
  index: Int[Array, " n"],
  *,
  seed: int | Int[Array, ""],
  task: GeneratorTask,
  style: Int[Array, " S"] | None = None,
) -> tuple[Float[Array, "n H W C"], Int[Array, "n S"]]:
  """Draws noise and style of samples, each from (seed, index[i]) alone.

  Args:
    index: number of each sample.
    seed: integer in [0, 2**32); may be traced.
    task: gives their shapes.
    style: indices that all samples share; -1 leaves one to chance. None: all.
  """
  root = streams.stream(seed, "sample")

  def inputs_of(i: jax.Array) -> tuple[jax.Array, jax.Array]:
    noise_key, style_key = jax.random.split(jax.random.fold_in(root, i))
    noise = jax.random.normal(noise_key, task.noise_shape)
    drawn = jax.random.randint(
      style_key, (task.style_tokens,), 0, max(task.style_vocab, 1)
    )
    return noise, drawn

  noise, drawn = jax.vmap(inputs_of)(index)
  return noise, drawn if style is None else jnp.where(style < 0, drawn, style)


def generate(
  params: Any,
  labels: Int[Array, " n"],
  alpha: Float[Array, " n"],
  noise: Float[Array, "n H W C"],
  style: Int[Array, "n S"],
  *conditions: Float[Array, "n ... E"],
  task: GeneratorTask,
  layout: sharding.Layout | None = None,
) -> Float[Array, "n H W F"]:
  """Generates samples by one forward pass, on a mesh with a layout.

  There is one array of conditions, or none. Samples that are images lie in
  [-1, 1], see as_shown.
  """

  def local(params: Any, *inputs: jax.Array) -> jax.Array:
    generator = task.generator
    if layout is not None:
      generator, params = gather_blockwise(generator, params, layout)
    labels, alpha, noise, style, *given = inputs
    return apply(
      generator, params, labels, alpha, *given, noise=noise, style=style
    )

  inputs = (labels, alpha, noise, style, *conditions)
  if layout is not None:
    local = sharding.over_devices(
      local, layout.mesh, (layout.params, *[SPLIT] * len(inputs)), SPLIT
    )
  samples = local(params, *inputs)
  return as_shown(samples) if task.pixels else samples


def sample_step(
  params: Any,
  labels: Int[Array, " n"],
  alpha: Float[Array, " n"],
  index: Int[Array, " n"],
  *conditions: Float[Array, "n ... E"],
  seed: int | Int[Array, ""],
  task: GeneratorTask,
  style: Int[Array, " S"] | None = None,
  layout: sharding.Layout | None = None,
) -> Float[Array, "n H W F"]:
  """Generates samples in [-1, 1] (or latents) from numbered noise.

  See sample_inputs. Any batch size, order and number of devices gives the same
  samples.
  """
  noise, style = sample_inputs(index, seed=seed, task=task, style=style)
  inputs = (labels, alpha, noise, style, *conditions)
  return generate(params, *inputs, task=task, layout=layout)


def jit_sampler(task: GeneratorTask, mesh: Mesh) -> Any:
  """Jitted (params, seed, style, labels, alpha, index) -> samples.

  Samples, labels, alpha and index are split over the mesh, and conditions,
  which a model of such has after them; all samples share seed and style, see
  sample_step.
  """

  def sample(
    params: Any, seed: jax.Array, style: jax.Array, *of_each: jax.Array
  ) -> jax.Array:
    layout = sharding.Layout(mesh, sharding.infer_specs(params, mesh))
    return sample_step(
      params, *of_each, seed=seed, style=style, task=task, layout=layout
    )

  return jax.jit(sample, out_shardings=sharding.batch_sharding(mesh))


def jit_interpolator(task: GeneratorTask, mesh: Mesh) -> Any:
  """Jitted (params, seed, style, angle, labels, alpha, index, other) -> images.

  A model of conditions has them after the others.

  The noise is cos(angle) a + sin(angle) b, a the noise of the number `index`
  and b that of `other`: a standard normal for any angle. The style is a's.
  """

  def sample(
    params: Any,
    seed: jax.Array,
    style: jax.Array,
    angle: jax.Array,
    labels: jax.Array,
    alpha: jax.Array,
    index: jax.Array,
    other: jax.Array,
    *conditions: jax.Array,
  ) -> jax.Array:
    draw = functools.partial(sample_inputs, seed=seed, style=style, task=task)
    noise, style = draw(index)
    noise = jnp.cos(angle) * noise + jnp.sin(angle) * draw(other)[0]
    layout = sharding.Layout(mesh, sharding.infer_specs(params, mesh))
    inputs = (labels, alpha, noise, style, *conditions)
    return generate(params, *inputs, task=task, layout=layout)

  return jax.jit(sample, out_shardings=sharding.batch_sharding(mesh))


def make_sampler(
  task: GeneratorTask, mesh: Mesh, seed: int
) -> Callable[..., SampleFn]:
  """params -> sample_fn(labels, alpha, index) -> images; compiled once.

  Of a model of conditions (params, conditions=...): see bind_sampler.
  """
  step = jit_sampler(task, mesh)
  bind = functools.partial(bind_sampler, step, task=task, mesh=mesh, seed=seed)
  return bind


def bind_sampler(
  step: Any,
  params: Any,
  task: GeneratorTask,
  mesh: Mesh,
  seed: int,
  style: Sequence[int] | np.ndarray | None = None,
  conditions: np.ndarray | None = None,
) -> SampleFn:
  """Binds a step of `jit_sampler`: sample_fn(labels, alpha, index).

  Args:
    step: compiled for all seeds and styles.
    params: its parameters, on the mesh.
    task: static part of the step.
    mesh: where it runs.
    seed: seeds noise and style.
    style: indices that all samples share; -1 leaves one to chance. None: all.
    conditions: [n, ...], that of each sample by its number modulo n; None if
      the model has none.
  """
  shared = (
    np.uint32(seed),
    np.array([-1] * task.style_tokens if style is None else style, np.int32),
  )
  shared = jax.device_put(shared, sharding.replicated(mesh))

  def sample(
    labels: np.ndarray, alpha: np.ndarray, index: np.ndarray
  ) -> jax.Array:
    of_each = (labels, alpha, index)
    if conditions is not None:
      given = np.take(conditions, index, axis=0, mode="wrap")
      of_each = (*of_each, given.astype(np.float32))
    return step(params, *shared, *sharding.put_batch(of_each, mesh))

  return sample


def sample_grid(
  sample_fn: SampleFn,
  decode: Callable[[Images], Images],
  *,
  num_classes: int,
  classes: int,
  per_class: int,
  alpha: float,
  batch_size: int,
) -> np.ndarray:
  """Draws a row of samples for each of some classes: uint8 [H, W, 3].

  Args:
    sample_fn: see generation.generate.
    decode: samples -> images.
    num_classes: number of classes of the model.
    classes: number of rows; their classes are evenly spaced among all.
    per_class: number of images in a row.
    alpha: guidance scale.
    batch_size: samples per call of sample_fn.
  """
  shown = evenly(num_classes, min(classes, num_classes))
  labels = np.repeat(shown.astype(np.int32), per_class)
  images = draw_images(sample_fn, decode, labels, alpha, batch_size)
  return grid_image(images, per_class)


def evenly(count: int, chosen: int) -> np.ndarray:
  """[chosen] indices in [0, count), evenly spaced; they repeat beyond it."""
  return np.arange(chosen) * count // chosen


def draw_images(
  sample_fn: SampleFn,
  decode: Callable[[Images], Images],
  labels: np.ndarray,
  alpha: float,
  batch_size: int,
) -> np.ndarray:
  """Draws an image for each label, in all processes: float32 [n, H, W, C]."""
  images = [
    gathered(batch, decode(batch.samples))
    for batch in generation.generate(
      sample_fn, labels, alpha, batch_size=batch_size
    )
  ]
  return np.concatenate(images)


def gathered(batch: Batch, values: Images) -> np.ndarray:
  """Gathers the valid rows of a batch from all processes, in order: float32."""
  own = batch.rows(values).astype(np.float32)
  return np.concatenate(processes.gather(own))


def grid_image(images: np.ndarray, columns: int) -> np.ndarray:
  """Makes a grid for a screen: small images are magnified."""
  scale = max(1, 48 // images.shape[1])
  return image_grid(images, columns=columns, padding=2, scale=scale)
