"""The loop that every task shares: step, watch, report, save, evaluate."""

import collections
import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import numpy as np
from tqdm import tqdm

from drift_jax.data.prefetch import Prefetcher
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
# Names in front of what the console line shows, where a task has them.
CONSOLE = ("loss", "recon_loss", "accuracy", "drift_rms/", "grad_norm")


class NonFiniteError(UserError, FloatingPointError):
  """Something watched is not finite; the message names step and values."""


class Feed(Protocol):
  """See drift_jax.data.feed."""

  def __next__(self) -> Any: ...

  def start(self) -> None: ...

  def state(self) -> dict[str, Any]: ...

  def abstract(self, saved: Any) -> dict[str, Any]: ...

  def restore(self, state: dict[str, Any]) -> None: ...

  def close(self) -> None: ...


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
  restored = checkpointer.restore(abstract_state, feed.abstract)
  if restored is None:
    logger.info("Starting a new run.")
    feed.start()
    return init()
  state, feed_state = restored
  feed.restore(feed_state)
  logger.info("Resuming after step %d.", int(state.step))
  return state


class _Watch:
  """Checks each step's loss, gradient and parameters, one step late.

  The device always has the next step queued while the host looks at the last
  one, so that watching costs no idle time.
  """

  def __init__(self, checkpointer: checkpoint.Checkpointer):
    self._pending: collections.deque[tuple[int, Metrics]] = collections.deque()
    self._checkpointer = checkpointer

  def add(self, step: int, metrics: Metrics) -> None:
    watched = {k: metrics[k] for k in WATCHED if k in metrics}
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


def _on_console(name: str) -> bool:
  """Whether the console line shows a metric.

  A prefix that ends in '/' stands for the names one level below it.
  """
  return any(
    name == prefix or (prefix.endswith("/") and name.count("/") == 1)
    for prefix in CONSOLE
    if name.startswith(prefix)
  )


