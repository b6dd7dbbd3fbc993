"""The typed form of a config, and its validation with messages that teach.

configs/*.py hold the values (every default included); the dataclasses here
hold names, types and what may go together. `parse` turns a ConfigDict into
them before anything is compiled: an unknown key, a missing key, a wrong type
or contradicting values raise ConfigError with the key, the value and what
would be valid.
"""

import dataclasses
import difflib
import json
import math
import typing
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections


class ConfigError(ValueError):
  """A config that can't be run; the message names key, value and remedy."""


@typing.dataclass_transform(frozen_default=True, kw_only_default=True)
class Section:
  """Base of all sections: subclasses become frozen keyword-only classes."""

  def __init_subclass__(cls, **kwargs: Any):
    super().__init_subclass__(**kwargs)
    dataclasses.dataclass(frozen=True, kw_only=True)(cls)


class Data(Section):
  """Where real images come from."""

  source: str
  num_threads: int


class GeneratorModel(Section):
  """Arguments of drift_jax.models.build_generator."""

  input_size: int
  in_channels: int
  out_channels: int
  patch_size: int
  hidden_size: int
  depth: int
  num_heads: int
  mlp_ratio: float
  num_classes: int
  cond_dim: int
  context_tokens: int
  style_vocab: int
  style_tokens: int
  dtype: str
  attention_dtype: str
  remat: bool


class MaeModel(Section):
  """Arguments of drift_jax.models.build_mae."""

  in_channels: int
  base_channels: int
  layers: tuple[int, ...]
  input_patch_size: int
  mask_patch_size: int
  num_classes: int
  norm_groups: int
  dtype: str
  remat: bool


class Encoder(Section):
  """A frozen feature encoder: an exported directory and its precision.

  With in_loss the generator drifts in its features; without, it only judges
  (eval.metrics 'fd_encoder').
  """

  path: str
  dtype: str
  in_loss: bool


class Features(Section):
  """Which feature vectors of A.5 enter the loss."""

  sample: bool
  every_k_block: int
  patch_mean_size: tuple[int, ...]
  patch_std_size: tuple[int, ...]
  use_mean: bool
  use_std: bool


class Drift(Section):
  """The drifting field and its normalisations (method of A.6)."""

  temperatures: tuple[float, ...]
  affinity_floor: float
  normalization: str
  attraction: float
  repulsion: float


class Guidance(Section):
  """Distribution of the guidance scale alpha during training (A.7)."""

  minimum: float
  maximum: float
  exponent: float
  no_cfg_frac: float


class Batch(Section):
  """Sizes of one step: N_c labels, each with N, N_pos and N_unc samples."""

  labels: int
  generated: int
  positives: int
  unconditional: int


class Queue(Section):
  """The sample queue (A.8)."""

  class_size: int
  unconditional_size: int
  push_per_step: int
  prefill: int
  with_replacement: bool


class Optim(Section):
  """AdamW, its schedule and the gradient clip."""

  schedule: str
  learning_rate: float
  warmup_steps: int
  b1: float
  b2: float
  eps: float
  weight_decay: float
  grad_clip: float


class Ema(Section):
  """Exponential moving averages of the parameters, several at once."""

  decays: tuple[float, ...]


class Train(Section):
  """Length of the run and how often it reports."""

  num_steps: int
  log_every: int


class GeneratorEval(Section):
  """Evaluation in the loop."""

  every: int
  num_images: int
  batch_size: int
  alphas: tuple[float, ...]
  ema_decay: float
  metrics: tuple[str, ...]
  coverage_k: int
  grid_per_class: int


class MaeEval(Section):
  """Evaluation of the encoder on held-out images."""

  every: int
  batch_size: int
  ema_decay: float


class Checkpoint(Section):
  """What is saved, what is kept, what happens when it can't be read."""

  every: int
  keep_latest: int
  keep_every: int
  best_metric: str
  on_corrupt: str


class Mesh(Section):
  """Sizes of the device mesh; one may be -1."""

  data: int
  fsdp: int


class MaeLoss(Section):
  """Masked reconstruction and the classification fine-tune (A.3)."""

  batch_size: int
  mask_ratio: float
  classification_steps: int
  classification_ramp: int
  classification_weight: float


