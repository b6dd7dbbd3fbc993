"""The ASGI application: one page, its API, and which hosts may ask."""

import asyncio
import base64
import json
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Mount, Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from drift_jax import sampling
from drift_jax.serve.limits import Limits, RateLimiter
from drift_jax.serve.requests import Refused, read_request, retry_after
from drift_jax.serve.worker import Job, Part, Worker
from drift_jax.system import options
from drift_jax.system.console import logger

# What a browser that runs on this machine calls it.
_LOCAL = ("localhost", "127.0.0.1", "[::1]")
_FILES = {
  "/": ("index.html", "text/html"),
  "/page.css": ("page.css", "text/css"),
  "/page.js": ("page.js", "text/javascript"),
  "/icon.svg": ("icon.svg", "image/svg+xml"),
}
_API = ("GET /api/model", "POST /api/sample")
_HEADERS = {
  "content-security-policy": (
    "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
  ),
  "x-content-type-options": "nosniff",
  "referrer-policy": "no-referrer",
  "cross-origin-resource-policy": "same-origin",
  "cross-origin-opener-policy": "same-origin",
  "cache-control": "no-store",
}


def make_app(
  model: sampling.Sampler,
  worker: Worker,
  limits: Limits,
  *,
  name: str,
  hosts: Sequence[str],
  root_path: str = "",
) -> ASGIApp:
  """An ASGI application.

  GET / is the page; GET /api/model says what can be asked for; POST
  /api/sample answers a JSON object (see requests.read_request) with a JSON
  object a line: {"index", "label", "png"} for each image, as they are ready,
  then {"images", "waited_ms", "device_ms", "images_per_second"}, or {"error"}.
  Anything else is answered with {"error": one line}.

  Args:
    model: of the worker.
    worker: draws; warmed up and stopped by the caller.
    limits: of requests.
    name: of the model, on the page.
    hosts: names by which browsers may reach it, beside this machine's own.
    root_path: '/PREFIX' that a proxy leaves before these paths; they are
      answered without it as well.
  """
  rate = RateLimiter(limits.requests_per_minute)

  async def post_sample(request: Request) -> Response:
    client = request.client.host if request.client else ""
    if wait := rate.take(client):
      raise Refused(
        429,
        f"more than {limits.requests_per_minute} requests a minute from "
        f"{client}: wait {math.ceil(wait)} s",
        retry_after(wait),
      )
    kind = request.headers.get("content-type", "").partition(";")[0]
    if kind.strip().lower() != "application/json":
      raise Refused(415, f"content-type {kind[:60]!r}: want application/json")
    body = await _read_body(request, limits)
    asked = read_request(body, model, limits.max_images)
    return _Images(worker.submit(asked), limits.send_seconds)

  # Responses that are always the same are applications themselves.
  same = {path: _file(*file) for path, file in _FILES.items()}
  same["/api/model"] = _json(describe(model, limits, name))
  routes = [
    *(Route(path, answer, methods=["GET"]) for path, answer in same.items()),
    Route("/api/sample", post_sample, methods=["POST"]),
  ]
  app = Starlette(
    routes=[*routes, *_below(root_path.rstrip("/"), routes)],
    exception_handlers={HTTPException: _on_http, Exception: _on_error},
  )
  # Starlette's own would send '/page.js/' elsewhere, to a host of its making.
  app.router.redirect_slashes = False
  return _Guard(app, hosts)


def _below(prefix: str, routes: Sequence[BaseRoute]) -> list[BaseRoute]:
  """The routes at '/PREFIX/...'."""
  if not prefix:
    return []
  # The page's addresses are relative to the folder that it is in.
  folder = RedirectResponse(f"{prefix.rpartition('/')[2]}/")
  inner = Router(routes, redirect_slashes=False)
  return [Route(prefix, folder), Mount(prefix, inner)]


def describe(
  model: sampling.Sampler, limits: Limits, name: str
) -> dict[str, Any]:
  """Facts about the model for the page; fit for JSON."""
  generator = model.generator
  return {
    "name": name,
    "step": generator.step,
    "ema_decay": generator.ema_decay,
    "num_classes": model.num_classes,
    "class_names": list(model.class_names),
    "alpha_range": list(model.alpha_range),
    "image_shape": list(model.image_shape),
    "style_tokens": generator.task.style_tokens,
    "style_vocab": generator.task.style_vocab,
    "max_images": limits.max_images,
    "max_seed": options.MAX_SEED,
  }


