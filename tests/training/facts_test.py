"""A run goes on with the data that it began with, wherever these lie."""

import functools
import json
import shutil
import tarfile

import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

from configs import cifar10, policy
from drift_jax import config as config_lib
from drift_jax import tasks
from drift_jax.data import sources
from drift_jax.data.sources import names_sha256
from drift_jax.system import processes
from drift_jax.tasks import parse
from drift_jax.tasks.generator import train
from drift_jax.tasks.mae import train as train_mae
from drift_jax.tasks.policy import train as train_policy
from drift_jax.tasks.policy.demonstrations import Demonstrations
from drift_jax.tasks.policy.replay import write_replay
from drift_jax.training import facts as data_facts
from tests.data.pictures import write

CLASSES = ("cat", "dog", "owl")


@pytest.fixture(autouse=True)
def _no_training(monkeypatch):
  """What trains; before it the workdir has been opened."""
  for task in tasks.TASKS:
    trainer = tasks.trainer(task)
    monkeypatch.setattr(trainer, "run", lambda *args, **kwargs: None)


def make_images(folder):
  for label, name in enumerate(CLASSES):
    for index in range(6):
      write(folder / name / f"{index}.png", 10 * label + index, (8, 8))


def start(workdir, source, task="generator", **changes):
  """Starts a run, or goes on with it; it has a checkpoint then."""
  config = cifar10.get_config(
    "smoke" if task == "generator" else "encoder,smoke"
  )
  config.data.update(source=source, image_size=8, test_split="", held_out=0)
  config.data.crop = "none"
  config.eval.every = 0
  if task == "generator":
    config.encoders = ConfigDict()
    config.checkpoint.best_metric = ""
    config.eval.metrics = ()
    config.model.input_size = 8
    config.batch.update(positives=1, unconditional=1)
  else:
    config.generator.labels = 0
  config.update_from_flattened_dict(changes)
  if task == "generator":
    train.train_and_evaluate(config, str(workdir))
  else:
    with pytest.raises(AttributeError):  # at the end: there is no state
      train_mae.train_and_evaluate(config, str(workdir))
  (workdir / "checkpoints" / "1").mkdir(parents=True, exist_ok=True)


def files_of(workdir):
  return {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}


def check_refused(workdir, message, resume):
  """One line that says what differs, and a workdir that is as it was."""
  before = files_of(workdir)
  with pytest.raises(config_lib.ConfigError, match=message) as error:
    resume()
  assert "\n" not in str(error.value) and "new workdir" in str(error.value)
  assert files_of(workdir) == before


@pytest.fixture(params=["generator", "mae"])
def run(request, tmp_path):
  """(folder of images, workdir, what goes on) of a run with a checkpoint."""
  images, workdir = tmp_path / "images", tmp_path / "run"
  make_images(images)

  def resume():
    start(workdir, f"folder:{images}", request.param)

  resume()
  return images, workdir, resume


def test_an_encoder_of_before_goes_on_with_few_images(tmp_path):
  """What its generator will take is asked for when it begins."""
  images = tmp_path / "images"
  make_images(images)
  few = {"generator.labels": 1, "generator.positives": 99}
  go = functools.partial(start, source=f"folder:{images}", task="mae")
  with pytest.raises(config_lib.ConfigError, match="generator.positives=99"):
    go(tmp_path / "new", **few)
  go(tmp_path / "old")
  go(tmp_path / "old", **few)


def rename_class(images):
  (images / "owl").rename(images / "ant")


def add_images(images):
  write(images / "dog" / "6.png", 90, (8, 8))


def replace_images(images):
  write(images / "dog" / "6.png", 90, (8, 8))
  (images / "cat" / "0.png").unlink()


def rename_file(images):
  (images / "dog" / "0.png").rename(images / "dog" / "9.png")


def add_class(images):
  for index in range(4):
    write(images / "emu" / f"{index}.png", 90 + index, (8, 8))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (rename_class, "class 0 was 'cat', now 'ant'; .*class 2 was 'owl', now 'd"),
    (add_images, r"images: 18, now 19; class 1 \(dog\) had 6 images, now 7"),
    (replace_images, r"data \(class 0 \(cat\) had 6 images, now 5; class 1"),
    (add_class, "num_classes: 3 -> 4.*3 classes, now 4, new: 'emu'"),
  ],
)
def test_other_images_are_no_resume(run, change, message):
  images, workdir, resume = run
  resume()
  change(images)
  check_refused(workdir, message, resume)


