"""The authors' artifacts from a hub: online, offline, damaged, unknown."""

import json
import pathlib
import tarfile

import pytest

from drift_jax import artifacts
from tests.conftest import GOLDEN
from tests.fake_hub import COMMIT, hub
from tests.process import call

TRY_EACH = """
import sys
from drift_jax import artifacts
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
    path
    for path in (tmp_path / "cache").rglob("ema_params.msgpack")
    if "/gen/" in str(path) and "Goodeat" in str(path)
  ]
  done = call("-c", TRY_EACH, "hf://tiny", "hf://unseen", **offline)
  lines = done.stdout.splitlines()
  assert lines[0] == expected and "hf://unseen" in lines[1]
  blob = blob.resolve()
  data = bytearray(blob.read_bytes())
  data[len(data) // 2] ^= 1
  blob.write_bytes(bytes(data))
  done = call("-c", TRY_EACH, "hf://tiny", **offline)
  assert "is damaged: its checksum is" in done.stdout
  assert str(blob) in done.stdout


def test_metadata_of_a_run_is_no_artifact(tmp_path):
  """A workdir has a config.json too."""
  (tmp_path / "config.json").write_text(json.dumps({"task": "generator"}))
  with pytest.raises(artifacts.ArtifactError, match="no exported model in"):
    artifacts.load(tmp_path)
