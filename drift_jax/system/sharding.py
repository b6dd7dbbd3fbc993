"""Mesh, sharding rules and batch placement: sharding is data, in one file.

Parameters are sharded, computation is not: each device works on its part of
the batch with whole parameters, gathered where they are used (`over_devices`,
`gather`). Left to itself, XLA's partitioner splits the layers along with their
parameters, and gathers activations instead.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from drift_jax.system.errors import UserError

BATCH_AXES = ("data", "fsdp")
FSDP = "fsdp"

# Leaves, by their path, of which every device keeps a copy: norm scales, biases
# and scalars are too small to be worth a collective. Paths look like
# "params/blocks/qkv/kernel".
_WHOLE = re.compile(r"(^|/)(bias|scale|weight|step|count|rng)$")


class DeviceError(UserError, RuntimeError):
  """There are no devices to run on; the message says which and what now."""


def find_devices(*, local: bool = False) -> list[Any]:
  """All devices, or those of this process.

  Raises:
    DeviceError: JAX finds none of the platform that it was told to use.
  """
  try:
    return list(jax.local_devices() if local else jax.devices())
  # The second is what JAX 0.10 makes of 'cuda' without its plugin.
  except (RuntimeError, AssertionError) as error:
    platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    reason = " ".join(str(error).split()) or "no plugin for it is installed"
    raise DeviceError(
      f"JAX finds no devices with JAX_PLATFORMS={platforms or ''} ({reason}): "
      "install JAX for them (GPUs: pip install 'jax[cuda13]', TPUs: "
      "'jax[tpu]'), see whether the driver lists them (nvidia-smi), or leave "
      "JAX_PLATFORMS unset for what there is"
    ) from error


def make_mesh(
  data: int = -1, fsdp: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
  """A ('data', 'fsdp') mesh over the devices; one size may be -1.

  Raises:
    ValueError: if the sizes do not multiply to the number of devices.
    DeviceError: there are none.
  """
  devices = find_devices() if devices is None else list(devices)
  count = len(devices)
  sizes = [data, fsdp]
  if sizes.count(-1) == 1:
    known = max(data, fsdp)
    sizes[sizes.index(-1)] = count // known if known > 0 else 0
  if min(sizes) < 1 or math.prod(sizes) != count:
    raise ValueError(
      f"mesh data={data}, fsdp={fsdp} does not fit {count} devices: give sizes "
      f">= 1 whose product is {count}, at most one of them -1"
    )
  # As the chips are wired; an axis of them may be split between two of ours.
  grid = mesh_utils.create_device_mesh(
    tuple(sizes), devices, allow_split_physical_axes=True
  )
  return Mesh(grid, BATCH_AXES, axis_types=(AxisType.Auto,) * len(sizes))


def path_name(path: Sequence[Any]) -> str:
  """Joins a pytree key path with '/': ('params', 'w') -> 'params/w'."""
  return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def spec_for(name: str, shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
  """The PartitionSpec of one leaf, by its path.

  'fsdp' shards the largest axis that the mesh axis divides, the last one if
  there is no other.
  """
  axes = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
  if _WHOLE.search(name) or fsdp == 1 or not axes:
    return PartitionSpec()
  # The largest: stacked layers keep their leading axis. But the last one only
  # if need be: TPUs pad it, and take parts of it apart again.
  best = max(axes, key=lambda axis: (axis < len(shape) - 1, shape[axis]))
  return PartitionSpec(*([None] * best), "fsdp")


def infer_specs(tree: Any, mesh: Mesh) -> Any:
  """PartitionSpecs for a pytree of arrays or ShapeDtypeStructs."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: spec_for(path_name(path), leaf.shape, mesh.shape[FSDP]),
    tree,
  )


def infer_sharding(tree: Any, mesh: Mesh) -> Any:
  """NamedShardings for a pytree of arrays or ShapeDtypeStructs."""
  return jax.tree.map(
    lambda spec: NamedSharding(mesh, spec), infer_specs(tree, mesh)
  )


