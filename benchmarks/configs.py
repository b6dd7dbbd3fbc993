"""A config with some values changed."""

from collections.abc import Sequence
from typing import Any

import yaml

from drift_jax import config as config_lib


def load(name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
  """The tree of FILE:VARIANT with each KEY=VALUE set."""
  values = config_lib.load_config(name)
  change(values, overrides)
  return values


def change(values: dict[str, Any], overrides: Sequence[str]) -> None:
  """Sets each KEY=VALUE in the tree."""
  for override in overrides:
    path, _, value = override.partition("=")
    *sections, key = path.split(".")
    section = values
    for part in sections:
      section = section[part]
    section[key] = yaml.safe_load(value)
