"""A run on disk and in time: mesh, workdir, optimiser, checkpoints, loop."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh

from drift_jax import config as config_lib
from drift_jax.config.sections import RunConfig
from drift_jax.metrics.writers import MetricWriter, create_writer
from drift_jax.system import (
  exits,
  numerics,
  processes,
  sharding,
)
from drift_jax.system.console import logger
from drift_jax.system.errors import naming
from drift_jax.training import checkpoint, loop, optim
from drift_jax.training import state as state_lib
from drift_jax.training.state import TrainState
from drift_jax.training.workdir import make_checkpointer

MakeOptimizer = Callable[[optax.Schedule], optax.GradientTransformation]


class Evaluate(Protocol):
  """A task's evaluation in the loop: see loop.Evaluate."""

  def __call__(
    self,
    step: int,
    state: TrainState,
    check: Callable[[], None],
    writer: MetricWriter,
  ) -> dict[str, float]: ...


def open_mesh(config: config_lib.Mesh) -> Mesh:
  """The mesh that the config describes, over the devices of all processes.

  Raises:
    ConfigError: sizes that do not fit the devices, or settings of JAX with
      which a run's numbers would be others.
  """
  numerics.require()
  with naming("mesh"):
    return sharding.make_mesh(config.data, config.fsdp)


def run(
  config: RunConfig,
  path: epath.Path,
  mesh: Mesh,
  *,
  name: str,
  init_params: Callable[[jax.Array], Any],
  start_params: Callable[[], Any] | None,
  step: Callable[..., tuple[TrainState, loop.Metrics]],
  frozen: Any,
  feed: loop.Feed,
  put: Callable[[Any], Any],
  evaluate: Evaluate,
  best_metric: Callable[[dict[str, float]], dict[str, float] | None],
  init_drift: Callable[[], dict[str, Any]] = dict,
  make_optimizer: MakeOptimizer | None = None,
) -> TrainState:
  """Trains to config.train.num_steps, from a checkpoint if there is one.

  Args:
    config: of any task.
    path: the workdir.
    mesh: where the state lives.
    name: of the model, for the log.
    init_params: key -> parameters.
    start_params: gives those that a new run begins with instead, on the host.
    step, frozen, init_drift, make_optimizer: see make_training.
    feed, put, best_metric: see loop.fit.
    evaluate: called with the metric writer as well.

  Raises:
    ConfigError: the workdir's run is longer than config.train.num_steps.
    Preempted: by SIGTERM, with the step saved.
  """
  training = make_training(
    config,
    mesh,
    init_params=init_params,
    step=step,
    frozen=frozen,
    init_drift=init_drift,
    make_optimizer=make_optimizer,
  )
  abstract = training.abstract
  count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(abstract.params))
  logger.info("%s: %s parameters", name, f"{count:,}")
  with contextlib.ExitStack() as stack:
    stack.callback(feed.close)
    checkpointer = make_checkpointer(config.checkpoint, path)
    stack.push(functools.partial(_close, checkpointer))
    init = training.init
    if start_params is not None:
      init = functools.partial(_start_with, training, start_params)
    state = loop.restore_or_start(checkpointer, abstract, init, feed)
    if int(state.step) > config.train.num_steps:
      raise config_lib.ConfigError(
        f"train.num_steps={config.train.num_steps}, but {path} holds a run of "
        f"{int(state.step)} steps: raise it or use a new workdir"
      )
    step_found = int(state.step)
    with naming("metrics.jsonl"):
      writer = create_writer(
        path,
        resume_step=step_found or -1,
        evaluated=step_found == 0 or checkpointer.evaluated(step_found),
        is_main=processes.is_first(),
      )
    stack.callback(writer.close)
    preempted = stack.enter_context(exits.preemption())
    return loop.fit(
      state,
      step_fn=lambda state, batch: training.step(state, batch, frozen),
      feed=feed,
      put=put,
      prefetch=config.data.prefetch,
      schedule=loop.Schedule(
        num_steps=config.train.num_steps,
        log_every=config.train.log_every,
        eval_every=config.eval.every,
        checkpoint_every=config.checkpoint.every,
      ),
      evaluate=functools.partial(evaluate, writer=writer),
      best_metric=best_metric,
      checkpointer=checkpointer,
      writer=writer,
      preempted=preempted,
    )


