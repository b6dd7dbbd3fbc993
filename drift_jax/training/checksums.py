"""Checksums of a checkpoint's files, which tell damage from health.

After the commit each process sums the files that it wrote, and no others:
process 0 writes checksums.json, process N checksums.N.json. They hold

  {path: [bytes, [CRC-32 of each block of 4 MiB]]},

so that a reader of some arrays checks the blocks that hold them. process 0
lists the files of the others as well, as {path: null}: none can be missing
without a word. Earlier checkpoints have one checksums.json for all files, with
the CRC-32 of a whole file instead of the list.
"""

import collections
import itertools
import json
import os
import re
import threading
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from etils import epath

from drift_jax.system import storage

CHECKSUMS = "checksums.json"
# Files that a checkpoint gets after its commit, or when it is adopted.
FIGURES = "figures.json"
COMMIT = "commit_success.txt"
# Orbax' own description of a checkpoint.
METADATA = "_CHECKPOINT_METADATA"
_BLOCK = 1 << 22
_UNSUMMED = re.compile(
  rf"checksums(\.\d+)?\.json(\.tmp)?|{FIGURES}(\.tmp)?|{COMMIT}"
)
_OWNER = re.compile(r"(?:^|/)(?:ocdbt\.)?process_(\d+)(?:/|$)")

# Errors of Orbax and TensorStore on files that can't be read or written. JAX's
# own runtime errors (out of memory, ...) are RuntimeErrors too, but say nothing
# about the files.
FILE_ERRORS = (ValueError, OSError, KeyError, TypeError, RuntimeError)

# Bytes [start, stop) of a file that are read; None for all of it.
Ranges = list[tuple[int, int]] | None


def owner(name: str) -> int:
  """The process that wrote a file, by its path in the checkpoint."""
  match = _OWNER.search(name)
  return int(match[1]) if match else 0


def file_names(directory: epath.Path) -> list[str]:
  """Paths of the files below a checkpoint that have checksums, sorted."""
  names = []
  root = storage.without_scheme(directory)
  for folder, _, files in directory.walk():
    # etils names a bucket's folders without their scheme.
    below = os.path.relpath(storage.without_scheme(folder), root)
    names += [
      os.path.normpath(os.path.join(below, name))
      for name in files
      if not _UNSUMMED.fullmatch(name)
    ]
  return sorted(names)


def write_whole(path: epath.Path, text: str) -> None:
  """Writes a file that is there as a whole or not at all."""
  temporary = path.with_name(path.name + ".tmp")
  with storage.naming_errors(path):
    temporary.write_text(text)
    temporary.replace(path)


def sum_files(
  directory: epath.Path,
  process: int,
  sums: dict[str, Any],
  stop: threading.Event,
) -> bool:
  """Sums one process' files, then writes them down; False if it was stopped.

  Args:
    directory: a committed checkpoint.
    process: number of the process that wrote the files.
    sums: entries of files, to which those of the others are added. Called again
      with it, it goes on with the file at which it was stopped.
    stop: makes it return before the next block.

  Raises:
    FileNotFoundError: the checkpoint is gone.
    OSError: a file that can't be read or written.
  """
  names = file_names(directory)
  if not names:
    raise FileNotFoundError(directory)
  for name in names:
    if owner(name) != process:
      if process == 0:
        sums[name] = None
    elif name not in sums:
      entry = [0, []]
      for _, block in _blocks(directory / name):
        if stop.is_set():
          return False
        entry = [entry[0] + len(block), [*entry[1], zlib.crc32(block)]]
      sums[name] = entry
  write_whole(directory / _sums_name(process), json.dumps(sums, sort_keys=True))
  return True


def compare(
  directory: epath.Path,
  *,
  process: int = 0,
  count: int = 1,
  item: str = "",
  arrays: Collection[str] | None = None,
) -> tuple[list[str], bool]:
  """Compares the files of a checkpoint with their checksums.

  Args:
    directory: the checkpoint.
    process, count: this process' number, and how many share the work.
    item: a folder in it that alone will be read; '' for all.
    arrays: names, keys joined by dots, of what will be read of the item; None
      for all.

  Returns:
    (one line for each damaged file, whether every file is there and was
    compared, so that an error in reading them is not of the files).
  """

  def mine(name: str) -> bool:
    return (
      owner(name) % count == process
      and name.startswith(f"{item}/" if item else "")
      # Earlier checkpoints have sums of them; a copy may lack them.
      and not _UNSUMMED.fullmatch(os.path.basename(name))
    )

  present = {name for name in file_names(directory) if mine(name)}
  sums, damage = _read_sums(directory, present)
  sums = {name: sums[name] for name in sums if mine(name)}
  proven = not damage and all(sums.get(name) is not None for name in present)

  def look(reads: Mapping[str, Ranges]) -> None:
    """Adds to the damage what differs of the files that are read."""
    for name in sorted(sums.keys() & reads):
      line = "missing"
      if name in present:
        line = sums[name] and _difference(
          directory / name, sums[name], reads[name]
        )
      if line:
        damage.append(f"{name}: {line}")

  look({name: None for name in sums if not item or _is_description(name)})
  if item and sums and not damage:
    try:
      look(_data_read(directory, item, arrays))
    except FILE_ERRORS as error:
      damage.append(f"{item}/manifest.ocdbt: {error}")
  return damage, proven


