"""What may go together: ranges and contradictions of a typed config."""

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from drift_jax import options
from drift_jax.config.schema import (
  CROPS,
  DECODERS,
  DEMONSTRATIONS,
  DISTRIBUTIONS,
  ENVIRONMENTS,
  EVAL_METRICS,
  FROZEN_SHARDINGS,
  JUDGED_METRICS,
  LEAST_TEMPERATURE_SCALE,
  POLICY_METHODS,
  POLICY_PROBLEMS,
  RANKING_METRICS,
  SOURCES,
  TEMPERATURE_KINDS,
  TOY_MODELS,
  WIRE_DTYPES,
  AnyConfig,
  ConfigError,
  Drift,
  Encoder,
  GeneratorConfig,
  Judge,
  MaeConfig,
  PolicyConfig,
  ToyConfig,
  Vae,
)


def check(config: AnyConfig) -> None:
  """Raises ConfigError where values are out of range or contradict."""
  if isinstance(config, GeneratorConfig):
    _check_generator(config)
  elif isinstance(config, ToyConfig):
    _check_toy(config)
  elif isinstance(config, PolicyConfig):
    _check_policy(config)
  else:
    _check_mae(config)


def _require(condition: bool, message: str) -> None:
  if not condition:
    raise ConfigError(message)


def _choice(path: str, value: str, options: tuple[str, ...]) -> None:
  close = difflib.get_close_matches(value, options, n=1)
  hint = f" (did you mean {close[0]!r}?)" if close else ""
  _require(
    value in options,
    f"{path}={value!r}: valid options are {list(options)}{hint}",
  )


def _at_least(path: str, value: float, least: float) -> None:
  _require(value >= least, f"{path}={value!r} must be at least {least}")


def _distinct(path: str, values: tuple[Any, ...]) -> None:
  _require(
    len(set(values)) == len(values), f"{path}={values} holds a value twice"
  )


def _check_common(config: AnyConfig) -> None:
  optim, checkpoint = config.optim, config.checkpoint
  _require(
    0 <= config.seed < 2**32,
    f"seed={config.seed} must lie in [0, 2**32): random keys have 32 bits",
  )
  _choice("optim.schedule", optim.schedule, ("constant", "cosine"))
  _at_least("train.num_steps", config.train.num_steps, 1)
  _at_least("train.log_every", config.train.log_every, 1)
  _at_least("data.prefetch", config.data.prefetch, 0)
  _at_least("optim.warmup_steps", optim.warmup_steps, 0)
  _at_least("optim.weight_decay", optim.weight_decay, 0)
  for name in ("learning_rate", "grad_clip", "eps"):
    value = getattr(optim, name)
    # In float32, where less than about 1e-38 is 0.
    _require(value > 1e-38, f"optim.{name}={value!r} must be positive")
  for name in ("b1", "b2"):
    value = getattr(optim, name)
    # Where float32 makes it 1, Adam's bias correction divides by 0.
    _require(
      0 <= value <= 1 - 2**-24, f"optim.{name}={value!r} must lie in [0, 1)"
    )
  _require(
    optim.warmup_steps <= config.train.num_steps,
    f"optim.warmup_steps={optim.warmup_steps} is longer than "
    f"train.num_steps={config.train.num_steps}",
  )
  decays = config.ema.decays
  _require(
    len(decays) > 0 and all(0 <= d < 1 for d in decays),
    f"ema.decays={decays} must hold at least one value in [0, 1)",
  )
  _distinct("ema.decays", decays)
  _require(
    config.eval.ema_decay in decays,
    f"eval.ema_decay={config.eval.ema_decay} is not one of ema.decays={decays}",
  )
  for name in ("fsdp", "data"):
    size = getattr(config.mesh, name)
    _require(
      size == -1 or size >= 1, f"mesh.{name}={size} must be -1 or at least 1"
    )
  _require(
    (config.mesh.data, config.mesh.fsdp) != (-1, -1),
    "mesh.data=-1 and mesh.fsdp=-1: only one may be -1 (all devices that the "
    "other leaves); set the other",
  )
  _at_least(
    "processes.heartbeat_timeout", config.processes.heartbeat_timeout, 10
  )
  _at_least("processes.join_timeout", config.processes.join_timeout, 1)
  _at_least("eval.every", config.eval.every, 0)
  _at_least("checkpoint.every", checkpoint.every, 1)
  _at_least("checkpoint.keep_latest", checkpoint.keep_latest, 1)
  _at_least("checkpoint.keep_every", checkpoint.keep_every, 0)
  _choice("checkpoint.on_corrupt", checkpoint.on_corrupt, ("error", "previous"))


