"""A run on disk and in time: mesh, workdir, optimiser, checkpoints, loop."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath
from jax.sharding import Mesh

from drift_jax import config as config_lib
from drift_jax.config.sections import RunConfig
from drift_jax.metrics.writers import create_writer
from drift_jax.system import exits, numerics, processes, sharding
from drift_jax.system.errors import naming
from drift_jax.training import loop, messages
from drift_jax.training import state as state_lib
from drift_jax.training.state import TrainState
from drift_jax.training.workdir import make_checkpointer

# A task's evaluation in the loop: as loop.Evaluate, with writer=MetricWriter.
Evaluate = Callable[..., dict[str, float]]


def open_mesh(config: config_lib.Mesh) -> Mesh:
  """The mesh that the config describes, over the devices of all processes.

  Raises:
    ConfigError: sizes that do not fit the devices, or settings of JAX with
      which a run's numbers would be others.
  """
  numerics.require()
  with naming("mesh"):
    return sharding.make_mesh(config.data, config.fsdp)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
  """How a task trains a model.

  Attributes:
    name: the model's, for the log.
    init_params: key -> parameters.
    step: (state, batch, frozen parameters, *, optimizer, schedule, layout) ->
      (state, metrics).
    batch: makes a step's batch from a feed's arrays, by their names.
    frozen: parameters on the mesh, or their shapes.
    init_drift: makes TrainState.drift.
    make_optimizer: (schedule) -> optimiser; None: AdamW, as config.optim says.
    computed: precision and kernels, for the log.
  """

  name: str
  init_params: Callable[[jax.Array], Any]
  step: Callable[..., tuple[TrainState, loop.Metrics]]
  batch: Callable[..., Any]
  frozen: Any
  init_drift: Callable[[], dict[str, Any]] = dict
  make_optimizer: (
    Callable[[optax.Schedule], optax.GradientTransformation] | None
  ) = None
  computed: str = ""


def run(
  config: RunConfig,
  path: epath.Path,
  mesh: Mesh,
  recipe: Recipe,
  *,
  feed: loop.Feed,
  evaluate: Evaluate,
  best_metric: Callable[
    [dict[str, float]], dict[str, float] | None
  ] = lambda scalars: None,
  start_params: Callable[[], Any] | None = None,
  images: int = 0,
) -> TrainState:
  """Trains to config.train.num_steps, from a checkpoint if there is one.

  Args:
    config: config of any task.
    path: the workdir.
    mesh: where the state lives.
    recipe: the task's.
    feed, best_metric: see loop.Loop.
    evaluate: called with the metric writer as well.
    start_params: gives the first parameters of a new run, on the host; None:
      recipe.init_params does.
    images: that the model makes or takes in a step, for the speed; 0: none.

  Raises:
    ConfigError: the workdir's run is longer than config.train.num_steps.
    Preempted: by SIGTERM, with the step saved.
  """
  # 1. What will run.
  training = make_training(config, mesh, recipe)
  abstract, init = training.abstract, training.init
  messages.start(recipe.name, recipe.computed, abstract.params, mesh)
  if start_params is not None:
    init = functools.partial(_start_with, training, start_params)
  with contextlib.ExitStack() as stack:
    # 2. Where it stands.
    stack.callback(feed.close)
    checkpointer = make_checkpointer(config.checkpoint, path)
    # Not after a peer was lost: closing waits for the saves of all processes.
    stack.enter_context(at_end(checkpointer.close))
    state = loop.restore_or_start(checkpointer, abstract, init, feed)
    step = int(state.step)
    if step > config.train.num_steps:
      raise config_lib.ConfigError(
        f"train.num_steps={config.train.num_steps}, but {path} holds a run of "
        f"{step} steps: raise it or use a new workdir"
      )
    start_writer = functools.partial(
      create_writer,
      path,
      resume_step=step or -1,
      evaluated=step == 0 or checkpointer.evaluated(step),
      names=config.writers,
      config=dataclasses.asdict(config),
    )
    started: list[Any] = []
    with naming("metrics.jsonl"):
      # The others hear of its failure here, not as a lost peer in a step.
      processes.from_first(lambda: started.append(start_writer(is_main=True)))
    (writer,) = started or [start_writer(is_main=False)]
    stack.callback(writer.close)
    watch = None
    if config.train.profile:
      from drift_jax.training.profile import Profile

      steps = range(step + 1, config.train.num_steps + 1)
      watch = Profile(config.train.profile, path, steps)
      stack.callback(watch.close)
    # 3. The steps that are left.
    step_fn = messages.Step(training.step, recipe.frozen, path, mesh, images)
    state = loop.Loop(
      step_fn=step_fn,
      feed=feed,
      put=lambda batch: recipe.batch(**sharding.put_batch(batch, mesh)),
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
      preempted=stack.enter_context(exits.preemption()),
      before_step=watch,
      speeds=step_fn.speeds,
    ).fit(state)
    messages.end(path, int(state.step), checkpointer)
    return state


def _start_with(
  training: "Training", start_params: Callable[[], Any]
) -> TrainState:
  """A new run's state with given parameters, in all its averages as well."""
  abstract = training.abstract
  trees = {"params": abstract.params, "ema": abstract.ema}
  shardings = jax.tree.map(lambda x: x.sharding, trees)
  params = jax.device_put(start_params(), shardings["params"])

  def copies(params: Any) -> dict[str, Any]:
    # Separate buffers: each will be donated to the step.
    ema = {decay: jax.tree.map(jnp.copy, params) for decay in abstract.ema}
    return {"params": jax.tree.map(jnp.copy, params), "ema": ema}

  copied = jax.jit(copies, out_shardings=shardings)(params)
  return dataclasses.replace(training.init(), **copied)


