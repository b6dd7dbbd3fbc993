"""Checkpoints: what is kept, any mesh restores, damage is told from health."""

import collections
import contextlib
import json
import math
import pathlib
import resource
import shutil
import sys
import threading
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from drift_jax.data import bank as bank_lib
from drift_jax.system import sharding, storage
from drift_jax.training import checkpoint, checksums
from tests import process
from tests.process import wait_for


def make_state(mesh, value=0.0):
  tree = {
    "params": {"kernel": jnp.arange(256.0).reshape(8, 32) + value},
    "ema": {"0.999": {"kernel": jnp.ones((8, 32)) + value}},
  }
  return jax.device_put(tree, sharding.infer_sharding(tree, mesh))


def make_feed(position=3):
  bank = bank_lib.create(
    num_classes=2, class_size=3, unconditional_size=4, sample_shape=(2,)
  )
  bank_lib.push(bank, np.ones((2, 2), np.float32), np.array([0, 1], np.int32))
  return {"position": np.asarray(position, np.int64), "bank": bank.arrays()}


def targets(mesh):
  state, feed = make_state(mesh), make_feed()
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  bank = sharding.abstract(
    feed["bank"], jax.tree.map(lambda _: place, feed["bank"])
  )

  def abstract_feed(saved):
    assert saved["bank"]["samples"].shape == bank["samples"].shape
    return {"position": feed["position"], "bank": bank}

  shardings = sharding.infer_sharding(state, mesh)
  return sharding.abstract(state, shardings), abstract_feed


def open_(*args, **options):
  """A Checkpointer that is closed at the end of a `with`."""
  return contextlib.closing(checkpoint.Checkpointer(*args, **options))