def _check_images(config: GeneratorConfig | MaeConfig) -> None:
  """What tasks have in common that read images."""
  _check_common(config)
  _check_data(config)
  _at_least("eval.batch_size", config.eval.batch_size, 1)
  _choice("model.dtype", config.model.dtype, ("float32", "bfloat16"))
  # 0: as many as the data have, filled in when they are opened.
  _at_least("model.num_classes", config.model.num_classes, 0)


def _check_frozen(path: str, frozen: Encoder | Vae) -> None:
  _choice(f"{path}.dtype", frozen.dtype, ("float32", "bfloat16"))
  _choice(f"{path}.sharding", frozen.sharding, FROZEN_SHARDINGS)
  _require(
    not frozen.model or "kind" in frozen.model,
    f"{path}.model={dict(frozen.model)} has no 'kind': want {{}} or the "
    "model's kind and arguments, as in configs/models.py",
  )


def _check_source(source: str) -> None:
  kind, _, rest = source.partition(":")
  kinds = {option.partition(":")[0]: option for option in SOURCES}
  close = difflib.get_close_matches(kind, kinds, n=1)
  hint = f" (did you mean {kinds[close[0]]!r}?)" if close else ""
  _require(
    source == "digits" or (rest != "" and kind in kinds and kind != "digits"),
    f"data.source={source!r}: valid options are {list(SOURCES)}{hint}",
  )


def _check_data(config: GeneratorConfig | MaeConfig) -> None:
  data, vae = config.data, config.vae
  _check_source(data.source)
  for name in ("num_threads", "image_size"):
    _at_least(f"data.{name}", getattr(data, name), 1)
  for name in ("num_workers", "max_corrupt", "held_out"):
    _at_least(f"data.{name}", getattr(data, name), 0)
  _choice("data.crop", data.crop, CROPS)
  _choice("data.wire", data.wire, WIRE_DTYPES)
  _choice("data.decoder", data.decoder, DECODERS)
  _choice("data.class_order", data.class_order, options.CLASS_ORDERS)
  _require(
    data.channels in (1, 3), f"data.channels={data.channels} must be 1 or 3"
  )
  scale = data.crop_scale
  _require(
    len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1,
    f"data.crop_scale={scale} must be (smallest, largest) share of the "
    "image's area, 0 < smallest <= largest <= 1",
  )
  _require(data.train_split != "", "data.train_split is empty: name a split")
  _require(
    data.train_split != data.test_split,
    f"data.train_split and data.test_split are both {data.train_split!r}: "
    "held-out images must not be trained on",
  )
  _require(
    data.wire != "uint8" or not data.source.startswith("latents:"),
    f"data.wire='uint8' can't hold latents (data.source={data.source!r}): "
    "use 'bfloat16' or 'float16'",
  )
  _require(
    data.held_out == 0 or not data.source.startswith("latents:"),
    f"data.held_out={data.held_out} with data.source={data.source!r}: a latent "
    "cache is not divided; cache the held-out images as a split of their own "
    "(data.test_split) and set data.held_out=0",
  )
  _check_frozen("vae", vae)
  _require(
    vae.path != "" or not data.source.startswith("latents:"),
    f"data.source={data.source!r} needs vae.path, the autoencoder that made "
    "the latents: python -m drift_jax.tools.convert_weights vae writes it",
  )


