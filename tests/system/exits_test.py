"""Exit codes and last lines of one process; of several: multiprocess_test."""

import logging
import os
import signal
import time

import pytest

from drift_jax.system import console, exits
from tests import process


@pytest.fixture
def lines(caplog, monkeypatch):
  """Messages of the package's log."""
  monkeypatch.setattr(console.logger, "propagate", True)
  caplog.set_level(logging.INFO, logger=console.logger.name)
  return lambda: caplog.messages


@pytest.fixture
def sigterm():
  """Puts the handler back; returns it."""
  before = signal.getsignal(signal.SIGTERM)
  yield before
  signal.signal(signal.SIGTERM, before)


def code_of(program):
  with pytest.raises(SystemExit) as ended:
    exits.run(program)
  return ended.value.code


def raising(error):
  def program():
    raise error

  return program


def test_how_programs_end(lines):
  exits.run(lambda: None)
  assert code_of(raising(OSError("no such disk"))) == "Error: no such disk"
  with pytest.raises(ZeroDivisionError):  # shown whole
    exits.run(raising(ZeroDivisionError("a bug")))
  assert code_of(raising(KeyboardInterrupt())) == 130
  assert lines() == [
    "Interrupted: the same command goes on from the newest checkpoint."
  ]


def test_sigterm_before_the_first_step_ends_even_in_a_callback():
  """What a handler raises there is lost, and the run would go on."""
  program = """if True:
    import gc, os, signal
    from drift_jax.system import console, exits

    console.setup(0)
    exits.stop_on_sigterm()
    gc.callbacks.append(lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    gc.collect()
    print("went on")
  """
  done = process.call("-c", program)
  assert done.returncode == 75 and not done.stdout
  assert "Told to stop before the first step; the same" in done.stderr


def test_ctrl_c_saves_and_a_second_one_does_not_wait(lines):
  before = signal.signal(signal.SIGINT, signal.default_int_handler)

  def stopped():
    with exits.preemption() as preempted:
      os.kill(os.getpid(), signal.SIGINT)
      assert preempted()
    raise exits.Preempted("Told to stop: step 3 is saved")

  def impatient():
    with exits.preemption():
      os.kill(os.getpid(), signal.SIGINT)
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(10)

  for program in (stopped, impatient):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert code_of(program) == 130
  exits._interrupted.clear()
  signal.signal(signal.SIGINT, before)
  assert lines()[1].startswith("Told to stop: step 3 is saved; the same")
  assert lines()[3].startswith("Interrupted: the same command goes on")


def test_sigterm_between_steps_and_again_at_the_end(lines, sigterm):
  """The second one must not disturb what the first one asked for."""

  def program():
    exits.stop_on_sigterm()
    with exits.preemption() as preempted:
      assert not preempted()
      os.kill(os.getpid(), signal.SIGTERM)
      assert preempted() and preempted()
    os.kill(os.getpid(), signal.SIGTERM)
    raise exits.Preempted("Told to stop: step 3 is saved")

  assert code_of(program) == 75
  (line,) = lines()
  assert line.startswith("Told to stop: step 3 is saved; the same command")


def test_no_sigterm_leaves_the_handler_as_it_was(sigterm):
  with exits.preemption() as preempted:
    assert not preempted()
    assert signal.getsignal(signal.SIGTERM) != sigterm
  assert signal.getsignal(signal.SIGTERM) == sigterm
