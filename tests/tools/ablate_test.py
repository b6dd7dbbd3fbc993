"""Tables of ablations: the numbers, the words, and runs that are killed."""

import contextlib
import csv
import functools
import json
import math
import operator
import os
import re
import shlex
import signal
import subprocess
import sys
import types

import pytest
from PIL import Image

from configs import ablations, mnist
from drift_jax import config as config_lib
from drift_jax.system import console, exits
from drift_jax.tasks import parse
from drift_jax.tools.work import ablate, ablation_table, rows
from tests import process

BASE = "--config=configs/digits.py:smoke"
# As small as a generator can be: processes take most of the time.
SMALL = """
  model.depth=1 model.hidden_size=16 model.cond_dim=16 model.num_heads=2
  drift.temperatures=(0.1,) batch.labels=4 batch.generated=4 batch.positives=4
  train.num_steps=4 optim.warmup_steps=1 checkpoint.every=2 eval.every=0
  eval.num_samples=20 eval.metrics=('fd_pixel',)
""".split()
# What a run of one class has instead of its config's.
UNGUIDED = {
  "guidance.minimum": 1.0,
  "guidance.maximum": 1.0,
  "batch.unconditional": 0,
  "eval.alphas": [1.0],
  "eval.metrics": [],
}
ROWS = "--rows=antisymmetric,attraction_only"


def table(*rows, **changes):
  """A table of rows compared by fd_pixel."""
  values = {
    "about": ablations.Table("A table", "What varies.", dict, "a paper"),
    "base": "digits",
    "steps": 4,
    "seeds": [0, 1],
    "figure": "fd_pixel",
    "alpha": None,
    "command": "python -m x",
  }
  return ablation_table.Table(rows, **values | changes)


def row(name, values, paper=None, figure="fd_pixel"):
  """A row with a value of each seed at alpha 1."""
  return ablation_table.Row(
    name,
    f"row {name}",
    "",
    paper,
    figures={seed: {f"{figure}/alpha_1": v} for seed, v in enumerate(values)},
    workdirs={seed: f"{name}/{seed}" for seed in range(len(values))},
  )


def read_csv(path):
  return list(csv.DictReader(path.read_text().splitlines()))


def test_the_best_alpha_is_that_of_the_mean():
  """Seed 1's best is another one's, but its mean is worse."""
  scattered = [(5.0, 3.0), (4.0, 5.0)]
  for figure, seeds, alpha, best, mean in (
    ("fd_pixel", scattered, None, 2, 4.0),
    ("fd_pixel", scattered, 1, 1, 4.5),
    # More coverage is better: the other way round.
    ("coverage", [(0.1, 0.9), (0.2, 0.3)], None, 2, 0.6),
    ("fd_pixel", [(math.nan, 7.0)], None, 2, 7.0),  # one diverged
  ):
    entry = row("a", [])
    for seed, values in enumerate(seeds):
      names = (f"{figure}/alpha_1", f"{figure}/alpha_2")
      entry.figures[seed] = dict(zip(names, values, strict=True))
    whole = table(entry, figure=figure, alpha=alpha)
    assert (whole.alpha_of(entry), whole.values(entry).mean()) == (best, mean)


NAN = math.nan
RANGE = (41.0, 177.0)


@pytest.mark.parametrize(
  ("values", "papers", "figure", "first", "swapped"),
  [
    # The second and third are within one range: not ordered by the paper.
    (([1.0, 1.2], [2.0, 2.2], [3.0, 3.2], [0.1, 0.2]),
     (8.46, RANGE, RANGE, None), "fd_pixel", "2 of 2 pairs .*tau 1.00", ()),
    # ab holds, ac and bc do not: (1 - 2) / 3.
    (([2.0, 2.2], [3.0, 3.0], [1.9, 2.1]), (8.0, 9.0, 10.0), "fd_pixel",
     "1 of 3 pairs .*tau -0.33", ("ca", "cb")),
    # Of coverage more is better.
    (([0.9], [0.8]), (8.0, 9.0), "coverage", "holds in the one pair", ()),
    # What diverged is the worst.
    (([NAN], [1.0], [NAN]), (8.0, 9.0, 10.0), "fd_pixel",
     "1 of 3 pairs .*tau 0.00.* 1 tied", ("ba",)),
    (([1.0], [1.0], []), (8.0, None, 9.0), "fd_pixel", "can't be compared", ()),
  ],
)  # fmt: skip
def test_the_papers_order(values, papers, figure, first, swapped):
  entries = map(row, "abcd", values, papers, [figure] * 4)
  text = ablation_table.ordering(table(*entries, figure=figure))
  line, *lines = text.split("\n")
  assert re.search(first, line)
  found = [re.findall(r"\brow (\w)", line) for line in lines]
  assert found == [list(pair) for pair in swapped]


