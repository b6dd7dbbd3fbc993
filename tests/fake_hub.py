"""A hub of models on this machine, for tests of downloads."""

import contextlib
import hashlib
import http.server
import json
import threading

COMMIT = 40 * "a"


@contextlib.contextmanager
def serving(handler):
  """A server on this machine -> its address."""
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
  thread = threading.Thread(target=server.serve_forever)
  thread.start()
  try:
    yield f"http://127.0.0.1:{server.server_port}"
  finally:
    server.shutdown()
    thread.join()
    server.server_close()


@contextlib.contextmanager
def hub(repositories):
  """A hub on this machine -> its address.

  Args:
    repositories: {'OWNER/NAME': {FILE: bytes}}.
  """

  class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, format, *args):
      del format, args

    def answer(self, with_body: bool) -> None:
      repository, _, rest = self.path.lstrip("/").partition("/resolve/")
      revision, _, name = rest.partition("/")
      files = repositories.get(repository)
      if files is None or revision not in ("main", COMMIT):
        self.send_response(404)
        missing = "RepoNotFound" if files is None else "RevisionNotFound"
        self.send_header("X-Error-Code", missing)
        body = b""
      elif name not in files:
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", COMMIT)
        body = b""
      else:
        body = files[name]
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
      self.send_header("Content-Length", str(len(body)))
      self.end_headers()
      if with_body:
        self.wfile.write(body)

    def do_HEAD(self) -> None:
      self.answer(False)

    def do_GET(self) -> None:
      if self.path.startswith("/api/models/"):
        self.list_files()
      else:
        self.answer(True)

    def list_files(self) -> None:
      repository = self.path.removeprefix("/api/models/").split("/tree/")[0]
      entries = [
        {"type": "file", "path": name, "size": len(body), "oid": COMMIT}
        for name, body in repositories.get(repository, {}).items()
      ]
      body = json.dumps(entries).encode()
      self.send_response(200)
      self.send_header("Content-Type", "application/json")
      self.send_header("Content-Length", str(len(body)))
      self.end_headers()
      self.wfile.write(body)

  with serving(Handler) as address:
    yield address
