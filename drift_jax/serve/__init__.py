"""A page to look at images: python -m drift_jax.serve --from=SOURCE.

One thread draws (`worker`), what browsers send is checked (`requests`,
`limits`), and an ASGI application answers (`app`).
"""

from drift_jax.serve.app import make_app
from drift_jax.serve.limits import Limits, RateLimiter
from drift_jax.serve.requests import Asked, Refused, read_request
from drift_jax.serve.server import make_server
from drift_jax.serve.worker import Busy, Done, Failed, Part, Worker, cut

__all__ = [
  "Asked",
  "Busy",
  "Done",
  "Failed",
  "Limits",
  "Part",
  "RateLimiter",
  "Refused",
  "Worker",
  "cut",
  "make_app",
  "make_server",
  "read_request",
]