def test_files(tmp_path):
  entries = [
    row("a", [1.0, 3.0], 8.46),
    row("b", [30.0, NAN], (41.0, 177.0)),
    row("c", []),
  ]
  entries[2].failed[0] = "Error: no such thing"
  written = ablation_table.write(table(*entries), tmp_path, "table")
  text = (tmp_path / "table.md").read_text()
  assert "| row a |  | 2 | **2 ± 1.4** | 1 | 8.46 |" in text
  assert "| row b |  | 2 | nan ± nan | 1 | 41 to 177 |" in text
  assert "| row c |  | 0 |  |  | not given here |" in text
  assert "Failed:\n- c, seed 0: Error: no such thing" in text
  lines = read_csv(tmp_path / "table.csv")
  assert [line["fd_pixel/alpha_1"] for line in lines] == [
    *("1.0", "3.0", "30.0", "nan"),
  ]
  assert lines[2]["paper_fid"] == "41 to 177"
  columns = ["row", "overrides", "seed", "workdir", "paper_fid"]
  assert list(lines[0]) == [*columns, "fd_pixel/alpha_1"]
  with Image.open(tmp_path / "table.png") as picture:
    assert picture.size[0] == 1300
  assert written == [f"{tmp_path}/table.{s}" for s in ("md", "csv", "png")]


def test_a_workdir_is_for_one_base_and_its_overrides(tmp_path, monkeypatch):
  monkeypatch.setattr(ablate, "FLAGS", types.SimpleNamespace(workdir=tmp_path))
  steps = "--config.train.num_steps=4"
  monkeypatch.setattr(sys, "argv", ["ablate", BASE, steps])
  ablate.check_workdir([])
  ablate.write_facts()
  facts = json.loads((tmp_path / "ablations.json").read_text())
  assert facts == {"base": BASE[9:], "overrides": {"train.num_steps": "4"}}
  # Another machine.
  monkeypatch.setattr(
    sys, "argv", ["ablate", BASE, steps, "--config.mesh.fsdp=2"]
  )
  ablate.check_workdir([])
  monkeypatch.setattr(sys, "argv", ["ablate", "--config=configs/mnist.py"])
  message = (
    f"holds runs of {BASE} with .*'4'.*, this is --config=configs/mnist.py"
  )
  with pytest.raises(config_lib.ConfigError, match=message):
    ablate.check_workdir([])


@pytest.mark.parametrize(
  ("before", "asked", "refused"),
  [
    ({}, {}, ""),  # as many classes as the data have
    ({"data.exif": None, "writers": None}, {}, ""),  # of an earlier version
    ({"data.exif": None}, {"data.exif": True}, "data.exif: False -> True"),
    # One class: with guidance in an earlier version, without it now.
    ({"model.num_classes": 1}, {}, ""),
    ({"model.num_classes": 1, **UNGUIDED}, {}, ""),
    ({"model.num_classes": 2, **UNGUIDED}, {}, r"guidance.maximum: 1.0 -> "),
  ],
)
def test_a_workdir_goes_on_with_its_runs(
  tmp_path, monkeypatch, before, asked, refused
):
  """Those of earlier versions, too, that lack the younger keys."""
  monkeypatch.setattr(ablate, "FLAGS", types.SimpleNamespace(workdir=tmp_path))
  base = mnist.get_config("smoke").to_dict()
  base["checkpoint"]["best_metric"], base["eval"]["metrics"] = "", ()
  old = json.loads(config_lib.to_json(parse(base)))
  rows.set_values(base, asked)
  run = types.SimpleNamespace(path=tmp_path / "run", config=parse(base))
  rows.set_values(old, {"model.num_classes": 10} | before)
  for key in [key for key, value in before.items() if value is None]:
    *sections, name = key.split(".")
    del functools.reduce(operator.getitem, sections, old)[name]
  run.path.mkdir()
  (run.path / "config.json").write_text(json.dumps(old))
  told = contextlib.nullcontext()
  if refused:
    told = pytest.raises(config_lib.ConfigError, match=refused)
  with told:
    ablate.check_workdir([run])


