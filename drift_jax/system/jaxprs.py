"""What a traced program computes, before XLA has seen it."""

import math
from collections.abc import Iterator
from typing import Any

_KERNEL = "pallas_call"
# JAX's names of cuDNN's attention, and its products of queries with keys.
_CUDNN = {
  "dot_product_attention_fwd_wrapper": 2,
  "dot_product_attention_bwd_wrapper": 5,
}


def equations(jaxpr: Any) -> Iterator[tuple[Any, int, bool]]:
  """Yields (equation, how often it runs, whether it is inside jax.shard_map).

  Of branches each counts, of loops without a known end one round. What no
  result needs is left out, as XLA leaves it out: of what is computed again for
  a gradient, the part that the gradient doesn't take.
  """
  from jax.interpreters import partial_eval

  needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  yield from _equations(needed, 1, False)


def _needed(jaxpr: Any) -> list[Any]:
  """Its equations without the kernels, which JAX keeps, of unused results."""
  used = set(map(id, jaxpr.outvars))
  equations = []
  for equation in reversed(jaxpr.eqns):
    if equation.effects or not used.isdisjoint(map(id, equation.outvars)):
      equations.append(equation)
      used.update(map(id, equation.invars))
  return equations[::-1]


def _equations(
  jaxpr: Any, times: int, local: bool
) -> Iterator[tuple[Any, int, bool]]:
  for equation in _needed(jaxpr):
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


def matmul_flops(closed: Any, num_devices: int) -> int:
  """Floating point operations of products and convolutions, of each device.

  A Pallas kernel's are those that it declares; cuDNN's attention computes the
  weights again for its gradient.

  Args:
    closed: jax.stages.Traced.jaxpr.
    num_devices: among which what is outside jax.shard_map is divided.
  """
  flops = {True: 0, False: 0}  # inside jax.shard_map, outside
  for equation, times, local in equations(closed.jaxpr):
    results = sum(math.prod(v.aval.shape) for v in equation.outvars)
    numbers = equation.params.get("dimension_numbers")
    if equation.primitive.name == "dot_general":
      left = equation.invars[0].aval.shape
      each = 2 * math.prod(left[axis] for axis in numbers[0][0])
      flops[local] += times * results * each
    elif equation.primitive.name == "conv_general_dilated":
      kernel = equation.invars[1].aval.shape
      each = 2 * math.prod(kernel) // kernel[numbers.rhs_spec[0]]
      flops[local] += times * results * each
    elif equation.primitive.name in _CUDNN:
      query, key = (v.aval.shape for v in equation.invars[:2])
      each = 2 * math.prod(query) * key[1]  # [batch, tokens, heads, channels]
      flops[local] += times * _CUDNN[equation.primitive.name] * each
    elif equation.primitive.name == _KERNEL:
      declared = equation.params["cost_estimate"]
      flops[local] += times * declared.flops if declared else 0
  return flops[True] + flops[False] // num_devices
