"""From the bytes that a client sends to what is drawn, or why it is not."""

import dataclasses
import json
from typing import Any, NoReturn

import numpy as np

from drift_jax import sampling
from drift_jax.config import ConfigError
from drift_jax.system import options
from drift_jax.tasks.generator.restore import read_style

_KEYS = ("labels", "count", "alpha", "seed", "style")
_SHOWN = 60


class Refused(Exception):
  """A request that is not answered with images.

  Attributes:
    status: of HTTP.
    retry_after: seconds after which it may be sent again, or None.
  """

  def __init__(
    self, status: int, message: str, retry_after: float | None = None
  ):
    super().__init__(message)
    self.status = status
    self.retry_after = retry_after


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
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
  """What a JSON object {labels, count, alpha, seed, style} asks for.

  `count` images of each of `labels`, in this order; as `Sampler.sample` takes
  them, and with its defaults.

  Raises:
    Refused: 400 for anything but a JSON object, 422 for a value that is missing
      or out of range; it names value, place and what is valid.
  """
  given = _parse(body)
  unknown = [key for key in given if key not in _KEYS]
  if unknown:
    _refuse(f"unknown key {_show(unknown[0])}: valid keys are {list(_KEYS)}")
  count = _integer("count", given.get("count", 1), 1, max_images + 1)
  labels = _labels(given.get("labels"), model.num_classes, max_images)
  if len(labels) * count > max_images:
    _refuse(
      f"{len(labels)} labels with count={count} are {len(labels) * count} "
      f"images: at most {max_images} a request"
    )
  alpha = given.get("alpha", 1.0)
  low, high = model.alpha_range
  # Compared before it is converted: a Python integer may exceed a float.
  if not _is_number(alpha) or not low <= alpha <= high:
    _refuse(f"alpha={_show(alpha)} must be a number in [{low}, {high}]")
  return Asked(
    labels=np.repeat(np.array(labels, np.int32), count),
    alpha=float(alpha),
    seed=_integer("seed", given.get("seed", 0), 0, options.MAX_SEED + 1),
    style=_style(given.get("style"), model),
  )


def _parse(body: bytes) -> dict[str, Any]:
  def constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")

  def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
      raise ValueError("a key is given twice")
    return found

  try:
    given = json.loads(
      body.decode("utf-8"), parse_constant=constant, object_pairs_hook=unique
    )
  except RecursionError as error:
    raise Refused(400, "the body nests too deep to be a request") from error
  except ValueError as error:  # of UTF-8, JSON and integers of 5000 digits
    reason = " ".join(str(error).split())[:200]
    raise Refused(400, f"the body is no JSON: {reason}") from error
  if not isinstance(given, dict):
    raise Refused(
      400, f"the body is {_show(given)}: want an object of {list(_KEYS)}"
    )
  return given


def _labels(given: Any, num_classes: int, max_images: int) -> list[int]:
  if not isinstance(given, list) or not 1 <= len(given) <= max_images:
    _refuse(
      f"labels={_show(given)} must be a list of 1 to {max_images} class indices"
    )
  return [
    _integer(f"labels[{i}]", label, 0, num_classes)
    for i, label in enumerate(given)
  ]


def _style(given: Any, model: sampling.Sampler) -> tuple[int, ...] | None:
  if given is None:
    return None
  task = model.generator.task
  if not isinstance(given, list) or not all(map(_is_integer, given)):
    _refuse(f"style={_show(given)} must be null or a list of integers")
  if len(given) > max(1, task.style_tokens):
    _refuse(
      f"style={_show(given)} has {len(given)} indices: want one, or "
      f"{task.style_tokens}, one for each style token"
    )
  try:
    return tuple(read_style(given, task).tolist())
  except ConfigError as error:
    raise Refused(422, _cut(str(error), 300)) from error


def _integer(name: str, value: Any, low: int, high: int) -> int:
  """An integer in [low, high)."""
  if not _is_integer(value) or not low <= value < high:
    _refuse(f"{name}={_show(value)} must be an integer in [{low}, {high})")
  return value


def _is_integer(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
  return _is_integer(value) or isinstance(value, float)


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
