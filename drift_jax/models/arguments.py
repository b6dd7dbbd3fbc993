"""Builds linen modules from plain arguments: names, types and ranges checked.

A module's fields without a default are its arguments.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Shaped

DTYPES = ("float32", "bfloat16")
# Arguments that the paper's generator lacks, and what they are of one like it.
NOT_IN_PAPER = {"condition_size": 0, "condition_tokens": 0, "clip": False}

Module = TypeVar("Module", bound=nn.Module)


def argument_types(module: type[nn.Module]) -> dict[str, Any]:
  """{argument: its type}: the module's fields that have no default."""
  return {
    field.name: field.type
    for field in dataclasses.fields(module)
    if field.default is dataclasses.MISSING
  }


def build(
  module: type[Module],
  arguments: Mapping[str, Any],
  *,
  minima: Mapping[str, int] | None = None,
  choices: Mapping[str, Sequence[str]] | None = None,
  lengths: Mapping[str, int] | None = None,
) -> Module:
  """Builds a linen module from plain values for its fields.

  Each value is checked by its field's type: an int is at least 1, a float
  positive and finite, a dtype one of DTYPES by name, a str one of its choices;
  tuple[int, ...] holds ints of at least 1, tuple[float, ...] a finite number
  for each of red, green and blue (of a std: a positive one).

  Args:
    module: the class; its fields without default are the arguments.
    arguments: {argument: value}.
    minima: {argument: its least value}, where that is not 1.
    choices: {argument: its valid values}, for every str.
    lengths: {argument: how many numbers}, of a tuple[int, ...]; by default at
      least one.

  Raises:
    ValueError: an argument is unknown (with its closest valid name), missing
      or out of range.
  """
  # 1. Names
  types = argument_types(module)
  unknown = []
  for name in arguments.keys() - types.keys():
    close = difflib.get_close_matches(name, types, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    unknown.append(f"{name!r}{hint}")
  missing = [name for name in types if name not in arguments]
  if unknown or missing:
    raise ValueError(
      f"{module.__name__}: unknown arguments: {', '.join(unknown) or 'none'};"
      f" missing: {', '.join(missing) or 'none'}; valid: {', '.join(types)}"
    )
  # 2. Values, by type
  minima, choices, lengths = minima or {}, choices or {}, lengths or {}
  values = {}
  for name, kind in types.items():
    value = arguments[name]
    if kind is int:
      require_int(name, value, minima.get(name, 1))
    elif kind is float:
      if not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r}: must be positive and finite")
      value = float(value)
    elif kind is str:
      require_choice(name, value, choices[name])
    elif kind is jnp.dtype:
      require_choice(name, value, DTYPES)
      value = jnp.dtype(value)
    elif kind == tuple[int, ...]:
      value = _counts(name, value, lengths.get(name))
    elif kind == tuple[float, ...]:
      value = _colors(name, value)
    values[name] = value
  return module(**values)


def _counts(
  name: str, values: Sequence[int], length: int | None
) -> tuple[int, ...]:
  fits = len(values) == length if length else len(values) > 0
  if not fits:
    raise ValueError(
      f"{name}={tuple(values)}: must hold {length or 'some'} numbers"
    )
  for i, value in enumerate(values):
    require_int(f"{name}[{i}]", value, 1)
  return tuple(values)


def _colors(name: str, values: Sequence[float]) -> tuple[float, ...]:
  least = 0 if name.endswith("std") else -math.inf
  if len(values) != 3 or not all(least < x < math.inf for x in values):
    raise ValueError(
      f"{name}={tuple(values)}: must be three finite numbers > {least}"
    )
  return tuple(map(float, values))


def require_int(name: str, value: int, minimum: int) -> None:
  """Raises ValueError unless value is an int of at least minimum."""
  if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
    raise ValueError(f"{name}={value!r}: must be an integer >= {minimum}")


def require_choice(name: str, value: str, choices: Sequence[str]) -> None:
  """Raises ValueError unless value is one of choices."""
  if value not in choices:
    raise ValueError(
      f"{name}={value!r}: must be one of {', '.join(map(repr, choices))}"
    )


def require_multiple(
  name: str, value: int, divisor_name: str, divisor: int
) -> None:
  """Raises ValueError unless value is a multiple of divisor."""
  if value % divisor:
    raise ValueError(
      f"{name}={value} must be a multiple of {divisor_name}={divisor}, but"
      f" {value} % {divisor} = {value % divisor}"
    )


def require_rgb(
  images: Shaped[ArrayLike, "..."], whose: str
) -> Shaped[Array, "B H W 3"]:
  """Returns images uint8 [B, H, W, 3]; ValueError for anything else."""
  images = jnp.asarray(images)
  if images.dtype != jnp.uint8:
    raise ValueError(
      f"{whose} images have dtype {images.dtype}, want uint8 in [0, 255]"
      " (metrics.images.to_uint8 makes them from [-1, 1], truncating as the"
      " published figures do)"
    )
  if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
    raise ValueError(
      f"{whose} images have shape {images.shape}, want non-empty [B, H, W, 3]"
    )
  return images
