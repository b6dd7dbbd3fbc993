"""robomimic's files, written here as robomimic does."""

import logging
import sys

import h5py
import numpy as np
import pytest

from drift_jax.system import console
from drift_jax.system.errors import DataError
from drift_jax.tasks.policy.robomimic import read_robomimic

LENGTHS = {0: 4, 1: 3, 2: 5, 10: 2}
NAMES = ("object[:4]", "robot0_eef_pos", "agentview_image")


@pytest.fixture
def robomimic(tmp_path):
  """Writes a file of four episodes, changed by a function."""

  def write(change=lambda data: None):
    path = tmp_path / "image_abs.hdf5"
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
      data = file.create_group("data")
      for number, steps in LENGTHS.items():
        demo = data.create_group(f"demo_{number}")
        demo.attrs["num_samples"] = steps
        demo["actions"] = number + rng.uniform(-1, 1, (steps, 7))
        demo["rewards"] = np.eye(steps)[-1]
        demo["dones"] = np.eye(steps, dtype=np.int64)[-1]
        demo["obs/object"] = rng.normal(size=(steps, 10))
        demo["obs/robot0_eef_pos"] = rng.normal(size=(steps, 3))
        demo.create_dataset(
          "obs/agentview_image",
          data=rng.integers(0, 256, (steps, 8, 8, 3), dtype=np.uint8),
          compression="gzip",
        )
      data.attrs["total"] = sum(LENGTHS.values())
      file.create_group("mask")["train"] = np.array([b"demo_0", b"demo_1"])
      change(data)
    return path

  return write


def bare(data):
  """As MimicGen has it: neither `num_samples` nor `dones`."""
  for number in LENGTHS:
    demo = data[f"demo_{number}"]
    del demo.attrs["num_samples"], demo["dones"]


@pytest.mark.parametrize("change", [lambda data: None, bare])
def test_reads_episodes_by_number(robomimic, change):
  path = robomimic(change)
  shown = read_robomimic(path, NAMES)
  np.testing.assert_array_equal(shown.ends, [4, 7, 12, 14])
  assert tuple(shown.observations) == NAMES
  with h5py.File(path) as file:
    for number, steps in zip(LENGTHS, shown.episodes(), strict=True):
      demo = file[f"data/demo_{number}"]
      written = {
        NAMES[0]: np.float32(demo["obs/object"])[:, :4],
        NAMES[1]: np.float32(demo["obs/robot0_eef_pos"]),
        NAMES[2]: demo["obs/agentview_image"][:],
        "actions": np.float32(demo["actions"]),
      }
      for name, values in shown.arrays.items():
        assert values.dtype == written[name].dtype
        np.testing.assert_array_equal(values[steps], written[name])


def test_the_first_episodes(robomimic):
  path = robomimic()
  shown = read_robomimic(path, ["object"], max_episodes=3)
  np.testing.assert_array_equal(shown.ends, [4, 7, 12])
  assert shown.observations["object"].shape == (12, 10)
  for count in (5, -1):
    with pytest.raises(DataError, match=f"max_episodes={count}, .* are 4"):
      read_robomimic(path, ["object"], max_episodes=count)


def replace(name, values=None):
  """Changes an array of an episode; None leaves it out."""

  def change(data):
    demo = data["demo_2"]
    del demo[name]
    if values is not None:
      demo[name] = values

  return change


def unwritten(name, chunks):
  """HDF5 gives space to an array, or to its chunks, when they are written."""

  def change(data):
    demo = data["demo_2"]
    shape = demo[name].shape
    del demo[name]
    made = demo.create_dataset(name, shape, "f8", chunks=chunks and (2, 7))
    if chunks:
      made[:2] = 1.0

  return change


def elsewhere(data):
  layout = h5py.VirtualLayout((5, 10), "f8")
  layout[:] = h5py.VirtualSource("gone.hdf5", "object", (5, 10))
  del data["demo_2/obs/object"]
  data["demo_2/obs"].create_virtual_dataset("object", layout)


def miscounted(data):
  data["demo_2"].attrs["num_samples"] = 6


def no_group(data):
  del data["demo_2"]
  data["demo_2"] = np.zeros(3)


def empty(data):
  bare(data)
  for name, width in (("actions", 7), ("obs/object", 10)):
    replace(name, np.zeros((0, width)))(data)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (replace("dones", np.zeros(5)), "an unfinished episode: .* last of 5"),
    (replace("obs/object", np.zeros((4, 10))), "'object' has 4 steps, .* 5"),
    (miscounted, "ends at step 6, but there are 5 steps"),
    (empty, "an episode has at least one step"),
    (no_group, "want a group"),
    (replace("obs/object"), r"\['object'\] are missing; there"),
    (unwritten("actions", None), "'actions': .* not in the file"),
    (unwritten("obs/object", True), "'object': .* not in the file"),
    (elsewhere, "'object': .* not in the file"),
  ],
)
def test_damage_is_named(robomimic, change, message):
  path = robomimic(change)
  with pytest.raises(DataError, match=f"hdf5: demo_2: .*{message}"):
    read_robomimic(path, ["object"])
  read_robomimic(path, ["object"], max_episodes=2)


def test_a_lost_episode_is_said(robomimic, caplog, monkeypatch):
  monkeypatch.setattr(console.logger, "propagate", True)
  with caplog.at_level(logging.WARNING):
    read_robomimic(robomimic(), ["object"])
    assert not caplog.records
    read_robomimic(robomimic(lambda data: data.pop("demo_1")), ["object"])
  assert "11 steps, /data says total=14" in caplog.text


def test_files_that_are_none(robomimic, tmp_path, monkeypatch):
  (tmp_path / "text.hdf5").write_text("text")
  path = robomimic(lambda data: data.clear())
  for file, message in (
    (tmp_path / "lift.hdf5", "lift.hdf5: .*No such file"),
    (tmp_path / "text.hdf5", "text.hdf5: "),
    (path, "there is no /data/demo_I"),
  ):
    with pytest.raises(DataError, match=message):
      read_robomimic(file, ["object"])
  monkeypatch.setitem(sys.modules, "h5py", None)
  with pytest.raises(DataError, match="h5py: pip install .*robots"):
    read_robomimic(path, ["object"])