class GeneratorConfig(Section):
  """A run that trains a generator: config.task = 'generator'."""

  task: str
  seed: int
  data: Data
  model: GeneratorModel
  encoders: Mapping[str, Encoder]
  features: Features
  drift: Drift
  guidance: Guidance
  batch: Batch
  queue: Queue
  optim: Optim
  ema: Ema
  train: Train
  eval: GeneratorEval
  checkpoint: Checkpoint
  mesh: Mesh


class MaeConfig(Section):
  """A run that trains a feature encoder: config.task = 'mae'."""

  task: str
  seed: int
  data: Data
  model: MaeModel
  mae: MaeLoss
  optim: Optim
  ema: Ema
  train: Train
  eval: MaeEval
  checkpoint: Checkpoint
  mesh: Mesh


TASKS = {"generator": GeneratorConfig, "mae": MaeConfig}

# The figures that the generator's evaluation can compute.
EVAL_METRICS = (
  "fd_pixel",
  "fd_encoder",
  "coverage",
  "label_accuracy",
  "duplicates",
)
# Keys that a resumed run may change; any other change is another experiment.
RESUMABLE = ("train.", "eval.", "checkpoint.", "mesh.", "data.num_threads")
# What the values that rank checkpoints depend on: while a best one is kept,
# a change would compare figures that are not comparable.
RANKING = (
  "checkpoint.best_metric",
  "eval.alphas",
  "eval.ema_decay",
  "eval.num_images",
)


def parse(config: Any) -> GeneratorConfig | MaeConfig:
  """The typed, validated form of a ConfigDict (or plain dict).

  Raises:
    ConfigError: see the module's docstring.
  """
  values = (
    config.to_dict()
    if isinstance(config, ml_collections.ConfigDict)
    else config
  )
  task = values.get("task")
  if task not in TASKS:
    raise ConfigError(f"task={task!r}: valid options are {sorted(TASKS)}")
  parsed = _build(TASKS[task], values, "")
  check(parsed)
  return parsed


def check(config: GeneratorConfig | MaeConfig) -> None:
  """Raises ConfigError where values are out of range or contradict."""
  if isinstance(config, GeneratorConfig):
    _check_generator(config)
  else:
    _check_mae(config)


def unknown_key(key: str, value: Any, valid: Iterable[str]) -> str:
  """The message about a dotted key whose last name is not a valid one."""
  valid = sorted(valid)
  close = difflib.get_close_matches(
    key.rpartition(".")[2], valid, n=3, cutoff=0.5
  )
  hint = f"did you mean {' or '.join(close)}? " if close else ""
  options = (
    f"valid keys here are {valid}"
    if valid
    else "this section is empty, add it in the config file"
  )
  return f"unknown key {key}={value!r}: {hint}{options}"


def check_override(
  config: Mapping[str, Any], key: str, value: str | None
) -> None:
  """Raises ConfigError where a dotted key is not one of a config's keys.

  Args:
    config: a plain dict, with every key that may be overridden.
    key: e.g. 'optim.learning_rate'.
    value: what the key is to be set to, for the message.
  """
  section: Any = config
  names = key.split(".")
  for depth, name in enumerate(names):
    if not isinstance(section, Mapping):
      raise ConfigError(
        f"unknown key {key}={value!r}: {'.'.join(names[:depth])} is a value, "
        "not a section"
      )
    if name not in section:
      raise ConfigError(
        unknown_key(".".join(names[: depth + 1]), value, section)
      )
    section = section[name]


def _build(cls: Any, values: Any, path: str) -> Any:
  """Builds a section from a mapping, recursively."""
  if not isinstance(values, Mapping):
    raise ConfigError(f"{path[:-1]}={values!r} must be a section (a dict)")
  hints = typing.get_type_hints(cls)
  for key in values:
    if key not in hints:
      raise ConfigError(unknown_key(path + str(key), values[key], hints))
  missing = sorted(set(hints) - set(values))
  if missing:
    raise ConfigError(f"missing key {path}{missing[0]} (all: {missing})")
  return cls(
    **{key: _convert(hints[key], values[key], path + key) for key in hints}
  )


