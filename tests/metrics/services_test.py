"""W&B and trackio themselves, without a network: runs, resumes, failures."""

import contextlib
import json
import sqlite3

import numpy as np
import pytest
from PIL import Image
from wandb.proto import wandb_internal_pb2

from drift_jax.config import ConfigError
from drift_jax.metrics import services
from drift_jax.metrics.writers import create_writer, read_jsonl
from tests import process

# Trains 3 steps, then 4 from the checkpoint of the second.
TRAIN = """if True:
  import shutil, sys
  from configs import digits
  from drift_jax.tasks.generator.train import train_and_evaluate
  from tests.small_generator import TINY

  for steps in (3, 4):
    config = digits.get_config("smoke")
    config.model.update(TINY)
    config.update_from_flattened_dict({
      "writers": ("jsonl", "wandb", "trackio"),
      "train.num_steps": steps,
      "train.log_every": 1,
      "optim.schedule": "constant",
      "optim.warmup_steps": 0,
      "checkpoint.every": 2,
      "checkpoint.best_metric": "",
      "eval.every": 2,
      "eval.metrics": (),
    })
    train_and_evaluate(config, sys.argv[1])
    shutil.rmtree(f"{sys.argv[1]}/checkpoints/3", ignore_errors=True)
"""


def wandb_records(path):
  """Records of a .wandb file: a LevelDB log after 7 bytes of W&B's own."""
  data = path.read_bytes()
  assert data[:4] == b":W&B"
  place, record, found = 7, b"", []
  while place + 7 <= len(data):
    if (rest := -place % 2**15) < 7:
      place += rest
      continue
    size, kind = (
      int.from_bytes(data[place + 4 : place + 6], "little"),
      place + 6,
    )
    record += data[place + 7 : place + 7 + size]
    place += 7 + size
    if data[kind] in (1, 4):  # a whole one, or its last part
      found.append(wandb_internal_pb2.Record.FromString(record))
      record = b""
  return found


def wandb_run(folder):
  """(id, config, [{name: value} of each line]) of an offline run."""
  (path,) = folder.glob("*.wandb")
  identity, config, lines, axes = "", {}, [], {}
  for record in wandb_records(path):
    if record.HasField("run"):
      identity = record.run.run_id
      updates = record.run.config.update
      config |= {item.key: json.loads(item.value_json) for item in updates}
    if record.HasField("history"):
      items = record.history.item
      names = {item.key or "/".join(item.nested_key): item for item in items}
      lines.append({k: json.loads(v.value_json) for k, v in names.items()})
    if record.HasField("metric"):
      axes[record.metric.glob_name] = record.metric.step_metric
    if record.HasField("exit"):
      assert record.exit.exit_code == 0
  assert axes["*"] == "step"  # W&B's own counter may not go back
  return identity, config, lines


@pytest.mark.system
def test_a_run_and_its_resume(tmp_path):
  """Under one id, with config, every line of metrics.jsonl and the grids."""
  workdir = tmp_path / "digits"
  done = process.call(
    *("-W", "error", "-c", TRAIN, workdir),
    WANDB_MODE="offline",
    TRACKIO_DIR=str(tmp_path / "trackio"),
    HF_HUB_OFFLINE="1",
  )
  assert done.returncode == 0, done.stderr[-3000:]
  assert not list(workdir.glob("events.out.*"))
  lines = read_jsonl(workdir / "metrics.jsonl")
  loss = {int(x["step"]): x["loss"] for x in lines if "loss" in x}
  assert list(loss) == [1, 2, 3, 4]
  identity = (workdir / services.ID_FILE).read_text()
  grids = {
    step: np.asarray(Image.open(workdir / f"samples/step_000000{step}.png"))
    for step in (2, 3, 4)
  }
  # Step 3 comes twice, as the resumed run repeats it.
  repeated = [(1, loss[1]), (2, loss[2]), (3, loss[3])]
  repeated += [(3, loss[3]), (4, loss[4])]

  folders = sorted((workdir / "wandb").glob("offline-run-*"))
  runs = [wandb_run(folder) for folder in folders]
  assert [run[0] for run in runs] == [identity, identity]
  assert [run[1]["train"]["num_steps"] for run in runs] == [3, 4]
  sent = [line for run in runs for line in run[2]]
  assert [(x["step"], x["loss"]) for x in sent if "loss" in x] == repeated
  shown = [(x["step"], x["samples/path"]) for x in sent if "samples/path" in x]
  assert [step for step, _ in shown] == [2, 3, 4]
  for (step, name), folder in zip(
    shown, [folders[0]] * 2 + [folders[1]], strict=True
  ):
    with Image.open(folder / "files" / name) as image:
      np.testing.assert_array_equal(np.asarray(image)[..., :3], grids[step])

  file = tmp_path / "trackio" / f"{services.PROJECT}.db"
  with contextlib.closing(sqlite3.connect(file)) as database:
    rows = database.execute("select run_name, step, metrics from metrics")
    rows = [(name, step, json.loads(x)) for name, step, x in rows]
    ((config,),) = database.execute("select config from configs").fetchall()
  assert {name for name, _, _ in rows} == {f"digits-{identity}"}
  assert [(n, x["loss"]) for _, n, x in rows if "loss" in x] == repeated
  assert json.loads(config)["train"]["num_steps"] == 4
  for _, step, values in rows:
    if "samples" in values:
      place = tmp_path / "trackio/media" / values["samples"]["file_path"]
      with Image.open(place) as image:
        np.testing.assert_array_equal(np.asarray(image)[..., :3], grids[step])