def _start_with(
  training: "Training", start_params: Callable[[], Any]
) -> TrainState:
  """A new run's state with given parameters, in all its averages as well."""
  given = start_params()
  abstract = training.abstract
  trees = {"params": abstract.params, "ema": abstract.ema}
  shardings = jax.tree.map(lambda x: x.sharding, trees)
  given = jax.device_put(given, shardings["params"])

  def copies(given: Any) -> dict[str, Any]:
    # Buffers of their own: each will be donated to the step.
    ema = {decay: jax.tree.map(jnp.copy, given) for decay in abstract.ema}
    return {"params": jax.tree.map(jnp.copy, given), "ema": ema}

  copied = jax.jit(copies, out_shardings=shardings)(given)
  return dataclasses.replace(training.init(), **copied)


@contextlib.contextmanager
def at_end(action: Callable[[], None]) -> Iterator[None]:
  """Does it at the end of a run, however it ends.

  Only not where another process was lost: this one is about to be ended by
  JAX.
  """
  try:
    yield
  except BaseException as error:
    if exits.cause_of(error) is None:
      # On a full disk it fails as well: the first error is what counts.
      with contextlib.suppress(OSError):
        action()
    raise
  action()


def _close(
  checkpointer: checkpoint.Checkpointer,
  kind: object,
  error: BaseException | None,
  trace: object,
) -> None:
  """Closes it, but for where a save would wait for a process that has ended."""
  del kind, trace
  if error is None or exits.cause_of(error) is None:
    checkpointer.close()


@dataclasses.dataclass(frozen=True)
class Training:
  """What a run compiles before its first step.

  Attributes:
    abstract: the state's shapes and shardings.
    init: makes the state of a new run.
    step: jitted (state, batch, frozen parameters) -> (state, metrics); the
      state is donated.
  """

  abstract: TrainState
  init: Callable[[], TrainState]
  step: Any


def make_training(
  config: RunConfig,
  mesh: Mesh,
  *,
  init_params: Callable[[jax.Array], Any],
  step: Callable[..., tuple[TrainState, loop.Metrics]],
  frozen: Any,
  init_drift: Callable[[], dict[str, Any]] = dict,
  make_optimizer: MakeOptimizer | None = None,
) -> Training:
  """State and step of a run on a mesh, whose devices need not be there.

  Args:
    config: of any task.
    mesh: where the state lives.
    init_params: key -> parameters.
    step: (state, batch, frozen parameters, *, optimizer, schedule, layout) ->
      (state, metrics).
    frozen: parameters on the mesh, or their shapes.
    init_drift: makes TrainState.drift.
    make_optimizer: (schedule) -> optimiser; None: AdamW, as config.optim says.
  """
  optimizer, schedule = adamw(config.optim, config.train.num_steps)
  if make_optimizer is not None:
    optimizer = make_optimizer(schedule)
  abstract, init = state_lib.abstract_and_init(
    init_params,
    optimizer,
    ema_decays=config.ema.decays,
    seed=config.seed,
    mesh=mesh,
    init_drift=init_drift,
  )
  layout = sharding.Layout(
    mesh, sharding.specs(abstract.params), sharding.specs(frozen)
  )
  jitted = jax.jit(
    functools.partial(
      step, optimizer=optimizer, schedule=schedule, layout=layout
    ),
    donate_argnums=0,
    out_shardings=(
      jax.tree.map(lambda x: x.sharding, abstract),
      sharding.replicated(mesh),
    ),
  )
  return Training(abstract, init, jitted)


def adamw(
  config: config_lib.Optim, num_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """AdamW as the section says, and the schedule that it follows."""
  schedule = optim.learning_rate_schedule(
    kind=config.schedule,
    peak=config.learning_rate,
    warmup_steps=config.warmup_steps,
    total_steps=num_steps,
  )
  optimizer = optim.make_optimizer(
    schedule,
    b1=config.b1,
    b2=config.b2,
    eps=config.eps,
    weight_decay=config.weight_decay,
    grad_clip=config.grad_clip,
  )
  return optimizer, schedule


def check_divides(name: str, size: int, mesh: Mesh) -> None:
  """Raises ConfigError where a batch axis can't be split over the mesh."""
  if size % mesh.size:
    raise config_lib.ConfigError(
      f"{name}={size} can't be split over the {mesh.size} devices of mesh "
      f"{dict(mesh.shape)}: use a multiple of {mesh.size}"
    )


def pad_to_mesh(size: int, mesh: Mesh) -> int:
  """The smallest multiple of the device count that is at least `size`."""
  return -(-size // mesh.size) * mesh.size
