"""The table of fields on toys: real runs of a few steps."""

import csv
import json

import numpy as np
import pytest

from drift_jax import config as config_lib
from drift_jax.tools.work import toy_table
from tests import process


def call(*arguments):
  done = process.call("-m", "drift_jax.tools.toy_table", *arguments)
  assert done.returncode == 0, done.stderr[-3000:]


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
  call(*arguments, "--seeds=0")
  first = tmp_path / "moons-sinkhorn-0.05" / "seed_0"
  config = json.loads((first / "config.json").read_text())
  assert config["drift"]["field"] == "sinkhorn"
  assert config["drift"]["negatives"] == "independent"
  assert config["drift"]["temperatures"] == [0.05]
  assert config["optim"]["learning_rate"] == 0.01
  assert (first / "plots" / "evolution.gif").exists()
  written = (first / "figures.json").stat().st_mtime_ns

  call(*arguments, "--seeds=0,1")
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
  ("name", "changes", "message"),
  [
    ("toy.py:moons", {"drift.field": "kll"}, "'kll' is unknown.*softmax, mmd"),
    ("toy.py:moons", {"drift.x": 1}, r"unknown key drift\.x='1'"),
    ("digits.py:encoder,smoke", {}, "want 'toy'"),
  ],
)
def test_mistakes_are_named_before_anything_is_trained(name, changes, message):
  with pytest.raises(Exception, match=message):
    toy_table.make_config(f"configs/{name}", changes, {})
