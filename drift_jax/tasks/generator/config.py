"""Config of task 'generator', and what may go together in it."""

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from drift_jax.config import checks, sections
from drift_jax.config.parsing import build
from drift_jax.system import options
from drift_jax.system.errors import ConfigError


class GeneratorModel(sections.ImageModel):
  """Arguments of drift_jax.models.build_generator: the fields of its module.

  A new one needs a default here that changes nothing, so that runs that
  were saved without it can be loaded: `new: int = 0  # earlier runs have none`.
  """

  input_size: int
  in_channels: int
  out_channels: int
  patch_size: int
  hidden_size: int
  depth: int
  num_heads: int
  mlp_ratio: float
  cond_dim: int
  context_tokens: int
  style_vocab: int
  style_tokens: int
  attention_dtype: sections.Dtype
  remat: Literal["none", "attention", "branches", "full", "auto"]
  condition_size: sections.Count = 0  # earlier runs have neither of these
  condition_tokens: sections.Count = 0
  clip: bool = False  # nor this


class GeneratorData(sections.Data):
  """Real images, and a file of conditions for each (training/conditions.py)."""

  conditions: sections.Path = ""  # earlier runs have none


class Features(sections.Section):
  """Feature vectors that enter the loss (A.5).

  `tokens`: the sample's grid [H, W, C] as H W problems of C channels. `shift`:
  the most pixels by which a step moves the images that encoders see.
  """

  sample: bool
  every_k_block: sections.Size
  patch_mean_size: tuple[sections.Size, ...]
  patch_std_size: tuple[sections.Size, ...]
  use_mean: bool
  use_std: bool
  tokens: bool = False  # earlier runs have none
  shift: sections.Count = 0  # nor this


class Guidance(sections.Section):
  """Distribution of the guidance scale alpha during training (A.7)."""

  minimum: float
  maximum: float
  exponent: float
  no_cfg_frac: sections.Fraction


class Batch(sections.Reals):
  """Sizes of one step: N_c labels, each with N, N_pos and N_unc samples.

  `negatives` more generated samples of a label repel, without gradient.
  """

  labels: sections.Size
  generated: sections.Size
  negatives: sections.Count = 0  # earlier runs have none


class Queue(sections.Section):
  """The sample queue (A.8).

  A class that has fewer samples in it than a label draws repeats them.
  `with_replacement` says whether the data may be such that it always will.
  """

  class_size: sections.Size
  unconditional_size: sections.Size
  push_per_step: sections.Size
  prefill: sections.Count
  with_replacement: bool


class GeneratorTrain(sections.Train):
  """Train section of a generator, and how its step is computed.

  `kernels` of attention and drifting losses: 'pallas' for TPUs, 'xla'
  anywhere, 'auto' the first that the devices run and, on NVIDIA GPUs, cuDNN's
  attention. `accum_labels` at once, all (0), or all that fit a GPU (-1), with
  the field's scalars by `accum_scalars`, 'group' or 'exact'. Of what has no
  gradient, reals and batch.negatives, `detached_at_once` samples of a label at
  once; 0: all reals, and as many negatives as batch.generated.
  """

  kernels: Literal["auto", "pallas", "xla"]
  accum_labels: Annotated[int, sections.AtLeast(-1)]
  accum_scalars: Literal["group", "exact"]
  detached_at_once: sections.Count = 0  # earlier runs have none


class Network(sections.Section):
  """A network that judges samples."""

  path: sections.Path


class Judge(Network):
  """A network that judges images, and statistics of real ones' features."""

  reference: sections.Path


class FdLoss(sections.Section):
  """Tuning by Frechet distances in place of drifting (docs/fd_tune.md).

  The spaces are the encoders with in_loss, by their pooled features; the sample
  itself (features.sample); and the networks that have a path here. `population`
  is how many samples the generated moments stand for, 0: no such loss; `reals`
  how many training images the real ones are taken from, at most, 0: all.
  `trust` weighs the mean squared distance from the samples of init_from.
  """

  population: sections.Count = 0
  reals: sections.Count = 0
  trust: Annotated[float, sections.AtLeast(0)] = 0.0
  inception: Judge = Judge(path="", reference="")
  dinov2: Judge = Judge(path="", reference="")


