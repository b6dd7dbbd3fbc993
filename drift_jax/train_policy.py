"""Policies of robot control (5.3): `train_and_evaluate(config, workdir)`."""

import contextlib
import functools
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from drift_jax import config as config_lib
from drift_jax import (
  experiment,
  metrics,
  processes,
  robots,
  sharding,
  steps,
)
from drift_jax.console import logger
from drift_jax.state import TrainState


@experiment.alone
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
    Preempted: by SIGTERM, behind a step that has been saved.
  """
  config = config_lib.parse(config)
  if not isinstance(config, config_lib.PolicyConfig):
    raise config_lib.ConfigError(f"task={config.task!r}, want 'policy'")
  mesh = experiment.open_mesh(config.mesh)
  experiment.check_divides("batch.size", config.batch.size, mesh)
  if config.loss.problem == "batch" and mesh.size > 1:
    raise config_lib.ConfigError(
      f"loss.problem='batch' is one problem of the whole batch, which the "
      f"{mesh.size} devices can't share: use one device"
    )
  samplers = experiment.policy_samplers(config)
  if config.eval.every:
    _check_environment(config)
  demonstrations = experiment.load_demonstrations(config)
  lengths = np.diff(demonstrations.ends, prepend=0)
  logger.info(
    "%d demonstrations, %d to %d steps",
    len(demonstrations),
    lengths.min(),
    lengths.max(),
  )
  shapes = experiment.shapes_of(demonstrations)
  task = experiment.policy_task(config, shapes)
  feed = experiment.policy_feed(config, demonstrations)
  kind = config.data.source.partition(":")[0]
  facts = experiment.demonstration_facts(kind, demonstrations)
  path = experiment.open_workdir(workdir, config, {}, (), facts)
  processes.from_first(functools.partial(experiment.write_shapes, path, shapes))
  acts = {
    name: experiment.make_act(task, feed.normalizer, sampler, seed=config.seed)
    for name, sampler in samplers.items()
  }

  def put(batch: Any) -> steps.PolicyBatch:
    return steps.PolicyBatch(**sharding.put_batch(batch, mesh))

  with contextlib.ExitStack() as stack:
    opened = []
    if config.eval.every and processes.is_first():
      opened = stack.enter_context(experiment.environments(config))
    evaluation = Evaluation(config, acts, opened, mesh, path)
    stack.enter_context(experiment.at_end(evaluation.plot_curves))
    state = experiment.run(
      config,
      path,
      mesh,
      name=config.loss.method,
      init_params=experiment.init_policy(config, task, shapes),
      init_drift=functools.partial(experiment.init_drift, task),
      start_params=None,
      step=functools.partial(steps.policy_step, task=task),
      frozen={},
      feed=feed,
      put=put,
      evaluate=evaluation,
      best_metric=lambda scalars: None,
    )
    if config.eval.every:
      evaluation.finish(state)
  return state


def _check_environment(config: config_lib.PolicyConfig) -> None:
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


class Evaluation:
  """Rollouts by the first process; figures, curves and videos of them."""

  def __init__(
    self,
    config: config_lib.PolicyConfig,
    acts: dict[str, experiment.Act],
    environments: Sequence[robots.Environment],
    mesh: jax.sharding.Mesh,
    path: epath.Path,
  ):
    self._config = config
    self._acts = acts
    self._environments = environments
    self._mesh = mesh
    self._path = path

  def _params(self, state: TrainState) -> Any:
    average = state.ema[str(self._config.eval.ema_decay)]
    return experiment.here(average, self._mesh)

  def __call__(
    self, step: int, state: TrainState, writer: metrics.MetricWriter
  ) -> dict[str, float]:
    """Scalars under eval/SAMPLER/, of the first process."""
    del writer  # the loop writes the scalars
    params = self._params(state)
    if not processes.is_first():
      return {}
    scalars = {}
    for name, act in self._acts.items():
      episodes = experiment.run_episodes(
        self._config, self._environments, functools.partial(act, params)
      )
      figures = robots.summarize(episodes)
      logger.info(
        "eval step %d, %s: %s",
        step,
        name,
        ", ".join(f"{key} {value:.4g}" for key, value in figures.items()),
      )
      scalars |= {f"eval/{name}/{k}": value for k, value in figures.items()}
    return scalars

  def finish(self, state: TrainState) -> None:
    """Writes figures.json and the videos of the final state."""
    params = self._params(state)
    if not processes.is_first():
      return
    step = int(state.step)
    report: dict[str, Any] = {"step": step}
    for name, act in self._acts.items():
      report[name] = self.means(name)
      bound = functools.partial(act, params)
      latency = experiment.chunk_latency(
        self._config, self._environments[0], bound
      )
      report[name]["milliseconds_per_chunk"] = 1e3 * latency
      if self._config.eval.videos:
        self._film(name, bound)
    metrics.write_report(self._path / "figures.json", report)
    logger.info("Final figures: %s", metrics.report_text(report))

  def means(self, name: str) -> dict[str, Any]:
    """Of the last evaluations, each step's newest."""
    prefix = f"eval/{name}/"
    by_step = {
      record["step"]: {
        key.removeprefix(prefix): value
        for key, value in record.items()
        if key.startswith(prefix)
      }
      for record in self._records()
      if f"{prefix}success_rate" in record
    }
    last = sorted(by_step)[-self._config.eval.checkpoints :]
    keys = {key for step in last for key in by_step[step]}
    means = {
      key: statistics.fmean(by_step[step].get(key, 0.0) for step in last)
      for key in sorted(keys)
    }
    return {**means, "evaluations": last}

  def _film(self, name: str, act: Any) -> None:
    count = self._config.eval.videos
    episodes = experiment.run_episodes(
      self._config, self._environments, act, record=count
    )
    file = self._path / "videos" / f"{name.replace(':', '_')}.gif"
    with metrics.replacing(file) as temporary:
      robots.save_video(temporary, episodes[:count], ending=file.suffix)

  def _records(self) -> list[dict[str, Any]]:
    file = self._path / "metrics.jsonl"
    return list(metrics.read_jsonl(file)) if file.exists() else []

  def plot_curves(self) -> None:
    """Draws the curves from what metrics.jsonl holds so far, if anything."""
    records = self._records() if processes.is_first() else []
    if any("loss" in record for record in records):
      metrics.plot_policy(records, self._path / "plots" / "curves.png")
