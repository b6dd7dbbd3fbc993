"""Evaluation of a policy: rollouts, latency, figures."""

import contextlib
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from drift_jax import config as config_lib
from drift_jax.metrics.files import report_text, write_report
from drift_jax.metrics.plots import plot_policy
from drift_jax.metrics.writers import MetricWriter, read_jsonl
from drift_jax.system import paths, processes, sharding, storage
from drift_jax.system.console import logger
from drift_jax.system.errors import naming
from drift_jax.tasks import parse_as
from drift_jax.tasks.policy import diffusion, robots
from drift_jax.tasks.policy.config import PolicyConfig
from drift_jax.tasks.policy.setup import init_policy, policy_task
from drift_jax.tasks.policy.step import PolicyTask, act_step
from drift_jax.tasks.policy.windows import Normalizer
from drift_jax.training.state import TrainState
from drift_jax.training.workdir import make_checkpointer

# File of a workdir that `load_policy` needs beside config and checkpoint.
SHAPES_FILE = "shapes.json"
# The sampler of policies that need one evaluation.
ONE_STEP = "one_step"
# Calls whose median is the latency of an action chunk, and untimed ones before.
_TIMED_CALLS, _UNTIMED_CALLS = 50, 3

Seen = Mapping[str, np.ndarray]
Act = Callable[[Any, Seen, np.ndarray, int], np.ndarray]
Check = Callable[[], None]


def policy_samplers(
  config: PolicyConfig,
) -> dict[str, diffusion.Sampler | None]:
  """The samplers of actions by name; one unless the policy diffuses.

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
  task: PolicyTask,
  normalizer: Normalizer,
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
    act. Observations are histories [n, To, ...] in the task's units; chunks
    [n, T, A] are clipped to the range of the demonstrations.
  """
  jitted = jax.jit(
    functools.partial(act_step, task=task, sampler=sampler, seed=seed)
  )

  def act(params: Any, seen: Seen, episodes: np.ndarray, call: int) -> Any:
    normal = {
      name: x if x.dtype == np.uint8 else normalizer.normalize(name, x)
      for name, x in seen.items()
    }
    chunks = jitted(params, normal, episodes.astype(np.int32), np.int32(call))
    return normalizer.unnormalize("actions", jax.device_get(chunks))

  return act


def here(params: Any, mesh: Mesh) -> Any:
  """Parameters of all devices, whole on one of this process."""
  whole = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))(params)
  return jax.tree.map(lambda x: x.addressable_data(0), whole)


@contextlib.contextmanager
def environments(config: PolicyConfig) -> Iterator[list[robots.Environment]]:
  """Opens as many of the run's environments as its evaluation needs.

  Raises:
    RobotError: one that can't be opened.
  """
  section, seen = config.eval, config.data.observations
  with contextlib.ExitStack() as stack:
    opened = []
    for _ in range(min(section.parallel, section.episodes)):
      opened.append(robots.make(config.environment, observations=seen))
      stack.callback(opened[-1].close)
    yield opened


def run_episodes(
  config: PolicyConfig,
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
  config: PolicyConfig, environment: robots.Environment, act: robots.Act
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

  config: PolicyConfig
  task: PolicyTask
  normalizer: Normalizer
  params: Any
  step: int


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
  for name in (config_lib.CONFIG_FILE, SHAPES_FILE):
    if not (path / name).exists():
      raise config_lib.ConfigError(
        f"no policy's run in {workdir}: {path / name} is missing"
      )
  values = storage.read_json(path / config_lib.CONFIG_FILE, dict)
  config = parse_as(values, PolicyConfig, workdir)
  shapes = storage.read_json(path / SHAPES_FILE, dict)
  task = policy_task(config, shapes)
  found = jax.eval_shape(init_policy(config, task, shapes), jax.random.key(0))
  abstract = sharding.abstract(found, sharding.infer_sharding(found, mesh))
  decay = str(config.eval.ema_decay)
  checkpointer = make_checkpointer(config.checkpoint, path, read_only=True)
  with contextlib.closing(checkpointer):
    average = {"ema": {decay: abstract}}
    step, restored = checkpointer.restore_subtree(average, step)
    _, feed = checkpointer.restore_feed(step)
  params = here(restored["ema"][decay], mesh)
  normalizer = Normalizer(feed["normalizer"])
  return TrainedPolicy(config, task, normalizer, params, step)


@dataclasses.dataclass
class Evaluation:
  """Rollouts by the first process; figures, curves and videos of them."""

  config: PolicyConfig
  acts: dict[str, Act]
  environments: Sequence[robots.Environment]
  mesh: Mesh
  path: epath.Path

  def _params(self, state: TrainState) -> Any:
    return here(state.ema[str(self.config.eval.ema_decay)], self.mesh)

  def __call__(
    self, step: int, state: TrainState, check: Check, writer: MetricWriter
  ) -> dict[str, float]:
    """Scalars under eval/SAMPLER/, of the first process.

    Before each call of the policy, all processes ask `check` whether to go on.
    """
    del writer  # the loop writes the scalars
    params = self._params(state)
    scalars = {}
    if not processes.is_first():
      # The first process alone knows how often.
      while processes.from_first(bool):
        check()
      return scalars
    for name, act in self.acts.items():

      def asking(*arguments: Any, act: Act = act) -> np.ndarray:
        processes.from_first(lambda: True)
        check()
        return act(params, *arguments)

      episodes = run_episodes(self.config, self.environments, asking)
      figures = robots.summarize(episodes)
      text = ", ".join(f"{key} {value:.4g}" for key, value in figures.items())
      logger.info("eval step %d, %s: %s", step, name, text)
      scalars |= {f"eval/{name}/{k}": value for k, value in figures.items()}
    processes.from_first(lambda: False)
    return scalars

  def finish(self, state: TrainState) -> None:
    """Writes figures.json and the videos of the final state."""
    params = self._params(state)
    if not processes.is_first():
      return
    config, opened = self.config, self.environments
    count = config.eval.videos
    report: dict[str, Any] = {"step": int(state.step)}
    for name, act in self.acts.items():
      bound = functools.partial(act, params)
      latency = chunk_latency(config, opened[0], bound)
      report[name] = self.means(name)
      report[name]["milliseconds_per_chunk"] = 1e3 * latency
      if count:
        episodes = run_episodes(config, opened, bound, record=count)
        file = self.path / "videos" / f"{name.replace(':', '_')}.gif"
        robots.save_video(file, episodes[:count])
    write_report(self.path / "figures.json", report)
    logger.info("Final figures: %s", report_text(report))

  def means(self, name: str) -> dict[str, Any]:
    """Means of a sampler over its last evaluations, each step's newest."""
    prefix = f"eval/{name}/"
    newest = {
      record["step"]: record
      for record in self._records()
      if f"{prefix}success_rate" in record
    }
    last = sorted(newest)[-self.config.eval.checkpoints :]
    keys = {key for step in last for key in newest[step]}
    means = {
      key.removeprefix(prefix): statistics.fmean(
        newest[step].get(key, 0.0) for step in last
      )
      for key in sorted(keys)
      if key.startswith(prefix)
    }
    return {**means, "evaluations": last}

  def _records(self) -> list[dict[str, Any]]:
    file = self.path / "metrics.jsonl"
    return list(read_jsonl(file)) if file.exists() else []

  def plot_curves(self) -> None:
    """Draws the curves of metrics.jsonl as far as it goes, if it has a loss."""
    records = self._records() if processes.is_first() else []
    if any("loss" in record for record in records):
      plot_policy(records, self.path / "plots" / "curves.png")
