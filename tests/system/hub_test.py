"""The authors' artifacts from a hub: online, offline, damaged, unknown."""

import hashlib
import json
import pathlib
import tarfile

import huggingface_hub
import pytest
from huggingface_hub import errors

from drift_jax.system import hub as hub_lib
from drift_jax.training import artifacts
from tests.conftest import GOLDEN
from tests.fake_hub import COMMIT, hub
from tests.process import call

TRY_EACH = """
import sys
from drift_jax.training import artifacts
for source in sys.argv[1:]:
  try:
    found = artifacts.load(source)
    print(found.kind, found.sha256)
  except artifacts.ArtifactError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
  """The hub as the release has it, with the golden artifacts, and another."""
  folder = tmp_path_factory.mktemp("mae")
  with tarfile.open(GOLDEN / "artifact_mae.tar.gz") as archive:
    archive.extractall(folder, filter="data")
  (encoder,) = folder.rglob("params_ema")
  released = {}
  for place, source in (
    ("models/gen/jax/tiny", GOLDEN / "artifact_gen" / "params_ema"),
    ("models/mae/jax/tiny_mae", encoder),
  ):
    for path in source.iterdir():
      released[f"{place}/params_ema/{path.name}"] = path.read_bytes()
  torn = {
    name: data[:-100] if name.endswith(".msgpack") else data
    for name, data in released.items()
    if "/gen/" in name
  }
  return {artifacts.RELEASED_REPOSITORY: released, "someone/torn": torn}


def digest(folder: pathlib.Path) -> str:
  return artifacts.load(folder).sha256


@pytest.mark.system
def test_online_then_offline(repositories, tmp_path):
  cache = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
  expected = f"gen {digest(GOLDEN / 'artifact_gen')}"
  own = artifacts.RELEASED_REPOSITORY
  with hub(repositories) as address:
    done = call(
      "-c",
      TRY_EACH,
      "hf://tiny",
      "hf://tiny_mae",
      f"hf://tiny@{COMMIT}",
      f"hf://{own}/models/gen/jax/tiny",
      f"hf://{own}@{COMMIT}/models/gen/jax/tiny/params_ema",
      "hf://large",
      "hf://someone/torn/models/gen/jax/tiny",
      "hf://",
      HF_ENDPOINT=address,
      **cache,
    )
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  assert lines[0] == lines[2] == lines[3] == lines[4] == expected
  assert lines[1].startswith("mae ")
  assert (
    "holds no artifact models/gen/jax/large or models/mae/jax/large"
    in (lines[5])
  )
  assert "it has ['models/gen/jax/tiny', 'models/mae/jax/tiny_mae']" in lines[5]
  assert "no complete msgpack" in lines[6]
  assert "want hf://NAME" in lines[7] and len(lines) == 8

  offline = cache | {"HF_HUB_OFFLINE": "1"}
  (blob,) = [
    path.resolve()
    for path in (tmp_path / "cache").rglob("ema_params.msgpack")
    if "/mae/" in str(path)
  ]
  data = bytearray(blob.read_bytes())
  data[len(data) // 2] ^= 1
  blob.write_bytes(bytes(data))
  done = call(
    *("-c", TRY_EACH, "hf://tiny", "hf://unseen", "hf://tiny_mae"), **offline
  )
  found, unseen, damaged = done.stdout.splitlines()
  assert found == expected and "hf://unseen" in unseen
  assert "is damaged: its checksum is" in damaged and str(blob) in damaged


def test_weights_are_hashed_once(tmp_path, monkeypatch):
  for name in ("metadata.json", "ema_params.msgpack"):
    data = (GOLDEN / "artifact_gen/params_ema" / name).read_bytes()
    blob = tmp_path / "blobs" / hashlib.sha256(data).hexdigest()
    link = tmp_path / "snapshots" / COMMIT / "params_ema" / name
    for path in (blob, link):
      path.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(data)
    link.symlink_to(blob)
  monkeypatch.setattr(
    huggingface_hub,
    "hf_hub_download",
    lambda repository, name, **_: str(tmp_path / "snapshots" / COMMIT / name),
  )
  hashed, digest_of = [], hashlib.file_digest

  def count(file, *arguments):
    hashed.append(pathlib.Path(file.name).resolve())
    return digest_of(file, *arguments)

  monkeypatch.setattr(hashlib, "file_digest", count)
  found = artifacts.load("hf://someone/model")
  assert found.sha256 == blob.name and hashed.count(blob) == 1


@pytest.mark.parametrize(
  "error",
  [
    errors.HTTPError("Request URL has an unsupported protocol"),
    errors.HFValidationError("no name of a repository"),
    UnicodeEncodeError("ascii", "é", 0, 1, "not in range"),
    RuntimeError("Cannot send a request,\nas the client has been closed"),
  ],
)
def test_whatever_the_library_raises_is_one_line(monkeypatch, error):
  def fail(*names, **others):
    raise error

  monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
  monkeypatch.setattr(huggingface_hub, "list_repo_files", fail)
  monkeypatch.setenv("HF_TOKEN", "secret")
  with pytest.raises(artifacts.ArtifactError, match="hf://a/b: ") as caught:
    artifacts.load("hf://a/b")
  text = str(caught.value)
  assert "\n" not in text and "HF_TOKEN" in text and "secret" not in text
  assert hub_lib.folders(hub_lib.Address("a/b", None, "")) == []


@pytest.mark.parametrize(
  "endpoint", ["hf-mirror.com", "", "ftp://hub", "http://a\tb"]
)
def test_an_endpoint_that_is_no_url(monkeypatch, endpoint):
  monkeypatch.setenv("HF_ENDPOINT", endpoint)
  monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
  with pytest.raises(artifacts.ArtifactError, match="HF_ENDPOINT=.*https://"):
    artifacts.load("hf://a/b")


def test_metadata_of_a_run_is_no_artifact(tmp_path):
  """A workdir has a config.json too."""
  (tmp_path / "config.json").write_text(json.dumps({"task": "generator"}))
  with pytest.raises(artifacts.ArtifactError, match="no exported model in"):
    artifacts.load(tmp_path)
