"""A Google Cloud Storage on this machine: gcp-storage-emulator, made strict."""

import contextlib
import dataclasses
import logging
import os
import pathlib
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import buckets, objects

NAME = "runs"
# Buckets that answer with an error: any request, or any that writes.
LOCKED, READ_ONLY = "locked", "read_only"


def _refused(request: Any) -> int | None:
  """The status that denies a request; None lets it through."""
  if request.params["bucket_name"] == LOCKED:
    return server.HTTPStatus.UNAUTHORIZED
  writes = request.method != server.GET
  if request.params["bucket_name"] == READ_ONLY and writes:
    return server.HTTPStatus.FORBIDDEN
  return None


def _strict(handler: Callable[..., None]) -> Callable[..., None]:
  """Adds permissions and what TensorStore's manifests rely on: conditional
  reads and writes, and the generation of what was read."""

  def handle(request: Any, response: Any, storage: Any) -> None:
    if status := _refused(request):
      response.status = status
      return
    names = [request.params.get("object_id"), *request.query.get("name", [])]
    name = next((name for name in names if name), None)
    if name is None:
      handler(request, response, storage)
      return
    bucket, now = request.params["bucket_name"], "0"  # of no object
    with contextlib.suppress(NotFound):
      now = storage.get_file_obj(bucket, name)["generation"]
    if request.query.get("ifGenerationMatch", [now]) != [now]:
      response.status = server.HTTPStatus.PRECONDITION_FAILED
    elif now != "0" and request.query.get("ifGenerationNotMatch") == [now]:
      response.status = server.HTTPStatus.NOT_MODIFIED
    else:
      handler(request, response, storage)
      response["x-goog-generation"] = now

  return handle


# Moves that have been made, by their token: {token: the object's resource}.
_MOVED: dict[str, Any] = {}


def _move(request: Any, response: Any, storage: Any) -> None:
  """POST .../o/SOURCE/moveTo/o/DESTINATION, which the emulator lacks.

  A client whose connection broke asks again, with the token of the first time,
  and is told what was done then.
  """
  token = request.get_header("X-Goog-GCS-Idempotency-Token")
  if token in _MOVED:
    response.json(_MOVED[token])
    return
  request.params["dest_bucket_name"] = request.params["bucket_name"]
  objects.copy(request, response, storage)
  if response.status != server.HTTPStatus.OK:
    return
  objects.delete(request, response, storage)
  moved = storage.get_file_obj(
    request.params["bucket_name"], request.params["dest_object_id"]
  )
  response.json(moved)
  if token:
    _MOVED[token] = moved


_MOVE = (
  r"^/storage/v1/b/(?P<bucket_name>[-.\w]+)/o/(?P<object_id>[^/]+)/moveTo/o/"
  r"(?P<dest_object_id>[^/]+)$"
)
_HANDLERS = [(_MOVE, {server.POST: _move})]
for _pattern, _methods in server.HANDLERS:
  if "<bucket_name>" in _pattern:
    _methods = {method: _strict(call) for method, call in _methods.items()}
  _HANDLERS.append((_pattern, _methods))


class _Handler(server.RequestHandler):
  """Says nothing of a client that hangs up, as gcsfs does on the slower of two
  requests and a killed process on all."""

  def handle(self) -> None:
    with contextlib.suppress(ConnectionError):
      super().handle()


@dataclasses.dataclass(frozen=True)
class Bucket:
  """The bucket gs://runs.

  Attributes:
    environment: what sends a process' clients to it.
  """

  environment: dict[str, str]
  _storage: Any
  name: str = NAME

  def names(self, folder: str) -> list[str]:
    """Objects below a folder, by their paths in it, sorted."""
    found, _ = self._storage.get_file_list(NAME, prefix=f"{folder}/")
    return sorted(entry["name"].removeprefix(f"{folder}/") for entry in found)

  def read(self, name: str) -> bytes:
    return self._storage.get_file(NAME, name)

  def delete(self, name: str) -> None:
    self._storage.delete_file(NAME, name)

  def write(self, name: str, data: bytes) -> None:
    host = self.environment["STORAGE_EMULATOR_HOST"]
    query = urllib.parse.urlencode({"uploadType": "media", "name": name})
    url = f"{host}/upload/storage/v1/b/{NAME}/o?{query}"
    with urllib.request.urlopen(url, data=data):
      pass

  def download(self, folder: str, to: pathlib.Path) -> pathlib.Path:
    """Copies a folder to the disk."""
    for name in self.names(folder):
      path = to / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(self.read(f"{folder}/{name}"))
    return to


@contextlib.contextmanager
def serve() -> Iterator[Bucket]:
  """Serves gs://runs, gs://locked and gs://read_only, all empty."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
  server.HANDLERS = _HANDLERS
  server.RequestHandler = _Handler
  emulator = server.create_server(
    "127.0.0.1", port, in_memory=True, data_dir=os.sep
  )
  # Of all that it holds, at every request.
  emulator._storage._write_config_to_file = lambda: None
  for name in (NAME, LOCKED, READ_ONLY):
    buckets.create_bucket(name, emulator._storage)
  environment = {
    "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}",
    "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{port}",
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
    # It asks Google, whatever the emulator's address, which kind a bucket is.
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
  }
  emulator.start()
  try:
    yield Bucket(environment, emulator._storage)
  finally:
    emulator.stop()
