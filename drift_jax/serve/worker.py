"""The one thread that owns the devices, and the queue before it."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import NamedTuple

import numpy as np

from drift_jax import sampling
from drift_jax.serve.requests import Asked, Refused, retry_after
from drift_jax.system.console import logger


class Part(NamedTuple):
  """Some images of a job, as they are ready.

  Attributes:
    first: number of the first one among all of the job.
    pixels: [n, H, W, 3] uint8.
  """

  first: int
  pixels: np.ndarray


class Done(NamedTuple):
  """A job's last word.

  Attributes:
    waited: seconds in the queue.
    device: seconds from a batch's start to its pixels on the host, all batches.
  """

  waited: float
  device: float


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
  All methods but `warm_up` and `stop` belong to one event loop.
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
    self.jobs: set[Job] = set()  # those that have a place
    self._last_seconds = 0.0
    self._turn = asyncio.Lock()  # first come, first served
    self._thread = futures.ThreadPoolExecutor(1, "draw-images")

  def warm_up(self) -> None:
    """Compiles all batch sizes, and draws with each of them."""
    alpha = self._model.alpha_range[0]
    for size in self.batch_sizes:
      labels = np.zeros(size, np.int32)
      self._draw(Asked(labels, alpha, 0, None), 0, size, size)

  def stop(self) -> None:
    """Lets the thread end after the batch that it draws."""
    self._thread.shutdown(wait=False, cancel_futures=True)

  def submit(self, asked: Asked) -> "Job":
    """Gives a request its place in the queue, which has to be released.

    Raises:
      Refused: 503, as there is none.
    """
    if len(self.jobs) >= self._places:
      message = "all places in the queue are taken: try again soon"
      later = retry_after(len(self.jobs) * self._last_seconds)
      raise Refused(503, message, later)
    return Job(self, asked)

  async def draw(self, job: "Job") -> None:
    """Puts the parts of a job among its events, then Done, or None if it fails.

    It may be cancelled: the batch that is drawn comes to its end, and no other
    follows.
    """
    try:
      since = time.monotonic()
      async with self._turn:
        begin = time.monotonic()
        device, first = 0.0, 0
        for size, count in cut(len(job.asked.labels), self.batch_sizes):
          pixels, seconds = await asyncio.get_running_loop().run_in_executor(
            self._thread, self._draw, job.asked, first, size, count
          )
          job.events.put_nowait(Part(first, pixels))
          device += seconds
          first += count
        self._last_seconds = time.monotonic() - begin
      job.events.put_nowait(Done(begin - since, device))
    except Exception:  # One request's failure must not end the others'.
      logger.exception("A request failed.")
      job.events.put_nowait(None)

  def _draw(
    self, asked: Asked, first: int, size: int, count: int
  ) -> tuple[np.ndarray, float]:
    """Pixels of images first ... first + count - 1 in a batch of `size`, and
    the seconds that they took."""
    start = time.monotonic()
    numbers = np.arange(first, first + size, dtype=np.int32)
    (batch,) = self._model.batches(
      asked.labels,
      alpha=asked.alpha,
      seed=asked.seed,
      style=asked.style,
      batch_size=size,
      numbers=np.minimum(numbers, np.int32(first + count - 1)),
    )
    pixels = batch.rows(batch.pixels)[:count]
    return pixels, time.monotonic() - start


class Job:
  """A request that has a place.

  Attributes:
    asked: what to draw.
    events: see Worker.draw.
  """

  def __init__(self, worker: Worker, asked: Asked):
    self.asked = asked
    self.events: asyncio.Queue[Part | Done | None] = asyncio.Queue()
    self._worker = worker
    worker.jobs.add(self)
    self._drawing = asyncio.ensure_future(worker.draw(self))

  def release(self) -> None:
    """Gives the place back; what is not drawn yet never is."""
    self._worker.jobs.discard(self)
    self._drawing.cancel()
