"""Operations, bytes and collectives of a program, from its HLO or its jaxpr.

XLA's own cost analysis counts a loop's body once and knows no collectives;
here bodies count as often as they run.
"""

import collections
import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from drift_jax.system import jaxprs

KINDS = (
  *("all-gather", "all-reduce", "reduce-scatter", "all-to-all"),
  *("collective-permute", "collective-broadcast", "ragged-all-to-all"),
)
# An assumption, to give cycles a unit: ratios mean something, seconds do not.
CYCLES_PER_SECOND = 1.75e9
# No program takes so many: the compiler gives 2^63 - 1 for what it can't count.
OVERFLOWN = 2**62
# A custom call (Pallas) carries no estimate: it is counted at the roofline of
# its declared cost. Of a TPU v6e, as the cycles' unit: in bf16, and per second.
PEAK_FLOPS = 918e12
PEAK_BYTES = 1.6e12

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ([a-z(].*)$")
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{[^}]*\})?")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
# 'while.1#2' is the third element of a tuple: JAX 0.12 writes them like this.
_NAME = re.compile(r"%([\w.\-]+(?:#\d+)*)")
_CALLED = re.compile(r"\b(calls|body|condition|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_LIMIT = re.compile(r"(\d+)\)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
# A Flax module in an operation's name is a capitalised word.
_MODULE = re.compile(r'op_name="[^"]*?\b([A-Z]\w*)')
_COMMENT = re.compile(r"/\*.*?\*/")
_DECLARED = re.compile(r'"cost_estimate":(\{[^}]*\})')
_ALLOCATION = 'custom_call_target="AllocateBuffer"'
# Operations that move nothing themselves: what they call is counted.
_FREE = (
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast"),
  *("while", "conditional", "call", "async-start", "async-update"),
  *("after-all", "partition-id"),
)
_SLICES = ("dynamic-slice", "slice", "gather")
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_TRITON = re.compile(r'"kind":"(__triton\w*)"')
# JAX's names of the collectives that are used here.
_KINDS_OF_JAX = {
  "all_gather": "all-gather",
  "psum": "all-reduce",
  "reduce_scatter": "reduce-scatter",
}

