"""Files of parameters, read array by array: flax' msgpack, and safetensors.

An index says where each array lies; of the arrays no more is in memory than
what is asked for. Files may be in a bucket.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
from etils import epath
from flax import traverse_util

from drift_jax.models.naming import Entry

_BLOCK = 4 * 2**20  # numbers that are read, checked and rounded at a time

_TENSOR_DTYPES = {"F32": jnp.dtype("float32"), "BF16": jnp.dtype("bfloat16")}

# Flax writes arrays of more than 2**30 bytes in parts, as such a dictionary.
_CHUNKED = "__msgpack_chunked_array__"
_ARRAY_TYPES = (1, 3)  # of its extensions: an array, a scalar of NumPy
# Of msgpack: {first byte: format of the length that follows it}.
_MAPS = {0xDE: ">H", 0xDF: ">I"}
_BYTES = {0xC4: ">B", 0xC5: ">H", 0xC6: ">I"}
_EXTENSIONS = {0xC7: ">B", 0xC8: ">H", 0xC9: ">I"}
_SMALL_MAPS, _SMALL_EXTENSIONS = range(0x80, 0x90), range(0xD4, 0xD9)
_SMALL = 1024  # bytes of a name, or of an array's shape and dtype, at most


_OUTER = "params/"
_MALFORMED = (
  msgpack.UnpackException,
  AttributeError,
  IndexError,
  KeyError,
  RecursionError,
  TypeError,
  UnicodeError,
)


class Damage(ValueError):
  """A file that is not whole, of another format, or of no finite numbers."""


# Files are `Any`, since typing.BinaryIO lacks readinto.
class Stored(NamedTuple):
  """An array in a file.

  Attributes:
    dtype, shape: of the array.
    places: (offset, bytes) of its parts, in order.
  """

  dtype: np.dtype
  shape: tuple[int, ...]
  places: tuple[tuple[int, int], ...]


def read(file: Any, name: str, stored: Stored, out: np.ndarray) -> None:
  """Reads an array into a contiguous one of its shape, rounding to its dtype.

  Raises:
    Damage: numbers that are not finite; the file ends before the array.
  """
  out, start = out.reshape(-1), 0
  scratch = out[:0]
  if out.dtype != stored.dtype:
    scratch = np.empty(min(_BLOCK, out.size), stored.dtype)
  for offset, size in stored.places:
    file.seek(offset)
    stop = start + size // stored.dtype.itemsize
    while start < stop:
      part = out[start : min(stop, start + _BLOCK)]
      block = scratch[: part.size] if scratch.size else part
      if file.readinto(block.view(np.uint8)) != block.nbytes:
        raise Damage(f"it ends within {name}")
      if not np.isfinite(block).all():
        raise Damage(f"{name} holds numbers that are not finite")
      part[...] = block
      start += part.size


def shapes(entries: Mapping[str, Entry], stored: Mapping[str, Stored]) -> Any:
  """A tree of ShapeDtypeStructs of parameters, as they are stored.

  Args:
    entries: {parameter: its counterparts in the file}.
    stored: arrays of the file.
  """
  flat = {}
  for name, (names, stacked) in entries.items():
    arrays = [stored[part] for part in names]
    flat[name] = jax.ShapeDtypeStruct(
      (len(names),) * stacked + arrays[0].shape,
      np.result_type(*(array.dtype for array in arrays)),
    )
  return traverse_util.unflatten_dict(flat, sep="/")


def read_tree(
  path: epath.Path,
  entries: Mapping[str, Entry],
  stored: Mapping[str, Stored],
  wanted: Any,
) -> Any:
  """Parameters of a file, the largest first, so that it has most memory.

  Args:
    path: of the file.
    entries, stored: see `shapes`.
    wanted: a tree of ShapeDtypeStructs. Those that have a sharding are placed
      before the next one is read, in their layout if they have one; the others
      become NumPy's.

  Raises:
    Damage: numbers that are not finite; the file ends before an array.
  """
  flat: dict[Any, Any] = dict(traverse_util.flatten_dict(wanted, sep="/"))
  found = {}
  with path.open("rb") as file:
    for name in sorted(flat, key=lambda name: -flat[name].size):
      names, stacked = entries[name]
      array = np.empty(flat[name].shape, flat[name].dtype)
      for i, part in enumerate(names):
        out = array[i : i + 1] if stacked else array
        read(file, part, stored[part], out)
      if flat[name].sharding is not None:
        placed = jax.device_put(array, flat[name].sharding)
        if flat[name].format.layout is not None:
          placed = jax.device_put(placed, flat[name].format)
        array = jax.block_until_ready(placed)
      found[name] = array
  return traverse_util.unflatten_dict({k: found[k] for k in flat}, sep="/")


def index_safetensors(file: Any) -> dict[str, Stored]:
  """The arrays of a safetensors file by name.

  Raises:
    Damage: no complete file of that format.
    ValueError: an array of another dtype than float32 and bfloat16.
  """
  size = file.seek(0, os.SEEK_END)
  file.seek(0)
  (length,) = struct.unpack("<Q", _exactly(file, 8))
  if length > size - 8:
    raise Damage(f"a header of {length} bytes in a file of {size}")
  try:
    header = dict(json.loads(_exactly(file, length)))
    header.pop("__metadata__", None)
    entries = {
      name: (
        str(x["dtype"]),
        tuple(map(int, x["shape"])),
        *map(int, x["data_offsets"]),
      )
      for name, x in header.items()
    }
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise Damage(f"its header can't be read: {error!r}") from error
  found, end = {}, 8 + length
  for name, (tag, shape, start, stop) in sorted(
    entries.items(), key=lambda entry: entry[1][2:]
  ):
    if tag not in _TENSOR_DTYPES:
      raise ValueError(
        f"{name} has dtype {tag}, valid options are {list(_TENSOR_DTYPES)}"
      )
    dtype, offset = _TENSOR_DTYPES[tag], 8 + length + start
    size_of = math.prod(shape) * dtype.itemsize
    if offset != end or stop - start != size_of or min(shape, default=0) < 0:
      raise Damage(f"{name} of shape {shape} lies at {start} to {stop}")
    found[name] = Stored(dtype, shape, ((offset, stop - start),))
    end = offset + stop - start
  if end != size:
    raise Damage(f"arrays up to byte {end} in a file of {size}")
  return found


def index_msgpack(file: Any) -> dict[str, Stored]:
  """The arrays that flax.serialization wrote, by names joined with '/'.

  An outer level that is named 'params' is left out.

  Raises:
    Damage: no complete msgpack.
    ValueError: another value than a dictionary of floating-point arrays.
  """
  size = file.seek(0, os.SEEK_END)
  file.seek(0)
  try:
    tree = _value(file, size)
    if file.tell() != size:
      raise Damage(f"it ends at byte {file.tell()} of {size}")
    if not isinstance(tree, dict):
      raise ValueError(f"it holds {type(tree).__name__}, want arrays by name")
    flat = traverse_util.flatten_dict(
      tree, sep="/", is_leaf=lambda _, branch: _CHUNKED in branch
    )
    found: dict[str, Any] = {
      name: _joined(leaf) if isinstance(leaf, dict) else leaf
      for name, leaf in flat.items()
    }
  # Bytes that are no msgpack, or are damaged, raise errors of many kinds.
  except _MALFORMED as error:
    raise Damage(f"byte {file.tell()}: {error!r}") from error
  for name, stored in found.items():
    dtype = getattr(stored, "dtype", np.dtype(object))
    if not jnp.issubdtype(dtype, jnp.floating):
      raise ValueError(f"{name} is of {dtype}, want floating-point arrays only")
  if found and all(name.startswith(_OUTER) for name in found):
    return {name.removeprefix(_OUTER): x for name, x in found.items()}
  return found


def _value(file: Any, size: int) -> Any:
  """Reads one value; arrays become `Stored`, a dictionary one of values."""
  code = _exactly(file, 1)[0]
  if code in _EXTENSIONS:
    return _array(file, size, _number(file, _EXTENSIONS[code]))
  if code in _SMALL_EXTENSIONS:
    return _array(file, size, 2 ** (code - _SMALL_EXTENSIONS[0]))
  if code in _MAPS or code in _SMALL_MAPS:
    small = code - _SMALL_MAPS[0]
    count = _number(file, _MAPS[code]) if code in _MAPS else small
    return {_small(file): _value(file, size) for _ in range(count)}
  file.seek(-1, os.SEEK_CUR)
  return _small(file)


def _array(file: Any, size: int, length: int) -> Stored | None:
  """Passes over an extension: an array, or None if it is something else."""
  kind = _exactly(file, 1)[0]
  start = file.tell()
  if start + length > size:
    raise Damage(f"an array up to byte {start + length} of {size}")
  if kind not in _ARRAY_TYPES:
    file.seek(start + length)
    return None
  # Within it: shape, dtype, bytes.
  unpacker = msgpack.Unpacker()
  unpacker.feed(file.read(_SMALL))
  unpacker.read_array_header()
  shape, dtype = tuple(unpacker.unpack()), np.dtype(unpacker.unpack())
  file.seek(start + unpacker.tell())
  count = _number(file, _BYTES[_exactly(file, 1)[0]])
  offset = file.seek(start + length) - count
  if count != math.prod(shape) * dtype.itemsize or offset <= start:
    raise Damage(f"the array of shape {shape} at byte {start}: {count} bytes")
  return Stored(dtype, shape, ((offset, count),))


def _joined(branch: Mapping[str, Any]) -> Stored:
  """The array of a dictionary of parts."""
  sizes, parts = branch["shape"], branch["chunks"]
  shape = tuple(sizes[str(i)] for i in range(len(sizes)))
  ordered: list[Stored] = [parts[str(i)] for i in range(len(parts))]
  if sum(math.prod(part.shape) for part in ordered) != math.prod(shape):
    raise Damage(f"the parts of an array do not make up its shape {shape}")
  places = (place for part in ordered for place in part.places)
  return Stored(ordered[0].dtype, shape, tuple(places))


def _small(file: Any) -> Any:
  """Reads a value that is no array: a name, an element of a shape."""
  start = file.tell()
  unpacker = msgpack.Unpacker()
  unpacker.feed(file.read(_SMALL))
  value = unpacker.unpack()
  file.seek(start + unpacker.tell())
  return value


def _number(file: Any, format: str) -> int:
  return struct.unpack(format, _exactly(file, struct.calcsize(format)))[0]


def _exactly(file: Any, count: int) -> bytes:
  data = file.read(count)
  if len(data) != count:
    raise Damage(f"it ends at byte {file.tell()}")
  return data


def _complete(
  kind: str, index: Callable[[Any], dict[str, Stored]]
) -> Callable[[Any], dict[str, Stored]]:
  """The index, whose Damage says what the file is like."""

  def find(file: Any) -> dict[str, Stored]:
    try:
      return index(file)
    except Damage as error:
      length = file.seek(0, os.SEEK_END)
      file.seek(0)
      raise Damage(
        f"{length} bytes, beginning with {file.read(8)!r}, are no complete "
        f"{kind} file: {error}"
      ) from error

  return find


# By the formats of artifacts: file -> its arrays by name.
INDEX = {
  "flax.msgpack": _complete("msgpack", index_msgpack),
  "safetensors": _complete("safetensors", index_safetensors),
}
