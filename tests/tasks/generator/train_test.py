"""The whole system: resume, kills, meshes, what a run leaves behind.

In real processes of one device where something is killed, in this one, of
eight, elsewhere.
"""

import contextlib
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from configs import digits
from drift_jax import config as config_lib
from drift_jax.metrics.writers import create_writer, read_jsonl
from drift_jax.tasks import parse
from drift_jax.tasks.generator import evaluation as evaluation_lib
from drift_jax.tasks.generator import train
from drift_jax.tasks.generator.config import GeneratorConfig
from drift_jax.tasks.generator.evaluation import Evaluation
from drift_jax.tasks.generator.restore import open_run
from drift_jax.tasks.generator.setup import generator_task
from drift_jax.tasks.mae import setup as mae_setup
from drift_jax.tasks.mae import train as train_mae
from drift_jax.tasks.mae.config import MaeConfig
from drift_jax.tasks.mae.evaluation import held_out_evaluation
from drift_jax.tasks.mae.setup import mae_task
from drift_jax.training import artifacts, checkpoint, loop
from drift_jax.training.inputs import open_readers
from drift_jax.training.run import open_mesh
from tests.builders import make_state
from tests.conftest import assert_close
from tests.judges import save_inception, save_random_statistics
from tests.process import ROOT, call, process_environment, wait_for
from tests.small_generator import TINY as MODEL

pytestmark = pytest.mark.slow


STEPS = 12
DECAYS = (0.5, 0.9, 0.99)
ENCODER_STEPS = 10
SMALL = {f"model.{name}": value for name, value in MODEL.items()} | {
  "batch.generated": 4,
  "batch.positives": 8,
  # Another train.num_steps is another run under a cosine.
  "optim.schedule": "constant",
  "train.num_steps": STEPS,
  "train.log_every": 1,
  "checkpoint.every": 4,
  "eval.every": 8,
}
UNRANKED = {"eval.every": 0, "checkpoint.best_metric": ""}
SMALL_ENCODER = {
  "model.base_channels": 8,
  "mae.batch_size": 16,
  "train.log_every": 1,
  "checkpoint.every": 5,
  "eval.every": 20,
}


def flags(changes):
  return tuple(f"--config.{key}={value}" for key, value in changes.items())


SMOKE = "--config=configs/digits.py:smoke"
TINY = flags(SMALL)


def command(module, *arguments):
  return [sys.executable, "-m", f"drift_jax.{module}", *map(str, arguments)]


def config_of(variant, *changes):
  """The digits' config of a variant, with {key: value}."""
  config = digits.get_config(variant)
  for change in changes:
    config.update_from_flattened_dict(change)
  return config


def last_step(workdir):
  """The last step in metrics.jsonl; 0 if there is none yet."""
  path = pathlib.Path(workdir) / "metrics.jsonl"
  lines = read_jsonl(path) if path.exists() else []
  return max((int(line["step"]) for line in lines), default=0)


def kill_after(target, workdir, delay, by, code):
  """Trains until metrics.jsonl holds the step, waits `delay` s, kills.

  Args:
    target: the step.
    workdir: of the run.
    delay: in seconds.
    by, code: a signal, and how the process ends by it, if not before.
  """
  process = subprocess.Popen(
    command("main", f"--workdir={workdir}", SMOKE, *TINY),
    cwd=ROOT,
    env=process_environment(),
    stderr=subprocess.PIPE,
    text=True,
  )
  wait_for(lambda: process.poll() or last_step(workdir) >= target, 240)
  time.sleep(delay)
  process.send_signal(by)
  _, stderr = process.communicate()
  assert last_step(workdir) >= target, stderr[-3000:]
  assert process.returncode in (0, code), stderr[-3000:]
  if code > 0 and process.returncode == code:
    # What it says last, and that it has saved what it has done.
    last = last_step(workdir)
    assert (workdir / "checkpoints" / str(last) / "checksums.json").exists()
    told = f"Told to stop: step {last} is saved; the same command"
    assert told in stderr.splitlines()[-1]


def train_alone(workdir):
  """Trains in a process of one device, to the end."""
  done = call("-m", "drift_jax.main", f"--workdir={workdir}", SMOKE, *TINY)
  assert done.returncode == 0, done.stderr[-3000:]
  return done


def train_here(workdir, *changes, variant="smoke"):
  """Trains a tiny generator in this process, on eight devices."""
  config = config_of(variant, SMALL, *changes)
  return train.train_and_evaluate(config, str(workdir))


