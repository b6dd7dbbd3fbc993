"""One writer of a folder at a time: a lease, which a dead owner does not keep.

The lease is a small file, or an object of a bucket, that names its owner. Each
change of it is on the condition that it is as it was read: two that want it
can't both get it. The owner changes it every few seconds. Whoever finds it asks
the system about the owner's process, if that is one of this machine; otherwise
it waits to see whether the file changes, and takes it over if it doesn't. No
clocks are compared.
"""

import contextlib
import datetime
import itertools
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from drift_jax.system import storage
from drift_jax.system.console import logger
from drift_jax.system.errors import ConfigError

# Time between two signs of life of the owner, and without one until it counts
# as dead.
INTERVAL_SECONDS = 10.0
LEASE_SECONDS = 60.0
# Time between two looks of a process that waits, and for a storage to answer.
_LOOK_SECONDS = 1.0
_ANSWER_SECONDS = 30.0
# Linux' flag of a process that is about to end.
_EXITING = 0x4


class Lease:
  """The right to write somewhere, for as long as this process lives."""

  def __init__(
    self, path: storage.PathLike, what: str, on_lost: Callable[[str], object]
  ):
    """Takes nothing yet.

    Args:
      path: file or object of the lease, in a folder that may be missing.
      what: the thing that it is for, in messages.
      on_lost: called, in another thread, with a message: somebody else has
        taken it, since this process gave no sign of life for too long.
    """
    self._path = os.path.expanduser(os.fspath(path))
    self._what = what
    self._on_lost = on_lost
    self._owner: dict[str, Any] = {}
    self._generation = b""
    # Folders that were made for it, the innermost first.
    self._made: list[pathlib.Path] = []
    self._busy = threading.Lock()
    self._released = threading.Event()
    self._released.set()
    self._keeper = threading.Thread(
      target=self._keep, name="lease", daemon=True
    )

  def take(self) -> None:
    """Takes it, once; waits if it can't be known at once if its owner lives.

    Raises:
      ConfigError: its owner lives; the message says which process that is.
      StorageError: it can't be read or written.
    """
    self._owner = _facts()
    seen, changes, since = b"", -1, time.monotonic()
    for looks in itertools.count():
      owner, generation = self._read()
      lives = False if owner is None else _lives(owner)
      if generation != seen:
        seen, changes, since = generation, changes + 1, time.monotonic()
      # At the first look it may be about to end, one change under way.
      if (lives and looks) or (lives is None and changes > 1):
        raise ConfigError(
          f"{self._what} is in use by {_named(owner)}: wait for its end, "
          "end it, or use another one"
        )
      silent = time.monotonic() - since
      if lives is False or silent > LEASE_SECONDS:
        if self._write(generation):
          break
        continue
      if lives is None and not looks:
        logger.warning(
          "%s was in use by %s: waits up to %.0f s for a sign of life.",
          self._what,
          _named(owner),
          LEASE_SECONDS,
        )
      time.sleep(_LOOK_SECONDS)
    self._released.clear()
    self._keeper.start()

  def release(self) -> None:
    """Gives it back, if it was taken; leaves no folder that holds nothing."""
    with self._busy:
      if self._released.is_set():
        return
      self._released.set()
      with contextlib.suppress(storage.StorageError):
        self._write(self._generation, keep=False)
      with contextlib.suppress(OSError):
        for folder in self._made:
          folder.rmdir()
    if threading.current_thread() is not self._keeper:
      self._keeper.join(_LOOK_SECONDS)  # not under way when Python ends

  def _keep(self) -> None:
    """Shows that the owner lives, until it is released or lost."""
    while not self._released.wait(INTERVAL_SECONDS):
      with self._busy:
        if self._released.is_set():
          return
        self._owner["beat"] += 1
        try:
          kept = self._write(self._generation) or self._again()
        except storage.StorageError as error:
          logger.warning("%s: its lease was not renewed: %s", self._what, error)
          continue
        if kept:
          continue
        self._released.set()
      self._on_lost(
        f"{self._what} was taken over by another run, since this one had shown "
        f"no sign of life for {LEASE_SECONDS:.0f} s"
      )

  def _again(self) -> bool:
    """Writes it if a change was refused though nobody else has it.

    The answer to the last change was lost, or the file was deleted.
    """
    owner, generation = self._read()
    own = owner is None or owner.get("id") == self._owner["id"]
    return own and self._write(generation)

  def _ask(self, method: str, **arguments: Any) -> Any:
    """The storage's answer to a method of TensorStore's KvStore."""
    folder, name = os.path.split(self._path)
    try:
      store = storage.open_store(folder).result(_ANSWER_SECONDS)
      return getattr(store, method)(name, **arguments).result(_ANSWER_SECONDS)
    except (ValueError, TimeoutError) as error:
      text = " ".join(str(error).split()) or "no answer in time"
      raise storage.StorageError(f"{self._path}: {text}") from error

  def _read(self) -> tuple[dict[str, Any] | None, bytes]:
    """(facts about the owner, what a change asks for).

    The facts are {} if they can't be read, None if there is no owner.
    """
    read = self._ask("read")
    owner: Any = None
    if read.state == "value":
      try:
        owner = json.loads(read.value)
      except ValueError:
        owner = {}
    return owner, read.stamp.generation

  def _write(self, generation: bytes, keep: bool = True) -> bool:
    """Changes it if it is still as expected; returns whether it was."""
    if keep and not storage.is_remote(self._path):
      folder = pathlib.Path(self._path).parent
      missing = [p for p in (folder, *folder.parents) if not p.exists()]
      folder.mkdir(parents=True, exist_ok=True)
      self._made = missing or self._made
    value = json.dumps(self._owner, indent=1).encode() if keep else None
    stamp = self._ask("write", value=value, if_equal=generation)
    self._generation = stamp.generation or self._generation
    return bool(stamp.generation)


def _facts() -> dict[str, Any]:
  """About this process, as an owner."""
  now = datetime.datetime.now(datetime.UTC)
  return {
    "host": socket.gethostname(),
    "pid": os.getpid(),
    "since": now.strftime("%Y-%m-%d %H:%M:%S UTC"),
    "machine": _machine(),
    "started": _started(os.getpid()),
    "id": uuid.uuid4().hex,
    "beat": 0,
  }


def _named(owner: dict[str, Any] | None) -> str:
  owner = owner or {}
  return (
    f"process {owner.get('pid', '?')} on {owner.get('host', '?')} since "
    f"{owner.get('since', '?')}"
  )


def _lives(owner: dict[str, Any]) -> bool | None:
  """Whether an owner's process is there; None if this machine can't tell."""
  machine = _machine()
  if not machine or owner.get("machine") != machine:
    return None
  started = _started(owner["pid"])
  return started is not None and started == owner["started"]


def _machine() -> str:
  """Scope in which a process' number is unique: this boot, this container.

  '' if the system doesn't say.
  """
  try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return ""


def _started(pid: int) -> int | None:
  """When a process was started, in ticks since the boot; None: it has ended."""
  try:
    text = pathlib.Path(f"/proc/{pid}/stat").read_text()
  except OSError:
    return None
  # After the name, which may hold anything.
  state, *fields = text.rpartition(")")[2].split()
  ending = state in "ZX" or int(fields[5]) & _EXITING
  return None if ending else int(fields[18])