def incomplete(directory: epath.Path, items: Collection[str]) -> list[str]:
  """A line for each file that a checkpoint needs and lacks, whole or in part.

  Their contents are not looked at: it needs no checksums.

  Args:
    directory: the checkpoint.
    items: folders in it.
  """
  lines = []
  present = set(file_names(directory))
  needed = {METADATA: [(0, 1)]}
  for item in items:
    needed[f"{item}/_METADATA"] = [(0, 1)]
    try:
      needed |= _data_read(directory, item, None)
    except FILE_ERRORS as error:
      text = " ".join(str(error).split())
      lines.append(f"{item}/manifest.ocdbt: {text[:200]}")
  for name, parts in sorted(needed.items()):
    least = max(stop for _, stop in parts)
    have = (directory / name).stat().length if name in present else 0
    if have < least:
      lack = f"{have} bytes, at least {least} needed" if have else "missing"
      lines.append(f"{name}: {lack}")
  return lines


def _is_description(name: str) -> bool:
  """Whether a file describes the arrays of all processes.

  The merged manifest stands for those of the processes.
  """
  return "/d/" not in name and not re.search(r"/ocdbt\.process_\d+/", name)


def _difference(path: epath.Path, entry: list[Any], ranges: Ranges) -> str:
  """Tells how a file, or what is read of it, is not as summed; '' if it is."""
  size, sums = entry
  have = path.stat().length
  if have != size:
    return f"{have} bytes, want {size}"
  if isinstance(sums, int):  # of an earlier checkpoint's whole file
    crc = 0
    for _, block in _blocks(path):
      crc = zlib.crc32(block, crc)
    same = crc == sums
  else:
    numbers = range(len(sums))
    if ranges is not None:
      parts = (range(a // _BLOCK, -(-b // _BLOCK)) for a, b in ranges)
      numbers = sorted(set(itertools.chain.from_iterable(parts)))
    same = all(zlib.crc32(b) == sums[n] for n, b in _blocks(path, numbers))
  return "" if same else "its content changed (CRC-32)"


def _blocks(
  path: epath.Path, numbers: Iterable[int] | None = None
) -> Iterator[tuple[int, bytes]]:
  """Numbered blocks of a file in order: all of them, or those asked for."""
  with path.open("rb") as file:
    for number in itertools.count() if numbers is None else numbers:
      file.seek(number * _BLOCK)
      block = file.read(_BLOCK)
      if not block:
        return
      yield number, block


def _sums_name(process: int) -> str:
  return f"checksums.{process}.json" if process else CHECKSUMS


def _read_sums(
  directory: epath.Path, present: Collection[str]
) -> tuple[dict[str, Any], list[str]]:
  """({path: its entry, or None if there is none}, what can't be read)."""
  damage = []
  sums: dict[str, Any] = {}
  for process in sorted({0, *map(owner, present)}):
    # Those of an earlier checkpoint, or of a single process, are complete.
    if process and sums and None not in sums.values():
      break
    path = directory / _sums_name(process)
    try:
      sums |= json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
      damage.append(f"{path.name}: {error}")
  return sums, damage


def _data_read(
  directory: epath.Path, item: str, arrays: Collection[str] | None
) -> dict[str, list[tuple[int, int]]]:
  """{file: bytes of it} that hold some of an item's arrays.

  TensorStore puts the arrays of a process one after the other into few large
  files. Where they are is in the nodes of a tree that the manifest names.

  Raises:
    FILE_ERRORS: a manifest or a node that can't be read.
  """
  import tensorstore

  store = storage.open_store(directory / item).result()
  parts = collections.defaultdict(list)

  def add(location: str) -> None:
    """location: KIND:FOLDER:FILE:OFFSET:LENGTH."""
    _, base, relative, start, length = location.split(":")
    name = os.path.normpath(f"{item}/{base}{relative}")
    parts[name].append((int(start), int(start) + int(length)))

  manifest = tensorstore.ocdbt.dump(store).result()
  nodes = [(manifest["versions"][-1]["root"]["location"], "")]
  while nodes:
    node, prefix = nodes.pop()
    add(node)
    for entry in tensorstore.ocdbt.dump(store, node=node).result()["entries"]:
      if "location" in entry:
        below = prefix + entry["subtree_common_prefix"].decode()
        nodes.append((entry["location"], below))
      elif "indirect_value" in entry:
        name = (prefix + entry["key"].decode()).rpartition("/")[0]
        if arrays is None or name in arrays:
          add(entry["indirect_value"])
  return parts
