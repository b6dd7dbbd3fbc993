"""Training in several real processes: the same losses, resume, kills, errors.

Processes are slow to start and to compile: those of one fixture run one job
after the other, and all share a compilation cache. Of several, the first one
compiles for all.
"""

import ast
import concurrent.futures
import json
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from drift_jax.tasks.mae import train as train_mae
from drift_jax.training import artifacts, checksums
from tests.conftest import assert_close
from tests.process import call, free_port, process_environment
from tests.tasks.generator.train_test import (
  checkpoint_arrays,
  last_step,
  records,
)

pytestmark = pytest.mark.system

ROOT = pathlib.Path(__file__).parent.parent
GENERATOR, ENCODER = (
  "configs/digits.py:smoke",
  "configs/digits.py:encoder,smoke",
)


def values(text):
  """{key: value} of words KEY=VALUE, as on a command line."""
  pairs = (word.split("=") for word in text.split())
  return {key: ast.literal_eval(value) for key, value in pairs}


# One mesh for all: their steps are one program, compiled once.
SMALL = values("""
  model.depth=1 model.hidden_size=16 model.cond_dim=16 model.num_heads=2
  batch.generated=4 batch.positives=8 drift.temperatures=(0.05,0.2)
  features.patch_mean_size=() features.patch_std_size=() ema.decays=(0.995,)
  optim.schedule='constant' optim.warmup_steps=1 train.log_every=1 eval.every=0
  checkpoint.best_metric='' mesh.fsdp=2
""")
GROUPED = SMALL | values("""
  batch.reals='class_grouped' train.num_steps=6 checkpoint.every=3
""")
# Parameters in parts over all processes.
MAE = values("""
  model.base_channels=8 mae.batch_size=16 mae.classification_steps=3
  mae.classification_ramp=2 train.log_every=1 train.num_steps=6
  checkpoint.every=3 eval.every=6 mesh.fsdp=4
""")
QUEUE = SMALL | values("""
  train.num_steps=16 checkpoint.every=4 checkpoint.keep_latest=5 eval.every=16
  eval.alphas=(1.0,) eval.metrics=('fd_pixel','coverage','label_accuracy')
  eval.num_samples=100 eval.batch_size=50 processes.heartbeat_timeout=10
""")
HEARTBEAT = 10
# In front of each program. JAX' keys of compiled programs name the process, of
# several on CPU: without that, all find what the first one has compiled.
SAME_KEYS = """if True:
  from unittest import mock
  from absl import flags
  from drift_jax.system import exits

  key = "jax._src.cache_key._hash_accelerator_config"
  mock.patch(key, lambda *arguments: None).start()
"""
# After those that define a `program`.
RUN = """
  flags.FLAGS.mark_as_parsed()
  exits.run(program)
"""
# One training after the other. A job may begin with a copy of a folder, which
# other processes may still have to write, and may be one that fails in all
# processes: its message is printed.
DRIVER = """if True:
  import json
  import os
  import shutil
  import sys
  import time
  from ml_collections import ConfigDict
  from drift_jax import config as config_lib
  from drift_jax import tasks
  from drift_jax.system import console, exits, processes
  from drift_jax.system.errors import ERRORS

  def copy(source, target, step):
    deadline = time.monotonic() + 300
    while not os.path.exists(f"{source}.done"):
      assert time.monotonic() < deadline, source
      time.sleep(0.05)
    shutil.copytree(
      source, target, ignore=lambda _, names: [
        n for n in names if n.isdecimal() and n != step]
    )

  def program():
    exits.join(*(json.loads(sys.argv[2]) or ("", None, None)))
    console.setup(processes.index())
    for job in json.loads(sys.argv[1]):
      if job["copy"]:
        processes.from_first(lambda: copy(*job["copy"]))
      config = ConfigDict(config_lib.load_config(job["config"]))
      for key, value in job["values"].items():
        value = tuple(value) if isinstance(value, list) else value
        config.update_from_flattened_dict({key: value})
      trainer = tasks.trainer(config.task)
      try:
        trainer.train_and_evaluate(config, job["workdir"])
        assert not job["fails"]
        if processes.is_first():
          open(job["workdir"] + ".done", "w").close()
      except ERRORS as error:
        if not job["fails"]:
          raise
        print(f"failed: {error}", flush=True)
"""
# The command line; where HELD is given, with steps and batches of evaluations
# that leave time for signals, and with saves of the step HELD that never end.
SLOW = """if True:
  import os
  import time
  import orbax.checkpoint as ocp
  from absl import app
  from drift_jax import config as config_lib
  from drift_jax import main
  from drift_jax.metrics import generation
  from drift_jax.system import console

  check = generation._check_finite
  update = console.Progress.update
  finalize = ocp.CompositeCheckpointHandler.finalize

  def slow(self, count=1):
    time.sleep(0.2)
    update(self, count)

  def held(self, directory, *args, **kwargs):
    if str(directory.name).startswith(os.environ["HELD"]):
      time.sleep(600)
    return finalize(self, directory, *args, **kwargs)

  def watched(batch, alpha):
    print("batch", flush=True)
    time.sleep(1)
    check(batch, alpha)

  if "HELD" in os.environ:
    generation._check_finite = watched
    console.Progress.update = slow
  if os.environ.get("HELD"):
    ocp.CompositeCheckpointHandler.finalize = held
  main.define_flags()
  app.run(main.main, flags_parser=config_lib.parse_flags)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("multi")


class Group:
  """Processes of one program, each with its own files of output."""

  def __init__(self, folder, count, devices, command, **environment):
    """Starts them.

    Args:
      folder: gets the output.
      count, devices: processes, and devices of each.
      command: (number of a process, HOST:PORT) -> a program, its arguments.
      environment: more variables.
    """
    address = f"127.0.0.1:{free_port()}"
    self._outputs = [folder / f"{address}.{i}.txt" for i in range(count)]
    variables = process_environment(devices)
    variables["JAX_SHARE_BINARY_BETWEEN_HOSTS"] = str(count > 1)
    self.processes = []
    for i, output in enumerate(self._outputs):
      program, *arguments = map(str, command(i, address))
      program += RUN if "def program" in program else ""
      with output.open("w") as file:
        self.processes.append(
          subprocess.Popen(
            [sys.executable, "-c", SAME_KEYS + program, *arguments],
            cwd=ROOT,
            env=variables | environment,
            stdout=file,
            stderr=subprocess.STDOUT,
          )
        )

  def output(self, i):
    return self._outputs[i].read_text()

  def wait(self, seconds=400):
    """The exit codes; fails, and kills, where one does not end in time."""
    deadline = time.monotonic() + seconds
    try:
      return [
        process.wait(max(0.1, deadline - time.monotonic()))
        for process in self.processes
      ]
    except subprocess.TimeoutExpired:
      raise AssertionError(self.everything()) from None
    finally:
      self.kill()

  def kill(self):
    for process in self.processes:
      process.kill()

  def wait_until(self, condition, seconds=180):
    """Fails where a process ends before."""
    deadline = time.monotonic() + seconds
    while not condition():
      alive = all(process.poll() is None for process in self.processes)
      if not alive or time.monotonic() > deadline:
        self.wait(0.1)
        raise AssertionError(self.everything())
      time.sleep(0.01)

  def everything(self):
    return "\n".join(
      f"--- process {i}: {process.poll()}\n{self.output(i)[-3000:]}"
      for i, process in enumerate(self.processes)
    )


def start_jobs(folder, count, devices, jobs):
  """One training after the other.

  Args:
    folder: of the workdirs.
    count, devices: processes, and devices of each.
    jobs: (config, changed values, name of the workdir, (name of another one,
      its step) to begin with a copy of); those that are to fail: 'bad...'.
  """
  described = [
    {
      "config": config,
      "values": changes,
      "workdir": str(folder / name),
      "copy": [str(folder / source[0]), str(folder / name), str(source[1])]
      if source
      else [],
      "fails": name.startswith("bad"),
    }
    for config, changes, name, *sources in jobs
    for source in sources or [None]
  ]

  def command(i, address):
    place = [address, count, i] if count > 1 else None
    return DRIVER, json.dumps(described), json.dumps(place)

  return Group(folder, count, devices, command)


def start_run(folder, count, devices, workdir, config=QUEUE, **environment):
  """A queue run by the command line."""
  flags = [f"--config.{name}={value}" for name, value in config.items()]
  flags = [f"--config={GENERATOR}", f"--workdir={workdir}", *flags]

  def command(i, address):
    place = [f"--coordinator={address}", f"--num_processes={count}"]
    return SLOW, *flags, *place, f"--process_id={i}"

  return Group(folder, count, devices, command, **environment)


@pytest.fixture(scope="module")
def two(folder):
  """Runs of 1 x 4 and of 2 x 2, at once; returns the two processes.

  The one: runs of either task. The two: mistakes, the same runs, a queue, and
  what the one began.
  """
  few = {"eval.every": 0}
  (folder / "bad_lines").mkdir()
  (folder / "bad_lines" / "metrics.jsonl").write_text("[1]\n")
  one = start_jobs(
    folder,
    *(1, 4),
    [
      (GENERATOR, GROUPED, "grouped1"),
      (ENCODER, MAE, "mae1"),
    ],
  )
  two = start_jobs(
    folder,
    *(2, 2),
    [
      (GENERATOR, GROUPED | {"mesh.data": 3}, "bad"),
      (GENERATOR, GROUPED | {"batch.labels": 6}, "bad"),
      ("configs/imagenet_latent.py:smoke", {}, "bad"),
      (GENERATOR, GROUPED, "bad_lines"),
      (GENERATOR, GROUPED, "grouped2"),
      (GENERATOR, QUEUE, "whole"),
      (ENCODER, MAE, "mae2"),
      (GENERATOR, GROUPED, "grouped1to2", ("grouped1", 3)),
      (ENCODER, MAE | few, "mae1to2", ("mae1", 3)),
    ],
  )
  try:
    assert two.wait() == [0, 0], two.everything()
    assert one.wait() == [0], one.everything()
  finally:
    one.kill()
  return two


def assert_trains_as(workdir, other, steps):
  """Every metric of these steps, evaluations included, to 1e-4."""
  here, there = records(workdir), records(other)
  for step in steps:
    assert here[step].keys() == there[step].keys()
    for name, value in there[step].items():
      # What is zero but for rounding has no digits to compare.
      if name.startswith("drift_rms/") and value < 1e-9:
        continue
      assert_close(here[step][name], value, 1e-4, f"{workdir} {step} {name}")


@pytest.mark.parametrize("name", ["grouped2", "mae2"])
def test_processes_train_as_one(folder, two, name):
  assert_trains_as(folder / name, folder / f"{name[:-1]}1", range(1, 7))


@pytest.mark.parametrize("task", ["grouped", "mae"])
def test_two_processes_continue_one(folder, two, task):
  # The last step is evaluated, the continued encoder is not.
  assert_trains_as(folder / f"{task}1to2", folder / f"{task}1", range(4, 6))


def test_the_first_process_exports_what_both_hold(folder, two):
  exported = (
    jax.tree.leaves(artifacts.load(folder / name / train_mae.EXPORT).params)
    for name in ("mae1", "mae2")
  )
  for ours, theirs in zip(*exported, strict=True):
    assert_close(theirs, ours, 1e-4)


def assert_same_run(a, b, step):
  """Bit by bit: state, queues, position, and every metric."""
  first, second = checkpoint_arrays(a, step), checkpoint_arrays(b, step)
  assert first.keys() == second.keys() and len(first) > 100
  for name in first:
    np.testing.assert_array_equal(first[name], second[name], err_msg=name)
  assert records(a) == records(b)


def test_a_queue_for_each_of_two_processes(folder, two):
  """Evaluated and saved by both; plots, pictures and log by the first."""
  whole = folder / "whole"
  figures = records(whole)[16]
  for name in ("fd_pixel", "coverage", "label_accuracy"):
    assert np.isfinite(figures[f"eval/{name}/alpha_1.0"]), name
  queues = checkpoint_arrays(whole, 16)["feed/['bank']['samples']"]
  assert len(queues) == 2 and not np.array_equal(*queues)
  with Image.open(whole / "samples" / "step_0000016.png") as image:
    assert min(image.size) > 80
  assert (whole / "plots" / "drift_rms.png").exists()
  assert len(list(whole.glob("events.out.tfevents.*"))) == 1
  assert "step 16/16 " in two.output(0) and "Resuming" in two.output(0)
  assert "step " not in two.output(1) and "Resuming" not in two.output(1)


def test_mistakes_in_the_config_are_told_by_all(folder, two):
  """Before anything is read or written."""
  for process in range(2):
    mesh, labels, missing, lines = [
      line.removeprefix("failed: ")
      for line in two.output(process).splitlines()
      if line.startswith("failed: ")
    ]
    assert "mesh data=3, fsdp=2 does not fit 4 devices: give sizes" in mesh
    assert "batch.labels=6 can't be split over the 4 devices" in labels
    assert "use a multiple of 4" in labels
    listed = "inputs are missing, which process 0 lists"
    assert missing == ("3 inputs are missing:" if process == 0 else listed)
    # Of what the first one alone does.
    assert "metrics.jsonl, line 1 is no JSON object" in lines
    assert lines.startswith("process 0 failed") == (process == 1)
  assert not (folder / "bad").exists()


def test_signals_to_one_of_two(folder, two):
  """SIGTERM, SIGKILL while a save is being written, then SIGTERM between the
  batches of an evaluation: what the next starts make of it is bit-equal."""
  workdir = folder / "signals"
  checkpoints = workdir / "checkpoints"

  def saved():
    return [int(p.name) for p in checkpoints.glob("*") if p.name.isdecimal()]

  # One consistent checkpoint at a step that no schedule names.
  group = start_run(folder, 2, 2, workdir, HELD="")
  group.wait_until(lambda: last_step(workdir) >= 1)
  group.processes[1].send_signal(signal.SIGTERM)
  assert group.wait(60) == [75, 75], group.everything()
  stopped = max(saved())
  assert 1 < stopped < 12 and last_step(workdir) == stopped
  assert (checkpoints / str(stopped) / "checksums.json").exists()
  lines = [x for x in group.output(0).splitlines() if "Told to stop" in x]
  assert len(lines) == 1 and f"step {stopped} is saved; the same" in lines[0]
  assert "Told to stop" not in group.output(1)
  assert not list(checkpoints.glob("*tmp*"))

  group = start_run(folder, 2, 2, workdir, HELD="12")
  group.wait_until(lambda: last_step(workdir) >= 13)
  assert list(checkpoints.glob("12*tmp*"))
  kept = max(saved())
  assert kept < 12
  group.processes[1].send_signal(signal.SIGKILL)
  began = time.monotonic()
  codes = group.wait(60)
  assert time.monotonic() - began < HEARTBEAT, group.everything()
  assert codes == [75, -signal.SIGKILL], group.everything()
  assert f"Resuming after step {stopped}." in group.output(0)
  assert "was lost" in group.output(0)
  assert "goes on from the newest checkpoint" in group.output(0)
  assert "Traceback" not in group.output(0)

  group = start_run(folder, 2, 2, workdir, HELD="")
  group.wait_until(lambda: "batch" in group.output(0))
  group.processes[1].send_signal(signal.SIGTERM)
  assert group.wait(60) == [75, 75], group.everything()
  assert f"Resuming after step {kept}." in group.output(0)
  assert "step 16 is saved; the same" in group.output(0)
  assert "eval/fd_pixel/alpha_1.0" not in records(workdir)[16]
  assert not list(checkpoints.glob("*tmp*"))

  group = start_run(folder, 2, 2, workdir)
  assert group.wait() == [0, 0], group.everything()
  assert "Resuming after step 16." in group.output(0)
  assert_same_run(folder / "whole", workdir, 16)
  # Each process has summed its own files.
  last = checkpoints / "16"
  assert checksums.compare(epath.Path(last)) == ([], True)
  for process, name in enumerate(("checksums.json", "checksums.1.json")):
    sums = json.loads((last / name).read_text())
    summed = {checksums.owner(name) for name in sums if sums[name] is not None}
    assert summed == {process}


# Processes that start no training: the last one is done at once, the one before
# it falls silent when JAX' patience with the last one would be over.
ALONE = """if True:
  import os, sys, time
  from drift_jax.system import console, exits, processes

  def program():
    number = int(sys.argv[2])
    exits.join(sys.argv[1], 3, number, heartbeat_timeout=8)
    console.setup(processes.index())
    if number == 2:
      return
    if number == 1:
      time.sleep(9)
      print("silent", flush=True)
      os.kill(os.getpid(), 19)
    time.sleep(120)
