"""The benchmarks: that they run, and that they compare what they say."""

import itertools
import json
import os
import pathlib
import types
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import (
  flow_picture,
  flow_rows,
  gpu_step,
  negatives,
  noise,
  plain,
  step_tpu,
  style,
  timing,
)
from drift_jax.data import transforms
from drift_jax.system import sharding
from drift_jax.training.state import TrainState
from tests import process
from tests.conftest import assert_close
from tests.data import pictures


def _run(script: str, tmp_path: pathlib.Path, *flags: str) -> dict[str, Any]:
  """What the script writes for tiny sizes; its table shows the same rows."""
  done = process.call(
    *(f"benchmarks/{script}", "--tiny", "--seconds=0"),
    f"--json={tmp_path / 'numbers.json'}",
    *flags,
  )
  assert done.returncode == 0, done.stderr
  content = json.loads((tmp_path / "numbers.json").read_text())
  lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
  assert len(lines) == 2 + len(content["rows"])
  for line, row in zip(lines[2:], content["rows"], strict=True):
    assert row["name"] in line and row["note"] in line
  machine = content["machine"]
  assert machine["cores"] == os.cpu_count() and machine["device"]
  assert {"python", "numpy", "jax"} <= set(machine["versions"])
  return {(row["section"], row["name"]): row for row in content["rows"]}


@pytest.mark.system
def test_steps_are_compared_in_the_table_of_all(tmp_path):
  rows = _run("run_all.py", tmp_path, "--scripts=step.py,sample.py")
  step, losses, sampling = dict.fromkeys(section for section, _ in rows)
  assert step == "step.py: step of digits.py, 2 x 32 samples"
  assert "drifting losses of 2 labels" in losses
  assert sampling == "sample.py: digits, float32"
  sections = [section for section, _ in rows]
  assert (sections.count(step), sections.count(sampling)) == (5, 2)
  compared = [row for row in rows.values() if row["times"] is not None]
  assert len(compared) == 8
  for row in compared:
    assert row["value"] > 0 and row["plain"] > 0 and row["times"] > 0, row
  note = rows[losses, "value and gradient"]["note"]
  values, gradients = (float(word.strip(",")) for word in note.split()[3::3])
  assert values < 1e-5 and gradients < 1e-3, note


@pytest.mark.system
def test_rows_to_compare_peers_with(tmp_path):
  rows = _run("peers.py", tmp_path)
  assert len(rows) == 5 and all(row["value"] > 0 for row in rows.values())
  compared = [row["name"] for row in rows.values() if row["times"] is not None]
  assert compared == ["2 problems of 8 channels"]


@pytest.mark.slow
def test_every_field_has_a_loss_and_a_step(tmp_path):
  rows = _run("fields.py", tmp_path)
  assert all(row["times"] > 0 for row in rows.values())
  names = [name for _, name in rows]
  assert {"mmd", "kl", "gaussian", "sharp"} <= {
    name for name in names if names.count(name) == 2
  }
  assert "W-Flow" in names


@pytest.mark.slow
def test_growth_doubles_what_it_says(tmp_path):
  flags = ("--doublings=1", "--quantities=devices")
  (row,) = _run("growth.py", tmp_path, *flags).values()
  assert row["sizes"] == [1, 2] and min(row["seconds"]) > 0
  # Two devices share the batch, and each has all parameters.
  assert 0.5 < row["memory"][1] / row["memory"][0] < 1


@pytest.mark.slow
def test_extra_negatives_are_as_good_as_samples_with_a_gradient():
  """And as many positives leave no bias of the field 'kl'."""
  few, extra, more, fewer_positives = (
    negatives.figures("kl", *sizes)
    for sizes in ((16, 0, 64), (16, 48, 64), (64, 0, 64), (16, 48, 16))
  )
  assert extra[0] > 1.2 * few[0] and abs(extra[0] / more[0] - 1) < 0.05
  assert few[1] > 0.08 and abs(extra[1]) < 0.03 and fewer_positives[1] < -0.08


def test_a_drift_sees_noise_in_few_dimensions_alone():
  images = noise.digits()
  whole, pixels = (noise.cosine(images, 0.05, side=side) for side in (8, 1))
  assert abs(whole) < 0.02 and pixels < -0.2