@pytest.mark.system
def test_nobody_logged_in_is_told_before_the_run(tmp_path):
  done = process.call(
    *("-m", "drift_jax.main", "--config=configs/digits.py:smoke"),
    *(f"--workdir={tmp_path}/run", "--config.writers=('jsonl','wandb')"),
    **{"WANDB_MODE": "online", "WANDB_API_KEY": "", "HOME": str(tmp_path)},
  )
  assert done.returncode == 1
  assert done.stderr.splitlines()[-1].startswith(
    "Error: writers: 'wandb' can't start: nobody is logged in: log in"
  )
  assert not (tmp_path / "run").exists()


def test_a_missing_package_is_named(monkeypatch, tmp_path):
  monkeypatch.setattr(services.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(
    ConfigError, match="'trackio' needs .*pip install trackio"
  ):
    services.check(["trackio"])


def test_a_lost_service_is_told_once(tmp_path, monkeypatch, caplog):
  """The run's numbers go on; what the service raises never reaches it."""
  sent, failed = [], []

  def log(step, values):
    if step == 2:
      raise ConnectionError("the server\nis gone")
    sent.append((step, values))

  def start(names, workdir, config):
    assert (names, config) == (["wandb"], {"seed": 0})
    return [
      services.ServiceWriter("wandb", log, lambda x: x.shape, failed.append)
    ]

  monkeypatch.setattr(services, "start", start)
  writer = create_writer(
    *(tmp_path,),
    resume_step=-1,
    is_main=True,
    names=("jsonl", "wandb"),
    config={"seed": 0},
  )
  writer.write_images(1, {"grid": np.zeros((4, 5, 3), np.uint8)})
  for step in (1, 2, 3):
    writer.write_scalars(step, {"loss": np.float32(step)})
  writer.close()
  assert sent == [(1, {"grid": (4, 5, 3)}), (1, {"loss": 1.0})]
  (told,) = caplog.messages
  assert told.endswith("ConnectionError: the server is gone")
  assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 3 and not failed


# A service that never takes the rest of a run.
STUCK = """
import threading
from drift_jax.metrics import services
from drift_jax.system import console, exits

services._STOP_SECONDS = 0.2

def wait(failed):
  assert failed
  threading.Event().wait()

def program():
  console.setup()
  # As a library's own hook at the end of the process.
  threading.Thread(target=threading.Event().wait).start()
  writer = services.ServiceWriter("wandb", print, print, wait)
  try:
    raise exits.Preempted("Told to stop: step 3 is saved")
  finally:
    writer.close()

exits.run(program)
"""


@pytest.mark.system
def test_a_service_that_hangs_keeps_no_preempted_process():
  done = process.call("-c", STUCK, timeout=60)
  assert done.returncode == 75, done.stderr
  assert "wandb did not take the rest" in done.stderr