"""


@pytest.fixture(scope="module")
def waiting(folder):
  """Started before the other tests: it takes long and computes nothing."""

  def silent():
    group = Group(folder, 3, 1, lambda i, at: (ALONE, at, i))
    group.wait_until(lambda: "silent" in group.output(1))
    began = time.monotonic()
    try:
      return group, group.processes[0].wait(60), time.monotonic() - began
    finally:
      group.kill()
      group.wait()

  def unreachable():
    return call(
      *("-m", "drift_jax.main", f"--config={GENERATOR}"),
      *(f"--workdir={folder / 'unreachable'}", "--coordinator=127.0.0.1:1"),
      *("--num_processes=2", "--process_id=1"),
      "--config.processes.join_timeout=3",
    )

  with concurrent.futures.ThreadPoolExecutor(1) as executor:
    yield [executor.submit(function) for function in (silent, unreachable)]


def test_a_workdir_that_can_not_be_written(waiting, folder):
  """A file in its place; all end at once, before anything compiles."""
  (folder / "file").write_text("")
  began = time.monotonic()
  group = start_run(folder, 2, 1, folder / "file" / "run", GROUPED)
  assert group.wait(60) == [1, 1], group.everything()
  assert time.monotonic() - began < 60
  first = [x for x in group.output(0).splitlines() if x.startswith("Error: ")]
  assert len(first) == 1 and f"{folder / 'file'} is a file" in first[0]
  assert "process 0" in group.output(1)
  for process in range(2):
    assert "can't be written" in group.output(process)
    assert "Traceback" not in group.output(process)


# One dies; the other goes on to what needs both, or fails since it is alone.
LOST = """if True:
  import os, sys, time
  import numpy as np
  from drift_jax.metrics.inception import InceptionScore
  from drift_jax.system import exits, processes, sharding
  from drift_jax.system.errors import naming
  from drift_jax.training import checkpoint

  def program():
    number = int(sys.argv[2])
    exits.join(sys.argv[1], 2, number, heartbeat_timeout=10)
    mesh = sharding.make_mesh(2, 1)
    state = {"x": sharding.put_batch(np.ones((1, 2), np.float32), mesh)}
    saved = checkpoint.Checkpointer(sys.argv[4])
    score = InceptionScore(2, 3, 1)
    score.update(np.ones((1, 3)), np.array([number]))
    processes.gather(np.ones((2, 2)))
    if number == int(sys.argv[5]):
      os.kill(os.getpid(), 9)
    time.sleep(0.5)
    if sys.argv[3] == "evaluation":
      with naming("eval"):
        score.result()
    elif sys.argv[3] == "save":
      saved.save(1, state, {})
      saved.wait()
    else:
      raise OSError("nothing here names another process")
