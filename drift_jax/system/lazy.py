"""Public names of a package, imported when they are asked for."""

import contextlib
import importlib
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from drift_jax.system.errors import UserError


class MissingError(UserError, ImportError):
  """A package that all of drift_jax needs is missing."""


def _missing(error: ModuleNotFoundError) -> MissingError | None:
  """What to say of a package that ours import; None if others do."""
  *_, frame = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
  spec = frame.f_globals.get("__spec__")  # has the name of __main__, too
  importer = "" if spec is None else f"{spec.name}."
  package = (error.name or "").partition(".")[0]
  if package == "drift_jax" or not importer.startswith("drift_jax."):
    return None
  return MissingError(
    f"the package {package!r} is missing: drift_jax was installed without "
    "its needs; install it again without --no-deps, or, in a clone, by "
    "launch/install.sh"
  )


@contextlib.contextmanager
def needs() -> Iterator[None]:
  """Turns the absence of a package that ours import into a MissingError."""
  try:
    yield
  except ModuleNotFoundError as error:
    if (missing := _missing(error)) is None:
      raise
    raise missing from None


def end_in_one_line() -> None:
  """Has a program end so if what it imports at its start is missing."""
  before = sys.excepthook

  def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    missing = isinstance(error, ModuleNotFoundError) and _missing(error)
    if missing:
      print(f"Error: {missing}", file=sys.stderr)
    else:
      before(kind, error, trace)

  sys.excepthook = hook


def names(
  package: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
  """A package's `__getattr__` and `__dir__` (PEP 562).

  `__dir__` has the names of `__all__`, if the package has it, else all.

  Args:
    package: its `__name__`.
    homes: {public name: module that defines it, or is it}.
  """

  def get(name: str) -> Any:
    if name not in homes:
      raise AttributeError(f"module {package!r} has no attribute {name!r}")
    with needs():
      module = importlib.import_module(homes[name])
    return getattr(module, name, module)

  def listed() -> list[str]:
    has = vars(sys.modules[package])
    return sorted({*has, *has.get("__all__", homes)})

  return get, listed


def homes(package: str, names: Mapping[str, Sequence[str]]) -> dict[str, str]:
  """The homes of the names that a package's modules define: {module: names}."""
  return {name: f"{package}.{home}" for home in names for name in names[home]}
