"""Paths of users: names that mean something to a library, listings."""

import numpy as np
import pytest

from drift_jax import config as config_lib
from drift_jax.metrics.images import save_image
from drift_jax.metrics.sample_folder import SampleFolder
from drift_jax.system import storage
from drift_jax.training.workdir import check_workdir


@pytest.mark.parametrize(
  ("path", "character"),
  [
    ("runs/lr=[1e-3]", "["),
    ("runs/a\\b", "\\"),
    ("runs/two\nlines", "\n"),
    ("gs://bucket/a#b", "#"),
  ],
)
def test_names_that_no_checkpoint_can_have(
  tmp_path, monkeypatch, path, character
):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(storage.StorageError) as caught:
    storage.check(path, write=True)
  text = str(caught.value)
  assert f"holds {character!r}" in text and "\n" not in text
  if not storage.is_remote(path):
    with pytest.raises(config_lib.ConfigError, match="--workdir="):
      check_workdir(path)
  assert not list(tmp_path.iterdir())


def test_the_working_directory_counts(tmp_path, monkeypatch):
  (tmp_path / "[a]").mkdir()
  storage.check(tmp_path / "run", write=True)
  storage.check(tmp_path / "[a]")  # to read from
  monkeypatch.chdir(tmp_path / "[a]")
  with pytest.raises(storage.StorageError, match=r"holds '\['"):
    storage.check("run", write=True)


def test_a_folder_of_images_whose_name_is_a_pattern(tmp_path):
  folder = tmp_path / "[a]"
  opened = SampleFolder(folder, {}, [0, 0, 0])
  save_image(np.zeros((2, 2, 3), np.uint8), folder / "000001.png")
  assert opened.missing().tolist() == [0, 2]
