"""The page and its server: images, limits, hostile clients, a real browser."""

import asyncio
import base64
import contextlib
import http.client
import io
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse

import jax
import numpy as np
import pytest
from PIL import Image
from playwright import sync_api

from drift_jax import sampling
from drift_jax.metrics.images import save_image
from drift_jax.serve.app import make_app
from drift_jax.serve.limits import Limits, RateLimiter
from drift_jax.serve.server import make_server
from drift_jax.serve.worker import Worker, cut
from tests.process import process_environment, wait_for
from tests.programs import call_each
from tests.small_generator import NAMES, save_generator

ROOT = pathlib.Path(__file__).parent.parent
CHROMIUM = "/usr/bin/chromium"
JSON = {"content-type": "application/json"}
# The second one could be cut into smaller ones that the devices share.
SIZES = (8, 24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return save_generator(tmp_path_factory.mktemp("generator"))


@pytest.fixture(scope="module")
def model(folder):
  return sampling.load(folder)


class Gate:
  """A model that draws one batch each time it is let through, or fails."""

  def __init__(self, model):
    self._model = model
    self.passes = threading.Semaphore(0)
    self.drawn = 0
    self.error = None

  def __getattr__(self, name):
    return getattr(self._model, name)

  def batches(self, *arguments, **others):
    assert self.passes.acquire(timeout=60)
    self.drawn += 1
    if self.error is not None:
      raise self.error
    return self._model.batches(*arguments, **others)


class Served:
  """A running server and requests to it."""

  def __init__(self, port, worker=None):
    self.port = port
    self.worker = worker
    self.url = f"http://127.0.0.1:{port}"

  @contextlib.contextmanager
  def open(self, method, path, body=None, headers=None):
    """A response whose body is still to come."""
    connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
    with contextlib.closing(connection) as client:
      client.request(method, path, body, headers or {})
      with client.getresponse() as response:
        yield response

  def request(self, method, path, body=None, headers=None):
    with self.open(method, path, body, headers) as response:
      return response.status, response.headers, response.read()

  def post(self, body, **headers):
    """(status, lines) of a request for images."""
    if not isinstance(body, bytes):
      body = json.dumps(body).encode()
    status, _, answer = self.request(
      "POST", "/api/sample", body, JSON | headers
    )
    return status, [json.loads(line) for line in answer.splitlines()]

  def stream(self, **asked):
    return self.open("POST", "/api/sample", json.dumps(asked), JSON)

  def raw(self, *parts):
    """What the server answers to bytes, until it closes or says nothing."""
    with socket.create_connection(("127.0.0.1", self.port), 60) as client:
      for part in parts:
        client.sendall(part)
      client.settimeout(2)
      answer = b""
      with contextlib.suppress(TimeoutError):
        while data := client.recv(2**16):
          answer += data
          if b"\r\n\r\n" in answer and answer.endswith((b"}\n", b"request.")):
            break
    return answer.decode()


@contextlib.contextmanager
def serving(model, *, max_waiting=8, root_path="", server=(), **limits):
  worker = Worker(model, SIZES, max_waiting)
  app = make_app(
    model,
    worker,
    Limits(**{"max_images": 64, "requests_per_minute": 10_000, **limits}),
    name="small",
    hosts=(),
    root_path=root_path,
  )
  server = make_server(app, **dict(server))
  with socket.create_server(("127.0.0.1", 0)) as listener:
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
      wait_for(lambda: server.started)
      yield Served(listener.getsockname()[1], worker)
    finally:
      server.should_exit = True
      thread.join(60)
      worker.stop()


@pytest.fixture(scope="module")
def served(model):
  """With all that is compiled already."""
  with serving(model) as found:
    found.worker.warm_up()
    yield found


def decoded(line):
  with Image.open(io.BytesIO(base64.b64decode(line["png"]))) as image:
    return np.asarray(image)


# Images.


def test_images_are_those_of_sample(tmp_path, model, served):
  """The very files that `python -m drift_jax.sample --out=FOLDER/` writes."""
  asked = {"alpha": 1.5, "seed": 2**32 - 1, "style": [3, -1, 0, 2]}
  status, (*images, last) = served.post(
    {"labels": [3, 0, 2], "count": 8, **asked}
  )
  assert status == 200
  assert [line["index"] for line in images] == list(range(24))
  labels = np.repeat([3, 0, 2], 8).astype(np.int32)
  assert [line["label"] for line in images] == labels.tolist()
  expected = [
    pixels
    for batch in model.batches(labels, **asked, batch_size=24)
    for pixels in batch.rows(batch.pixels)
  ]
  assert np.std(expected) > 20
  for line, pixels in zip(images, expected, strict=True):
    save_image(pixels, tmp_path / "image.png")
    written = (tmp_path / "image.png").read_bytes()
    assert base64.b64decode(line["png"]) == written
  assert last["images"] == 24 and last["device_ms"] > 0
  assert last["images_per_second"] > 0 and last["waited_ms"] >= 0


def test_batches_make_no_difference(model, served):
  """30 images are cut into 24 and, filled up, 8."""
  asked = {"alpha": 2.0, "seed": 7}
  _, lines = served.post({"labels": [1], "count": 30, **asked})
  images = np.stack([decoded(line) for line in lines[:-1]]).astype(int)
  expected = model.sample([1], count=30, **asked, batch_size=8).pixels()
  assert len(images) == 30
  # Another program may round the last bit to the other side of a level.
  assert np.abs(images - expected).max() <= 1
  assert np.mean(images != expected) < 1e-3


def test_cut():
  for sizes in ((1, 8, 32), (8,), (8, 16), (3, 7, 100)):
    for count in range(1, 300):
      parts = list(cut(count, sizes))
      assert sum(valid for _, valid in parts) == count
      assert all(size in sizes for size, _ in parts)
      # All but the last are full; padding is at most half of the last.
      assert all(size == valid for size, valid in parts[:-1])
      size, valid = parts[-1]
      assert valid >= size / 2 or size == sizes[0], (sizes, count)


def test_no_request_compiles(served):
  compiled = []

  def listen(event, duration, **others):
    del duration, others
    if "backend_compile" in event:
      compiled.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    for n in range(13):
      asked = {"labels": [n % 4] * (n % 2 + 1), "count": 1 + 2 * n}
      asked |= {"alpha": 1 + n / 13, "seed": n, "style": [n] if n % 3 else None}
      status, lines = served.post(asked)
      assert status == 200 and lines[-1]["images"] == len(lines) - 1
    assert not compiled
    jax.jit(lambda x: x * 41 + 1)(np.float32(1))
    assert compiled  # It does listen.
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def test_model_and_files(served):
  _, headers, body = served.request("GET", "/api/model")
  about = json.loads(body)
  assert headers["content-type"] == "application/json"
  assert about["class_names"] == list(NAMES) and about["num_classes"] == 4
  assert about["alpha_range"] == [1.0, 3.0] and about["max_images"] == 64
  assert (about["step"], about["ema_decay"]) == (3, 0.9)
  assert about["image_shape"] == [8, 8, 1] and about["name"] == "small"
  kinds = {"": "text/html", "page.css": "text/css"}
  kinds |= {"page.js": "text/javascript", "icon.svg": "image/svg+xml"}
  for path, kind in kinds.items():
    status, headers, body = served.request("GET", f"/{path}")
    assert status == 200 and headers["content-type"].startswith(kind)
    links = set(re.findall(rb"https?://[^\"]*", body))
    assert body and links <= {b"http://www.w3.org/2000/svg"}, "from elsewhere"


# Hostile clients.


def asks(**changes):
  return json.dumps({"labels": [0], **changes}).encode()


DEEP = b"[" * 60_000
BODIES = [
  (b"", 400, "the body is no JSON: Expecting value"),
  (b'"' + b"x" * 999 + b'"', 400, f'the body is "{"x" * 56}...: want'),
  (DEEP, 400, "the body nests too deep"),
  (b'{"labels":' + DEEP, 400, "the body nests too deep"),
  (b'{"labels":[0],"labels":[1]}', 400, "a key is given twice"),
  (b'{"labels":[0],"alpha":NaN}', 400, "NaN is no number of JSON"),
  (asks(**{"\ud800\n": 1}), 422, 'unknown key "\\ud800\\n": valid keys'),
  (b"{}", 422, "labels=null must be a list of 1 to 64 class indices"),
  (asks(labels=[0, 4]), 422, "labels[1]=4 must be an integer in [0, 3]"),
  (asks(labels=[True]), 422, "labels[0]=true must be an integer in [0, 3]"),
  (asks(labels=[10**4000]), 422, "labels[0]=10000"),
  (asks(labels=[0, 1, 2], count=22), 422, "count=22 are 66 images: at most 64"),
  (asks(alpha=3.01), 422, "alpha=3.01 must be a number in [1.0, 3.0]"),
  (asks(seed=2**32), 422, "seed=4294967296 must be an integer in [0, 42949672"),
  (asks(style=[0.0]), 422, "style=[0.0] must be null or a list of integers"),
  (asks(style=[0] * 9000), 422, "has 9000 indices: want one, or 4"),
  (asks(style=[16]), 422, "16 is not in [0, 16), nor -1"),
  (asks() + b" " * 10_000_000, 413, "the body is larger than 65536 bytes"),
]


def test_bad_bodies(served):
  for body, expected, part in BODIES:
    status, (line,) = served.post(body)
    assert list(line) == ["error"] and part in line["error"], line
    assert status == expected
    assert "\n" not in line["error"] and len(line["error"]) < 400


def test_other_requests(served):
  for method, path, headers, expected, part in (
    ("GET", "/%2e%2e/%2e%2e/etc/passwd", {}, 404, "is none of ['GET /'"),
    ("GET", "/" + "a" * 5000, {}, 404, "Not Found"),
    ("GET", "/api/sample", {}, 405, "'POST /api/sample'"),
    ("POST", "/", JSON, 405, "Method Not Allowed"),
    ("POST", "/api/sample", {"content-type": "text/plain"}, 415, "'text/plain"),
    ("GET", "/api/model", {"host": "127.0.0.1:80@evil.example"}, 403, "host"),
    ("POST", "/api/sample", {"host": "evil", **JSON}, 403, "--allowed_hosts"),
    ("GET", "/", {"host": ""}, 403, "host '' is none of ['127.0.0.1',"),
    # What a proxy says of the host is not believed.
    ("GET", "/", {"host": "evil", "x-forwarded-host": "localhost"}, 403, ""),
  ):
    status, answered, body = served.request(method, path, b"", headers)
    assert status == expected, path
    (line,) = body.splitlines()
    assert part in json.loads(line)["error"], line
    assert_careful(answered)


def assert_careful(headers):
  policy = headers["content-security-policy"]
  assert "default-src 'self'" in policy and "unsafe" not in policy
  assert headers["x-content-type-options"] == "nosniff"
  assert not any(name.startswith("access-control") for name in headers)
  assert "server" not in headers


def test_names_of_this_machine(served):
  for host in ("LocalHost:8000", "127.0.0.1:1", "[::1]", "[::1]:8"):
    status, headers, _ = served.request("GET", "/", headers={"host": host})
    assert status == 200, host
    assert_careful(headers)


def test_what_no_client_library_sends(served):
  """Over a bare socket; afterwards the server serves as before."""
  start = b"POST /api/sample HTTP/1.1\r\nContent-Type: application/json\r\n"
  host = b"Host: localhost\r\n"
  chunked = start + host + b"Transfer-Encoding: chunked\r\n\r\n"
  chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
  answers = {
    "413": (chunked, *[chunk] * 3),
    "200": (chunked, b"e\r\n" + b'{"labels":[0]}' + b"\r\n0\r\n\r\n"),
    "400": (chunked, b"zz\r\n"),
    "403": (start.replace(b"1.1", b"1.0") + b"Content-Length: 0\r\n\r\n",),
  }
  for status, parts in answers.items():
    assert served.raw(*parts).split(" ")[1] == status, status
  for garbage in (
    start + host + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    start + host + b"X: " + b"a" * 100_000 + b"\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
  ):
    with contextlib.suppress(ConnectionResetError):
      answer = served.raw(garbage)
      assert answer.startswith("HTTP/1.1 400 "), (garbage[:200], answer)
  # Leaves in the middle of its request.
  with socket.create_connection(("127.0.0.1", served.port)) as client:
    client.sendall(start + host + b"Content-Length: 99\r\n\r\n{")
  assert served.post({"labels": [0]})[0] == 200


def test_slow_bodies(model):
  start = b"POST /api/sample HTTP/1.1\r\nContent-Type: application/json\r\n"
  with serving(model, body_seconds=0.2) as served:
    answer = served.raw(start + b"Host: [::1]\r\nContent-Length: 9\r\n\r\n{")
  assert answer.startswith("HTTP/1.1 408 "), answer
  assert "the body took longer than 0.2 s" in answer


def test_slow_readers_lose_their_place(model):
  """A client that takes no byte of the answer."""
  worker = Worker(model, SIZES, max_waiting=0)
  limits = Limits(max_images=64, requests_per_minute=9, send_seconds=0.1)
  app = make_app(model, worker, limits, name="small", hosts=())
  headers = {"host": "localhost", **JSON}
  scope = {
    **{"type": "http", "method": "POST", "path": "/api/sample"},
    "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
    "client": ("127.0.0.1", 1),
  }
  messages = iter([{"type": "http.request", "body": asks(count=8)}])

  async def receive():
    for message in messages:
      return message
    await asyncio.Event().wait()

  async def send(message):
    if message.get("body"):
      await asyncio.Event().wait()

  asyncio.run(asyncio.wait_for(app(scope, receive, send), 60))
  assert not worker.jobs
  worker.stop()


# Limits.


def test_rate_limiter():
  now = [0.0]
  rate = RateLimiter(3, clock=lambda: now[0])
  assert [rate.take("a") for _ in range(4)] == [0, 0, 0, 20]
  assert rate.take("b") == 0
  now[0] = 19.0
  assert rate.take("a") == pytest.approx(1)
  now[0] = 20.5
  assert rate.take("a") == 0 and rate.take("a") > 19
  now[0] = 1e6
  assert [rate.take("a") > 0 for _ in range(4)] == [False] * 3 + [True]
  for number in range(5000):
    rate.take(str(number))
  assert len(rate._buckets) == 4096


def test_too_many_requests(model):
  with serving(model, requests_per_minute=2) as served:
    for _ in range(2):  # Bad ones count as well.
      assert served.post(b"{}")[0] == 422
    status, headers, body = served.request(
      "POST", "/api/sample", asks(), JSON | {"x-forwarded-for": "10.0.0.9"}
    )
    assert status == 429 and 1 <= int(headers["retry-after"]) <= 30
    assert "more than 2 requests a minute from 127.0.0.1: wait" in str(body)
    assert served.request("GET", "/")[0] == 200


def test_queue(model):
  """One is drawn, one waits, others are refused; who leaves makes place."""
  gate = Gate(model)
  with serving(gate, max_waiting=1) as served, contextlib.ExitStack() as stack:
    drawn = stack.enter_context(served.stream(labels=[0], count=32))
    waiting = served.open("POST", "/api/sample", asks(), JSON)
    stack.enter_context(waiting)
    status, headers, body = served.request("POST", "/api/sample", asks(), JSON)
    assert status == 503 and int(headers["retry-after"]) >= 1
    assert "all places in the queue are taken" in json.loads(body)["error"]
    # Images come as they are ready: 24 of these, the others are not drawn.
    gate.passes.release()
    lines = [json.loads(drawn.readline()) for _ in range(24)]
    assert [line["index"] for line in lines] == list(range(24))
    assert gate.drawn == 1
    # Both leave: the second batch of one, and the other, are never drawn.
    stack.close()
    wait_for(lambda: not served.worker.jobs)
    gate.passes.release(2)
    status, lines = served.post({"labels": [1]})
    assert status == 200 and len(lines) == 2
    assert gate.drawn <= 3  # The worker was behind the gate for one already.


def test_silent_connections_keep_nobody_out(served):
  """More of them than may be open, some in the middle of a request's head."""
  with contextlib.ExitStack() as stack:
    for number in range(300):
      client = socket.create_connection(("127.0.0.1", served.port), 60)
      stack.enter_context(client)
      if number % 2:
        client.sendall(b"GET / HTTP/1.1\r\nhost: local")
    assert served.request("GET", "/")[0] == 200
    assert served.post({"labels": [0]})[0] == 200


def test_requests_keep_their_connections(model):
  """Where all are in the middle of one, a new one is told so."""
  gate = Gate(model)
  limits = {"connections": 2, "request_seconds": 1}
  with serving(gate, server=limits) as served, contextlib.ExitStack() as stack:
    streams = [
      stack.enter_context(served.stream(labels=[i], count=1)) for i in range(2)
    ]
    assert served.request("GET", "/")[0] == 503
    time.sleep(1.2)  # More than an idle connection would be given.
    gate.passes.release(2)
    for stream in streams:
      assert json.loads(stream.readlines()[-1])["images"] == 1


@pytest.mark.parametrize(
  "start", [b"", b"GET / HTTP/1.1\r\nhost: [::1]\r\n\r\n"]
)
def test_connection_without_a_request_is_closed(model, start):
  """Whether it says nothing or a header a byte, from the start or later."""
  with (
    serving(model, server={"request_seconds": 1}) as served,
    socket.create_connection(("127.0.0.1", served.port), 60) as client,
    contextlib.suppress(ConnectionError),
  ):
    client.sendall(start)
    client.settimeout(0.2)
    for _ in range(100):
      with contextlib.suppress(TimeoutError):
        if not client.recv(2**16):
          return
        client.sendall(b"GET / HTTP/1.1\r\n" if start else b"G")
        start = b""
    raise AssertionError("it is still open")


def test_page_below_a_prefix(model):
  """The page's own addresses lead to its files, whoever takes the prefix."""
  with serving(model, root_path="/user/me/images") as served:
    for folder in ("/", "/user/me/images/"):
      _, _, page = served.request("GET", folder)
      _, _, script = served.request("GET", f"{folder}page.js")
      links = re.findall(rb'(?:href|src|fetch)[=(]"([^"]+)"', page + script)
      assert {b"page.js", b"page.css", b"api/model", b"api/sample"} < set(links)
      for link in links:
        there = urllib.parse.urljoin(folder, link.decode())
        method = "POST" if there.endswith("sample") else "GET"
        status, _, _ = served.request(method, there, asks(), JSON)
        assert there.startswith(folder) and status == 200, there
    status, headers, _ = served.request("GET", "/user/me/images")
    there = urllib.parse.urljoin("/user/me/images", headers["location"])
    assert (status, there) == (307, "/user/me/images/")
    assert served.request("GET", "/user/me/imagesque/")[0] == 404


def test_failing_model(model, caplog):
  gate = Gate(model)
  with serving(gate) as served:
    gate.error = RuntimeError("out of memory")
    gate.passes.release(2)
    status, lines = served.post({"labels": [0]})
    assert status == 200
    assert lines == [{"error": "the model failed; the server's log says why"}]
    gate.error = None
    assert served.post({"labels": [0]})[1][-1]["images"] == 1
  assert "out of memory" in caplog.text


# Real processes.


@pytest.mark.system
def test_mistakes(folder, tmp_path):
  source = f"--from={folder}"
  of_conditions = save_generator(tmp_path, condition_size=2)
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    cases = {
      f"--port={port}: Address already in use": (source, f"--port={port}"),
      "--host=256.0.0.1 --port=0: ": (source, "--host=256.0.0.1", "--port=0"),
      "--host= is empty": (source, "--host="),
      "--root_path=me must be": (source, "--root_path=me"),
      "--batch_sizes=8,0: ['0'] must be": (source, "--batch_sizes=8,0"),
      "nowhere": ("--from=nowhere", "--port=0"),
      "which the page does not ask": (f"--from={of_conditions}", "--port=0"),
    }
    told = call_each("drift_jax.serve.__main__", cases.values())
  for part, (_, line) in zip(cases, told, strict=True):
    assert line.startswith("Error: ") and part in line


@pytest.mark.system
def test_process(folder):
  process = subprocess.Popen(
    [
      *(sys.executable, "-m", "drift_jax.serve", f"--from={folder}"),
      *("--port=0", "--batch_sizes=1,4", "--max_images=9"),
    ],
    cwd=ROOT,
    env=process_environment(),
    stderr=subprocess.PIPE,
    text=True,
  )
  with process:
    line = next(line for line in process.stderr if "Serving" in line)
    try:
      (port,) = re.findall(r"on http://127\.0\.0\.1:(\d+) ", line)
      served = Served(int(port))
      assert b"<!doctype html>" in served.request("GET", "/")[2]
      status, lines = served.post({"labels": [1, 2], "count": 4})
      assert status == 200 and lines[-1]["images"] == 8
      assert served.post({"labels": [1], "count": 10})[0] == 422
      # One that keeps its connection must not keep the server.
      with socket.create_connection(("127.0.0.1", int(port))):
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
    finally:
      process.kill()  # Of no effect where it has ended.
  assert process.returncode == 0, rest
  assert rest.splitlines()[-1].endswith("Stopped."), rest
  assert "Traceback" not in rest


# A real browser.


@pytest.fixture(scope="module")
def chromium():
  if not os.path.exists(CHROMIUM):
    assert not os.environ.get("CI"), f"{CHROMIUM} is missing"
    pytest.skip(f"{CHROMIUM} is missing: apt-get install chromium")
  with sync_api.sync_playwright() as playwright:
    browser = playwright.chromium.launch(
      executable_path=CHROMIUM, args=["--no-sandbox"]
    )
    yield browser
    browser.close()


@pytest.fixture
def page(chromium):
  """A page that says nothing on its console, and asks nobody else.

  Chromium itself says there which requests were refused.
  """
  context = chromium.new_context(viewport={"width": 1280, "height": 800})
  context.set_default_timeout(60_000)
  page = context.new_page()
  said, asked = [], []
  page.on("console", lambda message: said.append(message.text))
  page.on("pageerror", lambda error: said.append(str(error)))
  page.on("request", lambda request: asked.append(request.url))
  yield page
  context.close()
  refused = "Failed to load resource: the server responded with a status of "
  assert [text for text in said if not text.startswith(f"{refused}4")] == []
  hosts = {url.split("/")[2] for url in asked if not url.startswith("blob:")}
  assert len(hosts) == 1 and hosts.pop().startswith("127.0.0.1:")


def saved(download):
  with Image.open(download.path()) as image:
    return np.asarray(image)


@pytest.mark.system
def test_page(model, served, page):
  page.goto(served.url)
  expect = sync_api.expect
  expect(page.locator("#generate")).to_be_enabled()
  expect(page).to_have_title("small · drift_jax")
  assert page.locator("#chosen li").count() == 4  # All, of so few.
  page.get_by_role("button", name="Clear").click()
  # By name: two of four; Enter chooses the first, a click another.
  search = page.get_by_label("Search classes")
  search.fill("Shark")
  expect(page.locator("#matches")).to_have_text("2 of 4 match")
  assert page.locator("#classes li:visible").count() == 2
  search.press("Enter")
  search.fill("3")
  page.get_by_role("checkbox", name="3 hammer shark").check()
  assert page.locator("#chosen li").all_inner_texts() == [
    "× 2 white shark, shark",
    "× 3 hammer shark",
  ]
  alpha = page.get_by_label("alpha")
  for _ in range(10):
    alpha.press("ArrowRight")
  expect(page.locator("#alpha-value")).to_have_text("1.50")
  page.get_by_label("Per class").fill("5")
  page.get_by_label("Seed", exact=True).fill("12")
  expect(page.locator("#total")).to_contain_text("2 classes × 5 = 10 images")
  page.get_by_role("button", name="Generate").click()
  expect(page.locator("#figures")).to_be_visible()
  images = page.locator("#grid img")
  assert images.count() == 10
  for name in ("latency", "first", "device"):
    assert re.fullmatch(r"[\d.]+ m?s", page.locator(f"#{name}").inner_text())
  sizes = images.evaluate_all(
    "all => all.map(i => [i.naturalWidth, i.width, i.complete])"
  )
  assert sizes == [[8, 64, True]] * 10
  # What is downloaded: the grid and an image of the same samples in Python.
  expected = model.sample([2, 3], count=5, alpha=1.5, seed=12, batch_size=8)
  with page.expect_download() as download:
    page.get_by_role("button", name="Download grid").click()
  grid = saved(download.value)
  assert (grid[..., 3] == 255).all() and (grid.shape[2]) == 4
  np.testing.assert_array_equal(grid[..., :3], expected.grid())
  # Of a size that one can see, or as it is.
  for scale in (32, 1):
    page.get_by_label("Image size").select_option(str(scale))
    with page.expect_download() as download:
      images.nth(7).click()
    assert download.value.suggested_filename == "seed12_image7_class3.png"
    pixels = expected.pixels()[7].repeat(3, axis=-1)
    pixels = pixels.repeat(scale, axis=0).repeat(scale, axis=1)
    np.testing.assert_array_equal(saved(download.value)[..., :3], pixels)
  command = page.locator("#command").inner_text()
  assert "--labels=2,3 --count=5 --alpha=1.5 --seed=12" in command
  assert page.url.endswith("/?classes=2-3&alpha=1.5&seed=12&count=5")
  # Mistakes, in words, and in sight.
  page.get_by_label("Per class").fill("40")
  page.get_by_role("button", name="Generate").click()
  expect(page.get_by_role("alert")).to_contain_text("80 images are too many")
  for name in ("#generate", "#error"):
    box = page.locator(name).bounding_box()
    assert 0 <= box["y"] and box["y"] + box["height"] <= 800
  page.get_by_label("Per class").fill("1")
  page.get_by_label("Style").fill("16")
  page.get_by_label("Style").press("Enter")
  expect(page.get_by_role("alert")).to_contain_text("16 is not in [0, 16)")


@pytest.mark.system
def test_a_link_draws_the_same_images(model, served, page):
  """Or says what is wrong with it."""
  expect, link = sync_api.expect, "classes=0,2-3&alpha=1.5&seed=12&count=2"
  page.goto(f"{served.url}/?{link}&style=3")
  expect(page.locator("#figures")).to_be_visible()
  assert page.url.endswith(f"?{link}&style=3")
  asked = {"count": 2, "alpha": 1.5, "seed": 12, "style": 3}
  with page.expect_download() as download:
    page.get_by_role("button", name="Download grid").click()
  grid = saved(download.value)[..., :3]
  expected = model.sample([0, 2, 3], **asked, batch_size=8).grid()
  np.testing.assert_array_equal(grid, expected)
  for wrong, message in (
    ("classes=2-4", "classes=2-4: want indices from 0 to 3"),
    ("classes=1&alpha=9", "alpha=9: want 1 to 3"),
    ("classes=1&seed=-1", "Seed: want a whole number"),
  ):
    page.goto(f"{served.url}/?{wrong}")
    expect(page.get_by_role("alert")).to_contain_text(message)
    assert page.locator("#grid img").count() == 0


@pytest.mark.system
def test_page_of_one_class(served, page):
  """There is nothing to choose; no label before the images."""

  def describe(route):
    about = route.fetch().json()
    about.update(num_classes=1, class_names=["0"])
    route.fulfill(json=about)

  page.route("**/api/model", describe)
  page.goto(served.url)
  page.get_by_role("button", name="Generate").click()
  sync_api.expect(page.locator("#figures")).to_be_visible()
  assert not page.locator("#classes").is_visible()
  assert not page.locator("#grid h2").is_visible()
  assert page.locator("#grid img").count() == 8
  assert "classes" not in page.locator("#about").inner_text()


@pytest.mark.system
def test_page_while_it_waits(model, page):
  """On a phone: images as they come, cancel, a model that fails."""
  gate = Gate(model)
  expect = sync_api.expect
  page.set_viewport_size({"width": 390, "height": 844})
  with serving(gate) as served:
    page.goto(served.url)
    page.get_by_label("Per class").fill("8")
    generate = page.get_by_role("button", name="Generate")
    expect(generate).to_be_enabled()  # It can't have the focus before.
    generate.press("Enter")
    expect(page.locator("#result")).to_have_attribute("aria-busy", "true")
    assert page.locator("#grid ul li").count() == 32
    gate.passes.release()
    expect(page.locator("#status")).to_have_text("24 of 32 images…")
    expect(page.locator("#grid img")).to_have_count(24)
    cancel = page.get_by_role("button", name="Cancel")
    expect(cancel).to_be_focused()
    cancel.press("Enter")
    expect(page.locator("#status")).to_have_text("Cancelled: 24 of 32 images.")
    expect(generate).to_be_focused()
    wait_for(lambda: not served.worker.jobs)
    expect(page.get_by_role("button", name="Download grid")).to_be_enabled()
    gate.error = RuntimeError("broken")
    gate.passes.release(2)
    generate.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("the model failed")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    # Leaves while it is served.
    gate.error = None
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#result")).to_have_attribute("aria-busy", "true")
    page.goto("about:blank")
    wait_for(lambda: not served.worker.jobs)
    gate.passes.release(9)


@pytest.mark.system
def test_page_of_a_thousand_classes(served, page):
  """Without names, or with indices as names: each is shown once."""

  def describe(route):
    about = route.fetch().json()
    names = [str(i) for i in range(1000)]
    about.update(num_classes=1000, class_names=names, style_tokens=0)
    route.fulfill(json=about)

  page.route("**/api/model", describe)
  page.goto(served.url)
  sync_api.expect(page.locator("#classes li")).to_have_count(1000)
  assert page.locator("#chosen li").count() == 10
  first = page.locator("#classes label").first
  assert first.inner_text().strip() == "0"
  assert not page.locator("#style").is_visible()
  page.get_by_label("Search classes").fill("99")
  assert page.locator("#classes li:visible").count() == 11
  page.get_by_role("button", name="Choose shown").click()
  sync_api.expect(page.locator("#chosen")).to_contain_text("and 9 more")