def check_new(config: AnyConfig) -> None:
  """Raises ConfigError for what no run may begin with.

  Earlier runs may have it: they can be continued and sampled.
  """
  drift: Drift | None = getattr(config, "drift", None)
  if drift is None or drift.temperature_scale.kind != "annealed":
    return
  rate, num_steps = drift.temperature_scale.rate, config.train.num_steps
  most = -math.log(LEAST_TEMPERATURE_SCALE) / num_steps
  _require(
    rate <= most,
    f"drift.temperature_scale.rate={rate} with train.num_steps={num_steps}: "
    f"temperatures would fall to exp(-{rate * num_steps:g}) of the first, "
    f"below {LEAST_TEMPERATURE_SCALE:g}; use at most {most:.3g}",
  )


def _check_drift(drift: Drift, positives: int) -> None:
  """Field and options are checked where the fields are: in experiment."""
  _require(
    len(drift.temperatures) > 0 and all(t > 0 for t in drift.temperatures),
    f"drift.temperatures={drift.temperatures} must hold at least one positive "
    "value",
  )
  _distinct("drift.temperatures", drift.temperatures)
  _at_least("drift.affinity_floor", drift.affinity_floor, 0)
  _choice("drift.normalization", drift.normalization, ("xy", "y", "none"))
  _choice("drift.reduction", drift.reduction, ("sum", "mean"))
  scale = drift.temperature_scale
  _choice("drift.temperature_scale.kind", scale.kind, TEMPERATURE_KINDS)
  kind = scale.kind
  changes = kind in ("annealed", "learned")
  _require(
    scale.rate > 0 if changes else scale.rate == 0,
    f"drift.temperature_scale.rate={scale.rate} with kind={kind!r}: want a "
    "positive rate for 'annealed' and 'learned', else 0",
  )
  _require(
    1 < scale.neighbours < positives
    if kind == "adaptive"
    else scale.neighbours == 0,
    f"drift.temperature_scale.neighbours={scale.neighbours} with kind="
    f"{kind!r}: want a number between 1 and batch.positives={positives} for "
    "'adaptive', else 0",
  )