def _convert(hint: Any, value: Any, path: str) -> Any:
  """Checks a value against its hint; ints pass as floats, lists as tuples."""
  origin = typing.get_origin(hint)
  if dataclasses.is_dataclass(hint):
    return _build(hint, value, path + ".")
  if origin is Mapping:
    if not isinstance(value, Mapping):
      raise ConfigError(f"{path}={value!r} must be a dict of sections")
    item = typing.get_args(hint)[1]
    return {k: _convert(item, v, f"{path}.{k}") for k, v in value.items()}
  if origin is tuple:
    if not isinstance(value, (tuple, list)):
      raise ConfigError(
        f"{path}={value!r} has type {type(value).__name__}, want a tuple of "
        f"{typing.get_args(hint)[0].__name__}"
      )
    item = typing.get_args(hint)[0]
    return tuple(_convert(item, v, f"{path}[{i}]") for i, v in enumerate(value))
  if hint is float and type(value) is int:
    value = float(value)
  if type(value) is not hint:
    raise ConfigError(
      f"{path}={value!r} has type {type(value).__name__}, want {hint.__name__}"
    )
  _require(
    hint is not float or math.isfinite(value),
    f"{path}={value!r} must be a finite number",
  )
  return value


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


def _check_common(config: GeneratorConfig | MaeConfig) -> None:
  optim, checkpoint = config.optim, config.checkpoint
  _require(
    0 <= config.seed < 2**32,
    f"seed={config.seed} must lie in [0, 2**32): random keys have 32 bits",
  )
  _choice("optim.schedule", optim.schedule, ("constant", "cosine"))
  _at_least("train.num_steps", config.train.num_steps, 1)
  _at_least("train.log_every", config.train.log_every, 1)
  _at_least("data.num_threads", config.data.num_threads, 1)
  _at_least("optim.warmup_steps", optim.warmup_steps, 0)
  _at_least("optim.weight_decay", optim.weight_decay, 0)
  for name in ("learning_rate", "grad_clip", "eps"):
    value = getattr(optim, name)
    _require(value > 0, f"optim.{name}={value!r} must be positive")
  for name in ("b1", "b2"):
    value = getattr(optim, name)
    _require(0 <= value < 1, f"optim.{name}={value!r} must lie in [0, 1)")
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
  _at_least("eval.every", config.eval.every, 0)
  _at_least("eval.batch_size", config.eval.batch_size, 1)
  _at_least("checkpoint.every", checkpoint.every, 1)
  _at_least("checkpoint.keep_latest", checkpoint.keep_latest, 1)
  _at_least("checkpoint.keep_every", checkpoint.keep_every, 0)
  _choice("checkpoint.on_corrupt", checkpoint.on_corrupt, ("error", "previous"))
  _choice("model.dtype", config.model.dtype, ("float32", "bfloat16"))
  _at_least("model.num_classes", config.model.num_classes, 1)


