"""Policies end to end: training, resume, rollouts, real formats, refusals."""

import contextlib
import functools
import json
import shutil
import sys
import types

import h5py
import jax
import numpy as np
import pytest
from PIL import Image

from configs import policy
from drift_jax import config as config_lib
from drift_jax.metrics.writers import read_jsonl
from drift_jax.system import exits, sharding
from drift_jax.system.errors import ERRORS
from drift_jax.tasks import parse
from drift_jax.tasks.policy import evaluation as evaluation_lib
from drift_jax.tasks.policy import observations, robots
from drift_jax.tasks.policy import train as train_policy
from drift_jax.tasks.policy.demonstrations import Demonstrations
from drift_jax.tasks.policy.evaluation import Evaluation, load_policy, make_act
from drift_jax.tasks.policy.replay import write_replay
from drift_jax.tasks.policy.setup import load_demonstrations
from drift_jax.tasks.policy.windows import Normalizer
from drift_jax.tools.work import rollout
from drift_jax.training.run import open_mesh
from tests import process


def small(variant="", **changes):
  """The smoke variant, whose batch the tests' eight devices share."""
  config = policy.get_config(f"{variant},smoke")
  config.update_from_flattened_dict(
    {key.replace("__", "."): value for key, value in changes.items()}
  )
  return config


def assert_same(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)


