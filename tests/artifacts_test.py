"""Exported models: the release's format read and written, damage refused."""

import hashlib
import json
import shutil

import flax.serialization
import jax
import numpy as np
import pytest

from drift_jax import artifacts
from tests.conftest import GOLDEN, assert_close

SOURCE = GOLDEN / "artifact_gen"


@pytest.fixture
def copy(tmp_path):
  shutil.copytree(SOURCE, tmp_path / "model")
  return tmp_path / "model"


def files(directory):
  folder = directory / artifacts.SUBDIRECTORY
  return folder / artifacts.PARAMS_FILE, folder / artifacts.METADATA_FILE


def test_released_artifact_gives_the_released_samples(golden):
  artifact = artifacts.load(SOURCE)
  assert artifact.kind == "gen"
  data = golden("gen_latent")
  samples = artifact.module.apply(
    {"params": artifact.params},
    data["labels"],
    data["cfg_scale"],
    noise=data["x"],
    style=data["noise_labels"],
  )
  assert_close(samples, data["samples"], 1e-4)


def test_load_then_save_is_the_same_tree(tmp_path):
  artifact = artifacts.load(SOURCE)
  artifacts.save(
    tmp_path,
    kind="gen",
    model_config=artifact.metadata["model_config"],
    params=artifact.params,
    step=artifact.metadata["step"],
    ema_decay=artifact.metadata["ema_decay"],
  )
  trees = [
    flax.serialization.msgpack_restore(files(directory)[0].read_bytes())
    for directory in (SOURCE, tmp_path)
  ]
  assert jax.tree.structure(trees[0]) == jax.tree.structure(trees[1])
  jax.tree.map(np.testing.assert_array_equal, *trees)
  metadata = json.loads(files(tmp_path)[1].read_text())
  released = dict(artifact.metadata)
  assert {k: metadata[k] for k in released} == released


def test_precision_of_storage_and_computation():
  artifact = artifacts.load(SOURCE, dtype="bfloat16")
  assert {str(x.dtype) for x in jax.tree.leaves(artifact.params)} == {
    "bfloat16"
  }
  assert str(artifact.module.dtype) == "bfloat16"
  artifact = artifacts.load(SOURCE / artifacts.SUBDIRECTORY, dtype="float32")
  assert str(artifact.module.dtype) == "float32"


def test_missing(tmp_path):
  with pytest.raises(artifacts.ArtifactError, match="metadata.json is missing"):
    artifacts.load(tmp_path)


def test_missing_parameters(copy):
  files(copy)[0].unlink()
  with pytest.raises(
    artifacts.ArtifactError, match=r"ema_params\.msgpack is missing beside"
  ):
    artifacts.load(copy)


def test_checksum_of_ours_and_of_the_release(tmp_path):
  """The release's metadata have none."""
  released = artifacts.load(SOURCE)
  assert "sha256" not in released.metadata
  digest = hashlib.sha256(files(SOURCE)[0].read_bytes()).hexdigest()
  assert released.sha256 == digest
  artifacts.save(
    tmp_path,
    kind="gen",
    model_config=released.metadata["model_config"],
    params=jax.tree.map(lambda x: 2 * x, released.params),
    step=1,
    ema_decay=0.9,
  )
  ours = artifacts.load(tmp_path)
  assert ours.sha256 == ours.metadata["sha256"] != released.sha256


def test_truncated_parameters(copy):
  params, _ = files(copy)
  params.write_bytes(params.read_bytes()[:-100])
  with pytest.raises(artifacts.ArtifactError, match="no complete msgpack"):
    artifacts.load(copy)


def test_altered_parameters_of_ours(copy):
  artifact = artifacts.load(copy)
  artifacts.save(
    copy,
    kind="gen",
    model_config=artifact.metadata["model_config"],
    params=artifact.params,
    step=1,
    ema_decay=0.9,
  )
  params, _ = files(copy)
  data = bytearray(params.read_bytes())
  data[len(data) // 2] ^= 1
  params.write_bytes(bytes(data))
  with pytest.raises(artifacts.ArtifactError, match="SHA-256"):
    artifacts.load(copy)


def test_unknown_kind_and_unreadable_metadata(copy):
  _, metadata = files(copy)
  values = json.loads(metadata.read_text())
  metadata.write_text(json.dumps(values | {"kind": "vae"}))
  with pytest.raises(artifacts.ArtifactError, match="kind='vae'.*'convnext'"):
    artifacts.load(copy)
  for content in (b"{", b"\xff\xfe", b"[]"):
    metadata.write_bytes(content)
    with pytest.raises(artifacts.ArtifactError, match="can't be read"):
      artifacts.load(copy)


def test_parameters_of_another_model(copy):
  _, metadata = files(copy)
  values = json.loads(metadata.read_text())
  values["model_config"]["depth"] = 3
  metadata.write_text(json.dumps(values))
  with pytest.raises(artifacts.ArtifactError, match="blocks_2"):
    artifacts.load(copy)


def test_pickled_weights_are_refused(copy):
  """Nothing is executed: a pickle is just bytes that are no msgpack."""
  params, _ = files(copy)
  params.write_bytes(b"\x80\x04cos\nsystem\n(S'false'\ntR.")
  with pytest.raises(artifacts.ArtifactError):
    artifacts.load(copy)