@contextlib.contextmanager
def at_end(action: Callable[[], None]) -> Iterator[None]:
  """Does it at the end of a run, however it ends.

  But not if another process was lost: JAX is about to end this one.
  """
  try:
    yield
  except BaseException as error:
    if exits.cause_of(error) is None:
      # On a full disk, or of damaged numbers, it fails as well: the first
      # error is what counts.
      with contextlib.suppress(OSError, ValueError):
        action()
    raise
  action()


@dataclasses.dataclass(frozen=True)
class Training:
  """The state's shapes, how it is made, and the step, compiled when first run.

  Attributes:
    abstract: the state's shapes and shardings.
    init: makes the state of a new run.
    step: jitted (state, batch, frozen parameters) -> (state, metrics); the
      state is donated.
  """

  abstract: TrainState
  init: Callable[[], TrainState]
  step: Any


def make_training(config: RunConfig, mesh: Mesh, recipe: Recipe) -> Training:
  """State and step of a run on a mesh, whose devices need not be there."""
  optimizer, schedule = make_optimizer(config.optim, config.train.num_steps)
  if recipe.make_optimizer is not None:
    optimizer = recipe.make_optimizer(schedule)
  abstract, init = state_lib.abstract_and_init(
    recipe.init_params,
    optimizer,
    ema_decays=config.ema.decays,
    seed=config.seed,
    mesh=mesh,
    init_drift=recipe.init_drift,
  )
  layout = sharding.Layout(
    mesh, sharding.specs(abstract.params), sharding.specs(recipe.frozen)
  )
  jitted = jax.jit(
    functools.partial(
      recipe.step, optimizer=optimizer, schedule=schedule, layout=layout
    ),
    donate_argnums=0,
    out_shardings=(
      jax.tree.map(lambda x: x.sharding, abstract),
      sharding.replicated(mesh),
    ),
  )
  return Training(abstract, init, jitted)


def make_optimizer(
  config: config_lib.Optim, num_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """AdamW, or Muon beside it, as the section says, and AdamW's schedule."""
  schedule = state_lib.learning_rate_schedule(
    kind=config.schedule,
    peak=config.learning_rate,
    warmup_steps=config.warmup_steps,
    total_steps=num_steps,
  )
  names = ("b1", "b2", "eps", "weight_decay", "grad_clip", "muon_kernels")
  settings = {name: getattr(config, name) for name in names}
  muon_rate = config.muon_learning_rate / config.learning_rate
  return (
    state_lib.make_optimizer(schedule, **settings, muon_rate=muon_rate),
    schedule,
  )


def check_divides(name: str, size: int, mesh: Mesh) -> None:
  """Raises ConfigError if a batch axis can't be split over the mesh."""
  if size % mesh.size:
    raise config_lib.ConfigError(
      f"{name}={size} can't be split over the {mesh.size} devices of mesh "
      f"{dict(mesh.shape)}: use a multiple of {mesh.size}"
    )


def pad_to_mesh(size: int, mesh: Mesh) -> int:
  """The smallest multiple of the device count that is at least `size`."""
  return -(-size // mesh.size) * mesh.size
