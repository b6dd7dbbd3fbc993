"""A hub of models on this machine, for tests of downloads and pushes."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading

COMMIT = 40 * "a"
# May write, to repositories of OWNER.
TOKEN, OWNER = "hf_of_tests", "me"
# The hub asks for files of more bytes as large ones.
_REGULAR = 10_000


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
def hub(
  repositories,
  *,
  cut=(),
  claimed=None,
  downloads=None,
  private=(),
  uploads=None,
):
  """A hub on this machine -> its address.

  Args:
    repositories: {'OWNER/NAME' or 'datasets/OWNER/NAME': {FILE: bytes}}; None
      for the files of a gated one.
    cut: FILEs whose first download ends halfway.
    claimed: {FILE: its size, as the hub tells it}, if it isn't that.
    downloads: list to which (OWNER/NAME, FILE, first byte) of each download is
      added.
    private: set of repositories that are; pushes add to it.
    uploads: {SHA-256: bytes} of large files that were pushed; None refuses
      them.
  """
  uncut = set()

  class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, format, *args):
      del format, args

    def answer(self, with_body: bool) -> None:
      repository, _, rest = self.path.lstrip("/").partition("/resolve/")
      revision, _, name = rest.partition("/")
      files = repositories.get(repository)
      if repository in repositories and files is None:
        self.send_response(403)
        self.send_header("X-Error-Code", "GatedRepo")
      elif files is None or revision not in ("main", COMMIT):
        self.send_response(404)
        missing = "RepoNotFound" if files is None else "RevisionNotFound"
        self.send_header("X-Error-Code", missing)
      elif name not in files:
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", COMMIT)
      else:
        if with_body and downloads is not None:
          downloads.append((repository, name, self.first_byte()))
        self.send_file(name, files[name], with_body)
        return
      self.send_header("Content-Length", "0")
      self.end_headers()

    def first_byte(self) -> int:
      asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
      return int(asked[1]) if asked else 0

    def send_file(self, name, body, with_body: bool) -> None:
      first = self.first_byte()
      size = (claimed or {}).get(name, len(body))
      self.send_response(206 if first else 200)
      if first:
        self.send_header("Content-Range", f"bytes {first}-{size - 1}/{size}")
      self.send_header("X-Repo-Commit", COMMIT)
      self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
      self.send_header("Content-Length", str(size - first))
      self.end_headers()
      if not with_body:
        return
      if name in cut and name not in uncut:
        uncut.add(name)
        body = body[: len(body) // 2]
        self.close_connection = True
      self.wfile.write(body[first:])

    def do_HEAD(self) -> None:
      self.answer(False)

    def do_GET(self) -> None:
      if self.path.startswith("/api/"):
        self.list_files()
      else:
        self.answer(True)

    def do_POST(self) -> None:
      """Answers what huggingface_hub.HfApi.upload_folder asks without Xet."""
      body = self.rfile.read(int(self.headers["Content-Length"]))
      path = self.path.partition("?")[0]
      repository = path.removeprefix("/api/models/").removeprefix("/")
      repository = "/".join(repository.split("/")[:2]).removesuffix(".git")
      if self.headers.get("Authorization") != f"Bearer {TOKEN}":
        self.send_json({"error": "Invalid username or password."}, 401)
      elif path == "/api/validate-yaml":
        self.send_json({})
      elif path == "/api/repos/create":
        self.create(json.loads(body))
      elif "/preupload/" in path:
        files = [
          {
            "path": file["path"],
            "uploadMode": "lfs" if file["size"] > _REGULAR else "regular",
            "shouldIgnore": False,
          }
          for file in json.loads(body)["files"]
        ]
        self.send_json({"files": files})
      elif path.endswith("/info/lfs/objects/batch"):
        objects = json.loads(body)["objects"]
        self.send_json({"objects": [self.large(**x) for x in objects]})
      else:
        assert "/commit/" in path, path
        self.commit(repository, [json.loads(x) for x in body.splitlines()])

    def create(self, asked) -> None:
      repository = f"{asked['organization']}/{asked['name']}"
      answer = {"url": f"{address}/{repository}"}
      if asked["organization"] != OWNER:
        self.send_json({"error": "You don't have the rights"}, 403)
      elif repository in repositories:
        self.send_json(answer | {"error": "You already created it"}, 409)
      else:
        repositories[repository] = {}
        if asked.get("visibility") == "private":
          private.add(repository)
        self.send_json(answer)

    def large(self, oid, size):
      """What is to be done for a large file: nothing if it is here."""
      upload = {"upload": {"href": f"{address}/lfs/{oid}"}}
      is_here = uploads is not None and oid in uploads
      return {"oid": oid, "size": size} | (
        {} if is_here else {"actions": upload}
      )

    def do_PUT(self) -> None:
      body = self.rfile.read(int(self.headers["Content-Length"]))
      if uploads is None:
        self.send_json({"error": "no space"}, 403)
      else:
        uploads[self.path.rpartition("/")[2]] = body
        self.send_json({})

    def commit(self, repository, lines) -> None:
      for line in lines:
        value = line["value"]
        if line["key"] == "file":
          body = base64.b64decode(value["content"])
          repositories[repository][value["path"]] = body
        elif line["key"] == "lfsFile":
          repositories[repository][value["path"]] = uploads[value["oid"]]
      url = f"{address}/{repository}/commit/{COMMIT}"
      self.send_json({"commitUrl": url, "commitOid": COMMIT})

    def list_files(self) -> None:
      path = self.path.split("?")[0].removeprefix("/api/")
      path, *tree = path.removeprefix("models/").split("/tree/")
      repository, *revision = path.split("/revision/")
      files = repositories.get(repository, {})
      is_known = revision in ([], ["main"], [COMMIT])
      is_here = repository in repositories and files is not None
      if not tree and not (is_here and is_known):
        self.send_response(404 if repository not in repositories else 403)
        error = "GatedRepo" if files is None else "RepoNotFound"
        self.send_header(
          "X-Error-Code", error if is_known else "RevisionNotFound"
        )
        self.send_header("Content-Length", "0")
        self.end_headers()
        return
      entries = [
        {"type": "file", "path": name, "size": len(body), "oid": COMMIT}
        for name, body in files.items()
      ]
      siblings = [{"rfilename": e["path"], "size": e["size"]} for e in entries]
      info = {"id": repository, "sha": COMMIT, "siblings": siblings}
      info["private"] = repository in private
      self.send_json(entries if tree else info)

    def send_json(self, value, status=200) -> None:
      body = json.dumps(value).encode()
      self.send_response(status)
      self.send_header("Content-Type", "application/json")
      self.send_header("Content-Length", str(len(body)))
      self.end_headers()
      self.wfile.write(body)

  with serving(Handler) as address:
    yield address