@contextlib.contextmanager
def on_one_device():
  """As if there were no other: for eight, all takes twice as long."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, "find_devices", lambda: jax.devices()[:1])
    yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """{method: (state, workdir)} of the obstacle's smoke runs.

  The first one on all devices, and with a learned temperature in its state.
  """

  def run(method, config):
    workdir = tmp_path_factory.mktemp(method)
    state = train_policy.train_and_evaluate(config, str(workdir))
    return state, workdir

  out = {"drifting": run("drifting", small("learned"))}
  with on_one_device():
    for method in ("diffusion", "regression"):
      out[method] = run(method, small(method, eval__parallel=1))
  return out


@pytest.mark.slow
@pytest.mark.parametrize(
  ("method", "samplers"),
  [
    ("drifting", ["one_step"]),
    ("diffusion", ["ddpm:10", "ddim:5"]),
    ("regression", ["one_step"]),
  ],
)
def test_a_run_leaves_figures_curves_and_videos(trained, method, samplers):
  state, workdir = trained[method]
  assert int(state.step) == 4
  found = read_jsonl(workdir / "metrics.jsonl")
  assert ("drift_rms/0.2" in found[0]) == (method == "drifting")
  assert not (workdir / "classes.json").exists()
  report = json.loads((workdir / "figures.json").read_text())
  assert report["step"] == 4 and list(report)[1:] == samplers
  for name in samplers:
    rates = [
      record[f"eval/{name}/success_rate"]
      for record in found
      if f"eval/{name}/success_rate" in record
    ]
    assert len(rates) == 2
    assert report[name]["evaluations"] == [2, 4]
    assert report[name]["success_rate"] == pytest.approx(np.mean(rates))
    assert report[name]["milliseconds_per_chunk"] > 0
    with Image.open(workdir / f"videos/{name.replace(':', '_')}.gif") as gif:
      assert gif.n_frames > 2
      # Two episodes side by side.
      assert gif.width == 2 * gif.height
  with Image.open(workdir / "plots" / "curves.png") as picture:
    assert picture.width > 300


def test_the_last_evaluations_are_averaged(tmp_path):
  config = parse(small(eval__checkpoints=3, eval__videos=0))
  # A step that was evaluated again, after a resume, counts once.
  evaluated = [(2, 0.1), (4, 0.1), (6, 0.2), (8, 0.9), (8, 0.5), (10, 0.8)]
  lines = [
    json.dumps({"step": step, "eval/one_step/success_rate": rate})
    for step, rate in evaluated
  ]
  lines.insert(1, json.dumps({"step": 3, "loss": 1.0}))
  (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
  evaluation = Evaluation(config, {}, [], None, tmp_path)
  means = evaluation.means("one_step")
  assert means["evaluations"] == [6, 8, 10]
  assert means["success_rate"] == pytest.approx((0.2 + 0.5 + 0.8) / 3)


def test_rollouts_are_stopped_between_chunks(tmp_path, monkeypatch):
  chunks = []

  def run_episodes(config, environments, act):
    while True:
      chunks.append(act({}, np.zeros(1), len(chunks)))

  def check():
    if len(chunks) == 3:
      raise exits.Preempted

  monkeypatch.setattr(evaluation_lib, "run_episodes", run_episodes)
  monkeypatch.setattr(Evaluation, "_params", lambda *_: "params")
  acts = {"one_step": lambda params, seen, episodes, call: (params, call)}
  config = parse(small())
  evaluation = Evaluation(config, acts, [], None, tmp_path)
  with pytest.raises(exits.Preempted):
    evaluation(4, None, check, writer=None)
  assert chunks == [("params", 0), ("params", 1), ("params", 2)]


@pytest.mark.slow
def test_a_resumed_run_is_bit_equal(tmp_path, trained):
  """From step 2 on, whose temperature is in the checkpoint as well."""
  whole, workdir = trained["drifting"]
  shutil.copytree(workdir, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
  with pytest.raises(config_lib.ConfigError, match=r"data\.seed: 0 -> 1"):
    train_policy.train_and_evaluate(
      small("learned", data__seed=1), str(tmp_path / "run")
    )
  resumed = train_policy.train_and_evaluate(
    small("learned", eval__every=0, eval__videos=0), str(tmp_path / "run")
  )
  assert int(resumed.step) == 4
  assert_same(whole, resumed)


@pytest.mark.slow
def test_a_policy_is_loaded_with_its_normaliser(trained, monkeypatch):
  state, workdir = trained["drifting"]
  mesh = open_mesh(config_lib.Mesh(data=-1, fsdp=1))
  loaded = load_policy(str(workdir), mesh)
  assert loaded.step == 4
  demonstrations = load_demonstrations(loaded.config)
  assert_same(loaded.normalizer.ranges, Normalizer.fit(demonstrations).ranges)
  assert_same(loaded.params, state.ema["0.99"])
  act = make_act(loaded.task, loaded.normalizer, None, seed=loaded.config.seed)
  closed = []
  monkeypatch.setattr(
    type(robots.make("obstacle")), "close", lambda self: closed.append(self)
  )
  with evaluation_lib.environments(loaded.config) as opened:
    assert len(opened) == loaded.config.eval.parallel == 2
    episodes = evaluation_lib.run_episodes(
      loaded.config, opened, functools.partial(act, loaded.params)
    )
  assert closed == opened[::-1]
  records = read_jsonl(workdir / "metrics.jsonl")
  last = [r for r in records if "eval/one_step/score" in r][-1]
  for name, value in robots.summarize(episodes).items():
    assert last[f"eval/one_step/{name}"] == value
  with pytest.raises(config_lib.ConfigError, match="config.json is missing"):
    load_policy(str(workdir / "plots"), mesh)


@pytest.mark.slow
def test_the_rollout_tool(trained, tmp_path):
  _, workdir = trained["diffusion"]
  video = tmp_path / "video.gif"
  done = process.call(
    *("-m", "drift_jax.tools.rollout", f"--workdir={workdir}"),
    *("--samplers=ddim:2", "--episodes=3", f"--video={video}"),
    f"--json={tmp_path / 'figures.json'}",
  )
  assert done.returncode == 0, done.stderr
  report = json.loads(done.stdout)
  assert report["step"] == {"checkpoint": 4}
  assert 0 <= report["ddim:2"]["success_rate"] <= 1
  assert json.loads((tmp_path / "figures.json").read_text()) == report
  with Image.open(video) as gif:
    assert gif.n_frames > 2
  flags = dict.fromkeys(("step", "episodes", "seed", "samplers", "video"))
  flags |= {"videos": 4}
  for changes, text in (
    ({"samplers": ["ddim:3"]}, "valid samplers are 'ddpm:10' and 'ddim:N'"),
    ({"video": str(video)}, "--video is of one sampler"),
  ):
    with pytest.raises(config_lib.ConfigError, match=text):
      rollout.run(str(workdir), types.SimpleNamespace(**flags | changes))


@pytest.fixture(scope="module")
def pusht(tmp_path_factory):
  """Two short episodes of a scripted pusher in Diffusion Policy's format."""
  made, _ = robots.collect(
    "pusht", episodes=1, seed=0, observations=("state", "img"), keep="all"
  )
  rows = slice(40)
  path = tmp_path_factory.mktemp("pusht") / "pusht_cchi_v7_replay.zarr"
  write_replay(
    path,
    Demonstrations(
      {name: values[rows] for name, values in made.observations.items()},
      made.actions[rows],
      np.array([20, 40]),
    ),
  )
  return path


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["pusht", "pusht_image"])
def test_pusht_from_file_to_rollout(tmp_path, monkeypatch, pusht, variant):
  # ResNet-10 is compiled in half the time.
  monkeypatch.setattr(observations, "_BLOCKS", 1)
  config = small(variant, data__source=f"zarr:{pusht}", data__episodes=2)
  config.train.num_steps = config.eval.every = config.checkpoint.every = 1
  config.eval.update(episodes=1, videos=1)
  with on_one_device():
    state = train_policy.train_and_evaluate(config, str(tmp_path))
  report = json.loads((tmp_path / "figures.json").read_text())
  assert 0 <= report["one_step"]["score"] <= 1
  assert report["one_step"]["mean_length"] == 300
  assert (tmp_path / "videos" / "one_step.gif").exists()
  names = {jax.tree_util.keystr(k) for k, _ in jax.tree.leaves_with_path(state)}
  assert any("img" in name for name in names) == (variant == "pusht_image")