class _Guard:
  """Refuses other hosts' names, and adds what browsers need to be careful.

  A page elsewhere whose name is made to point at this machine (DNS rebinding)
  sends that name as its host.
  """

  def __init__(self, app: ASGIApp, hosts: Sequence[str]):
    self._app = app
    self._hosts = {host.lower() for host in (*_LOCAL, *hosts)}

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    async def guarded(message: Message) -> None:
      if message["type"] == "http.response.start":
        MutableHeaders(scope=message).update(_HEADERS)
      await send(message)

    if scope["type"] != "http":
      return await self._app(scope, receive, send)
    host = host_name(Headers(scope=scope).get("host", ""))
    if host in self._hosts:
      return await self._app(scope, receive, guarded)
    message = (
      f"host {host[:60]!r} is none of {sorted(self._hosts)}: --allowed_hosts "
      "of the server adds one"
    )
    await _json({"error": message}, 403)(scope, receive, guarded)


def host_name(host: str) -> str:
  """Host header without the port; an IPv6 address keeps its brackets."""
  name, colon, port = host.rpartition(":")
  has_port = colon and (port.isdecimal() or not port)
  return (name if has_port else host).lower()


async def _read_body(request: Request, limits: Limits) -> bytes:
  """The whole body, which is small and comes soon.

  Raises:
    Refused: 413 for a larger one, 408 for a slow one.
  """
  body = bytearray()
  most, seconds = limits.body_bytes, limits.body_seconds
  try:
    async with asyncio.timeout(seconds):
      async for chunk in request.stream():
        body += chunk
        if len(body) > most:
          raise Refused(413, f"the body is larger than {most} bytes")
  except TimeoutError as error:
    raise Refused(408, f"the body took longer than {seconds:g} s") from error
  except ClientDisconnect as error:
    raise Refused(400, "the client went away") from error
  return bytes(body)


class _Images(StreamingResponse):
  """Lines of JSON, as images are ready, until they end or the client leaves."""

  def __init__(self, job: Job, send_seconds: float):
    super().__init__(self._lines(), media_type="application/x-ndjson")
    self._job = job
    self._send_seconds = send_seconds
    self._outcome = "the client left"

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    async def send_soon(message: Message) -> None:
      # A client that does not read must not keep its place.
      async with asyncio.timeout(self._send_seconds):
        await send(message)

    # From 2.4 on, Starlette sees only while it sends that a client has left.
    scope = {**scope, "asgi": {"spec_version": "2.3"}}
    try:
      await super().__call__(scope, receive, send_soon)
    except TimeoutError:
      self._outcome = f"the client read nothing for {self._send_seconds:g} s"
    finally:
      self._job.release()
    logger.info("%d images: %s.", len(self._job.asked.labels), self._outcome)

  async def _lines(self) -> AsyncIterator[bytes]:
    labels = self._job.asked.labels
    while isinstance(event := await self._job.events.get(), Part):
      # In another thread: neither the devices nor other clients wait for it.
      yield await asyncio.to_thread(_image_lines, event, labels)
    # Before a client knows that it may ask again.
    self._job.release()
    if event is None:
      self._outcome = "failed"
      last = {"error": "the model failed; the server's log says why"}
    else:
      self._outcome = f"{1000 * event.device:.1f} ms on the devices"
      last = {
        "images": len(labels),
        "waited_ms": round(1000 * event.waited, 1),
        "device_ms": round(1000 * event.device, 1),
        "images_per_second": round(len(labels) / event.device, 1),
      }
    yield _line(last)


def _image_lines(part: Part, labels: np.ndarray) -> bytes:
  return b"".join(
    _line(
      {
        "index": i,
        "label": int(labels[i]),
        "png": base64.b64encode(sampling.png_bytes(pixels)).decode(),
      }
    )
    for i, pixels in enumerate(part.pixels, part.first)
  )


def _file(name: str, media_type: str) -> Response:
  """A file of this package."""
  file = resources.files("drift_jax.serve") / "static" / name
  return Response(file.read_bytes(), media_type=media_type)


def _line(value: Any) -> bytes:
  # ASCII: what a client sent may come back in it, lone surrogates included.
  return json.dumps(value, separators=(",", ":")).encode("ascii") + b"\n"


def _json(
  value: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
  return Response(_line(value), status, headers, "application/json")


def _on_http(request: Request, error: Exception) -> Response:
  """Requests that are refused, paths and methods that do not exist."""
  assert isinstance(error, HTTPException)
  message = error.detail
  if not isinstance(error, Refused):
    there = [*(f"GET {path}" for path in _FILES), *_API]
    what = f"{request.method} {request.url.path}"
    message += f": {what[:60]!r} is none of {there}"
  return _json({"error": message}, error.status_code, error.headers)


def _on_error(request: Request, error: Exception) -> Response:
  del request, error
  return _json({"error": "the server failed; its log says why"}, 500)