def abstract(tree: Any, shardings: Any) -> Any:
  """ShapeDtypeStructs with shardings, of arrays or ShapeDtypeStructs."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree,
    shardings,
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding that keeps a copy on every device of the mesh."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The sharding of a batch: its leading axis over all mesh axes."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def over_devices(
  function: Callable[..., Any],
  mesh: Mesh,
  in_specs: tuple[Any, ...],
  out_specs: Any,
) -> Callable[..., Any]:
  """The function on each device's part of its arguments (jax.shard_map).

  Collectives are the function's own business: over BATCH_AXES for the batch,
  `gather` for parameters. Arrays without a value are made anew on each device:
  the compiler of jaxlib 0.11.2 crashes if one enters on several devices.
  """
  mapped = functools.partial(
    jax.shard_map, mesh=mesh, out_specs=out_specs, check_vma=False
  )

  def is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)

  def call(*arguments: Any) -> Any:
    leaves, structure = jax.tree.flatten(arguments)
    if all(x.size for x in leaves):
      return mapped(function, in_specs=in_specs)(*arguments)
    specs = jax.tree.leaves(
      jax.tree.broadcast(in_specs, arguments, is_leaf=is_spec), is_leaf=is_spec
    )

    def on_full(*parts: jax.Array) -> Any:
      rest = iter(parts)
      whole = [
        next(rest)
        if x.size
        else jnp.zeros(NamedSharding(mesh, spec).shard_shape(x.shape), x.dtype)
        for x, spec in zip(leaves, specs, strict=True)
      ]
      return function(*structure.unflatten(whole))

    full = [(x, spec) for x, spec in zip(leaves, specs, strict=True) if x.size]
    values, places = zip(*full, strict=True)
    return mapped(on_full, in_specs=places)(*values)

  return call


def specs(tree: Any) -> Any:
  """PartitionSpecs of arrays or ShapeDtypeStructs that lie on a mesh."""
  return jax.tree.map(lambda x: x.sharding.spec, tree)


@dataclasses.dataclass(frozen=True)
class Layout:
  """How the arguments of a step lie on a mesh.

  Attributes:
    mesh: the batch is split over all its axes.
    params: PartitionSpecs of the parameters, see infer_specs.
    frozen: PartitionSpecs of frozen parameters, in whatever tree.
  """

  mesh: Mesh
  params: Any
  frozen: Any = None


def _gathered_axis(spec: PartitionSpec) -> int | None:
  return list(spec).index(FSDP) if FSDP in spec else None


def gather(
  tree: Any,
  tree_specs: Any,
  dtype: Callable[[str, jnp.dtype], jnp.dtype] = lambda name, dtype: dtype,
) -> Any:
  """Whole parameters of this device's parts, inside `over_devices`.

  The gradient of a part is the sum over 'fsdp' of all devices' gradients of
  it, in the part's own precision: a reduce-scatter. Over 'data', and of what
  every device has whole, gradients are still to be summed (`sum_gradients`).

  Args:
    tree: parts.
    tree_specs: their PartitionSpecs.
    dtype: (path, dtype of the part) -> the dtype to gather it in.
  """

  def whole(path: Sequence[Any], part: jax.Array, spec: Any) -> jax.Array:
    axis = _gathered_axis(spec)
    if axis is None:
      return part
    return _all_gather(part, axis, dtype(path_name(path), part.dtype))

  return jax.tree_util.tree_map_with_path(whole, tree, tree_specs)


def _all_gather(part: jax.Array, axis: int, dtype: jnp.dtype) -> jax.Array:
  @jax.custom_vjp
  def whole(part: jax.Array) -> jax.Array:
    return jax.lax.all_gather(part.astype(dtype), FSDP, axis=axis, tiled=True)

  def backward(_: None, cotangent: jax.Array) -> tuple[jax.Array]:
    total = jax.lax.psum_scatter(
      cotangent.astype(part.dtype), FSDP, scatter_dimension=axis, tiled=True
    )
    return (total,)

  whole.defvjp(lambda part: (whole(part), None), backward)
  return whole(part)


def is_sharded(tree_specs: Any) -> bool:
  """Whether any of the parameters comes in parts."""
  return any(
    _gathered_axis(spec) is not None for spec in jax.tree.leaves(tree_specs)
  )


def regather(
  function: Callable[..., Any], param_specs: Any
) -> Callable[..., Any]:
  """The function, keeping no gathered parameters for its backward pass.

  They are gathered once more there; all else is kept, what lies inside of
  recomputed blocks (jax.checkpoint) too: not for functions that have such.

  Args:
    function: gathers parameters.
    param_specs: PartitionSpecs; if none is sharded, nothing is changed.
  """
  if not is_sharded(param_specs):
    return function
  return jax.checkpoint(
    function, policy=lambda primitive, *_, **__: primitive.name != "all_gather"
  )


def sum_gradients(grads: Any, tree_specs: Any) -> Any:
  """Completes the sums of gradients after `gather`'s backward pass."""

  def total(grad: jax.Array, spec: Any) -> jax.Array:
    axes = BATCH_AXES if _gathered_axis(spec) is None else ("data",)
    return jax.lax.psum(grad, axes)

  return jax.tree.map(total, grads, tree_specs)


def over_batch(
  function: Callable[..., Any], mesh: Mesh, param_specs: Any
) -> Callable[..., Any]:
  """(params, batch...) -> outputs, each device on its part of the batch.

  Args:
    function: takes whole parameters and arrays [b, ...], gives arrays
      [b, ...].
    mesh: the batch is split over all its axes.
    param_specs: PartitionSpecs of params.
  """

  split = PartitionSpec(BATCH_AXES)

  def local(params: Any, batch: Any) -> Any:
    return function(gather(params, param_specs), *batch)

  mapped = over_devices(local, mesh, (param_specs, split), split)

  def call(params: Any, *batch: Any) -> Any:
    return mapped(params, batch)

  return call


def put_batch(batch: Any, mesh: Mesh) -> Any:
  """Places a host batch (this process' part) on the mesh, axis 0 sharded.

  Raises:
    ValueError: a leading axis is no multiple of this process' devices.
  """
  split = batch_sharding(mesh)
  return jax.tree.map(
    lambda leaf: jax.make_array_from_process_local_data(
      split, np.asarray(leaf)
    ),
    batch,
  )


def local_rows(array: Any) -> np.ndarray:
  """This process' rows of a batch, on the host, in `put_batch`'s order."""
  if not isinstance(array, jax.Array) or array.is_fully_addressable:
    return np.asarray(jax.device_get(array))
  shards = {
    shard.index[0].start or 0: shard for shard in array.addressable_shards
  }
  return np.concatenate(
    jax.device_get([shards[start].data for start in sorted(shards)])
  )