@pytest.mark.system
def test_data_measures_every_part(tmp_path):
  for number, folder in enumerate(("cat", "dog")):
    path = tmp_path / "large" / folder / f"{number}.jpg"
    pictures.write(path, number, (300, 280))
  for number in range(4):
    path = tmp_path / "small" / f"{number % 2}" / f"{number}.jpg"
    pictures.write(path, number, (32, 32))
  rows = _run(
    "data.py",
    tmp_path,
    f"--images={tmp_path / 'large'}",
    f"--small_images={tmp_path / 'small'}",
  )
  # With simplejpeg and opencv there are more.
  assert len({section for section, _ in rows}) >= 17 and len(rows) >= 25
  notes = [
    row["note"]
    for (section, name), row in rows.items()
    if name in ("pillow", "folder, pillow") and "decode" in section
  ]
  assert notes and all(note.startswith("same pixels") for note in notes)
  compared = [row for row in rows.values() if row["times"] is not None]
  assert len(compared) >= 22
  for row in compared:
    assert row["value"] >= 0 and row["plain"] > 0 and row["times"] > 0, row


@pytest.mark.system
def test_evaluation_measures_every_part(tmp_path):
  rows = _run("evaluate.py", tmp_path)
  assert len({section for section, _ in rows}) == 8 and len(rows) == 21
  for (_, name), row in rows.items():
    assert row["value"] >= 0, row
    if row["note"].startswith("plain: ") and row["unit"] == "s":
      assert row["plain"] > 0 and row["times"] > 0, row
      # Both compute the same figure.
      difference = float(row["note"].split("differ by ")[1].split()[0])
      assert difference < 1e-5, row
    if name.endswith(": memory"):
      assert row["unit"] == "MB"


def test_styles_are_those_of_strokes_that_were_drawn():
  """Of straight strokes of known shear and width, soft at their edge."""
  rows, columns = np.mgrid[:32, :32] - 15.5
  for shear in (-0.5, 0.0, 0.3):
    for width in (3.0, 5.0):
      middle = -shear * rows
      across = np.abs(columns - middle)
      ink = np.clip((width + 1) / 2 - across, 0, 1)
      ink[np.abs(rows) > 11] = 0
      ((slant, thickness),) = style.measure(ink[None])
      assert abs(slant - shear) < 0.02
      # The ends belong to the edge as well.
      area, edge = width * 23, 2 * 23 * np.hypot(1, shear) + 2 * width
      assert_close(thickness, 2 * area / edge, 0.1)


def test_comparison_takes_turns():
  now = [0.0]
  order: list[str] = []

  def case(name: str, durations: tuple[float, ...]) -> timing.Case:
    each = itertools.cycle(durations)

    def run() -> None:
      order.append(name)
      now[0] += next(each)

    def untimed() -> None:
      now[0] += 100

    return timing.Case(run, untimed, untimed)

  report = timing.Report(seconds=0)
  report.compare(
    "section",
    "images/s",
    12,
    # The first of each is the warm-up; the medians are 4, 2 and 8.
    case("plain", (9.0, 4.0, 2.0, 4.0, 8.0, 4.0)),
    {
      "twice": case("twice", (9.0, 2.0, 1.0, 2.0, 4.0, 2.0)),
      "half": case("half", (1.0, 8.0, 4.0, 8.0, 16.0, 8.0)),
    },
    clock=lambda: now[0],
    notes={"half": "slow"},
  )
  turn = ("plain", "twice", "half")
  first, *turns = zip(*[iter(order)] * 3, strict=True)
  assert first == turn and len(turns) == timing.MIN_TURNS
  assert sorted(turns) == sorted([turn] * 2 + [turn[::-1]] * 3)
  twice, half = report.rows
  assert (twice.value, twice.plain, twice.times) == (6.0, 3.0, 2.0)
  assert (half.value, half.plain, half.times) == (1.5, 3.0, 0.5)
  assert half.note == "slow" and half.unit == "images/s"
  lines = report.table().splitlines()
  assert lines[2] == "| section | twice | images/s | 6 | 3 | 2.00 |  |"
  assert lines[3] == "|  | half | images/s | 1.5 | 3 | 0.50 | slow |"


