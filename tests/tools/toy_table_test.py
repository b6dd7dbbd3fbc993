"""The table of fields on toys: real runs of a few steps."""

import csv
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from drift_jax import config as config_lib
from drift_jax.tools.work import toy_table
from tests import process


def call(*arguments):
  return process.call("-m", "drift_jax.tools.toy_table", *arguments)


@pytest.mark.slow
def test_a_table_is_made_and_goes_on(tmp_path):
  arguments = (
    f"--workdir={tmp_path}",
    "--toys=moons",
    "--fields=sinkhorn",
    "--variant=smoke",
    "--config.train.num_steps=2",
    "--config.optim.learning_rate=0.01",
  )
  done = call(*arguments, "--seeds=0")
  assert done.returncode == 0, done.stderr[-3000:]
  first = tmp_path / "moons-sinkhorn-0.05" / "seed_0"
  config = json.loads((first / "config.json").read_text())
  assert config["drift"]["field"] == "sinkhorn"
  assert config["drift"]["negatives"] == "independent"
  assert config["drift"]["temperatures"] == [0.05]
  assert config["optim"]["learning_rate"] == 0.01
  assert (first / "plots" / "evolution.gif").exists()
  written = (first / "figures.json").stat().st_mtime_ns

  done = call(*arguments, "--seeds=0,1")
  assert done.returncode == 0, done.stderr[-3000:]
  assert (first / "figures.json").stat().st_mtime_ns == written
  assert not (first.parent / "seed_1" / "plots").exists()
  rows = list(
    csv.DictReader((tmp_path / "toys_0.05.csv").read_text().splitlines())
  )
  assert len(rows) == 2
  found = {(r["toy"], r["field"], r["seed"]): r for r in rows}
  figures = json.loads((first / "figures.json").read_text())
  ratio = found["moons", "sinkhorn", "0"]["energy_distance_ratio"]
  assert float(ratio) == figures["energy_distance_ratio"]
  text = (tmp_path / "toys_0.05.md").read_text()
  both = np.array(
    [
      float(found["moons", "sinkhorn", s]["energy_distance_ratio"])
      for s in "01"
    ]
  )
  cell = f"{both.mean():.3g} ± {both.std(ddof=1):.2g}"
  assert f"| {cell} |" in text
  assert "Variant `smoke`, --config.train.num_steps=2" in text
  assert (tmp_path / "toys_0.05.png").exists()

  # Runs of other settings are no rows of this table.
  config["train"]["num_steps"] = 3
  found, message = toy_table.train(config, first, draw=False)
  assert found is None
  assert "holds a finished run of another config" in message
  assert json.loads((first / "figures.json").read_text()) == figures


def test_cells_say_what_is_there():
  cell = toy_table.Cell({0: {"energy_distance_ratio": 2.0}}, ["seed 1: no"])
  assert cell.text() == "2, 1 failed"
  assert toy_table.Cell({}, ["seed 0: no"]).text() == "failed"
  figures = {
    seed: {"energy_distance_ratio": ratio, "worst_mode_error": error}
    for seed, ratio, error in ((0, 1.0, 0.02), (1, 3.0, 0.04))
  }
  assert toy_table.Cell(figures, []).text() == "2 ± 1.4 (3 ± 1.4 %)"


def test_a_table_of_toys_and_fields(tmp_path):
  table = {
    (toy, field): toy_table.Cell(
      {
        seed: {"energy_distance_ratio": ratio + seed, "step": 2}
        for seed in range(2)
      },
      [],
    )
    for ratio, (toy, field) in enumerate(
      itertools.product(("moons", "spiral"), ("softmax", "kl")), 1
    )
  }
  table["spiral", "kl"].failed.append("seed 2: no")
  toy_table.write(table, tmp_path, "0.05", "All.")
  lines = (tmp_path / "toys_0.05.md").read_text().splitlines()
  first = lines.index("| | softmax | kl |")
  assert lines[first + 2 : first + 4] == [
    "| moons | 1.5 ± 0.71 | 2.5 ± 0.71 |",
    "| spiral | 3.5 ± 0.71 | 4.5 ± 0.71, 1 failed |",
  ]
  assert lines[-1] == "- spiral, kl: seed 2: no"
  rows = list(
    csv.DictReader((tmp_path / "toys_0.05.csv").read_text().splitlines())
  )
  assert len(rows) == 8
  assert rows[3]["energy_distance_ratio"] == "3"
  assert rows[3]["worst_mode_error"] == ""
  with Image.open(tmp_path / "toys_0.05.png") as image:
    assert image.size[0] > 500


@pytest.mark.parametrize(
  ("toy", "changes", "message"),
  [
    ("moon", {}, "variant 'moon': valid options are .*moons"),
    ("moons", {"drift.field": "kll"}, "field='kll' is unknown.*softmax, mmd"),
    ("moons", {"drift.negatives": "x"}, "'x'"),
  ],
)
def test_mistakes_are_named_before_anything_is_trained(toy, changes, message):
  with pytest.raises(Exception, match=message):
    toy_table.make_config("configs/toy.py", toy, "smoke", changes)


def test_another_task_is_refused():
  with pytest.raises(config_lib.ConfigError, match="want 'toy'"):
    toy_table.make_config("configs/digits.py", "encoder", "smoke", {})
