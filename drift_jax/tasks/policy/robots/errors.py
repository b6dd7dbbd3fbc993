"""What can be wrong with an environment, and packages that may be missing."""

import contextlib
import importlib
import io

from drift_jax.system.errors import UserError


class RobotError(UserError, ValueError):
  """An environment, an action or an episode that is not what it must be.

  The message names the value, where it came from and the valid options.
  """


class ExtraError(RobotError):
  """A package of requirements-robots.txt is missing."""


def import_extras(environment: str, *modules: str) -> None:
  """Imports modules that are not among drift_jax's requirements.

  Args:
    environment: what needs them, for the message.
    modules: dotted names, imported in this order.

  Raises:
    ExtraError: one is missing, or a package that it needs.
  """
  for module in modules:
    try:
      # gymnasium-robotics prints its news there, whatever is imported of it.
      with contextlib.redirect_stderr(io.StringIO()):
        importlib.import_module(module)
    except ImportError as error:
      missing = (error.name or module).partition(".")[0]
      raise ExtraError(
        f"environment {environment!r} needs the package {missing!r}: "
        f"pip install -r requirements-robots.txt ({error})"
      ) from error
