"""The shared loop with a fake step: schedule, watch, resume, errors."""

import contextlib
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import toy
from drift_jax.system import console, exits
from drift_jax.system.errors import ConfigError
from drift_jax.tasks.toy import train
from drift_jax.training import checkpoint, checksums, loop
from tests.builders import make_state
from tests.process import wait_for


class Feed:
  """Batches 0, 1, 2, ..."""

  position = started = 0

  def start(self):
    self.started += 1

  def __next__(self):
    self.position += 1
    return {"number": np.full(1, self.position - 1.0, np.float32)}

  def state(self):
    return {"position": np.asarray(self.position, np.int64)}

  def abstract(self, saved):
    return self.state()

  def restore(self, state):
    self.position = int(state["position"])


class Writer:
  """Remembers what was written."""

  def __init__(self):
    self.lines = []
    self.flush = lambda: None

  def write_scalars(self, step, scalars):
    self.lines.append((step, dict(scalars)))

  def results(self):
    """All but the speed."""
    return [
      (step, {k: v for k, v in line.items() if not k.startswith("perf/")})
      for step, line in self.lines
    ]


def new_state():
  return make_state({"sum": jnp.zeros(())}, optax.identity())


def make_step(bad_step=None, name="loss"):
  @jax.jit
  def step(state, batch):
    total = state.params["sum"] + batch["number"][0]
    new = state.replace(step=state.step + 1, params={"sum": total})
    metrics = {
      "loss": total,
      "grad_norm": jnp.ones(()),
      "param_norm": jnp.abs(total),
      "drift_rms/0.2": jnp.full((), 0.5),
      "drift_rms/0.2/layer1": jnp.full((), 0.75),
      "lossless": jnp.full((), 3.0),
    }
    if bad_step is not None:
      bad = new.step == bad_step
      metrics[name] = jnp.where(bad, jnp.nan, metrics[name])
    return new, metrics

  return step


def figures(step):
  return {"eval/fd": 10.0 - step}


def at_question(number):
  """Says yes when it is asked so often, once."""
  questions = itertools.count(1)
  return lambda: next(questions) == number


def run(path, *, num_steps=6, every=2, eval_every=3, **changes):
  """Trains, or goes on: (state, feed, writer, saved steps)."""
  saver = checkpoint.Checkpointer(path, keep_latest=10, best_metric="fd")
  feed = Feed()
  settings = {
    "step_fn": make_step(),
    "prefetch": 2,
    "evaluate": lambda step, state, check: figures(step),
    "writer": Writer(),
  } | changes
  target = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    new_state(),
  )
  try:
    state = loop.restore_or_start(saver, target, new_state, feed)
    state = loop.Loop(
      feed=feed,
      put=lambda batch: jax.tree.map(jax.device_put, batch),
      schedule=loop.Schedule(
        num_steps=num_steps,
        log_every=1,
        eval_every=eval_every,
        checkpoint_every=every,
      ),
      best_metric=lambda s: {"fd": s["eval/fd"]} if s else None,
      checkpointer=saver,
      **settings,
    ).fit(state)
    return state, feed, settings["writer"], saver.steps()
  finally:
    saver.close()


def test_everything_happens_when_due(tmp_path):
  seen = {}

  def evaluate(step, state, check):
    # Its checkpoint is on its way to the disk.
    wait_for(lambda: step == 3 or (tmp_path / str(step)).exists())
    seen[step] = int(state.step), float(state.params["sum"]), set(state.ema)
    return figures(step)

  state, feed, writer, steps = run(tmp_path, num_steps=7, evaluate=evaluate)
  assert int(state.step) == 7 and feed.started == 1
  assert float(state.params["sum"]) == sum(range(7))
  assert steps == [2, 4, 6, 7]  # the last step is always saved
  logged = [step for step, line in writer.lines if "loss" in line]
  evaluated = [step for step, line in writer.lines if "eval/fd" in line]
  assert logged == list(range(1, 8))
  assert evaluated == [3, 6, 7]
  assert seen == {n: (n, sum(range(n)), {"0.9"}) for n in evaluated}
  # A finished run does nothing more.
  _, _, writer, steps = run(tmp_path, num_steps=7)
  assert writer.lines == [] and steps == [2, 4, 6, 7]


@pytest.mark.parametrize("prefetch", [0, 5])
def test_resume_continues_with_the_next_batch(tmp_path, prefetch):
  """Whatever had been read ahead when the state was saved."""
  whole, *_ = run(tmp_path / "whole", prefetch=0)
  run(tmp_path / "parts", num_steps=3, prefetch=prefetch)
  state, feed, writer, _ = run(tmp_path / "parts", prefetch=prefetch)
  assert feed.started == 0
  assert float(state.params["sum"]) == float(whole.params["sum"])
  assert [step for step, line in writer.lines if "loss" in line] == [4, 5, 6]


