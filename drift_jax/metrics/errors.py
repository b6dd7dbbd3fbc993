"""Errors of evaluations."""

from drift_jax.system.errors import UserError


class EvaluationError(UserError, ValueError):
  """Samples that can't be judged; the message says which and why."""
