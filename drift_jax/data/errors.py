"""The error that says what is wrong with the data."""

from collections.abc import Sequence

from drift_jax.system.errors import UserError


class DataError(UserError, ValueError):
  """Data that are damaged, missing or not what was asked for.

  The message names what, where and the remedy.
  """


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
  """Raises ValueError for a value that is not among the choices."""
  if value not in choices:
    raise ValueError(f"{name}={value!r}: valid options are {list(choices)}")
