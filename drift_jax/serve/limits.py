"""Limits of one client's requests."""

import collections
import time
from collections.abc import Callable
from typing import NamedTuple

_MAX_CLIENTS = 4096


class Limits(NamedTuple):
  """Limits of requests for images.

  Attributes:
    max_images: of one request.
    requests_per_minute: of one client, by its address.
    body_bytes: of a request; more is not read.
    body_seconds: within which a request must be sent.
    send_seconds: within which a client must take a line of the answer.
  """

  max_images: int
  requests_per_minute: int
  body_bytes: int = 64 * 1024
  body_seconds: float = 10.0
  send_seconds: float = 30.0


class RateLimiter:
  """A bucket of tokens for each client: a minute's worth, refilled steadily.

  It remembers the clients seen last; one that is forgotten starts anew.
  """

  def __init__(
    self, per_minute: int, clock: Callable[[], float] = time.monotonic
  ):
    self._size = float(per_minute)
    self._clock = clock
    # {client: (tokens, when they were counted)}, the longest unseen first.
    self._buckets: collections.OrderedDict[str, tuple[float, float]] = (
      collections.OrderedDict()
    )

  def take(self, client: str) -> float:
    """Takes a token: 0, or the seconds until there is one."""
    now = self._clock()
    tokens, since = self._buckets.pop(client, (self._size, now))
    rate = self._size / 60
    tokens = min(self._size, tokens + (now - since) * rate)
    wait = 0.0 if tokens >= 1 else (1 - tokens) / rate
    self._buckets[client] = (tokens if wait else tokens - 1, now)
    if len(self._buckets) > _MAX_CLIENTS:
      self._buckets.popitem(last=False)
    return wait
