"""The dtype in which a network uses each of its parameters."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.extend import core

# Primitives that move numbers and change none: rounding commutes with them.
_MOVES = (
  "broadcast_in_dim concatenate copy dynamic_slice gather reshape rev slice"
  " squeeze transpose"
).split()
_Numbers = frozenset[int]


@functools.lru_cache
def used_dtypes(module: nn.Module) -> Mapping[str, jnp.dtype]:
  """{path of a parameter: the dtype in which the module uses it}.

  That is the module's own dtype if the module only rounds the parameter to it,
  and float32 otherwise: of norms, and of biases that are added to float32
  sums. A trace of a call tells, not the names.

  Args:
    module: has a `dtype` of 16 bits, and `example_inputs` for a call.
  """
  model: Any = module

  def init(*inputs: jax.Array) -> Any:
    return model.init(_keys(), *inputs)["params"]

  def call(flat: Mapping[str, jax.Array], *inputs: jax.Array) -> Any:
    params = traverse_util.unflatten_dict(dict(flat), sep="/")
    return model.apply({"params": params}, *inputs, rngs=_keys())

  shapes = jax.eval_shape(init, *model.example_inputs)
  flat = traverse_util.flatten_dict(shapes, sep="/")
  closed = jax.make_jaxpr(call)(flat, *model.example_inputs)
  # A dictionary's leaves are in the order of its keys.
  names = sorted(flat)
  tracked = [frozenset((i,)) for i in range(len(names))]
  tracked += [frozenset()] * (len(closed.jaxpr.invars) - len(names))
  uses: list[tuple[_Numbers, jnp.dtype]] = []
  _follow(closed.jaxpr, tracked, uses)
  used: dict[int, set[jnp.dtype]] = {i: set() for i in range(len(names))}
  for numbers, dtype in uses:
    for i in numbers:
      used[i].add(dtype)
  return {
    name: model.dtype if used[i] == {model.dtype} else jnp.dtype(jnp.float32)
    for i, name in enumerate(names)
  }


def _keys() -> dict[str, jax.Array]:
  return dict.fromkeys(("params", "noise", "mask"), jax.random.key(0))


def rounded(module: nn.Module, params: Any) -> Any:
  """Parameters in the dtypes in which the module uses them.

  The module computes the same numbers with them, bit for bit. A module without
  a `dtype` uses float32.
  """
  model: Any = module
  if getattr(model, "dtype", jnp.float32) == jnp.float32:
    return jax.tree.map(lambda x: x.astype(jnp.float32), params)
  dtypes = used_dtypes(module)
  flat: dict[Any, Any] = dict(traverse_util.flatten_dict(params, sep="/"))
  return traverse_util.unflatten_dict(
    {name: x.astype(dtypes[name]) for name, x in flat.items()}, sep="/"
  )


def _follow(
  jaxpr: core.Jaxpr,
  arguments: Sequence[_Numbers],
  uses: list[tuple[_Numbers, jnp.dtype]],
) -> list[_Numbers]:
  """Follows parameters through a program to where it uses them.

  Args:
    jaxpr: the program.
    arguments: numbers of the parameters that each argument holds unchanged.
    uses: (parameters, dtype) of each use are appended here.

  Returns:
    Numbers of the parameters that each output holds unchanged.
  """
  held = dict(zip(jaxpr.invars, arguments, strict=True))

  def numbers(atom: Any) -> _Numbers:
    is_literal = isinstance(atom, core.Literal)
    return frozenset() if is_literal else held.get(atom, frozenset())

  for equation in jaxpr.eqns:
    atoms: list[Any] = list(equation.invars)
    inputs = [numbers(atom) for atom in atoms]
    if not any(inputs):
      continue
    name, everything = equation.primitive.name, frozenset().union(*inputs)
    inner = _body(equation)
    if inner is not None:
      outputs = _follow(inner, inputs, uses)
      held |= dict(zip(equation.outvars, outputs, strict=True))
    elif name in _MOVES:
      held[equation.outvars[0]] = everything
    elif name == "convert_element_type":
      uses.append((everything, jnp.dtype(equation.params["new_dtype"])))
    else:
      uses += [
        (found, jnp.dtype(atom.aval.dtype))
        for atom, found in zip(atoms, inputs, strict=True)
        if found
      ]
  return [numbers(atom) for atom in jaxpr.outvars]


def _body(equation: core.JaxprEqn) -> core.Jaxpr | None:
  """The program that an equation calls with its own arguments, or None."""
  bodies = list(core.jaxprs_in_params(equation.params))
  if len(bodies) != 1:
    return None  # a loop with a condition, or a choice of programs
  (body,) = bodies
  same = len(body.invars) == len(equation.invars)
  same &= len(body.outvars) == len(equation.outvars)
  return body if same else None
