"""Policies of robot control (5.3): `train_and_evaluate(config, workdir)`."""

import contextlib
import functools
from typing import Any

import jax
import numpy as np

from drift_jax import config as config_lib
from drift_jax.metrics.files import write_report
from drift_jax.system import processes
from drift_jax.system.console import logger
from drift_jax.system.errors import naming
from drift_jax.tasks import parse_as
from drift_jax.tasks.policy import evaluation as evaluation_lib
from drift_jax.tasks.policy import robots, setup
from drift_jax.tasks.policy.config import PolicyConfig
from drift_jax.tasks.policy.step import PolicyBatch, policy_step
from drift_jax.tasks.policy.windows import PolicyFeed
from drift_jax.training.drifting import init_drift
from drift_jax.training.places import of_resumed
from drift_jax.training.run import Recipe, at_end, check_divides, open_mesh, run
from drift_jax.training.state import TrainState
from drift_jax.training.workdir import alone, open_workdir


@alone
def train_and_evaluate(config: Any, workdir: str) -> TrainState:
  """Trains a policy on demonstrations, and rolls it out in the loop.

  Continues from the newest checkpoint in the workdir if there is one.

  Args:
    config: ConfigDict of task 'policy'.
    workdir: gets config.json, shapes.json, checkpoints/ (with the normaliser),
      metrics.jsonl, TensorBoard events, plots/curves.png and, if the policy is
      rolled out, figures.json and videos/SAMPLER.gif.

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
  config = parse_as(config, PolicyConfig)
  mesh = open_mesh(config.mesh)
  check_divides("batch.size", config.batch.size, mesh)
  if config.loss.problem == "batch" and mesh.size > 1:
    raise config_lib.ConfigError(
      f"loss.problem='batch' is one problem, which {mesh.size} devices can't "
      "share: use one"
    )
  config = of_resumed(config, workdir)
  samplers = evaluation_lib.policy_samplers(config)
  if config.eval.every:
    _check_environment(config)
  # 1. Demonstrations, and the networks that fit them.
  demonstrations = setup.load_demonstrations(config)
  lengths = np.diff(demonstrations.ends, prepend=0)
  counts = len(lengths), lengths.min(), lengths.max()
  logger.info("%d demonstrations, %d to %d steps", *counts)
  shapes = demonstrations.shapes
  task = setup.policy_task(config, shapes)
  with naming("data"):
    feed = PolicyFeed(
      demonstrations,
      observation_horizon=config.data.observation_horizon,
      prediction_horizon=config.data.prediction_horizon,
      executed=config.data.executed,
      batch_size=config.batch.size,
      seed=config.seed,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
  # 2. The workdir.
  kind = config.data.source.partition(":")[0]
  facts = setup.demonstration_facts(kind, demonstrations)
  path = open_workdir(workdir, config, {}, (), facts)
  processes.from_first(
    lambda: write_report(path / evaluation_lib.SHAPES_FILE, shapes)
  )
  # 3. Training, with rollouts by the first process.
  acts = {
    name: evaluation_lib.make_act(
      task, feed.normalizer, sampler, seed=config.seed
    )
    for name, sampler in samplers.items()
  }

  recipe = Recipe(
    name=config.loss.method,
    init_params=setup.init_policy(config, task, shapes),
    init_drift=functools.partial(init_drift, task.temperature),
    step=functools.partial(policy_step, task=task),
    batch=PolicyBatch,
    frozen={},
  )
  with contextlib.ExitStack() as stack:
    opened = []
    if config.eval.every and processes.is_first():
      opened = stack.enter_context(evaluation_lib.environments(config))
    evaluation = evaluation_lib.Evaluation(config, acts, opened, mesh, path)
    stack.enter_context(at_end(evaluation.plot_curves))
    state = run(config, path, mesh, recipe, feed=feed, evaluate=evaluation)
    if config.eval.every:
      evaluation.finish(state)
  return state


def _check_environment(config: PolicyConfig) -> None:
  """Raises RobotError before training for what would fail after it."""
  environment = robots.make(
    config.environment, observations=config.data.observations
  )
  with contextlib.closing(environment):
    environment.reset(config.eval.seed)
    if config.eval.videos and processes.is_first():
      environment.render()
