"""The one thread that owns the devices, and the queue in front of it."""

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from drift_jax import sampling
from drift_jax.serve.requests import Asked
from drift_jax.system.console import logger

_STOP_SECONDS = 10.0


class Busy(Exception):
  """All places are taken.

  Attributes:
    seconds: after which one is free, about.
  """

  def __init__(self, seconds: float):
    super().__init__()
    self.seconds = seconds


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
  """Some images of a job, as they are ready.

  Attributes:
    first: number of the first one among all of the job.
    pixels: [n, H, W, 3] uint8.
  """

  first: int
  pixels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Done:
  """A job's last word.

  Attributes:
    waited: seconds in the queue.
    device: seconds from a batch's start to its pixels on the host, all batches.
  """

  waited: float
  device: float


@dataclasses.dataclass(frozen=True)
class Failed:
  """A job's last word where the model failed; the log says why."""


Deliver = Callable[[Part | Done | Failed], None]


@dataclasses.dataclass(eq=False)
class Job:
  """A request that has a place."""

  asked: Asked
  deliver: Deliver
  since: float
  released: bool = False


def cut(count: int, sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
  """Cuts `count` images into batches of given sizes, ascending.

  The smallest batch that holds what is left, if that fills at least half of it;
  else the largest one that is filled, else the smallest of all.

  Yields:
    (size of a batch, how many images of it count).
  """
  left = count
  while left:
    holding = [size for size in sizes if left <= size <= 2 * left]
    filled = [size for size in sizes if size <= left]
    size = (holding[:1] or filled[-1:] or sizes[:1])[0]
    yield size, min(size, left)
    left -= min(size, left)


class Worker:
  """Draws what is asked for, one job after the other.

  A job has a place until it is released: while it waits, is drawn, and is sent.
  """

  def __init__(
    self,
    model: sampling.Sampler,
    batch_sizes: Sequence[int],
    max_waiting: int,
  ):
    """Args:
    model: the generator.
    batch_sizes: the only ones that are compiled; filled up to a multiple of
      the devices.
    max_waiting: jobs beside the one that is drawn.
    """
    self._model = model
    self.batch_sizes = tuple(sorted({model.padded(n) for n in batch_sizes}))
    self._places = max_waiting + 1
    self._waiting: collections.deque[Job] = collections.deque()
    self._held = 0
    self._last_seconds = 0.0
    self._stopping = False
    self._changed = threading.Condition()
    self._thread = threading.Thread(
      target=self._work, name="draw-images", daemon=True
    )

  def warm_up(self) -> None:
    """Compiles all batch sizes, and draws with each of them."""
    alpha = self._model.alpha_range[0]
    for size in self.batch_sizes:
      labels = np.zeros(size, np.int32)
      self._draw(Asked(labels, alpha, 0, None), 0, size, size)

  def start(self) -> None:
    """Begins to take jobs."""
    self._thread.start()

  def stop(self) -> None:
    """Ends the thread behind the batch that it draws."""
    with self._changed:
      self._stopping = True
      self._changed.notify_all()
    self._thread.join(_STOP_SECONDS)

  def submit(self, asked: Asked, deliver: Deliver) -> Job:
    """A place in the queue; `release` it.

    Args:
      asked: what to draw.
      deliver: called in the worker's thread with each part, and with what ends
        it; not after the job is released.

    Raises:
      Busy: there is none.
    """
    with self._changed:
      if self._held >= self._places:
        raise Busy(max(1.0, self._held * self._last_seconds))
      self._held += 1
      job = Job(asked, deliver, time.monotonic())
      self._waiting.append(job)
      self._changed.notify_all()
      return job

  def release(self, job: Job) -> None:
    """Gives the place back; what is not drawn yet never is."""
    with self._changed:
      if not job.released:
        job.released = True
        self._held -= 1
        if job in self._waiting:
          self._waiting.remove(job)

  def _work(self) -> None:
    while True:
      with self._changed:
        self._changed.wait_for(lambda: self._waiting or self._stopping)
        if self._stopping:
          return
        job = self._waiting.popleft()
      try:
        self._serve(job)
      except Exception:  # One request's failure must not end the others'.
        logger.exception("A request failed.")
        self._hand(job, Failed())

  def _serve(self, job: Job) -> None:
    begin = time.monotonic()
    device, first = 0.0, 0
    for size, count in cut(len(job.asked.labels), self.batch_sizes):
      if job.released or self._stopping:
        return
      start = time.monotonic()
      pixels = self._draw(job.asked, first, size, count)
      device += time.monotonic() - start
      self._hand(job, Part(first, pixels))
      first += count
    self._hand(job, Done(begin - job.since, device))
    self._last_seconds = time.monotonic() - begin

  def _draw(
    self, asked: Asked, first: int, size: int, count: int
  ) -> np.ndarray:
    """Pixels of images first ... first + count - 1 in a batch of `size`."""
    numbers = np.arange(first, first + size, dtype=np.int32)
    (batch,) = self._model.batches(
      asked.labels,
      alpha=asked.alpha,
      seed=asked.seed,
      style=asked.style,
      batch_size=size,
      numbers=np.minimum(numbers, np.int32(first + count - 1)),
    )
    return batch.rows(batch.pixels)[:count]

  def _hand(self, job: Job, event: Part | Done | Failed) -> None:
    with self._changed:
      if not job.released:
        job.deliver(event)
