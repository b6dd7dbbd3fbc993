"""The loop that every task shares: step, watch, report, save, evaluate."""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np

from drift_jax.data import prefetch
from drift_jax.system import console, exits
from drift_jax.system.console import logger
from drift_jax.system.errors import UserError
from drift_jax.training import checkpoint
from drift_jax.training.state import TrainState

Metrics = dict[str, jax.Array]
# (step, state, check) -> scalars; it leaves the state alone, and calls `check`
# between its batches, in all processes as often.
Evaluate = Callable[[int, TrainState, Callable[[], None]], dict[str, float]]
# A non-finite value of any of these stops the run. Loss and gradient are of
# the parameters before the step's update: only param_norm tells whether the
# state that a checkpoint of this step would hold is finite.
WATCHED = ("loss", "grad_norm", "param_norm")
# Starts of the names that the console line shows, if a task has them.
CONSOLE = (
  *("loss", "recon_loss", "accuracy", "drift_rms/", "fd/", "trust"),
  "grad_norm",
)


class NonFiniteError(UserError, FloatingPointError):
  """Something watched is not finite; the message names step and values."""


class Feed(Protocol):
  """See drift_jax.data.feed."""

  def __next__(self) -> Any: ...

  def state(self) -> dict[str, Any]: ...

  def start(self) -> None: ...

  def abstract(self, saved: Any) -> dict[str, Any]: ...

  def restore(self, state: dict[str, Any]) -> None: ...

  def close(self) -> None: ...


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
  restored = checkpointer.restore(abstract_state, feed.abstract)
  if restored is None:
    logger.info("Starting a new run.")
    feed.start()
    return init()
  state, feed_state = restored
  feed.restore(feed_state)
  logger.info("Resuming after step %d.", int(state.step))
  return state


def _on_console(name: str) -> bool:
  """Whether the console line shows a metric.

  A prefix that ends in '/' stands for the names one level below it.
  """
  return any(
    name == prefix or (prefix.endswith("/") and name.count("/") == 1)
    for prefix in CONSOLE
    if name.startswith(prefix)
  )