class _Progress:
  """A bar on a terminal, plain lines elsewhere."""

  def __init__(self, first: int, total: int):
    self._bar = (
      tqdm(total=total, initial=first, unit="step", dynamic_ncols=True)
      if console.shows_bars()
      else None
    )
    self._total = total
    # Step and time since which the speed is taken; none before the first
    # step, which compiles.
    self._mark: tuple[int, float] | None = None
    self._paused = 0.0
    # What the last speed was taken over, without pauses.
    self.seconds = 0.0

  def advance(self, step: int) -> None:
    """Counts a step that has been handed to the device."""
    if self._mark is None:
      self._mark = (step, time.perf_counter())
      self._paused = 0.0
    if self._bar is not None:
      self._bar.update()

  def report(self, step: int, scalars: dict[str, float]) -> float | None:
    """Shows the scalars; returns the speed in steps per second.

    None where there is nothing to time: only the first step has been done.
    """
    speed = self._speed(step)
    shown = {
      name: f"{value:.4g}"
      for name, value in scalars.items()
      if _on_console(name)
    }
    if self._bar is not None:
      self._bar.set_postfix(shown, refresh=False)
      return speed
    text = " ".join(f"{name}={value}" for name, value in shown.items())
    if speed is not None:
      left = (self._total - step) / speed
      text += f" ({speed:.1f} steps/s, {left:.0f} s left)"
    logger.info("step %d/%d %s", step, self._total, text)
    return speed

  def _speed(self, step: int) -> float | None:
    """Since the last mark, which moves here."""
    if self._mark is None or step == self._mark[0]:
      return None
    now = time.perf_counter()
    self.seconds = max(now - self._mark[1] - self._paused, 1e-9)
    speed = (step - self._mark[0]) / self.seconds
    self._mark = (step, now)
    self._paused = 0.0
    return speed

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Keeps what is not training out of the speed."""
    start = time.perf_counter()
    try:
      yield
    finally:
      self._paused += time.perf_counter() - start

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()


class _Preemption:
  """Whether the run was told to stop; nobody is asked again after a yes."""

  def __init__(self, ask: Callable[[], bool]):
    self._ask = ask
    self._told = False

  def told(self) -> bool:
    self._told = self._told or self._ask()
    return self._told

  def check(self) -> None:
    """Raises Preempted if so; evaluations call it between their batches."""
    if self.told():
      raise exits.Preempted("Told to stop during an evaluation")


@dataclasses.dataclass
class _Evaluation:
  """Evaluates a step, and ranks its checkpoint if it has one.

  Attributes:
    evaluate, best_metric, checkpointer, writer: of `fit`.
    preemption: asked between batches.
    progress: does not count it as training.
  """

  evaluate: Evaluate
  best_metric: Callable[[dict[str, float]], dict[str, float] | None]
  checkpointer: checkpoint.Checkpointer
  writer: Writer
  preemption: _Preemption
  progress: _Progress

  def __call__(self, step: int, state: TrainState, *, saved: bool) -> None:
    with self.progress.paused(), contextlib.ExitStack() as stack:
      stack.push(functools.partial(self._explain, step))
      figures = self.evaluate(step, state, self.preemption.check)
    self.writer.write_scalars(step, figures)
    if saved:
      # A step with figures is not evaluated again: they must be on disk.
      self.writer.flush()
      self.checkpointer.rank(step, self.best_metric(figures))

  def _explain(
    self,
    step: int,
    kind: object,
    error: BaseException | None,
    trace: object,
  ) -> None:
    """Says what an error in the evaluation has not cost."""
    del kind, trace
    if (
      not isinstance(error, Exception)
      or isinstance(error, exits.Preempted)
      or exits.cause_of(error) is not None
    ):
      return
    self.checkpointer.wait()
    logger.error(
      "The evaluation of step %d failed; the newest checkpoint is of step %s.",
      step,
      self.checkpointer.latest_step(),
    )


def fit(
  state: TrainState,
  *,
  step_fn: Callable[[TrainState, Any], tuple[TrainState, Metrics]],
  feed: Feed,
  put: Callable[[Any], Any],
  prefetch: int,
  schedule: Schedule,
  evaluate: Evaluate,
  best_metric: Callable[[dict[str, float]], dict[str, float] | None],
  checkpointer: checkpoint.Checkpointer,
  writer: Writer,
  preempted: Callable[[], bool] = lambda: False,
) -> TrainState:
  """Runs to schedule.num_steps from wherever the state stands.

  A step that is both saved and evaluated is saved first: the evaluation costs
  nothing if it fails or is cut short, and is made at the next start then.

  Args:
    state: donated to the first step.
    step_fn: jitted (state, batch) -> (state, scalar metrics).
    feed: yields host batches; its state goes into every checkpoint.
    put: places a host batch on the mesh.
    prefetch: batches that are read and placed ahead of the step.
    schedule: when to log, evaluate and save.
    evaluate: see Evaluate. A `check` that raises Preempted passes through it.
    best_metric: picks what checkpoints are ranked by from evaluate's scalars.
    checkpointer: saved to; it holds the state's step, unless that is 0.
    writer: receives the metrics.
    preempted: asked after each step, and between the batches of an evaluation,
      whether to stop. The run then takes the batches that have been drawn, at
      most `prefetch` of them, and is saved: what is drawn cannot be put back.
      With several processes the answers are the same in all.

  Raises:
    Preempted: `preempted` said so, and the state is saved.
    ValueError: the state is already past schedule.num_steps.
    NonFiniteError: a step's loss, gradient or updated parameters are not
      finite. Nothing of that step or later is saved.
  """
  first = int(state.step)
  if first > schedule.num_steps:
    raise ValueError(
      f"the run stands at step {first}, past train.num_steps="
      f"{schedule.num_steps}: raise train.num_steps to at least {first}, or "
      "use a new workdir"
    )
  progress = _Progress(first, schedule.num_steps)
  watch = _Watch(checkpointer)
  preemption = _Preemption(preempted)
  evaluation = _Evaluation(
    evaluate, best_metric, checkpointer, writer, preemption, progress
  )
  batches = Prefetcher(
    feed,
    put,
    first_step=first + 1,
    depth=prefetch,
    # After these a stop must find nothing drawn ahead.
    pause_after=lambda step: (
      step == schedule.num_steps
      or schedule.due(step, schedule.checkpoint_every)
      or schedule.due(step, schedule.eval_every)
    ),
  )
  waited = 0.0
  # The step that the state is of, that is saved, and that is the last one.
  step, saved, last = first, first, schedule.num_steps
  stopped = False
  try:
    if first and schedule.eval_every and not checkpointer.evaluated(first):
      evaluation(first, state, saved=True)
    for step in range(first + 1, schedule.num_steps + 1):
      batch = next(batches)
      with jax.transfer_guard("disallow"):
        state, metrics = step_fn(state, batch)
      watch.add(step, metrics)
      progress.advance(step)
      if step == first + 1:
        waited = batches.seconds_waited  # the first batch starts the readers
      if schedule.due(step, schedule.log_every):
        watch.check_all()
        scalars = {k: float(v) for k, v in jax.device_get(metrics).items()}
        speed = progress.report(step, scalars)
        if speed is not None:
          scalars["perf/steps_per_second"] = speed
          scalars["perf/data_wait_fraction"] = (
            batches.seconds_waited - waited
          ) / progress.seconds
        waited = batches.seconds_waited
        writer.write_scalars(step, scalars)
        checkpointer.poll()
      if last == schedule.num_steps and preemption.told():
        last = batches.stop()
      stopping = step == last < schedule.num_steps
      evaluating = schedule.due(step, schedule.eval_every)
      if stopping or schedule.due(step, schedule.checkpoint_every):
        watch.check_all()
        writer.flush()
        with progress.paused():
          checkpointer.save(
            step, state, batches.state(), evaluation_due=evaluating
          )
        saved = step
      if stopping:
        stopped = True
        break
      if evaluating:
        watch.check_all()
        evaluation(step, state, saved=saved == step)
  except exits.Preempted:  # by `check`
    stopped = True
    if saved < step:
      writer.flush()
      checkpointer.save(step, state, batches.state(), evaluation_due=True)
  finally:
    batches.close()
    progress.close()
    writer.flush()
  checkpointer.wait()
  if stopped:
    raise exits.Preempted(f"Told to stop: step {step} is saved")
  return state
