"""Config of task 'generator', and what may go together in it."""

import math
from collections.abc import Mapping, Sequence

from drift_jax.config.checks import (
  check_at_least,
  check_choice,
  check_distinct,
  check_drift,
  check_frozen,
  check_images,
  require,
)
from drift_jax.config.sections import (
  Drift,
  Encoder,
  ImageConfig,
  ImageEval,
  ImageModel,
  Path,
  Section,
  Train,
)


class GeneratorModel(ImageModel):
  """Arguments of drift_jax.models.build_generator."""

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
  attention_dtype: str
  remat: str


class Features(Section):
  """Which feature vectors of A.5 enter the loss."""

  sample: bool
  every_k_block: int
  patch_mean_size: tuple[int, ...]
  patch_std_size: tuple[int, ...]
  use_mean: bool
  use_std: bool


class Guidance(Section):
  """Distribution of the guidance scale alpha during training (A.7)."""

  minimum: float
  maximum: float
  exponent: float
  no_cfg_frac: float


class Batch(Section):
  """Sizes of one step: N_c labels, each with N, N_pos and N_unc samples.

  `reals` says how positives and unconditional reals are found: through the
  sample queue, or by index, class by class.
  """

  reals: str
  labels: int
  generated: int
  positives: int
  unconditional: int


class Queue(Section):
  """The sample queue (A.8).

  A class that has fewer samples in it than a label draws repeats them.
  `with_replacement` says whether the data may be such that it always will.
  """

  class_size: int
  unconditional_size: int
  push_per_step: int
  prefill: int
  with_replacement: bool


class GeneratorTrain(Train):
  """The same of a generator, and what computes its step.

  `kernels` of attention and drifting losses: 'pallas' for TPUs, 'xla'
  anywhere, 'auto' the first that the devices run and, on NVIDIA GPUs, cuDNN's
  attention. `accum_labels` at once, if not 0, with the field's scalars by
  `accum_scalars`, 'group' or 'exact'.
  """

  kernels: str
  accum_labels: int
  accum_scalars: str


class Judge(Section):
  """A network that judges images, and statistics of real ones' features."""

  path: Path
  reference: Path


class GeneratorEval(ImageEval):
  """Evaluation in the loop."""

  num_samples: int
  labels: Path
  alphas: tuple[float, ...]
  metrics: tuple[str, ...]
  inception: Judge
  dinov2: Judge
  coverage_k: int
  grid_classes: int
  grid_per_class: int


class GeneratorConfig(ImageConfig):
  """A run that trains a generator: config.task = 'generator'."""

  model: GeneratorModel
  encoders: Mapping[str, Encoder]
  features: Features
  drift: Drift
  guidance: Guidance
  batch: Batch
  queue: Queue
  train: GeneratorTrain
  eval: GeneratorEval

  def check(self) -> None:
    """Raises ConfigError if values are out of range or contradict."""
    check_generator(self)


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


