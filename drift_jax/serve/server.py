"""The HTTP server."""

import asyncio

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

# Open connections; a new one takes the place of one that says nothing.
_CONNECTIONS = 256
# Within which a request's head must come whole, from the connection's start
# or the last answer's end.
_REQUEST_SECONDS = 10
_HEADER_BYTES = 16 * 1024
# What is being sent may take so long when it is told to end.
_FAREWELL_SECONDS = 3


class _Protocol(H11Protocol):
  """Uvicorn's, which a connection without a request can't hold for ever.

  Uvicorn's own timer begins after the first answer, and ends with any byte.
  """

  _deadline: asyncio.TimerHandle | None = None

  def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
    super().connection_made(transport)
    self._expect_request()
    limit = self.limit_concurrency
    if limit is None or len(self.connections) < limit:
      return
    # The connection that has waited longest for a request makes room.
    waiting = [
      (other._deadline.when(), i, other)
      for i, other in enumerate(self.connections)
      if isinstance(other, _Protocol) and other._deadline and other is not self
    ]
    if waiting:
      _, _, oldest = min(waiting)
      self.connections.discard(oldest)
      oldest.timeout_keep_alive_handler()

  def connection_lost(self, exc: Exception | None) -> None:
    self._stop_waiting()
    super().connection_lost(exc)

  def handle_events(self) -> None:
    super().handle_events()
    if self.cycle is not None and not self.cycle.response_complete:
      self._stop_waiting()

  def on_response_complete(self) -> None:
    self._expect_request()  # Before the next one, which may be there already.
    super().on_response_complete()

  def _expect_request(self) -> None:
    self._stop_waiting()
    self._deadline = self.loop.call_later(
      self.timeout_keep_alive, self.timeout_keep_alive_handler
    )

  def _stop_waiting(self) -> None:
    if self._deadline is not None:
      self._deadline.cancel()
      self._deadline = None


def make_server(
  app: ASGIApp,
  *,
  connections: int = _CONNECTIONS,
  request_seconds: int = _REQUEST_SECONDS,
) -> uvicorn.Server:
  """A server whose `run(sockets=[...])` ends with SIGINT or SIGTERM.

  Args:
    app: answers.
    connections: that are open at most. The one that has waited longest for a
      request is closed for a new one; if all have one, 503 is the answer.
    request_seconds: after which a connection without a whole request's head
      is closed.
  """
  return uvicorn.Server(
    uvicorn.Config(
      app,
      loop="asyncio",
      http=_Protocol,
      ws="none",
      lifespan="off",
      log_config=None,
      log_level="error",
      access_log=False,
      # A client's X-Forwarded-For would choose whose requests are counted.
      proxy_headers=False,
      server_header=False,
      limit_concurrency=connections + 1,  # Uvicorn refuses at this number.
      timeout_keep_alive=request_seconds,
      h11_max_incomplete_event_size=_HEADER_BYTES,
      timeout_graceful_shutdown=_FAREWELL_SECONDS,
    )
  )