"""


def lose(folder, what, number):
  """What two processes say and end with, one of which dies."""
  place = folder / f"lost_{what}_{number}"
  group = Group(folder, 2, 1, lambda i, at: (LOST, at, i, what, place, number))
  return group, group.wait(120)


@pytest.mark.parametrize("what", ["evaluation", "save", "disk"])
def test_what_follows_from_a_lost_process(waiting, folder, what):
  """Whatever the class and the text of the error, if there is one at all."""
  group, codes = lose(folder, what, 1)
  assert codes == [75, -signal.SIGKILL], group.everything()
  assert "was lost" in group.output(0)
  assert "Error: " not in group.output(0)


def test_what_follows_from_a_lost_first_process(waiting, folder):
  """JAX aborts those that can't reach it any more, if they have not ended by
  themselves."""
  group, codes = lose(folder, "evaluation", 0)
  assert codes[0] == -signal.SIGKILL and codes[1] in (75, -signal.SIGABRT)
  assert "was lost" in group.output(1) or codes[1] != 75
  assert "Error: " not in group.output(1)


# What evaluates or samples: one process fails, the other waits for it.
STATELESS = """if True:
  import importlib, sys, time
  from absl import app
  from drift_jax import sampling
  from drift_jax.system import processes
  from drift_jax.tasks.generator import reports

  def fail(*arguments, **settings):
    if processes.index():
      raise OSError("this disk is full")
    time.sleep(300)

  reports.report_on_images = sampling.load = fail
  program = importlib.import_module(f"drift_jax.{sys.argv.pop(1)}")
  program.define_flags()
  app.run(program.main)
