"""The four tasks, each in a folder of its own, and which one a config is of.

  generator  one-step image generation by drifting (the paper's main task)
  mae        pretraining of the feature encoder (A.3)
  toy        points of the plane (5.1)
  policy     robot control (5.3)

Each has `config` (its section classes and what may go together), `step` (pure),
`setup` (from a config to objects), `evaluation` and `train`.
"""

import importlib
from typing import TYPE_CHECKING, Any, TypeVar

import ml_collections

from drift_jax.config.parsing import build
from drift_jax.config.sections import RunConfig
from drift_jax.system.errors import ConfigError

if TYPE_CHECKING:
  from jax.sharding import Mesh

  from drift_jax.training.programs import Program

_Config = TypeVar("_Config", bound=RunConfig)
# Tasks whose programs compile_check compiles.
_COMPILED = ("generator", "mae")
# The class of each task's config, in its module `config`.
TASKS = {
  "generator": "GeneratorConfig",
  "mae": "MaeConfig",
  "policy": "PolicyConfig",
  "toy": "ToyConfig",
}


def parse(config: Any) -> RunConfig:
  """The typed, checked form of a ConfigDict, of a plain dict or of itself.

  Raises:
    ConfigError: naming the key, the value and what would be valid.
  """
  if isinstance(config, RunConfig):
    return config
  values = config
  if isinstance(config, ml_collections.ConfigDict):
    values = config.to_dict()
  task = values.get("task")
  if not isinstance(task, str) or task not in TASKS:
    raise ConfigError(f"task={task!r}: valid options are {sorted(TASKS)}")
  parsed = build(config_class(task), values)
  parsed.check()
  return parsed


def parse_as(config: Any, cls: type[_Config], where: str = "") -> _Config:
  """`parse` of a config that must be one task's.

  Args:
    config: see parse.
    cls: the task's class.
    where: workdir that it was read from, for the message.

  Raises:
    ConfigError: as `parse`, or a config of another task.
  """
  parsed = parse(config)
  if not isinstance(parsed, cls):
    (want,) = (task for task, name in TASKS.items() if name == cls.__name__)
    what = f"{where} holds a run of task {parsed.task!r}"
    if not where:
      what = f"task={parsed.task!r}"
    raise ConfigError(f"{what}, want {want!r}")
  return parsed


def config_class(task: str) -> type[RunConfig]:
  """The class of a task's config."""
  module = importlib.import_module(f"drift_jax.tasks.{task}.config")
  return getattr(module, TASKS[task])


def trainer(task: str) -> Any:
  """The module with the task's `train_and_evaluate(config, workdir)`."""
  return importlib.import_module(f"drift_jax.tasks.{task}.train")


def programs(config: RunConfig, mesh: "Mesh") -> "list[Program]":
  """Training step, sampler and evaluation steps of a run on a mesh.

  Raises:
    ArtifactError: a network that nothing describes.
    ConfigError: a task without them, or sizes that the mesh or the networks
      don't allow.
  """
  if config.task not in _COMPILED:
    raise ConfigError(
      f"task={config.task!r} needs no check beforehand: it fits any device; "
      f"valid options here are {list(_COMPILED)}"
    )
  module = importlib.import_module(f"drift_jax.tasks.{config.task}.programs")
  return module.programs(config, mesh)
