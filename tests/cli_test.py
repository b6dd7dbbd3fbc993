"""Mistakes on the command line, in real processes: one line, no traceback."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import digits
from drift_jax import checkpoint, experiment, sharding, state
from drift_jax import config as config_lib

ROOT = pathlib.Path(__file__).parent.parent
SMOKE = "--config=configs/digits.py:smoke"
OVERRIDES = {
  "model.depth": 1,
  "model.hidden_size": 16,
  "model.cond_dim": 16,
  "model.num_heads": 2,
  "ema.decays": (0.0, 0.9),
  "eval.ema_decay": 0.9,
  "eval.metrics": ("fd_pixel",),
}


def call(*command, devices=1):
  return subprocess.run(
    [sys.executable, *map(str, command)],
    cwd=ROOT,
    env=os.environ
    | {
      "JAX_NUM_CPU_DEVICES": str(devices),
      "JAX_PLATFORMS": "cpu",
      "PYTHONPATH": str(ROOT),
    },
    capture_output=True,
    text=True,
    timeout=300,
  )


def assert_one_line(done, *parts):
  """The process failed with one line, which holds all parts."""
  assert done.returncode == 1 and done.stdout == "", done
  assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1, (
    done.stderr
  )
  for part in parts:
    assert part in done.stderr


@pytest.mark.parametrize(
  ("arguments", "parts"),
  [
    (
      (SMOKE, "--config.drift.temprature=1"),
      (
        "unknown key drift.temprature='1': did you mean temperatures or",
        "valid keys here are ['affinity_floor', 'attraction', ",
      ),
    ),
    (
      (SMOKE, "--config.model.depth=two"),
      ("model.depth='two' can't be read as int", "the config file's model.dep"),
    ),
    (
      (SMOKE, "--config.seed=-1"),
      ("seed=-1 must lie in",),
    ),
    (
      ("--config=configs/digit.py",),
      ("there is no file 'configs/digit.py'", "'configs/digits.py'"),
    ),
    (
      ("--config=configs/models.py",),
      ("models.py has no get_config()", "'configs/digits.py'"),
    ),
    (
      (SMOKE, "--workdir=~nobody-here/x"),
      ("--workdir=~nobody-here/x", "no home folder of 'nobody-here'"),
    ),
    (
      ("--config=~nobody-here/digits.py:smoke",),
      ("no home folder of 'nobody-here'", "~nobody-here/digits.py"),
    ),
    (
      (SMOKE, "--config.data.source=folder:~nobody-here/x"),
      ("data.source='folder:~nobody-here/x'", "no home folder of"),
    ),
    (
      ("--config=configs/digits.py:smok",),
      ("variant 'smok': valid options are", "'smoke'"),
    ),
  ],
)
def test_main_before_anything_heavy(tmp_path, arguments, parts):
  workdir = tmp_path / "never"
  done = call("-m", "drift_jax.main", f"--workdir={workdir}", *arguments)
  assert_one_line(done, *parts)
  assert not workdir.exists()


@pytest.mark.parametrize(
  ("arguments", "parts"),
  [
    (
      (SMOKE, "--config.mesh.fsdp=3"),
      ("mesh", "fsdp=3 does not fit 8 devices"),
    ),
    (
      (
        "--config=configs/digits.py:features,smoke",
        "--config.encoders.mae.path=/nowhere",
      ),
      ("encoders.mae: no exported model in /nowhere",),
    ),
  ],
)
def test_main_before_the_workdir(tmp_path, arguments, parts):
  workdir = tmp_path / "never"
  done = call(
    "-m", "drift_jax.main", f"--workdir={workdir}", *arguments, devices=8
  )
  assert_one_line(done, *parts)
  assert not workdir.exists()


def test_main_while_it_trains(tmp_path):
  """A real divergence takes long to compile; train_test has one."""
  program = """if True:
    import sys
    from drift_jax import config as config_lib
    from drift_jax import data, loop, main, train

    def fail(config, workdir):
      raise errors.pop(0)

    train.train_and_evaluate = fail
    main.define_flags()
    config_lib.parse_flags(sys.argv)
    errors = [
      loop.NonFiniteError("step 3 is not finite"),
      data.DataError("a/1.png is 8 x 8"),
      FileNotFoundError(2, "No such file or directory", "a/2.png"),
      KeyboardInterrupt(),
    ]
    while errors:
      try:
        main.main(sys.argv[:1])
      except SystemExit as ended:
        print(ended.code)
  """
  done = call("-c", program, SMOKE, f"--workdir={tmp_path}")
  assert done.stdout.splitlines() == [
    "Error: step 3 is not finite",
    "Error: a/1.png is 8 x 8",
    "Error: [Errno 2] No such file or directory: 'a/2.png'",
    "130",
  ]
  assert done.stderr.count("\n") == 1 and "Interrupted: " in done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run of one step, of zeros."""
  path = tmp_path_factory.mktemp("run")
  config = digits.get_config("smoke")
  config.update_from_flattened_dict(OVERRIDES)
  config = config_lib.parse(config)
  (path / "config.json").write_text(config_lib.to_json(config))
  abstract, _ = state.abstract_and_init(
    experiment.init_generator(
      experiment.generator_task(config, {}, sharding.make_mesh())
    ),
    experiment.make_optimizer(config.optim, config.train.num_steps)[0],
    ema_decays=config.ema.decays,
    seed=config.seed,
    mesh=sharding.make_mesh(),
  )
  zeros = jax.tree.map(
    lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), abstract
  )
  saver = checkpoint.Checkpointer(path / "checkpoints")
  saver.save(1, zeros, {"position": np.asarray(0)})
  saver.close()
  return path


