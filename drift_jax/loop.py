"""The loop that every task shares: step, watch, report, evaluate, save."""

import collections
import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import numpy as np
from tqdm import tqdm

from drift_jax import checkpoint
from drift_jax.console import logger
from drift_jax.state import TrainState

Metrics = dict[str, jax.Array]
# A non-finite value of any of these stops the run.
WATCHED = ("loss", "grad_norm")
# Names in front of what the console line shows, where a task has them.
CONSOLE = ("loss", "recon_loss", "accuracy", "drift_rms/", "grad_norm")


class NonFiniteError(FloatingPointError):
  """A loss or gradient that is not finite; the message names the step."""


class Feed(Protocol):
  """See drift_jax.data.feed."""

  def __next__(self) -> Any: ...

  def start(self) -> None: ...

  def state(self) -> dict[str, Any]: ...

  def abstract(self) -> dict[str, Any]: ...

  def restore(self, state: dict[str, Any]) -> None: ...


class Writer(Protocol):
  """The part of clu's MetricWriter that the loop uses."""

  def write_scalars(self, step: int, scalars: Any) -> None: ...

  def flush(self) -> None: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
  """When things happen, in steps; 0 means never."""

  num_steps: int
  log_every: int
  eval_every: int
  checkpoint_every: int

  def due(self, step: int, every: int) -> bool:
    """True at multiples of `every`, and at the end if `every` is not 0."""
    return every > 0 and (step % every == 0 or step == self.num_steps)


def restore_or_start(
  checkpointer: checkpoint.Checkpointer,
  abstract_state: TrainState,
  init: Callable[[], TrainState],
  feed: Feed,
) -> TrainState:
  """The newest checkpoint's state, or a new one; the feed follows.

  The order matters: the state first (it names the step), then the feed's
  queue and data position, so that the next batch is the one that the
  interrupted run would have drawn. Random streams need nothing more: they are
  folded from the state's key and step, and from the feed's position.
  """
  restored = checkpointer.restore(abstract_state, feed.abstract())
  if restored is None:
    logger.info("Starting a new run.")
    feed.start()
    return init()
  state, feed_state = restored
  feed.restore(feed_state)
  logger.info("Resuming after step %d.", int(state.step))
  return state


class _Watch:
  """Checks each step's loss and gradient, one step late.

  The device always has the next step queued while the host looks at the last
  one, so that watching costs no idle time.
  """

  def __init__(self, checkpointer: checkpoint.Checkpointer):
    self._pending: collections.deque[tuple[int, Metrics]] = collections.deque()
    self._checkpointer = checkpointer

  def add(self, step: int, metrics: Metrics) -> None:
    watched = {name: metrics[name] for name in WATCHED}
    self._pending.append((step, watched))
    while len(self._pending) > 1:
      self._check_oldest()

  def check_all(self) -> None:
    while self._pending:
      self._check_oldest()

  def _check_oldest(self) -> None:
    step, metrics = self._pending.popleft()
    values = {k: float(v) for k, v in jax.device_get(metrics).items()}
    if all(np.isfinite(value) for value in values.values()):
      return
    last = self._checkpointer.latest_step()
    kept = (
      f"The checkpoint of step {last} is untouched"
      if last is not None
      else "No checkpoint had been written"
    )
    raise NonFiniteError(
      f"step {step} is not finite: "
      + ", ".join(f"{name}={value}" for name, value in values.items())
      + f". {kept}; nothing after it was saved. Lower optim.learning_rate or "
      "look for features that are constant or overflow."
    )


class _Progress:
  """A bar on a terminal, plain lines elsewhere."""

  def __init__(self, first: int, total: int):
    self._bar = (
      tqdm(total=total, initial=first, unit="step", dynamic_ncols=True)
      if sys.stderr.isatty()
      else None
    )
    self._total = total
    self._mark = (first, time.perf_counter())
    self._paused = 0.0

  def advance(self) -> None:
    if self._bar is not None:
      self._bar.update()

  def report(self, step: int, scalars: dict[str, float]) -> float:
    """Shows the scalars; returns the speed in steps per second."""
    now = time.perf_counter()
    seconds = now - self._mark[1] - self._paused
    speed = (step - self._mark[0]) / max(seconds, 1e-9)
    self._mark = (step, now)
    self._paused = 0.0
    shown = {
      name: f"{value:.4g}"
      for name, value in scalars.items()
      if any(
        name == c or (c.endswith("/") and name.count("/") == 1)
        for c in CONSOLE
        if name.startswith(c)
      )
    }
    if self._bar is not None:
      self._bar.set_postfix(shown, refresh=False)
    else:
      left = (self._total - step) / speed
      text = " ".join(f"{name}={value}" for name, value in shown.items())
      logger.info(
        "step %d/%d %s (%.1f steps/s, %.0f s left)",
        step,
        self._total,
        text,
        speed,
        left,
      )
    return speed

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Keeps what is not training out of the speed."""
    start = time.perf_counter()
    yield
    self._paused += time.perf_counter() - start

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()


def fit(
  state: TrainState,
  *,
  step_fn: Callable[[TrainState, Any], tuple[TrainState, Metrics]],
  feed: Feed,
  put: Callable[[Any], Any],
  schedule: Schedule,
  evaluate: Callable[[int, TrainState], dict[str, float]],
  best_metric: Callable[[dict[str, float]], dict[str, float] | None],
  checkpointer: checkpoint.Checkpointer,
  writer: Writer,
) -> TrainState:
  """Runs to schedule.num_steps from wherever the state stands.

  Args:
    state: donated to the first step.
    step_fn: jitted (state, batch) -> (state, scalar metrics).
    feed: yields host batches; its state goes into every checkpoint.
    put: places a host batch on the mesh.
    schedule: when to log, evaluate and save.
    evaluate: (step, state) -> scalars; must leave the state alone.
    best_metric: picks what the checkpoint manager ranks by from evaluate's
      scalars.
    checkpointer: saved to after an evaluation of the same step.
    writer: receives the metrics.

  Raises:
    NonFiniteError: a step's loss or gradient is not finite. Nothing of that
      step or later is saved.
  """
  first = int(state.step)
  progress = _Progress(first, schedule.num_steps)
  watch = _Watch(checkpointer)
  try:
    for step in range(first + 1, schedule.num_steps + 1):
      batch = put(next(feed))
      with jax.transfer_guard("disallow"):
        state, metrics = step_fn(state, batch)
      watch.add(step, metrics)
      progress.advance()
      if schedule.due(step, schedule.log_every):
        watch.check_all()
        scalars = {k: float(v) for k, v in jax.device_get(metrics).items()}
        speed = progress.report(step, scalars)
        writer.write_scalars(step, scalars | {"perf/steps_per_second": speed})
        checkpointer.poll()
      figures = {}
      if schedule.due(step, schedule.eval_every):
        watch.check_all()
        with progress.paused():
          figures = evaluate(step, state)
        writer.write_scalars(step, figures)
      if schedule.due(step, schedule.checkpoint_every):
        watch.check_all()
        writer.flush()
        with progress.paused():
          checkpointer.save(step, state, feed.state(), best_metric(figures))
  finally:
    progress.close()
    writer.flush()
  checkpointer.wait()
  return state
