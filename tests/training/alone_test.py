"""One writer of a workdir: every task, and evaluation."""

import json

import pytest

from drift_jax import config as config_lib
from drift_jax.system import lease as lease_lib
from drift_jax.tasks.generator import train
from drift_jax.tasks.mae import train as train_mae
from drift_jax.tasks.policy import train as train_policy
from drift_jax.tasks.toy import train as train_toy
from drift_jax.training.workdir import alone_with


@pytest.fixture
def held(tmp_path, monkeypatch):
  """A workdir in which a run is going on."""
  monkeypatch.setattr(lease_lib, "_LOOK_SECONDS", 0.02)
  lease = lease_lib.Lease(tmp_path / "run.lock", "a run", print)
  lease.take()
  yield tmp_path
  assert [file.name for file in tmp_path.iterdir()] == ["run.lock"]
  lease.release()


@pytest.mark.parametrize("task", [train, train_mae, train_toy, train_policy])
def test_a_second_run_writes_nothing(held, task):
  """It does not even read its config."""
  with pytest.raises(config_lib.ConfigError) as told:
    task.train_and_evaluate(None, str(held))
  owner = json.loads((held / "run.lock").read_text())
  assert f"--workdir={held} is in use by " in str(told.value)
  assert f"process {owner['pid']} on {owner['host']}" in str(told.value)


def test_a_report_may_be_written_beside_a_run_but_not_twice(held):
  """What a run writes is not the report's."""
  out = held / "evaluation.json"
  with alone_with(str(out)):
    with pytest.raises(config_lib.ConfigError, match=f"--out={out} is in use"):
      with alone_with(str(out)):
        pass


def test_a_run_that_fails_leaves_no_workdir(tmp_path):
  with pytest.raises(config_lib.ConfigError, match="task=None"):
    train.train_and_evaluate({}, str(tmp_path / "new" / "run"))
  assert not list(tmp_path.iterdir())
