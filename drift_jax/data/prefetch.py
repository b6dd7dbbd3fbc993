"""Prefetch: the next batches are read and copied while the device computes."""

import collections
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax


class Prefetcher:
  """Placed batches of a feed, up to `depth` of them made in advance.

  One thread draws batches and copies them to the device, in order. It stops
  after the batch of a step for which `pause_after` holds, so that the feed's
  state then describes the batches that have been consumed and no others; it
  goes on after `state` or with the next batch.

  Attributes:
    seconds_waited: how long `next` has blocked so far, in seconds.
  """

  def __init__(
    self,
    feed: Any,
    put: Callable[[Any], Any],
    *,
    first_step: int,
    depth: int,
    pause_after: Callable[[int], bool],
  ):
    """Starts nothing: the first batch is drawn when asked for.

    Args:
      feed: has __next__ and state(), as those of drift_jax.data.feed; drawn
        from by this object alone until it is closed.
      put: host batch -> batch on the device, run in the thread.
      first_step: the step that takes the first batch.
      depth: batches made in advance; 0 makes each when asked, with no thread.
      pause_after: step -> whether the feed's state may be asked for between
        its batch and the next.
    """
    self._feed = feed
    self._put = put
    self._depth = depth
    self._pause_after = pause_after
    # The step whose batch is made next, and whether it waits for `state`.
    self._next_step = first_step
    self._paused = False
    # Whether `stop` was called.
    self._stopped = False
    # True while a batch is being made, and for ever once one has failed.
    self._unfinished = False
    self._pending: collections.deque[Future[Any]] = collections.deque()
    self._executor = ThreadPoolExecutor(1, "prefetch") if depth else None
    self.seconds_waited = 0.0

  def _make(self) -> Any:
    if self._unfinished:
      raise RuntimeError("no batch can follow: making one before it has failed")
    self._unfinished = True
    batch = self._put(next(self._feed))
    if self._executor is not None:
      jax.block_until_ready(batch)
    self._unfinished = False
    return batch

  def _fill(self, count: int) -> None:
    """Hands the thread work until `count` batches are made or being made."""
    assert self._executor is not None
    while len(self._pending) < count and not self._paused:
      self._pending.append(self._executor.submit(self._make))
      self._paused = self._pause_after(self._next_step)
      self._next_step += 1

  def __iter__(self) -> Iterator[Any]:
    return self

  def __next__(self) -> Any:
    """The next step's batch; raises whatever kept it from being made."""
    start = time.perf_counter()
    if self._executor is None:
      batch = self._make()
      self._next_step += 1
    else:
      if not self._pending:
        self._paused = False
        self._fill(1)
      future = self._pending.popleft()
      self._fill(self._depth)
      batch = future.result()
    self.seconds_waited += time.perf_counter() - start
    return batch

  def stop(self) -> int:
    """Draws nothing any more; returns the last step whose batch was drawn.

    After that step the state may be asked for. It depends on the steps and
    the depth alone, not on how far the thread has come.
    """
    self._paused = self._stopped = True
    return self._next_step - 1

  def state(self) -> dict[str, Any]:
    """The feed's state after the batches that have been consumed.

    Raises:
      RuntimeError: batches have been drawn ahead: `pause_after` did not hold
        for the last step.
    """
    if self._pending:
      raise RuntimeError(
        f"{len(self._pending)} batches were drawn ahead, up to that of step "
        f"{self._next_step - 1}: pause_after must hold for the last step"
      )
    state = self._feed.state()
    self._paused = self._stopped
    if self._executor is not None:
      self._fill(self._depth)
    return state

  def close(self) -> None:
    """Waits for the thread; the feed stays open."""
    while self._pending:
      self._pending.popleft().cancel()
    if self._executor is not None:
      self._executor.shutdown()