@pytest.mark.parametrize(
  "before, now", [("generator", "mae"), ("mae", "generator")]
)
def test_a_run_of_another_task_is_no_resume(tmp_path, before, now):
  make_images(tmp_path / "images")
  source = f"folder:{tmp_path / 'images'}"
  start(tmp_path / "run", source, before)
  check_refused(
    tmp_path / "run",
    f"another config; .*task: '{before}' -> '{now}'",
    lambda: start(tmp_path / "run", source, now),
  )


def test_data_may_move(tmp_path):
  make_images(tmp_path / "here" / "images")
  changes = {"data.data_dir": str(tmp_path / "here")}
  start(tmp_path / "run", "folder:images", **changes)
  (tmp_path / "there").mkdir()
  shutil.move(tmp_path / "here" / "images", tmp_path / "there")
  changes = {"data.data_dir": str(tmp_path / "there")}
  start(tmp_path / "run", "folder:images", **changes)
  config = json.loads((tmp_path / "run" / "config.json").read_text())
  assert config["data"]["data_dir"] == str(tmp_path / "there")
  start(tmp_path / "run", f"folder:{tmp_path}/there/images")
  copy = tmp_path / "copy"
  make_images(copy)
  start(tmp_path / "run", f"folder:{copy}")
  rename_class(copy)
  with pytest.raises(config_lib.ConfigError, match="class 0 was 'cat'"):
    start(tmp_path / "run", f"folder:{copy}")


def test_data_without_facts_may_move_by_their_folder(tmp_path, monkeypatch):
  """A relative source of a run that has recorded nothing of it."""
  monkeypatch.chdir(tmp_path)
  make_images(tmp_path / "images")
  start(tmp_path / "run", "folder:images")
  (tmp_path / "run" / "data.json").unlink()
  (tmp_path / "there").mkdir()
  shutil.move(tmp_path / "images", tmp_path / "there")
  changes = {"data.data_dir": str(tmp_path / "there")}
  start(tmp_path / "run", "folder:images", **changes)


def test_latents_are_known_by_their_labels():
  """They have no names; the autoencoder's checksum is compared as well."""
  facts = {"kind": "latents", "images": 3, "labels_sha256": "a"}
  facts["names_sha256"] = None
  assert data_facts.is_same_data(["x"], facts, ["x"], facts)
  assert not data_facts.is_same_data(["x"], facts, ["y"], facts)
  other = facts | {"labels_sha256": "b"}
  assert not data_facts.is_same_data(["x"], facts, ["x"], other)
  tfds = facts | {"kind": "digits"}
  assert not data_facts.is_same_data(["x"], tfds, ["x"], tfds)


def test_runs_that_have_not_recorded_their_data_go_on(run, caplog):
  images, workdir, resume = run
  facts = (workdir / "data.json").read_text()
  (workdir / "data.json").unlink()
  rename_class(images)
  check_refused(workdir, "class 0 was 'cat'", resume)
  (images / "ant").rename(images / "owl")
  resume()
  assert "has not recorded its data" in caplog.text
  assert (workdir / "data.json").read_text() == facts


def test_runs_of_one_class_go_on_with_their_guidance(tmp_path):
  """The same command, before and after one class came without guidance."""
  workdir = tmp_path / "run"
  file = workdir / "config.json"
  for index in range(9):
    write(tmp_path / "images" / f"{index}.png", index, (8, 8))

  def resume(**changes):
    start(workdir, f"folder:{tmp_path}/images", **changes)
    return json.loads(file.read_text())

  # 1. A new run has none, whatever the command says, and goes on so.
  asked = parse(cifar10.get_config("smoke"))
  values = resume()
  assert values["guidance"]["maximum"] == 1 < asked.guidance.maximum
  assert resume() == values and values["eval"]["alphas"] == [1.0]
  # 2. A run of before has it, and keeps it.
  values["guidance"]["maximum"] = asked.guidance.maximum
  values["batch"]["unconditional"] = 1
  values["eval"]["alphas"] = list(asked.eval.alphas)
  del values["data"]["exif"], values["writers"]
  file.write_text(json.dumps(values))
  written = resume()
  assert written["guidance"] == values["guidance"]
  assert written["batch"] == values["batch"]
  assert resume(**{"eval.alphas": (1.0, 2.5)})["eval"]["alphas"] == [1.0, 2.5]
  changes = {"guidance.maximum": 2.5}
  check_refused(workdir, "guidance.maximum: ", lambda: resume(**changes))