class GeneratorEval(sections.ImageEval):
  """Evaluation in the loop."""

  num_samples: sections.Count
  labels: sections.Path
  label_order: options.LabelOrder = "given"  # earlier runs have none
  pixels: options.Pixels = "truncate"  # earlier runs have none
  alphas: tuple[float, ...]
  metrics: tuple[str, ...]
  inception: Judge
  dinov2: Judge
  classifier: Network = Network(path="")  # earlier runs have none
  coverage_k: sections.Size
  grid_classes: sections.Size
  grid_per_class: sections.Size


class GeneratorConfig(sections.ImageConfig):
  """A run that trains a generator: config.task = 'generator'."""

  data: GeneratorData
  model: GeneratorModel
  encoders: Mapping[str, sections.Encoder]
  features: Features
  drift: sections.Drift
  guidance: Guidance
  batch: Batch
  queue: Queue
  train: GeneratorTrain
  eval: GeneratorEval
  fd_loss: FdLoss = FdLoss()  # earlier runs have none

  def check(self) -> None:
    """Raises ConfigError if values are out of range or contradict."""
    checks.check_images(self)
    _check_batch(self)
    _check_conditions(self)
    checks.check_drift(self.drift, self.batch.positives)
    _check_guidance(self.guidance, self.batch)
    _check_features(self)
    _check_network(self)
    _check_evaluation(self)
    _check_fd_loss(self)


# Figures of eval.inception and eval.dinov2. 'fd_inception' is what FID is of
# other weights than the published ones, which those after it are for.
JUDGED_METRICS = {
  "inception": (
    "fd_inception",
    "fid",
    "inception_score",
    "precision_recall",
    "kid",
    "coverage_inception",
  ),
  "dinov2": ("fd_dinov2",),
}


# Figures of eval.classifier, an export of task 'mae' that no generator drifts
# in: of held-out images and samples as they are, pixels or latents.
CLASSIFIER_METRICS = (
  "fd_classifier",
  "coverage_classifier",
  "classifier_accuracy",
)


# The figures that the generator's evaluation can compute.
EVAL_METRICS = (
  *JUDGED_METRICS["inception"],
  *JUDGED_METRICS["dinov2"],
  *CLASSIFIER_METRICS,
  "fd_pixel",
  "fd_encoder",
  "coverage",
  "label_accuracy",
  "duplicates",
)


# Those that are better when they are smaller: what can rank checkpoints.
RANKING_METRICS = (
  "fid",
  "kid",
  *(name for name in EVAL_METRICS if name.startswith("fd_")),
)


def of_one_class(
  config: GeneratorConfig, written: Mapping[str, Any] | None = None
) -> GeneratorConfig:
  """Returns the config of a run whose data have one class: without guidance.

  Guidance repels samples from reals of other classes. There are none, so alpha
  stays 1, no unconditional reals are drawn, and no classifier judges. Reals of
  other conditions repel all the same.

  Args:
    config: a config that takes the data's classes.
    written: values of the run if it goes on; those of an earlier version have
      guidance, and keep it.
  """
  replace = dataclasses.replace

  def unguided(config: GeneratorConfig) -> GeneratorConfig:
    of_many = ("label_accuracy", "classifier_accuracy")
    metrics = (name for name in config.eval.metrics if name not in of_many)
    if config.data.conditions:
      judged = replace(config.eval, metrics=tuple(metrics))
      return replace(config, eval=judged)
    return replace(
      config,
      guidance=replace(config.guidance, minimum=1.0, maximum=1.0),
      batch=replace(config.batch, unconditional=0),
      eval=replace(config.eval, alphas=(1.0,), metrics=tuple(metrics)),
    )

  if written is not None:
    with contextlib.suppress(ConfigError):
      before = build(GeneratorConfig, written)
      if unguided(before) != before:
        return config
  return unguided(config)


def _check_batch(config: GeneratorConfig) -> None:
  batch, at_once = config.batch, config.train.accum_labels
  checks.require(
    batch.generated >= 2
    or batch.unconditional >= 1
    or batch.negatives >= 1
    or config.fd_loss.population > 0
    or config.drift.negatives != "own",
    f"batch.generated={batch.generated} with batch.unconditional=0: a single "
    "sample has no negative but itself, which is masked, so nothing repels "
    "it; use at least 2, or batch.negatives",
  )
  if batch.reals == "queue":
    _check_queue(config)
  checks.require(
    at_once <= 0 or batch.labels % at_once == 0,
    f"train.accum_labels={at_once} does not divide batch.labels="
    f"{batch.labels}: groups of labels are of one size; 0 for one group",
  )


