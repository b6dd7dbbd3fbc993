"""A lease is kept by a process that lives, and by no other."""

import functools
import json
import signal
import subprocess
import sys
import threading

import pytest

from drift_jax import config as config_lib
from drift_jax.system import lease as lease_lib

# Takes it and waits.
OWNER = """if True:
  import sys, time
  from drift_jax.system import lease
  lease.Lease(sys.argv[1], "it", print).take()
  print("taken", flush=True)
  time.sleep(600)
"""


@pytest.fixture
def quick(monkeypatch):
  """Signs of life many times a second; returns what sets the patience."""
  monkeypatch.setattr(lease_lib, "INTERVAL_SECONDS", 0.05)
  monkeypatch.setattr(lease_lib, "_LOOK_SECONDS", 0.02)
  wait = functools.partial(monkeypatch.setattr, lease_lib, "LEASE_SECONDS")
  wait(0.5)
  return wait


@pytest.fixture
def strangers(monkeypatch):
  """No process of this machine is known to be one."""
  monkeypatch.setattr(lease_lib, "_machine", lambda: "")


def make(path, on_lost=print):
  return lease_lib.Lease(path, "--workdir=runs/a", on_lost)


def test_a_second_one_is_told_who_has_it(tmp_path, quick):
  """At once; when it is given back, nothing is left."""
  path = tmp_path / "new" / "run" / "run.lock"
  first, second = make(path), make(path)
  first.take()
  owner = json.loads(path.read_text())
  with pytest.raises(config_lib.ConfigError) as told:
    second.take()
  text = str(told.value)
  assert text.startswith(
    f"--workdir=runs/a is in use by process {owner['pid']} on {owner['host']} "
    f"since {owner['since']}"
  )
  second.release()
  assert json.loads(path.read_text()) == owner
  first.release()
  assert not list(tmp_path.iterdir())
  second.take()
  path.with_name("config.json").write_text("{}")  # what is beside it stays
  second.release()
  assert [file.name for file in path.parent.iterdir()] == ["config.json"]


@pytest.mark.system
def test_one_that_was_killed_has_it_no_longer(tmp_path, quick):
  path = tmp_path / "run.lock"
  owner = subprocess.Popen(
    [sys.executable, "-c", OWNER, path], stdout=subprocess.PIPE, text=True
  )
  assert owner.stdout is not None and owner.stdout.readline() == "taken\n"
  quick(600)
  with pytest.raises(config_lib.ConfigError, match=f"process {owner.pid} on"):
    make(path).take()
  owner.send_signal(signal.SIGKILL)
  # Not waited for: it is dead all the same.
  owner.stdout.read()
  held = make(path)
  held.take()
  held.release()
  owner.wait()
  owner.stdout.close()


def test_of_another_machine_signs_of_life_tell(tmp_path, quick, strangers):
  path = tmp_path / "run.lock"
  first, second = make(path), make(path)
  first.take()
  quick(600)
  with pytest.raises(config_lib.ConfigError, match="is in use by process"):
    second.take()
  first._released.set()  # It falls silent.
  quick(0.5)
  second.take()
  assert json.loads(path.read_text())["id"] == second._owner["id"]
  second.release()


def test_one_that_was_deleted_or_damaged_is_taken(tmp_path, quick):
  path = tmp_path / "run.lock"
  path.write_text("{")
  held = make(path)
  held.take()
  path.unlink()
  waited = threading.Event()
  while not path.exists():
    assert not waited.wait(0.02)
  held.release()
  assert not path.exists()
