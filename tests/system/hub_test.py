"""The authors' artifacts from a hub: online, offline, damaged, unknown."""

import hashlib
import json
import pathlib
import types

import huggingface_hub
import pytest
from huggingface_hub import errors

from drift_jax.system import hub as hub_lib
from drift_jax.training import artifacts, released
from tests.conftest import GOLDEN
from tests.fake_hub import COMMIT, hub
from tests.process import call
from tests.released_hub import GENERATOR, MAE, artifact_files

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
def repositories():
  """The hub as the release has it; a workdir of theirs; a torn file."""
  workdir = {
    f"run/params_ema/{path.name}": path.read_bytes()
    for path in (GOLDEN / "artifact_gen" / "params_ema").iterdir()
  }
  torn = {
    name.replace("run/", ""): data[:-100] if ".msgpack" in name else data
    for name, data in workdir.items()
  }
  theirs = artifact_files("gen", "latent_B_sota", GENERATOR, outer=True)
  theirs |= artifact_files("mae", "mae_latent_256", MAE)
  return {
    released.REPOSITORY: theirs,
    "someone/workdir": workdir,
    "someone/torn": torn,
  }


def digest(folder: pathlib.Path) -> str:
  return artifacts.load(folder).sha256


@pytest.mark.system
def test_online_then_offline(repositories, tmp_path):
  cache = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
  theirs = repositories[released.REPOSITORY]
  generator, encoder = (
    f"{kind} {hashlib.sha256(theirs[f'{place}/{name}']).hexdigest()}"
    for kind, place, name in (
      ("gen", "models/gen/jax/latent_B_sota", "ema_params.msgpack"),
      ("mae", "models/mae/jax/mae_latent_256", "ema_params.msgpack"),
    )
  )
  own = f"hf://{released.REPOSITORY}"
  expected = {
    "hf://latent_B_sota": generator,
    "hf://mae_latent_256": encoder,
    f"hf://latent_B_sota@{COMMIT}": generator,
    f"{own}/models/gen/jax/latent_B_sota": generator,
    f"{own}@{COMMIT}/models/gen/jax/latent_B_sota": generator,
    "hf://someone/workdir/run": f"gen {digest(GOLDEN / 'artifact_gen')}",
    "hf://someone/workdir": "holds no artifact .; it has ['run']",
    "hf://large": "no artifact models/gen/jax/large or models/mae/jax/large",
    "hf://someone/torn": "no complete msgpack",
    "hf://": "want hf://NAME",
  }
  with hub(repositories) as address:
    done = call("-c", TRY_EACH, *expected, HF_ENDPOINT=address, **cache)
  assert done.returncode == 0, done.stderr
  for line, words in zip(
    done.stdout.splitlines(), expected.values(), strict=True
  ):
    assert words in line, line

  sources = ("hf://latent_B_sota", "hf://latent_L_sota", "hf://latent_L_soto")
  done = call("-c", TRY_EACH, *sources, HF_ENDPOINT=address, **cache)
  found, unreached, mistyped = done.stdout.splitlines()
  assert found == generator and not done.stderr  # no word of retries
  for line in (unreached, mistyped):
    assert f"{address.removeprefix('http://')} cannot be reached (" in line
  assert "'latent_L_sota'" in mistyped and "known" not in unreached

  offline = cache | {"HF_HUB_OFFLINE": "1"}
  (blob,) = [
    path.resolve()
    for path in (tmp_path / "cache").rglob("ema_params.msgpack")
    if "/mae/" in str(path)
  ]
  data = bytearray(blob.read_bytes())
  data[len(data) // 2] ^= 1
  blob.write_bytes(bytes(data))
  sources = ("hf://latent_B_sota", "hf://unseen", "hf://mae_latent_256")
  done = call("-c", TRY_EACH, *sources, **offline)
  found, unseen, damaged = done.stdout.splitlines()
  assert found == generator and "hf://unseen" in unseen
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

  def download(repository, name, *, dry_run, **_):
    if name == artifacts.MANIFEST_FILE:
      raise errors.LocalEntryNotFoundError("no export")
    there = types.SimpleNamespace(
      will_download=False, commit_hash=COMMIT, file_size=0
    )
    return there if dry_run else str(tmp_path / "snapshots" / COMMIT / name)

  monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
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
  assert caught.value.__suppress_context__
  assert "\n" not in text and "HF_TOKEN" in text and "secret" not in text
  assert hub_lib.folders(hub_lib.Address("a/b", None, "")) == []


def test_the_steps_and_the_decay_of_their_metadata_and_of_ours():
  files = artifact_files("gen", "any", GENERATOR)
  theirs = files["models/gen/jax/any/metadata.json"]
  for metadata, expected in (
    (json.loads(theirs), (30000, 0.999)),
    ({"source": {"step_loaded": 5, "ema_selected": "ema_0.9996"}}, (5, 0.9996)),
    ({"step": 7, "ema_decay": 0.9, "source": {"file": "a"}}, (7, 0.9)),
    ({"source": None}, (None, None)),
  ):
    found = artifacts.trained_for(metadata)
    assert (found["step"], found["ema_decay"]) == expected


def test_a_disk_that_several_files_would_fill(tmp_path, monkeypatch):
  usage = type("Usage", (), {"free": 10**9})
  monkeypatch.setattr(hub_lib.shutil, "disk_usage", lambda folder: usage)
  need = hub_lib.Need("a", 6 * 10**8, tmp_path / "not" / "yet")
  hub_lib.require_space([need])
  with pytest.raises(hub_lib.HubError, match=r"a \(600 MB\), a .*1 GB free"):
    hub_lib.require_space([need, need._replace(folder=tmp_path)])


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