def checkpoint_arrays(workdir, step):
  """Every array of a checkpoint: {path: array}."""
  arrays = {}
  for item in ("state", "feed"):
    with ocp.PyTreeCheckpointer() as reader:
      path = (pathlib.Path(workdir) / "checkpoints" / str(step)).resolve()
      shape = reader.metadata(path / item).item_metadata.tree
      restore_args = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shape
      )
      tree = reader.restore(
        path / item, args=ocp.args.PyTreeRestore(restore_args=restore_args)
      )
    for key, value in flatten(tree).items():
      arrays[f"{item}/{key}"] = np.asarray(value)
  return arrays


def flatten(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def records(workdir):
  """metrics.jsonl by step, without what depends on the clock."""
  merged: dict[int, dict[str, float]] = {}
  for record in read_jsonl(pathlib.Path(workdir) / "metrics.jsonl"):
    step = int(record["step"])
    merged.setdefault(step, {}).update(
      {k: v for k, v in record.items() if not k.startswith("perf/")}
    )
  return merged


def assert_same_run(a, b, step=STEPS, least=5 * 20):
  first, second = checkpoint_arrays(a, step), checkpoint_arrays(b, step)
  assert first.keys() == second.keys()
  # Parameters, two moments, the averages, queue, position, key, step.
  assert len(first) > least
  for name in first:
    np.testing.assert_array_equal(first[name], second[name], err_msg=name)
  assert records(a) == records(b)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(folder):
  """A run of 12 steps in a process of one device in one go."""
  train_alone(folder / "whole")
  return folder / "whole"


@pytest.mark.system
def test_killed_at_arbitrary_moments_is_bit_equal(folder, whole):
  """By SIGTERM, then by SIGKILL; the moments differ every time the test runs.

  SIGTERM saves a step that no schedule names and exits with 75.
  """
  workdir = folder / "killed"
  rng = np.random.default_rng()
  for by, code in ((signal.SIGTERM, 75), (signal.SIGKILL, -signal.SIGKILL)):
    reached = last_step(workdir)
    if reached < STEPS - 1:
      target = int(rng.integers(reached + 1, STEPS))
      delay = float(rng.uniform(0.0, 0.1))
      print(f"{by.name}: {delay:.4f} s after step {target}")
      kill_after(target, workdir, delay, by, code)
  done = train_alone(workdir)
  assert "Resuming after" in done.stderr or "Starting a new" in done.stderr
  assert_same_run(whole, workdir)


@pytest.fixture(scope="module")
def eight(folder):
  """The same run in this process, on 8 devices; holds steps 8 and 12."""
  train_here(folder / "eight")
  return folder / "eight"


@pytest.mark.system
def test_one_device_trains_as_eight(whole, eight):
  """Measured over 8 steps: losses within 2.3e-7, every metric within 6.4e-6."""
  one, many = records(whole), records(eight)
  for step in range(1, 9):
    assert one[step].keys() == many[step].keys()
    for name, value in many[step].items():
      assert_close(one[step][name], value, 1e-4, f"step {step} {name}")


def test_a_run_with_a_truncated_checkpoint_ends_bit_equal(
  folder, eight, caplog
):
  """Goes on from the checkpoint before it: queue, data position, metrics file
  and all."""
  workdir = folder / "half"
  shutil.copytree(eight, workdir)
  newest = workdir / "checkpoints" / f"{STEPS}"
  files = [p for p in (newest / "state").rglob("*") if p.is_file()]
  largest = max(files, key=lambda p: p.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:-1])
  with pytest.raises(checkpoint.CheckpointError) as caught:
    train_here(workdir)
  line = str(caught.value)
  assert f"{newest} is damaged: " in line and largest.name in line
  assert "--config.checkpoint.on_corrupt=previous to go on from step 8" in line
  assert newest.exists()

  with caplog.at_level("INFO"):
    train_here(workdir, {"checkpoint.on_corrupt": "previous"})
  assert "going on from step 8" in caplog.text
  assert "Resuming after step 8." in caplog.text
  assert (workdir / "checkpoints" / f"damaged_{STEPS}").exists()
  assert_same_run(eight, workdir)


def test_saved_on_8_by_1_goes_on_on_2_by_4(folder, eight, caplog):
  workdir = folder / "other_mesh"
  shutil.copytree(eight, workdir)
  shutil.rmtree(workdir / "checkpoints" / f"{STEPS}")
  with caplog.at_level("INFO"):
    train_here(workdir, {"mesh.data": 2, "mesh.fsdp": 4})
  assert "Resuming after step 8." in caplog.text
  here, there = records(workdir), records(eight)
  for step in range(9, STEPS + 1):
    for name, value in there[step].items():
      if not name.startswith("eval/"):
        assert_close(here[step][name], value, 1e-4, f"step {step} {name}")