def _check_generator(config: GeneratorConfig) -> None:
  _check_images(config)
  _require(
    config.vae.path == "" or config.data.source.startswith("latents:"),
    f"vae.path={config.vae.path!r} with data.source={config.data.source!r}: a "
    "generator of latents reads a latent cache; make one by python -m "
    "drift_jax.tools.cache_latents and set data.source=latents:DIR",
  )
  batch, model = config.batch, config.model
  guidance, evaluation = config.guidance, config.eval
  for name in ("labels", "generated", "positives"):
    _at_least(f"batch.{name}", getattr(batch, name), 1)
  _at_least("batch.unconditional", batch.unconditional, 0)
  _require(
    batch.generated >= 2
    or batch.unconditional >= 1
    or config.drift.negatives != "own",
    f"batch.generated={batch.generated} with batch.unconditional=0: a single "
    "sample has no negative but itself, which is masked, so nothing repels "
    "it; use at least 2",
  )
  _choice("batch.reals", batch.reals, ("queue", "class_grouped"))
  if batch.reals == "queue":
    _check_queue(config)
  _check_drift(config.drift, batch.positives)
  _require(
    1 <= guidance.minimum <= guidance.maximum,
    f"guidance.minimum={guidance.minimum}, guidance.maximum="
    f"{guidance.maximum}: want 1 <= minimum <= maximum",
  )
  _require(
    0 <= guidance.no_cfg_frac <= 1,
    f"guidance.no_cfg_frac={guidance.no_cfg_frac} must lie in [0, 1]",
  )
  _require(
    guidance.maximum == 1 or batch.unconditional > 0,
    f"guidance.maximum={guidance.maximum} > 1 needs unconditional reals, but "
    "batch.unconditional=0: set it, or guidance.maximum=1",
  )
  _require(
    config.features.sample
    or any(encoder.in_loss for encoder in config.encoders.values()),
    "features.sample=False with no encoder in the loss leaves no features to "
    "drift in: set features.sample=True or encoders.NAME.in_loss=True",
  )
  _at_least("features.every_k_block", config.features.every_k_block, 1)
  for name in ("patch_mean_size", "patch_std_size"):
    sizes = getattr(config.features, name)
    _require(
      all(size >= 1 for size in sizes),
      f"features.{name}={sizes}: sides of patches must be at least 1; () for "
      "none",
    )
  for name, encoder in config.encoders.items():
    _check_frozen(f"encoders.{name}", encoder)
    _require(
      encoder.path != "",
      f"encoders.{name}.path is empty: give the directory that encoder "
      "training wrote, WORKDIR/encoder",
    )
    _require(
      name != "vae",
      "encoders.vae: that name is the autoencoder's among the frozen weights; "
      "choose another",
    )
    _require(
      not encoder.decode or config.vae.path != "",
      f"encoders.{name}.decode=True needs vae.path, the autoencoder that "
      "decodes: set it, for a generator of latents; encoders read the samples "
      f"of a generator of pixels as they are, encoders.{name}.decode=False",
    )
  _choice("train.kernels", config.train.kernels, ("auto", "pallas", "xla"))
  _choice("train.accum_scalars", config.train.accum_scalars, ("group", "exact"))
  at_once = config.train.accum_labels
  _at_least("train.accum_labels", at_once, 0)
  _require(
    not at_once or config.batch.labels % at_once == 0,
    f"train.accum_labels={at_once} does not divide batch.labels="
    f"{config.batch.labels}: groups of labels are of one size; 0 for one group",
  )
  _choice(
    "model.attention_dtype", model.attention_dtype, ("float32", "bfloat16")
  )
  _choice("model.remat", model.remat, ("none", "attention", "branches", "full"))
  _require(
    model.in_channels == model.out_channels,
    f"model.in_channels={model.in_channels} and model.out_channels="
    f"{model.out_channels} differ: noise and samples have one shape",
  )
  for alpha in evaluation.alphas:
    _require(
      guidance.minimum <= alpha <= guidance.maximum,
      f"eval.alphas={evaluation.alphas}: {alpha} was never trained, alpha is "
      f"drawn from [{guidance.minimum}, {guidance.maximum}] (guidance.*)",
    )
  _require(
    len(evaluation.alphas) > 0, "eval.alphas is empty: give at least one alpha"
  )
  _distinct("eval.alphas", evaluation.alphas)
  for name in evaluation.metrics:
    _choice("eval.metrics", name, EVAL_METRICS)
  _distinct("eval.metrics", evaluation.metrics)
  _require(
    "fd_encoder" not in evaluation.metrics or len(config.encoders) > 0,
    "eval.metrics holds 'fd_encoder' but there are no encoders: remove it or "
    "add an encoder",
  )
  check_judges(
    evaluation.metrics,
    {"inception": evaluation.inception, "dinov2": evaluation.dinov2},
  )
  _at_least("eval.num_samples", evaluation.num_samples, 0)
  _require(
    evaluation.num_samples != 1, "eval.num_samples=1: figures need at least 2"
  )
  _require(
    evaluation.labels != ""
    or model.num_classes == 0
    or evaluation.num_samples % model.num_classes == 0,
    f"eval.num_samples={evaluation.num_samples} can't be balanced over "
    f"model.num_classes={model.num_classes}: use a multiple, a list of labels "
    "(eval.labels), or 0 for as many as are held out",
  )
  _at_least("eval.coverage_k", evaluation.coverage_k, 1)
  _at_least("eval.grid_classes", evaluation.grid_classes, 1)
  _at_least("eval.grid_per_class", evaluation.grid_per_class, 1)
  best = config.checkpoint.best_metric
  _require(
    best == "" or best in evaluation.metrics,
    f"checkpoint.best_metric={best!r} is not computed: eval.metrics="
    f"{evaluation.metrics}; use one of them or ''",
  )
  _require(
    best == "" or best in RANKING_METRICS,
    f"checkpoint.best_metric={best!r}: the best is the smallest, so it must "
    f"be a distance {RANKING_METRICS} or ''",
  )
  saved = config.checkpoint.every
  _require(
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
    _require(
      not wanted or judges[judge].path != "",
      f"eval.metrics holds {wanted}, which need eval.{judge}.path: python -m "
      f"drift_jax.tools.convert_weights {judge} writes it",
    )
    compared = [name for name in wanted if name != "inception_score"]
    _require(
      not compared or judges[judge].reference != "",
      f"eval.metrics holds {compared}, which need eval.{judge}.reference, "
      "statistics of real images: python -m drift_jax.tools.reference_stats "
      "makes them; public .npz files for ImageNet at 256 px are read too",
    )


def _check_queue(config: GeneratorConfig) -> None:
  batch, queue = config.batch, config.queue
  _at_least("queue.push_per_step", queue.push_per_step, 1)
  for size, drawn in (
    ("class_size", "positives"),
    ("unconditional_size", "unconditional"),
  ):
    have, want = getattr(queue, size), getattr(batch, drawn)
    _at_least(f"queue.{size}", have, 1)
    _require(
      have >= want or queue.with_replacement,
      f"queue.{size}={have} can't give batch.{drawn}={want} without "
      "replacement: raise it or set queue.with_replacement=True",
    )
  _at_least("queue.prefill", queue.prefill, 0)
  drawn = "positives"
  if batch.unconditional > batch.positives:
    drawn = "unconditional"
  want = getattr(batch, drawn)
  # Prefilling pushes whole batches.
  pushes = math.ceil(queue.prefill / queue.push_per_step) + 1
  _require(
    queue.with_replacement or pushes * queue.push_per_step >= want,
    f"queue.prefill={queue.prefill} and queue.push_per_step="
    f"{queue.push_per_step} leave {pushes * queue.push_per_step} samples in "
    f"the queue at the first step, fewer than batch.{drawn}={want}: raise "
    "queue.prefill or set queue.with_replacement=True",
  )


def _check_mae(config: MaeConfig) -> None:
  _check_images(config)
  mae = config.mae
  _at_least("mae.batch_size", mae.batch_size, 1)
  _require(
    0 < mae.mask_ratio < 1,
    f"mae.mask_ratio={mae.mask_ratio} must lie strictly between 0 and 1",
  )
  _require(
    0 <= mae.classification_steps <= config.train.num_steps,
    f"mae.classification_steps={mae.classification_steps} must lie in "
    f"[0, train.num_steps={config.train.num_steps}]",
  )
  _at_least("mae.classification_ramp", mae.classification_ramp, 1)
  _require(
    0 <= mae.classification_weight <= 1,
    f"mae.classification_weight={mae.classification_weight} must lie in [0, 1]",
  )
  _require(
    len(config.model.layers) == 4 and min(config.model.layers) >= 1,
    f"model.layers={config.model.layers} must hold 4 counts of at least 1",
  )
  _choice("checkpoint.best_metric", config.checkpoint.best_metric, ("",))


def _check_toy(config: ToyConfig) -> None:
  _check_common(config)
  model, batch, drift = config.model, config.batch, config.drift
  _check_drift(drift, batch.positives)
  _choice("data.distribution", config.data.distribution, DISTRIBUTIONS)
  _at_least("data.noise", config.data.noise, 0)
  _choice("model.kind", model.kind, TOY_MODELS)
  for name in ("noise_size", "width", "depth"):
    _at_least(f"model.{name}", getattr(model, name), 1)
  _require(
    len(model.location) == 2,
    f"model.location={model.location} must be the two coordinates of a point",
  )
  _require(
    model.spread > 0,
    f"model.spread={model.spread} must be positive: samples that start as one "
    "point can't be told apart",
  )
  for name in ("labels", "positives"):
    _at_least(f"batch.{name}", getattr(batch, name), 1)
  _require(
    batch.generated >= 2 or drift.negatives != "own",
    f"batch.generated={batch.generated}: a single sample has no negative but "
    "itself, which is masked, so nothing repels it; use at least 2",
  )
  if config.has_particles:
    _require(
      not drift.normalize_features,
      "drift.normalize_features=True with model.kind='particles': their step "
      "is x <- x + eta V on raw distances; set it to False",
    )
    _require(
      drift.negatives != "independent",
      "drift.negatives='independent' with model.kind='particles': there is no "
      "noise to draw a second batch from; use 'own' or 'own_with_self'",
    )
  _require(
    config.eval.num_samples >= 2,
    f"eval.num_samples={config.eval.num_samples}: figures need at least 2",
  )
  _choice("checkpoint.best_metric", config.checkpoint.best_metric, ("",))


def _check_policy(config: PolicyConfig) -> None:
  _check_common(config)
  data, evaluation = config.data, config.eval
  _choice("environment", config.environment, ENVIRONMENTS)
  kind, _, path = data.source.partition(":")
  _require(
    kind == "expert" and not path or kind in ("zarr", "hdf5") and path != "",
    f"data.source={data.source!r}: valid options are {DEMONSTRATIONS}",
  )
  _at_least("data.episodes", data.episodes, 0)
  _at_least("data.seed", data.seed, 0)
  if kind == "expert":
    _require(
      config.environment != "" and data.episodes >= 1,
      f"data.source='expert' with environment={config.environment!r}, "
      f"data.episodes={data.episodes}: the expert is the environment's, and "
      "makes at least one episode",
    )
  _require(
    len(data.observations) > 0, "data.observations=() must name at least one"
  )
  _distinct("data.observations", data.observations)
  for name in ("observation_horizon", "prediction_horizon", "executed"):
    _at_least(f"data.{name}", getattr(data, name), 1)
  _require(
    data.observation_horizon - 1 + data.executed <= data.prediction_horizon,
    f"data.executed={data.executed}: a chunk of data.prediction_horizon="
    f"{data.prediction_horizon} actions begins with the first of "
    f"data.observation_horizon={data.observation_horizon} observations, so at "
    f"most {data.prediction_horizon - data.observation_horizon + 1} are left",
  )
  _check_policy_loss(config)
  _require(
    len(config.model.widths) > 0, "model.widths=() must name at least one"
  )
  for width in config.model.widths:
    _at_least("model.widths", width, 1)
  for name in ("kernel_size", "groups", "keypoints", "image_features"):
    _at_least(f"model.{name}", getattr(config.model, name), 1)
  _at_least("model.crop", config.model.crop, 0)
  _require(
    evaluation.every == 0 or config.environment != "",
    f"eval.every={evaluation.every} with environment='': there is nothing to "
    "roll out in; set eval.every=0",
  )
  _at_least("eval.seed", evaluation.seed, 0)
  for name in ("episodes", "parallel", "threads", "checkpoints"):
    _at_least(f"eval.{name}", getattr(evaluation, name), 1)
  _require(
    0 <= evaluation.videos <= evaluation.episodes,
    f"eval.videos={evaluation.videos} must lie in [0, eval.episodes = "
    f"{evaluation.episodes}]",
  )
  _choice("checkpoint.best_metric", config.checkpoint.best_metric, ("",))


def _check_policy_loss(config: PolicyConfig) -> None:
  loss, batch, samplers = config.loss, config.batch, config.eval.samplers
  _choice("loss.method", loss.method, POLICY_METHODS)
  _choice("loss.problem", loss.problem, POLICY_PROBLEMS)
  _at_least("batch.size", batch.size, 1)
  if loss.method == "drifting":
    positives = batch.size if loss.problem == "batch" else 1
    _check_drift(config.drift, positives)
    _require(
      batch.generated >= 2 or config.drift.negatives != "own",
      f"batch.generated={batch.generated}: a single sample of an observation "
      "has no negative but itself, which is masked, so nothing repels it and "
      "the policy becomes a regression; use at least 2 (8 as published)",
    )
  elif loss.method == "regression":
    _require(
      batch.generated == 1,
      f"batch.generated={batch.generated} with loss.method='regression': want "
      "1, it has one prediction of an observation",
    )
  else:
    _at_least("batch.generated", batch.generated, 1)
  diffuses = loss.method == "diffusion"
  for name, value in (
    ("loss.diffusion_steps", loss.diffusion_steps),
    ("model.time_size", config.model.time_size),
    ("eval.samplers", len(samplers)),
  ):
    _require(
      value >= 1 if diffuses else value == 0,
      f"{name}: loss.method={loss.method!r} wants "
      + ("at least 1" if diffuses else "none; only 'diffusion' reads it")
      + f", got {value}",
    )
