"""Requests for images, read from the bytes that a client sends."""

import json
import math
from typing import Any, NamedTuple, NoReturn

import numpy as np
from starlette.exceptions import HTTPException

from drift_jax import sampling
from drift_jax.config import ConfigError
from drift_jax.system import options
from drift_jax.tasks.generator.restore import read_style

_KEYS = ("labels", "count", "alpha", "seed", "style")
_SHOWN = 60


class Refused(HTTPException):
  """A request that is not answered with images."""


def retry_after(seconds: float) -> dict[str, str]:
  """The header that says when a request may be sent again."""
  return {"retry-after": str(max(1, math.ceil(seconds)))}


class Asked(NamedTuple):
  """Images that somebody wants.

  Attributes:
    labels: [n] int32, one for each image.
    alpha: guidance scale.
    seed: of noise and style.
    style: indices that all images share; None leaves them to chance.
  """

  labels: np.ndarray
  alpha: float
  seed: int
  style: tuple[int, ...] | None


def read_request(
  body: bytes, model: sampling.Sampler, max_images: int
) -> Asked:
  """Reads a JSON object {labels, count, alpha, seed, style}.

  `count` images of each of `labels`, in this order; as `Sampler.sample` takes
  them, and with its defaults.

  Raises:
    Refused: 400 for anything but a JSON object, 422 for a value that is missing
      or out of range; it names value, place and what is valid.
  """
  values = _parse(body)
  for key in values:
    if key not in _KEYS:
      _refuse(f"unknown key {_show(key)}: valid keys are {list(_KEYS)}")
  count = _integer("count", values.get("count", 1), 1, max_images)
  # Nothing to choose in a model of one class.
  labels = values.get("labels", [0] if model.num_classes == 1 else None)
  if not isinstance(labels, list) or not 1 <= len(labels) <= max_images:
    _refuse(
      f"labels={_show(labels)} must be a list of 1 to {max_images} class "
      "indices"
    )
  for i, label in enumerate(labels):
    _integer(f"labels[{i}]", label, 0, model.num_classes - 1)
  if len(labels) * count > max_images:
    _refuse(
      f"{len(labels)} labels with count={count} are {len(labels) * count} "
      f"images: at most {max_images} a request"
    )
  alpha = values.get("alpha", 1.0)
  low, high = model.alpha_range
  is_number = type(alpha) in (int, float)  # no bool
  # Compared before it is converted: a Python integer may exceed a float.
  if not is_number or not low <= alpha <= high:
    _refuse(f"alpha={_show(alpha)} must be a number in [{low}, {high}]")
  return Asked(
    labels=np.repeat(np.array(labels, np.int32), count),
    alpha=float(alpha),
    seed=_integer("seed", values.get("seed", 0), 0, options.MAX_SEED),
    style=_style(values.get("style"), model),
  )


def _parse(body: bytes) -> dict[str, Any]:
  def constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")

  def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
      raise ValueError("a key is given twice")
    return dict(pairs)

  try:
    values = json.loads(
      body.decode("utf-8"), parse_constant=constant, object_pairs_hook=unique
    )
  except RecursionError as error:
    raise Refused(400, "the body nests too deep to be a request") from error
  except ValueError as error:  # of UTF-8, JSON and integers of 5000 digits
    reason = " ".join(str(error).split())[:200]
    raise Refused(400, f"the body is no JSON: {reason}") from error
  if not isinstance(values, dict):
    raise Refused(
      400, f"the body is {_show(values)}: want an object of {list(_KEYS)}"
    )
  return values


def _style(values: Any, model: sampling.Sampler) -> tuple[int, ...] | None:
  if values is None:
    return None
  task = model.generator.task
  if not isinstance(values, list) or any(type(v) is not int for v in values):
    _refuse(f"style={_show(values)} must be null or a list of integers")
  if len(values) > max(1, task.style_tokens):
    _refuse(
      f"style={_show(values)} has {len(values)} indices: want one, or "
      f"{task.style_tokens}, one for each style token"
    )
  try:
    return tuple(read_style(values, task).tolist())
  except ConfigError as error:
    raise Refused(422, _cut(str(error), 300)) from error


def _integer(name: str, value: Any, low: int, high: int) -> int:
  """An integer in [low, high]."""
  if type(value) is not int or not low <= value <= high:
    _refuse(f"{name}={_show(value)} must be an integer in [{low}, {high}]")
  return value


def _refuse(message: str) -> NoReturn:
  raise Refused(422, message)


def _show(value: Any) -> str:
  # As JSON, in which it came; ASCII, so that no character can be unprintable.
  try:
    return _cut(json.dumps(value), _SHOWN)
  except RecursionError:
    return "a value that nests too deep"


def _cut(text: str, length: int) -> str:
  return text if len(text) <= length else f"{text[: length - 3]}..."