def test_workdir_holds_what_is_promised(eight):
  config = json.loads((eight / "config.json").read_text())
  assert config["train"]["num_steps"] == STEPS
  assert list(eight.glob("events.out.tfevents.*"))
  for step in (8, STEPS):
    with Image.open(eight / "samples" / f"step_{step:07d}.png") as image:
      # Ten rows of ten 8x8 digits, magnified, with padding.
      assert image.size[0] == image.size[1] >= 10 * 8
  for name in ("drift_rms", "frechet"):
    with Image.open(eight / "plots" / f"{name}.png") as image:
      assert min(image.size) > 200
  last = records(eight)[STEPS]
  assert last["eval/fd_pixel/alpha_1.0"] > last["eval/fd_pixel/baseline"] > 0
  for name in ("drift_rms/0.02", "neighbours/0.2", "scale/global"):
    assert last[name] >= 0


def test_a_checkpoint_or_an_average_that_is_not_there(eight):
  def load(**changes):
    arguments = {"step": None, "ema_decay": None} | changes
    mesh = open_mesh(config_lib.Mesh(data=-1, fsdp=1))
    return open_run(str(eight), mesh, **arguments)

  with pytest.raises(checkpoint.CheckpointError, match="no checkpoint of step"):
    load(step=3)
  with pytest.raises(
    config_lib.ConfigError, match=r"valid options are \(0.99, 0.995\)"
  ):
    load(ema_decay=0.5)
  assert load().step in (8, STEPS)


def test_judged_by_a_network_in_the_loop(folder, eight):
  """The same training to the last bit; the best checkpoint is the lowest."""
  workdir = folder / "judged"
  judge = save_inception(folder / "inception")
  statistics = save_random_statistics(
    folder / "digits.npz", judge, resolution=8, crop="none"
  )
  train_here(
    workdir,
    {
      "eval.metrics": ("fd_inception",),
      "eval.inception.path": str(judge),
      "eval.inception.reference": str(statistics),
      "eval.num_samples": 50,
      "eval.batch_size": 20,
      "checkpoint.best_metric": "fd_inception",
    },
  )
  first, second = (checkpoint_arrays(x, STEPS) for x in (eight, workdir))
  for name in first:
    np.testing.assert_array_equal(first[name], second[name], err_msg=name)
  figures = {
    step: min(v for k, v in record.items() if k.startswith("eval/fd_inception"))
    for step, record in records(workdir).items()
    if step in (8, STEPS)
  }
  reader = checkpoint.Checkpointer(
    workdir / "checkpoints", best_metric="fd_inception", read_only=True
  )
  with contextlib.closing(reader):
    assert reader.best_step() == min(figures, key=figures.__getitem__)
  assert (workdir / "plots" / "frechet.png").exists()


def train_encoder(workdir):
  """The smoke form of the encoder's training by Muon, of half its steps."""
  shorter = {
    "optim.muon_learning_rate": 0.02,
    "mae.classification_steps": 5,
    "mae.classification_ramp": 3,
    "train.num_steps": ENCODER_STEPS,
  }
  config = config_of("encoder,smoke", SMALL_ENCODER, shorter)
  return train_mae.train_and_evaluate(config, str(workdir))


@pytest.fixture(scope="module")
def encoder(folder):
  train_encoder(folder / "encoder")
  return folder / "encoder"


def test_the_encoder_learns_and_is_drawn(encoder):
  assert (encoder / "plots" / "mae.png").exists()
  losses = [record["recon_loss"] for record in records(encoder).values()]
  assert len(losses) == ENCODER_STEPS and losses[-1] < losses[0]


def test_an_encoder_that_was_stopped_goes_on_bit_equal(folder, encoder, caplog):
  """Not through a shorter run: the last steps train otherwise (A.3)."""
  workdir = folder / "stopped_encoder"
  shutil.copytree(encoder, workdir)
  shutil.rmtree(workdir / "checkpoints" / str(ENCODER_STEPS))
  shutil.rmtree(workdir / train_mae.EXPORT)
  with caplog.at_level("INFO"):
    train_encoder(workdir)
  assert "Resuming after step 5." in caplog.text
  assert_same_run(encoder, workdir, step=ENCODER_STEPS, least=4 * 20)
  exported = [
    artifacts.load(path / train_mae.EXPORT) for path in (encoder, workdir)
  ]
  assert exported[0].sha256 == exported[1].sha256


