"""Weights and inputs of the golden encoders, see tests/golden/README.md."""

import zlib
from collections.abc import Iterable

import numpy as np


def draw_all(parameters: Iterable[str]) -> dict[str, np.ndarray]:
  """Weights by name of "NAME SHAPE" lines."""
  weights = {}
  for line in parameters:
    name, shape = str(line).split()
    weights[name] = _draw(name, tuple(map(int, shape.split(","))))
  return weights


def _draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
  random = np.random.RandomState(zlib.crc32(name.encode()))
  uniform = 2 * random.random_sample(shape) - 1
  if name.endswith(".running_var"):
    uniform = 1 + 0.8 * uniform
  elif ".grn." in name:
    pass
  elif name.endswith((".bias", ".running_mean")):
    uniform *= 0.2
  elif len(shape) == 1:
    uniform = 1 + 0.2 * uniform
  else:
    uniform *= np.sqrt(3 / np.prod(shape[1:]))
  return uniform.astype(np.float32)


def noise(seed: int, shape: tuple[int, ...]) -> np.ndarray:
  """Pixels in [-1, 1]."""
  random = np.random.RandomState(seed)
  return random.uniform(-1, 1, shape).astype(np.float32)
