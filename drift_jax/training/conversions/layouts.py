"""What all conversions share: from torch's names and layouts to ours."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from drift_jax.models import naming, release
from drift_jax.system.errors import UserError

CONFIG_FILE = "config.json"
# Leaves of modules that have a name of their own in torch.
LEAVES = {"kernel": "weight", "scale": "weight"}
IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]

_BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
# Ends of names that belong to no network, though some files have them: counters
# of training, what replaces hidden patches in training, numbers of positions.
_UNUSED = (
  ".num_batches_tracked",
  "embeddings.mask_token",
  "embeddings.position_ids",
)

Weights = Mapping[str, np.ndarray]
Config = Mapping[str, Any]
Entries = Mapping[str, naming.Entry]
# {parameter here: its shape there, and how its array becomes the one here}, of
# those that no module of torch's has.
Special = Mapping[str, tuple[tuple[int, ...], Callable[[np.ndarray], Any]]]


class WeightsError(UserError, ValueError):
  """Weights that can't be converted; the message says why."""


class Converted(NamedTuple):
  """A model in the form that artifacts.save takes."""

  model_config: dict[str, Any]
  params: dict[str, Any]
  step: int | None = None
  ema_decay: float | None = None
  facts: Mapping[str, Any] = {}


def convert(
  what: str,
  kind: str,
  model_config: dict[str, Any],
  entries_of: Callable[[naming.Shapes], Entries],
  weights: Weights,
  *,
  special: Special | None = None,
  batch_norm_epsilon: float | None = None,
) -> Converted:
  """Checks weights against model_config, then renames and stacks them.

  Args:
    what: whose weights they should be, for messages.
    kind: of the artifact.
    model_config: published names.
    entries_of: the names of weights for shapes here, see `naming.Naming`. If
      a module's kernel and bias are of two modules there, these are a
      convolution and its BatchNorm, which is folded into it.
    weights: torch's layouts; any floating dtype.
    special: parameters with a shape and layout of their own.
    batch_norm_epsilon: of every BatchNorm; None if there is none.

  Raises:
    WeightsError: a model_config that can't be built; names, shapes or values
      that do not fit.
  """
  special = special or {}
  try:
    shapes = release.parameter_shapes(kind, model_config)
    entries = entries_of(shapes)
    naming.require_parameters(
      "these are not the weights",
      {k: v for k, v in weights.items() if not k.endswith(_UNUSED)},
      published_shapes(entries, shapes, special),
    )
  except ValueError as error:
    raise WeightsError(f"{what}: {error}") from error
  if batch_norm_epsilon is not None:
    weights = _fold_batch_norms(weights, entries, batch_norm_epsilon)
  ordinary = {k: v for k, v in entries.items() if k not in special}
  params = naming.gather(
    ordinary, lambda name: _jax_layout(as_float(name, weights[name]))
  )
  for path, (_, function) in special.items():
    (name,) = entries[path].names
    params[path] = function(as_float(name, weights[name]))
  return Converted(model_config, traverse_util.unflatten_dict(params, sep="/"))


def published_shapes(
  entries: Entries, shapes: naming.Shapes, special: Special | None = None
) -> dict[str, tuple[int, ...]]:
  """Names and shapes in torch's state dict of parameters here."""
  special = special or {}
  published = {}
  for path, (names, stacked) in entries.items():
    shape = _torch_shape(shapes[path][1:] if stacked else shapes[path])
    shape = special[path][0] if path in special else shape
    published |= dict.fromkeys(names, shape)
  for _, norm in _convs_and_norms(entries):
    shape = published[f"{norm}.bias"]
    published |= {f"{norm}.{leaf}": shape for leaf in _BATCH_NORM}
  return published


def as_float(name: str, array: np.ndarray) -> np.ndarray:
  """float32; WeightsError unless it holds finite floating-point numbers."""
  if not jnp.issubdtype(array.dtype, jnp.floating):  # knows bfloat16
    raise WeightsError(f"{name} has dtype {array.dtype}, want floating point")
  array = array.astype(np.float32)
  if not np.isfinite(array).all():
    raise WeightsError(f"{name} holds values that are not finite")
  return array


def as_linear(array: np.ndarray) -> np.ndarray:
  """[O, I] of a layer that some have as a 1x1 convolution."""
  return array[:, :, 0, 0] if array.shape[2:] == (1, 1) else array


def count_blocks(weights: Weights, prefix: str) -> int:
  """The first N >= 1 that follows the prefix in no name."""
  numbers = {
    name.removeprefix(prefix).partition(".")[0]
    for name in weights
    if name.startswith(prefix)
  }
  return next(i for i in itertools.count(1) if str(i) not in numbers)


def check_fixed(config: Config, fixed: Mapping[str, Any]) -> None:
  """Raises WeightsError where config.json has another value than the fixed."""
  for key, value in fixed.items():
    if config.get(key, value) != value:
      raise WeightsError(
        f"{CONFIG_FILE} has {key}={config[key]!r}, but only {value!r} can be"
        " converted"
      )


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
  """Shape in torch's layout: OIHW for HWIO, [O, I] for [I, O]."""
  return (*shape[:-3:-1], *shape[:-2]) if len(shape) > 1 else shape


def _jax_layout(array: np.ndarray) -> np.ndarray:
  """The inverse: HWIO for OIHW, [I, O] for [O, I]."""
  axes = (*range(2, array.ndim), 1, 0) if array.ndim > 1 else (0,)
  return np.ascontiguousarray(array.transpose(axes))


def _convs_and_norms(entries: Entries) -> list[tuple[str, str]]:
  """Names of the convolutions whose biases are a BatchNorm's, and of that."""
  pairs = []
  for path, (names, _) in entries.items():
    module, _, leaf = path.rpartition("/")
    if leaf == "bias" and f"{module}/kernel" in entries:
      for kernel, bias in zip(
        entries[f"{module}/kernel"].names, names, strict=True
      ):
        conv, norm = kernel.removesuffix(".weight"), bias.removesuffix(".bias")
        if conv != norm:
          pairs.append((conv, norm))
  return pairs


def _fold_batch_norms(
  weights: Weights, entries: Entries, epsilon: float
) -> dict[str, np.ndarray]:
  """The weights with each BatchNorm folded into its convolution.

  Computed in float64: kernel' = kernel s and bias' = bias - mean s, where
  s = weight / sqrt(var + epsilon), with the running statistics. The bias comes
  under the name of the BatchNorm's.
  """
  folded = dict(weights)
  for conv, norm in _convs_and_norms(entries):
    kernel = as_float(f"{conv}.weight", weights[f"{conv}.weight"])
    weight, bias, mean, variance = (
      as_float(name, weights[name]).astype(np.float64)
      for name in (f"{norm}.{leaf}" for leaf in _BATCH_NORM)
    )
    if variance.min() < 0:
      raise WeightsError(
        f"{norm}.running_var holds {variance.min()}, want >= 0"
      )
    scale = weight / np.sqrt(variance + epsilon)
    folded[f"{conv}.weight"] = (kernel * scale[:, None, None, None]).astype(
      np.float32
    )
    folded[f"{norm}.bias"] = (bias - mean * scale).astype(np.float32)
  return folded