@pytest.mark.system
@pytest.mark.parametrize("when", ["start", "twice"])
def test_a_signal_leaves_no_child(tmp_path, monkeypatch, when):
  """While it is started; and twice, if it does not end by the first."""
  children = []

  class Child(subprocess.Popen):
    def __init__(self, *arguments, **options):
      super().__init__(*arguments, **options)
      children.append(self)
      if when == "start":
        signal.raise_signal(signal.SIGTERM)

  def send_two(where, path):
    if path.read_text():
      signal.raise_signal(signal.SIGTERM)
      signal.raise_signal(signal.SIGINT)

  monkeypatch.setattr(ablate, "FLAGS", types.SimpleNamespace(workdir=tmp_path))
  monkeypatch.setattr(subprocess, "Popen", Child)
  monkeypatch.setattr(console, "LOG_SECONDS", 0.1)
  monkeypatch.setattr(ablate, "_log_progress", send_two)
  handler = signal.getsignal(signal.SIGTERM)
  script, run = "trap '' TERM; echo ready; exec sleep 60", tmp_path / "run.log"
  if when == "start":
    script = "exec sleep 60"
  with open(run, "wb") as log, pytest.raises(SystemExit) as ended:
    ablate._call(
      ["sh", "-c", script], types.SimpleNamespace(name="a", log=run), log, ""
    )
  code = {"start": exits.RESTART, "twice": exits.INTERRUPTED}
  assert ended.value.code == code[when]
  number = {"start": signal.SIGTERM, "twice": signal.SIGKILL}
  assert [child.poll() for child in children] == [-number[when]]
  assert signal.getsignal(signal.SIGTERM) == handler


def command(workdir, table, *arguments):
  small = [f"--config.{value}" for value in SMALL]
  program = ("-m", "drift_jax.tools.ablate", table, BASE)
  return [*program, f"--workdir={workdir}", *small, *arguments]


def call(*arguments):
  return process.call(*command(*arguments))


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
  """A workdir whose second run was interrupted."""
  workdir = tmp_path_factory.mktemp("ablations")
  running = subprocess.Popen(
    [sys.executable, *command(workdir, "table1", ROWS, "--seeds=0")],
    cwd=process.ROOT,
    env=process.process_environment(),
    stderr=subprocess.PIPE,
    text=True,
  )
  logs = "*repulsion=0.0-*/seed_0.log"

  def has_child():  # the log is there a moment before it
    return any(log.stat().st_size for log in workdir.glob(logs))

  process.wait_for(has_child, 120)
  running.send_signal(signal.SIGTERM)
  try:
    _, words = running.communicate(timeout=60)
  finally:
    running.kill()
  return workdir, running.returncode, words