def test_the_one_class_of_a_split_may_have_its_name_of_before(tmp_path):
  """Earlier versions named it by the folder: train, where only that lay."""
  workdir = tmp_path / "run"

  def resume():
    start(workdir, f"folder:{tmp_path}/images")

  for index in range(9):
    write(tmp_path / "images" / "train" / f"{index}.png", index, (8, 8))
  resume()
  names = workdir / "classes.json"
  assert json.loads(names.read_text()) == ["images"]
  names.write_text('["train"]')
  write(tmp_path / "images" / "test" / "0.png", 9, (8, 8))
  resume()
  names.write_text('["cat"]')
  check_refused(workdir, "class 0 was 'cat', now 'images'", resume)


def test_without_a_checkpoint_any_data_will_do(run):
  images, workdir, resume = run
  (workdir / "checkpoints" / "1").rmdir()
  rename_class(images)
  resume()
  assert json.loads((workdir / "classes.json").read_text())[0] == "ant"


def test_names_are_those_of_the_records_alone(tmp_path):
  """The same in a folder, a tar, a moved folder and a part of it."""
  make_images(tmp_path / "images")
  shutil.copytree(tmp_path / "images", tmp_path / "moved")
  with tarfile.open(tmp_path / "images.tar", "w") as archive:
    archive.add(tmp_path / "images", "images")

  def names(spec):
    source = sources.open_source(
      spec,
      split="train",
      data_dir=str(tmp_path),
      class_order="",
      max_corrupt=0,
      decoder="pillow",
    )
    train, _ = sources.held_out(source, per_class=1, seed=0)
    assert names_sha256(train) == names_sha256(source)
    return names_sha256(source)

  first = names("folder:images")
  assert first == names("folder:moved") == names("tar:images.tar") != ""
  rename_file(tmp_path / "moved")
  assert names("folder:moved") != first
  assert names_sha256(sources.digits("train")) == ""


def test_other_demonstrations_of_the_same_ranges_are_no_resume(tmp_path):
  workdir = tmp_path / "run"
  rng = np.random.default_rng(0)
  state = rng.uniform(-1, 1, (60, 2)).astype(np.float32)
  state[0], state[1] = -1, 1

  def resume(episodes, values):
    shutil.rmtree(tmp_path / "own.zarr", ignore_errors=True)
    steps = 20 * episodes
    shown = Demonstrations(
      {"state": values[:steps]},
      values[:steps],
      np.arange(20, steps + 1, 20),
    )
    write_replay(tmp_path / "own.zarr", shown)
    config = policy.get_config("smoke")
    config.environment = ""
    config.data.update(
      source=f"zarr:{tmp_path}/own.zarr", episodes=0, observations=("state",)
    )
    config.eval.update(every=0, videos=0)
    train_policy.train_and_evaluate(config, str(workdir))
    (workdir / "checkpoints" / "1").mkdir(parents=True, exist_ok=True)

  resume(2, state)
  resume(2, state)
  message = "episodes: 2, now 3; steps: 40, now 60"
  check_refused(workdir, message, lambda: resume(3, state))
  other = state.copy()
  other[5] = 0
  check_refused(workdir, "values are others", lambda: resume(2, other))


def test_processes_read_the_same_data(tmp_path, monkeypatch):
  make_images(tmp_path / "images")
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "config.json").write_text("{}")
  facts = {"kind": "folder", "images": 17}
  monkeypatch.setattr(processes, "index", lambda: 3)
  monkeypatch.setattr(processes, "from_first", lambda f: [CLASSES, facts])
  with pytest.raises(
    config_lib.ConfigError, match="process 3 reads other .*images: 17, now 18"
  ):
    start(tmp_path / "run", f"folder:{tmp_path}/images")


def test_rows_of_a_table_are_of_the_same_data(tmp_path):
  """Rows that are not trained yet, or have not recorded theirs, are none."""
  paths = [epath.Path(tmp_path / name) for name in "abcd"]
  for path, images in zip(paths[1:], (12, 12, 13), strict=True):
    path.mkdir()
    (path / "data.json").write_text(json.dumps({"images": images}))
  data_facts.check_same_data(paths[:3])
  with pytest.raises(config_lib.ConfigError, match="d was .*/b .images: 12, n"):
    data_facts.check_same_data(paths)