"""


@pytest.mark.parametrize(
  ("name", "source"),
  [("evaluate", "--images=images"), ("sample", "--from=export")],
)
def test_a_program_without_a_state_ends_in_all_processes(folder, name, source):
  def command(i, address):
    place = (f"--coordinator={address}", "--num_processes=2")
    if name == "evaluate":
      place += (f"--out={folder / 'report.json'}",)
    return STATELESS, name, source, *place, f"--process_id={i}"

  group = Group(folder, 2, 1, command)
  # JAX would tell after 100 s.
  assert group.wait(90) == [1, 1], group.everything()
  assert "\nError: this disk is full\n" in f"\n{group.output(1)}"
  (line,) = [x for x in group.output(0).splitlines() if "Error" in x]
  assert line == "Error: process 1 ended first: this disk is full"


def test_one_that_is_silent_is_lost(waiting):
  """Where no collective tells: it has stopped, not ended. And not one that is
  done, for which the others may still work for long."""
  group, code, seconds = waiting[0].result()
  assert code == 75 and seconds < 8, group.everything()
  assert "Process 1 was lost: no sign of life for 4 s; the same command" in (
    group.output(0)
  )


def test_a_coordinator_that_can_not_be_reached(waiting, folder):
  """It may be a host that restarts: to be tried again."""
  done = waiting[1].result()
  assert done.returncode == 75, done.stderr[-3000:]
  assert "Traceback" not in done.stderr
  line = done.stderr.splitlines()[-1]
  assert " processes: coordinator='127.0.0.1:1', process 1 of 2 did not" in line
  assert "within 3 s: start every process, with the same HOST:PORT" in line
  assert not (folder / "unreachable").exists()
