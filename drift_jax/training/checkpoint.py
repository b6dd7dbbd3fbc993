"""Orbax checkpoints of everything that the next step needs.

Several processes write and read one checkpoint together, each its own shards,
and sum their own files; the first one gives and checks names.

A checkpoint holds the training state (parameters, optimiser, EMAs, step and
random key) and the feed's state (data position and sample queue). Saving is
asynchronous. After the commit every file's size and CRC-32s go into the
checkpoint's checksums (training.checksums), so that a truncated or altered
file is told from a good one before anything of it is restored. After the
evaluation of its step figures.json is written, by which checkpoints are ranked.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import math
import os
import re
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from drift_jax.system import processes, storage
from drift_jax.system.console import logger
from drift_jax.system.errors import UserError
from drift_jax.training import checksums

# The parts of a checkpoint.
_ITEMS = ("state", "feed")
# Bytes of a piece of an array. A piece is copied before it is written.
_CHUNK_BYTES = 2**25
# Bytes of a part of an array, at least, where each of the devices that hold a
# copy writes one: for each part of each shape JAX compiles a program.
_SLICE_BYTES = 2**20
# A folder that an unfinished save writes to, on a disk.
_UNFINISHED = re.compile(rf"\d+{re.escape(ocp.utils.TMP_DIR_SUFFIX)}.*")
# In the metadata of a checkpoint that was saved before its evaluation.
_DUE = {"evaluation": "due"}


class CheckpointError(UserError, RuntimeError):
  """A checkpoint that can't be used; the message says which, why, what now."""


@dataclasses.dataclass
class Retention:
  """Says which checkpoints are kept; a preservation policy of Orbax'.

  Orbax' own policy ranks by metrics that come with the save, but a step is
  evaluated afterwards.

  Attributes:
    latest: newest checkpoints to keep.
    every: also keep every step that is a multiple of it; 0 for none.
    best_metric: also keep the checkpoint with the smallest one; '' for none.
    scores: {evaluated step: its metric}; inf for one that is never the best.
  """

  latest: int
  every: int
  best_metric: str
  scores: dict[int, float] = dataclasses.field(default_factory=dict)

  def set_score(self, step: int, figures: Mapping[str, float | None]) -> None:
    """Ranks a step: last if its figures lack the metric, or it is NaN.

    A resumed run may rank by another metric than its older checkpoints hold.
    """
    value = figures.get(self.best_metric)
    if value is None or math.isnan(value):
      value = math.inf
    self.scores[step] = value

  def best(self, steps: Collection[int]) -> int | None:
    """The one with the smallest finite score, if any has one."""
    score, best = min(
      ((self.scores.get(step, math.inf), step) for step in steps),
      default=(math.inf, None),
    )
    return best if score < math.inf else None

  def kept(self, steps: Sequence[int]) -> set[int]:
    """Those of some steps, oldest first, that are kept."""
    kept = {*steps[-self.latest :], self.best(steps)}
    kept |= {s for s in steps if self.every and s % self.every == 0}
    return kept & {*steps}

  def should_preserve(
    self, checkpoints: Sequence[Any], *, context: Any
  ) -> list[bool]:
    """Answers Orbax, of checkpoints with a `step`."""
    del context
    kept = self.kept([checkpoint.step for checkpoint in checkpoints])
    return [checkpoint.step in kept for checkpoint in checkpoints]


class _Manager(ocp.CheckpointManager):
  """Leaves it to `exits.preemption` to ask for preemption.

  JAX wants one series of increasing numbers, and Orbax would ask with others.
  """

  def reached_preemption(self, step: int) -> bool:
    del step
    return False


def _read_json(path: epath.Path) -> dict[str, Any] | None:
  """A file's object; None if it is not there or is no JSON."""
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    return None
  except ValueError:
    logger.warning("%s is damaged and left out.", path)
    return None


def _handler() -> ocp.PyTreeCheckpointHandler:
  """Writes an array that is on several devices in parts, if they are large."""
  arrays = ocp.type_handlers.ArrayHandler(
    min_slice_bytes_for_replica_parallel=_SLICE_BYTES
  )
  return ocp.PyTreeCheckpointHandler(
    type_handler_registry=ocp.type_handlers.create_type_handler_registry(
      (jax.Array, arrays), (np.ndarray, ocp.type_handlers.NumpyHandler())
    )
  )


def _to_save(tree: Any) -> ocp.args.PyTreeSave:
  chunks = ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES)
  return ocp.args.PyTreeSave(tree, jax.tree.map(lambda _: chunks, tree))


