"""The whole system in real processes: resume, kills, meshes, the CLIs."""

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
import orbax.checkpoint as ocp
import pytest
from PIL import Image

import drift_jax
from configs import digits
from drift_jax import (
  artifacts,
  checkpoint,
  experiment,
  metrics,
  steps,
  train,
  train_mae,
)
from drift_jax import config as config_lib
from drift_jax.state import TrainState
from tests.conftest import assert_close
from tests.judges import save_inception, save_random_statistics
from tests.process import process_environment

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 24
SMOKE = "--config=configs/digits.py:smoke"
TINY = (
  "--config.model.depth=1",
  "--config.model.hidden_size=16",
  "--config.model.cond_dim=16",
  "--config.model.num_heads=2",
  "--config.batch.generated=4",
  "--config.batch.positives=8",
  # Another train.num_steps is another run under a cosine.
  "--config.optim.schedule=constant",
  "--config.train.log_every=1",
  "--config.checkpoint.every=4",
  "--config.eval.every=12",
)
UNRANKED = ("--config.eval.every=0", "--config.checkpoint.best_metric=")
ENCODER = (
  "--config=configs/digits.py:encoder,smoke",
  "--config.model.base_channels=8",
  "--config.mae.batch_size=16",
  "--config.train.log_every=1",
  "--config.checkpoint.every=2",
  "--config.eval.every=20",
)


def command(module, *arguments):
  return [sys.executable, "-m", f"drift_jax.{module}", *map(str, arguments)]


def last_step(workdir):
  """The last step in metrics.jsonl; 0 if there is none yet."""
  path = pathlib.Path(workdir) / "metrics.jsonl"
  lines = metrics.read_jsonl(path) if path.exists() else []
  return max((int(line["step"]) for line in lines), default=0)


def kill_after(
  target, *arguments, workdir, delay=0.0, by=signal.SIGKILL, code=None
):
  """Trains until metrics.jsonl holds the step, waits `delay` s, kills.

  Args:
    target: the step.
    arguments: of the run.
    workdir: of the run.
    delay: in seconds.
    by: a signal.
    code: how the process ends by it; by itself if not given.

  Returns:
    The process' exit code: 0 where it was done before the kill.
  """
  code = -by if code is None else code
  process = subprocess.Popen(
    command("main", f"--workdir={workdir}", *arguments),
    cwd=ROOT,
    env=process_environment(1),
    stderr=subprocess.PIPE,
    text=True,
  )
  deadline = time.monotonic() + 240
  while process.poll() is None and time.monotonic() < deadline:
    if last_step(workdir) >= target:
      time.sleep(delay)
      break
    time.sleep(0.005)
  process.send_signal(by)
  _, stderr = process.communicate()
  assert last_step(workdir) >= target, stderr[-3000:]
  assert process.returncode in (0, code), stderr[-3000:]
  if code > 0 and process.returncode == code:
    # What it says last, and that it has saved what it has done.
    last = last_step(workdir)
    assert (workdir / "checkpoints" / str(last) / "checksums.json").exists()
    assert (
      f"Told to stop: step {last} is saved; the same command"
      in (stderr.splitlines()[-1])
    )
  return process.returncode