def _check_conditions(config: GeneratorConfig) -> None:
  path, model, chosen = config.data.conditions, config.model, config.eval
  by_condition = config.batch.reals == "condition_grouped"
  checks.require(
    by_condition == (path != ""),
    f"batch.reals={config.batch.reals!r} with data.conditions={path!r}: "
    + (
      "give the .npz of conditions (docs/conditions.md)"
      if by_condition
      else "conditions need batch.reals='condition_grouped'"
    ),
  )
  for name in ("condition_size", "condition_tokens"):
    size = getattr(model, name)
    checks.require(
      path != "" or size == 0,
      f"model.{name}={size} without data.conditions: give the .npz of "
      "conditions, or 0",
    )
  if not path:
    return
  checks.require(
    chosen.labels == "",
    f"eval.labels={chosen.labels!r} with data.conditions: samples are of the "
    "conditions and classes of held-out images; leave it empty",
  )
  checks.require(
    config.data.max_corrupt == 0,
    f"data.max_corrupt={config.data.max_corrupt} with data.conditions: an "
    "image in another's place would have its condition; use 0",
  )


def _check_guidance(guidance: Guidance, batch: Batch) -> None:
  checks.require(
    1 <= guidance.minimum <= guidance.maximum,
    f"guidance.minimum={guidance.minimum}, guidance.maximum="
    f"{guidance.maximum}: want 1 <= minimum <= maximum",
  )
  checks.require(
    guidance.maximum == 1 or batch.unconditional > 0,
    f"guidance.maximum={guidance.maximum} > 1 needs unconditional reals, but "
    "batch.unconditional=0: set it, or guidance.maximum=1",
  )


def _check_features(config: GeneratorConfig) -> None:
  checks.require(
    config.features.sample
    or config.features.tokens
    or any(encoder.in_loss for encoder in config.encoders.values())
    or len(fd_networks(config)) > 0,
    "features.sample=False with no encoder in the loss leaves no features to "
    "drift in: set features.sample=True, features.tokens=True or "
    "encoders.NAME.in_loss=True",
  )
  side = config.model.input_size
  checks.require(
    config.features.shift < side,
    f"features.shift={config.features.shift} moves samples of {side} pixels "
    "(model.input_size) out of sight: 2 is usual, 0 leaves them in place",
  )
  for name, encoder in config.encoders.items():
    checks.check_frozen(f"encoders.{name}", encoder)
    checks.require(
      encoder.path != "",
      f"encoders.{name}.path is empty: give the directory that encoder "
      "training wrote, WORKDIR/encoder",
    )
    checks.require(
      name != "vae",
      "encoders.vae: that name is the autoencoder's among the frozen weights; "
      "choose another",
    )
    checks.require(
      not encoder.decode or config.vae.path != "",
      f"encoders.{name}.decode=True needs vae.path, the autoencoder that "
      "decodes: set it, for a generator of latents; encoders read the samples "
      f"of a generator of pixels as they are, encoders.{name}.decode=False",
    )


def _check_network(config: GeneratorConfig) -> None:
  model = config.model
  checks.require(
    config.vae.path == "" or config.data.source.startswith("latents:"),
    f"vae.path={config.vae.path!r} with data.source={config.data.source!r}: a "
    "generator of latents reads a latent cache; make one by python -m "
    "drift_jax.tools.cache_latents and set data.source=latents:DIR",
  )
  checks.require(
    not (model.clip and config.data.source.startswith("latents:")),
    "model.clip=True keeps samples within [-1, 1], but those of "
    f"data.source={config.data.source!r} are latents, which have no such "
    "bounds: set model.clip=False",
  )
  checks.require(
    model.in_channels == model.out_channels,
    f"model.in_channels={model.in_channels} and model.out_channels="
    f"{model.out_channels} differ: noise and samples have one shape",
  )


