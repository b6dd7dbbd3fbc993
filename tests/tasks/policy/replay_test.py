"""Replay buffers, on files as Diffusion Policy's are written."""

import json

import numpy as np
import pytest
import tensorstore

from drift_jax.data.errors import DataError
from drift_jax.tasks.policy.demonstrations import Demonstrations
from drift_jax.tasks.policy.replay import read_replay, write_replay

ENDS = np.array([4, 9, 11])


def write_array(folder, values, **metadata):
  """As zarr 2 has it: blosc with lz4, byte shuffle, '.' between chunks."""
  compressor = {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1}
  tensorstore.open(
    {
      "driver": "zarr",
      "kvstore": {"driver": "file", "path": str(folder)},
      "metadata": {
        "shape": list(values.shape),
        "chunks": [min(3, len(values)), *values.shape[1:]],
        "dtype": values.dtype.str,
        "compressor": compressor,
      }
      | metadata,
    },
    create=True,
  ).result().write(values).result()


def arrays():
  """Names and types of PushT's file, the images small."""
  rng = np.random.default_rng(0)
  steps = ENDS[-1]
  return {
    "data/action": rng.uniform(0, 512, (steps, 2)).astype(np.float32),
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
    for group in ("", "data"):
      (folder / group / ".zgroup").write_text(json.dumps({"zarr_format": 2}))
    return folder

  return write


def test_reads_what_is_asked_for(replay):
  names = ("img", "keypoint", "state[:2]")
  shown = read_replay(replay(), names)
  written = arrays()
  assert tuple(shown.observations) == names
  image = shown.observations["img"]
  assert image.dtype == np.uint8
  np.testing.assert_array_equal(image, written["data/img"])
  np.testing.assert_array_equal(
    shown.observations["keypoint"], written["data/keypoint"].reshape(11, 18)
  )
  np.testing.assert_array_equal(
    shown.observations["state[:2]"], written["data/state"][:, :2]
  )
  np.testing.assert_array_equal(shown.actions, written["data/action"])
  np.testing.assert_array_equal(shown.ends, ENDS)
  assert shown.ends.dtype == np.int64


def test_the_first_episodes(replay):
  folder = replay()
  first = read_replay(folder, ["img", "state"], max_episodes=2)
  np.testing.assert_array_equal(first.ends, ENDS[:2])
  np.testing.assert_array_equal(first.actions, arrays()["data/action"][:9])
  assert len(first.observations["img"]) == 9
  for count in (4, -1):
    with pytest.raises(DataError, match=f"max_episodes={count}, .* are 3"):
      read_replay(folder, ["state"], max_episodes=count)


def test_doubles_become_floats(replay):
  state = arrays()["data/state"].astype(np.float64)
  action = arrays()["data/action"].astype(np.float64)
  shown = read_replay(replay(state=state, action=action), ["state"])
  assert shown.observations["state"].dtype == np.float32
  np.testing.assert_array_equal(shown.actions, arrays()["data/action"])


@pytest.mark.parametrize(
  ("names", "message"),
  [
    (["states", "img", "goal"], r"\['goal', 'states'\] are missing; .*'state'"),
    (["action"], r"\['action'\] are missing"),
    (["state[:6]"], r"'state\[:6\]': it has 5 columns"),
    (["img[:3]"], "an image has no first columns"),
    (["state[2:]"], r"'state\[2:\]': want 'NAME', or 'NAME\[:K\]'"),
    (["state[:0]"], r"'state\[:0\]': want"),
    ([], "no observations are asked for"),
  ],
)
def test_names_that_do_not_fit(replay, names, message):
  with pytest.raises(DataError, match=message):
    read_replay(replay(), names)


def changed_image(place, value):
  image = arrays()["data/img"]
  image[place] = value
  return image


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"img": changed_image((7, 2, 3, 1), 3.5)},
      "'img': step 7 has the value 3.5",
    ),
    ({"img": changed_image((7, 2, 3, 1), 256)}, "'img': step 7 .* 256"),
    ({"img": changed_image((7, 2, 3, 1), -1)}, "'img': step 7 .* -1"),
    ({"img": changed_image((7, 2, 3, 1), np.nan)}, "'img': step 7 .* nan"),
    ({"img": changed_image(..., 1.0)}, "'img': no value is above 1"),
    ({"state": np.zeros((10, 5), np.float32)}, "zarr: 'state' has 10 steps"),
    ({"state": np.zeros(11, np.float32)}, r"'state': shape \(11,\): want one"),
    ({"action": np.full((11, 2), np.inf, np.float32)}, "step 0 has inf"),
    ({"action": None}, r"want data/action .* data/ has \['img', 'keypoint'"),
    ({"episode_ends": None}, "want data/action and meta/episode_ends"),
    ({"episode_ends": np.array([4, 9])}, "zarr: an unfinished episode: .* 9"),
    ({"episode_ends": np.array([9, 4, 11])}, "must grow"),
  ],
)
def test_damage_is_named(replay, changes, message):
  with pytest.raises(DataError, match=message):
    read_replay(replay(**changes), ["img", "state"])


