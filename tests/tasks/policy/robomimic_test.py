"""robomimic's files, written here as robomimic does."""

import json
import logging
import sys

import h5py
import numpy as np
import pytest

from drift_jax.data.errors import DataError
from drift_jax.system import console
from drift_jax.tasks.policy.robomimic import read_robomimic

LENGTHS = {0: 4, 1: 3, 2: 5, 10: 2}


@pytest.fixture
def robomimic(tmp_path):
  """Writes a file of four episodes, one of them changed by a function."""

  def write(change=None):
    path = tmp_path / "image_abs.hdf5"
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
      group = file.create_group("data")
      for number, steps in LENGTHS.items():
        demo = group.create_group(f"demo_{number}")
        demo.attrs["num_samples"] = steps
        demo.attrs["model_file"] = "<mujoco/>"
        demo["actions"] = number + rng.uniform(-1, 1, (steps, 7))
        demo["states"] = rng.normal(size=(steps, 32))
        demo["rewards"] = np.eye(steps)[-1]
        demo["dones"] = np.eye(steps, dtype=np.int64)[-1]
        demo["obs/object"] = rng.normal(size=(steps, 10))
        demo["obs/robot0_eef_pos"] = rng.normal(size=(steps, 3))
        demo.create_dataset(
          "obs/agentview_image",
          data=rng.integers(0, 256, (steps, 8, 8, 3), dtype=np.uint8),
          compression="gzip",
        )
      group.attrs["total"] = sum(LENGTHS.values())
      group.attrs["env_args"] = json.dumps({"env_name": "Lift", "type": 1})
      file.create_group("mask")["train"] = np.array([b"demo_0", b"demo_1"])
      if change:
        change(group)
    return path

  return write


NAMES = ("object[:4]", "robot0_eef_pos", "agentview_image")


def test_reads_episodes_by_number(robomimic):
  path = robomimic()
  shown = read_robomimic(path, NAMES)
  np.testing.assert_array_equal(shown.ends, [4, 7, 12, 14])
  assert tuple(shown.observations) == NAMES
  with h5py.File(path) as file:
    for number, steps in zip(LENGTHS, shown.episodes(), strict=True):
      demo = file[f"data/demo_{number}"]
      np.testing.assert_array_equal(
        shown.actions[steps], np.float32(demo["actions"])
      )
      for name, values in shown.observations.items():
        written = demo["obs"][name.removesuffix("[:4]")][:]
        if name.endswith("[:4]"):
          written = written[:, :4]
        expected = written if written.ndim == 4 else np.float32(written)
        assert values.dtype == expected.dtype
        np.testing.assert_array_equal(values[steps], expected)


def test_the_first_episodes(robomimic):
  path = robomimic()
  shown = read_robomimic(path, ["object"], max_episodes=3)
  np.testing.assert_array_equal(shown.ends, [4, 7, 12])
  assert shown.observations["object"].shape == (12, 10)
  for count in (5, -1):
    with pytest.raises(DataError, match=f"max_episodes={count}, .* are 4"):
      read_robomimic(path, ["object"], max_episodes=count)


def unfinished(group):
  group["demo_2/dones"][-1] = 0


def shortened(group):
  values = group["demo_2/obs/object"][:-1]
  del group["demo_2/obs/object"]
  group["demo_2/obs/object"] = values


def without(name):
  def change(group):
    del group[name]

  return change


def miscounted(group):
  group["demo_2"].attrs["num_samples"] = 6


def bare(group):
  """As MimicGen has it: neither `num_samples` nor `dones`."""
  for number in LENGTHS:
    demo = group[f"demo_{number}"]
    del demo.attrs["num_samples"], demo["dones"]


def bare_and_shortened(group):
  bare(group)
  shortened(group)


def no_group(group):
  del group["demo_2"]
  group["demo_2"] = np.zeros(3)


def flat_observations(group):
  del group["demo_2/obs"]
  group["demo_2/obs"] = np.zeros((5, 10))