@pytest.mark.system
def test_runs_that_are_killed_and_continued(killed):
  workdir, code, words = killed
  assert code == exits.RESTART, words
  assert "attraction_only, seed 0: stopped; the same command goes on" in words
  first = workdir / "base" / "seed_0" / "metrics.jsonl"
  before = first.read_bytes(), first.stat().st_mtime_ns
  lines = read_csv(workdir / "table1.csv")
  assert [line["row"] for line in lines] == ["antisymmetric"]

  done = call(workdir, "table1", ROWS, "--seeds=0")
  assert done.returncode == 0, done.stderr
  assert "2 runs, 1 of them finished" in done.stderr
  assert (first.read_bytes(), first.stat().st_mtime_ns) == before
  lines = read_csv(workdir / "table1.csv")
  assert [line["row"] for line in lines] == ROWS[7:].split(",")
  for line in lines:
    figures = rows.read(line["workdir"]).figures
    assert float(line["fd_pixel/alpha_2"]) == figures["fd_pixel/alpha_2"]
  assert lines[0]["fd_pixel/alpha_1"] != lines[1]["fd_pixel/alpha_1"]
  text = (workdir / "table1.md").read_text()
  assert text in done.stdout and "41 to 177" in text
  assert "The paper's order" in text
  assert (workdir / "table1.png").exists()


@pytest.mark.system
def test_a_shared_row_is_trained_once_and_a_failed_one_stops_none(killed):
  """After the test above: alphas of the base's run, and a row that can't be."""
  workdir, *_ = killed
  done = call(workdir, "fig5", "--rows=alpha_1,alpha_2", "--seeds=0")
  assert done.returncode == 0, done.stderr
  log = (workdir / "base" / "seed_0.log").read_text()
  assert log.count("Starting a new run") == 1
  lines = read_csv(workdir / "fig5.csv")
  assert [line["row"] for line in lines] == ["alpha_1", "alpha_2"]
  assert float(lines[0]["fd_pixel/alpha_1"]) > 0
  assert lines[0]["fd_pixel/alpha_2"] == ""
  assert (workdir / "fig5.png").exists()

  two = "--rows=xy,y"
  done = call(workdir, "table11", two, "--seeds=0,1", "--commands")
  line, *seeds = done.stdout.splitlines()
  assert "--config.seed=0" in line and len(seeds) == 2
  assert all("--config.seed=1" in other for other in seeds)
  assert "--config=configs/ablations.py:digits:smoke/table11/y" in line
  path = shlex.split(line)[-1].removeprefix("--workdir=")
  os.makedirs(os.path.dirname(path))
  with open(path, "w"):
    pass  # a file in the place of the run
  done = call(workdir, "table11", two, "--seeds=0")
  assert done.returncode == 1
  assert done.stderr.endswith("Error: 1 of 2 runs failed: y, seed 0\n")
  text = (workdir / "table11.md").read_text()
  assert "- y, seed 0: Error:" in text and "is a file" in text
  assert "| over x and y |  | 1 |" in text


MISTAKES = (
  (("table4",), "table 'table4': valid options are ['table1', 'table2'"),
  (("table1", "--rows=x"), "there is no 'x' in table1 of digits:smoke, valid"),
  (("table1", "--seeds=0,-1"), "seed=-1 must be at least 0"),
  (
    ("table1", "--config.drift.attraction=2"),
    "--config.drift.attraction=2: drift.attraction is what the rows of table1",
  ),
  (("table1", "--config.seed=3"), "--config.seed=3: give seeds by --seeds"),
  (("table1", "--figure=fid"), "--figure=fid: valid options are ['fd_pixel'"),
  (("fig5", "--alpha=1"), "the rows are alphas themselves, use --rows"),
)


@pytest.mark.system
def test_mistakes(tmp_path):
  """Each ends the tool with one line, before anything is written."""
  program = f"""if True:
    import sys
    from absl import flags
    from drift_jax import config as config_lib
    from drift_jax.tools import ablate

    ablate.define_flags()
    for arguments in {[list(arguments) for arguments, _ in MISTAKES]}:
      flags.FLAGS.unparse_flags()
      sys.argv = ["ablate", {BASE!r}, "--workdir={tmp_path / "never"}"]
      sys.argv += arguments
      try:
        ablate.main(config_lib.parse_flags(sys.argv))
      except SystemExit as ended:
        print(ended.code)
  """
  done = process.call("-c", program)
  assert done.stderr == ""
  lines = done.stdout.splitlines()
  for (_, part), line in zip(MISTAKES, lines, strict=True):
    assert line.startswith("Error: ") and part in line
  assert not (tmp_path / "never").exists()