def test_ends_beyond_the_data(replay):
  folder = replay(episode_ends=np.array([4, 15]))
  with pytest.raises(DataError, match=r"zarr: 'state'.*15"):
    read_replay(folder, ["state"], max_episodes=2)


def test_a_folder_without_data(tmp_path):
  with pytest.raises(DataError, match="no replay buffer .*curl .*pusht"):
    read_replay(tmp_path, ["state"])


def test_unreadable_chunks(replay):
  folder = replay()
  (folder / "data" / "state" / "1.0").write_bytes(b"no blosc at all")
  with pytest.raises(DataError, match="zarr: 'state': "):
    read_replay(folder, ["state"])
  read_replay(folder, ["keypoint"])


@pytest.mark.parametrize(
  "chunk",
  ["data/action/2.0", "data/state/0.0", "data/img/1.0.0.0"],
)
def test_a_missing_chunk_is_not_read_as_zeros(replay, chunk):
  folder = replay()
  (folder / chunk).unlink()
  name, number = chunk.rsplit("/", 1)
  with pytest.raises(DataError, match=f"chunk {number} of .*/{name} is"):
    read_replay(folder, ["img", "state"])


def test_a_missing_chunk_of_the_ends_or_of_later_episodes(replay):
  folder = replay()
  (folder / "data/action/3.0").unlink()  # steps 9 and 10
  assert len(read_replay(folder, ["state"], max_episodes=2)) == 2
  (folder / "meta/episode_ends/0").unlink()
  with pytest.raises(DataError, match="chunk 0 of .*episode_ends is mis"):
    read_replay(folder, ["state"])


def test_zeros_that_were_written_are_data(tmp_path):
  still = Demonstrations(
    {"state": np.zeros((400, 3), np.float32)},
    np.zeros((400, 2), np.float32),
    np.array([400]),
  )
  write_replay(tmp_path / "still.zarr", still)
  again = read_replay(tmp_path / "still.zarr", ["state"])
  np.testing.assert_array_equal(again.actions, still.actions)


def test_what_is_written_is_read(tmp_path):
  rng = np.random.default_rng(1)
  shown = Demonstrations(
    {
      "image": rng.integers(0, 256, (400, 4, 4, 3)).astype(np.uint8),
      "state": rng.normal(size=(400, 3)).astype(np.float32),
    },
    rng.normal(size=(400, 2)).astype(np.float32),
    np.array([30, 390, 400]),
  )
  path = tmp_path / "own.zarr"
  write_replay(path, shown)
  again = read_replay(path, ["image", "state"])
  for name, values in shown.observations.items():
    np.testing.assert_array_equal(again.observations[name], values)
  np.testing.assert_array_equal(again.actions, shown.actions)
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
  shown = Demonstrations(
    {"state": np.zeros((3, 1), np.float32)},
    np.zeros((3, 1), np.float32),
    np.array([3]),
  )
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
