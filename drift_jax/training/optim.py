"""Learning-rate schedule and optimiser (Table 8)."""

from collections.abc import Callable
from typing import Any

import jax
import optax

# The release starts its warm-up here rather than at zero.
WARMUP_START = 1e-6
# The cosine ends at this fraction of the peak.
COSINE_END = 1e-6


def learning_rate_schedule(
  *, kind: str, peak: float, warmup_steps: int, total_steps: int
) -> optax.Schedule:
  """Linear warm-up from 1e-6 to `peak`, then constant or cosine decay.

  Args:
    kind: 'constant' or 'cosine'.
    peak: learning rate after the warm-up.
    warmup_steps: steps of the warm-up; 0 starts at `peak`.
    total_steps: length of the whole schedule, the warm-up included.
  """
  steps = max(total_steps - warmup_steps, 1)
  schedules = {
    "constant": lambda: optax.constant_schedule(peak),
    "cosine": lambda: optax.cosine_decay_schedule(peak, steps, COSINE_END),
  }
  main = schedules[kind]()
  if warmup_steps:
    warmup = optax.linear_schedule(WARMUP_START, peak, warmup_steps)
    main = optax.join_schedules([warmup, main], [warmup_steps])
  return _with_standard_promotion(main)


def make_optimizer(
  schedule: optax.Schedule,
  *,
  b1: float,
  b2: float,
  eps: float,
  weight_decay: float,
  grad_clip: float,
) -> optax.GradientTransformation:
  """Clip by the global norm, then AdamW with decoupled weight decay."""
  optimizer = optax.chain(
    optax.clip_by_global_norm(grad_clip),
    optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay),
  )
  return with_standard_promotion(optimizer)


def with_standard_promotion(
  optimizer: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """An optimiser whose update may mix dtypes, as optax does."""
  return optax.GradientTransformation(
    optimizer.init, _with_standard_promotion(optimizer.update)
  )


def _with_standard_promotion(function: Callable[..., Any]) -> Any:
  """Lets optax mix dtypes, which this package's own code must not."""

  def wrapped(*args: Any) -> Any:
    with jax.numpy_dtype_promotion("standard"):
      return function(*args)

  return wrapped
