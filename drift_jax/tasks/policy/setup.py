"""Policies of robot control (5.3): demonstrations, networks, rollouts."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from drift_jax import config as config_lib
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
from drift_jax.training.drifting import drift_arguments
from drift_jax.training.facts import Facts

# {name: shape of a step's} observations, and of 'actions'.
Shapes = Mapping[str, Sequence[int]]


def load_demonstrations(config: PolicyConfig) -> Demonstrations:
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


def policy_task(config: PolicyConfig, shapes: Shapes) -> PolicyTask:
  """The static part of the policy's step.

  Raises:
    ConfigError: a model that can't be, for these shapes.
  """
  section, names = config.model, config.data.observations
  images = tuple(name for name in names if len(shapes[name]) == 3)
  sides = {tuple(shapes[name][:2]) for name in images}
  side = min((min(pair) for pair in sides), default=0)
  if section.crop and (len(sides) != 1 or section.crop > side):
    raise config_lib.ConfigError(
      f"model.crop={section.crop}: data.observations={names} has images of "
      f"{sorted(sides)} pixels, want one square size that it fits in"
    )
  (action_size,) = shapes["actions"]

  def arguments(*names: str) -> dict[str, Any]:
    chosen = {name: getattr(section, name) for name in names}
    return {**chosen, "dtype": jnp.dtype(section.dtype)}

  with naming("model"):
    policy = Policy(
      encoder=ObservationEncoder(
        vectors=tuple(name for name in names if name not in images),
        images=images,
        **arguments("crop", "keypoints", "image_features"),
      ),
      unet=ConditionalUnet1d(
        action_size,
        **arguments("widths", "kernel_size", "groups", "time_size"),
      ),
    )
  task = PolicyTask(
    policy=policy,
    method=config.loss.method,
    problem=config.loss.problem,
    num_generated=config.batch.generated,
    diffusion_steps=config.loss.diffusion_steps,
    action_shape=(config.data.prediction_horizon, action_size),
    crop=(side, section.crop) if section.crop else None,
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


def demonstration_facts(kind: str, demonstrations: Demonstrations) -> Facts:
  """Facts of demonstrations.

  An expert's are made anew at each start, by physics that may round otherwise
  on another machine: of them there is no checksum.

  Args:
    kind: of the source, e.g. 'zarr'.
    demonstrations: of the run.
  """
  facts = {
    "kind": kind,
    "episodes": len(demonstrations),
    "steps": len(demonstrations.actions),
    "shapes": demonstrations.shapes,
  }
  if kind != "expert":
    checksum = hashlib.sha256(demonstrations.ends.tobytes())
    for _, values in sorted(demonstrations.arrays.items()):
      checksum.update(np.ascontiguousarray(values).data)
    facts["values_sha256"] = checksum.hexdigest()
  return facts