def bare_and_empty(group):
  bare(group)
  for name in ("actions", "obs/object"):
    del group[f"demo_2/{name}"]
    group[f"demo_2/{name}"] = np.zeros((0, 10))


def test_each_group_is_an_episode(robomimic):
  """Its length is that of its arrays where nothing else says it."""
  whole = read_robomimic(robomimic(), NAMES)
  shown = read_robomimic(robomimic(bare), NAMES)
  np.testing.assert_array_equal(shown.ends, whole.ends)
  np.testing.assert_array_equal(shown.actions, whole.actions)
  for name in NAMES:
    np.testing.assert_array_equal(
      shown.observations[name], whole.observations[name]
    )


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (unfinished, "hdf5: demo_2: an unfinished episode: .* last of its 5"),
    (shortened, "demo_2: 'object' has 4 steps, num_samples is 5"),
    (miscounted, "demo_2: 'object' has 5 steps, num_samples is 6"),
    (bare_and_shortened, "demo_2: 'object' has 4 steps, the actions have 5"),
    (bare_and_empty, "demo_2: an episode without steps"),
    (no_group, "demo_2 is no group of arrays"),
    (flat_observations, "demo_2: obs is no group of arrays"),
    (
      without("demo_2/obs/object"),
      r"demo_2: .*\['object'\] are missing; there",
    ),
    (without("demo_2/actions"), r"demo_2: \['actions'\] are missing"),
  ],
)
def test_damage_is_named(robomimic, change, message):
  path = robomimic(change)
  with pytest.raises(DataError, match=message):
    read_robomimic(path, ["object"])
  read_robomimic(path, ["object"], max_episodes=2)


@pytest.mark.parametrize("name", ["actions", "obs/object"])
@pytest.mark.parametrize("chunks", [None, (2, 10)])
def test_values_that_were_never_written_are_not_read(robomimic, name, chunks):
  """HDF5 gives space to an array, or to its chunks, when they are written."""

  def change(group):
    demo = group["demo_2"]
    shape = demo[name].shape
    del demo[name]
    demo.create_dataset(name, shape, "f8", chunks=chunks and (2, shape[1]))
    if chunks:
      demo[name][:2] = 1.0

  with pytest.raises(
    DataError, match=f"demo_2: '{name.removeprefix('obs/')}' .* never"
  ):
    read_robomimic(robomimic(change), ["object"])


def test_values_in_another_file_are_not_read(robomimic):
  def change(group):
    layout = h5py.VirtualLayout((5, 10), "f8")
    layout[:] = h5py.VirtualSource("gone.hdf5", "object", (5, 10))
    del group["demo_2/obs/object"]
    group["demo_2/obs"].create_virtual_dataset("object", layout)

  with pytest.raises(DataError, match="demo_2: 'object' lies in other"):
    read_robomimic(robomimic(change), ["object"])


def test_a_lost_episode_is_said(robomimic, caplog, monkeypatch):
  monkeypatch.setattr(console.logger, "propagate", True)
  with caplog.at_level(logging.WARNING):
    read_robomimic(robomimic(), ["object"])
    assert not caplog.records
    read_robomimic(robomimic(without("demo_1")), ["object"])
  assert "11 steps, /data says total=14" in caplog.text


def test_files_that_are_none(robomimic, tmp_path):
  with pytest.raises(DataError, match="there is no such file"):
    read_robomimic(tmp_path / "lift.hdf5", ["object"])
  (tmp_path / "text.hdf5").write_text("text")
  with pytest.raises(DataError, match="text.hdf5 can't be read"):
    read_robomimic(tmp_path / "text.hdf5", ["object"])

  def empty(group):
    for number in LENGTHS:
      del group[f"demo_{number}"]

  with pytest.raises(DataError, match="there is no /data/demo_I"):
    read_robomimic(robomimic(empty), ["object"])


def test_without_h5py(monkeypatch):
  monkeypatch.setitem(sys.modules, "h5py", None)
  with pytest.raises(DataError, match="h5py: .*requirements-robots.txt"):
    read_robomimic("lift.hdf5", ["object"])