@pytest.mark.slow
def test_robomimic_trains_and_is_not_rolled_out(tmp_path):
  file = tmp_path / "low_dim.hdf5"
  rng = np.random.default_rng(0)
  sizes = {"object": 10, "robot0_eef_pos": 3}
  sizes |= {"robot0_eef_quat": 4, "robot0_gripper_qpos": 2}
  with h5py.File(file, "w") as written:
    for number in range(2):
      demo = written.create_group(f"data/demo_{number}")
      demo["actions"] = rng.uniform(-1, 1, (20, 7))
      for name, size in sizes.items():
        demo[f"obs/{name}"] = rng.normal(size=(20, size))
  config = small("lift", data__source=f"hdf5:{file}")
  with on_one_device():
    state = train_policy.train_and_evaluate(config, str(tmp_path / "run"))
  assert int(state.step) == 4
  assert not (tmp_path / "run" / "figures.json").exists()
  assert (tmp_path / "run" / "plots" / "curves.png").exists()


@pytest.mark.parametrize(
  ("variant", "changes", "message"),
  [
    ("", {"batch__generated": 1}, "batch.generated=1: a single sample of an"),
    ("regression", {"batch__generated": 8}, "want 1, it has one"),
    ("", {"data__source": "zarr:"}, "'expert', 'zarr:DIR', 'hdf5:FILE'"),
    ("", {"data__executed": 16}, "data.executed=16: at most .* = 15"),
    ("", {"data__observations": ()}, "must name at least one"),
    ("", {"loss__diffusion_steps": 10}, "only 'diffusion' reads it, got 10"),
    ("diffusion", {"eval__samplers": ("ddim:3",)}, "'ddpm:10' and 'ddim:N'"),
    ("", {"eval__videos": 9}, r"must lie in \[0, eval.episodes = 3\]"),
    ("lift", {"eval__every": 1}, "there is nothing to roll out in"),
    ("", {"model__crop": 8}, "model.crop=8: .* images"),
    ("", {"model__widths": (8, 8, 8, 8, 8, 8)}, "x's steps=16"),
    ("batch_marginal", {}, "which 8 devices can't share"),
    ("", {"batch__size": 12}, "can't be split over the 8 devices"),
    ("", {"data__observations": ("state[:3]",)}, "state"),
    ("lift", {}, "low_dim.hdf5"),
  ],
)
def test_what_is_refused(tmp_path, variant, changes, message):
  with pytest.raises(ERRORS, match=message):
    train_policy.train_and_evaluate(
      small(variant, **changes), str(tmp_path / "run")
    )
  assert not (tmp_path / "run").exists()


def test_a_missing_simulator_is_named_before_training(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "mujoco", None)
  with pytest.raises(robots.ExtraError, match="pip install .*robots"):
    train_policy.train_and_evaluate(small("push"), str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()