def assert_restores(saver, mesh, value):
  restored = saver.restore(*targets(mesh))
  assert restored is not None
  equal(restored[0], make_state(mesh, value))
  return restored


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def mesh():
  return sharding.make_mesh(8, 1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """Checkpoints of steps 1, 2 and 3 in a closed directory."""
  folder, mesh = tmp_path_factory.mktemp("saved"), sharding.make_mesh(8, 1)
  saver = checkpoint.Checkpointer(folder, keep_latest=3)
  for step in (1, 2, 3):
    saver.save(step, make_state(mesh, step), make_feed(step))
  saver.close()
  return folder


@pytest.fixture
def three_steps(saved, tmp_path):
  """A copy, which may be damaged."""
  return shutil.copytree(saved, tmp_path / "run")


def test_saved_on_8_by_1_restores_on_2_by_4(three_steps, caplog):
  other = sharding.make_mesh(2, 4)
  with open_(three_steps) as saver:
    state, feed = assert_restores(saver, other, 3)
  equal(feed["bank"], make_feed()["bank"])
  assert int(feed["position"]) == 3
  kernel = state["params"]["kernel"]
  assert kernel.sharding.mesh.shape == {"data": 2, "fsdp": 4}
  assert kernel.addressable_shards[0].data.shape == (2, 32)
  assert not caplog.records  # Orbax warns of what it looks for in vain


@pytest.mark.parametrize("read_only", [False, True])
def test_an_empty_directory_restores_nothing(tmp_path, mesh, read_only):
  with open_(tmp_path / "no" / "run", read_only=read_only) as saver:
    assert saver.restore(*targets(mesh)) is None
    assert saver.latest_step() is None and saver.best_step() is None
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint in"):
      saver.restore_subtree(targets(mesh)[0])
  assert (tmp_path / "no").exists() != read_only


def test_keeps_the_latest_the_best_and_every_kth(tmp_path, mesh):
  distances = {2: 5.0, 4: 1.0, 6: 3.0, 8: 2.0}
  options = {"keep_latest": 2, "keep_every": 5, "best_metric": "fd_pixel"}
  with open_(tmp_path, **options) as saver:
    for step in range(1, 10):
      saver.save(step, make_state(mesh, step), make_feed(step))
      if step in distances:
        saver.rank(step, {"fd_pixel": distances[step]})
    saver.wait()
    assert saver.steps() == [4, 5, 8, 9]
    assert saver.best_step() == 4
  # The ranking survives a new process' manager.
  with open_(tmp_path, **options) as saver:
    assert saver.best_step() == 4
    saver.save(11, make_state(mesh), make_feed())
    saver.rank(11, {"fd_pixel": 4.0})
    saver.wait()
    assert saver.steps() == [4, 5, 9, 11]


def test_neither_nan_nor_another_metric_is_the_best():
  kept = checkpoint.Retention(latest=1, every=0, best_metric="fd")
  for step, figures in enumerate(({"fd": math.nan}, {"fd_pixel": 1.0}), 1):
    kept.set_score(step, figures)
  assert kept.best([1, 2]) is None and kept.kept([1, 2]) == {2}
  for step, value in enumerate((5.0, 1.0, None, math.nan, 3.0), 3):
    kept.set_score(step, {"fd": value})
  assert kept.best(range(1, 8)) == 4 and kept.kept(range(1, 8)) == {4, 7}


def test_saving_does_not_see_later_changes(tmp_path, mesh):
  """The state may be donated right after save returns."""
  bump = jax.jit(lambda t: jax.tree.map(lambda x: x + 1.0, t), donate_argnums=0)
  with open_(tmp_path) as saver:
    state = make_state(mesh, 1.0)
    saver.save(1, state, make_feed())
    for _ in range(3):
      state = bump(state)
    saver.wait()
    assert_restores(saver, mesh, 1.0)


# Saves 256 MB and prints the most memory that this took, in units of them.
SAVES = """
import pathlib, sys
import jax.numpy as jnp
import numpy as np
from benchmarks import timing
from drift_jax.training.checkpoint import Checkpointer

saver = Checkpointer(sys.argv[1], keep_latest=2)
saver.save(1, {"w": np.ones(2)}, {"queue": np.ones(2)})
saver.wait()
queue = jnp.ones((1, 64, 64, 256, 256), jnp.uint8).block_until_ready()
before = timing.resident()
pathlib.Path("/proc/self/clear_refs").write_text("5")
saver.save(2, {"w": np.ones(2)}, {"queue": queue})
saver.wait()
print((timing.highest() - before) / queue.nbytes)
saver.close()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.system
def test_a_large_array_is_saved_in_pieces(tmp_path):
  done = process.call("-c", SAVES, str(tmp_path))
  assert done.returncode == 0, done.stderr
  assert float(done.stdout.split()[-1]) < 0.5


def test_parts_of_copies_are_compiled_for_large_arrays_alone(
  tmp_path, monkeypatch
):
  """Of an array of 16 MB on 8 devices each writes a part, of small ones one."""
  place = sharding.replicated(sharding.make_mesh(8, 1))
  large, small = jnp.arange(2.0**22).reshape(8, -1), jnp.ones((8, 32))
  state = jax.device_put({"large": large, "small": small}, place)
  sliced = []
  cut = jax.lax.slice_in_dim

  def watched(array, *arguments, **named):
    sliced.append(array.shape)
    return cut(array, *arguments, **named)

  monkeypatch.setattr(jax.lax, "slice_in_dim", watched)
  with open_(tmp_path) as saver:
    saver.save(1, state, make_feed())
    saver.wait()
    places = jax.tree.map(lambda _: place, state)
    _, restored = saver.restore_subtree(sharding.abstract(state, places))
  assert sliced == [large.shape] * 8
  for name, value in state.items():
    np.testing.assert_array_equal(restored[name], value)


def largest_file(directory: pathlib.Path) -> pathlib.Path:
  files = [
    p
    for p in directory.rglob("*")
    if p.is_file() and p.name != checksums.CHECKSUMS
  ]
  return max(files, key=lambda p: p.stat().st_size)


def truncate(path: pathlib.Path) -> None:
  path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(path: pathlib.Path) -> None:
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(bytes(data))


@pytest.mark.parametrize(
  ("harm", "says"),
  [
    (truncate, r"\d+ bytes, want \d+"),
    (flip_a_bit, "its content changed"),
    (pathlib.Path.unlink, "missing"),
  ],
)
def test_damage_is_an_error_unless_asked(three_steps, mesh, harm, says):
  harm(largest_file(three_steps / "3"))
  with (
    open_(three_steps, keep_latest=3) as saver,
    pytest.raises(
      checkpoint.CheckpointError,
      match=f"(?s)3 is damaged: .*{says}.*on_corrupt=previous.*from step 2",
    ),
  ):
    saver.restore(*targets(mesh))
  assert (three_steps / "3").exists()

  # The step can be saved again, and be damaged again.
  for aside in ("damaged_3", "damaged_3_2"):
    with open_(three_steps, keep_latest=3, on_corrupt="previous") as saver:
      assert_restores(saver, mesh, 2)
      assert (three_steps / aside).exists()
      saver.save(3, make_state(mesh, 30), make_feed(3))
      saver.wait()
      assert_restores(saver, mesh, 30)
    harm(largest_file(three_steps / "3"))


def test_damage_without_checksums_is_found_by_reading(
  three_steps, mesh, monkeypatch
):
  """As after a kill between the commit and its checksums; memory is none."""
  (three_steps / "3" / checksums.CHECKSUMS).unlink()
  with open_(three_steps, keep_latest=3, on_corrupt="previous") as saver:

    def restore(*args, **kwargs):
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    with monkeypatch.context() as patch:
      patch.setattr(saver._manager, "restore", restore)
      with pytest.raises(jax.errors.JaxRuntimeError, match="Out of memory"):
        saver.restore(*targets(mesh))
    assert saver.steps() == [1, 2, 3]
  for path in (three_steps / "3" / "state").rglob("manifest.ocdbt"):
    truncate(path)
  with open_(three_steps, keep_latest=3) as saver:
    with pytest.raises(checkpoint.CheckpointError, match="3 is damaged"):
      saver.restore(*targets(mesh))


def test_every_checkpoint_damaged(three_steps, mesh):
  for step in (1, 2, 3):
    truncate(largest_file(three_steps / str(step)))
  with open_(three_steps, keep_latest=3, on_corrupt="previous") as saver:
    with pytest.raises(checkpoint.CheckpointError, match="no other checkpoint"):
      saver.restore(*targets(mesh))


def test_the_wrong_shape_is_not_called_damage(three_steps, mesh):
  state, feed = targets(mesh)
  state["params"]["other"] = state["params"].pop("kernel")
  with open_(three_steps, on_corrupt="previous") as saver:
    with pytest.raises(Exception, match="other") as caught:
      saver.restore(state, feed)
    assert not isinstance(caught.value, checkpoint.CheckpointError)
    assert saver.steps()[-1] == 3


def test_part_of_a_state(three_steps, mesh):
  ema = {"ema": targets(mesh)[0]["ema"]}
  with open_(three_steps, keep_latest=3) as saver:
    step, tree = saver.restore_subtree(ema)
    assert step == 3 and set(tree) == {"ema"}
    equal(tree["ema"], make_state(mesh, 3)["ema"])
    assert saver.restore_subtree(ema, 2)[0] == 2
    with pytest.raises(checkpoint.CheckpointError, match=r"\[1, 2, 3\]"):
      saver.restore_subtree(ema, 7)
    for path in (three_steps / "3" / "state").rglob("_METADATA"):
      truncate(path)
    with pytest.raises(checkpoint.CheckpointError, match="damaged"):
      saver.restore_subtree(ema)


@pytest.fixture
def slow_write(monkeypatch):
  """Files of a save stay temporary until the returned event is set."""
  release = threading.Event()
  handler = ocp.CompositeCheckpointHandler
  commit = handler.finalize

  def finalize(self, directory, *args, **kwargs):
    assert release.wait(60)
    return commit(self, directory, *args, **kwargs)

  monkeypatch.setattr(handler, "finalize", finalize)
  return release


def test_a_reader_leaves_a_save_under_way_alone(tmp_path, mesh, slow_write):
  with open_(tmp_path) as saver:
    saver.save(1, make_state(mesh, 1), make_feed())
    wait_for(lambda: list(tmp_path.iterdir()))  # a thread makes it
    assert not (tmp_path / "1").exists(), "the save is still under way"
    with open_(tmp_path, read_only=True) as reader:
      assert reader.steps() == []
    slow_write.set()
    saver.wait()
    assert_restores(saver, mesh, 1)


def test_a_reader_writes_nothing(three_steps, mesh):
  truncate(largest_file(three_steps / "3"))
  before = sorted(three_steps.rglob("*"))
  with open_(three_steps, on_corrupt="previous", read_only=True) as reader:
    with pytest.raises(ValueError, match="step 4 can't be saved"):
      reader.save(4, make_state(mesh), make_feed())
    with pytest.raises(
      checkpoint.CheckpointError, match=r"damaged: .*another step: \[1, 2\]"
    ):
      reader.restore(*targets(mesh))
    assert reader.restore_subtree(targets(mesh)[0], 2)[0] == 2
  assert sorted(three_steps.rglob("*")) == before


def test_checksums_that_fail_are_not_swallowed(tmp_path, mesh, monkeypatch):
  def fail(directory):
    raise PermissionError(f"can't read {directory}")

  monkeypatch.setattr(checksums, "file_names", fail)
  saver = checkpoint.Checkpointer(tmp_path)
  saver.save(1, make_state(mesh), make_feed())
  with pytest.raises(PermissionError, match="can't read .*1"):
    saver.wait()
  saver.save(2, make_state(mesh), make_feed())
  with pytest.raises(PermissionError, match="can't read .*2"):
    saver.close()


def test_no_checksums_are_written_where_retention_deletes(
  tmp_path, mesh, monkeypatch
):
  """A file that appears in a folder being deleted would keep it alive, and a
  save in a hurry does not wait until the one before has been read back."""
  begun, written = threading.Event(), []
  sum_files = checksums.sum_files

  def record(path, *arguments):
    begun.set()
    threading.Event().wait(0.3)  # a large checkpoint
    assert path.exists()
    done = sum_files(path, *arguments)
    written.extend([int(path.name)] if done else [])
    return done

  monkeypatch.setattr(checksums, "sum_files", record)
  with open_(tmp_path, keep_latest=1) as saver:
    saver.save(1, make_state(mesh), make_feed())
    saver.save(2, make_state(mesh), make_feed())  # deletes 1
    while not begun.is_set():
      saver.poll()
    saver.save(3, make_state(mesh), make_feed())  # deletes 2
  assert written == [3]
  assert [path.name for path in tmp_path.iterdir()] == ["3"]


def test_a_step_can_not_be_saved_twice(three_steps, mesh):
  with open_(three_steps, keep_latest=3) as saver:
    for step in (2, 3):
      with pytest.raises(ValueError, match=rf"step {step} can't .*, 3\]"):
        saver.save(step, make_state(mesh, 9), make_feed())
    assert_restores(saver, mesh, 3)


def test_a_full_disk_costs_the_save_alone(tmp_path, mesh, capfd):
  """One line, and the checkpoint before it is restored and followed."""
  saver = checkpoint.Checkpointer(tmp_path / "run")
  saver.save(1, make_state(mesh, 1), make_feed())
  saver.wait()
  big = {"w": np.random.default_rng(0).normal(size=50_000)}
  limit = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
  try:
    saver.save(2, big, make_feed())
    with pytest.raises(checkpoint.CheckpointError) as caught:
      saver.wait()
    with contextlib.suppress(checkpoint.CheckpointError):
      saver.close()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
  text = str(caught.value)
  assert f"{tmp_path / 'run'} could not be written: File too large" in text
  assert "step 1 is untouched" in text and "\n" not in text
  with open_(tmp_path / "run") as saver:
    assert_restores(saver, mesh, 1)
    saver.save(2, make_state(mesh, 2), make_feed())
  assert [path.name for path in (tmp_path / "run").iterdir()] == ["2"]


def test_a_score_goes_with_the_checkpoint_that_is_set_aside(tmp_path, mesh):
  options = {"keep_latest": 2, "best_metric": "fd", "on_corrupt": "previous"}
  with open_(tmp_path, **options) as saver:
    for step, figure in ((1, 5.0), (2, 3.0)):
      saver.save(step, make_state(mesh, step), make_feed())
      saver.rank(step, {"fd": figure})
    saver.wait()
    assert saver.best_step() == 2
    truncate(largest_file(tmp_path / "2"))
    assert_restores(saver, mesh, 1)
    saver.save(2, make_state(mesh, 2), make_feed())
    assert saver.best_step() == 1


def test_awkward_names_of_folders(tmp_path, mesh):
  path = tmp_path / "a b]c#d" / "50%a%20b" / "{a,b}$a;&|" / 'it\'s "é-日"'
  storage.check_characters(path)
  with open_(path) as saver:
    saver.save(1, make_state(mesh, 1), make_feed(1))
  with open_(path) as saver:
    assert saver.restore_feed()[0] == 1
    assert_restores(saver, mesh, 1)


@pytest.fixture
def reads(monkeypatch):
  """{file: bytes of it that were read to compare or make checksums}, of blocks
  of 1 KiB."""
  reads = collections.Counter()
  blocks = checksums._blocks

  def counting(path, *numbers):
    for number, block in blocks(path, *numbers):
      reads[str(path)] += len(block)
      yield number, block

  monkeypatch.setattr(checksums, "_blocks", counting)
  monkeypatch.setattr(checksums, "_BLOCK", 1024)
  return reads


def test_only_what_is_read_is_compared(tmp_path, mesh, reads):
  random = np.random.default_rng(0)
  state = {
    "ema": {"0.9": random.normal(size=2000), "0.99": random.normal(size=2000)},
    "params": random.normal(size=40_000),
  }
  saver = checkpoint.Checkpointer(tmp_path)
  saver.save(1, state, {"bank": random.normal(size=40_000)})
  saver.wait()
  part = {"ema": {"0.9": state["ema"]["0.9"]}}
  reads.clear()
  _, restored = saver.restore_subtree(part)
  np.testing.assert_array_equal(restored["ema"]["0.9"], part["ema"]["0.9"])
  assert 16_000 < sum(reads.values()) < 40_000
  assert not any("/feed/" in name for name in reads)
  reads.clear()
  saver.restore_feed()
  assert not any("/state/" in name for name in reads)

  def harm(array):
    """Flips a bit in the middle of an array."""
    found = checksums._data_read(epath.Path(tmp_path) / "1", "state", [array])
    name = max(found, key=lambda name: found[name][-1][1] - found[name][-1][0])
    start, stop = found[name][-1]
    data = bytearray((tmp_path / "1" / name).read_bytes())
    data[(start + stop) // 2] ^= 1
    (tmp_path / "1" / name).write_bytes(data)

  harm("params")
  saver.restore_subtree(part)
  harm("ema.0.9")
  with pytest.raises(checkpoint.CheckpointError, match="content changed"):
    saver.restore_subtree(part)
  saver.restore_feed()
  saver.close()


def test_each_process_sums_and_compares_its_own(tmp_path, reads):
  files = {
    "_CHECKPOINT_METADATA": b"{}",
    "state/manifest.ocdbt": b"0" * 10,
    "state/ocdbt.process_0/d/a": b"1" * 3000,
    "state/array_metadatas/process_1": b"2" * 20,
    "feed/ocdbt.process_1/d/b": b"3" * 4000,
  }
  for name, data in files.items():
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(data)
  folder = epath.Path(tmp_path)
  checksums.sum_files(folder, 0, {}, threading.Event())
  assert len(reads) == 3 and not any("process_1" in name for name in reads)
  # The other one was killed before: nothing is known to be wrong, or right.
  assert checksums.compare(folder) == ([], False)
  reads.clear()
  checksums.sum_files(folder, 1, {}, threading.Event())
  assert len(reads) == 2 and all("process_1" in name for name in reads)
  assert checksums.compare(folder) == ([], True)
  flip_a_bit(tmp_path / "feed/ocdbt.process_1/d/b")
  found = [checksums.compare(folder, process=i, count=2) for i in range(2)]
  (line,) = found[1][0]
  assert found[0] == ([], True) and line.startswith("feed/ocdbt.process_1/d/b:")
  # All of a process may be missing, its checksums included.
  for name in ("checksums.1.json", *(n for n in files if "process_1" in n)):
    (tmp_path / name).unlink()
  lines, _ = checksums.compare(folder)
  assert [line.endswith(": missing") for line in lines] == [True, True]


def test_checksums_of_earlier_checkpoints(three_steps, mesh):
  """One file for all processes' files, a CRC-32 of each as a whole."""
  folder = epath.Path(three_steps / "3")
  files = {n: (folder / n).read_bytes() for n in checksums.file_names(folder)}
  sums = {name: [len(data), zlib.crc32(data)] for name, data in files.items()}
  sums["commit_success.txt"] = [1, 1]  # they have it, a copy may not
  (folder / "checksums.json").write_text(json.dumps(sums))
  assert checksums.compare(folder) == ([], True)
  with open_(three_steps, keep_latest=3) as saver:
    assert saver.restore_subtree(targets(mesh)[0])[0] == 3
    flip_a_bit(largest_file(three_steps / "3"))
    with pytest.raises(checkpoint.CheckpointError, match="content changed"):
      saver.restore(*targets(mesh))


def test_a_sum_goes_on_where_a_save_has_stopped_it(tmp_path, mesh, monkeypatch):
  """The save does not wait for it, and nothing is read a second time."""
  read, begun, saved = [], threading.Event(), threading.Event()
  blocks = checksums._blocks

  def slow(path, *numbers):
    read.append(str(path))
    if len(read) == 5:
      begun.set()
      assert saver._stop.wait(60)
    elif len(read) == 6:  # it may go on before `save` returns
      assert saved.wait(60)
    yield from blocks(path, *numbers)

  monkeypatch.setattr(checksums, "_blocks", slow)
  saver = checkpoint.Checkpointer(tmp_path, keep_latest=2)
  saver.save(1, make_state(mesh), make_feed())
  while not begun.is_set():
    saver.poll()
  saver.save(2, make_state(mesh), make_feed())
  assert len(read) < 7 and not (tmp_path / "1" / "checksums.json").exists()
  saved.set()
  saver.close()
  twice = [name for name, n in collections.Counter(read).items() if n > 1]
  assert twice == [read[4]]
  for step in (1, 2):
    assert checksums.compare(epath.Path(tmp_path) / str(step)) == ([], True)


def test_runs_that_gave_their_figures_to_orbax_rank_on(tmp_path, mesh):
  with ocp.CheckpointManager(
    tmp_path,
    options=ocp.CheckpointManagerOptions(best_fn=lambda m: m["fd"]),
    item_names=("state", "feed"),
  ) as manager:
    for step, value in enumerate((2.0, 1.0, 3.0), 1):
      items = ocp.args.Composite(
        state=ocp.args.StandardSave(make_state(mesh, step)),
        feed=ocp.args.StandardSave(make_feed()),
      )
      manager.save(step, args=items, metrics={"fd": value})
  with open_(tmp_path, best_metric="fd") as saver:
    assert saver.best_step() == 2 and saver.evaluated(3)
    saver.save(4, make_state(mesh), make_feed(), evaluation_due=True)
    saver.wait()
    assert saver.steps() == [2, 4] and not saver.evaluated(4)
    saver.rank(4, {"fd": 0.5})
    assert saver.steps() == [4] and saver.evaluated(4)
  assert [path.name for path in tmp_path.iterdir()] == ["4"]


def test_every_kept_step_gets_checksums_without_poll_or_wait(tmp_path, mesh):
  with open_(tmp_path, keep_latest=2) as saver:
    for step in range(1, 5):
      saver.save(step, make_state(mesh), make_feed())
  for step in (3, 4):
    assert checksums.compare(epath.Path(tmp_path) / str(step)) == ([], True)


def test_the_cause_of_a_failed_save_is_said(tmp_path, mesh, monkeypatch):
  """TensorStore's own text may be long, and end with what was to be done."""

  def fail(*args, **kwargs):
    raise ValueError(
      f"OUT_OF_RANGE: {'x' * 999}: File too large [tensorstore_spec='{{}}'] "
      "[os_error_code='27'] [source locations='b']"
    )

  with open_(tmp_path) as saver:
    monkeypatch.setattr(saver._manager, "save", fail)
    with pytest.raises(
      checkpoint.CheckpointError, match="written: File too large. No checkpoint"
    ):
      saver.save(1, make_state(mesh, 1), make_feed())
