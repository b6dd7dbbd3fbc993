"""Small models as artifacts, and what is random in tests."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from drift_jax.models import release
from drift_jax.training import artifacts
from drift_jax.training.state import TrainState


def random_like(shapes: Any, scale: float = 0.3, seed: int = 0) -> Any:
  """Normal values of these shapes: parameters as initialised hide much."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: rng.normal(0.0, scale, x.shape).astype(x.dtype), shapes
  )


def make_state(params, optimizer, decays=(0.9,), seed=0) -> TrainState:
  """A state before its first step, in single arrays."""
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    rng=jax.random.key_data(jax.random.key(seed)),
    params=params,
    opt_state=optimizer.init(params),
    ema={str(decay): params for decay in decays},
  )


def save_model(
  folder: str | os.PathLike[str],
  kind: str,
  arguments: dict[str, Any],
  *,
  scale: float = 0.3,
  seed: int = 0,
  step: int | None = None,
  ema_decay: float | None = None,
  **others: Any,
) -> str | os.PathLike[str]:
  """Writes a model with random parameters; returns its folder.

  Args:
    folder, step, ema_decay, **others: see artifacts.save.
    kind: of the artifact, such as 'mae'.
    arguments: of the model's constructor.
    scale, seed: see random_like.
  """
  model_config = release.published_config(kind, arguments)
  _, shapes = release.describe(kind, model_config)
  artifacts.save(
    folder,
    kind=kind,
    model_config=model_config,
    params=random_like(shapes, scale, seed),
    step=step,
    ema_decay=ema_decay,
    **others,
  )
  return folder
