"""Runs whose workdir is a bucket: a local one, real processes and this one."""

import contextlib
import dataclasses
import io
import json
import pathlib
import pickle
import signal
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
import tensorstore
from etils import epath
from PIL import Image

from configs import digits
from drift_jax import config as config_lib
from drift_jax.system import lease, storage
from drift_jax.tasks import parse
from drift_jax.tasks.mae import train as train_mae
from drift_jax.training import artifacts, checkpoint, checksums, inputs, loop
from tests import fake_bucket
from tests.data.pictures import opened, seeds_of, write
from tests.process import process_environment, wait_for
from tests.tasks.generator.train_test import (
  ROOT,
  SMOKE,
  TINY,
  assert_same_run,
  command,
)

STEPS = 20
OPTIONS = (
  SMOKE,
  *TINY,
  "--config.eval.every=8",
  "--config.eval.metrics=('fd_pixel',)",
  "--config.checkpoint.keep_latest=4",  # a killed run keeps its first ones
  f"--config.train.num_steps={STEPS}",
)
# Draws from a run and evaluates it.
READERS = """if True:
  import runpy
  import sys
  import drift_jax

  workdir = sys.argv[1].removeprefix("--workdir=")
  drift_jax.load(workdir).sample([3, 7], count=10).save(f"{workdir}/grid.png")
  sys.argv[0] = "drift_jax.evaluate"
  runpy.run_module("drift_jax.evaluate", run_name="__main__")
"""


def finish(process):
  """What it said."""
  stdout, stderr = process.communicate(timeout=240)
  assert process.returncode == 0, stderr[-3000:]
  return stdout + stderr


@pytest.fixture(scope="module")
def bucket():
  """This process and those that it starts find it."""
  with fake_bucket.serve() as served, pytest.MonkeyPatch.context() as patch:
    for name, value in served.environment.items():
      patch.setenv(name, value)
    storage.check(f"gs://{served.name}/first")  # as every program does first
    yield served


