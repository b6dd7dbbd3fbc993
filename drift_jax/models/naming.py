"""Other names of a model's parameters, by tables.

A tree here holds equal blocks, and the style tables, stacked along a leading
axis; another tree may hold one parameter for each.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

Shapes = Mapping[str, tuple[int, ...]]

_LISTED_DIFFERENCES = 5


class Entry(NamedTuple):
  """The counterparts of one parameter: one, or each of those stacked here."""

  names: tuple[str, ...]
  stacked: bool = False


class Naming(NamedTuple):
  """A table of names.

  Attributes:
    table: {module or parameter here: its name there}. Names here have
      placeholders for numbers, '{stage}'; names there may have them too, and
      '{stage0}' for one less. Those with '{i}' are of parameters that are
      stacked here, and count from 0, those with '{i1}' from 1. The first row
      that fits counts.
    leaves: {last part of a parameter's name in a module: the same there},
      where they differ.
    separator: between a module and its parameters there.
  """

  table: Mapping[str, str]
  leaves: Mapping[str, str] = {}
  separator: str = "/"

  def entries(self, shapes: Shapes) -> dict[str, Entry]:
    """{name: its counterparts} of parameters with these shapes."""
    rows = [
      (re.compile(_pattern(ours) + r"(?:/(?P<leaf>[a-z]+))?"), theirs)
      for ours, theirs in self.table.items()
    ]
    return {path: self._entry(rows, path, shapes[path]) for path in shapes}

  def _entry(
    self,
    rows: Sequence[tuple[re.Pattern[str], str]],
    path: str,
    shape: tuple[int, ...],
  ) -> Entry:
    match, template = next(
      (match, theirs)
      for ours, theirs in rows
      if (match := ours.fullmatch(path))
    )
    numbers = match.groupdict()
    leaf = numbers.pop("leaf")
    if leaf is not None:
      template += self.separator + self.leaves.get(leaf, leaf)
    numbers |= {f"{k}0": str(int(v) - 1) for k, v in numbers.items()}
    stacked = "{i}" in template or "{i1}" in template
    count = shape[0] if stacked else 1
    names = (template.format(i=i, i1=i + 1, **numbers) for i in range(count))
    return Entry(tuple(names), stacked)


def _pattern(ours: str) -> str:
  return re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(ours))


def inside(ours: str, theirs: str, table: Mapping[str, str]) -> dict[str, str]:
  """The table with prefixes before the names here and there."""
  return {f"{ours}{a}": f"{theirs}{b}" for a, b in table.items()}


def gather(
  entries: Mapping[str, Entry], read: Callable[[str], Any]
) -> dict[str, Any]:
  """Parameters here, by name; NumPy arrays stay on the host.

  Args:
    entries: their counterparts.
    read: the array there of a name.
  """
  flat = {}
  for path, (names, stacked) in entries.items():
    leaves = [read(name) for name in names]
    on_host = all(isinstance(leaf, np.ndarray) for leaf in leaves)
    stack = np.stack if on_host else jnp.stack
    flat[path] = stack(leaves) if stacked else leaves[0]
  return flat


def scatter(
  entries: Mapping[str, Entry], flat: Mapping[str, Any]
) -> dict[str, Any]:
  """Inverse of `gather`: parameters there, by name."""
  return {
    name: flat[path][i] if stacked else flat[path]
    for path, (names, stacked) in entries.items()
    for i, name in enumerate(names)
  }


def require_parameters(
  what: str, flat: Mapping[str, Any], expected: Shapes
) -> None:
  """Raises ValueError unless names and shapes are the expected ones.

  Args:
    what: begins the message, which lists the first differences.
    flat: arrays by name.
    expected: shapes by name.
  """
  shape_errors = [
    f"{name} has shape {tuple(flat[name].shape)}, not {shape}"
    for name, shape in expected.items()
    if name in flat and tuple(flat[name].shape) != shape
  ]
  complaints = [
    f"{title} ({len(items)}): {'; '.join(items[:_LISTED_DIFFERENCES])}"
    for title, items in (
      ("missing", sorted(expected.keys() - flat.keys())),
      ("unexpected", sorted(flat.keys() - expected.keys())),
      ("wrong shapes", shape_errors),
    )
    if items
  ]
  if complaints:
    raise ValueError(f"{what}: {'. '.join(complaints)}")
