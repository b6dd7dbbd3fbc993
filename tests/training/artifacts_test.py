"""Exported models: the release's format read and written, damage refused."""

import errno
import hashlib
import json
import shutil
import tarfile

import flax.serialization
import jax
import numpy as np
import pytest
import safetensors.numpy
from etils import epath
from flax import traverse_util

from drift_jax.models import release
from drift_jax.models.vae import build_vae
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


@pytest.mark.slow
def test_released_encoder(tmp_path, golden):
  """Its features, and the tree that comes out when it is saved again."""
  with tarfile.open(GOLDEN / "artifact_mae.tar.gz") as archive:
    archive.extractall(tmp_path / "released", filter="data")
  (folder,) = (tmp_path / "released").rglob(artifacts.SUBDIRECTORY)
  artifact = artifacts.load(folder)
  assert artifact.kind == "mae"
  data = golden("mae_latent")
  features = jax.jit(
    lambda params, x: artifact.module.apply(
      {"params": params}, x, method="features"
    )
  )(artifact.params, data["x"])
  for key, value in features.items():
    if not key.startswith(("layer1", "global")):  # constants, see its README
      assert_close(value, data[f"act/{key}"], 1e-4, key)
  artifacts.save(
    tmp_path / "again",
    kind="mae",
    model_config=artifact.metadata["model_config"],
    params=artifact.params,
    step=artifact.metadata["step"],
    ema_decay=artifact.metadata["ema_decay"],
  )
  again = files(tmp_path / "again")[0].read_bytes()
  assert again == (folder / artifacts.PARAMS_FILE).read_bytes()


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


def save_vae(directory, value=0.5):
  """A small autoencoder whose parameters are all `value`."""
  config = {
    "in_channels": 3,
    "latent_channels": 2,
    "block_out_channels": [4, 8],
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "scaling_factor": 0.25,
  }
  flat = {
    name: np.full(shape, value, np.float32)
    for name, shape in release.parameter_shapes("vae", config).items()
  }
  params = traverse_util.unflatten_dict(flat, sep="/")
  artifacts.save(
    directory,
    kind="vae",
    model_config=config,
    params=params,
    step=None,
    ema_decay=None,
    source={"location": "somewhere"},
  )
  return config, params


def test_autoencoder(tmp_path):
  config, params = save_vae(tmp_path)
  artifact = artifacts.load(tmp_path)
  assert artifact.kind == "vae"
  assert artifact.metadata["source"] == {"location": "somewhere"}
  assert artifact.metadata["step"] is artifact.metadata["ema_decay"] is None
  assert artifact.module == build_vae(
    in_channels=3,
    latent_channels=2,
    widths=(4, 8),
    blocks_per_level=1,
    norm_groups=2,
    scaling_factor=0.25,
    dtype="float32",
    remat=False,
  )
  jax.tree.map(np.testing.assert_array_equal, artifact.params, params)
  assert artifact.sha256 == artifact.metadata["sha256"]
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
  metadata.write_text(json.dumps(values | {"kind": "vea"}))
  with pytest.raises(artifacts.ArtifactError, match="kind='vea'.*'vae'"):
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


# In the format of safetensors.


@pytest.fixture
def tensors(tmp_path):
  """The released generator as safetensors; another precision may be stored."""

  def save(dtype="float32"):
    artifact = artifacts.load(SOURCE)
    artifacts.save(
      tmp_path / "model",
      kind="gen",
      model_config=artifact.metadata["model_config"],
      params=jax.tree.map(lambda x: x.astype(dtype), artifact.params),
      step=1,
      ema_decay=0.9,
      facts={"class_names": ["a", "b"]},
      format="safetensors",
    )
    return tmp_path / "model" / artifacts.TENSORS_FILE

  return save


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_are_read_back(tensors, dtype):
  path = tensors(dtype)
  artifact, original = artifacts.load(path.parent), artifacts.load(SOURCE)
  assert artifact.module == original.module
  jax.tree.map(
    np.testing.assert_array_equal,
    artifact.params,
    jax.tree.map(lambda x: x.astype(dtype), original.params),
  )
  assert artifact.metadata["class_names"] == ["a", "b"]
  assert artifact.metadata["format"] == "safetensors"
  again = artifacts.load(path.parent, dtype="float32").params
  assert {x.dtype.name for x in jax.tree.leaves(again)} == {"float32"}


def rewrite(path, change):
  """Other contents, with a checksum that fits."""
  data = change(path.read_bytes())
  path.write_bytes(data)
  config = path.with_name(artifacts.CONFIG_FILE)
  values = json.loads(config.read_text())
  values["sha256"] = hashlib.sha256(data).hexdigest()
  config.write_text(json.dumps(values))


def other_tensors(change):
  def rewritten(data):
    flat = safetensors.numpy.load(data)
    change(flat)
    return safetensors.numpy.save(flat)

  return rewritten


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda data: data[:-100], "no complete safetensors file"),
    (lambda data: data[:3], "no complete safetensors file"),
    (
      lambda data: b"\x80\x04cos\nsystem\n(S'false'\ntR.",
      r"beginning with b'\\x80.*no complete safetensors file",
    ),
    (
      other_tensors(lambda flat: flat.pop("pos_embed")),
      r"missing \(1\): pos_embed",
    ),
    (
      other_tensors(lambda flat: flat.update(more=flat["pos_embed"])),
      r"unexpected \(1\): more",
    ),
    (
      other_tensors(lambda flat: flat.update(pos_embed=np.zeros(3, "f4"))),
      r"pos_embed has shape \(3,\), not",
    ),
    (
      other_tensors(lambda flat: flat.update(pos_embed=np.zeros(3, "i4"))),
      "pos_embed has dtype I32, valid options are",
    ),
  ],
)
def test_tensors_that_are_not_those_of_the_model(tensors, change, message):
  path = tensors()
  rewrite(path, change)
  with pytest.raises(artifacts.ArtifactError, match=message):
    artifacts.load(path.parent)


def test_altered_tensors(tensors):
  path = tensors()
  data = bytearray(path.read_bytes())
  data[-5] ^= 1
  path.write_bytes(bytes(data))
  with pytest.raises(artifacts.ArtifactError, match="SHA-256"):
    artifacts.load(path.parent)


@pytest.mark.parametrize(
  "content",
  [
    flax.serialization.msgpack_serialize([1, 2]),
    flax.serialization.msgpack_serialize({"a": "b"}),
    flax.serialization.msgpack_serialize({"a": np.zeros(3, np.int32)}),
  ],
)
def test_msgpack_of_something_else(copy, content):
  files(copy)[0].write_bytes(content)
  with pytest.raises(artifacts.ArtifactError, match="want .*arrays"):
    artifacts.load(copy)
