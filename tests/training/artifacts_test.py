"""Exported models: the release's format read and written, damage refused."""

import errno
import hashlib
import json
import shutil

import flax.serialization
import jax
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from drift_jax.models import release
from drift_jax.training import artifacts
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
  samples = jax.jit(artifact.module.apply)(
    {"params": artifact.params},
    data["labels"],
    data["cfg_scale"],
    noise=data["x"],
    style=data["noise_labels"],
  )
  assert_close(samples, data["samples"], 1e-4)


def save_again(directory, change=lambda x: x, **options):
  """The released generator, with other parameters or in another format."""
  artifact = artifacts.load(SOURCE)
  artifacts.save(
    directory,
    kind="gen",
    model_config=artifact.metadata["model_config"],
    params=jax.tree.map(change, artifact.params),
    step=artifact.metadata["step"],
    ema_decay=artifact.metadata["ema_decay"],
    **options,
  )
  return artifact


def test_load_then_save_is_the_same_tree(tmp_path):
  artifact = save_again(tmp_path)
  trees = [
    flax.serialization.msgpack_restore(files(directory)[0].read_bytes())
    for directory in (SOURCE, tmp_path)
  ]
  assert jax.tree.structure(trees[0]) == jax.tree.structure(trees[1])
  jax.tree.map(np.testing.assert_array_equal, *trees)
  metadata = json.loads(files(tmp_path)[1].read_text())
  released = dict(artifact.metadata)
  assert {k: metadata[k] for k in released} == released
  # The release's have no checksum; of ours it is that of other parameters.
  assert "sha256" not in released
  data = files(SOURCE)[0].read_bytes()
  assert artifact.sha256 == hashlib.sha256(data).hexdigest()
  save_again(tmp_path, lambda x: 2 * x)
  ours = artifacts.load(tmp_path)
  assert ours.sha256 == ours.metadata["sha256"] != artifact.sha256


def test_an_outer_level_of_the_release(copy):
  path, _ = files(copy)
  tree = flax.serialization.msgpack_restore(path.read_bytes())
  path.write_bytes(pack({"params": tree}))
  jax.tree.map(
    np.testing.assert_array_equal,
    artifacts.load(copy).params,
    artifacts.load(SOURCE).params,
  )


def test_precision_of_storage_and_computation():
  """Only what the network rounds itself is rounded beforehand."""
  artifact = artifacts.load(SOURCE, dtype="bfloat16")
  original = artifacts.load(SOURCE).params
  final, unrounded = artifact.params["final"], original["final"]
  assert final["linear"]["kernel"].dtype.name == "bfloat16"
  np.testing.assert_array_equal(
    final["linear"]["bias"], unrounded["linear"]["bias"]
  )
  np.testing.assert_array_equal(
    final["norm"]["scale"], unrounded["norm"]["scale"]
  )
  assert str(artifact.module.dtype) == "bfloat16"
  artifact = artifacts.load(SOURCE / artifacts.SUBDIRECTORY, dtype="float32")
  assert str(artifact.module.dtype) == "float32"


VAE_CONFIG = {
  "in_channels": 3,
  "latent_channels": 2,
  "block_out_channels": [4, 8],
  "layers_per_block": 1,
  "norm_num_groups": 2,
  "scaling_factor": 0.25,
}


def save_vae(directory, value=0.5):
  """A small autoencoder whose parameters are all `value`; returns them."""
  _, shapes = release.describe("vae", VAE_CONFIG)
  params = jax.tree.map(lambda x: np.full(x.shape, value, np.float32), shapes)
  artifacts.save(
    directory,
    kind="vae",
    model_config=VAE_CONFIG,
    params=params,
    step=None,
    ema_decay=None,
    source={"location": "somewhere"},
  )
  return params


def test_autoencoder(tmp_path):
  params = save_vae(tmp_path)
  artifact = artifacts.load(tmp_path)
  assert artifact.kind == "vae"
  assert artifact.metadata["source"] == {"location": "somewhere"}
  assert artifact.metadata["step"] is artifact.metadata["ema_decay"] is None
  assert artifact.module == release.describe("vae", VAE_CONFIG)[0]
  jax.tree.map(np.testing.assert_array_equal, artifact.params, params)
  rough = artifacts.load(tmp_path, dtype="bfloat16")
  assert rough.module == artifact.module.clone(dtype=np.dtype("bfloat16"))
  head = rough.params["decoder"]["head"]
  assert head["conv"]["kernel"].dtype.name == "bfloat16"
  assert head["norm"]["scale"].dtype.name == "float32"
  assert rough.sha256 == artifact.sha256


