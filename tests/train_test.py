"""The whole system in real processes: resume, kills, meshes, the CLIs."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from drift_jax import loop, metrics, train
from tests.conftest import assert_close

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 40
TINY = (
  "--config.model.depth=1",
  "--config.model.hidden_size=16",
  "--config.model.cond_dim=16",
  "--config.model.num_heads=2",
  "--config.batch.generated=4",
  "--config.batch.positives=8",
  "--config.train.log_every=1",
  "--config.checkpoint.every=4",
  "--config.eval.every=20",
)


def command(module, *arguments):
  return [sys.executable, "-m", f"drift_jax.{module}", *map(str, arguments)]


def environment(devices):
  return os.environ | {
    "JAX_NUM_CPU_DEVICES": str(devices),
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(ROOT),
  }


def start(*arguments, devices=8):
  return subprocess.Popen(
    command("main", *arguments),
    cwd=ROOT,
    env=environment(devices),
    stderr=subprocess.PIPE,
    text=True,
  )


def call(module, *arguments, devices=8, ok=True):
  done = subprocess.run(
    command(module, *arguments),
    cwd=ROOT,
    env=environment(devices),
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert (done.returncode == 0) == ok, done.stderr[-3000:]
  return done


def train_tiny(workdir, *arguments, devices=8):
  return call(
    "main",
    "--config=configs/digits.py:smoke",
    f"--workdir={workdir}",
    *TINY,
    *arguments,
    devices=devices,
  )


def checkpoint_arrays(workdir, step):
  """Every array of a checkpoint: {path: array}."""
  arrays = {}
  for item in ("state", "feed"):
    with ocp.PyTreeCheckpointer() as reader:
      path = (pathlib.Path(workdir) / "checkpoints" / str(step)).resolve()
      shape = reader.metadata(path / item).item_metadata.tree
      restore_args = jax_tree_map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shape
      )
      tree = reader.restore(
        path / item, args=ocp.args.PyTreeRestore(restore_args=restore_args)
      )
    for key, value in flatten(tree).items():
      arrays[f"{item}/{key}"] = np.asarray(value)
  return arrays


def jax_tree_map(function, tree):
  import jax

  return jax.tree.map(function, tree)


def flatten(tree):
  import jax

  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def records(workdir):
  """metrics.jsonl by step, without what depends on the clock."""
  merged: dict[int, dict[str, float]] = {}
  for record in metrics.read_jsonl(pathlib.Path(workdir) / "metrics.jsonl"):
    step = int(record["step"])
    merged.setdefault(step, {}).update(
      {k: v for k, v in record.items() if not k.startswith("perf/")}
    )
  return merged


def assert_same_run(a, b):
  first, second = checkpoint_arrays(a, STEPS), checkpoint_arrays(b, STEPS)
  assert first.keys() == second.keys()
  # Parameters, two moments, two averages, queue, position, key, step.
  assert len(first) > 5 * 20
  for name in first:
    np.testing.assert_array_equal(first[name], second[name], err_msg=name)
  assert records(a) == records(b)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(folder):
  """A run of 40 steps on 8 devices in one go."""
  train_tiny(folder / "whole", f"--config.train.num_steps={STEPS}")
  return folder / "whole"


@pytest.fixture(scope="module")
def half(folder):
  """The first half of the same run."""
  train_tiny(folder / "half", f"--config.train.num_steps={STEPS // 2}")
  return folder / "half"


def test_resume_in_a_new_process_is_bit_equal(folder, whole, half):
  """Queue, data position, metrics file and all, across an evaluation."""
  resumed = folder / "resumed"
  shutil.copytree(half, resumed)
  done = train_tiny(resumed, f"--config.train.num_steps={STEPS}")
  assert f"Resuming after step {STEPS // 2}." in done.stderr
  assert_same_run(whole, resumed)


def test_killed_at_an_arbitrary_moment_is_bit_equal(folder, whole):
  workdir = folder / "killed"
  arguments = (
    "--config=configs/digits.py:smoke",
    f"--workdir={workdir}",
    *TINY,
    f"--config.train.num_steps={STEPS}",
  )
  # Different every time the test runs, within reach of the first checkpoints.
  delay = np.random.default_rng().uniform(0.0, 0.5)
  process = start(*arguments)
  checkpoints = workdir / "checkpoints"
  deadline = time.monotonic() + 240
  while process.poll() is None and time.monotonic() < deadline:
    if checkpoints.exists() and any(checkpoints.iterdir()):
      time.sleep(delay)
      break
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  _, stderr = process.communicate()
  assert process.returncode == -signal.SIGKILL, (delay, stderr[-2000:])
  done = train_tiny(workdir, f"--config.train.num_steps={STEPS}")
  assert "Resuming after" in done.stderr or "Starting a new" in done.stderr
  assert_same_run(whole, workdir)


def test_one_device_trains_as_eight(folder, whole):
  """Measured: at most 4e-6 relative over 5 steps, in every metric."""
  train_tiny(folder / "one", "--config.train.num_steps=5", devices=1)
  one, eight = records(folder / "one"), records(whole)
  for step in range(1, 6):
    for name, value in eight[step].items():
      assert_close(one[step][name], value, 1e-4, f"step {step} {name}")


def test_saved_on_8_by_1_goes_on_on_2_by_4(folder, whole, half):
  workdir = folder / "other_mesh"
  shutil.copytree(half, workdir)
  train_tiny(
    workdir,
    f"--config.train.num_steps={STEPS // 2 + 5}",
    "--config.mesh.data=2",
    "--config.mesh.fsdp=4",
  )
  here, there = records(workdir), records(whole)
  for step in range(STEPS // 2 + 1, STEPS // 2 + 6):
    for name, value in there[step].items():
      assert_close(here[step][name], value, 1e-4, f"step {step} {name}")


def test_workdir_holds_what_is_promised(whole):
  config = json.loads((whole / "config.json").read_text())
  assert config["train"]["num_steps"] == STEPS
  assert list(whole.glob("events.out.tfevents.*"))
  for step in (20, 40):
    with Image.open(whole / "samples" / f"step_{step:07d}.png") as image:
      # Ten rows of ten 8x8 digits, magnified, with padding.
      assert image.size[0] == image.size[1] >= 10 * 8
  for name in ("drift_rms", "frechet"):
    with Image.open(whole / "plots" / f"{name}.png") as image:
      assert min(image.size) > 200
  last = records(whole)[STEPS]
  assert last["eval/fd_pixel/alpha_1.0"] > last["eval/fd_pixel/baseline"] > 0
  for name in ("drift_rms/0.02", "neighbours/0.2", "scale/global"):
    assert last[name] >= 0


def test_sample_writes_the_grid_that_was_asked_for(folder, whole):
  outs = [folder / "a.png", folder / "b.png", folder / "c.png"]
  for out, seed in zip(outs, (0, 0, 1), strict=True):
    call(
      "sample",
      f"--workdir={whole}",
      "--labels=3,7",
      "--alpha=1.5",
      f"--seed={seed}",
      f"--out={out}",
      devices=1,
    )
  a, b, c = (np.asarray(Image.open(out)) for out in outs)
  assert a.shape[0] * 4 < a.shape[1]  # two rows of ten
  np.testing.assert_array_equal(a, b)
  assert not np.array_equal(a, c)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("--labels=3,10",), r"'10' is no class index in [0, 10)"),
    (("--alpha=7",), "trained for alpha in [1.0, 4.0]"),
    (("--step=3",), "no checkpoint of step 3"),
    (("--ema_decay=0.5",), "valid options are (0.99, 0.995)"),
  ],
)
def test_sample_errors(whole, folder, arguments, message):
  done = call(
    "sample",
    f"--workdir={whole}",
    f"--out={folder / 'no.png'}",
    *arguments,
    devices=1,
    ok=False,
  )
  assert message in done.stderr and "Traceback" not in done.stderr
  assert not (folder / "no.png").exists()


def test_evaluate_prints_a_table_and_writes_json(whole):
  done = call(
    "evaluate",
    f"--workdir={whole}",
    "--alphas=1,3",
    "--num_images=100",
    devices=1,
  )
  assert "| fd_pixel |" in done.stdout and "alpha 3" in done.stdout
  report = json.loads((whole / "evaluation.json").read_text())
  assert report["num_images"] == 100
  assert set(report["results"]) == {"1.0", "3.0"}
  assert report["baseline"]["fd_pixel"] > 0
  done = call(
    "evaluate", f"--workdir={whole}", "--num_images=101", devices=1, ok=False
  )
  assert "num_images=101 can't be balanced" in done.stderr


def test_another_experiment_may_not_use_the_workdir(whole):
  done = call(
    "main",
    "--config=configs/digits.py:smoke",
    f"--workdir={whole}",
    *TINY,
    f"--config.train.num_steps={STEPS}",
    "--config.optim.learning_rate=0.5",
    ok=False,
  )
  assert "optim.learning_rate: 0.001 -> 0.5" in done.stderr
  assert "Traceback" not in done.stderr


def test_mistakes_fail_before_anything_compiles(folder):
  begin = time.monotonic()
  for arguments, message in (
    (("--config.batch.labels=64",), "push_per_step=32 is less than"),
    (("--config.drift.temprature=1",), "temprature"),
  ):
    done = call(
      "main",
      "--config=configs/digits.py:smoke",
      f"--workdir={folder / 'never'}",
      *arguments,
      ok=False,
    )
    assert message in done.stderr
  assert not (folder / "never").exists()
  assert time.monotonic() - begin < 60


def test_labels_that_do_not_divide_the_devices(folder):
  done = call(
    "main",
    "--config=configs/digits.py:smoke",
    f"--workdir={folder / 'uneven'}",
    "--config.batch.labels=12",
    ok=False,
  )
  assert "batch.labels=12 can't be split over the 8 devices" in done.stderr


def test_encoder_then_generator_in_its_features(folder):
  """The quickstart's two trainings, in their smoke form."""
  encoder = folder / "encoder"
  call(
    "main", "--config=configs/digits.py:encoder,smoke", f"--workdir={encoder}"
  )
  assert (encoder / "plots" / "mae.png").exists()
  losses = [
    record["recon_loss"]
    for _, record in sorted(records(encoder).items())
    if "recon_loss" in record
  ]
  assert losses[-1] < losses[0]
  generator = folder / "features"
  call(
    "main",
    "--config=configs/digits.py:features,smoke",
    f"--workdir={generator}",
    f"--config.encoders.mae.path={encoder / 'encoder'}",
    *TINY,
    "--config.train.num_steps=6",
    "--config.eval.every=6",
  )
  last = records(generator)[6]
  assert last["eval/fd_encoder/alpha_1.0"] > last["eval/fd_encoder/baseline"]
  groups = {k.split("/")[-1] for k in last if k.startswith("scale/")}
  assert groups == {
    "conv1",
    "global",
    "layer1",
    "layer2",
    "layer3",
    "layer4",
    "norm",
  }


def test_a_run_that_diverges_stops(tmp_path):
  """In this process: a learning rate that overflows in two steps."""
  from configs import digits

  config = digits.get_config("smoke")
  config.model.update(depth=1, hidden_size=16, cond_dim=16, num_heads=2)
  config.batch.update(generated=4, positives=8)
  config.optim.update(learning_rate=1e30, warmup_steps=0)
  config.checkpoint.every = 1
  config.eval.every = 0
  with pytest.raises(loop.NonFiniteError, match=r"step \d+ is not finite"):
    train.train_and_evaluate(config, str(tmp_path))
