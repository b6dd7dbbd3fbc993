"""What takes a GPU's memory when a program takes most, from XLA's own files."""

import collections
import re
from typing import Any, NamedTuple

from drift_jax.tools import hlo

_ALLOCATION = re.compile(r"\nallocation \d+: ")
_TEMPORARY = "preallocated-temp"
_VALUE = re.compile(
  r"value: <\d+ (\S+?)(?:\{([\d,]*)\})?(?: \(phi\))? @\d+> "
  r"\(size=(\d+),offset=(\d+)\): (\w+\[[\d,]*\])"
)
_RANGE = re.compile(r"^ +(\S+?)\{([\d,]*)\}:(\d+)-(\d+)$", re.MULTILINE)
_OPERATION = re.compile(r'op_name="([^"]*)"')
# Smaller ones, as a part of all temporary memory, are not looked at.
_SMALLEST = 1e-4


class _Value(NamedTuple):
  """An array at its place in an allocation, and when it is needed."""

  allocation: int
  offset: int
  size: int
  first: int
  last: int
  type: str
  name: str


def largest(
  text: str, assignment: str, ranges: str, count: int = 6
) -> list[dict[str, Any]]:
  """The largest temporary arrays at the moment when all take most.

  Equal ones are one entry: {'bytes': of all, 'count', 'type', 'where': name of
  the operation}.

  Args:
    text: of the optimised program.
    assignment: XLA's dump 'buffer-assignment'.
    ranges: XLA's dump 'live-range'.
    count: of entries.
  """
  values = _values(assignment, ranges)
  if not values:
    return []
  moment = max((v.first for v in values), key=lambda t: _used(values, t))
  module, _ = hlo.computations(text)
  operations = {
    name: match[1]
    for computation in module.values()
    for name, instruction in computation.items()
    if (match := _OPERATION.search(instruction.rest))
  }
  totals = collections.Counter[tuple[str, str]]()
  counts = collections.Counter[tuple[str, str]]()
  for value in _alive(values, moment):
    key = value.type, operations.get(value.name, "")
    totals[key] += value.size
    counts[key] += 1
  return [
    {"bytes": size, "count": counts[key], "type": key[0], "where": key[1]}
    for key, size in totals.most_common(count)
  ]


def _values(assignment: str, ranges: str) -> list[_Value]:
  """All large values among the temporary ones."""
  needed = {
    (m[1], m[2]): (int(m[3]), int(m[4])) for m in _RANGE.finditer(ranges)
  }
  temporary = [
    part
    for part in _ALLOCATION.split(assignment)
    if _TEMPORARY in part.partition("\n")[0]
  ]
  values = [
    _Value(number, int(m[4]), int(m[3]), *needed[m[1], m[2] or ""], m[5], m[1])
    for number, part in enumerate(temporary)
    for m in _VALUE.finditer(part)
    if (m[1], m[2] or "") in needed
  ]
  total = max((value.offset + value.size for value in values), default=0)
  return [value for value in values if value.size >= _SMALLEST * total]


def _alive(values: list[_Value], moment: int) -> list[_Value]:
  """Values needed at a moment; of those that share a place, the largest."""
  places: dict[tuple[int, int], _Value] = {}
  for value in values:
    if value.first <= moment <= value.last:
      place = value.allocation, value.offset
      places[place] = max(places.get(place, value), value, key=lambda v: v.size)
  return list(places.values())


def _used(values: list[_Value], moment: int) -> int:
  return sum(value.size for value in _alive(values, moment))
