"""The generator's step: drifting loss, gradients, update; sampling."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

from drift_jax.drift.diagnostics import Scalars
from drift_jax.drift.guidance import sample_alpha, unconditional_weight
from drift_jax.drift.many import DriftReport, Kernel, drift_losses
from drift_jax.drift.variant import PAPER, Variant
from drift_jax.system import sharding
from drift_jax.training import state as state_lib
from drift_jax.training import step as step_lib
from drift_jax.training.drifting import Temperature, drift_update

FeatureDict = dict[str, Float[Array, "n T D"]]

# The key of the sample itself, flattened: the drifting loss with no encoder.
SAMPLE_KEY = "global"
# That of its grid, each place a problem of its own.
TOKENS_KEY = "tokens"
# The autoencoder's parameters among the frozen ones; no encoder has that name.
VAE_KEY = "vae"


class Draws(NamedTuple):
  """The random numbers of one generator step."""

  alpha: Float[Array, " L"]
  noise: Float[Array, "LN H W C"]
  style: Int[Array, "LN S"]
  # Those of the independent samples that repel, if the variant has them.
  repelling: tuple[Float[Array, "LN H W C"], Int[Array, "LN S"]] | None = None
  # Keys of the noise and style of extra negatives, if there are any.
  negatives: PRNGKeyArray | None = None
  # Where encoders see the images of this step, the same for all labels.
  offset: Int[Array, "L 2"] | None = None


class GeneratorBatch(NamedTuple):
  """One step's reals: positives of each label and unconditional ones.

  Where images have conditions, a label stands for one of them: its class.

  Images are as they travel: see from_wire.
  """

  labels: Int[Array, " L"]
  positives: Shaped[Array, "L P H W C"]
  unconditional: Shaped[Array, "L U H W C"]
  # Those of each label, if the model has any.
  conditions: Float[Array, "L ... E"] | None = None


# Labels that are computed at once: all, or those of a group.
_Part = tuple[GeneratorBatch, Draws]


@dataclasses.dataclass(frozen=True)
class FeatureSpace:
  """The frozen encoders and the feature vectors that are taken from them.

  Attributes:
    encoders: {name: module with a `features` method}; may be empty.
    options: {name: keyword arguments of that encoder's `features`}.
    sample: whether the flattened sample itself is one more feature.
    tokens: whether its grid is: H * W problems of C channels.
    shift: the most pixels by which encoders see images moved: see `moved`.
    decoded: names of the encoders that read decoded samples.
    vae: decodes samples for them; None if none reads decoded ones.
  """

  encoders: Mapping[str, nn.Module]
  options: Mapping[str, Mapping[str, Any]]
  sample: bool
  decoded: Collection[str] = ()
  vae: nn.Module | None = None
  tokens: bool = False
  shift: int = 0

  @property
  def recomputes(self) -> bool:
    """Whether a network recomputes its blocks in the backward pass."""
    networks = (self.vae, *self.encoders.values())
    return any(getattr(network, "remat", False) for network in networks)

  def __call__(
    self,
    frozen: Mapping[str, Any],
    images: Float[Array, "n H W C"],
    offset: Int[Array, " 2"] | None = None,
  ) -> FeatureDict:
    """All feature vectors {key: [n, T, D]} of A.5.

    With several encoders each key carries its encoder's name in front.

    Args:
      frozen: {name: parameters} of the encoders and, as VAE_KEY, of the
        autoencoder.
      images: samples or reals; latents if there is an autoencoder.
      offset: where encoders see them, in [0, 2 shift]; None: as they are.
    """
    pixels = images
    if self.vae is not None:
      pixels = step_lib.apply(
        self.vae, frozen[VAE_KEY], images, method="decode"
      )
    out: FeatureDict = {}
    if self.sample:
      out[SAMPLE_KEY] = images.reshape(len(images), 1, -1)
    if self.tokens:
      out[TOKENS_KEY] = images.reshape(len(images), -1, images.shape[-1])
    for name, encoder in self.encoders.items():
      seen = pixels if name in self.decoded else images
      if offset is not None:
        seen = moved(seen, offset, self.shift)
      features = step_lib.apply(
        encoder,
        frozen[name],
        seen,
        method="features",
        **self.options[name],
      )
      prefix = f"{name}/" if len(self.encoders) > 1 else ""
      out |= {prefix + k: v for k, v in features.items() if k != SAMPLE_KEY}
    return out


def moved(
  images: Float[Array, "n H W C"], offset: Int[Array, " 2"], shift: int
) -> Float[Array, "n H W C"]:
  """Images moved by shift - offset pixels down and right.

  What comes in over the border mirrors what is inside.
  """
  edge = (shift, shift)
  wide = jnp.pad(images, ((0, 0), edge, edge, (0, 0)), mode="reflect")
  return jax.lax.dynamic_slice(wide, (0, offset[0], offset[1], 0), images.shape)


@dataclasses.dataclass(frozen=True)
class GeneratorTask:
  """The static part of a generator's training step.

  Attributes:
    generator: from noise to samples.
    features: of the loss.
    sample_shape: (H, W, C).
    noise_shape: of one sample's noise, (H, W, C).
    pixels: whether samples are images, which end at black and white when they
      are drawn to be seen or judged; not so in the loss.
    style_tokens, style_vocab: number and range of style indices.
    num_generated: N, samples of a label.
    condition_shape: shape of a condition, (D,) or (T, D); () if there are none.
    num_negatives: E, extra generated samples of a label, without gradient.
    drift: keyword arguments of drift.drift_losses.
    guidance: keyword arguments of drift.sample_alpha.
    variant: departure from the paper's loss; see drift.Variant.
    average: whether the step's loss is the mean over features, not their sum.
    temperature: how the temperatures change in time.
    kernel: how drift.drift_losses computes.
    groups: number of parts of the labels that are computed one after the other,
      their gradients added up, in memory for one. 1: all at once.
    exact: whether the field's scalars are those of all groups, by two passes
      ahead without gradients, or each group's own.
    detached_at_once: samples of a label without gradient, reals and extra
      negatives, that are computed at once; 0: all reals, and N negatives.
  """

  generator: nn.Module
  features: FeatureSpace
  sample_shape: tuple[int, int, int]
  noise_shape: tuple[int, int, int]
  style_tokens: int
  style_vocab: int
  num_generated: int
  drift: Mapping[str, Any]
  guidance: Mapping[str, float]
  variant: Variant = PAPER
  average: bool = False
  temperature: Temperature | None = None
  kernel: Kernel = "xla"
  groups: int = 1
  exact: bool = False
  condition_shape: tuple[int, ...] = ()
  pixels: bool = False

  def of_conditions(
    self, make: Callable[[tuple[int, ...]], Any]
  ) -> dict[str, Any]:
    """{'conditions': what is made of a condition's shape}; {} if none are."""
    shape = self.condition_shape
    return {"conditions": make(shape)} if shape else {}

  num_negatives: int = 0
  detached_at_once: int = 0


def draw(key: PRNGKeyArray, task: GeneratorTask, num_labels: int) -> Draws:
  """Draws alpha per label, noise and style indices per generated sample.

  Each use has a stream of its own.
  """
  alpha_key, noise_key, style_key = jax.random.split(key, 3)
  count = num_labels * task.num_generated
  noise, style = _inputs(noise_key, style_key, task, (count,))
  repelling = negatives = offset = None
  if task.variant.negatives == "independent":
    first, second = jax.random.split(jax.random.fold_in(key, 1))
    repelling = _inputs(first, second, task, (count,))
  if task.num_negatives:
    negatives = jax.random.split(
      jax.random.fold_in(key, 2), num_labels * task.num_negatives
    )
  if shift := task.features.shift:
    one = jax.random.randint(jax.random.fold_in(key, 3), (2,), 0, 2 * shift + 1)
    offset = jnp.broadcast_to(one, (num_labels, 2))
  alpha = sample_alpha(alpha_key, (num_labels,), **task.guidance)
  return Draws(alpha, noise, style, repelling, negatives, offset)


def _inputs(
  noise_key: PRNGKeyArray,
  style_key: PRNGKeyArray,
  task: GeneratorTask,
  shape: tuple[int, ...],
) -> tuple[Float[Array, "*n H W C"], Int[Array, "*n S"]]:
  """Noise and style indices of samples [*shape]."""
  noise = jax.random.normal(noise_key, (*shape, *task.noise_shape))
  tokens = (*shape, task.style_tokens)
  vocab = max(task.style_vocab, 1)
  return noise, jax.random.randint(style_key, tokens, 0, vocab)


def by_label(
  features: FeatureDict, num_labels: int
) -> dict[str, Float[Array, "L n T D"]]:
  """{key: [L * n, T, D]} -> {key: [L, n, T, D]}."""
  return {
    key: x.reshape(num_labels, -1, *x.shape[1:]) for key, x in features.items()
  }


def generator_loss(
  params: Any,
  batch: GeneratorBatch,
  draws: Draws,
  frozen: Mapping[str, Any],
  task: GeneratorTask,
  layout: sharding.Layout | None = None,
  scalars: Scalars | None = None,
  temperature_scale: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], dict[str, Any]]:
  """Eq. 14: the sum over features of the mean drifting loss.

  With a layout this runs inside sharding.over_devices, on parts of everything:
  the loss is that of this device's labels, the field's scalars those of all.
  With `scalars`, the batch may be one group of labels: the scalars are those of
  the whole batch.

  Returns:
    (loss, {'samples': [L * N, H, W, C], 'losses': of each feature, 'report':
    drift.DriftReport, whose keys they have}). Sample l * N + n belongs to
    label l.
  """
  num_labels, num_positives = batch.positives.shape[:2]
  generator = task.generator
  if layout is not None:
    generator, params = gather_blockwise(generator, params, layout)

  def of_each(count: int) -> list[jax.Array]:
    given = [batch.labels, draws.alpha]
    if batch.conditions is not None:
      given.append(batch.conditions)
    return [jnp.repeat(x, count, axis=0) for x in given]

  def generated_from(noise: jax.Array, style: jax.Array) -> jax.Array:
    return step_lib.apply(
      generator,
      params,
      *of_each(task.num_generated),
      noise=noise,
      style=style,
    )

  # 1. Samples x = f(noise, label, alpha), and the reals that move them.
  samples = generated_from(draws.noise, draws.style)
  reals = jnp.concatenate([batch.positives, batch.unconditional], axis=1)
  num_reals = reals.shape[1]
  reals = step_lib.from_wire(reals.reshape(-1, *reals.shape[2:]))
  if draws.repelling is not None:
    # After each label's reals: no gradient flows through either.
    repelling = jax.lax.stop_gradient(generated_from(*draws.repelling))
    parts = [
      x.reshape(num_labels, count, *x.shape[1:])
      for x, count in ((reals, num_reals), (repelling, task.num_generated))
    ]
    reals = jnp.concatenate(parts, axis=1)
    reals = reals.reshape(-1, *reals.shape[2:])

  # 2. Features of both, by the frozen encoders (A.5).
  offset = None if draws.offset is None else draws.offset[0]
  features = _features_of(task, layout, num_labels)
  generated, real_features = features(frozen, samples, reals, offset)
  extra: FeatureDict = {}
  if draws.negatives is not None:
    # Nothing but their features is kept of those without gradient.
    extra = _negative_features(
      functools.partial(
        step_lib.apply, generator, jax.lax.stop_gradient(params)
      ),
      (draws.negatives, *of_each(task.num_negatives)),
      frozen if layout is None else sharding.gather(frozen, layout.frozen),
      offset,
      task,
    )
    extra = by_label(extra, num_labels)

  # 3. The drifting loss of each feature (eq. 13), and their sum (eq. 14).
  weight = _unconditional_weight(batch, draws, task)
  losses, report = drift_losses(
    by_label(generated, num_labels),
    {
      key: jnp.concatenate([x, extra[key]], axis=1) if extra else x
      for key, x in by_label(real_features, num_labels).items()
    },
    weight,
    num_positives=num_positives,
    **task.drift,
    axis_name=() if layout is None else sharding.BATCH_AXES,
    kernel=task.kernel,
    scalars=scalars,
    variant=task.variant,
    num_unconditional=batch.unconditional.shape[1],
    temperature_scale=temperature_scale,
  )
  total = jnp.mean(losses) if task.average else jnp.sum(losses)
  return total, {"samples": samples, "losses": losses, "report": report}


def _negative_features(
  generate: Callable[..., jax.Array],
  inputs: tuple[PRNGKeyArray, *tuple[jax.Array, ...]],
  frozen: Mapping[str, Any],
  offset: Int[Array, " 2"] | None,
  task: GeneratorTask,
) -> FeatureDict:
  """Features of extra negatives, in memory for those of a chunk.

  Args:
    generate: (labels, alpha, conditions if there are any, noise=, style=) ->
      samples, without gradient.
    inputs: key, label, alpha (and condition) of each.
    frozen, offset: see FeatureSpace; frozen is whole.
    task: static part of the step.
  """

  def features(inputs: Any) -> FeatureDict:
    keys, *given = inputs
    noise, style = jax.vmap(
      lambda noise_key, style_key: _inputs(noise_key, style_key, task, ())
    )(*jax.vmap(jax.random.split, out_axes=1)(keys))
    samples = generate(*given, noise=noise, style=style)
    return task.features(frozen, samples, offset)

  num_labels = len(inputs[0]) // task.num_negatives
  at_once = task.detached_at_once or task.num_generated
  return step_lib.in_chunks(features, inputs, num_labels * at_once)


def _features_of(
  task: GeneratorTask, layout: sharding.Layout | None, num_labels: int
) -> Callable[..., tuple[FeatureDict, FeatureDict]]:
  """(frozen, samples, reals, offset) -> features of samples, and of reals."""

  def features(
    frozen: Any,
    samples: jax.Array,
    reals: jax.Array,
    offset: jax.Array | None,
  ) -> tuple[FeatureDict, FeatureDict]:
    if layout is not None:
      frozen = sharding.gather(frozen, layout.frozen)
    real_features = step_lib.in_chunks(
      lambda reals: task.features(frozen, reals, offset),
      reals,
      num_labels * task.detached_at_once,
    )
    real_features = jax.lax.stop_gradient(real_features)
    return task.features(frozen, samples, offset), real_features

  # regather's checkpoint policy also applies inside of rematerialised blocks,
  # and would store what they are to recompute. With remat the gathered weights
  # are kept instead, until the losses are done.
  if layout is not None and not task.features.recomputes:
    return sharding.regather(features, layout.frozen)
  return features


def gather_blockwise(
  generator: Any, params: Any, layout: sharding.Layout
) -> tuple[Any, Any]:
  """Returns a generator that gathers its blocks one by one, and the rest.

  The parameters outside of the blocks are gathered here.
  """
  stack = "blocks"
  dtype_of = step_lib.early_dtype(generator)
  if stack not in layout.params:
    return generator, sharding.gather(params, layout.params, dtype_of)

  def in_block(spec: PartitionSpec) -> bool:
    return len(spec) > 1 and spec[0] is None

  blocks = layout.params[stack]
  per_block = jax.tree.map(
    lambda spec: PartitionSpec(*spec[1:]) if in_block(spec) else step_lib.WHOLE,
    blocks,
  )
  outside = {
    **layout.params,
    stack: jax.tree.map(
      lambda spec: step_lib.WHOLE if in_block(spec) else spec, blocks
    ),
  }

  def gather_block(variables: Any) -> Any:
    return {
      "params": sharding.gather(
        variables["params"],
        per_block,
        lambda name, dtype: dtype_of(f"{stack}/{name}", dtype),
      )
    }

  whole = sharding.gather(params, outside, dtype_of)
  if sharding.is_sharded(per_block):
    generator = generator.clone(gather=gather_block)
  return generator, whole


def _unconditional_weight(
  batch: GeneratorBatch, draws: Draws, task: GeneratorTask
) -> Float[Array, " L"]:
  count = batch.unconditional.shape[1]
  if not count:
    return jnp.ones_like(draws.alpha)
  if task.variant.guidance == "velocity":
    return (draws.alpha - 1.0) / count
  # A.7's N - 1 generated negatives of a sample are with extra ones more.
  generated = task.num_generated + task.num_negatives
  return unconditional_weight(draws.alpha, generated, count)


def _scalars(
  report_of: Callable[[_Part, Scalars | None], DriftReport],
  parts: _Part,
  task: GeneratorTask,
  axes: tuple[str, ...],
) -> Scalars:
  """Computes the field's scalars over all groups, in two passes.

  Args:
    report_of: (part, scalars) -> report.
    parts: all groups, along the first axis.
    task: static part of the step.
    axes: mesh axes over which each part is split.
  """

  def scale_of(part: _Part) -> tuple[jax.Array, jax.Array]:
    """Numerator and denominator of S of a group, over the same constant."""
    batch, draws = part
    unconditional = batch.unconditional.shape[1]
    if task.variant.guidance == "velocity":
      unconditional = 0  # they are left out of the scale
    weight = jnp.mean(
      task.num_generated
      + task.num_negatives
      + task.num_generated * task.variant.own_in_scale
      + batch.positives.shape[1]
      + unconditional * _unconditional_weight(batch, draws, task)
    )
    weight = jax.lax.pmean(weight, axes) if axes else weight
    scale = report_of(part, None).info["scale"]
    return weight * (scale if power == 1 else scale**power), weight

  power = task.variant.scale_power
  distances, weights = jax.lax.map(scale_of, parts)
  scale = jnp.sum(distances, axis=0) / jnp.sum(weights)
  scalars = Scalars(scale if power == 1 else jnp.sqrt(scale), None)
  mean_squares = jax.lax.map(
    lambda part: report_of(part, scalars).info["drift_ms"], parts
  )
  means = jax.tree.map(lambda x: jnp.mean(x, axis=0), mean_squares)
  return scalars._replace(drift_ms=means)


def _gradients(
  params: Any,
  batch: GeneratorBatch,
  draws: Draws,
  frozen: Mapping[str, Any],
  task: GeneratorTask,
  layout: sharding.Layout | None = None,
  temperature_scale: Float[Array, ""] | None = None,
) -> tuple[Any, tuple[Float[Array, ""], DriftReport]]:
  """Returns (gradients, (loss, report)) of the labels here, means over groups.

  With a layout the gradients are this device's shares of their sum.
  """
  devices, axes = 1, ()
  if layout is not None:
    devices, axes = layout.mesh.size, sharding.BATCH_AXES

  def loss_of(
    params: Any, part: _Part, scalars: Scalars | None
  ) -> tuple[jax.Array, tuple[jax.Array, DriftReport]]:
    loss, aux = generator_loss(
      params, *part, frozen, task, layout, scalars, temperature_scale
    )
    return loss / devices, (loss, aux["report"])

  gradients = jax.grad(loss_of, has_aux=True)
  if task.groups == 1:
    return gradients(params, (batch, draws), None)
  parts = jax.tree.map(
    lambda x: x.reshape(task.groups, -1, *x.shape[1:]), (batch, draws)
  )
  scalars = None
  if task.exact:
    scalars = _scalars(
      lambda part, scalars: loss_of(params, part, scalars)[1][1],
      parts,
      task,
      axes,
    )

  def add(total: Any, part: _Part) -> tuple[Any, None]:
    found = gradients(params, part, scalars)
    return jax.tree.map(jnp.add, total, found), None

  first = jax.tree.map(lambda x: x[0], parts)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype),
    jax.eval_shape(gradients, params, first, scalars),
  )
  total, _ = jax.lax.scan(add, zeros, parts)
  return jax.tree.map(lambda x: x / task.groups, total)