def _to_restore(abstract: Any, partial: bool = False) -> ocp.args.PyTreeRestore:
  return ocp.args.PyTreeRestore(
    item=abstract,
    restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
    partial_restore=partial,
  )


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

    Raises:
      CheckpointError: a folder of a step in a bucket without Orbax' marker,
        which might be a checkpoint and is not proven to be one.
    """
    self._directory = epath.Path(directory)
    if not storage.is_remote(directory):  # of a URL, resolve makes a local path
      self._directory = self._directory.resolve()
    self._on_corrupt = on_corrupt
    self._read_only = read_only
    self._failed = False  # a save
    self._retention = Retention(keep_latest, keep_every, best_metric)
    self._manager = self._open()
    # What is summed of the steps that lack checksums, and the thread's work.
    self._unsummed: dict[int, dict[str, Any]] = {}
    self._summing: concurrent.futures.Future[None] | None = None
    self._stop = threading.Event()
    self._executor = concurrent.futures.ThreadPoolExecutor(1)

  def _open(self) -> ocp.CheckpointManager:
    if not self._read_only:
      processes.from_first(self._sweep)
    manager = _Manager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=self._retention,
        create=not self._read_only,
        # In a bucket it would delete every folder that has no marker.
        cleanup_tmp_directories=False,
      ),
      item_handlers={item: _handler() for item in _ITEMS},
    )
    self._retention.scores.clear()  # of what may have been set aside
    for step in manager.all_steps():
      figures = _read_json(self._directory / str(step) / checksums.FIGURES)
      if figures is None:  # Earlier runs gave them to Orbax.
        figures = manager.metrics(step)
      if figures is not None:
        self._retention.set_score(step, figures)
    return manager

  def _sweep(self) -> None:
    """Removes what killed saves have left; never what may be a checkpoint."""
    self._remove_unfinished()
    for path in self._unmarked():
      metadata = _read_json(path / checksums.METADATA)
      finished = (metadata or {}).get("commit_timestamp_nsecs") is not None
      summed = (path / checksums.CHECKSUMS).exists()
      killed = metadata is not None and not finished and not summed
      if killed or not checksums.file_names(path):
        path.rmtree()
        continue
      # Its checksums tell; before they are written, by what it should hold.
      lacks, proven = checksums.compare(path)
      if not lacks and not proven:
        lacks = checksums.incomplete(path, _ITEMS)
      if lacks:
        raise CheckpointError(
          f"{path} may be a checkpoint that was copied in part: it has no "
          f"{checksums.COMMIT}, and {'; '.join(lacks[:3])}. Copy it again as a "
          "whole, with `gcloud storage rsync -r`, or move it away"
        )
      (path / checksums.COMMIT).write_text("Nothing else is missing.\n")
      logger.info(
        "Checkpoint %s lacked its %s alone: it counts.", path, checksums.COMMIT
      )

  def _remove_unfinished(self) -> None:
    for path in storage.entries(self._directory):
      if _UNFINISHED.fullmatch(path.name):
        path.rmtree()

  def _unmarked(self) -> list[epath.Path]:
    """Folders of steps in a bucket that lack the marker of a finished save."""
    return [
      path
      for path in storage.entries(self._directory)
      if storage.is_remote(self._directory)
      and path.name.isdecimal()
      and not (path / checksums.COMMIT).exists()
    ]

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
    return self._retention.best(self.steps())

  def best(self) -> tuple[str, float, int] | None:
    """(best_metric, its smallest value, the step) of those kept, if any."""
    step = self.best_step()
    if step is None:
      return None
    return self._retention.best_metric, self._retention.scores[step], step

  def save(
    self, step: int, state: Any, feed: Any, *, evaluation_due: bool = False
  ) -> None:
    """Starts saving a step; returns once the arrays have been copied.

    Args:
      step: newer than all before.
      state, feed: trees of arrays.
      evaluation_due: the step will be evaluated, and `rank` be called.

    Raises:
      CheckpointError: this or the save before could not be written.
      ValueError: if the step is not newer than every checkpoint there is, or
        the directory was opened read-only.
    """
    self._wait_for_save()
    # The save may delete an older checkpoint: nothing may be writing there,
    # and a save in a hurry must not wait until all has been read back.
    self._pause_sums()
    with self._writing():
      saving = not self._read_only and self._manager.save(
        step,
        args=ocp.args.Composite(state=_to_save(state), feed=_to_save(feed)),
        custom_metadata=_DUE if evaluation_due else None,
      )
    if not saving:
      raise ValueError(
        f"step {step} can't be saved in {self._directory}: it is read-only, or "
        f"steps do not increase from {self.steps()}"
      )
    self._start_sums()
    self._unsummed[step] = {}

  def evaluated(self, step: int) -> bool:
    """False for a checkpoint whose evaluation was due and has no figures."""

    def look() -> bool:
      path = self._directory / str(step)
      metadata = _read_json(path / checksums.METADATA) or {}
      custom = metadata.get("custom_metadata")
      return custom != _DUE or _read_json(path / checksums.FIGURES) is not None

    return processes.from_first(look)

  def rank(self, step: int, figures: dict[str, float] | None) -> None:
    """Records the evaluation of a saved step, and removes what it surpasses.

    Args:
      step: number of a saved step.
      figures: with best_metric, the same in all processes; None for none.

    Raises:
      CheckpointError: the checkpoint could not be written.
    """
    self._wait_for_save()
    figures = dict(figures or {})
    self._retention.set_score(step, figures)
    if processes.is_first():
      finite = {n: v if math.isfinite(v) else None for n, v in figures.items()}
      path = self._directory / str(step) / checksums.FIGURES
      checksums.write_whole(path, json.dumps(finite))
    steps = self.steps()
    dropped = sorted({*steps} - self._retention.kept(steps))
    if dropped:
      self._pause_sums()
      processes.from_all(lambda: None)  # nobody writes there any more
      for old in dropped:
        self._manager.delete(old)
      self._start_sums()

  def poll(self) -> None:
    """Has a committed checkpoint summed by a thread; never waits.

    Raises:
      CheckpointError: it could not be written.
    """
    if not self._manager.is_saving_in_progress():
      self._wait_for_save()
      self._start_sums()

  def _start_sums(self) -> None:
    """Has a thread sum what is whole and not being deleted."""
    if self._summing is not None and not self._summing.done():
      return
    self._finish_sums()
    kept = self.steps()
    self._unsummed = {
      s: sums for s, sums in self._unsummed.items() if s in kept
    }
    self._summing = self._executor.submit(self._sum, [*self._unsummed.items()])

  def _sum(self, jobs: list[tuple[int, dict[str, Any]]]) -> None:
    for step, sums in jobs:
      path = self._directory / str(step)
      try:
        if not checksums.sum_files(path, processes.index(), sums, self._stop):
          return
      except FileNotFoundError:
        logger.info("Checkpoint %d is gone, no checksums written.", step)
      self._unsummed.pop(step)

  def _finish_sums(self) -> None:
    """Waits for the thread; raises what it has raised."""
    summing, self._summing = self._summing, None
    if summing is not None:
      summing.result()

  def _pause_sums(self) -> None:
    """Stops the thread; what it has summed by now is kept."""
    self._stop.set()
    self._finish_sums()
    self._stop.clear()

  def _wait_for_save(self) -> None:
    with self._writing():
      self._manager.wait_until_finished()

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """Says in one line why a checkpoint could not be written."""
    try:
      yield
    except jax.errors.JaxRuntimeError:
      raise
    except checksums.FILE_ERRORS as error:
      if processes.is_lost_peer(error):
        raise
      self._failed = True
      # The checkpoint that the failed save was about to delete is still there.
      self._manager.reload()
      text = " ".join(str(error).split())
      code = re.search(r"os_error_code='(\d+)'", text)
      cause = os.strerror(int(code[1])) if code else text[:300]
      last = self.latest_step()
      kept = "No checkpoint was there before"
      if last is not None:
        kept = (
          f"The checkpoint of step {last} is untouched, and the same command "
          "goes on from it"
        )
      raise CheckpointError(
        f"a checkpoint in {self._directory} could not be written: {cause}. "
        f"{kept}"
      ) from error

  def wait(self) -> None:
    """Blocks until everything started is on disk, checksums included.

    Raises:
      CheckpointError: a checkpoint could not be written.
      OSError: whatever kept its checksums from being written.
    """
    self._wait_for_save()
    self._finish_sums()
    self._start_sums()
    self._finish_sums()

  def close(self) -> None:
    """Waits, then releases the manager, also if waiting fails.

    The files of a failed save would keep a full disk full: they are removed, as
    far as no thread of the save goes on writing.
    """
    try:
      self.wait()
    finally:
      self._stop.set()
      self._executor.shutdown()
      try:
        with self._writing():
          self._manager.close()
      finally:
        if self._failed and processes.is_first():
          # Threads of the save may still be writing there.
          with contextlib.suppress(OSError):
            self._remove_unfinished()

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
      problem, proven = self._problem(chosen)
      if problem is None:
        try:
          items = ocp.args.Composite(
            state=_to_restore(abstract_state),
            feed=_to_restore(abstract_feed(self._shapes(chosen))),
          )
          restored = self._manager.restore(chosen, args=items)
          return restored["state"], restored["feed"]
        except jax.errors.JaxRuntimeError:
          raise
        except checksums.FILE_ERRORS as error:
          if proven:
            raise  # The files are as written: it is not damage.
          problem = f"{type(error).__name__}: {str(error)[:500]}"
          if processes.several():
            # The others may have read it, or wait for this process.
            raise self._damage(
              chosen,
              problem,
              "Restore its files, or move it away to go on from the one before "
              "it",
            ) from error
      self._set_aside(chosen, problem, given=step is not None)
    return None

  def _chosen(self, step: int | None) -> int | None:
    """The given step, or the newest that the first process sees."""
    return processes.from_first(self.latest_step) if step is None else step

  def _shapes(self, step: int) -> Any:
    """Tree of the saved feed's shapes."""
    # A checkpointer would also look for a step's metadata, which no item has.
    handler = ocp.PyTreeCheckpointHandler()
    try:
      return handler.metadata(self._directory / str(step) / "feed").tree
    finally:
      handler.close()

  def _problem(
    self, step: int, item: str = "", arrays: Collection[str] | None = None
  ) -> tuple[str | None, bool]:
    """(damage to what will be read, whether all of it was compared).

    The processes share the work. See checksums.compare.
    """
    directory = self._directory / str(step)

    def find() -> tuple[list[str], bool]:
      if not directory.exists():
        raise CheckpointError(
          f"no checkpoint of step {step} in {self._directory}: there are "
          f"{self.steps()}"
        )
      return checksums.compare(
        directory,
        process=processes.index(),
        count=jax.process_count() if processes.several() else 1,
        item=item,
        arrays=arrays,
      )

    answers = processes.from_all(find)
    lines = [*dict.fromkeys(line for damage, _ in answers for line in damage)]
    if not lines:
      return None, all(proven for _, proven in answers)
    more = f" and {len(lines) - 3} more files" if len(lines) > 3 else ""
    return "; ".join(lines[:3]) + more, False

  def _damage(self, step: int, problem: str, remedy: str) -> CheckpointError:
    path = self._directory / str(step)
    return CheckpointError(
      f"checkpoint {path} is damaged: {problem}. {remedy}."
    )

  def _set_aside(self, step: int, problem: str, given: bool) -> None:
    """Renames a damaged checkpoint if the user asked to go on without it."""
    others = [s for s in self.steps() if s != step]
    before = [s for s in others if s < step]
    remedy = ""
    if given or self._read_only:
      remedy = f"Restore the files or ask for another step: {others}"
    elif not before:
      remedy = (
        "There is no other checkpoint to go on from: restore the files or use "
        "a new workdir"
      )
    elif self._on_corrupt != "previous":
      remedy = (
        "Pass --config.checkpoint.on_corrupt=previous to go on from step "
        f"{before[-1]}, or restore the files"
      )
    if remedy:
      raise self._damage(step, problem, remedy)

    def rename() -> None:
      directory = self._directory / str(step)
      aside = directory.with_name(f"damaged_{step}")
      number = 1
      while aside.exists():
        number += 1
        aside = directory.with_name(f"damaged_{step}_{number}")
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

  def _readable(
    self, step: int | None, item: str, arrays: Collection[str] | None
  ) -> int:
    """The newest (or the given) step, if what will be read of it is sound.

    Raises:
      CheckpointError: if there is no such checkpoint or it is damaged.
    """
    chosen = self._chosen(step)
    if chosen is None:
      lacking = ""
      if names := ", ".join(path.name for path in self._unmarked()):
        lacking = (
          f": {names} lack the {checksums.COMMIT} of a finished save. If they "
          "were copied there, going on with the run adopts what is whole"
        )
      raise CheckpointError(
        f"there is no checkpoint in {self._directory}{lacking}"
      )
    problem, _ = self._problem(chosen, item, arrays)
    if problem:
      self._set_aside(chosen, problem, given=True)
    return chosen

  def restore_feed(self, step: int | None = None) -> tuple[int, Any]:
    """The newest (or the given) checkpoint's feed state, which must be small.

    Returns:
      (step, tree of NumPy arrays).

    Raises:
      CheckpointError: if there is no such checkpoint or it is damaged.
    """
    chosen = self._readable(step, "feed", None)
    abstract = jax.tree.map(
      lambda x: np.zeros(x.shape, x.dtype), self._shapes(chosen)
    )
    return chosen, self._read(chosen, "feed", abstract)

  def restore_subtree(
    self, abstract: Any, step: int | None = None
  ) -> tuple[int, Any]:
    """Part of the newest (or the given) state, e.g. {'ema': {'0.999': ...}}.

    Nothing else of the checkpoint is read, nor compared with its checksums.

    Returns:
      (step, the restored tree).

    Raises:
      CheckpointError: if there is no such checkpoint or it is damaged.
    """
    arrays = ocp.tree.to_flat_dict(abstract, sep=".")
    chosen = self._readable(step, "state", arrays)
    return chosen, self._read(chosen, "state", abstract)

  def _read(self, step: int, item: str, abstract: Any) -> Any:
    """The arrays of an abstract tree, from an item of a checkpoint."""
    with ocp.PyTreeCheckpointer() as checkpointer:
      return checkpointer.restore(
        self._directory / str(step) / item,
        args=_to_restore(abstract, partial=True),
      )
