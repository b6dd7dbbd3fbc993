"""What may go together: ranges and contradictions of a typed config."""

import difflib
import math
from typing import Any

from drift_jax.config.sections import (
  CROPS,
  DECODERS,
  FROZEN_SHARDINGS,
  LEAST_TEMPERATURE_SCALE,
  SOURCES,
  TEMPERATURE_KINDS,
  WIRE_DTYPES,
  Drift,
  Frozen,
  ImageConfig,
  RunConfig,
)
from drift_jax.system import options
from drift_jax.system.errors import ConfigError


def require(condition: bool, message: str) -> None:
  if not condition:
    raise ConfigError(message)


def check_choice(path: str, value: str, options: tuple[str, ...]) -> None:
  close = difflib.get_close_matches(value, options, n=1)
  hint = f" (did you mean {close[0]!r}?)" if close else ""
  require(
    value in options,
    f"{path}={value!r}: valid options are {list(options)}{hint}",
  )


def check_at_least(path: str, value: float, least: float) -> None:
  require(value >= least, f"{path}={value!r} must be at least {least}")


def check_distinct(path: str, values: tuple[Any, ...]) -> None:
  require(
    len(set(values)) == len(values), f"{path}={values} holds a value twice"
  )


def check_run(config: RunConfig) -> None:
  optim, checkpoint = config.optim, config.checkpoint
  require(
    0 <= config.seed < 2**32,
    f"seed={config.seed} must lie in [0, 2**32): random keys have 32 bits",
  )
  check_choice("optim.schedule", optim.schedule, ("constant", "cosine"))
  check_at_least("train.num_steps", config.train.num_steps, 1)
  check_at_least("train.log_every", config.train.log_every, 1)
  check_at_least("data.prefetch", config.data.prefetch, 0)
  check_at_least("optim.warmup_steps", optim.warmup_steps, 0)
  check_at_least("optim.weight_decay", optim.weight_decay, 0)
  for name in ("learning_rate", "grad_clip", "eps"):
    value = getattr(optim, name)
    # In float32, where less than about 1e-38 is 0.
    require(value > 1e-38, f"optim.{name}={value!r} must be positive")
  for name in ("b1", "b2"):
    value = getattr(optim, name)
    # Where float32 makes it 1, Adam's bias correction divides by 0.
    require(
      0 <= value <= 1 - 2**-24, f"optim.{name}={value!r} must lie in [0, 1)"
    )
  require(
    optim.warmup_steps <= config.train.num_steps,
    f"optim.warmup_steps={optim.warmup_steps} is longer than "
    f"train.num_steps={config.train.num_steps}",
  )
  decays = config.ema.decays
  require(
    len(decays) > 0 and all(0 <= d < 1 for d in decays),
    f"ema.decays={decays} must hold at least one value in [0, 1)",
  )
  check_distinct("ema.decays", decays)
  require(
    config.eval.ema_decay in decays,
    f"eval.ema_decay={config.eval.ema_decay} is not one of ema.decays={decays}",
  )
  for name in ("fsdp", "data"):
    size = getattr(config.mesh, name)
    require(
      size == -1 or size >= 1, f"mesh.{name}={size} must be -1 or at least 1"
    )
  require(
    (config.mesh.data, config.mesh.fsdp) != (-1, -1),
    "mesh.data=-1 and mesh.fsdp=-1: only one may be -1 (all devices that the "
    "other leaves); set the other",
  )
  check_at_least(
    "processes.heartbeat_timeout", config.processes.heartbeat_timeout, 10
  )
  check_at_least("processes.join_timeout", config.processes.join_timeout, 1)
  check_at_least("eval.every", config.eval.every, 0)
  check_at_least("checkpoint.every", checkpoint.every, 1)
  check_at_least("checkpoint.keep_latest", checkpoint.keep_latest, 1)
  check_at_least("checkpoint.keep_every", checkpoint.keep_every, 0)
  check_choice(
    "checkpoint.on_corrupt", checkpoint.on_corrupt, ("error", "previous")
  )


def check_images(config: ImageConfig) -> None:
  """What tasks have in common that read images."""
  check_run(config)
  _check_data(config)
  check_at_least("eval.batch_size", config.eval.batch_size, 1)
  check_choice("model.dtype", config.model.dtype, ("float32", "bfloat16"))
  # 0: as many as the data have, filled in when they are opened.
  check_at_least("model.num_classes", config.model.num_classes, 0)


def check_frozen(path: str, frozen: Frozen) -> None:
  check_choice(f"{path}.dtype", frozen.dtype, ("float32", "bfloat16"))
  check_choice(f"{path}.sharding", frozen.sharding, FROZEN_SHARDINGS)
  require(
    not frozen.model or "kind" in frozen.model,
    f"{path}.model={dict(frozen.model)} has no 'kind': want {{}} or the "
    "model's kind and arguments, as in configs/models.py",
  )