Shape = tuple[str, tuple[int, ...]]  # dtype and dimensions of an array


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of HLO.

  Attributes:
    name: without '%'.
    type: of the result: a Shape, or a list of types for a tuple.
    opcode: 'fusion', 'all-gather-start', ...
    operands: names.
    rest: the line after the opcode.
  """

  name: str
  type: Any
  opcode: str
  operands: tuple[str, ...]
  rest: str

  @property
  def bytes(self) -> int:
    """Size of all results together, without padding."""
    return sum(_bytes(*shape) for shape in _shapes(self.type))

  @property
  def called(self) -> dict[str, str]:
    """{'calls', 'body', 'condition' or 'to_apply': name of a computation}."""
    return dict(_CALLED.findall(self.rest))


# Instructions by name; the root comes last.
Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective of one device.

  Attributes:
    kind: one of KINDS.
    bytes: of the whole array: what an all-gather gives, what the others take.
    count: how often it runs in a program.
    shapes: of its results, if it is compiled.
  """

  kind: str
  bytes: int
  count: int
  shapes: tuple[Shape, ...] = ()


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program.

  Attributes:
    collectives: all of them.
    cycles: sum of the compiler's estimates, without collectives; 0 if it gives
      none (it does for TPUs). Custom calls count at the roofline of
      their declared cost. OVERFLOWN or more if an estimate means nothing.
    bytes: read and written in memory, by the shapes of what the scheduled
      operations take and give.
    bytes_once: the same with each loop's body counted once, as XLA's own
      analysis does: bytes / bytes_once corrects that.
    unknown_trips: loops whose number of trips is not known, counted once.
    parts: {class of the outermost Flax module: (cycles, bytes)}, gradients
      included; '' for all else.
    kernels: {name: how often it runs} of what XLA does not write itself, and
      of products that it writes in Triton.
  """

  collectives: list[Collective]
  cycles: int
  bytes: int
  bytes_once: int
  unknown_trips: int
  parts: dict[str, tuple[int, int]]
  kernels: dict[str, int]

  def by_kind(self) -> dict[str, dict[str, int]]:
    """See totals."""
    return totals(self.collectives)


def totals(collectives: Iterable[Collective]) -> dict[str, dict[str, int]]:
  """{kind: {'count': of operations that run, 'bytes': of all together}}."""
  sums: dict[str, dict[str, int]] = {}
  for entry in collectives:
    total = sums.setdefault(entry.kind, {"count": 0, "bytes": 0})
    total["count"] += entry.count
    total["bytes"] += entry.count * entry.bytes
  return sums


def _bytes(dtype: str, dimensions: tuple[int, ...]) -> int:
  bits = re.search(r"\d+", dtype)
  if dtype == "pred":
    return math.prod(dimensions)
  return math.prod(dimensions) * int(bits[0] if bits else 0) // 8


def _shapes(type_: Any) -> tuple[Shape, ...]:
  """All arrays of a type."""
  if isinstance(type_, tuple):
    return (type_,)
  return tuple(shape for element in type_ for shape in _shapes(element))


def _read_type(text: str, at: int = 0) -> tuple[Any, int]:
  """(the type that begins at a place of the text, the place of its end)."""
  if text[at] == "(":
    elements = []
    at += 1
    while at < len(text) and text[at] != ")":
      element, at = _read_type(text, at)
      elements.append(element)
      at += 2 * text.startswith(", ", at)
    return elements, at + 1
  array = _ARRAY.match(text, at)
  if array is None:
    return [], len(text)  # no instruction
  dimensions = tuple(int(n) for n in re.findall(r"\d+", array[2]))
  return (array[1], dimensions), array.end()


def _parse_instruction(line: str) -> Instruction | None:
  match = _INSTRUCTION.match(line)
  if match is None:
    return None
  type_, end = _read_type(match[2])
  opcode = _OPCODE.match(match[2], end)
  if opcode is None:
    return None
  rest = match[2][opcode.end() :]
  operands = tuple(_NAME.findall(rest[: rest.find(")")]))
  return Instruction(match[1], type_, opcode[1], operands, rest)


def _element(name: str, known: Computation) -> Instruction | None:
  """Instruction 'tuple#index', as get-tuple-element is written elsewhere."""
  whole, *indices = name.split("#")
  if not indices or whole not in known:
    return None
  type_ = known[whole].type
  for index in indices:
    type_ = type_[int(index)]
  return Instruction(name, type_, "get-tuple-element", (whole,), "")


def computations(text: str) -> tuple[dict[str, Computation], str]:
  """All computations by name, and the entry's name.

  Raises:
    ValueError: a text without an entry computation.
  """
  module: dict[str, Computation] = {}
  entry = None
  current: Computation = {}
  for line in text.splitlines():
    if header := _HEADER.match(line):
      current = module.setdefault(header[2], {})
      entry = header[2] if header[1] else entry
    elif instruction := _parse_instruction(_COMMENT.sub("", line)):
      for name in instruction.operands:
        if name not in current and (element := _element(name, current)):
          current[name] = element
      current[instruction.name] = instruction
  if entry is None:
    raise ValueError(f"no ENTRY computation in {len(text)} characters of HLO")
  return module, entry


def analyse(text: str) -> Program:
  """What a program does and moves, loops unrolled in the counting.

  Args:
    text: of jax.stages.Compiled.as_text().
  """
  module, entry = computations(text)
  collectives: list[Collective] = []
  parts: dict[str, tuple[float, int]] = {}
  counts = collections.Counter[str]()
  kernels = collections.Counter[str]()

  def visit(name: str, times: int, scheduled: bool) -> None:
    inside = module[name]
    for instruction in inside.values():
      # 1. Its own work
      if scheduled:
        size = _moved_bytes(instruction, inside, module)
        counts["bytes"] += size
        flax_module = _MODULE.search(instruction.rest)
        part = flax_module[1] if flax_module else ""
        cycles, moved = parts.get(part, (0.0, 0))
        for call in (instruction, *_fused_calls(instruction, module)):
          cycles += times * _cycles(call)
          if kernel := _kernel(call):
            kernels[kernel] += times
        parts[part] = cycles, moved + times * size
      kind = instruction.opcode.removesuffix("-start")
      if kind in KINDS:
        collectives.append(_collective(instruction, kind, name, times, inside))
      # 2. What it calls
      called = instruction.called
      if instruction.opcode == "while":
        trips = _trips(instruction, module.get(called["condition"], {}))
        counts["unknown trips"] += trips is None
        visit(called["body"], times * (trips or 1), scheduled)
      elif instruction.opcode == "call":
        visit(called["to_apply"], times, scheduled)
      elif "calls" in called:
        # What is inside a fusion is not scheduled by itself.
        inner = scheduled and not _is_fusion(instruction)
        visit(called["calls"], times, inner)
      if branches := _BRANCHES.search(instruction.rest):
        for branch in _NAME.findall(branches[1]):
          visit(branch, times, scheduled)

  visit(entry, 1, True)
  return Program(
    collectives,
    cycles=round(sum(cycles for cycles, _ in parts.values())),
    bytes=sum(moved for _, moved in parts.values()),
    bytes_once=counts["bytes"],
    unknown_trips=counts["unknown trips"],
    parts={name: (round(cycles), n) for name, (cycles, n) in parts.items()},
    kernels=dict(kernels),
  )


def _is_fusion(instruction: Instruction) -> bool:
  """Whether it runs its computation as one kernel; GPUs may start it early."""
  return instruction.opcode in ("fusion", "fusion-start")


def _fused_calls(
  instruction: Instruction, module: Mapping[str, Computation]
) -> list[Instruction]:
  """Custom calls in a fusion, e.g. one that writes their result to a stack."""
  if not _is_fusion(instruction):
    return []
  fused = module.get(instruction.called.get("calls", ""), {})
  return [inner for inner in fused.values() if _DECLARED.search(inner.rest)]


def _kernel(instruction: Instruction) -> str | None:
  """Name of the kernel that a scheduled operation runs, if it has one."""
  if instruction.opcode == "custom-call":
    match = _TARGET.search(instruction.rest)
  else:
    match = _is_fusion(instruction) and _TRITON.search(instruction.rest)
  return match[1] if match else None


def _cycles(instruction: Instruction) -> float:
  if estimate := _CYCLES.search(instruction.rest):
    return int(estimate[1])
  if declared := _DECLARED.search(instruction.rest):
    cost = json.loads(declared[1])
    return CYCLES_PER_SECOND * max(
      int(cost["flops"]) / PEAK_FLOPS, int(cost["bytes_accessed"]) / PEAK_BYTES
    )
  return 0.0


def _moved_bytes(
  instruction: Instruction,
  inside: Computation,
  module: Mapping[str, Computation],
) -> int:
  """Bytes that a scheduled operation reads and writes; the part of slices."""
  opcode = instruction.opcode
  is_free = opcode in _FREE or opcode.endswith("-done")
  if is_free or _ALLOCATION in instruction.rest:
    return 0
  if opcode.endswith("-start") and not _is_fusion(instruction):
    return instruction.bytes  # Its result holds the operands as well.
  if opcode in _SLICES:
    return 2 * instruction.bytes
  taken = [
    inside[name].bytes if name in inside else 0 for name in instruction.operands
  ]
  if opcode == "dynamic-update-slice":
    return 2 * taken[1]
  fused = module.get(instruction.called.get("calls", ""))
  if not _is_fusion(instruction) or not fused:
    return sum(taken) + instruction.bytes
  read = sum(
    _read(i, fused, module) for i in fused.values() if i.opcode == "parameter"
  )
  return read + _written(next(reversed(fused.values())), fused, module)


def _read(
  array: Instruction, inside: Computation, module: Mapping[str, Computation]
) -> int:
  """Bytes that a fused computation reads of one of its arrays."""
  total = 0
  for user in inside.values():
    for position, name in enumerate(user.operands):
      if name != array.name:
        continue
      if user.opcode in _SLICES and position == 0:
        total += user.bytes
      elif user.opcode == "bitcast":
        total += _read(user, inside, module)
      elif user.opcode == "fusion":
        nested = module[user.called["calls"]]
        (parameter,) = (
          i
          for i in nested.values()
          if i.opcode == "parameter" and i.rest.startswith(f"{position})")
        )
        total += _read(parameter, nested, module)
      elif user.opcode != "dynamic-update-slice" or position > 0:
        total += array.bytes
      # Else it is updated in place.
  return min(total, array.bytes)


def _written(
  root: Instruction, inside: Computation, module: Mapping[str, Computation]
) -> int:
  """Bytes that a fused computation writes."""
  if root.opcode in ("tuple", "bitcast"):
    operands = (inside[name] for name in root.operands)
    return sum(_written(operand, inside, module) for operand in operands)
  if root.opcode == "dynamic-update-slice":
    return inside[root.operands[1]].bytes
  if root.opcode == "fusion":
    nested = module[root.called["calls"]]
    return _written(next(reversed(nested.values())), nested, module)
  return root.bytes


def _trips(loop: Instruction, condition: Computation) -> int | None:
  """Number of trips of a loop that counts up from 0; None if unknown."""
  if match := _TRIPS.search(loop.rest):
    return int(match[1])
  limits = [
    int(match[1])
    for instruction in condition.values()
    if instruction.opcode == "constant"
    and (match := _LIMIT.match(instruction.rest))
  ]
  return limits[0] if len(limits) == 1 else None


def _collective(
  instruction: Instruction,
  kind: str,
  computation: str,
  times: int,
  inside: Computation,
) -> Collective:
  taken = sum(
    inside[name].bytes for name in instruction.operands if name in inside
  )
  size = instruction.bytes
  if instruction.opcode == "all-gather-start":
    size -= taken  # Its result holds the operands as well.
  if kind != "all-gather":
    size = taken
  # TPUs fuse some reduce-scatters as an all-reduce of which a part is kept.
  if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
    kind = "reduce-scatter"
  return Collective(kind, size, times, _shapes(instruction.type))


def requested_collectives(closed: Any) -> list[Collective]:
  """The collectives that a program asks for, before XLA has seen it.

  What XLA's partitioner adds outside jax.shard_map is not among them.

  Args:
    closed: jax.stages.Traced.jaxpr.
  """
  collectives = []
  for equation, times, local in jaxprs.equations(closed.jaxpr):
    kind = _KINDS_OF_JAX.get(equation.primitive.name)
    if kind is None or not local:
      continue
    variables = equation.outvars if kind == "all-gather" else equation.invars
    size = sum(v.aval.size * v.aval.dtype.itemsize for v in variables)
    collectives.append(Collective(kind, size, times))
  return collectives