# The figures that the generator's evaluation can compute.
EVAL_METRICS = (
  *JUDGED_METRICS["inception"],
  *JUDGED_METRICS["dinov2"],
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


def check_generator(config: GeneratorConfig) -> None:
  check_images(config)
  require(
    config.vae.path == "" or config.data.source.startswith("latents:"),
    f"vae.path={config.vae.path!r} with data.source={config.data.source!r}: a "
    "generator of latents reads a latent cache; make one by python -m "
    "drift_jax.tools.cache_latents and set data.source=latents:DIR",
  )
  batch, model = config.batch, config.model
  guidance, evaluation = config.guidance, config.eval
  for name in ("labels", "generated", "positives"):
    check_at_least(f"batch.{name}", getattr(batch, name), 1)
  check_at_least("batch.unconditional", batch.unconditional, 0)
  require(
    batch.generated >= 2
    or batch.unconditional >= 1
    or config.drift.negatives != "own",
    f"batch.generated={batch.generated} with batch.unconditional=0: a single "
    "sample has no negative but itself, which is masked, so nothing repels "
    "it; use at least 2",
  )
  check_choice("batch.reals", batch.reals, ("queue", "class_grouped"))
  if batch.reals == "queue":
    _check_queue(config)
  check_drift(config.drift, batch.positives)
  require(
    1 <= guidance.minimum <= guidance.maximum,
    f"guidance.minimum={guidance.minimum}, guidance.maximum="
    f"{guidance.maximum}: want 1 <= minimum <= maximum",
  )
  require(
    0 <= guidance.no_cfg_frac <= 1,
    f"guidance.no_cfg_frac={guidance.no_cfg_frac} must lie in [0, 1]",
  )
  require(
    guidance.maximum == 1 or batch.unconditional > 0,
    f"guidance.maximum={guidance.maximum} > 1 needs unconditional reals, but "
    "batch.unconditional=0: set it, or guidance.maximum=1",
  )
  require(
    config.features.sample
    or any(encoder.in_loss for encoder in config.encoders.values()),
    "features.sample=False with no encoder in the loss leaves no features to "
    "drift in: set features.sample=True or encoders.NAME.in_loss=True",
  )
  check_at_least("features.every_k_block", config.features.every_k_block, 1)
  for name in ("patch_mean_size", "patch_std_size"):
    sizes = getattr(config.features, name)
    require(
      all(size >= 1 for size in sizes),
      f"features.{name}={sizes}: sides of patches must be at least 1; () for "
      "none",
    )
  for name, encoder in config.encoders.items():
    check_frozen(f"encoders.{name}", encoder)
    require(
      encoder.path != "",
      f"encoders.{name}.path is empty: give the directory that encoder "
      "training wrote, WORKDIR/encoder",
    )
    require(
      name != "vae",
      "encoders.vae: that name is the autoencoder's among the frozen weights; "
      "choose another",
    )
    require(
      not encoder.decode or config.vae.path != "",
      f"encoders.{name}.decode=True needs vae.path, the autoencoder that "
      "decodes: set it, for a generator of latents; encoders read the samples "
      f"of a generator of pixels as they are, encoders.{name}.decode=False",
    )
  check_choice("train.kernels", config.train.kernels, ("auto", "pallas", "xla"))
  check_choice(
    "train.accum_scalars", config.train.accum_scalars, ("group", "exact")
  )
  at_once = config.train.accum_labels
  check_at_least("train.accum_labels", at_once, 0)
  require(
    not at_once or config.batch.labels % at_once == 0,
    f"train.accum_labels={at_once} does not divide batch.labels="
    f"{config.batch.labels}: groups of labels are of one size; 0 for one group",
  )
  check_choice(
    "model.attention_dtype", model.attention_dtype, ("float32", "bfloat16")
  )
  check_choice(
    "model.remat", model.remat, ("none", "attention", "branches", "full")
  )
  require(
    model.in_channels == model.out_channels,
    f"model.in_channels={model.in_channels} and model.out_channels="
    f"{model.out_channels} differ: noise and samples have one shape",
  )
  for alpha in evaluation.alphas:
    require(
      guidance.minimum <= alpha <= guidance.maximum,
      f"eval.alphas={evaluation.alphas}: {alpha} was never trained, alpha is "
      f"drawn from [{guidance.minimum}, {guidance.maximum}] (guidance.*)",
    )
  require(
    len(evaluation.alphas) > 0, "eval.alphas is empty: give at least one alpha"
  )
  check_distinct("eval.alphas", evaluation.alphas)
  for name in evaluation.metrics:
    check_choice("eval.metrics", name, EVAL_METRICS)
  check_distinct("eval.metrics", evaluation.metrics)
  require(
    "fd_encoder" not in evaluation.metrics or len(config.encoders) > 0,
    "eval.metrics holds 'fd_encoder' but there are no encoders: remove it or "
    "add an encoder",
  )
  check_judges(
    evaluation.metrics,
    {"inception": evaluation.inception, "dinov2": evaluation.dinov2},
  )
  check_at_least("eval.num_samples", evaluation.num_samples, 0)
  require(
    evaluation.num_samples != 1, "eval.num_samples=1: figures need at least 2"
  )
  require(
    evaluation.labels != ""
    or model.num_classes == 0
    or evaluation.num_samples % model.num_classes == 0,
    f"eval.num_samples={evaluation.num_samples} can't be balanced over "
    f"model.num_classes={model.num_classes}: use a multiple, a list of labels "
    "(eval.labels), or 0 for as many as are held out",
  )
  check_at_least("eval.coverage_k", evaluation.coverage_k, 1)
  check_at_least("eval.grid_classes", evaluation.grid_classes, 1)
  check_at_least("eval.grid_per_class", evaluation.grid_per_class, 1)
  best = config.checkpoint.best_metric
  require(
    best == "" or best in evaluation.metrics,
    f"checkpoint.best_metric={best!r} is not computed: eval.metrics="
    f"{evaluation.metrics}; use one of them or ''",
  )
  require(
    best == "" or best in RANKING_METRICS,
    f"checkpoint.best_metric={best!r}: the best is the smallest, so it must "
    f"be a distance {RANKING_METRICS} or ''",
  )
  saved = config.checkpoint.every
  require(
    best == "" or (evaluation.every > 0 and evaluation.every % saved == 0),
    f"checkpoint.best_metric={best!r} with eval.every={evaluation.every} and "
    f"checkpoint.every={saved}: only an evaluation of a step that is saved "
    "can be ranked; make eval.every a multiple of checkpoint.every, or "
    "checkpoint.best_metric=''",
  )


def check_judges(names: Sequence[str], judges: Mapping[str, Judge]) -> None:
  """Raises ConfigError where figures lack their network or real images.

  Args:
    names: figures.
    judges: {'inception' or 'dinov2': what there is}.
  """
  for judge, figures in JUDGED_METRICS.items():
    wanted = [name for name in names if name in figures]
    require(
      not wanted or judges[judge].path != "",
      f"eval.metrics holds {wanted}, which need eval.{judge}.path: python -m "
      f"drift_jax.tools.convert_weights {judge} writes it",
    )
    compared = [name for name in wanted if name != "inception_score"]
    require(
      not compared or judges[judge].reference != "",
      f"eval.metrics holds {compared}, which need eval.{judge}.reference, "
      "statistics of real images: python -m drift_jax.tools.reference_stats "
      "makes them; public .npz files for ImageNet at 256 px are read too",
    )


def _check_queue(config: GeneratorConfig) -> None:
  batch, queue = config.batch, config.queue
  check_at_least("queue.push_per_step", queue.push_per_step, 1)
  for size, drawn in (
    ("class_size", "positives"),
    ("unconditional_size", "unconditional"),
  ):
    have, want = getattr(queue, size), getattr(batch, drawn)
    check_at_least(f"queue.{size}", have, 1)
    require(
      have >= want or queue.with_replacement,
      f"queue.{size}={have} can't give batch.{drawn}={want} without "
      "replacement: raise it or set queue.with_replacement=True",
    )
  check_at_least("queue.prefill", queue.prefill, 0)
  drawn = "positives"
  if batch.unconditional > batch.positives:
    drawn = "unconditional"
  want = getattr(batch, drawn)
  # Prefilling pushes whole batches.
  pushes = math.ceil(queue.prefill / queue.push_per_step) + 1
  require(
    queue.with_replacement or pushes * queue.push_per_step >= want,
    f"queue.prefill={queue.prefill} and queue.push_per_step="
    f"{queue.push_per_step} leave {pushes * queue.push_per_step} samples in "
    f"the queue at the first step, fewer than batch.{drawn}={want}: raise "
    "queue.prefill or set queue.with_replacement=True",
  )