@pytest.fixture(scope="module")
def start(bucket):
  def run(module, *arguments, program=None):
    line = command(module, *arguments)
    if program:
      line = [sys.executable, "-c", program, *map(str, arguments)]
    process = subprocess.Popen(
      line,
      cwd=ROOT,
      env=process_environment(),
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    stack.enter_context(process)
    stack.callback(process.kill)
    return process

  with contextlib.ExitStack() as stack:
    yield run


def committed(bucket, workdir):
  """Steps of the checkpoints in the bucket, oldest first."""
  return sorted(
    int(name.split("/")[0])
    for name in bucket.names(f"{workdir}/checkpoints")
    if name.count("/") == 1 and name.endswith("/commit_success.txt")
    if name[0].isdigit()
  )


def test_a_folder_of_images_in_a_bucket(bucket, tmp_path):
  """As the same on the disk; not of a locked bucket, nor what is gone."""
  for index in range(6):
    name = f"{('train', 'test')[index // 4]}/{'ab'[index % 2]}/{index}.png"
    bucket.write(f"own/{name}", write(tmp_path / name, index).read_bytes())
  bucket.write("own/train/a/.hidden.png", b"-")
  bucket.write("own/train/", b"-")
  there = f"folder:gs://{bucket.name}/own"
  for split in ("train", "test"):
    local, source = opened(f"folder:{tmp_path}", split), opened(there, split)
    assert seeds_of(source) == seeds_of(local)
    assert source.labels.tolist() == local.labels.tolist()
    assert source.names_sha256() == local.names_sha256()
    assert pickle.loads(pickle.dumps(source))[1].tolist() == source[1].tolist()
  assert source.path(0) == f"gs://{bucket.name}/own/test/a/4.png"
  assert len(opened("folder:own", data_dir=f"gs://{bucket.name}")) == 4
  bucket.delete("own/test/a/4.png")
  for refused, words in (
    (lambda: source[0], "own/test/a/4.png"),
    (lambda: opened(f"{there}/none"), "nothing is there"),
    (lambda: opened(f"folder:gs://{fake_bucket.LOCKED}/own"), "locked/own: "),
    (lambda: opened(there, "val"), r"no split 'val'.*\['test', 'train'\]"),
  ):
    with pytest.raises((ValueError, OSError), match=words):
      refused()
  # Before anything of a run is opened.
  config = digits.get_config("smoke")
  for source, words in (
    (there, ""),
    (f"{there}/none", "nothing is there"),
    (f"folder:gs://{fake_bucket.LOCKED}/own", "locked/own: "),
    (f"tar:gs://{bucket.name}/own.tar", "copy it to each machine"),
    (f"tfds:gs://{bucket.name}/none", "no dataset_info.json"),
  ):
    config.data.update(source=source, image_size=8)
    (entry,) = inputs.image_inputs(parse(config), is_new=True, tested=False)
    with (
      pytest.raises((ValueError, OSError), match=words)
      if words
      else contextlib.nullcontext()
    ):
      assert entry.check() == ()


@dataclasses.dataclass
class Story:
  """Of a run that was killed, then found its newest checkpoint damaged."""

  whole: pathlib.Path  # the same run on the disk in one go
  damaged: list[str]  # objects of the newest checkpoint, of step 8
  error: str
  resumed: str


@pytest.fixture(scope="module")
def story(bucket, start, tmp_path_factory):
  whole = tmp_path_factory.mktemp("whole")
  run = OPTIONS + (f"--workdir=gs://{bucket.name}/digits",)
  killed = start("main", *run)
  wait_for(lambda: killed.poll() or committed(bucket, "digits"), 240)
  # It finds compiled what the other one has compiled.
  reference = start("main", *OPTIONS, f"--workdir={whole}")
  newest = "checkpoints/8/checksums.json"
  wait_for(lambda: killed.poll() or newest in bucket.names("digits"), 240)
  killed.send_signal(signal.SIGKILL)
  killed.communicate()
  finish(reference)
  # As if killed before later ones were whole.
  later = {n.split("/")[0] for n in bucket.names("digits/checkpoints")}
  for step in later - {"4", "8"}:
    folder = f"digits/checkpoints/{step}"
    for name in ("commit_success.txt", "checksums.json"):
      if name in bucket.names(folder):
        bucket.delete(f"{folder}/{name}")
    metadata = json.loads(bucket.read(f"{folder}/{checksums.METADATA}"))
    metadata["commit_timestamp_nsecs"] = None
    bucket.write(
      f"{folder}/{checksums.METADATA}", json.dumps(metadata).encode()
    )

  names = bucket.names("digits/checkpoints/8")
  largest = max(
    (f"digits/checkpoints/8/{name}" for name in names if "state/" in name),
    key=lambda name: len(bucket.read(name)),
  )
  bucket.write(largest, bucket.read(largest)[:-7])
  reader = checkpoint.Checkpointer(
    f"gs://{bucket.name}/digits/checkpoints", read_only=True
  )
  with pytest.raises(checkpoint.CheckpointError) as caught:
    reader.restore(None, lambda saved: saved)
  reader.close()
  assert bucket.names("digits/checkpoints/8") == names
  resumed = start("main", *run, "--config.checkpoint.on_corrupt=previous")
  return Story(whole, names, str(caught.value), finish(resumed))


@pytest.mark.system
def test_a_damaged_checkpoint_is_named_and_set_aside(bucket, story):
  url = f"gs://{bucket.name}/digits/checkpoints"
  assert f"checkpoint {url}/8 is damaged: state/" in story.error
  assert "or ask for another step: [4]" in story.error
  assert f"It is kept as {url}/damaged_8;" in story.resumed
  assert bucket.names("digits/checkpoints/damaged_8") == story.damaged


@pytest.mark.system
def test_killed_and_resumed_is_bit_equal(bucket, story, tmp_path):
  """Also what is kept: the latest, the best, none that was being saved."""
  assert "Resuming after step 4." in story.resumed
  assert_same_run(story.whole, bucket.download("digits", tmp_path), STEPS)
  steps = committed(bucket, "digits")
  folders = {n.split("/")[0] for n in bucket.names("digits/checkpoints")}
  assert folders == {*map(str, steps), "damaged_8"}
  whole = epath.Path(story.whole) / "checkpoints"
  kept = {path.name for path in whole.iterdir()}
  assert kept == {*map(str, steps)} and "4" not in kept
  for step in steps:
    folder = epath.Path(tmp_path) / "checkpoints" / str(step)
    assert checksums.compare(folder) == ([], True)
    sums = json.loads(bucket.read(f"digits/checkpoints/{step}/checksums.json"))
    assert len(sums) > 10


@pytest.mark.system
def test_the_workdir_holds_what_is_promised(bucket, story):
  names = bucket.names("digits")
  assert json.loads(bucket.read("digits/config.json"))["seed"] == 0
  for picture in ("samples/step_0000016.png", "plots/frechet.png"):
    with Image.open(io.BytesIO(bucket.read(f"digits/{picture}"))) as image:
      assert min(image.size) > 80
  events = [name for name in names if name.startswith("events.out.tfevents.")]
  held = [b"drift_rms" in bucket.read(f"digits/{name}") for name in events]
  # Of the killed process, up to its last checkpoint, and of the other one.
  assert held == [True, True]
  # Nothing was half written, and nothing written into the working directory.
  assert not [name for name in names if name.endswith(".tmp")]
  assert not (ROOT / "gs:").exists()


@pytest.mark.system
def test_samples_and_figures_of_a_run_in_a_bucket(bucket, start, story):
  workdir = f"gs://{bucket.name}/digits"
  reading = start(
    "evaluate",
    f"--workdir={workdir}",
    *("--alphas=1,2", "--metrics=fd_pixel", "--num_samples=20"),
    f"--samples_out={workdir}/samples.npz",
    program=READERS,
  )
  finish(reading)
  with Image.open(io.BytesIO(bucket.read("digits/grid.png"))) as image:
    assert image.size[0] > 4 * image.size[1]  # two rows of ten
  report = json.loads(bucket.read("digits/evaluation.json"))
  assert report["results"]["1.0"]["fd_pixel"] > 0
  assert bucket.read("digits/evaluation_alphas.png").startswith(b"\x89PNG")
  archive = io.BytesIO(bucket.read("digits/samples_alpha_2.npz"))
  assert np.load(archive)["arr_0"].shape == (20, 8, 8, 3)


def test_encoder_is_exported(bucket, monkeypatch, tmp_path):
  """Of a run without steps, which take long to compile."""

  monkeypatch.setattr(loop.Loop, "fit", lambda self, state: state)
  config = digits.get_config("encoder,smoke")
  config.model.base_channels = 4
  config.eval.every = 0
  train_mae.train_and_evaluate(config, f"gs://{bucket.name}/encoder")
  folder = bucket.download("encoder", tmp_path)
  assert json.loads((folder / "config.json").read_text())["task"] == "mae"
  there, here = (
    artifacts.load(path)
    for path in (f"gs://{bucket.name}/encoder/encoder", folder / "encoder")
  )
  assert here.metadata["step"] == 0 and there.sha256 == here.sha256
  jax.tree.map(np.testing.assert_array_equal, there.params, here.params)
  assert not (folder / "run.lock").exists()


@pytest.mark.parametrize(
  ("url", "message"),
  [
    ("gs://locked/run", ": .*HttpError.*, 401. Credentials come from"),
    ("s3://runs/run", ": .*Orbax writes.*`aws s3 sync`"),
    ("gs://absent/run", ": .*there is no bucket 'absent'"),
    ("gs://read_only/run", "/run.lock: PERMISSION_DENIED: Forbidden"),
  ],
)
def test_what_can_not_be_used_is_said_in_one_line(bucket, url, message):
  with pytest.raises(storage.StorageError, match=f"^{url}{message}") as told:
    storage.check(url, write=True)
    lease.Lease(f"{url}/run.lock", f"--workdir={url}", print).take()
  assert "\n" not in str(told.value)


@pytest.mark.parametrize(
  ("url", "message"),
  [
    ("gs://runs/run", "gs:// needs a package: pip install gcsfs"),
    ("s3://runs/encoder", "runs are kept on local disks and in gs:// buckets"),
  ],
)
def test_what_no_client_can_reach(monkeypatch, url, message):
  monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(storage.StorageError, match=f"^{url}: {message}"):
    artifacts.load(url)
  storage.check("runs/digits")  # nothing to look at


def test_listings_are_not_remembered(bucket):
  folder = epath.Path(f"gs://{bucket.name}/listed")
  storage.check(folder)
  (folder / "a").write_text("a")
  assert len(list(folder.iterdir())) == 1
  store = tensorstore.KvStore.open(f"{folder}/").result()
  store.write("b", b"b").result()
  assert len(list(folder.iterdir())) == 2


def test_a_workdir_in_a_bucket_has_one_run(bucket, monkeypatch):
  """Of an owner that lives; of one elsewhere that sleeps it is taken over."""
  lost, told = [], threading.Event()

  def make():
    return lease.Lease(
      f"gs://{bucket.name}/leased/run.lock",
      f"--workdir=gs://{bucket.name}/leased",
      lambda message: (lost.append(message), told.set()),
    )

  monkeypatch.setattr(lease, "_LOOK_SECONDS", 0.1)
  monkeypatch.setattr(lease, "INTERVAL_SECONDS", 0.1)
  first, second = make(), make()
  with first._busy:
    first.take()
    with pytest.raises(
      config_lib.ConfigError, match="^--workdir=gs://runs/leased is in use by"
    ):
      second.take()
    monkeypatch.setattr(lease, "_machine", lambda: "")
    monkeypatch.setattr(lease, "LEASE_SECONDS", 1)
    second.take()
  assert told.wait(60)
  assert lost[0].startswith(
    "--workdir=gs://runs/leased was taken over by another run,"
  )
  second.release()
  assert not bucket.names("leased")


@pytest.fixture
def copied(bucket, tmp_path):
  """Copies to the bucket, without Orbax' markers, of a run on the disk.

  Returns:
    copy(folder), what was saved, by its step.
  """
  saver = checkpoint.Checkpointer(tmp_path, keep_latest=2)
  saved = {}
  for step in (1, 2):
    saved[step] = {"w": np.arange(2000.0) + step}, {"position": np.array(step)}
    saver.save(step, *saved[step])
  saver.close()

  def copy(folder):
    for path in tmp_path.rglob("*"):
      if path.is_file() and path.name != checksums.COMMIT:
        name = f"{folder}/checkpoints/{path.relative_to(tmp_path)}"
        bucket.write(name, path.read_bytes())
    path = epath.Path(f"gs://{bucket.name}/{folder}/checkpoints")
    storage.check(path)  # listings are not remembered
    return path

  return copy, saved


def test_a_copied_run_is_adopted_and_what_may_be_one_is_kept(bucket, copied):
  copy, saved = copied
  path = copy("copied")
  bucket.delete("copied/checkpoints/2/checksums.json")  # not yet written
  with pytest.raises(
    checkpoint.CheckpointError, match="copied/checkpoints: 1, 2 lack the"
  ):
    checkpoint.Checkpointer(path, read_only=True).restore_feed()
  others = {f"{name}/state/part": b"1" for name in ("damaged_1", "backup")}
  unfinished = {"3/_CHECKPOINT_METADATA": b'{"commit_timestamp_nsecs": null}'}
  for name, data in (others | unfinished).items():
    bucket.write(f"copied/checkpoints/{name}", data)
  saver = checkpoint.Checkpointer(path, keep_latest=2)
  assert saver.steps() == [1, 2]
  for step, (state, feed) in saved.items():
    restored = saver.restore(state, lambda saved, feed=feed: feed, step)
    assert restored is not None
    np.testing.assert_array_equal(restored[0]["w"], state["w"])
    assert restored[1] == feed
  saver.close()
  names = bucket.names("copied/checkpoints")
  assert {*others} < {*names} and not any(n.startswith("3/") for n in names)


@pytest.mark.parametrize(
  ("lost", "summed"), [("largest", True), ("state/_METADATA", False)]
)
def test_a_run_copied_in_part_is_refused_and_untouched(
  bucket, copied, lost, summed
):
  """Also where it was copied before its checksums were written."""
  copy, _ = copied
  folder = f"part_{lost[:2]}_{summed}"
  path = copy(folder)
  newest = f"{folder}/checkpoints/2"
  if lost == "largest":
    names = bucket.names(newest)
    lost = max(names, key=lambda name: len(bucket.read(f"{newest}/{name}")))
  bucket.delete(f"{newest}/{lost}")
  if not summed:
    bucket.delete(f"{newest}/checksums.json")
  before = bucket.names(newest)
  with pytest.raises(checkpoint.CheckpointError) as caught:
    checkpoint.Checkpointer(path)
  assert f"{path}/2 may be" in str(caught.value)
  assert f"{lost}: missing" in str(caught.value)
  assert bucket.names(newest) == before
