"""Policies of robot control (5.3): demonstrations, networks, rollouts."""

import contextlib
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from drift_jax import config as config_lib
from drift_jax import (
  data,
  diffusion,
  metrics,
  models,
  paths,
  robots,
  sharding,
  steps,
)
from drift_jax.experiment.networks import drift_arguments
from drift_jax.experiment.runs import CONFIG_FILE, make_checkpointer, naming

SHAPES_FILE = "shapes.json"
# The sampler of policies that need one evaluation.
ONE_STEP = "one_step"
# Calls whose median is the latency of an action chunk, and those before them.
_TIMED_CALLS, _UNTIMED_CALLS = 50, 3

# {name: shape of a step's} observations, and of 'actions'.
Shapes = Mapping[str, Sequence[int]]
Act = Callable[[Any, Mapping[str, np.ndarray], np.ndarray, int], np.ndarray]


def load_demonstrations(
  config: config_lib.PolicyConfig,
) -> data.Demonstrations:
  """Reads, or has the environment's expert make, what the config names.

  Raises:
    DataError: a file that is damaged, or lacks something.
    RobotError: an environment that is not installed, or whose expert fails.
  """
  section = config.data
  kind, _, path = section.source.partition(":")
  if kind == "expert":
    demonstrations, _ = robots.collect(
      config.environment,
      episodes=section.episodes,
      seed=section.seed,
      observations=section.observations,
    )
    return demonstrations
  read = data.read_replay if kind == "zarr" else data.read_robomimic
  return read(path, section.observations, max_episodes=section.episodes)


def shapes_of(demonstrations: data.Demonstrations) -> dict[str, list[int]]:
  """What `policy_task` is told of demonstrations."""
  arrays = {**demonstrations.observations, "actions": demonstrations.actions}
  return {name: list(values.shape[1:]) for name, values in arrays.items()}


def policy_task(
  config: config_lib.PolicyConfig, shapes: Shapes
) -> steps.PolicyTask:
  """The static part of the policy's step.

  Raises:
    ConfigError: a model that can't be, for these shapes.
  """
  section, names = config.model, config.data.observations
  images = tuple(name for name in names if len(shapes[name]) == 3)
  vectors = tuple(name for name in names if name not in images)
  if section.crop and not images:
    raise config_lib.ConfigError(
      f"model.crop={section.crop}, but data.observations={names} has no images"
    )
  sides = {tuple(shapes[name][:2]) for name in images}
  crop = None
  if section.crop:
    side = min(min(pair) for pair in sides)
    if len(sides) > 1 or section.crop > side:
      raise config_lib.ConfigError(
        f"model.crop={section.crop}: images of {sorted(sides)} pixels; want "
        "square ones of one size, and a crop that fits"
      )
    crop = (side, section.crop)
  (action_size,) = shapes["actions"]
  with naming("model"):
    policy = models.Policy(
      encoder=models.ObservationEncoder(
        vectors=vectors,
        images=images,
        crop=section.crop,
        keypoints=section.keypoints,
        image_features=section.image_features,
        dtype=jnp.dtype(section.dtype),
      ),
      unet=models.ConditionalUnet1d(
        action_size=action_size,
        widths=section.widths,
        kernel_size=section.kernel_size,
        groups=section.groups,
        time_size=section.time_size,
        dtype=jnp.dtype(section.dtype),
      ),
    )
  task = steps.PolicyTask(
    policy=policy,
    method=config.loss.method,  # pyright: ignore[reportArgumentType]
    problem=config.loss.problem,  # pyright: ignore[reportArgumentType]
    num_generated=config.batch.generated,
    diffusion_steps=config.loss.diffusion_steps,
    action_shape=(config.data.prediction_horizon, action_size),
    crop=crop,
    **drift_arguments(config.drift),
  )
  with naming("model"):
    jax.eval_shape(init_policy(config, task, shapes), jax.random.key(0))
  return task


def init_policy(
  config: config_lib.PolicyConfig, task: steps.PolicyTask, shapes: Shapes
) -> Callable[[jax.Array], Any]:
  """key -> initial parameters."""
  horizon = config.data.observation_horizon
  observations = {
    name: jnp.zeros(
      (1, horizon, *shapes[name]),
      jnp.uint8 if len(shapes[name]) == 3 else jnp.float32,
    )
    for name in config.data.observations
  }
  time = jnp.zeros(1, jnp.int32) if config.model.time_size else None

  def init(key: jax.Array) -> Any:
    noise = jnp.zeros((1, *task.action_shape))
    return task.policy.init(key, observations, noise, time=time)["params"]

  return init


def policy_feed(
  config: config_lib.PolicyConfig, demonstrations: data.Demonstrations
) -> data.PolicyFeed:
  """Windows of the demonstrations, normalised, in an order of their own."""
  with naming("data"):
    return data.PolicyFeed(
      demonstrations,
      data.Normalizer.fit(demonstrations),
      observation_horizon=config.data.observation_horizon,
      prediction_horizon=config.data.prediction_horizon,
      executed=config.data.executed,
      batch_size=config.batch.size,
      seed=config.seed,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )


def policy_samplers(
  config: config_lib.PolicyConfig,
) -> dict[str, diffusion.Sampler | None]:
  """How actions are made, by name; one way unless the policy diffuses.

  Raises:
    ConfigError: an unknown sampler.
  """
  if config.loss.method != "diffusion":
    return {ONE_STEP: None}
  with naming("eval.samplers"):
    return {
      text: diffusion.parse_sampler(text, config.loss.diffusion_steps)
      for text in config.eval.samplers
    }