def _check_evaluation(config: GeneratorConfig) -> None:
  chosen, guidance = config.eval, config.guidance
  checks.require(
    len(chosen.alphas) > 0, "eval.alphas is empty: give at least one alpha"
  )
  checks.check_distinct("eval.alphas", chosen.alphas)
  for alpha in chosen.alphas:
    checks.require(
      guidance.minimum <= alpha <= guidance.maximum,
      f"eval.alphas={chosen.alphas}: {alpha} was never trained, alpha is "
      f"drawn from [{guidance.minimum}, {guidance.maximum}] (guidance.*)",
    )
  for name in chosen.metrics:
    checks.check_choice("eval.metrics", name, EVAL_METRICS)
  checks.check_distinct("eval.metrics", chosen.metrics)
  checks.require(
    "fd_encoder" not in chosen.metrics or len(config.encoders) > 0,
    "eval.metrics holds 'fd_encoder' but there are no encoders: remove it or "
    "add an encoder",
  )
  check_judges(
    chosen.metrics, {"inception": chosen.inception, "dinov2": chosen.dinov2}
  )
  wanted = [name for name in chosen.metrics if name in CLASSIFIER_METRICS]
  checks.require(
    not wanted or chosen.classifier.path != "",
    f"eval.metrics holds {wanted}, which need eval.classifier.path: give the "
    "WORKDIR/encoder of a classifier, such as python -m drift_jax.main "
    "--config=digits:classifier trains",
  )
  checks.require(
    chosen.num_samples != 1, "eval.num_samples=1: figures need at least 2"
  )
  classes = config.model.num_classes
  checks.require(
    chosen.labels != ""
    or config.data.conditions != ""
    or classes == 0
    or chosen.num_samples % classes == 0,
    f"eval.num_samples={chosen.num_samples} can't be balanced over "
    f"model.num_classes={classes}: use a multiple, a list of labels "
    "(eval.labels), or 0 for as many as are held out",
  )
  best, saved = config.checkpoint.best_metric, config.checkpoint.every
  if not best:
    return
  checks.require(
    best in chosen.metrics,
    f"checkpoint.best_metric={best!r} is not computed: eval.metrics="
    f"{chosen.metrics}; use one of them or ''",
  )
  checks.require(
    best in RANKING_METRICS,
    f"checkpoint.best_metric={best!r}: the best is the smallest, so it must "
    f"be a distance {RANKING_METRICS} or ''",
  )
  checks.require(
    chosen.every > 0 and chosen.every % saved == 0,
    f"checkpoint.best_metric={best!r} with eval.every={chosen.every} and "
    f"checkpoint.every={saved}: only an evaluation of a step that is saved "
    "can be ranked; make eval.every a multiple of checkpoint.every, or "
    "checkpoint.best_metric=''",
  )


def _check_fd_loss(config: GeneratorConfig) -> None:
  # 1. What the loss needs, and what no such step can do.
  tuned, guidance, chosen = config.fd_loss, config.guidance, config.eval
  at_once, batch = config.train.accum_labels, config.batch
  step = batch.labels * batch.generated
  if not tuned.population:
    checks.require(
      tuned == FdLoss(),
      "fd_loss.population=0 leaves out the loss that other keys of fd_loss "
      "set: give the number of samples, 50000 is usual, or remove them",
    )
    return
  checks.require(
    tuned.population >= step,
    f"fd_loss.population={tuned.population} is less than the {step} samples of "
    "a step (batch.labels x batch.generated): raise it, 50000 is usual",
  )
  checks.require(
    config.init_from != "",
    "fd_loss.population tunes a generator that is trained already, but "
    "init_from is empty: give the folder of its export (python -m "
    "drift_jax.tools.export)",
  )
  checks.require(
    config.data.conditions == "",
    f"data.conditions={config.data.conditions} with fd_loss.population: this "
    "loss draws samples of classes alone; set fd_loss.population=0",
  )
  checks.require(
    guidance.minimum == guidance.maximum,
    f"guidance.minimum={guidance.minimum}, guidance.maximum="
    f"{guidance.maximum} with fd_loss.population: the samples of several "
    "alphas are no distribution of images; set both to the alpha that samples "
    "will be drawn with",
  )
  checks.require(
    at_once <= 0,
    f"train.accum_labels={at_once} with fd_loss.population: a step of this "
    "loss is computed at once, with a batch as small as need be; set it to 0",
  )
  # 2. Judges that the loss does not know.
  taken = in_fd_loss(config)
  held_out = [
    name
    for name in chosen.metrics
    if name in RANKING_METRICS and name not in taken
  ]
  checks.require(
    not chosen.metrics or len(held_out) > 0,
    f"eval.metrics={chosen.metrics} holds no distance but those that the "
    f"samples are tuned by, {sorted(taken)}: add one of a network or space "
    "that is not in the loss, such as 'fd_classifier' (eval.classifier.path)",
  )
  best = config.checkpoint.best_metric
  checks.require(
    best not in taken,
    f"checkpoint.best_metric={best!r} is what the samples are tuned by: choose "
    f"one of {held_out} or ''",
  )


