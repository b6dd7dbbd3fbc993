"""Paths as people give them: `~` for a home folder, and folders to walk.

Where a path comes in (a flag, a config, a function of the API) it is expanded
here, once. Variables such as $HOME are the shell's.
"""

import argparse
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags

# Flags that are defined here belong to the module that asks for them.
flags.disclaim_key_flags()

# Folders that file systems and programs keep beside people's own, in lower
# case: a NAS' thumbnails and bins, macOS' and Windows' own, Python's.
_SYSTEM = frozenset(
  "#recycle #snapshot $recycle.bin @eadir @recently-snapshot @recycle __macosx "
  "__pycache__ lost+found".split()
) | {"system volume information"}


class PathError(OSError):
  """A path that can't be followed; the message says which, why, what now."""


def expand(path: str | os.PathLike[str]) -> str:
  """The path with `~` or `~USER` replaced by that home folder.

  URLs (gs://, hf://) and all other paths come back as they are.

  Raises:
    PathError: nobody is called USER, or this user has no home folder.
  """
  text = os.fspath(path)
  if not text.startswith("~"):
    return text
  expanded = os.path.expanduser(text)
  if expanded.startswith("~"):
    user = text[1:].partition("/")[0]
    raise PathError(
      f"there is no home folder of {user!r} on this machine: give the whole "
      f"path in the place of {text}, or ./{text} for a file of that name"
    )
  return expanded


def expand_source(source: str) -> str:
  """`expand` for KIND:PATH, the form of data.source, or for a path.

  Raises:
    PathError: see `expand`.
  """
  kind, colon, rest = source.partition(":")
  return f"{kind}:{expand(rest)}" if colon else expand(source)


def argument(text: str) -> str:
  """`expand` as the `type` of an argument of argparse."""
  try:
    return expand(text)
  except PathError as error:
    raise argparse.ArgumentTypeError(str(error)) from error


def check_suffix(path: str | os.PathLike[str], valid: Sequence[str]) -> str:
  """The suffix of a file, in small letters, which says its format.

  Raises:
    ValueError: none of the valid ones.
  """
  suffix = os.path.splitext(os.fspath(path))[1].lower()
  if suffix not in valid:
    raise ValueError(
      f"{os.fspath(path)}: the suffix {suffix!r} says in which format to write,"
      f" valid options are {list(valid)}"
    )
  return suffix


class FlagParser(flags.ArgumentParser[str]):
  """`expand` as absl has it."""

  def parse(self, argument: str) -> str:
    try:
      return expand(argument)
    except PathError as error:
      raise ValueError(str(error)) from error


def define_flag(
  name: str, default: str | None, help: str, *, required: bool = False
) -> flags.FlagHolder[Any]:
  """Defines a flag of absl that holds a path, which is expanded."""
  return flags.DEFINE(FlagParser(), name, default, help, required=required)


def is_hidden(name: str) -> bool:
  """Whether a file or folder is not the user's own: .git, @eaDir, __MACOSX."""
  return name.startswith(".") or name.lower() in _SYSTEM


def listed(folder: str | os.PathLike[str]) -> tuple[list[str], list[str]]:
  """Names of the folders and of the files in a folder, sorted, none hidden.

  Links are followed.

  Raises:
    OSError: the folder can't be read; it is named.
  """
  folders, files = [], []
  with os.scandir(folder) as entries:
    for entry in entries:
      if not is_hidden(entry.name):
        (folders if entry.is_dir() else files).append(entry.name)
  return sorted(folders), sorted(files)


def walk(root: str | os.PathLike[str]) -> Iterator[tuple[str, list[str]]]:
  """(folder, names of its files) of all folders below, `root` first.

  In the order of the names, without hidden ones. Links are followed, but no
  folder is visited twice, by whatever name.

  Raises:
    OSError: a folder that can't be read; it is named.
  """
  visited: set[tuple[int, int]] = set()
  waiting = [os.fspath(root)]
  while waiting:
    folder = waiting.pop()
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in visited:
      continue
    visited.add((status.st_dev, status.st_ino))
    folders, files = listed(folder)
    yield folder, files
    waiting += [os.path.join(folder, name) for name in reversed(folders)]


def user_cache() -> pathlib.Path:
  """This package's folder of what can be made or downloaded again.

  It is drift_jax in XDG_CACHE_HOME, else beside HF_HOME: ~/.cache/drift_jax if
  neither is set. Nothing is made.

  Raises:
    PathError: either names a home folder that is not there.
  """
  if root := os.environ.get("XDG_CACHE_HOME"):
    return pathlib.Path(expand(root), "drift_jax")
  home = expand(os.environ.get("HF_HOME") or "~/.cache/huggingface")
  return pathlib.Path(os.path.abspath(home)).parent / "drift_jax"