@pytest.mark.parametrize("failing", [0, 1])
def test_full_disk_leaves_the_earlier_artifact(tmp_path, monkeypatch, failing):
  save_vae(tmp_path)
  before = artifacts.load(tmp_path)
  calls = []
  path_type = type(epath.Path(tmp_path))
  write_bytes = path_type.write_bytes

  def fill(self, data):
    calls.append(self)
    if len(calls) > failing:
      write_bytes(self, data[:10])
      raise OSError(errno.ENOSPC, "No space left on device")
    write_bytes(self, data)

  monkeypatch.setattr(path_type, "write_bytes", fill)
  with pytest.raises(OSError, match="No space left"):
    save_vae(tmp_path, value=1.0)
  assert artifacts.load(tmp_path).sha256 == before.sha256
  assert sorted(files(tmp_path)[0].parent.iterdir()) == sorted(files(tmp_path))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_are_read_back(tmp_path, dtype):
  facts = {"class_names": ["a", "b"]}
  original = save_again(
    tmp_path, lambda x: x.astype(dtype), facts=facts, format="safetensors"
  )
  artifact = artifacts.load(tmp_path)
  assert artifact.module == original.module
  jax.tree.map(
    np.testing.assert_array_equal,
    artifact.params,
    jax.tree.map(lambda x: x.astype(dtype), original.params),
  )
  assert artifact.metadata["class_names"] == ["a", "b"]
  assert artifact.metadata["format"] == "safetensors"
  again = artifacts.load(tmp_path, dtype="float32").params
  assert {x.dtype.name for x in jax.tree.leaves(again)} == {"float32"}


@pytest.mark.parametrize("format", ["release", "safetensors"])
def test_altered_parameters(tmp_path, format):
  save_again(tmp_path, format=format)
  (path,) = [p for p in tmp_path.rglob("*") if p.suffix in FILES]
  data = bytearray(path.read_bytes())
  data[-5] ^= 1
  path.write_bytes(bytes(data))
  with pytest.raises(artifacts.ArtifactError, match="SHA-256"):
    artifacts.load(tmp_path)
  path.unlink()
  with pytest.raises(artifacts.ArtifactError, match=r"missing"):
    artifacts.load(tmp_path)


FILES = (".msgpack", ".safetensors")
PICKLE = b"\x80\x04cos\nsystem\n(S'false'\ntR."  # must not be executed
pack = flax.serialization.msgpack_serialize


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda data: data[:-100], "no complete msgpack"),
    (lambda _: PICKLE, "no complete msgpack"),
    (lambda _: pack([1, 2]), "want .*arrays"),
    (lambda _: pack({"a": "b"}), "want .*arrays"),
    (lambda _: pack({"a": np.zeros(3, np.int32)}), "want .*arrays"),
    (lambda _: pack({"a": np.zeros(3, np.float32)}), r"unexpected \(1\): a"),
  ],
)
def test_parameters_that_are_none(copy, change, message):
  path, _ = files(copy)
  path.write_bytes(change(path.read_bytes()))
  with pytest.raises(artifacts.ArtifactError, match=message):
    artifacts.load(copy)


@pytest.mark.parametrize("format", ["release", "safetensors"])
def test_a_parameter_that_is_not_finite(tmp_path, format):
  def spoil(leaf):
    leaf = np.array(leaf)
    leaf.flat[-1] = np.inf
    return leaf

  save_again(tmp_path, spoil, format=format)
  found = artifacts.opened(tmp_path)  # without a look at the numbers
  assert {type(x) for x in jax.tree.leaves(found.artifact.params)} == {
    jax.ShapeDtypeStruct
  }
  with pytest.raises(artifacts.ArtifactError, match="holds numbers that are"):
    artifacts.load(tmp_path)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"kind": "vea"}, "kind='vea'.*'vae'"),
    ({"model_config": {"depth": 2}}, "model_config of 'gen': missing"),
    (b"{", "can't be read"),
    (b"\xff\xfe", "can't be read"),
    (b"[]", "can't be read"),
  ],
)
def test_metadata_of_something_else(copy, change, message):
  _, path = files(copy)
  if isinstance(change, dict):
    change = json.dumps(json.loads(path.read_text()) | change).encode()
  path.write_bytes(change)
  with pytest.raises(artifacts.ArtifactError, match=message):
    artifacts.load(copy)
  with pytest.raises(artifacts.ArtifactError, match="metadata.json is missing"):
    artifacts.load(copy.parent)


def other_tensors(**changes):
  def rewritten(data):
    flat = safetensors.numpy.load(data) | changes
    kept = {k: v for k, v in flat.items() if v is not None}
    return safetensors.numpy.save(kept)

  return rewritten


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda data: data[:-100], "no complete safetensors file"),
    (lambda _: PICKLE, r"beginning with b'\\x80.*no complete safetensors file"),
    (other_tensors(pos_embed=None), r"missing \(1\): pos_embed"),
    (other_tensors(more=np.zeros(3, "f4")), r"unexpected \(1\): more"),
    (other_tensors(pos_embed=np.zeros(3, "f4")), r"has shape \(3,\), not"),
    (other_tensors(pos_embed=np.zeros(3, "i4")), "dtype I32, valid options"),
  ],
)
def test_tensors_that_are_not_those_of_the_model(tmp_path, change, message):
  """Their checksum fits."""
  save_again(tmp_path, format="safetensors")
  path = tmp_path / artifacts.TENSORS_FILE
  data = change(path.read_bytes())
  path.write_bytes(data)
  config = tmp_path / artifacts.CONFIG_FILE
  values = json.loads(config.read_text())
  values["sha256"] = hashlib.sha256(data).hexdigest()
  config.write_text(json.dumps(values))
  with pytest.raises(artifacts.ArtifactError, match=message):
    artifacts.load(tmp_path)