@dataclasses.dataclass(kw_only=True)
class Loop:
  """Steps, and what is due after them.

  Attributes:
    step_fn: jitted (state, batch) -> (state, scalar metrics).
    feed: yields host batches; its state goes into every checkpoint.
    put: places a host batch on the mesh.
    prefetch: batches that are read and placed ahead of the step.
    schedule: when to log, evaluate and save.
    evaluate: see Evaluate. A `check` that raises Preempted passes through it.
    best_metric: picks what checkpoints are ranked by from evaluate's scalars.
    checkpointer: saved to; it holds the state's step, unless that is 0.
    writer: receives the metrics; the part of clu's MetricWriter is used that
      writes scalars and flushes.
    preempted: asked after each step, and between the batches of an evaluation,
      whether to stop. The run then takes the batches that have been drawn, at
      most `prefetch` of them, and is saved: what is drawn cannot be put back.
      With several processes the answers are the same in all.
    before_step: called with (step, state) before each.
    speeds: names steps per second, and what follows from them, for metrics.
  """

  step_fn: Callable[[TrainState, Any], tuple[TrainState, Metrics]]
  feed: Feed
  put: Callable[[Any], Any]
  prefetch: int
  schedule: Schedule
  evaluate: Evaluate
  best_metric: Callable[[dict[str, float]], dict[str, float] | None]
  checkpointer: checkpoint.Checkpointer
  writer: Any
  preempted: Callable[[], bool] = lambda: False
  before_step: Callable[[int, TrainState], None] | None = None
  speeds: Callable[[float], dict[str, float]] = lambda speed: {
    "perf/steps_per_second": speed
  }

  def fit(self, state: TrainState) -> TrainState:
    """Runs to schedule.num_steps from the state's step.

    A step that is both saved and evaluated is saved first: the evaluation costs
    nothing if it fails or is cut short, and is made at the next start then.

    Args:
      state: donated to the first step.

    Raises:
      Preempted: `preempted` said so, and the state is saved.
      NonFiniteError: a step's loss, gradient or updated parameters are not
        finite. Nothing of that step or later is saved.
    """
    schedule = self.schedule
    first = step = self._first = self._saved = int(state.step)
    # 1. State that the methods below share.
    self._told = False
    self._unwatched: collections.deque[tuple[int, Metrics]] = (
      collections.deque()
    )
    self._progress = console.Progress(
      "step", schedule.num_steps, first=step, unit="steps", lines=False
    )
    self._batches = prefetch.Prefetcher(
      self.feed,
      self.put,
      first_step=step + 1,
      depth=self.prefetch,
      pause_after=self._pauses_after,
    )
    stopped = False
    try:
      # 2. An evaluation that the run before could not finish.
      if step and schedule.eval_every and not self.checkpointer.evaluated(step):
        self._evaluate(step, state)
      # 3. The steps. After a request to stop, the batches that are prefetched
      # already are trained on, then the state is saved: `last` is that step.
      last = schedule.num_steps
      for step in range(first + 1, schedule.num_steps + 1):
        state, metrics = self._advance(step, state)
        if schedule.due(step, schedule.log_every):
          self._log(step, metrics)
        if last == schedule.num_steps and self._stops():
          last = self._batches.stop()
        stopped = step == last < schedule.num_steps
        evaluating = schedule.due(step, schedule.eval_every)
        if stopped or schedule.due(step, schedule.checkpoint_every):
          self._save(step, state, evaluation_due=evaluating)
        if stopped:
          break
        if evaluating:
          self._evaluate(step, state)
    except exits.Preempted:  # in an evaluation
      stopped = True
      if self._saved < step:
        self._save(step, state, evaluation_due=True)
    finally:
      self._batches.close()
      self._progress.close()
      self.writer.flush()
    # 4. The end, once all is on the disk.
    self.checkpointer.wait()
    if stopped:
      raise exits.Preempted(f"Told to stop: step {step} is saved")
    return state

  def _pauses_after(self, step: int) -> bool:
    """Returns whether no batch may be drawn ahead after this step."""
    schedule = self.schedule
    return (
      step == schedule.num_steps
      or schedule.due(step, schedule.checkpoint_every)
      or schedule.due(step, schedule.eval_every)
    )

  def _stops(self) -> bool:
    """Whether the run was told to stop; nobody is asked again after a yes."""
    self._told = self._told or self.preempted()
    return self._told

  def _check_stop(self) -> None:
    if self._stops():
      raise exits.Preempted("Told to stop during an evaluation")

  def _advance(
    self, step: int, state: TrainState
  ) -> tuple[TrainState, Metrics]:
    """Hands the device a step, and checks the one before.

    The device always has the next step queued while the host looks at the last
    one, so that watching costs no idle time.
    """
    batch = next(self._batches)
    if self.before_step is not None:
      self.before_step(step, state)
    with jax.transfer_guard("disallow"):
      state, metrics = self.step_fn(state, batch)
    watched = {k: metrics[k] for k in WATCHED if k in metrics}
    self._unwatched.append((step, watched))
    self._watch(1)
    self._progress.update()
    if step == self._first + 1:  # which compiles, and starts the readers
      self._progress.restart()
      self._waited = self._batches.seconds_waited
    return state, metrics

  def _watch(self, left: int = 0) -> None:
    """Checks that all steps but the last `left` ones are finite."""
    while len(self._unwatched) > left:
      step, metrics = self._unwatched.popleft()
      values = {k: float(v) for k, v in jax.device_get(metrics).items()}
      if all(np.isfinite(value) for value in values.values()):
        continue
      last = self.checkpointer.latest_step()
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

  def _log(self, step: int, metrics: Metrics) -> None:
    self._watch()
    scalars = {k: float(v) for k, v in jax.device_get(metrics).items()}
    speed = self._progress.show(
      " ".join(f"{k}={v:.4g}" for k, v in scalars.items() if _on_console(k))
    )
    waited = self._batches.seconds_waited
    if speed is not None:
      scalars |= self.speeds(speed)
      scalars["perf/data_wait_fraction"] = (
        waited - self._waited
      ) / self._progress.seconds
    self._waited = waited
    self.writer.write_scalars(step, scalars)
    self.checkpointer.poll()

  def _save(
    self, step: int, state: TrainState, *, evaluation_due: bool
  ) -> None:
    self._watch()
    self.writer.flush()
    with self._progress.paused():
      self.checkpointer.save(
        step, state, self._batches.state(), evaluation_due=evaluation_due
      )
    self._saved = step

  def _evaluate(self, step: int, state: TrainState) -> None:
    """Evaluates a step, and ranks its checkpoint if it has one."""
    self._watch()
    try:
      with self._progress.paused():
        figures = self.evaluate(step, state, self._check_stop)
    except exits.Preempted:
      raise
    except Exception as error:
      if exits.cause_of(error) is None:
        self.checkpointer.wait()
        logger.error(
          "The evaluation of step %d failed; the newest checkpoint is of step "
          "%s.",
          step,
          self.checkpointer.latest_step(),
        )
      raise
    self.writer.write_scalars(step, figures)
    if self._saved == step:
      # A step with figures is not evaluated again: they must be on disk.
      self.writer.flush()
      self.checkpointer.rank(step, self.best_metric(figures))
