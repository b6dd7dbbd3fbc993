"""Files of parameters: what is read of them, how much, and damage."""

import io
import json

import flax.serialization
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from drift_jax.training import artifacts, weights
from tests.builders import save_model
from tests.models.small import MAE
from tests.process import ROOT, call

INDEX = {
  "msgpack": weights.index_msgpack,
  "safetensors": weights.index_safetensors,
}


def tree():
  """Arrays of several dtypes, shapes and depths."""
  rng = np.random.default_rng(0)
  return {
    "stem": {"kernel": rng.normal(0, 1, (3, 50, 2)).astype(np.float32)},
    "layers": {
      str(i): {"scale": rng.normal(0, 1, 5).astype(jnp.bfloat16)}
      for i in range(3)
    },
    "a_name_of_more_than_thirty_one_bytes": np.float32([]),
    "scalar": np.array(2.5, np.float32),
  }


def packed(format, arrays):
  if format == "msgpack":
    return flax.serialization.msgpack_serialize(arrays)
  return safetensors.numpy.save(traverse_util.flatten_dict(arrays, sep="/"))


def read(data, index, dtype=None):
  """All arrays of a file, by name."""
  file = io.BytesIO(data)
  found = {}
  for name, stored in index(file).items():
    found[name] = np.empty(stored.shape, dtype or stored.dtype)
    weights.read(file, name, stored, found[name])
  return found


def check(found, want):
  assert found.keys() == want.keys()
  for name, array in want.items():
    assert found[name].dtype == array.dtype, name
    np.testing.assert_array_equal(found[name], array, name)


@pytest.mark.parametrize("format", INDEX)
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_every_array_is_read_as_it_was_written(format, dtype, monkeypatch):
  monkeypatch.setattr(weights, "_BLOCK", 64)
  want = {
    name: array.astype(dtype or array.dtype)
    for name, array in traverse_util.flatten_dict(tree(), sep="/").items()
  }
  check(read(packed(format, tree()), INDEX[format], dtype), want)


def test_what_flax_splits_and_an_outer_level(monkeypatch):
  monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 256)
  monkeypatch.setattr(weights, "_BLOCK", 100)
  data = packed("msgpack", {"params": tree()})
  assert b"__msgpack_chunked_array__" in data
  check(
    read(data, weights.index_msgpack),
    traverse_util.flatten_dict(tree(), sep="/"),
  )


@pytest.mark.parametrize("format", INDEX)
def test_a_file_cut_anywhere_is_no_file(format, monkeypatch):
  monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 1024)
  data = packed(format, tree())
  for length in range(len(data)):
    with pytest.raises(weights.Damage):
      read(data[:length], INDEX[format])
  with pytest.raises(weights.Damage):
    read(data + b"\0", INDEX[format])


@pytest.mark.parametrize("format", INDEX)
def test_a_flipped_bit_never_raises_anything_else(format, monkeypatch):
  monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 1024)
  data = packed(format, tree())
  for position in range(len(data)):
    for bit in (0, 7):
      damaged = bytearray(data)
      damaged[position] ^= 1 << bit
      try:
        INDEX[format](io.BytesIO(damaged))
      except ValueError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("format", INDEX)
def test_numbers_that_are_not_finite_are_named(format):
  arrays = tree()
  arrays["layers"]["2"]["scale"][3] = np.inf
  with pytest.raises(ValueError, match="layers/2/scale holds .*not finite"):
    read(packed(format, arrays), INDEX[format])


@pytest.mark.system
def test_a_frozen_encoder_takes_its_own_memory(tmp_path):
  """In bfloat16, of a file that is 5 times as large with its decoder.

  Neither the file nor float32 copies of its arrays are in memory at once.
  """
  report = tmp_path / "report.json"
  done = call(
    ROOT / "benchmarks/load.py",
    *("--width=128", f"--folder={tmp_path}", f"--json={report}"),
  )
  assert done.returncode == 0, done.stderr
  rows = json.loads(report.read_text())["rows"]
  found = {row["name"]: row["value"] for row in rows}
  assert found["file"] > 0.4 and found["encoder"] < 0.45 * found["file"]
  # The largest array, .06 of the file, is there twice while it is placed; the
  # rest is what tracing the model takes.
  assert found["most"] - found["before"] < 0.8 * found["file"]


@pytest.mark.parametrize(
  "header",
  [
    '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [null, 4]}}',
    '{"a": {"dtype": "F32", "shape": [1], "data_offsets": ["x", 4]}}',
    '{"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}',
    '{"a": ' * 9_999,
  ],
)
def test_a_header_of_something_else_is_damage(header):
  data = len(header).to_bytes(8, "little") + header.encode() + bytes(4)
  with pytest.raises(weights.Damage):
    weights.index_safetensors(io.BytesIO(data))


def test_a_file_that_was_replaced_is_not_read(tmp_path):
  """Its checksum would be another file's."""
  folder = save_model(tmp_path / "encoder", "mae", MAE)
  found = artifacts.opened(folder)
  save_model(folder, "mae", MAE, seed=1)
  with pytest.raises(artifacts.ArtifactError, match="has changed since"):
    found.read(found.artifact.params)