def test_a_generator_in_the_features_of_the_encoder(folder, encoder):
  train_here(
    folder / "features",
    {
      "encoders.mae.path": str(encoder / train_mae.EXPORT),
      # Without the patches there is less to compile.
      "features.patch_mean_size": (),
      "features.patch_std_size": (),
      "train.num_steps": 2,
      "optim.warmup_steps": 1,
    },
    variant="features,smoke",
  )
  last = records(folder / "features")[2]
  assert last["eval/fd_encoder/alpha_1.0"] > last["eval/fd_encoder/baseline"]
  groups = {k.split("/")[-1] for k in last if k.startswith("scale/")}
  stages = {f"layer{number}" for number in range(1, 5)}
  assert groups == {"conv1", "global", "norm"} | stages


def averaged_state():
  """A state of NaN but for the average of decay 0.9, one of three."""
  state = make_state({"w": jnp.full((), jnp.nan)}, optax.identity(), DECAYS)
  return state.replace(ema=state.ema | {"0.9": {"w": jnp.ones(())}})


def averaged_config(variant, kind, **changes):
  """A parsed config of that state, evaluated by decay 0.9; (config, mesh)."""
  averages = {"ema.decays": DECAYS, "eval.ema_decay": 0.9}
  config = parse(config_of(variant, averages, changes))
  assert isinstance(config, kind)
  return config, open_mesh(config.mesh)


def test_the_generator_is_evaluated_by_its_average(tmp_path, monkeypatch):
  """By that of eval.ema_decay: neither the parameters nor another one."""
  used = []

  def make_sampler(task, mesh, seed):
    def bind(params):
      used.append(float(params["w"]))
      return lambda labels, alpha, index: np.full(
        (len(labels), 8, 8, 1), 0.5, np.float32
      )

    return bind

  monkeypatch.setattr(evaluation_lib, "make_sampler", make_sampler)
  metrics = {"eval.metrics": ("fd_pixel",)}
  config, mesh = averaged_config("smoke", GeneratorConfig, **metrics)
  task = generator_task(config, {}, mesh)
  readers = open_readers(config, None)
  evaluation = Evaluation(config, {}, task, readers, None, mesh)
  writer = create_writer(tmp_path, resume_step=-1, is_main=True)
  state, asked = averaged_state(), []
  evaluation(3, state, lambda: asked.append(1), writer=writer, path=tmp_path)
  writer.close()
  # Whether to stop: before each batch of figures and before the pictures.
  batches = -(-config.eval.num_samples // config.eval.batch_size)
  assert len(asked) == len(config.eval.alphas) * batches + 1
  assert used == [1.0]


def test_the_encoder_is_evaluated_by_its_average(tmp_path, monkeypatch):
  def sums(params, batch, valid, key, number, vae_params, *, task, layout):
    assert vae_params is None
    return {"recon_loss": params["w"] * jnp.sum(valid.astype(jnp.float32))}

  monkeypatch.setattr(mae_setup, "mae_eval_step", sums)
  batch = {"eval.batch_size": 96}  # does not divide the 540 images
  config, mesh = averaged_config("encoder,smoke", MaeConfig, **batch)
  readers = open_readers(config, None)
  task = mae_task(config, None)
  evaluate = held_out_evaluation(config, task, readers, None, mesh)
  writer = create_writer(tmp_path, resume_step=-1, is_main=True)
  state, asked = averaged_state(), []
  figures = evaluate(3, state, lambda: asked.append(1), writer=writer)
  writer.close()
  assert len(asked) == 6  # before each batch
  assert figures == {"eval/recon_loss": 1.0}


def test_a_run_that_diverges_leaves_a_finite_checkpoint(tmp_path):
  """The second step's loss and gradient are finite, its update is not: saving
  what they belong to would save infinities."""
  with pytest.raises(loop.NonFiniteError) as caught:
    train_here(
      tmp_path,
      UNRANKED,
      {
        "train.num_steps": 4,
        "checkpoint.every": 1,
        # The decay is part of the update: 1e38 * 1e3 * (a norm's scale of 1).
        "optim.warmup_steps": 1,
        "optim.learning_rate": 1e38,
        "optim.weight_decay": 1e3,
      },
    )
  last = max(
    int(path.name)
    for path in (tmp_path / "checkpoints").iterdir()
    if path.name.isdecimal()
  )
  for name, array in checkpoint_arrays(tmp_path, last).items():
    assert np.isfinite(array).all(), (last, name)
  line = str(caught.value)
  assert line.startswith("step 2 is not finite: ")
  assert "param_norm=inf" in line and "of step 1 is untouched" in line