def test_the_plain_crop_is_ours():
  for size in ((300, 260), (256, 256), (1100, 530)):
    image = pictures.picture(3, size)
    ours = np.asarray(transforms.center_crop(image, 256))
    np.testing.assert_array_equal(plain.center_crop(image, 256), ours)


@pytest.mark.slow
def test_parts_of_the_step_are_compiled(monkeypatch):
  """On a CPU, a small model: that each part is what the run would compile."""
  setting = step_tpu.Setting("configs/digits.py", "", 2, {})
  check = step_tpu.compile_check
  monkeypatch.setattr(check, "find_devices", lambda _: jax.devices()[:2])
  small = ("batch.positives=4", "batch.generated=4", "model.depth=1")
  flops = {}
  for part in step_tpu.PARTS[1:]:
    figures = step_tpu.measure(setting, part, small)
    assert figures["peak GB"] > 0 and figures["compile s"] > 0
    flops[part] = figures.get("TFLOP", 0.0)
  # No encoder: the features are the samples themselves.
  assert flops["step"] == pytest.approx(
    flops["generator"] + flops["loss"], rel=1e-6
  )
  assert flops["reals"] == flops["generated"] == 0


@pytest.mark.system
def test_kernels_are_scheduled_for_a_tpu(tmp_path):
  file = tmp_path / "kernels.json"
  done = process.call(
    *("benchmarks/kernels_tpu.py", "--tiny", "--kernels=mlp", f"--json={file}")
  )
  assert done.returncode == 0, done.stderr
  forward, backward = json.loads(file.read_text())["rows"]
  # It computes three times as much.
  assert 2 < backward["scheduled_ms"] / forward["scheduled_ms"] < 6
  assert backward["roofline_ms"] > forward["roofline_ms"] > 0


@pytest.mark.system
def test_a_gpu_s_check_runs_its_step(tmp_path):
  """On a CPU, whose peak nobody knows."""
  file = tmp_path / "step_xla.json"
  changes = ("model.attention_dtype=bfloat16", "train.kernels=xla")
  done = process.call(
    *("benchmarks/gpu_step.py", "--tiny", f"--json={file}", *changes)
  )
  assert done.returncode == 0, done.stderr
  step = json.loads(file.read_text())
  assert step["changes"] == list(changes) and step["mfu"] is None
  assert step["step_seconds"] > 0 and step["predicted_bytes"] > 2**20
  (tmp_path / "encoder.code").write_text("124 120\n")
  (tmp_path / "encoder.log").write_text("Compiling\nstep 3\n")
  assert gpu_step.report(tmp_path) == {
    "parts": {"step_xla": step},
    "ends": {"encoder": {"code": 124, "seconds": 120, "last_line": "step 3"}},
  }


class _Lines(nn.Module):
  """The velocity of data that are one image of each class; or the time."""

  num_classes: int = 3
  times: bool = False

  @nn.compact
  def __call__(self, labels, alpha, *, noise):
    images = self.param("images", nn.initializers.zeros, (3, 2, 2, 1))
    t = (alpha / flow_rows.TIME_SCALE)[:, None, None, None]
    return t + 0 * noise if self.times else (images[labels] - noise) / (1 - t)


def _sample(generator: _Lines, *how: Any, scale: float = 1.0) -> np.ndarray:
  """Samples of classes 0 and 1, whose images are 0 and 1, that of all is 2."""
  task = types.SimpleNamespace(
    generator=generator,
    pixels=False,
    noise_shape=(2, 2, 1),
    style_tokens=0,
    style_vocab=0,
  )
  mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
  run: Any = types.SimpleNamespace(
    config=types.SimpleNamespace(seed=0), task=task, mesh=mesh
  )
  images = jnp.broadcast_to(jnp.arange(3.0)[:, None, None, None], (3, 2, 2, 1))
  params = jax.device_put({"images": images}, sharding.replicated(mesh))
  sample = flow_rows.make_sampler(run, params, *how)
  index = np.arange(2, dtype=np.int32)
  return np.asarray(sample(index, np.full(2, scale, np.float32), index))


