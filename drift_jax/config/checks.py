"""What may go together: ranges and contradictions of a typed config."""

import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from drift_jax.config import sections
from drift_jax.system import options
from drift_jax.system.errors import ConfigError


def require(condition: bool, message: str) -> None:
  """Raises ConfigError with the message unless the condition holds."""
  if not condition:
    raise ConfigError(message)


def check_choice(path: str, value: Any, choices: Collection[Any]) -> None:
  """Raises ConfigError unless a value is one of the options."""
  close = difflib.get_close_matches(str(value), map(str, choices), n=1)
  hint = f" (did you mean {close[0]!r}?)" if close else ""
  require(
    value in choices,
    f"{path}={value!r}: valid options are {list(choices)}{hint}",
  )


def check_distinct(path: str, values: tuple[Any, ...]) -> None:
  """Raises ConfigError if one value stands twice."""
  require(
    len(set(values)) == len(values), f"{path}={values} holds a value twice"
  )


def check_values(section: Any, path: str = "") -> None:
  """Raises ConfigError for a value that its field's type does not allow.

  Args:
    section: whose fields are checked, and those of the sections in it.
    path: dotted key of the section, with a dot at its end.
  """
  hints = typing.get_type_hints(type(section), include_extras=True)
  for name, hint in hints.items():
    _check_value(hint, getattr(section, name), path + name)


def _check_value(hint: Any, value: Any, key: str) -> None:
  origin, arguments = typing.get_origin(hint), typing.get_args(hint)
  if dataclasses.is_dataclass(hint):
    check_values(value, f"{key}.")
  elif origin is Literal:
    check_choice(key, value, arguments)
  elif origin is Annotated:
    for bound in arguments[1:]:
      if isinstance(bound, sections.AtLeast):
        limit, side = bound.least, "least"
        if value > bound.most:
          limit, side = bound.most, "most"
        require(
          bound.least <= value <= bound.most,
          f"{key}={value!r} must be at {side} {limit}",
        )
  elif origin is Mapping:
    for name, item in value.items():
      _check_value(arguments[1], item, f"{key}.{name}")
  elif origin is tuple:
    for item in value:
      _check_value(arguments[0], item, key)


def profile_window(text: str) -> tuple[int, int]:
  """Reads train.profile: the first step and how many; '' is (0, 0).

  Raises:
    ConfigError: it is not STEP:COUNT.
  """
  if not text:
    return 0, 0
  match = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", text)
  if match is None:
    raise ConfigError(
      f"train.profile={text!r}: want STEP:COUNT, the first step and how many, "
      "such as '20:5', or '' for none"
    )
  return int(match[1]), int(match[2])


def check_run(config: sections.RunConfig) -> None:
  """Raises ConfigError for what no task allows."""
  check_values(config)
  profile_window(config.train.profile)
  check_distinct("writers", config.writers)
  require(
    "jsonl" in config.writers,
    f"writers={config.writers} lacks 'jsonl': plots and tables are made from "
    "metrics.jsonl",
  )
  optim, mesh = config.optim, config.mesh
  for name in ("learning_rate", "grad_clip", "eps"):
    value = getattr(optim, name)
    # In float32, where less than about 1e-38 is 0.
    require(value > 1e-38, f"optim.{name}={value!r} must be positive")
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
    size = getattr(mesh, name)
    require(
      size == -1 or size >= 1, f"mesh.{name}={size} must be -1 or at least 1"
    )
  require(
    (mesh.data, mesh.fsdp) != (-1, -1),
    "mesh.data=-1 and mesh.fsdp=-1: only one may be -1 (all devices that the "
    "other leaves); set the other",
  )


def check_images(config: sections.ImageConfig) -> None:
  """Raises ConfigError for what no task that reads images allows."""
  check_run(config)
  data, vae = config.data, config.vae
  _check_source(data.source)
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
    data.held_out < 1 or data.held_out.is_integer(),
    f"data.held_out={data.held_out}: want a number of images of each class, or "
    "a share between 0 and 1",
  )
  check_frozen("vae", vae)
  if not data.source.startswith("latents:"):
    return
  require(
    data.wire != "uint8",
    f"data.wire='uint8' can't hold latents (data.source={data.source!r}): "
    "use 'bfloat16' or 'float16'",
  )
  require(
    not data.exif,
    f"data.exif=True with data.source={data.source!r}: latents are upright if "
    "the cache was made so: cache_latents --exif",
  )
  require(
    data.held_out == 0,
    f"data.held_out={data.held_out:g} with data.source={data.source!r}: a "
    "latent cache is not divided; cache the held-out images as a split of "
    "their own (data.test_split; tools.cache_latents --held_out) and set "
    "data.held_out=0",
  )


def check_frozen(path: str, frozen: sections.Frozen) -> None:
  """Raises ConfigError for a frozen network without precision or kind."""
  check_choice(f"{path}.dtype", frozen.dtype, ("float32", "bfloat16"))
  require(
    not frozen.model or "kind" in frozen.model,
    f"{path}.model={dict(frozen.model)} has no 'kind': want {{}} or the "
    "model's kind and arguments, as in configs/models.py",
  )


def _check_source(source: str) -> None:
  kind, _, rest = source.partition(":")
  kinds = {option.partition(":")[0]: option for option in options.SOURCES}
  close = difflib.get_close_matches(kind, kinds, n=1)
  hint = f" (did you mean {kinds[close[0]]!r}?)" if close else ""
  require(
    source == "digits" or (rest != "" and kind in kinds and kind != "digits"),
    f"data.source={source!r}: valid options are {list(options.SOURCES)}{hint}",
  )


def check_new(config: sections.RunConfig) -> None:
  """Raises ConfigError for what no run may begin with.

  Earlier runs may have it: these can be continued and sampled.
  """
  drift: sections.Drift | None = getattr(config, "drift", None)
  if drift is None or drift.temperature_scale.kind != "annealed":
    return
  rate, num_steps = drift.temperature_scale.rate, config.train.num_steps
  most = -math.log(sections.LEAST_TEMPERATURE_SCALE) / num_steps
  require(
    rate <= most,
    f"drift.temperature_scale.rate={rate} with train.num_steps={num_steps}: "
    f"temperatures would fall to exp(-{rate * num_steps:g}) of the first, "
    f"below {sections.LEAST_TEMPERATURE_SCALE:g}; use at most {most:.3g}",
  )


def check_drift(drift: sections.Drift, positives: int) -> None:
  """Raises ConfigError for temperatures that can't be.

  training.drifting checks the field and its options: it knows the fields.
  """
  require(
    len(drift.temperatures) > 0 and all(t > 0 for t in drift.temperatures),
    f"drift.temperatures={drift.temperatures} must hold at least one positive "
    "value",
  )
  check_distinct("drift.temperatures", drift.temperatures)
  scale = drift.temperature_scale
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