def generator_gradients(
  params: Any,
  batch: GeneratorBatch,
  draws: Draws,
  frozen: Mapping[str, Any],
  task: GeneratorTask,
  layout: sharding.Layout | None = None,
  temperature_scale: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], DriftReport, Any]:
  """Returns (loss, drift.DriftReport, gradients), on a mesh with a layout."""
  if layout is None:
    grads, (loss, report) = _gradients(
      params, batch, draws, frozen, task, None, temperature_scale
    )
    return loss, report, grads

  def local(
    params: Any, batch: GeneratorBatch, draws: Draws, frozen: Any, scale: Any
  ) -> tuple[jax.Array, Any, Any]:
    grads, (loss, report) = _gradients(
      params, batch, draws, frozen, task, layout, scale
    )
    grads = sharding.sum_gradients(grads, layout.params)
    return jax.lax.pmean(loss, sharding.BATCH_AXES), report, grads

  return sharding.over_devices(
    local,
    layout.mesh,
    (
      layout.params,
      step_lib.SPLIT,
      step_lib.SPLIT,
      layout.frozen,
      step_lib.WHOLE,
    ),
    (step_lib.WHOLE, step_lib.WHOLE, layout.params),
  )(params, batch, draws, frozen, temperature_scale)


def train_step(
  state: state_lib.TrainState,
  batch: GeneratorBatch,
  frozen: Mapping[str, Any],
  draws: Draws | None = None,
  *,
  task: GeneratorTask,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
  layout: sharding.Layout | None = None,
) -> tuple[state_lib.TrainState, step_lib.Metrics]:
  """One step of the generator; draws are made from state.key() if not given.

  Metrics: see drift_update.
  """
  if draws is None:
    draws = draw(state.key(), task, len(batch.labels))
  temperature = task.temperature
  scale = None if temperature is None else temperature.scale(state)
  loss, report, grads = generator_gradients(
    state.params, batch, draws, frozen, task, layout, scale
  )
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