def _check_generator(config: GeneratorConfig) -> None:
  _check_common(config)
  batch, queue, model = config.batch, config.queue, config.model
  drift, guidance, evaluation = config.drift, config.guidance, config.eval
  for name in ("labels", "generated", "positives"):
    _at_least(f"batch.{name}", getattr(batch, name), 1)
  _at_least("batch.unconditional", batch.unconditional, 0)
  _require(
    batch.generated >= 2 or batch.unconditional >= 1,
    f"batch.generated={batch.generated} with batch.unconditional=0: a single "
    "sample has no negative but itself, which is masked, so nothing repels "
    "it; use at least 2",
  )
  _require(
    queue.push_per_step >= batch.labels,
    f"queue.push_per_step={queue.push_per_step} is less than batch.labels="
    f"{batch.labels}: a step's labels are drawn from the samples just pushed",
  )
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
  _require(
    len(drift.temperatures) > 0 and all(t > 0 for t in drift.temperatures),
    f"drift.temperatures={drift.temperatures} must hold at least one positive "
    "value",
  )
  _distinct("drift.temperatures", drift.temperatures)
  _at_least("drift.affinity_floor", drift.affinity_floor, 0)
  _choice("drift.normalization", drift.normalization, ("xy", "y", "none"))
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
    _choice(f"encoders.{name}.dtype", encoder.dtype, ("float32", "bfloat16"))
    _require(
      encoder.path != "",
      f"encoders.{name}.path is empty: give the directory that encoder "
      "training wrote, WORKDIR/encoder",
    )
  _choice(
    "model.attention_dtype", model.attention_dtype, ("float32", "bfloat16")
  )
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
    len(evaluation.metrics) > 0 or evaluation.every == 0,
    f"eval.metrics is empty, but eval.every={evaluation.every}: give some of "
    f"{list(EVAL_METRICS)}, or eval.every=0 for no evaluation",
  )
  _require(
    "fd_encoder" not in evaluation.metrics or len(config.encoders) > 0,
    "eval.metrics holds 'fd_encoder' but there are no encoders: remove it or "
    "add an encoder",
  )
  _at_least("eval.num_images", evaluation.num_images, 2)
  _require(
    evaluation.num_images % model.num_classes == 0,
    f"eval.num_images={evaluation.num_images} can't be balanced over "
    f"model.num_classes={model.num_classes}: use a multiple",
  )
  _at_least("eval.coverage_k", evaluation.coverage_k, 1)
  _at_least("eval.grid_per_class", evaluation.grid_per_class, 1)
  best = config.checkpoint.best_metric
  _require(
    best == "" or best in evaluation.metrics,
    f"checkpoint.best_metric={best!r} is not computed: eval.metrics="
    f"{evaluation.metrics}; use one of them or ''",
  )
  _require(
    best == "" or best.startswith("fd_"),
    f"checkpoint.best_metric={best!r}: the best is the smallest, so it must "
    "be a Frechet distance ('fd_pixel' or 'fd_encoder') or ''",
  )
  saved = config.checkpoint.every
  _require(
    best == "" or (evaluation.every > 0 and evaluation.every % saved == 0),
    f"checkpoint.best_metric={best!r} with eval.every={evaluation.every} and "
    f"checkpoint.every={saved}: only an evaluation of a step that is saved "
    "can be ranked; make eval.every a multiple of checkpoint.every, or "
    "checkpoint.best_metric=''",
  )


def _check_mae(config: MaeConfig) -> None:
  _check_common(config)
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


def to_json(config: GeneratorConfig | MaeConfig) -> str:
  """The resolved config as JSON with sorted keys."""
  return json.dumps(dataclasses.asdict(config), indent=2, sort_keys=True)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested dict -> {'section.key': value}."""
  flat: dict[str, Any] = {}
  for key, value in values.items():
    if isinstance(value, Mapping) and value:
      flat.update(flatten(value, f"{prefix}{key}."))
    else:
      flat[f"{prefix}{key}"] = value
  return flat


def check_resumable(old: str, new: str) -> None:
  """Raises ConfigError where two configs (JSON) are not the same experiment.

  Keys under RESUMABLE may differ, with two exceptions: train.num_steps where
  the course of the training depends on its end, and the keys of RANKING while
  a best checkpoint is kept.
  """
  before, after = flatten(json.loads(old)), flatten(json.loads(new))
  different = {
    key: f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
    for key in sorted(set(before) | set(after))
    if before.get(key) != after.get(key)
  }
  changed = [
    text for key, text in different.items() if not key.startswith(RESUMABLE)
  ]
  if changed:
    raise ConfigError(
      "the workdir holds a run with another config; use a new workdir or the "
      f"old values. Changed: {'; '.join(changed)} (only {list(RESUMABLE)} may "
      "change in a resumed run)"
    )
  if "train.num_steps" in different:
    _check_new_end(different["train.num_steps"], before)
  best = before.get("checkpoint.best_metric")
  mixed = [different[key] for key in RANKING if key in different]
  if best and mixed:
    raise ConfigError(
      f"the workdir's best checkpoint is ranked by {best!r}, and figures from "
      "before and after this change can't be compared; use a new workdir or "
      f"the old values. Changed: {'; '.join(mixed)}"
    )


def _check_new_end(change: str, config: Mapping[str, Any]) -> None:
  """Raises ConfigError where training depends on train.num_steps."""
  schedule = config["optim.schedule"]
  reasons = []
  if schedule != "constant":
    reasons.append(
      f"optim.schedule={schedule!r} reaches its end at train.num_steps"
    )
  if fine_tune := config.get("mae.classification_steps"):
    reasons.append(
      f"the last mae.classification_steps={fine_tune} steps train otherwise"
    )
  if reasons:
    raise ConfigError(
      f"the workdir holds a run of another length; use a new workdir or the "
      f"old value. Changed: {change} (a resumed run may change it only where "
      f"nothing else depends on it, but {' and '.join(reasons)})"
    )