def test_flow_matching_s_samplers_solve_what_is_known():
  own = np.broadcast_to(np.arange(2.0)[:, None, None, None], (2, 2, 2, 1))
  for count in (1, 3, 10):  # lines are straight: each step lies on them
    samples = _sample(_Lines(), "euler", count, False)
    np.testing.assert_allclose(samples, own, atol=1e-5)
  guided = _sample(_Lines(), "euler", 1, True, scale=3.0)
  np.testing.assert_allclose(guided, 2 + 3 * (own - 2), atol=1e-5)
  noise = _sample(_Lines(times=True), "euler", 1, False)  # at 0 it stays
  for solver, count, end in (
    ("euler", 5, 0.4),
    ("heun", 2, 0.5),  # exact: the velocity is linear in time
    ("heun", 10, 0.5),
  ):
    moved = _sample(_Lines(times=True), solver, count, False) - noise
    np.testing.assert_allclose(moved, end, rtol=1e-5)


def test_flow_matching_s_loss_vanishes_at_the_true_velocity():
  def step(images: jax.Array) -> tuple[float, np.ndarray]:
    params, optimizer = {"images": images}, optax.sgd(-1.0)
    state = TrainState(
      step=jnp.zeros((), jnp.int32),
      rng=jax.random.key_data(jax.random.key(0)),
      params=params,
      opt_state=optimizer.init(params),
      ema={},
    )
    image = jnp.broadcast_to(data, (256, 2, 2, 1))
    after, metrics = flow_rows.train_step(
      state,
      flow_rows.FlowBatch(image, jnp.ones(256, jnp.int32)),
      {},
      generator=_Lines(),
      optimizer=optimizer,
      schedule=optax.constant_schedule(1.0),
    )
    moved = np.abs(np.asarray(after.params["images"] - images)).sum((1, 2, 3))
    return float(metrics["loss"]), moved

  data = jnp.array([0.25, -0.5, 1.0, -1.0]).reshape(2, 2, 1)
  images = jnp.stack([data] * 3)
  loss, _ = step(images)
  assert loss < 1e-6
  loss, moved = step(images + 1.0)
  # Classes: another, that of the batch, and the one that stands for all.
  assert loss > 1 and moved[0] == 0 and moved[1] > moved[2] > 0


@pytest.mark.system
def test_flow_matching_runs_and_is_drawn_beside_drifting(tmp_path, capsys):
  workdir = tmp_path / "flow"
  command = (
    "benchmarks/flow_matching.py",
    "--config=configs/digits.py:smoke",
    f"--workdir={workdir}",
    "--config.train.num_steps=5",
    "--config.model.depth=1",
    "--config.batch.generated=2",
    "--evaluations=2",
    "--guidance=2",
  )
  done = process.call(*command)
  assert done.returncode == 0, done.stderr
  rows = [json.loads(line) for line in done.stdout.splitlines()]
  ways = [(row["solver"], row["evaluations"]) for row in rows]
  assert ways == [("euler", 4), ("heun", 4)]  # each with and without a class
  assert len(list((workdir / "samples").glob("*.png"))) == 2
  for row in rows:
    assert row["figures"]["fd_pixel"] > 0 and row["samples_per_second"] > 0
  drifting = tmp_path / "drifting"
  drifting.mkdir()
  record = {"step": 9, "perf/steps_per_second": 3.0}
  record |= {"eval/fd_pixel/alpha_1.0": 0.7, "eval/fd_pixel/baseline": 0.4}
  (drifting / "metrics.jsonl").write_text(json.dumps(record) + "\n")
  flow_picture.main(
    [f"{tmp_path}/x.png", str(workdir), str(drifting), "--figures=fd_pixel"]
  )
  told = capsys.readouterr().out
  assert f"{drifting}: drifting, 3 s of training" in told
  assert "| drifting, α = 1 | 1 | 0.7 |" in told
  assert (tmp_path / "x.png").stat().st_size > 10_000
  with pytest.raises(SystemExit, match="--figures: 'fid'.* fd_pixel"):
    flow_picture.main([f"{tmp_path}/x.png", str(workdir), "--figures=fid"])
