"""Packages that only some programs need: extras of the wheel (setup.py)."""

import importlib.metadata
import importlib.util

from drift_jax.system.errors import UserError


class ExtraError(UserError):
  """A package of an extra is missing; the message says how to install it."""


def install_line(extra: str) -> str:
  """The command that installs an extra, or the file of a clone that has it."""
  try:
    importlib.metadata.version("drift_jax")
  except importlib.metadata.PackageNotFoundError:
    file = "requirements-robots" if extra == "robots" else "requirements"
    return f"pip install -r {file}.txt"
  return f'pip install "drift_jax[{extra}]"'


def need(what: str, extra: str, *packages: str) -> None:
  """Raises ExtraError, which names the package, if one of an extra is missing.

  Args:
    what: needs them, for the message.
    extra: its name.
    *packages: as they are imported.
  """
  for package in packages:
    if importlib.util.find_spec(package) is None:
      line = install_line(extra)
      raise ExtraError(f"{what} needs the package {package!r}: {line}")