def call(module, *arguments, devices=1, ok=True, kibibytes=None):
  """Runs a program; no file of it may grow beyond a size, as on a full disk."""
  line = command(module, *arguments)
  if kibibytes:
    line = ["bash", "-c", f'ulimit -f {kibibytes}; exec "$@"', "bash", *line]
  done = subprocess.run(
    line,
    cwd=ROOT,
    env=process_environment(devices),
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert (done.returncode == 0) == ok, done.stderr[-3000:]
  return done


def train_tiny(workdir, *arguments, **options):
  return call(
    "main",
    SMOKE,
    f"--workdir={workdir}",
    *TINY,
    *arguments,
    **options,
  )


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
  for record in metrics.read_jsonl(pathlib.Path(workdir) / "metrics.jsonl"):
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
  """A run of 24 steps on one device in one go."""
  train_tiny(folder / "whole", f"--config.train.num_steps={STEPS}")
  return folder / "whole"


def test_killed_at_arbitrary_moments_is_bit_equal(folder, whole):
  """By SIGTERM, then by SIGKILL; the moments differ every time the test runs.

  SIGTERM saves a step that no schedule names and exits with 75.
  """
  workdir = folder / "killed"
  rng = np.random.default_rng()
  draws = []
  reached = 0
  while len(draws) < 2 and reached < STEPS - 1:
    target = int(rng.integers(reached + 1, STEPS))
    delay = float(rng.uniform(0.0, 0.1))
    draws.append((target, delay))
    print(f"kill number {len(draws)}: {delay:.4f} s after step {target}")
    by = {"by": signal.SIGTERM, "code": 75} if len(draws) == 1 else {}
    kill_after(
      target,
      SMOKE,
      *TINY,
      f"--config.train.num_steps={STEPS}",
      workdir=workdir,
      delay=delay,
      **by,
    )
    reached = last_step(workdir)
  done = train_tiny(workdir, f"--config.train.num_steps={STEPS}")
  assert "Resuming after" in done.stderr or "Starting a new" in done.stderr
  assert_same_run(whole, workdir)


def test_a_run_with_a_truncated_checkpoint_ends_bit_equal(folder, whole):
  """Names the damage, then goes on from the checkpoint before it: queue, data
  position, metrics file and all, across an evaluation."""
  workdir = folder / "half"
  shutil.copytree(whole, workdir)
  newest = workdir / "checkpoints" / f"{STEPS}"
  files = [p for p in (newest / "state").rglob("*") if p.is_file()]
  largest = max(files, key=lambda p: p.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:-1])

  length = f"--config.train.num_steps={STEPS}"
  done = train_tiny(workdir, length, ok=False)
  assert "Traceback" not in done.stderr
  (line,) = [x for x in done.stderr.splitlines() if x.startswith("Error: ")]
  assert f"{newest} is damaged: " in line and largest.name in line
  assert "--config.checkpoint.on_corrupt=previous to go on from step 20" in line
  assert newest.exists()

  done = train_tiny(workdir, length, "--config.checkpoint.on_corrupt=previous")
  assert "going on from step 20" in done.stderr
  assert "Resuming after step 20." in done.stderr
  assert (workdir / "checkpoints" / f"damaged_{STEPS}").exists()
  assert_same_run(whole, workdir)


def test_a_full_disk_is_one_line_and_costs_no_checkpoint(folder, whole):
  workdir = folder / "full"
  shutil.copytree(whole, workdir)
  done = train_tiny(
    workdir,
    f"--config.train.num_steps={STEPS + 8}",
    ok=False,
    kibibytes=61,  # less than _METADATA takes
  )
  lines = done.stderr.splitlines()
  assert done.returncode == 1 and len(lines) < 20, done.stderr[-3000:]
  (line,) = [x for x in lines if "Error" in x or "Traceback" in x]
  assert line.startswith(f"Error: a checkpoint in {workdir}/checkpoints could")
  assert f"File too large. The checkpoint of step {STEPS} is untouched" in line
  first, second = (checkpoint_arrays(path, STEPS) for path in (whole, workdir))
  for name in first:
    np.testing.assert_array_equal(first[name], second[name], err_msg=name)


@pytest.fixture(scope="module")
def eight(folder):
  """Eight steps on 8 devices, with the checkpoints of steps 4 and 8."""
  train_tiny(
    folder / "eight",
    "--config.train.num_steps=8",
    *UNRANKED,
    devices=8,
  )
  return folder / "eight"


def test_one_device_trains_as_eight(whole, eight):
  """Measured over 8 steps: losses within 2.3e-7, every metric within 6.4e-6."""
  one, many = records(whole), records(eight)
  for step in range(1, 9):
    assert one[step].keys() == many[step].keys()
    for name, value in many[step].items():
      assert_close(one[step][name], value, 1e-4, f"step {step} {name}")


def test_saved_on_8_by_1_goes_on_on_2_by_4(folder, eight):
  workdir = folder / "other_mesh"
  shutil.copytree(eight, workdir)
  shutil.rmtree(workdir / "checkpoints" / "8")
  done = train_tiny(
    workdir,
    "--config.train.num_steps=8",
    *UNRANKED,
    "--config.mesh.data=2",
    "--config.mesh.fsdp=4",
    devices=8,
  )
  assert "Resuming after step 4." in done.stderr
  here, there = records(workdir), records(eight)
  for step in range(5, 9):
    for name, value in there[step].items():
      assert_close(here[step][name], value, 1e-4, f"step {step} {name}")