def check_tuned(config: GeneratorConfig) -> None:
  """Raises ConfigError for what a new tuned run would not read.

  Runs of earlier versions may have it: they are opened, and go on with it.
  """
  for name in ("tokens", "shift"):
    value = getattr(config.features, name)
    checks.require(
      not config.fd_loss.population or not value,
      f"features.{name}={value} with fd_loss.population: this loss compares "
      f"whole samples where they are; set it to {type(value)()}",
    )


def in_fd_loss(config: GeneratorConfig) -> frozenset[str]:
  """Names the figures that a tuned run's samples are tuned by."""
  encoders = [e.path for e in config.encoders.values() if e.in_loss]
  taken = {"fd_pixel"} if config.features.sample else set()
  taken |= {"fd_encoder"} if encoders else set()
  if config.eval.classifier.path in encoders:
    taken |= set(CLASSIFIER_METRICS)
  for name in fd_networks(config):
    taken |= set(JUDGED_METRICS[name])
  return frozenset(taken)


def fd_networks(config: GeneratorConfig) -> dict[str, str]:
  """{name: path} of the networks of 8-bit images that are in the loss."""
  paths = {name: getattr(config.fd_loss, name).path for name in JUDGED_METRICS}
  return {name: path for name, path in paths.items() if path}


def check_judges(names: Sequence[str], judges: Mapping[str, Judge]) -> None:
  """Raises ConfigError if figures lack their network or real images.

  Args:
    names: figures that are asked for.
    judges: {'inception' or 'dinov2': its section}.
  """
  for judge, figures in JUDGED_METRICS.items():
    wanted = [name for name in names if name in figures]
    checks.require(
      not wanted or judges[judge].path != "",
      f"eval.metrics holds {wanted}, which need eval.{judge}.path: python -m "
      f"drift_jax.tools.convert_weights {judge} writes it",
    )
    compared = [name for name in wanted if name != "inception_score"]
    checks.require(
      not compared or judges[judge].reference != "",
      f"eval.metrics holds {compared}, which need eval.{judge}.reference, "
      "statistics of real images: python -m drift_jax.tools.reference_stats "
      "makes them; public .npz files for ImageNet at 256 px are read too",
    )


def _check_queue(config: GeneratorConfig) -> None:
  batch, queue = config.batch, config.queue
  if queue.with_replacement:
    return
  for size, drawn in (
    ("class_size", "positives"),
    ("unconditional_size", "unconditional"),
  ):
    have, want = getattr(queue, size), getattr(batch, drawn)
    checks.require(
      have >= want,
      f"queue.{size}={have} can't give batch.{drawn}={want} without "
      f"replacement: raise it to {want}, or set queue.with_replacement=True",
    )
  drawn = max(
    ("positives", "unconditional"), key=lambda name: getattr(batch, name)
  )
  # Prefilling pushes whole batches.
  pushes = math.ceil(queue.prefill / queue.push_per_step) + 1
  checks.require(
    pushes * queue.push_per_step >= getattr(batch, drawn),
    f"queue.prefill={queue.prefill} and queue.push_per_step="
    f"{queue.push_per_step} leave {pushes * queue.push_per_step} samples in "
    f"the queue at the first step, fewer than batch.{drawn}="
    f"{getattr(batch, drawn)}: raise queue.prefill to as many, or set "
    "queue.with_replacement=True",
  )
