"""A small run in this process, from the config to the checkpoints and back.

What every commit is tested by: the other runs are in tests/tasks/generator.
"""

import json
import shutil

import numpy as np
import pytest

from tests.conftest import assert_close
from tests.tasks.generator.train_test import (
  UNRANKED,
  assert_same_run,
  checkpoint_arrays,
  records,
  train_here,
)

# With checkpoints of the last two steps.
STEPS = 4
CHANGES = UNRANKED | {
  "batch.labels": 8,
  "batch.unconditional": 2,
  "queue.prefill": 320,
  # Wide enough for all positives to attract.
  "drift.temperatures": (0.5,),
  "ema.decays": (0.5, 0.9),
  "eval.ema_decay": 0.9,
  "optim.learning_rate": 0.01,
  "optim.warmup_steps": 0,
  "train.num_steps": STEPS,
  "checkpoint.every": STEPS - 1,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run")
  train_here(workdir, CHANGES)
  return workdir


def test_samples_come_closer_to_the_data(run):
  """By `scale`, their mean distance; the normalised loss is 1 at all steps."""
  seen = records(run)
  assert list(seen) == list(range(1, STEPS + 1))
  for record in seen.values():
    assert np.isfinite(list(record.values())).all()
    assert abs(record["loss"] - 1) < 1e-3
  # Measured: 4.65 -> 4.25, and 5.63 where the field points away.
  assert seen[STEPS]["scale/global"] < 0.95 * seen[1]["scale/global"]


def test_every_average_follows_the_parameters(run):
  before, after = (checkpoint_arrays(run, n) for n in (STEPS - 1, STEPS))
  names = [name for name in after if name.startswith("state/['params']")]
  assert names
  for name in names:
    now = after[name].astype(np.float64)
    assert not np.array_equal(now, before[name])
    for decay in (0.5, 0.9):
      average = name.replace("['params']", f"['ema']['{decay}']")
      expected = decay * before[average] + (1 - decay) * now
      assert_close(after[average], expected, 1e-6, average)


def test_a_stopped_run_goes_on_bit_equal(run, tmp_path, caplog):
  """Queue, data position, random streams, state and metrics."""
  workdir = tmp_path / "stopped"
  shutil.copytree(run, workdir)
  shutil.rmtree(workdir / "checkpoints" / str(STEPS))
  # An earlier version began the run: a key less.
  config = json.loads((workdir / "config.json").read_text())
  del config["drift"]["own_in_scale"]
  (workdir / "config.json").write_text(json.dumps(config))
  with caplog.at_level("INFO"):
    train_here(workdir, CHANGES)
  assert f"Resuming after step {STEPS - 1}." in caplog.text
  assert_same_run(run, workdir, step=STEPS)
