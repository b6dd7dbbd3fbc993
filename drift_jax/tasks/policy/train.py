"""Policies of robot control (5.3): `train_and_evaluate(config, workdir)`."""

import contextlib
import functools
from typing import Any

import numpy as np

from drift_jax import config as config_lib
from drift_jax.system import processes
from drift_jax.system.console import logger
from drift_jax.tasks import parse
from drift_jax.tasks.policy import evaluation as evaluation_lib
from drift_jax.tasks.policy import robots
from drift_jax.tasks.policy.config import PolicyConfig
from drift_jax.tasks.policy.evaluation import (
  Evaluation,
  make_act,
  policy_samplers,
)
from drift_jax.tasks.policy.setup import (
  demonstration_facts,
  init_policy,
  load_demonstrations,
  policy_feed,
  policy_task,
  shapes_of,
  write_shapes,
)
from drift_jax.tasks.policy.step import PolicyBatch, policy_step
from drift_jax.training.alone import alone
from drift_jax.training.drifting import init_drift
from drift_jax.training.places import of_resumed
from drift_jax.training.run import (
  Recipe,
  at_end,
  check_divides,
  open_mesh,
  run,
)
from drift_jax.training.state import TrainState
from drift_jax.training.workdir import open_workdir


@alone
def train_and_evaluate(config: Any, workdir: str) -> TrainState:
  """Trains a policy on demonstrations, and rolls it out in the loop.

  Continues from the newest checkpoint in the workdir if there is one.

  Args:
    config: ConfigDict of task 'policy'.
    workdir: gets config.json, shapes.json, checkpoints/ (with the normaliser),
      metrics.jsonl, TensorBoard events, plots/curves.png and, where the policy
      is rolled out, figures.json and videos/SAMPLER.gif.

  Returns:
    The final state.

  Raises:
    ConfigError: a config that can't be run, or a workdir in use.
    DataError: demonstrations that can't be read.
    RobotError: an environment that can't be opened or drawn.
    CheckpointError: a damaged checkpoint.
    OSError: a file that can't be written.
    NonFiniteError: a loss or gradient that is not finite.
    PeerError: any of these, in the first of several processes.
    Preempted: by SIGTERM, with the step saved.
  """
  config = parse(config)
  if not isinstance(config, PolicyConfig):
    raise config_lib.ConfigError(f"task={config.task!r}, want 'policy'")
  mesh = open_mesh(config.mesh)
  check_divides("batch.size", config.batch.size, mesh)
  if config.loss.problem == "batch" and mesh.size > 1:
    raise config_lib.ConfigError(
      f"loss.problem='batch' is one problem of the whole batch, which the "
      f"{mesh.size} devices can't share: use one device"
    )
  config = of_resumed(config, workdir)
  samplers = policy_samplers(config)
  if config.eval.every:
    _check_environment(config)
  demonstrations = load_demonstrations(config)
  lengths = np.diff(demonstrations.ends, prepend=0)
  logger.info(
    "%d demonstrations, %d to %d steps",
    len(demonstrations),
    lengths.min(),
    lengths.max(),
  )
  shapes = shapes_of(demonstrations)
  task = policy_task(config, shapes)
  feed = policy_feed(config, demonstrations)
  kind = config.data.source.partition(":")[0]
  facts = demonstration_facts(kind, demonstrations)
  path = open_workdir(workdir, config, {}, (), facts)
  processes.from_first(functools.partial(write_shapes, path, shapes))
  acts = {
    name: make_act(task, feed.normalizer, sampler, seed=config.seed)
    for name, sampler in samplers.items()
  }

  recipe = Recipe(
    name=config.loss.method,
    init_params=init_policy(config, task, shapes),
    init_drift=functools.partial(init_drift, task.temperature),
    step=functools.partial(policy_step, task=task),
    batch=PolicyBatch,
    frozen={},
  )
  with contextlib.ExitStack() as stack:
    opened = []
    if config.eval.every and processes.is_first():
      opened = stack.enter_context(evaluation_lib.environments(config))
    evaluation = Evaluation(config, acts, opened, mesh, path)
    stack.enter_context(at_end(evaluation.plot_curves))
    state = run(config, path, mesh, recipe, feed=feed, evaluate=evaluation)
    if config.eval.every:
      evaluation.finish(state)
  return state


def _check_environment(config: PolicyConfig) -> None:
  """Raises RobotError before training for what would fail behind it."""
  environment = robots.make(
    config.environment, observations=config.data.observations
  )
  try:
    environment.reset(config.eval.seed)
    if config.eval.videos and processes.is_first():
      try:
        environment.render()
      except robots.RobotError as error:
        raise robots.RobotError(
          f"{error}; without pictures: eval.videos=0, it is "
          f"{config.eval.videos}"
        ) from error
  finally:
    environment.close()
