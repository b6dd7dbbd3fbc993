import contextlib
import json
import math
import pathlib
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from drift_jax.metrics import writers
from drift_jax.metrics.writers import JsonlWriter, create_writer, read_jsonl
from tests import process
from tests.metrics.conftest import full_disk


def read_events(folder: pathlib.Path) -> list[event_pb2.Event]:
  """Events of all files, from TFRecord framing: length, crc, data, crc."""
  events = []
  for path in sorted(folder.glob("events.out.tfevents.*")):
    data = path.read_bytes()
    while data:
      (length,) = struct.unpack("<Q", data[:8])
      events.append(event_pb2.Event.FromString(data[12 : 12 + length]))
      data = data[16 + length :]
  return events


def start(workdir, resume_step=-1, is_main=True):
  return create_writer(workdir, resume_step=resume_step, is_main=is_main)


def write_run(workdir, first, last, resume_step=-1):
  writer = start(workdir, resume_step)
  for step in range(first, last + 1):
    writer.write_scalars(step, {"loss": jnp.float32(1 / step), "rate": 0.1})
    if step % 2 == 0:
      writer.write_scalars(step, {"eval/fd_pixel/alpha_1.0": 2.0 * step})
  writer.close()


@pytest.mark.system
def test_import_needs_no_tensorflow(tmp_path):
  code = """
import sys
import drift_jax.metrics.writers
from clu import periodic_actions
from clu import metric_writers
writer = metric_writers.create_default_writer(sys.argv[1], asynchronous=False)
writer.write_scalars(1, {"loss": 0.5})
writer.close()
assert periodic_actions.ReportProgress
assert 'tensorflow' not in sys.modules
"""
  done = process.call("-c", code, tmp_path)
  assert done.returncode == 0, done.stderr
  assert read_events(tmp_path)[-1].summary.value[0].tag == "loss"


def test_summary_writer_has_the_whole_interface(tmp_path):
  writer = writers.SummaryWriter(str(tmp_path))
  for name in writers.MetricWriter.__abstractmethods__:
    assert callable(getattr(writer, name))
  with pytest.raises(ValueError, match="only scalars and images"):
    writer.write_videos(1, {"clip": np.zeros((2, 4, 4, 3))})
  writer.close()


def test_lines(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 3, "a": 9.0}\n')  # of a run before a fresh start
  writer = start(tmp_path)
  writer.write_scalars(
    3, {"a": 1, "b": np.float64(0.5), "c": jnp.ones((1,), jnp.bfloat16)}
  )
  # Readable at once, before any flush or close.
  assert path.read_text() == '{"step": 3, "a": 1.0, "b": 0.5, "c": 1.0}\n'
  assert read_jsonl(path) == [{"step": 3, "a": 1.0, "b": 0.5, "c": 1.0}]
  writer.write_scalars(4, {"a": math.nan, "b": jnp.float32(jnp.inf), "d": 2.0})
  writer.close()
  line = path.read_text().splitlines()[1]
  assert line == '{"step": 4, "a": null, "b": null, "d": 2.0}'
  record = read_jsonl(path)[1]
  assert math.isnan(record["a"]) and record["d"] == 2.0


@pytest.mark.parametrize("tail", ["", '{"step": 9, "lo', '{"step": 4, "loss"'])
def test_resumed_file_equals_an_uninterrupted_one(tmp_path, tail):
  whole, resumed = (
    tmp_path / x / "metrics.jsonl" for x in ("whole", "resumed")
  )
  write_run(whole.parent, 1, 9)
  write_run(resumed.parent, 1, 7)
  with open(resumed, "a") as file:
    file.write(tail)
  write_run(resumed.parent, 5, 9, resume_step=4)
  assert resumed.read_bytes() == whole.read_bytes()
  assert not list(resumed.parent.glob("*.tmp"))
  # After a kill between an evaluation's lines and the record that it is done.
  write_run(whole.parent, 1, 4)
  writer = create_writer(
    resumed.parent, resume_step=4, is_main=True, evaluated=False
  )
  writer.write_scalars(4, {"eval/fd_pixel/alpha_1.0": 8.0})
  writer.close()
  assert resumed.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.out.tfevents."])