def test_main_on_a_damaged_checkpoint(run, tmp_path):
  shutil.copytree(run, tmp_path / "damaged")
  files = (tmp_path / "damaged" / "checkpoints" / "1").rglob("*")
  largest = max(
    (f for f in files if f.is_file()), key=lambda f: f.stat().st_size
  )
  largest.write_bytes(largest.read_bytes()[:-1])
  done = call(
    "-m",
    "drift_jax.main",
    SMOKE,
    f"--workdir={tmp_path / 'damaged'}",
    *(f"--config.{key}={value}" for key, value in OVERRIDES.items()),
  )
  assert done.returncode == 1 and "Traceback" not in done.stderr
  last = done.stderr.splitlines()[-1]
  assert last.startswith("Error: ") and "1 is damaged" in last


def test_sample_of_a_digit_that_is_no_number(run, tmp_path):
  done = call(
    "-m",
    "drift_jax.sample",
    f"--workdir={run}",
    f"--out={tmp_path / 'no.png'}",
    "--labels=3,²",
  )
  assert_one_line(done, "labels: '²' is no class index in [0, 10)")


def test_evaluate_more_images_than_there_are(run):
  done = call(
    "-m", "drift_jax.evaluate", f"--workdir={run}", "--num_samples=5400"
  )
  assert_one_line(done, "training images, fewer than the 540 generated")


def test_evaluate_counts(run):
  """0: as many as are held out; of one image there are no figures."""
  done = call("-m", "drift_jax.evaluate", f"--workdir={run}", "--num_samples=0")
  assert done.returncode == 0 and "| 540 samples" in done.stdout, done
  done = call("-m", "drift_jax.evaluate", f"--workdir={run}", "--num_samples=1")
  assert_one_line(done, "eval.num_samples=1: figures need at least 2")


def test_evaluate_writes_into_a_new_folder(run, tmp_path):
  """A decay of zero is a decay, and no default."""
  out = tmp_path / "new" / "folder" / "report.json"
  done = call(
    "-m",
    "drift_jax.evaluate",
    f"--workdir={run}",
    "--num_samples=20",
    "--ema_decay=0",
    "--seed=0",
    f"--out={out}",
  )
  assert done.returncode == 0, done.stderr
  report = json.loads(out.read_text())
  assert (report["num_samples"], report["ema_decay"], report["seed"]) == (
    20,
    0,
    0,
  )
  assert "fd_pixel" in report["results"]["1.0"]
