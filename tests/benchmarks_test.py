"""The benchmarks: that they run, and that they compare what they say."""

import functools
import itertools
import json
import os
import pathlib
import sys
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import images, plain, run_all, step_tpu, timing
from drift_jax.data import transforms
from tests import process
from tests.data import pictures

# The parts that are measured, and how many rows there are at least.
DATA = (
  "decode, 2 images of about 300 x 280, 1 thread",
  "centre crop to 256 px, 1 thread",
  "centre crop to 256 px, Loader, 2 threads",
  "random resized crop to 256 px, 1 thread",
  "random resized crop to 256 px, Loader, 2 threads",
  "decode, 4 images of 32 x 32 px, 1 thread",
  "32 x 32 px from files, 1 thread",
  "32 x 32 px from files, Loader, 2 threads",
  "32 x 32 px from memory, 1 thread",
  "32 x 32 px from memory, Loader, 2 threads",
  "latents, 1 thread",
  "latents, 2 threads",
  "class-grouped loader, 2 threads",
  "queue of 8 x 8 + 8 latents, bfloat16",
  "queue of 256-px images, uint8",
  "host to device",
  "after this",
)
NETWORK = "Inception-v3 of width 1, 32 x 32 px, float32"
EVALUATION = (
  NETWORK,
  "mean and covariance of 60 x 8, batches of 16",
  "Frechet distance of 8 dimensions",
  "Inception score of 60 x 5, batches of 16",
  "precision and recall, 8 dimensions",
  "KID, 8 dimensions",
  "neighbours, 8 dimensions",
  "60 x 8 features held, float32",
)


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


def test_all_benchmarks_refuse_what_is_not_there(capsys):
  for arguments, message in (
    (["--scripts=steps.py"], "'steps.py' is none of step.py, fields.py"),
    (["--scripts=data.py", "--images=x"], "needs both --images and --small"),
  ):
    with pytest.raises(SystemExit):
      run_all.main(arguments)
    assert message in capsys.readouterr().err


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
  assert {section for section, _ in rows} >= set(DATA) and len(rows) >= 25
  for section in (*DATA[:2], *DATA[5:7]):
    for name in ("pillow", "folder, pillow"):
      if (section, name) in rows:
        note = rows[section, name]["note"]
        assert note.startswith("same pixels in all"), section
  compared = [row for row in rows.values() if row["times"] is not None]
  assert len(compared) >= 22
  for row in compared:
    assert row["value"] >= 0 and row["plain"] > 0 and row["times"] > 0, row


@pytest.mark.system
def test_evaluation_measures_every_part(tmp_path):
  rows = _run("evaluate.py", tmp_path)
  assert {section for section, _ in rows} == set(EVALUATION)
  assert len(rows) == 21
  for (_, name), row in rows.items():
    assert row["value"] >= 0, row
    if row["note"].startswith("plain: ") and row["unit"] == "s":
      assert row["plain"] > 0 and row["times"] > 0, row
      # Both compute the same figure.
      difference = float(row["note"].split("differ by ")[1].split()[0])
      assert difference < 1e-5, row
    if name.endswith(": memory"):
      assert row["unit"] == "MB"
  batch = rows[NETWORK, "batch of 2"]
  assert "torch" in batch["note"] and batch["value"] > 0


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


def test_a_time_is_in_its_unit():
  nothing = timing.Case(lambda: None)
  for unit, time in (("ms", 250.0), ("s", 0.25)):
    now = itertools.accumulate(itertools.repeat(0.25))
    report = timing.Report(seconds=0)
    clock = functools.partial(next, now)
    report.compare("s", unit, 1, nothing, {"x": nothing}, clock=clock)
    assert report.rows[0].value == report.rows[0].plain == time


def test_what_takes_long_runs_once_and_may_stand_alone():
  runs = []
  report = timing.Report(seconds=60)
  case = timing.Case(lambda: runs.append(0))
  report.compare("s", "s", 1, None, {"x": case}, once=True)
  (row,) = report.rows
  assert len(runs) == 1 and row.plain is None and row.times is None


@pytest.mark.skipif(sys.platform != "linux", reason="of /proc")
def test_peak_is_what_a_run_takes_on_top():
  held = np.ones(2**22)
  peak = timing.Peak()

  def run() -> float:
    return float(np.concatenate([held, held]).sum())

  peak.around(run).seconds(lambda: 0.0)
  most = peak.bytes
  # Linux counts pages in lots.
  assert abs(most - 2 * held.nbytes) < 2**20
  peak.around(lambda: None).seconds(lambda: 0.0)
  assert peak.bytes == most


def test_the_plain_crop_is_ours():
  for size in ((300, 260), (256, 256), (1100, 530)):
    image = pictures.picture(3, size)
    ours = np.asarray(transforms.center_crop(image, 256))
    np.testing.assert_array_equal(plain.center_crop(image, 256), ours)


def test_effect_names_what_changed():
  black = np.zeros((4, 4, 3), np.uint8)
  changes = [black, black + np.uint8(1), black + np.uint8(10)]
  # 20 log10 255 = 48.1 dB for a difference of 1, 20 less for 10.
  assert images.effect(changes, [black] * 3) == (
    "other pixels in 2 of 3 images, PSNR of these 38.1 dB on average, 28.1 at "
    "worst"
  )


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


def test_table_has_ratios_where_there_is_a_recorded_figure():
  rows = [
    {"setting": "a", "part": "loss", "figure": "ms", "ours": 3, "release": 4},
    {"setting": "a", "part": "loss", "figure": "code MB", "ours": 3},
  ]
  assert step_tpu.table(rows).splitlines()[2:] == [
    "| a | loss | ms | 3 | 4 | 0.75 |",
    "| a | loss | code MB | 3 |  |  |",
  ]
