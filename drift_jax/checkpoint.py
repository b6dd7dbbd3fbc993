"""Orbax checkpoints of everything that the next step needs.

Several processes write and read one checkpoint together, each its own shards;
the first one looks after names and checksums.

A checkpoint holds the training state (parameters, optimiser, EMAs, step and
random key) and the feed's state (data position and sample queue). Saving is
asynchronous; after the commit every file's size and CRC-32 go into the
checkpoint's checksums.json, so that a truncated or altered file is told from
a good one before anything is restored.
"""

import concurrent.futures
import json
import math
import os
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from drift_jax import processes, storage
from drift_jax.console import logger

CHECKSUMS = "checksums.json"
_CHUNK = 1 << 22
# What Orbax and TensorStore raise on files that can't be read. JAX's own
# runtime errors (out of memory, ...) are RuntimeErrors too, but say nothing
# about the files.
_READ_ERRORS = (ValueError, OSError, KeyError, TypeError, RuntimeError)


class CheckpointError(RuntimeError):
  """A checkpoint that can't be used; the message says which, why, what now."""


def _checksums(directory: epath.Path) -> dict[str, list[int]]:
  """{relative path: [bytes, CRC-32]} of every file below a checkpoint."""
  sums = {}
  root = storage.without_scheme(directory)
  for folder, _, names in directory.walk():
    # etils names a bucket's folders without their scheme.
    below = os.path.relpath(storage.without_scheme(folder), root)
    for name in names:
      if name == CHECKSUMS:
        continue
      relative = os.path.normpath(os.path.join(below, name))
      path = directory / relative
      size = crc = 0
      with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
          size, crc = size + len(chunk), zlib.crc32(chunk, crc)
      sums[relative] = [size, crc]
  if not sums:
    raise FileNotFoundError(directory)
  return sums


def _write_checksums(directory: epath.Path) -> None:
  try:
    text = json.dumps(_checksums(directory), sort_keys=True)
    temporary = directory / (CHECKSUMS + ".tmp")
    temporary.write_text(text)
    temporary.replace(directory / CHECKSUMS)
  except FileNotFoundError:
    # The retention policy removed this checkpoint meanwhile.
    logger.info("Checkpoint %s is gone, no checksums written.", directory)


def damage(directory: epath.Path) -> list[str]:
  """What differs from checksums.json: one line a file; [] if nothing does."""
  path = directory / CHECKSUMS
  if not path.exists():
    return []
  try:
    want = json.loads(path.read_text())
  except json.JSONDecodeError as error:
    return [f"{CHECKSUMS}: {error}"]
  have = _checksums(directory)
  lines = []
  for name, (size, crc) in sorted(want.items()):
    if name not in have:
      lines.append(f"{name}: missing")
    elif have[name][0] != size:
      lines.append(f"{name}: {have[name][0]} bytes, want {size}")
    elif have[name][1] != crc:
      lines.append(f"{name}: its content changed (CRC-32)")
  return lines


def _free_name(path: epath.Path) -> epath.Path:
  """The path itself, or with the first of _2, _3, ... that is not taken."""
  free, number = path, 1
  while free.exists():
    number += 1
    free = path.with_name(f"{path.name}_{number}")
  return free


