"""Public names of a package, imported when they are asked for."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def names(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
  """A package's `__getattr__` (PEP 562).

  Args:
    package: its `__name__`.
    homes: {public name: module that defines it, or is it}.
  """

  def get(name: str) -> Any:
    if name not in homes:
      raise AttributeError(f"module {package!r} has no attribute {name!r}")
    module = importlib.import_module(homes[name])
    return getattr(module, name, module)

  return get


def homes(package: str, names: Mapping[str, Sequence[str]]) -> dict[str, str]:
  """The homes of the names that a package's modules define: {module: names}."""
  return {name: f"{package}.{home}" for home in names for name in names[home]}
