"""What a program does, read from its optimised HLO text, or from its jaxpr.

XLA's own cost analysis counts a loop's body once and knows no collectives;
here bodies count as often as they run.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
  "collective-broadcast",
  "ragged-all-to-all",
)
# An assumption, to give cycles a unit: ratios mean something, seconds do not.
CYCLES_PER_SECOND = 1.75e9
# A custom call (Pallas) carries no estimate: it is counted at the roofline of
# its declared cost. Of a TPU v6e, as the cycles' unit: in bf16, and per second.
PEAK_FLOPS = 918e12
PEAK_BYTES = 1.6e12

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
# 'while.1#2' is the third element of a tuple: JAX 0.12 writes them like this.
_NAME = re.compile(r"%([\w.\-]+(?:#\d+)*)")
_CALLED = re.compile(r"\b(calls|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_OPERATION = re.compile(r'op_name="([^"]*)"')
_COMMENT = re.compile(r"/\*.*?\*/")
_CONSTANT = re.compile(r"constant\((\d+)\)")
_DECLARED = re.compile(r'"cost_estimate":(\{[^}]*\})')


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of HLO.

  Attributes:
    name: without '%'.
    shapes: (dtype, dimensions) of its results.
    opcode: 'fusion', 'all-gather-start', ...
    operands: names.
    rest: the whole line behind the opcode.
    type: of its results, as it is written.
  """

  name: str
  shapes: tuple[tuple[str, tuple[int, ...]], ...]
  opcode: str
  operands: tuple[str, ...]
  rest: str
  type: str

  @property
  def bytes(self) -> int:
    """Size of all results together, without padding."""
    return sum(_bytes(*shape) for shape in self.shapes)


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective of one device.

  Attributes:
    kind: one of KINDS.
    bytes: of the whole array: what an all-gather gives, what the others take.
    count: how often it runs in a program.
    shapes: of its results.
    operation: where it comes from, as JAX names it.
  """

  kind: str
  bytes: int
  count: int
  shapes: tuple[tuple[str, tuple[int, ...]], ...]
  operation: str


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program.

  Attributes:
    collectives: all of them.
    cycles: sum of the compiler's estimates, without collectives; 0 where it
      gives none (it does for TPUs). Custom calls count at the roofline of
      their declared cost.
    bytes: read and written in memory, by the shapes of what the scheduled
      operations take and give.
    bytes_once: the same with each loop's body counted once, as XLA's own
      analysis does: bytes / bytes_once corrects that.
    unknown_trips: loops whose number of trips is not known, counted once.
    parts: {module: (cycles, bytes)}: of what a Flax module does, its gradient
      included, by the class of the outermost one; '' for all else.
  """

  collectives: list[Collective]
  cycles: int
  bytes: int
  bytes_once: int
  unknown_trips: int
  parts: dict[str, tuple[int, int]]

  def by_kind(self) -> dict[str, dict[str, int]]:
    """See totals."""
    return totals(self.collectives)


def totals(collectives: Iterable[Collective]) -> dict[str, dict[str, int]]:
  """{kind: {'count': of operations that run, 'bytes': of all together}}."""
  found: dict[str, dict[str, int]] = {}
  for entry in collectives:
    total = found.setdefault(entry.kind, {"count": 0, "bytes": 0})
    total["count"] += entry.count
    total["bytes"] += entry.count * entry.bytes
  return found


def _bytes(dtype: str, dimensions: tuple[int, ...]) -> int:
  bits = _BITS.get(dtype)
  if bits is None:
    digits = re.search(r"\d+", dtype)
    bits = int(digits[0]) if digits else 0
  return math.prod(dimensions) * bits // 8


def _parse_instruction(line: str) -> Instruction | None:
  match = _INSTRUCTION.match(line)
  if match is None:
    return None
  name, text = match.groups()
  end = _end_of_type(text)
  opcode = _OPCODE.match(text, end)
  if opcode is None:
    return None
  rest = text[opcode.end() :]
  operands = tuple(_NAME.findall(rest[: rest.find(")")]))
  type_ = text[:end]
  return Instruction(name, _shapes(type_), opcode[1], operands, rest, type_)