@pytest.mark.parametrize(
  ("prefetch", "told", "stops"),
  [(0, 2, 2), (2, 3, 3), (2, 5, 6), (5, 7, 8)],
)
def test_preemption_is_bit_exact(tmp_path, prefetch, told, stops):
  """After what had been drawn, at most up to the next checkpoint or evaluation,
  which is made at the next start then."""
  options = {"every": 4, "prefetch": prefetch, "num_steps": 11}
  whole, _, expected, _ = run(tmp_path / "whole", **options)
  writer = Writer()
  with pytest.raises(
    exits.Preempted, match=f"Told to stop: step {stops} is saved"
  ):
    run(
      tmp_path / "parts", preempted=at_question(told), writer=writer, **options
    )
  saver = checkpoint.Checkpointer(tmp_path / "parts", keep_latest=10)
  assert saver.steps() == sorted({4, stops} & set(range(stops + 1)))
  assert (tmp_path / "parts" / str(stops) / checksums.CHECKSUMS).exists()
  saver.close()
  state, feed, *_ = run(tmp_path / "parts", writer=writer, **options)
  assert feed.started == 0 and writer.results() == expected.results()
  assert float(state.params["sum"]) == float(whole.params["sum"])


@pytest.mark.parametrize(("every", "batch", "stops"), [(3, 2, 3), (4, 8, 6)])
def test_preemption_during_an_evaluation(tmp_path, every, batch, stops):
  """It ends between two batches, whether its step is saved anyway or not; the
  next start makes it, and all is as in a run that was never stopped."""
  begun, asked = [], []

  def evaluate(step, state, check):
    begun.append(step)
    for _ in range(5):
      check()
      asked.append(step)
    return figures(step)

  def told():
    return len(asked) == batch

  options = {"every": every, "num_steps": 8, "evaluate": evaluate}
  whole, _, expected, steps = run(tmp_path / "whole", **options)
  begun.clear(), asked.clear()
  writer = Writer()
  with pytest.raises(exits.Preempted, match=f"step {stops} is saved"):
    run(tmp_path / "parts", preempted=told, writer=writer, **options)
  assert len(asked) == batch and begun[-1] == stops
  state, *_ = run(tmp_path / "parts", writer=writer, **options)
  assert float(state.params["sum"]) == float(whole.params["sum"])
  assert writer.results() == expected.results()
  saver = checkpoint.Checkpointer(
    tmp_path / "parts", best_metric="fd", read_only=True
  )
  assert saver.steps() == sorted({*steps, stops}) and saver.best_step() == 8
  saver.close()


@pytest.mark.parametrize(
  ("name", "bad_step", "kept"),
  [
    ("loss", 1, "No checkpoint had been"),
    ("grad_norm", 5, "The checkpoint of step 4 is untouched"),
    ("param_norm", 4, "The checkpoint of step 2 is untouched"),
  ],
)
def test_a_non_finite_step_is_named_and_never_saved(
  tmp_path, name, bad_step, kept
):
  with pytest.raises(
    loop.NonFiniteError,
    match=rf"step {bad_step} is not finite: .*{name}=nan.*{kept}",
  ):
    run(tmp_path, step_fn=make_step(bad_step, name))
  # A run without the fault goes on from the last good checkpoint.
  state, _, writer, _ = run(tmp_path)
  assert float(state.params["sum"]) == sum(range(6))
  assert writer.lines[0][0] == 2 * ((bad_step - 1) // 2) + 1


def test_an_evaluation_that_fails_leaves_the_checkpoints(tmp_path):
  def evaluate(step, state, check):
    raise ValueError("no metric today")

  writer = Writer()
  for _ in range(2):  # the next start begins with it
    with pytest.raises(ValueError, match="no metric today"):
      run(tmp_path, every=3, evaluate=evaluate, writer=writer)
    saver = checkpoint.Checkpointer(tmp_path)
    assert saver.steps() == [3]
    saver.close()
  state, *_ = run(tmp_path, every=3, writer=writer)
  *_, expected, _ = run(tmp_path / "whole", every=3)
  assert int(state.step) == 6 and writer.results() == expected.results()


def test_a_run_past_its_end_is_an_error(tmp_path):
  config = toy.get_config("smoke")
  config.batch.labels = 8
  config.eval.every = 0
  for num_steps in (2, 1):
    config.train.num_steps = num_steps
    expected = contextlib.nullcontext()
    if num_steps == 1:
      expected = pytest.raises(ConfigError, match="holds a run of 2 steps")
    with expected:
      train.train_and_evaluate(config, str(tmp_path), draw=False)


def test_preemption_at_the_end_is_the_end(tmp_path):
  """All has been drawn: the run is done before it could stop."""
  state, _, _, steps = run(
    tmp_path, num_steps=5, every=10, eval_every=0, preempted=at_question(4)
  )
  assert int(state.step) == 5 and steps == [5]


def test_the_speed_leaves_out_the_first_step_and_what_is_not_training(
  tmp_path, monkeypatch
):
  """Steps of 20 ms around a first one and evaluations of 400 ms."""
  now = [0.0]
  clock = types.SimpleNamespace(perf_counter=lambda: now[0])
  monkeypatch.setattr(console, "time", clock)
  step_fn = make_step()

  def step(state, batch):
    now[0] += 0.02 if now[0] else 0.4
    return step_fn(state, batch)

  def evaluate(step, state, check):
    now[0] += 0.4
    return {}

  _, _, writer, _ = run(
    tmp_path, num_steps=7, step_fn=step, evaluate=evaluate, every=0
  )
  first, *others = [line for _, line in writer.lines if "loss" in line]
  assert not any(name.startswith("perf/") for name in first)
  for line in others:
    assert line["perf/steps_per_second"] == pytest.approx(50.0)
    assert line["perf/data_wait_fraction"] >= 0
