"""A run on disk and in time: mesh, workdir, optimiser, checkpoints, loop."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh

from drift_jax import (
  artifacts,
  checkpoint,
  data,
  devices,
  exits,
  loop,
  metrics,
  numerics,
  optim,
  paths,
  processes,
  robots,
  sharding,
  storage,
)
from drift_jax import config as config_lib
from drift_jax import state as state_lib
from drift_jax.console import logger
from drift_jax.experiment import places
from drift_jax.experiment.data_facts import (
  CLASSES_FILE,
  DATA_FILE,
  Facts,
  check_data,
  differences,
  is_same_data,
  read_facts,
  recorded,
)
from drift_jax.state import TrainState

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "frozen_weights.json"
CHECKPOINTS = "checkpoints"
# What ends a program with one line: its message says what to do about it.
ERRORS = (
  config_lib.ConfigError,
  artifacts.ArtifactError,
  checkpoint.CheckpointError,
  data.DataError,
  loop.NonFiniteError,
  metrics.EvaluationError,
  processes.PeerError,
  devices.DeviceError,
  robots.RobotError,
  OSError,  # a file or a disk; the message has the path
)
AnyConfig = config_lib.AnyConfig


class Evaluate(Protocol):
  """A task's evaluation in the loop: see loop.Evaluate."""

  def __call__(
    self,
    step: int,
    state: TrainState,
    check: Callable[[], None],
    writer: metrics.MetricWriter,
  ) -> dict[str, float]: ...


@contextlib.contextmanager
def naming(section: str) -> Iterator[None]:
  """Turns a constructor's ValueError into a ConfigError of the section."""
  try:
    yield
  except ValueError as error:
    if isinstance(error, config_lib.ConfigError):
      raise
    text = str(error)
    if not text.startswith(f"{section}."):  # a key names the section already
      text = f"{section}: {text}"
    raise config_lib.ConfigError(text) from error


def open_mesh(config: config_lib.Mesh) -> Mesh:
  """The mesh that the config describes, over the devices of all processes.

  Raises:
    ConfigError: sizes that do not fit the devices, or settings of JAX with
      which a run's numbers would be others.
  """
  numerics.require()
  with naming("mesh"):
    return sharding.make_mesh(config.data, config.fsdp)


def check_workdir(workdir: str) -> None:
  """Tells at the start whether the workdir can be written; makes nothing.

  The first process tries, and all end where it can't.

  Raises:
    ConfigError: it can't, or it is a file.
    PeerError: the same, in the other processes.
  """

  def check() -> None:
    if storage.is_remote(workdir):
      return  # storage.check has looked at it.
    path = pathlib.Path(paths.expand(workdir))
    try:
      storage.check_characters(workdir)
      while not path.is_dir():
        if path.exists():
          raise NotADirectoryError(f"{path} is a file")
        path = path.parent
      with tempfile.TemporaryFile(dir=path):
        pass
    except OSError as error:
      raise config_lib.ConfigError(
        f"--workdir={workdir} can't be written: {error}; give a folder on a "
        "disk that is writable, and that all processes share"
      ) from error

  processes.from_first(check)


def open_workdir(
  workdir: str,
  config: AnyConfig,
  frozen: Mapping[str, str],
  class_names: Sequence[str],
  facts: Facts,
) -> epath.Path:
  """Creates the workdir; writes config, classes, data's facts, weights' sums.

  With them goes where the config's paths start. Where the workdir holds a
  checkpoint already, the config, the data and the frozen weights must be those
  of that run. The first process does it for all; the others see that they have
  its data.

  Args:
    workdir: of the run.
    config: resolved.
    frozen: {'encoders.NAME' or 'vae': SHA-256 of its weights}.
    class_names: one for each label, if there are labels.
    facts: of the data, if there are any; see data_facts.

  Raises:
    ConfigError: if the workdir holds a run of another experiment or of other
      data, or is not there for all processes.
    PeerError: what the first process raised, in the others.
  """
  path = epath.Path(paths.expand(workdir))
  names_of_first, facts_of_first = processes.from_first(
    functools.partial(_write_facts, path, config, frozen, class_names, facts)
  )
  if not (path / CONFIG_FILE).exists():
    raise config_lib.ConfigError(
      f"--workdir={workdir}: process {processes.index()} does not see the "
      f"{CONFIG_FILE} that process 0 wrote there: give a folder that all "
      "processes share"
    )
  found = differences(names_of_first, facts_of_first, class_names, facts)
  if found:
    raise config_lib.ConfigError(
      f"data: process {processes.index()} reads other data than process 0 "
      f"({'; '.join(found)}): give all processes the same"
    )
  return path