def test_a_full_disk_is_told(tmp_path, name):
  """By the call, and for ever again: a thread that dies of it would leave the
  run waiting."""
  if name == "metrics.jsonl":
    writer = JsonlWriter(tmp_path / name, -1)
  else:
    writer = writers.SummaryWriter(str(tmp_path))
  with full_disk(3000):
    for _ in range(3):
      with pytest.raises(OSError, match="File too large.*" + str(tmp_path)):
        for step in range(1000):
          writer.write_scalars(step, {"loss": 1.0})
        writer.flush()
    with contextlib.suppress(OSError):
      writer.close()


def test_tensorboard_holds_scalars_and_images(tmp_path):
  image = np.random.default_rng(0).integers(0, 256, (6, 4, 3), np.uint8)
  writer = start(tmp_path, resume_step=4)
  writer.write_scalars(5, {"loss": jnp.float32(0.25)})
  # They can be followed while the run goes on.
  assert read_events(tmp_path)[-1].step == 5
  writer.write_images(5, {"samples": image})
  writer.close()
  events = read_events(tmp_path)
  loss, samples = (e.summary.value[0] for e in events if e.summary.value)
  assert (loss.tag, loss.simple_value) == ("loss", 0.25)
  assert (samples.image.height, samples.image.width) == (6, 4)
  assert samples.image.encoded_image_string.startswith(b"\x89PNG")
  assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 5, "loss": 0.25}]
  # What an earlier run holds from here on is hidden.
  (session,) = [e.step for e in events if e.HasField("session_log")]
  assert session == 5


def test_only_the_main_process_writes(tmp_path):
  writer = start(tmp_path / "run", is_main=False)
  writer.write_scalars(1, {"loss": 1.0})
  writer.write_images(1, {"samples": np.zeros((2, 2, 3), np.uint8)})
  writer.flush()
  writer.close()
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("broken", ["nonsense", '{"loss": 1.0}'])
def test_broken_line_is_named(tmp_path, broken):
  path = tmp_path / "metrics.jsonl"
  path.write_text(f'{{"step": 1}}\n{broken}\n{{"step": 2}}\n')
  with pytest.raises(ValueError, match="metrics.jsonl, line 2 "):
    read_jsonl(path)
  with pytest.raises(ValueError, match="line 2 "):
    JsonlWriter(path, 5)
  assert path.read_text().count("\n") == 3


def test_a_bucket_gets_whole_files_at_times(tmp_path, monkeypatch):
  """When opened, when told to, when long enough has passed, and at the end."""
  uploads = []

  def upload(source, path):
    lines = source.read_text().splitlines()
    assert str(path) == "gs://bucket/run/metrics.jsonl"
    uploads.append([json.loads(line)["step"] for line in lines])

  monkeypatch.setattr(writers.storage, "upload", upload)
  folder = tmp_path / "spool"
  jsonl = JsonlWriter(folder / "metrics.jsonl", -1)
  writer = writers._Uploading([jsonl], folder, "gs://bucket/run")
  writer.write_scalars(1, {})
  writer.write_scalars(2, {})
  assert uploads == [[]]
  writer.flush()
  writer.flush()  # nothing has changed
  assert uploads == [[], [1, 2]]
  monkeypatch.setattr(writers, "_UPLOAD_SECONDS", 0.0)
  writer.write_scalars(3, {})
  monkeypatch.setattr(writers, "_UPLOAD_SECONDS", 60.0)
  writer.write_scalars(4, {})
  assert uploads[2:] == [[1, 2, 3]]
  writer.close()
  assert uploads[3:] == [[1, 2, 3, 4]]
  assert not folder.exists()