def test_workdir_holds_what_is_promised(whole):
  config = json.loads((whole / "config.json").read_text())
  assert config["train"]["num_steps"] == STEPS
  assert list(whole.glob("events.out.tfevents.*"))
  for step in (12, STEPS):
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
  """The same on one device and on eight, another with another seed."""
  out = folder / "grid.png"
  call(
    "sample",
    f"--workdir={whole}",
    "--labels=3,7",
    "--alpha=1.5",
    "--seed=0",
    f"--out={out}",
  )
  written = np.asarray(Image.open(out)).astype(int)
  assert written.shape[0] * 4 < written.shape[1]  # two rows of ten

  model = drift_jax.load(str(whole))

  def drawn(seed):
    samples = model.sample([3, 7], count=10, alpha=1.5, seed=seed)
    return samples.grid().astype(int)

  # A rounding away from the same grey value.
  same = drawn(0)
  assert same.shape == written.shape and np.abs(same - written).max() <= 1
  assert np.abs(drawn(1) - written).max() > 1


def test_sample_at_an_alpha_that_was_never_trained(whole):
  with pytest.raises(
    config_lib.ConfigError, match=r"trained for alpha in \[1.0, 4.0\]"
  ):
    drift_jax.load(str(whole)).sample(alpha=7.0)


def test_a_checkpoint_or_an_average_that_is_not_there(whole):
  def load(**changes):
    arguments = {"step": None, "ema_decay": None} | changes
    mesh = experiment.open_mesh(config_lib.Mesh(data=-1, fsdp=1))
    return experiment.load_generator(str(whole), mesh, **arguments)

  with pytest.raises(checkpoint.CheckpointError, match="no checkpoint of step"):
    load(step=3)
  with pytest.raises(
    config_lib.ConfigError, match=r"valid options are \(0.99, 0.995\)"
  ):
    load(ema_decay=0.5)
  assert load().step in (12, STEPS)


def test_evaluate_prints_a_table_and_writes_json(whole):
  done = call(
    "evaluate",
    f"--workdir={whole}",
    "--alphas=1,3",
    "--num_samples=100",
  )
  assert "| fd_pixel |" in done.stdout and "alpha 3" in done.stdout
  report = json.loads((whole / "evaluation.json").read_text())
  assert report["num_samples"] == 100
  assert set(report["results"]) == {"1.0", "3.0"}
  assert report["baseline"]["fd_pixel"] > 0


def test_judged_by_a_network_in_the_loop(folder, whole):
  """The same training to the last bit; the best checkpoint is the lowest."""
  workdir = folder / "judged"
  judge = save_inception(folder / "inception")
  statistics = save_random_statistics(
    folder / "digits.npz", judge, resolution=8, crop="none"
  )
  train_tiny(
    workdir,
    f"--config.train.num_steps={STEPS}",
    "--config.eval.metrics=('fd_inception',)",
    f"--config.eval.inception.path={judge}",
    f"--config.eval.inception.reference={statistics}",
    "--config.eval.num_samples=50",
    "--config.eval.batch_size=20",
    "--config.checkpoint.best_metric=fd_inception",
  )
  first, second = (checkpoint_arrays(x, STEPS) for x in (whole, workdir))
  for name in first:
    np.testing.assert_array_equal(first[name], second[name], err_msg=name)
  figures = {
    step: min(v for k, v in record.items() if k.startswith("eval/fd_inception"))
    for step, record in records(workdir).items()
    if step in (12, STEPS)
  }
  with checkpoint_reader(workdir) as reader:
    assert reader.best_step() == min(figures, key=figures.__getitem__)
  assert (workdir / "plots" / "frechet.png").exists()


@contextlib.contextmanager
def checkpoint_reader(workdir):
  reader = checkpoint.Checkpointer(
    workdir / "checkpoints", best_metric="fd_inception", read_only=True
  )
  try:
    yield reader
  finally:
    reader.close()


def test_another_experiment_may_not_use_the_workdir(whole):
  done = train_tiny(
    whole,
    f"--config.train.num_steps={STEPS}",
    "--config.optim.b1=0.5",
    ok=False,
  )
  assert "optim.b1: 0.9 -> 0.5" in done.stderr
  assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def encoder(folder):
  """The smoke form of the encoder's training: 20 steps."""
  call("main", *ENCODER, f"--workdir={folder / 'encoder'}")
  return folder / "encoder"


def test_the_encoder_learns_and_is_drawn(encoder):
  assert (encoder / "plots" / "mae.png").exists()
  losses = [
    record["recon_loss"] for _, record in sorted(records(encoder).items())
  ]
  assert len(losses) == 20 and losses[-1] < losses[0]


