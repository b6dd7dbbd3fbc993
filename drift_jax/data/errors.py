"""The error that says what is wrong with the data."""

from drift_jax.system.errors import UserError


class DataError(UserError, ValueError):
  """Data that are damaged, missing or not what was asked for.

  The message names what, where and the remedy.
  """
