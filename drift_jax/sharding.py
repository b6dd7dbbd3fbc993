"""Mesh, sharding rules and batch placement: sharding is data, in one file."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

BATCH_AXES = ("data", "fsdp")

# (pattern of a leaf's path, what to do): the first match decides. 'fsdp'
# shards the largest axis that the mesh axis divides; 'replicate' keeps a copy
# on every device. Paths look like "params/blocks/qkv/kernel".
Rules = tuple[tuple[str, str], ...]
RULES: Rules = (
  # Norm scales, biases and scalars are too small to be worth a collective.
  (r"(^|/)(bias|scale|weight|step|count|rng)$", "replicate"),
  (r".*", "fsdp"),
)


def make_mesh(
  data: int = -1, fsdp: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
  """A ('data', 'fsdp') mesh over the devices; one size may be -1.

  Raises:
    ValueError: if the sizes do not multiply to the number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = {"data": data, "fsdp": fsdp}
  free = [name for name, size in sizes.items() if size == -1]
  known = int(np.prod([size for size in sizes.values() if size != -1]))
  valid = all(size == -1 or size >= 1 for size in sizes.values())
  if not valid or len(free) > 1 or len(devices) % known:
    raise ValueError(
      f"mesh data={data}, fsdp={fsdp} does not fit {len(devices)} devices: "
      f"give sizes >= 1 that divide {len(devices)}, at most one of them -1"
    )
  if free:
    sizes[free[0]] = len(devices) // known
  elif known != len(devices):
    raise ValueError(
      f"mesh data={data} x fsdp={fsdp} = {known} devices, but there are "
      f"{len(devices)}: make one size -1 or change the product"
    )
  return jax.make_mesh(
    tuple(sizes.values()),
    tuple(sizes),
    axis_types=(AxisType.Auto,) * len(sizes),
    devices=devices,
  )


def path_name(path: Sequence[Any]) -> str:
  """Joins a pytree key path with '/': ('params', 'w') -> 'params/w'."""
  return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def spec_for(
  name: str, shape: tuple[int, ...], fsdp: int, rules: Rules = RULES
) -> PartitionSpec:
  """The PartitionSpec of one leaf by the first rule that matches its path.

  Raises:
    ValueError: if no rule matches or a rule names an unknown action.
  """
  for pattern, action in rules:
    if not re.search(pattern, name):
      continue
    if action == "replicate":
      return PartitionSpec()
    if action != "fsdp":
      raise ValueError(
        f"sharding rule {pattern!r} -> {action!r}: valid actions are 'fsdp' "
        "and 'replicate'"
      )
    axes = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
    if fsdp == 1 or not axes:
      return PartitionSpec()
    # The last of the largest axes: stacked layers keep their leading axis.
    best = max(axes, key=lambda axis: (shape[axis], axis))
    return PartitionSpec(*([None] * best), "fsdp")
  raise ValueError(f"no sharding rule matches {name!r} of shape {shape}")


def infer_sharding(tree: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
  """NamedShardings for a pytree of arrays or ShapeDtypeStructs."""

  def leaf_sharding(path: Sequence[Any], leaf: Any) -> NamedSharding:
    spec = spec_for(path_name(path), leaf.shape, mesh.shape["fsdp"], rules)
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


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


def put_batch(batch: Any, mesh: Mesh) -> Any:
  """Places a host batch (this process' part) on the mesh, axis 0 sharded.

  Raises:
    ValueError: if a leading axis is not a multiple of this process' devices.
  """
  sharding = batch_sharding(mesh)
  local = len(mesh.local_devices)

  def put(path: Sequence[Any], leaf: Any) -> jax.Array:
    leaf = np.asarray(leaf)
    if leaf.shape[0] % local:
      raise ValueError(
        f"batch entry {path_name(path)!r} has leading size {leaf.shape[0]}, "
        f"not a multiple of the {local} devices of this process"
      )
    return jax.make_array_from_process_local_data(sharding, leaf)

  return jax.tree_util.tree_map_with_path(put, batch)


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