def make_act(
  task: steps.PolicyTask,
  normalizer: data.Normalizer,
  sampler: diffusion.Sampler | None,
  *,
  seed: int,
) -> Act:
  """(params, observations, episodes, call) -> actions in the task's units.

  Args:
    task: of the run.
    normalizer: of its demonstrations.
    sampler: of a diffusion policy.
    seed: of the noise.

  Returns:
    act. Observations are histories [n, To, ...] in the task's units; of chunks
    [n, T, A], those within the demonstrations' range: what is beyond is cut.
  """
  jitted = jax.jit(
    functools.partial(steps.act_step, task=task, sampler=sampler, seed=seed)
  )

  def act(
    params: Any,
    observations: Mapping[str, np.ndarray],
    episodes: np.ndarray,
    call: int,
  ) -> np.ndarray:
    normalized = {
      name: normalizer.normalize(name, values)
      if values.dtype != np.uint8
      else values
      for name, values in observations.items()
    }
    chunks = jitted(
      params, normalized, episodes.astype(np.int32), np.int32(call)
    )
    return normalizer.unnormalize("actions", jax.device_get(chunks))

  return act


def here(params: Any, mesh: Mesh) -> Any:
  """Parameters of all devices, whole on one of this process."""
  whole = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))(params)
  return jax.tree.map(lambda x: x.addressable_data(0), whole)


@contextlib.contextmanager
def environments(
  config: config_lib.PolicyConfig,
) -> Iterator[list[robots.Environment]]:
  """Opens as many of the run's environments as its evaluation needs.

  Raises:
    RobotError: one that can't be opened.
  """
  section = config.eval
  with contextlib.ExitStack() as stack:
    opened = []
    for _ in range(min(section.parallel, section.episodes)):
      opened.append(
        robots.make(config.environment, observations=config.data.observations)
      )
      stack.callback(opened[-1].close)
    yield opened


def run_episodes(
  config: config_lib.PolicyConfig,
  opened: Sequence[robots.Environment],
  act: robots.Act,
  *,
  record: int = 0,
) -> list[robots.Episode]:
  """The evaluation's episodes: seeds eval.seed, eval.seed + 1, ...

  Args:
    config: of the run.
    opened: its environments.
    act: of `make_act`, with its parameters bound.
    record: of how many episodes frames are kept.
  """
  section = config.eval
  return robots.rollouts(
    opened,
    act,
    seeds=range(section.seed, section.seed + section.episodes),
    observation_horizon=config.data.observation_horizon,
    executed=config.data.executed,
    threads=section.threads,
    record=record,
  )


def chunk_latency(
  config: config_lib.PolicyConfig,
  environment: robots.Environment,
  act: robots.Act,
) -> float:
  """Median seconds from one observation history to its action chunk."""
  seen = environment.reset(config.eval.seed)
  horizon = config.data.observation_horizon
  history = {
    name: np.stack([values] * horizon)[None] for name, values in seen.items()
  }
  seconds = []
  for call in range(_UNTIMED_CALLS + _TIMED_CALLS):
    start = time.perf_counter()
    act(history, np.zeros(1, np.int64), call)
    seconds.append(time.perf_counter() - start)
  return statistics.median(seconds[_UNTIMED_CALLS:])


class TrainedPolicy(NamedTuple):
  """A policy of a run.

  Attributes:
    config, task, normalizer: of the run.
    params: one average of its parameters, on one device.
    step: of the checkpoint.
  """

  config: config_lib.PolicyConfig
  task: steps.PolicyTask
  normalizer: data.Normalizer
  params: Any
  step: int


def write_shapes(path: epath.Path, shapes: Shapes) -> None:
  """Keeps in a workdir what `load_policy` needs beside the checkpoint."""
  with metrics.replacing(path / SHAPES_FILE) as file:
    file.write_text(json.dumps(shapes, indent=1))


def load_policy(
  workdir: str, mesh: Mesh, *, step: int | None = None
) -> TrainedPolicy:
  """Restores a policy that a run keeps, with its normaliser; reads no data.

  Args:
    workdir: of the run.
    mesh: whose first device it goes to.
    step: of the checkpoint; None: the newest.

  Raises:
    ConfigError: no policy's run there.
    CheckpointError: no such checkpoint, or a damaged one.
  """
  workdir = paths.expand(workdir)
  path = epath.Path(workdir)
  for name in (CONFIG_FILE, SHAPES_FILE):
    if not (path / name).exists():
      raise config_lib.ConfigError(
        f"no policy's run in {workdir}: {path / name} is missing"
      )
  config = config_lib.parse(json.loads((path / CONFIG_FILE).read_text()))
  if not isinstance(config, config_lib.PolicyConfig):
    raise config_lib.ConfigError(
      f"{workdir} holds a run of task {config.task!r}, want 'policy'"
    )
  shapes = json.loads((path / SHAPES_FILE).read_text())
  task = policy_task(config, shapes)
  found = jax.eval_shape(init_policy(config, task, shapes), jax.random.key(0))
  abstract = sharding.abstract(found, sharding.infer_sharding(found, mesh))
  decay = str(config.eval.ema_decay)
  checkpointer = make_checkpointer(config.checkpoint, path, read_only=True)
  try:
    step, restored = checkpointer.restore_subtree(
      {"ema": {decay: abstract}}, step
    )
    _, feed = checkpointer.restore_feed(step)
  finally:
    checkpointer.close()
  return TrainedPolicy(
    config,
    task,
    data.Normalizer.from_tree(feed["normalizer"]),
    here(restored["ema"][decay], mesh),
    step,
  )
