"""The benchmarks: that they run, and that they compare what they say."""

import itertools
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import gpu_step, plain, step_tpu, timing
from drift_jax.data import transforms
from tests import process
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
