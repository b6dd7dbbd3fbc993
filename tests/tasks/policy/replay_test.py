"""Replay buffers, on files as Diffusion Policy's are written."""

import json

import numpy as np
import pytest
import tensorstore

from drift_jax.system.errors import DataError
from drift_jax.tasks.policy.demonstrations import Demonstrations
from drift_jax.tasks.policy.replay import read_replay, write_replay

ENDS = np.array([4, 9, 11])


def write_array(folder, values):
  """As zarr 2 has it: blosc with lz4, byte shuffle, '.' between chunks."""
  metadata = {
    "shape": list(values.shape),
    "chunks": [min(3, len(values)), *values.shape[1:]],
    "dtype": values.dtype.str,
    "compressor": {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1},
  }
  spec = {
    "driver": "zarr",
    "kvstore": {"driver": "file", "path": str(folder)},
    "metadata": metadata,
  }
  tensorstore.open(spec, create=True).result().write(values).result()


def arrays():
  """Names and types of PushT's file, the images small; actions are doubles."""
  rng = np.random.default_rng(0)
  steps = ENDS[-1]
  return {
    "data/action": rng.uniform(0, 512, (steps, 2)),
    "data/img": rng.integers(0, 256, (steps, 8, 8, 3)).astype(np.float32),
    "data/keypoint": rng.uniform(0, 512, (steps, 9, 2)).astype(np.float32),
    "data/n_contacts": np.ones((steps, 1), np.float32),
    "data/state": rng.uniform(0, 512, (steps, 5)).astype(np.float32),
    "meta/episode_ends": ENDS.astype(np.int64),
  }


@pytest.fixture
def replay(tmp_path):
  """Writes a replay buffer, with some arrays changed; None leaves one out."""

  def write(**changes):
    folder = tmp_path / "pusht_cchi_v7_replay.zarr"
    changed = {
      ("meta/" if name == "episode_ends" else "data/") + name: values
      for name, values in changes.items()
    }
    for name, values in (arrays() | changed).items():
      if values is not None:
        write_array(folder / name, values)
    return folder

  return write


@pytest.mark.parametrize("episodes", [0, 2])
def test_reads_what_is_asked_for(replay, episodes):
  names = ("img", "keypoint", "state[:2]")
  shown = read_replay(replay(), names, max_episodes=episodes)
  ends = ENDS[: episodes or 3]
  written = {name: values[: ends[-1]] for name, values in arrays().items()}
  assert tuple(shown.observations) == names
  assert shown.observations["img"].dtype == np.uint8
  for name, values in (
    ("img", written["data/img"]),
    ("keypoint", written["data/keypoint"].reshape(-1, 18)),
    ("state[:2]", written["data/state"][:, :2]),
  ):
    np.testing.assert_array_equal(shown.observations[name], values)
  np.testing.assert_array_equal(
    shown.actions, np.float32(written["data/action"])
  )
  np.testing.assert_array_equal(shown.ends, ends)
  assert shown.ends.dtype == np.int64


@pytest.mark.parametrize(
  ("names", "episodes", "message"),
  [
    (["states", "img", "goal"], 0, r"\['goal', 'states'\] are missing; .*'im"),
    (["state[:6]"], 0, r"'state\[:6\]': it has 5 columns"),
    (["state[2:]"], 0, r"'state\[2:\]'.*NAME\[:K\]"),
    (["state"], 4, "max_episodes=4, .* are 3"),
  ],
)
def test_what_can_not_be_asked_for(replay, names, episodes, message):
  with pytest.raises(DataError, match=f"zarr: .*{message}"):
    read_replay(replay(), names, max_episodes=episodes)


def changed_image(place, value):
  image = arrays()["data/img"]
  image[place] = value
  return {"img": image}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (changed_image((7, 2, 3, 1), np.nan), "'img': step 7 .* nan"),
    (changed_image(..., 1.0), "'img': no value is above 1"),
    ({"state": np.zeros(11, np.float32)}, r"'state': shape \(11,\): want one"),
    ({"action": None}, r"\['action'\] are missing; .*'img', 'keypoint'"),
    ({"episode_ends": None}, "meta/episode_ends"),
    ({"episode_ends": np.array([4, 9])}, "an unfinished episode: .* 9"),
  ],
)
def test_damage_is_named(replay, changes, message):
  with pytest.raises(DataError, match=f"zarr: .*{message}"):
    read_replay(replay(**changes), ["img", "state"])


def test_a_folder_without_data(tmp_path):
  with pytest.raises(DataError, match="no replay buffer .*curl .*pusht"):
    read_replay(tmp_path, ["state"])


@pytest.mark.parametrize(
  "chunk", ["data/action/3.0", "data/img/1.0.0.0", "meta/episode_ends/0"]
)
def test_a_lost_chunk_is_not_read_as_zeros(replay, chunk):
  folder = replay()
  (folder / chunk).unlink()
  with pytest.raises(DataError, match=f"zarr: .*{chunk}.* is missing"):
    read_replay(folder, ["img", "state"])
  if chunk.startswith("data/action"):  # steps 9 and 10
    assert len(read_replay(folder, ["state"], max_episodes=2)) == 2
  (folder / chunk).write_bytes(b"no blosc at all")
  with pytest.raises(DataError, match="zarr: "):
    read_replay(folder, ["img", "state"])


def demonstrations():
  """More than a chunk; the last states are zeros, which are data too."""
  rng = np.random.default_rng(1)
  state = rng.normal(size=(400, 3)).astype(np.float32)
  state[161:] = 0
  return Demonstrations(
    {
      "image": rng.integers(0, 256, (400, 4, 4, 3)).astype(np.uint8),
      "state": state,
    },
    rng.normal(size=(400, 2)).astype(np.float32),
    np.array([30, 390, 400]),
  )


def test_what_is_written_is_read(tmp_path):
  shown, path = demonstrations(), tmp_path / "own.zarr"
  write_replay(path, shown)
  again = read_replay(path, ["image", "state"])
  for name, values in shown.arrays.items():
    np.testing.assert_array_equal(again.arrays[name], values)
  np.testing.assert_array_equal(again.ends, shown.ends)
  # Compressed, in several chunks, under the names of the format.
  stored = json.loads((path / "data" / "image" / ".zarray").read_text())
  assert stored["compressor"]["id"] == "blosc" and stored["dtype"] == "|u1"
  assert (path / "data" / "action" / "2.0").is_file()
  assert json.loads((path / ".zgroup").read_text()) == {"zarr_format": 2}
  assert [x.name for x in tmp_path.iterdir()] == ["own.zarr"]
  with pytest.raises(DataError, match="own.zarr is there"):
    write_replay(path, shown)


def test_nothing_is_left_of_what_failed(tmp_path, monkeypatch):
  shown = demonstrations()
  part = Demonstrations(
    {"state[:1]": shown.observations["state"]}, shown.actions, shown.ends
  )
  with pytest.raises(DataError, match=r"\['state\[:1\]'\] are parts"):
    write_replay(tmp_path / "own.zarr", part)

  def full(*args, **kwargs):
    raise OSError("no space left")

  monkeypatch.setattr("pathlib.Path.write_text", full)
  with pytest.raises(OSError, match="no space"):
    write_replay(tmp_path / "own.zarr", shown)
  assert not list(tmp_path.iterdir())
