"""From a ConfigDict to typed sections, with messages that teach."""

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from drift_jax.config.sections import Path, Source
from drift_jax.system import paths
from drift_jax.system.errors import ConfigError


def unknown_key(key: str, value: Any, valid: Iterable[str]) -> str:
  """Writes the message about a dotted key whose last name is unknown."""
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
  """Raises ConfigError if a dotted key is not one of a config's keys.

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


def build(cls: Any, values: Any, path: str = "") -> Any:
  """Builds a section from a mapping, recursively.

  Raises:
    ConfigError: naming the key, the value and what would be valid.
  """
  if not isinstance(values, Mapping):
    raise ConfigError(f"{path[:-1]}={values!r} must be a section (a dict)")
  hints = typing.get_type_hints(cls, include_extras=True)
  for key in values:
    if key not in hints:
      raise ConfigError(unknown_key(path + str(key), values[key], hints))
  missing = sorted(
    field.name
    for field in dataclasses.fields(cls)
    if field.name not in values and field.default is dataclasses.MISSING
  )
  if missing:
    raise ConfigError(f"missing key {path}{missing[0]} (all: {missing})")
  return cls(
    **{key: _convert(hints[key], values[key], path + key) for key in values}
  )


def _expanded(hint: Any, value: str, path: str) -> str:
  expand = paths.expand_source if hint == Source else paths.expand
  try:
    return expand(value)
  except paths.PathError as error:
    raise ConfigError(f"{path}={value!r}: {error}") from error


def _convert(hint: Any, value: Any, path: str) -> Any:
  """Checks a value against its hint; ints pass as floats, lists as tuples.

  The `~` of paths is expanded, so that it is the same wherever it is read.
  """
  origin = typing.get_origin(hint)
  arguments = typing.get_args(hint)
  # checks.check_values looks at choices and bounds.
  if origin is Literal:
    return _convert(type(arguments[0]), value, path)
  if origin is Annotated:
    value = _convert(arguments[0], value, path)
    return _expanded(hint, value, path) if hint in (Path, Source) else value
  if dataclasses.is_dataclass(hint):
    return build(hint, value, path + ".")
  if origin is Mapping:
    if not isinstance(value, Mapping):
      raise ConfigError(f"{path}={value!r} must be a dict of sections")
    item = arguments[1]
    if item is Any:
      return dict(value)
    return {k: _convert(item, v, f"{path}.{k}") for k, v in value.items()}
  if origin is tuple:
    if not isinstance(value, (tuple, list)):
      raise ConfigError(
        f"{path}={value!r} has type {type(value).__name__}, want a tuple"
      )
    (item, _) = arguments
    return tuple(_convert(item, v, f"{path}[{i}]") for i, v in enumerate(value))
  if hint is float and type(value) is int:
    value = float(value)
  if type(value) is not hint:
    raise ConfigError(
      f"{path}={value!r} has type {type(value).__name__}, want {hint.__name__}"
    )
  if hint is float and not math.isfinite(value):
    raise ConfigError(f"{path}={value!r} must be a finite number")
  return value