class Checkpointer:
  """Saves and restores (state, feed state) under a directory."""

  def __init__(
    self,
    directory: os.PathLike[str] | str,
    *,
    keep_latest: int = 1,
    keep_every: int = 0,
    best_metric: str = "",
    on_corrupt: str = "error",
    read_only: bool = False,
  ):
    """Opens the directory; creates it unless read_only.

    Args:
      directory: holds one folder for each step.
      keep_latest: newest checkpoints to keep.
      keep_every: also keep every step that is a multiple of it; 0 for none.
      best_metric: also keep the checkpoint with the smallest value of it.
      on_corrupt: 'error', or 'previous' to fall back to an older checkpoint.
      read_only: changes nothing on disk, so that it may be opened next to a
        run that saves; a directory that is not there holds no checkpoint.
    """
    self._directory = epath.Path(directory)
    if not storage.is_remote(directory):  # of a URL, resolve makes a local path
      self._directory = self._directory.resolve()
    self._on_corrupt = on_corrupt
    self._read_only = read_only
    self._options: dict[str, Any] = {
      "keep_latest": keep_latest,
      "keep_every": keep_every,
      "best_metric": best_metric,
    }
    self._manager = self._open()
    # Steps being saved, then what computes their checksums.
    self._pending: list[int] = []
    self._checksums: list[concurrent.futures.Future[None]] = []
    self._executor = concurrent.futures.ThreadPoolExecutor(1)

  def _open(self) -> ocp.CheckpointManager:
    policies: list[Any] = [
      checkpoint_managers.LatestN(self._options["keep_latest"])
    ]
    best_fn = None
    if self._options["best_metric"]:
      # Orbax writes metrics to disk only where best_fn is set; what is kept
      # is up to the policies alone.
      best_fn = self._score
      policies.append(
        checkpoint_managers.BestN(
          get_metric_fn=best_fn,
          reverse=True,
          n=1,
          keep_checkpoints_without_metrics=False,
        )
      )
    if self._options["keep_every"]:
      policies.append(
        checkpoint_managers.EveryNSteps(self._options["keep_every"])
      )
    return ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
        best_fn=best_fn,
        best_mode="min",
        create=not self._read_only,
        # What a killed save left behind; to a reader, maybe a save under way.
        cleanup_tmp_directories=not self._read_only,
      ),
      item_names=("state", "feed"),
    )

  def _score(self, metrics: dict[str, float]) -> float:
    """What ranks a checkpoint: best_metric; inf where it is missing or NaN.

    A resumed run may rank by another metric than its older checkpoints hold.
    """
    value = metrics.get(self._options["best_metric"], math.inf)
    return math.inf if math.isnan(value) else value

  def steps(self) -> list[int]:
    """Steps with a complete checkpoint, oldest first."""
    return sorted(self._manager.all_steps())

  def latest_step(self) -> int | None:
    """The newest complete checkpoint's step."""
    steps = self.steps()
    return steps[-1] if steps else None

  def best_step(self) -> int | None:
    """The step with the smallest best_metric among those kept.

    None if no checkpoint has a finite one.
    """
    scores = {
      step: self._score(self._manager.metrics(step) or {})
      for step in self.steps()
    }
    best = min(scores, key=lambda step: scores[step], default=None)
    return best if best is not None and scores[best] < math.inf else None

  def save(
    self,
    step: int,
    state: Any,
    feed: Any,
    metrics: dict[str, float] | None = None,
  ) -> None:
    """Starts saving a step; returns once the arrays have been copied.

    Raises:
      ValueError: if the step is not newer than every checkpoint there is, or
        the directory was opened read-only.
    """
    if self._read_only:
      raise ValueError(
        f"{self._directory} is open read-only: can't save {step}"
      )
    newest = self.latest_step()
    if newest is not None and step <= newest:
      raise ValueError(
        f"step {step} can't be saved in {self._directory}: it already holds "
        f"step {newest}, and steps must increase. Use a new directory"
      )
    # The save may delete an older checkpoint: nothing may be writing there.
    self._wait_for_checksums()
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        feed=ocp.args.StandardSave(feed),
      ),
      metrics=metrics,
    )
    # The manager has waited for the previous save.
    self._start_checksums()
    self._pending.append(step)

  def poll(self) -> None:
    """Hands a committed checkpoint to the checksum thread; never waits."""
    if not self._manager.is_saving_in_progress():
      self._start_checksums()

  def _start_checksums(self) -> None:
    # What the manager no longer lists is being deleted.
    kept = self.steps()
    for step in self._pending:
      if step in kept and processes.is_first():
        self._checksums.append(
          self._executor.submit(_write_checksums, self._directory / str(step))
        )
    self._pending = []

  def _wait_for_checksums(self) -> None:
    futures, self._checksums = self._checksums, []
    for future in futures:
      future.result()

  def wait(self) -> None:
    """Blocks until everything started is on disk, checksums included.

    Raises:
      OSError: whatever kept a checkpoint or its checksums from being written.
    """
    self._manager.wait_until_finished()
    self._start_checksums()
    self._wait_for_checksums()

  def close(self) -> None:
    """Waits, then releases the manager, also where waiting fails."""
    try:
      self.wait()
    finally:
      self._executor.shutdown()
      self._manager.close()

  def restore(
    self,
    abstract_state: Any,
    abstract_feed: Callable[[Any], Any],
    step: int | None = None,
  ) -> tuple[Any, Any] | None:
    """The newest (or the given) checkpoint as (state, feed); None if none.

    The targets are trees of ShapeDtypeStruct with shardings: any mesh and any
    number of processes will do, whatever saved it.

    Args:
      abstract_state: the state's target.
      abstract_feed: gives the feed's target, called with a tree that has the
        shapes of what was saved.
      step: None for the newest.

    Raises:
      CheckpointError: for a damaged checkpoint, unless on_corrupt='previous',
        which sets it aside and goes on with the one before it.
      PeerError: the same, found by the first of several processes.
    """
    while (chosen := self._chosen(step)) is not None:
      problem = self._problem(chosen)
      if problem is None:
        try:
          items = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract_state),
            feed=ocp.args.StandardRestore(abstract_feed(self._shapes(chosen))),
          )
          restored = self._manager.restore(chosen, args=items)
          return restored["state"], restored["feed"]
        except jax.errors.JaxRuntimeError:
          raise
        except _READ_ERRORS as error:
          if (self._directory / str(chosen) / CHECKSUMS).exists():
            raise  # The files are as written: it is not damage.
          problem = f"{type(error).__name__}: {str(error)[:500]}"
          if processes.several():
            # The others may have read it, or wait for this process.
            raise CheckpointError(
              f"checkpoint {self._directory / str(chosen)} is damaged: "
              f"{problem}. Restore its files, or move it away to go on from "
              "the one before it"
            ) from error
      self._set_aside(chosen, problem, given=step is not None)
    return None

  def _chosen(self, step: int | None) -> int | None:
    """The given step, or the newest that the first process sees."""
    return processes.from_first(self.latest_step) if step is None else step

  def _shapes(self, step: int) -> Any:
    """The tree that was saved of the feed, with shapes."""
    with ocp.PyTreeCheckpointer() as reader:
      found = reader.metadata(self._directory / str(step) / "feed")
    return found.item_metadata.tree

  def _problem(self, step: int) -> str | None:
    """What is wrong with a checkpoint, as the first process finds."""
    return processes.from_first(lambda: self._find_problem(step))

  def _find_problem(self, step: int) -> str | None:
    directory = self._directory / str(step)
    if not directory.exists():
      raise CheckpointError(
        f"no checkpoint of step {step} in {self._directory}: there are "
        f"{self.steps()}"
      )
    lines = damage(directory)
    if not lines:
      return None
    more = f" and {len(lines) - 3} more files" if len(lines) > 3 else ""
    return "; ".join(lines[:3]) + more

  def _set_aside(self, step: int, problem: str, given: bool) -> None:
    """Renames a damaged checkpoint if the user asked to go on without it."""
    directory = self._directory / str(step)
    before = [s for s in self.steps() if s < step]
    given = given or self._read_only
    if given or self._on_corrupt != "previous" or not before:
      if given:
        others = [s for s in self.steps() if s != step]
        remedy = f"Restore the files or ask for another step: {others}"
      elif before:
        remedy = (
          "Pass --config.checkpoint.on_corrupt=previous to go on from step "
          f"{before[-1]}, or restore the files"
        )
      else:
        remedy = (
          "There is no other checkpoint to go on from: restore the files or "
          "use a new workdir"
        )
      raise CheckpointError(
        f"checkpoint {directory} is damaged: {problem}. {remedy}."
      )

    def rename() -> None:
      aside = _free_name(self._directory / f"damaged_{step}")
      logger.error(
        "Checkpoint %s is damaged: %s. It is kept as %s; going on from step %d "
        "(checkpoint.on_corrupt=previous).",
        directory,
        problem,
        aside,
        before[-1],
      )
      directory.rename(aside)

    self._manager.close()
    processes.from_first(rename)
    self._manager = self._open()

  def _readable(self, step: int | None) -> int:
    """The newest (or the given) step.

    Raises:
      CheckpointError: if there is no such checkpoint or it is damaged.
    """
    chosen = self._chosen(step)
    if chosen is None:
      raise CheckpointError(f"there is no checkpoint in {self._directory}")
    if problem := self._problem(chosen):
      self._set_aside(chosen, problem, given=True)
    return chosen

  def restore_feed(self, step: int | None = None) -> tuple[int, Any]:
    """The newest (or the given) checkpoint's feed state, for one that is small.

    Returns:
      (step, tree of NumPy arrays).

    Raises:
      CheckpointError: if there is no such checkpoint or it is damaged.
    """
    chosen = self._readable(step)
    shapes = self._shapes(chosen)
    abstract = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    return chosen, self._read(chosen, "feed", abstract)

  def restore_subtree(
    self, abstract: Any, step: int | None = None
  ) -> tuple[int, Any]:
    """Part of the newest (or the given) state, e.g. {'ema': {'0.999': ...}}.

    Nothing else of the checkpoint is read.

    Returns:
      (step, the restored tree).

    Raises:
      CheckpointError: if there is no such checkpoint or it is damaged.
    """
    chosen = self._readable(step)
    return chosen, self._read(chosen, "state", abstract)

  def _read(self, step: int, item: str, abstract: Any) -> Any:
    """What a checkpoint's item holds of an abstract tree."""
    with ocp.PyTreeCheckpointer() as checkpointer:
      return checkpointer.restore(
        self._directory / str(step) / item,
        args=ocp.args.PyTreeRestore(
          item=abstract,
          restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
          partial_restore=True,
        ),
      )