def _check_source(source: str) -> None:
  kind, _, rest = source.partition(":")
  kinds = {option.partition(":")[0]: option for option in SOURCES}
  close = difflib.get_close_matches(kind, kinds, n=1)
  hint = f" (did you mean {kinds[close[0]]!r}?)" if close else ""
  require(
    source == "digits" or (rest != "" and kind in kinds and kind != "digits"),
    f"data.source={source!r}: valid options are {list(SOURCES)}{hint}",
  )


def _check_data(config: ImageConfig) -> None:
  data, vae = config.data, config.vae
  _check_source(data.source)
  for name in ("num_threads", "image_size"):
    check_at_least(f"data.{name}", getattr(data, name), 1)
  for name in ("num_workers", "max_corrupt", "held_out"):
    check_at_least(f"data.{name}", getattr(data, name), 0)
  check_choice("data.crop", data.crop, CROPS)
  check_choice("data.wire", data.wire, WIRE_DTYPES)
  check_choice("data.decoder", data.decoder, DECODERS)
  check_choice("data.class_order", data.class_order, options.CLASS_ORDERS)
  require(
    data.channels in (1, 3), f"data.channels={data.channels} must be 1 or 3"
  )
  scale = data.crop_scale
  require(
    len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1,
    f"data.crop_scale={scale} must be (smallest, largest) share of the "
    "image's area, 0 < smallest <= largest <= 1",
  )
  require(data.train_split != "", "data.train_split is empty: name a split")
  require(
    data.train_split != data.test_split,
    f"data.train_split and data.test_split are both {data.train_split!r}: "
    "held-out images must not be trained on",
  )
  require(
    data.wire != "uint8" or not data.source.startswith("latents:"),
    f"data.wire='uint8' can't hold latents (data.source={data.source!r}): "
    "use 'bfloat16' or 'float16'",
  )
  require(
    data.held_out == 0 or not data.source.startswith("latents:"),
    f"data.held_out={data.held_out} with data.source={data.source!r}: a latent "
    "cache is not divided; cache the held-out images as a split of their own "
    "(data.test_split) and set data.held_out=0",
  )
  check_frozen("vae", vae)
  require(
    vae.path != "" or not data.source.startswith("latents:"),
    f"data.source={data.source!r} needs vae.path, the autoencoder that made "
    "the latents: python -m drift_jax.tools.convert_weights vae writes it",
  )


def check_new(config: RunConfig) -> None:
  """Raises ConfigError for what no run may begin with.

  Earlier runs may have it: they can be continued and sampled.
  """
  drift: Drift | None = getattr(config, "drift", None)
  if drift is None or drift.temperature_scale.kind != "annealed":
    return
  rate, num_steps = drift.temperature_scale.rate, config.train.num_steps
  most = -math.log(LEAST_TEMPERATURE_SCALE) / num_steps
  require(
    rate <= most,
    f"drift.temperature_scale.rate={rate} with train.num_steps={num_steps}: "
    f"temperatures would fall to exp(-{rate * num_steps:g}) of the first, "
    f"below {LEAST_TEMPERATURE_SCALE:g}; use at most {most:.3g}",
  )


def check_drift(drift: Drift, positives: int) -> None:
  """Field and options are checked where the fields are: in experiment."""
  require(
    len(drift.temperatures) > 0 and all(t > 0 for t in drift.temperatures),
    f"drift.temperatures={drift.temperatures} must hold at least one positive "
    "value",
  )
  check_distinct("drift.temperatures", drift.temperatures)
  check_at_least("drift.affinity_floor", drift.affinity_floor, 0)
  check_choice("drift.normalization", drift.normalization, ("xy", "y", "none"))
  check_choice("drift.reduction", drift.reduction, ("sum", "mean"))
  scale = drift.temperature_scale
  check_choice("drift.temperature_scale.kind", scale.kind, TEMPERATURE_KINDS)
  kind = scale.kind
  changes = kind in ("annealed", "learned")
  require(
    scale.rate > 0 if changes else scale.rate == 0,
    f"drift.temperature_scale.rate={scale.rate} with kind={kind!r}: want a "
    "positive rate for 'annealed' and 'learned', else 0",
  )
  require(
    1 < scale.neighbours < positives
    if kind == "adaptive"
    else scale.neighbours == 0,
    f"drift.temperature_scale.neighbours={scale.neighbours} with kind="
    f"{kind!r}: want a number between 1 and batch.positives={positives} for "
    "'adaptive', else 0",
  )