def _shapes(text: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
  return tuple(
    (dtype, tuple(int(n) for n in dimensions.split(",") if n))
    for dtype, dimensions in _SHAPE.findall(text)
  )


def _element(name: str, known: dict[str, Instruction]) -> Instruction | None:
  """Instruction 'tuple#index', as get-tuple-element is written elsewhere."""
  whole, _, index = name.rpartition("#")
  if not whole:
    return None
  array = known.get(whole) or _element(whole, known)
  if array is None:
    return None
  text = array.type.strip()[1:-1]  # without the parentheses
  for _ in range(int(index)):
    text = text[_end_of_type(text) :].strip()
  text = text[: _end_of_type(text)]
  return Instruction(
    name, _shapes(text), "get-tuple-element", (whole,), "", text.rstrip(",")
  )


def _end_of_type(text: str) -> int:
  """Where the result's type ends: tuples hold spaces and parentheses."""
  depth = 0
  for i, character in enumerate(text):
    if character in "({[":
      depth += 1
    elif character in ")}]":
      depth -= 1
    elif character == " " and depth == 0:
      return i
  return len(text)


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """All computations by name, and the entry's name.

  Raises:
    ValueError: a text without an entry computation.
  """
  found: dict[str, list[Instruction]] = {}
  entry = None
  current: list[Instruction] = []
  known: dict[str, Instruction] = {}
  for line in text.splitlines():
    if header := _HEADER.match(line):
      current = found.setdefault(header[2], [])
      known = {}
      if header[1]:
        entry = header[2]
    elif instruction := _parse_instruction(_COMMENT.sub("", line)):
      for name in instruction.operands:
        if name not in known and (element := _element(name, known)):
          known[name] = element
          current.append(element)
      known[instruction.name] = instruction
      current.append(instruction)
  if entry is None:
    raise ValueError(f"no ENTRY computation in {len(text)} characters of HLO")
  return found, entry


def analyse(text: str) -> Program:
  """Collectives and cycles of a program, loops unrolled in the counting.

  Args:
    text: of jax.stages.Compiled.as_text().
  """
  found, entry = computations(text)
  collectives: list[Collective] = []
  cycles = 0.0
  moved = moved_once = unknown = 0
  parts: dict[str, tuple[float, int]] = {}

  def visit(name: str, times: int, scheduled: bool) -> None:
    nonlocal cycles, moved, moved_once, unknown
    by_name = {instruction.name: instruction for instruction in found[name]}
    for instruction in found[name]:
      if scheduled:
        own = 0.0
        if estimate := _CYCLES.search(instruction.rest):
          own = int(estimate[1])
        elif declared := _DECLARED.search(instruction.rest):
          own = _roofline_cycles(**json.loads(declared[1]))
        size = _moved_bytes(instruction, by_name, found)
        cycles += times * own
        moved += times * size
        moved_once += size
        part = _module(instruction)
        so_far = parts.get(part, (0.0, 0))
        parts[part] = (so_far[0] + times * own, so_far[1] + times * size)
      kind = instruction.opcode.removesuffix("-start")
      if kind in KINDS:
        collectives.append(_collective(instruction, kind, name, times, by_name))
      called = dict(_CALLED.findall(instruction.rest))
      if instruction.opcode == "while":
        trips = _trips(instruction, found.get(called["condition"], []))
        unknown += trips is None
        visit(called["body"], times * (trips or 1), scheduled)
      elif "calls" in called:
        # What is inside a fusion is not scheduled by itself.
        inner = scheduled and instruction.opcode != "fusion"
        visit(called["calls"], times, inner)
      for branch in _branches(instruction):
        visit(branch, times, scheduled)

  visit(entry, 1, True)
  return Program(
    collectives,
    round(cycles),
    moved,
    moved_once,
    unknown,
    {name: (round(own), size) for name, (own, size) in parts.items()},
  )


def _module(instruction: Instruction) -> str:
  """The outermost Flax module in the operation's name: a capitalised word."""
  operation = _OPERATION.search(instruction.rest)
  name = operation and re.search(r"\b[A-Z]\w*", operation[1])
  return name[0] if name else ""


def _roofline_cycles(flops: str, bytes_accessed: str, **_: str) -> float:
  seconds = max(int(flops) / PEAK_FLOPS, int(bytes_accessed) / PEAK_BYTES)
  return CYCLES_PER_SECOND * seconds


# Operations that move nothing themselves: what they call is counted.
_FREE = (
  "parameter",
  "constant",
  "tuple",
  "get-tuple-element",
  "bitcast",
  "while",
  "conditional",
  "call",
  "async-start",
  "async-update",
  "after-all",
  "partition-id",
)
_ALLOCATION = 'custom_call_target="AllocateBuffer"'
_SLICES = ("dynamic-slice", "slice", "gather")


def _moved_bytes(
  instruction: Instruction,
  by_name: dict[str, Instruction],
  found: dict[str, list[Instruction]],
) -> int:
  """What a scheduled operation reads and writes; of slices only the part."""
  opcode = instruction.opcode
  if opcode in _FREE or opcode.endswith("-done"):
    return 0
  if opcode == "custom-call" and _ALLOCATION in instruction.rest:
    return 0
  if opcode.endswith("-start"):
    return instruction.bytes  # Its result holds the operands as well.
  taken = [
    by_name[name].bytes if name in by_name else 0
    for name in instruction.operands
  ]
  if opcode in _SLICES:
    return 2 * instruction.bytes
  if opcode == "dynamic-update-slice":
    return 2 * taken[1]
  if opcode != "fusion":
    return sum(taken) + instruction.bytes
  inside = found.get(_called(instruction), [])
  if not inside:
    return sum(taken) + instruction.bytes
  parameters = [i for i in inside if i.opcode == "parameter"]
  read = sum(_read(parameter, inside, found) for parameter in parameters)
  return read + _written(inside[-1], inside, found)


def _called(fusion: Instruction) -> str:
  return dict(_CALLED.findall(fusion.rest)).get("calls", "")


def _read(
  array: Instruction,
  inside: list[Instruction],
  found: dict[str, list[Instruction]],
) -> int:
  """What a fused computation reads of one of its arrays."""
  total = 0
  for user in inside:
    for position, name in enumerate(user.operands):
      if name != array.name:
        continue
      if user.opcode in _SLICES:
        total += user.bytes if position == 0 else array.bytes
      elif user.opcode == "bitcast":
        total += _read(user, inside, found)
      elif user.opcode == "fusion":
        nested = found[_called(user)]
        total += _read(_parameter(nested, position), nested, found)
      elif user.opcode != "dynamic-update-slice" or position > 0:
        total += array.bytes
      # Else it is updated in place.
  return min(total, array.bytes)


def _parameter(inside: list[Instruction], position: int) -> Instruction:
  return next(
    i
    for i in inside
    if i.opcode == "parameter" and i.rest.startswith(f"{position})")
  )


def _written(
  root: Instruction,
  inside: list[Instruction],
  found: dict[str, list[Instruction]],
) -> int:
  """What a fused computation writes; its root comes last."""
  names = {instruction.name: instruction for instruction in inside}
  operands = [names[name] for name in root.operands if name in names]
  if root.opcode == "tuple":
    return sum(_written(operand, inside, found) for operand in operands)
  if root.opcode == "dynamic-update-slice":
    return names[root.operands[1]].bytes
  if root.opcode == "bitcast":
    return _written(operands[0], inside, found)
  if root.opcode == "fusion":
    nested = found[_called(root)]
    return _written(nested[-1], nested, found)
  return root.bytes


def _branches(instruction: Instruction) -> Iterator[str]:
  if match := _BRANCHES.search(instruction.rest):
    yield from _NAME.findall(match[1])
  if instruction.opcode == "call":
    yield from re.findall(r"to_apply=%?([\w.\-]+)", instruction.rest)


def _trips(loop: Instruction, condition: list[Instruction]) -> int | None:
  """Of a loop that counts up from 0."""
  if match := _TRIPS.search(loop.rest):
    return int(match[1])
  limits = [
    int(match[1])
    for instruction in condition
    if instruction.opcode == "constant"
    and (match := _CONSTANT.search("constant(" + instruction.rest))
  ]
  return limits[0] if len(limits) == 1 else None


def _collective(
  instruction: Instruction,
  kind: str,
  computation: str,
  times: int,
  by_name: dict[str, Instruction],
) -> Collective:
  taken = sum(
    by_name[name].bytes for name in instruction.operands if name in by_name
  )
  given = instruction.bytes
  if instruction.opcode.endswith("-start") and kind == "all-gather":
    given -= taken  # Its result holds the operands as well.
  # TPUs fuse some reduce-scatters as an all-reduce of which a part is kept.
  if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
    kind = "reduce-scatter"
  operation = _OPERATION.search(instruction.rest)
  return Collective(
    kind,
    given if kind == "all-gather" else taken,
    times,
    instruction.shapes,
    operation[1] if operation else "",
  )


def matmul_flops(closed: Any, num_devices: int) -> int:
  """Floating point operations of products and convolutions, of each device.

  A Pallas kernel's are those that it declares.

  Args:
    closed: jax.stages.Traced.jaxpr.
    num_devices: among which what is outside jax.shard_map is divided.
  """
  inside = outside = 0
  for equation, times, local in _equations(closed.jaxpr):
    results = sum(math.prod(v.aval.shape) for v in equation.outvars)
    parameters = equation.params
    if equation.primitive.name == "dot_general":
      (contracted, _), _ = parameters["dimension_numbers"]
      left = equation.invars[0].aval.shape
      flops = 2 * results * math.prod(left[axis] for axis in contracted)
    elif equation.primitive.name == "conv_general_dilated":
      kernel = equation.invars[1].aval.shape
      features = kernel[parameters["dimension_numbers"].rhs_spec[0]]
      flops = 2 * results * math.prod(kernel) // features
    elif equation.primitive.name == _KERNEL:
      declared = parameters["cost_estimate"]
      flops = declared.flops if declared else 0
    else:
      continue
    if local:
      inside += times * flops
    else:
      outside += times * flops
  return inside + outside // num_devices


def requested_collectives(closed: Any) -> list[Collective]:
  """The collectives that a program asks for, before XLA has seen it.

  What XLA's partitioner adds outside jax.shard_map is not among them.

  Args:
    closed: jax.stages.Traced.jaxpr.
  """
  found = []
  for equation, times, local in _equations(closed.jaxpr):
    kind = _KINDS_OF_JAX.get(equation.primitive.name)
    if kind is None or not local:
      continue
    variables = equation.outvars if kind == "all-gather" else equation.invars
    shapes = tuple((v.aval.dtype, tuple(v.aval.shape)) for v in variables)
    size = sum(math.prod(shape) * dtype.itemsize for dtype, shape in shapes)
    names = tuple((str(dtype), shape) for dtype, shape in shapes)
    found.append(Collective(kind, size, times, names, ""))
  return found


_KERNEL = "pallas_call"
# JAX's names of the collectives that are used here.
_KINDS_OF_JAX = {
  "all_gather": "all-gather",
  "psum": "all-reduce",
  "reduce_scatter": "reduce-scatter",
}


def _equations(
  jaxpr: Any, times: int = 1, local: bool = False
) -> Iterator[tuple[Any, int, bool]]:
  """(equation, how often it runs, whether it is inside jax.shard_map).

  Of branches each counts, of loops without a known end one round.
  """
  for equation in jaxpr.eqns:
    yield equation, times, local
    name = equation.primitive.name
    if name == _KERNEL:
      continue
    rounds = times * (equation.params["length"] if name == "scan" else 1)
    for value in equation.params.values():
      for entry in value if isinstance(value, (tuple, list)) else (value,):
        entry = getattr(entry, "jaxpr", entry)
        if hasattr(entry, "eqns"):
          yield from _equations(entry, rounds, local or name == "shard_map")
