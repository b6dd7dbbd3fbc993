"""Tables of finished runs: files as runs leave them, without the training."""

import csv
import json

import pytest
from PIL import Image

from configs import digits, policy, toy
from drift_jax import config as config_lib
from drift_jax.tasks import parse
from drift_jax.tools.work import rows, table


def leave(path, config, changes=(), figures=None, records=()):
  """A workdir as a run of a config leaves it."""
  values = json.loads(config_lib.to_json(parse(config)))
  rows.set_values(values, dict(changes))
  path.mkdir()
  (path / "config.json").write_text(json.dumps(values))
  if figures is not None:
    (path / "figures.json").write_text(json.dumps(figures))
  lines = [json.dumps(record) + "\n" for record in records]
  (path / "metrics.jsonl").write_text("".join(lines))
  return str(path)


def policy_run(path, variant, samplers, rate=0.5, **changes):
  """Of the smoke variant; every sampler has the same success rate."""
  figures = {"success_rate": rate, "milliseconds_per_chunk": 2.0}
  record = {f"eval/{sampler}/success_rate": rate for sampler in samplers}
  return leave(
    path,
    policy.get_config(f"{variant},smoke"),
    {key.replace("__", "."): value for key, value in changes.items()},
    {"step": 4, **dict.fromkeys(samplers, figures)},
    [{"step": 4, **record}],
  )


def drifting(path, rate=0.5, **changes):
  return policy_run(path, "learned", ["one_step"], rate, **changes)


def test_policies_side_by_side(tmp_path):
  workdirs = [
    # What may differ.
    drifting(tmp_path / "1", 0.75, seed=1, eval__threads=2),
    drifting(tmp_path / "0", 0.5, seed=0),
    policy_run(tmp_path / "d", "diffusion", ["ddpm:10", "ddim:5"]),
  ]
  out = tmp_path / "table"
  text = table.run(workdirs, str(out))
  assert text.splitlines()[2:] == [
    "| obstacle, drifting, learned temperature | 1 | 0.625 | "
    "0, 1: 0.500, 0.750 | 2 |",
    "| obstacle, diffusion, ddpm:10 | 10 | 0.500 | 0: 0.500 | 2 |",
    "| obstacle, diffusion, ddim:5 | 5 | 0.500 | 0: 0.500 | 2 |",
  ]
  assert (out / "policies.md").read_text() == text
  lines = (out / "policies.csv").read_text().splitlines()
  rates = [float(line["success_rate"]) for line in csv.DictReader(lines)]
  assert rates == [0.5, 0.75, 0.5, 0.5]
  with Image.open(out / "policies.png") as picture:
    assert picture.width > 500
  # Another loss is another method.
  other = drifting(tmp_path / "chunk", loss__problem="chunk")
  found = table.policy_rows([rows.read(w) for w in (*workdirs[:2], other)])
  assert [row.label for row in found.values()] == [
    "drifting, learned temperature",
    "drifting, problem chunk, learned temperature",
  ]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({}, "drifting, learned temperature, seed 0 is there twice"),
    ({"data__seed": 5}, r"can't be compared: data\.seed is 0 and 5"),
    ({"batch__generated": 4}, r"batch\.generated is 8 and 4"),
  ],
)
def test_only_like_policies_stand_side_by_side(tmp_path, changes, message):
  workdirs = [
    drifting(tmp_path / "a"),
    drifting(tmp_path / "b", **changes),
  ]
  with pytest.raises(config_lib.ConfigError, match=message):
    table.run(workdirs, str(tmp_path / "table"))


def test_a_table_of_any_task(tmp_path):
  """Rows are named by what their configs have, columns are all figures."""
  runs = [
    leave(
      tmp_path / f"{seed}-{field}",
      toy.get_config("smoke"),
      {"seed": seed, "drift.field": field, "train.log_every": 1 + seed},
      {"energy_distance": value, "mode_masses": [0.5, 0.5]},
    )
    for seed, field, value in (
      (0, "softmax", 1.0),
      (1, "softmax", 3.0),
      (0, "kl", 2.0),
    )
  ]
  assert table.run(runs, str(tmp_path / "toys")).splitlines() == [
    "|  | runs | energy_distance |",
    "|---|---|---|",
    "| drift.field=softmax | 2 | 2 ± 1.4 |",
    "| drift.field=kl | 1 | 2 |",
  ]
  lines = (tmp_path / "toys" / "table.csv").read_text().splitlines()
  assert lines[0] == "row,seed,workdir,energy_distance"
  assert lines[2] == f"drift.field=softmax,1,{runs[1]},3.0"
  steps = digits.get_config("smoke").train.num_steps
  images = leave(
    tmp_path / "digits",
    digits.get_config("smoke"),
    records=[{"step": steps, "eval/fd_pixel/alpha_1.0": 3.0}],
  )
  text = table.run([images], str(tmp_path / "one"))
  assert "| generator | 1 | 3 |" in text and "fd_pixel/alpha_1 |" in text
  with pytest.raises(config_lib.ConfigError, match=r"'generator', 'toy'\] can"):
    table.run([images, *runs], str(tmp_path / "both"))
  with pytest.raises(config_lib.ConfigError, match="'toy', want 'policy'"):
    table.run(runs, str(tmp_path / "policies"), "policy")


def test_seeds_of_an_earlier_version_are_of_the_same_row(tmp_path):
  """They lack the younger keys."""
  config = digits.get_config("smoke")
  records = [{"step": config.train.num_steps, "eval/fd_pixel/alpha_1.0": 3.0}]
  runs = [
    leave(tmp_path / str(seed), config, {"seed": seed}, records=records)
    for seed in (0, 1)
  ]
  file = tmp_path / "0" / "config.json"
  values = json.loads(file.read_text())
  del values["data"]["exif"]
  file.write_text(json.dumps(values))
  assert list(table.runs_by_config([rows.read(run) for run in runs])) == [
    "generator"
  ]


def test_what_is_no_finished_run(tmp_path):
  unfinished = drifting(tmp_path / "a")
  (tmp_path / "a" / "figures.json").unlink()
  started = leave(tmp_path / "b", digits.get_config("smoke"))
  for workdir, message in (
    (tmp_path, "config.json is missing"),
    (unfinished, "figures.json is missing"),
    (started, "no evaluation of step"),
  ):
    with pytest.raises(config_lib.ConfigError, match=message):
      rows.read(workdir)