def test_an_encoder_that_was_killed_goes_on_bit_equal(folder, encoder):
  """Not through a shorter run: the last steps train otherwise (A.3)."""
  workdir = folder / "killed_encoder"
  code = kill_after(7, *ENCODER, workdir=workdir)
  assert code == -signal.SIGKILL and last_step(workdir) < 20
  done = call("main", *ENCODER, f"--workdir={workdir}")
  assert "Resuming after step" in done.stderr
  assert_same_run(encoder, workdir, step=20, least=4 * 20)
  exported = [
    artifacts.load(path / train_mae.EXPORT) for path in (encoder, workdir)
  ]
  assert exported[0].sha256 == exported[1].sha256


def test_a_generator_in_the_features_of_the_encoder(folder, encoder):
  generator = folder / "features"
  call(
    "main",
    "--config=configs/digits.py:features,smoke",
    f"--workdir={generator}",
    f"--config.encoders.mae.path={encoder / 'encoder'}",
    *TINY,
    # Without the patches there is less to compile.
    "--config.features.patch_mean_size=()",
    "--config.features.patch_std_size=()",
    "--config.train.num_steps=5",
    "--config.eval.every=8",
  )
  last = records(generator)[5]
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


def averaged_state(decays, good):
  """A state of NaN but for the average of one decay."""
  nan = {"w": jnp.full((), jnp.nan)}
  return TrainState(
    step=jnp.asarray(3, jnp.int32),
    rng=jax.random.key_data(jax.random.key(0)),
    params=nan,
    opt_state=(),
    ema={str(d): {"w": jnp.ones(())} if d == good else nan for d in decays},
  )


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

  monkeypatch.setattr(experiment, "make_sampler", make_sampler)
  config = digits.get_config("smoke")
  config.ema.decays = (0.5, 0.9, 0.99)
  config.eval.ema_decay = 0.9
  config.eval.metrics = ("fd_pixel",)
  config = config_lib.parse(config)
  assert isinstance(config, config_lib.GeneratorConfig)
  evaluation = train.Evaluation(
    config,
    {},
    experiment.generator_task(config, {}, experiment.open_mesh(config.mesh)),
    experiment.open_readers(config, None),
    None,
    experiment.open_mesh(config.mesh),
  )
  writer = metrics.create_writer(tmp_path, resume_step=-1, is_main=True)
  state = averaged_state(config.ema.decays, good=0.9)
  asked = []
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

  monkeypatch.setattr(steps, "mae_eval_step", sums)
  config = digits.get_config("encoder,smoke")
  config.ema.decays = (0.5, 0.9, 0.99)
  config.eval.ema_decay = 0.9
  config.eval.batch_size = 96  # does not divide the 540 images
  config = config_lib.parse(config)
  assert isinstance(config, config_lib.MaeConfig)
  evaluate = train_mae.held_out_evaluation(
    config,
    experiment.mae_task(config, None),
    experiment.open_readers(config, None),
    None,
    experiment.open_mesh(config.mesh),
  )
  writer = metrics.create_writer(tmp_path, resume_step=-1, is_main=True)
  state = averaged_state(config.ema.decays, good=0.9)
  asked = []
  figures = evaluate(3, state, lambda: asked.append(1), writer=writer)
  writer.close()
  assert len(asked) == 6  # before each batch
  assert figures == {"eval/recon_loss": 1.0}


def test_a_run_that_diverges_leaves_a_finite_checkpoint(tmp_path):
  """The second step's loss and gradient are finite, its update is not: saving
  what they belong to would save infinities."""
  done = train_tiny(
    tmp_path,
    "--config.train.num_steps=4",
    "--config.checkpoint.every=1",
    *UNRANKED,
    # The decay is part of the update: 1e38 * 1e3 * (a norm's scale of 1).
    "--config.optim.warmup_steps=1",
    "--config.optim.learning_rate=1e38",
    "--config.optim.weight_decay=1e3",
    ok=False,
  )
  last = max(
    int(path.name)
    for path in (tmp_path / "checkpoints").iterdir()
    if path.name.isdecimal()
  )
  for name, array in checkpoint_arrays(tmp_path, last).items():
    assert np.isfinite(array).all(), (last, name)
  line = done.stderr.splitlines()[-1]
  assert line.startswith("Error: step 2 is not finite: ")
  assert "param_norm=inf" in line and "of step 1 is untouched" in line
