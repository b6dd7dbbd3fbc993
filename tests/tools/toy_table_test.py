"""The table of fields on toys: real runs of a few steps."""

import csv
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from drift_jax import config as config_lib
from drift_jax.tools.work import rows, toy_table
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
  text = (tmp_path / "toys_0.05.csv").read_text()
  lines = list(csv.DictReader(text.splitlines()))
  assert [(line["toy"], line["field"], line["seed"]) for line in lines] == [
    ("moons", "sinkhorn", seed) for seed in "01"
  ]
  both = np.array([float(line["energy_distance_ratio"]) for line in lines])
  figures = json.loads((first / "figures.json").read_text())
  assert both[0] == figures["energy_distance_ratio"]
  text = (tmp_path / "toys_0.05.md").read_text()
  cell = f"{both.mean():.3g} ± {both.std(ddof=1):.2g}"
  assert f"| {cell} |" in text
  assert "Variant `smoke`, --config.train.num_steps=2" in text
  assert (tmp_path / "toys_0.05.png").exists()

  # Runs of other settings are no rows of this table.
  config["train"]["num_steps"] = 3
  with pytest.raises(config_lib.ConfigError, match="run of another config"):
    toy_table.train(config, first, draw=False)
  assert json.loads((first / "figures.json").read_text()) == figures


@pytest.mark.parametrize(
  ("ratios", "errors", "failed", "text"),
  [
    ([2.0], [], 1, "2, 1 failed"),
    ([], [], 1, "failed"),
    ([1.0, 3.0], [0.02, 0.04], 0, "2 ± 1.4 (3 ± 1.4 %)"),
  ],
)
def test_cells_say_what_is_there(ratios, errors, failed, text):
  cell = rows.Runs(failed=dict.fromkeys(range(failed), "no"))
  for seed, ratio in enumerate(ratios):
    cell.figures[seed] = {"energy_distance_ratio": ratio}
  for seed, error in enumerate(errors):
    cell.figures[seed]["worst_mode_error"] = error
  assert toy_table.cell_text(cell) == text


def test_a_table_of_toys_and_fields(tmp_path):
  table = {}
  cells = itertools.product(("moons", "spiral"), ("softmax", "kl"))
  for ratio, key in enumerate(cells, 1):
    table[key] = cell = rows.Runs()
    for seed in range(2):
      cell.workdirs[seed] = f"runs/{seed}"
      cell.figures[seed] = {"energy_distance_ratio": ratio + seed, "step": 2}
  table["spiral", "kl"].failed[2] = "no"
  toy_table.write(table, tmp_path, "0.05", "All.")
  lines = (tmp_path / "toys_0.05.md").read_text().splitlines()
  first = lines.index("|  | softmax | kl |")
  assert lines[first + 2 : first + 4] == [
    "| moons | 1.5 ± 0.71 | 2.5 ± 0.71 |",
    "| spiral | 3.5 ± 0.71 | 4.5 ± 0.71, 1 failed |",
  ]
  assert lines[-1] == "- spiral, kl: seed 2: no"
  text = (tmp_path / "toys_0.05.csv").read_text()
  lines = list(csv.DictReader(text.splitlines()))
  assert len(lines) == 8
  assert lines[3]["energy_distance_ratio"] == "3"
  with Image.open(tmp_path / "toys_0.05.png") as image:
    assert image.size[0] > 500


@pytest.mark.parametrize(
  ("name", "changes", "message"),
  [
    ("toy.py:moon", {}, "variant 'moon': valid options are .*moons"),
    ("toy.py:moons", {"drift.field": "kll"}, "'kll' is unknown.*softmax, mmd"),
    ("toy.py:moons", {"drift.negatives": "x"}, "'x'"),
    ("toy.py:moons", {"drift.x": 1}, r"unknown key drift\.x='1'"),
    ("digits.py:encoder,smoke", {}, "want 'toy'"),
  ],
)
def test_mistakes_are_named_before_anything_is_trained(name, changes, message):
  with pytest.raises(Exception, match=message):
    toy_table.make_config(f"configs/{name}", changes, {})
