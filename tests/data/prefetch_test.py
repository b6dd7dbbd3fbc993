"""Prefetch: order, states that match what was consumed, errors, overlap."""

import contextlib
import threading
import time

import numpy as np
import pytest

from drift_jax.data.prefetch import Prefetcher
from tests.process import wait_for


class Counter:
  """A feed of 1, 2, 3, ...; its state is how many it has given."""

  def __init__(self, seconds=0.0, fails_at=None):
    self.given = 0
    self.threads = set()
    self._seconds = seconds
    self._fails_at = fails_at

  def __next__(self):
    time.sleep(self._seconds)
    self.threads.add(threading.get_ident())
    if self.given + 1 == self._fails_at:
      raise OSError("shard-7 can't be read")
    self.given += 1
    return np.full(2, self.given)

  def state(self):
    return {"position": self.given}


def make(feed, depth, every=0, put=lambda batch: batch, first_step=1):
  return contextlib.closing(
    Prefetcher(
      feed,
      put,
      first_step=first_step,
      depth=depth,
      pause_after=lambda step: every > 0 and step % every == 0,
    )
  )


DEPTHS = pytest.mark.parametrize("depth", [0, 1, 3])


@DEPTHS
def test_batches_come_in_order_placed(depth):
  feed = Counter()
  with make(feed, depth, put=lambda batch: -batch) as batches:
    for step in range(1, 20):
      np.testing.assert_array_equal(next(batches), [-step, -step])
  assert (feed.threads == {threading.get_ident()}) == (depth == 0)


@pytest.mark.parametrize("depth", [1, 3])
def test_depth_batches_are_made_in_advance_and_no_more(depth):
  feed = Counter()
  with make(feed, depth) as batches:
    time.sleep(0.02)
    assert feed.given == 0  # nothing before it is asked for
    for step in range(1, 4):
      next(batches)
      wait_for(lambda: feed.given == step + depth)  # noqa: B023
      time.sleep(0.02)
      assert feed.given == step + depth


@DEPTHS
@pytest.mark.parametrize("first_step", [1, 8])
def test_states_describe_what_was_consumed(depth, first_step):
  """Also where a state that is due is not asked for: the run goes on."""
  feed = Counter()
  with make(feed, depth, every=5, first_step=first_step) as batches:
    for consumed in range(1, 30):
      step = first_step + consumed - 1
      next(batches)
      if step % 5 == 0:
        time.sleep(0.005)
        assert feed.given == consumed
        if step != 15:
          assert batches.state() == {"position": consumed}
          # Reading goes on without waiting for the next batch to be asked for.
          wait_for(lambda: feed.given == consumed + depth)  # noqa: B023


def test_a_state_out_of_turn_is_an_error():
  with make(Counter(), 2, every=5) as batches:
    next(batches)
    with pytest.raises(RuntimeError, match="2 batches .* up to that of step 3"):
      batches.state()


@DEPTHS
def test_what_a_feed_raises_arrives_at_its_step(depth):
  feed = Counter(fails_at=4)
  with make(feed, depth) as batches:
    for _ in range(3):
      next(batches)
    with pytest.raises(OSError, match="^shard-7 can't be read$"):
      next(batches)
    with pytest.raises(RuntimeError, match="no batch can follow"):
      next(batches)
  assert feed.given == 3


def test_close_waits_for_the_thread():
  feed = Counter(seconds=0.02)
  with make(feed, 3) as batches:
    next(batches)
  assert batches.seconds_waited >= 0.02
  given = feed.given
  assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]
  time.sleep(0.05)
  assert feed.given == given < 4
