"""A program that a run compiles, for checks beforehand."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from drift_jax.system import sharding
from drift_jax.system.errors import ConfigError


class Program(NamedTuple):
  """A jitted function of a run and what it is called with.

  Attributes:
    name: 'train', 'sample', ...
    jitted: the function that the run itself calls.
    arguments: {what they are: tree of ShapeDtypeStructs with shardings}, in
      the function's order.
  """

  name: str
  jitted: Any
  arguments: dict[str, Any]


def check_classes(num_classes: int) -> None:
  """Raises ConfigError if the data would have to tell model.num_classes."""
  if not num_classes:
    raise ConfigError(
      "model.num_classes=0 takes as many as the data have, but no data are "
      "read here: set it"
    )


def abstract_batch(mesh: Mesh, *shape: int, dtype: Any = jnp.float32) -> Any:
  """An array of a batch: its first axis is split over the mesh."""
  return jax.ShapeDtypeStruct(
    shape, dtype, sharding=sharding.batch_sharding(mesh)
  )