def _write_facts(
  path: epath.Path,
  config: AnyConfig,
  frozen: Mapping[str, str],
  class_names: Sequence[str],
  facts: Facts,
) -> tuple[Sequence[str], Facts]:
  text = config_lib.to_json(config)
  if any(
    entry.name[0].isdecimal() for entry in storage.entries(path / CHECKPOINTS)
  ):
    if (path / CONFIG_FILE).exists():
      try:
        _check_resumable(path, text, frozen, class_names, facts)
      except config_lib.ConfigError as error:
        # model.num_classes may be the data's, which nobody has typed.
        found = "; ".join(differences(*recorded(path), class_names, facts))
        raise config_lib.ConfigError(
          f"{error}" + f"; the data differ: {found}" * bool(found)
        ) from error
    check_data(path, class_names, facts)
    if facts and not (path / DATA_FILE).exists():
      logger.warning(
        "%s is a run that has not recorded its data: they are taken for those "
        "of this start.",
        path,
      )
    check_frozen(path, frozen)
  else:
    config_lib.check_new(config)
  path.mkdir(parents=True, exist_ok=True)
  with metrics.replacing(path / CONFIG_FILE) as file:
    file.write_text(text)
  places.write_started(path)
  if class_names:
    with metrics.replacing(path / CLASSES_FILE) as file:
      file.write_text(json.dumps(list(class_names), indent=1))
  if facts:
    with metrics.replacing(path / DATA_FILE) as file:
      file.write_text(json.dumps(facts))
  if frozen:
    with metrics.replacing(path / WEIGHTS_FILE) as file:
      file.write_text(json.dumps(frozen, indent=2))
  return class_names, facts


def _check_resumable(
  path: epath.Path,
  text: str,
  frozen: Mapping[str, str],
  class_names: Sequence[str],
  facts: Facts,
) -> None:
  """Raises ConfigError if a config is not that of the workdir's run.

  Paths are the same if they lead to the same place. Weights, and data that are
  known by checksums, may lie anywhere; a source of the same text starts at
  data.data_dir, which may change.
  """
  written, new = read_facts(path / CONFIG_FILE, dict), json.loads(text)
  old = places.of_run(written, os.fspath(path), {})
  before, after = (
    config_lib.flatten(places.absolute(values)) for values in (old, new)
  )
  sums = _frozen_before(path)
  for name, found in frozen.items():
    if sums.get(name) == found and f"{name}.path" in before:
      after[f"{name}.path"] = before[f"{name}.path"]
  source = "data.source"
  texts = [config_lib.flatten(values).get(source) for values in (written, new)]
  is_same = is_same_data(*recorded(path), class_names, facts)
  if source in before and (is_same or texts[0] == texts[1]):
    after[source] = before[source]
  config_lib.check_resumable(json.dumps(before), json.dumps(after))


def _frozen_before(path: epath.Path) -> dict[str, str]:
  """Checksums of the weights that a run began with; none if it has none."""
  file = path / WEIGHTS_FILE
  return read_facts(file, dict) if file.exists() else {}


def check_frozen(path: epath.Path, frozen: Mapping[str, str]) -> None:
  """Raises ConfigError where weights are not those that the run began with."""
  before = _frozen_before(path)
  if not before:
    return
  for name in frozen:
    if before.get(name) != frozen[name]:
      raise config_lib.ConfigError(
        f"{name}: the run in {path} began with other weights (SHA-256 "
        f"{before.get(name)}, now {frozen[name]}): give it those again or use "
        "a new workdir"
      )


def run(
  config: AnyConfig,
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
) -> TrainState:
  """Trains to config.train.num_steps, from a checkpoint if there is one.

  Args:
    config: of any task.
    path: the workdir.
    mesh: where the state lives.
    name: of the model, for the log.
    init_params: key -> parameters.
    start_params: gives those that a new run begins with instead, on the host.
    step, frozen, init_drift: see make_training.
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
      writer = metrics.create_writer(
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
  config: AnyConfig,
  mesh: Mesh,
  *,
  init_params: Callable[[jax.Array], Any],
  step: Callable[..., tuple[TrainState, loop.Metrics]],
  frozen: Any,
  init_drift: Callable[[], dict[str, Any]] = dict,
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
  """
  optimizer, schedule = make_optimizer(config.optim, config.train.num_steps)
  if isinstance(config, config_lib.ToyConfig) and config.has_particles:
    optimizer = optim.make_particle_optimizer(schedule, config.batch.generated)
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


def make_optimizer(
  config: config_lib.Optim, num_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """The optimiser and the schedule that it follows."""
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


def make_checkpointer(
  config: config_lib.Checkpoint, path: epath.Path, *, read_only: bool = False
) -> checkpoint.Checkpointer:
  """The checkpoints of a workdir; a run that is going on may be read."""
  return checkpoint.Checkpointer(
    path / CHECKPOINTS,
    keep_latest=config.keep_latest,
    keep_every=config.keep_every,
    best_metric=config.best_metric,
    on_corrupt=config.on_corrupt,
    read_only=read_only,
  )


def check_divides(name: str, size: int, mesh: Mesh) -> None:
  """Raises ConfigError where a batch axis can't be split over the mesh."""
  if size % mesh.size:
    raise config_lib.ConfigError(
      f"{name}={size} can't be split over the {mesh.size} devices of mesh "
      f"{dict(mesh.shape)}: use a multiple of {mesh.size}"
    )


def check_labels(config: config_lib.GeneratorConfig, mesh: Mesh) -> None:
  """Raises ConfigError where labels can't be split over the mesh."""
  check_divides("batch.labels", config.batch.labels, mesh)
  check_divides("train.accum_labels", config.train.accum_labels, mesh)


def pad_to_mesh(size: int, mesh: Mesh) -> int:
  """The smallest multiple of the device count that is at least `size`."""
  return -(-size // mesh.size) * mesh.size
