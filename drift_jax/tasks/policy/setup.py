"""Policies of robot control (5.3): demonstrations, networks, rollouts."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from drift_jax import config as config_lib
from drift_jax.metrics.files import replacing
from drift_jax.system import storage
from drift_jax.system.errors import naming
from drift_jax.tasks.policy import robots
from drift_jax.tasks.policy.config import PolicyConfig
from drift_jax.tasks.policy.demonstrations import Demonstrations
from drift_jax.tasks.policy.network import Policy
from drift_jax.tasks.policy.observations import ObservationEncoder
from drift_jax.tasks.policy.replay import read_replay
from drift_jax.tasks.policy.robomimic import read_robomimic
from drift_jax.tasks.policy.step import PolicyTask
from drift_jax.tasks.policy.unet1d import ConditionalUnet1d
from drift_jax.tasks.policy.windows import Normalizer, PolicyFeed
from drift_jax.training.drifting import drift_arguments
from drift_jax.training.facts import Facts

SHAPES_FILE = "shapes.json"

# {name: shape of a step's} observations, and of 'actions'.
Shapes = Mapping[str, Sequence[int]]


def load_demonstrations(
  config: PolicyConfig,
) -> Demonstrations:
  """Reads, or has the environment's expert make, what the config names.

  Raises:
    DataError: a file that is damaged, or lacks something.
    StorageError: a URL.
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
  storage.check_local(f"data.source={section.source!r}", path)
  read = read_replay if kind == "zarr" else read_robomimic
  return read(path, section.observations, max_episodes=section.episodes)


def shapes_of(demonstrations: Demonstrations) -> dict[str, list[int]]:
  """What `policy_task` is told of demonstrations."""
  arrays = {**demonstrations.observations, "actions": demonstrations.actions}
  return {name: list(values.shape[1:]) for name, values in arrays.items()}


def policy_task(config: PolicyConfig, shapes: Shapes) -> PolicyTask:
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
    policy = Policy(
      encoder=ObservationEncoder(
        vectors=vectors,
        images=images,
        crop=section.crop,
        keypoints=section.keypoints,
        image_features=section.image_features,
        dtype=jnp.dtype(section.dtype),
      ),
      unet=ConditionalUnet1d(
        action_size=action_size,
        widths=section.widths,
        kernel_size=section.kernel_size,
        groups=section.groups,
        time_size=section.time_size,
        dtype=jnp.dtype(section.dtype),
      ),
    )
  task = PolicyTask(
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
  config: PolicyConfig, task: PolicyTask, shapes: Shapes
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
  config: PolicyConfig, demonstrations: Demonstrations
) -> PolicyFeed:
  """Windows of the demonstrations, normalised, in an order of their own."""
  with naming("data"):
    return PolicyFeed(
      demonstrations,
      Normalizer.fit(demonstrations),
      observation_horizon=config.data.observation_horizon,
      prediction_horizon=config.data.prediction_horizon,
      executed=config.data.executed,
      batch_size=config.batch.size,
      seed=config.seed,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )


def write_shapes(path: epath.Path, shapes: Shapes) -> None:
  """Keeps in a workdir what `load_policy` needs beside the checkpoint."""
  with replacing(path / SHAPES_FILE) as file:
    file.write_text(json.dumps(shapes, indent=1))


def demonstration_facts(kind: str, demonstrations: Demonstrations) -> Facts:
  """Facts of demonstrations.

  An expert's are made anew at each start, by physics that may round otherwise
  on another machine: of them there is no checksum.

  Args:
    kind: of the source, e.g. 'zarr'.
    demonstrations: of the run.
  """
  arrays = {**demonstrations.observations, "actions": demonstrations.actions}
  facts = {
    "kind": kind,
    "episodes": len(demonstrations),
    "steps": len(demonstrations.actions),
    "shapes": {name: list(x.shape[1:]) for name, x in arrays.items()},
  }
  if kind != "expert":
    checksum = hashlib.sha256(demonstrations.ends.tobytes())
    for name in sorted(arrays):
      checksum.update(np.ascontiguousarray(arrays[name]).data)
    facts["values_sha256"] = checksum.hexdigest()
  return facts
