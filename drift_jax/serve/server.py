"""The HTTP server."""

import uvicorn
from starlette.types import ASGIApp

# Open connections; a request beyond them is answered with 503.
_CONNECTIONS = 256
_HEADER_BYTES = 16 * 1024
# What is being sent may take so long when it is told to end.
_FAREWELL_SECONDS = 3


def make_server(app: ASGIApp) -> uvicorn.Server:
  """A server whose `run(sockets=[...])` ends with SIGINT or SIGTERM."""
  return uvicorn.Server(
    uvicorn.Config(
      app,
      loop="asyncio",
      http="h11",
      ws="none",
      lifespan="off",
      log_config=None,
      log_level="error",
      access_log=False,
      # A client's X-Forwarded-For would choose whose requests are counted.
      proxy_headers=False,
      server_header=False,
      limit_concurrency=_CONNECTIONS,
      h11_max_incomplete_event_size=_HEADER_BYTES,
      timeout_graceful_shutdown=_FAREWELL_SECONDS,
    )
  )
