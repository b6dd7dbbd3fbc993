"""Config of task 'policy', and what may go together in it."""

import operator
from typing import Literal

from drift_jax.config import checks, sections
from drift_jax.config.sections import Count, Size
from drift_jax.tasks.policy.robots.environments import ENVIRONMENTS


class PolicyData(sections.RunData):
  """Demonstrations, and how windows are cut from them.

  `source` is 'expert' (the environment's scripted one, `episodes` of them by
  `seed`), 'zarr:DIR' or 'hdf5:FILE' (the first `episodes`, 0 for all).
  `observations` may cut columns: 'state[:2]'.
  """

  source: sections.Source
  episodes: Count
  seed: Count
  observations: tuple[str, ...]
  observation_horizon: Size
  prediction_horizon: Size
  executed: Size


class PolicyModel(sections.Section):
  """Arguments of drift_jax.models.Policy's two networks.

  `crop` is the side that images are cut to, 0 for whole ones; `time_size` of
  the embedding that a diffusion policy has.
  """

  widths: tuple[Size, ...]
  kernel_size: Size
  groups: Size
  time_size: int
  crop: Count
  keypoints: Size
  image_features: Size
  dtype: str


class PolicyLoss(sections.Section):
  """Loss of the policy: 'drifting', or a baseline of the same network.

  `problem` of the drifting loss is 'step', 'chunk' or 'batch';
  `diffusion_steps` are the noise levels of 'diffusion'.
  """

  method: Literal["drifting", "diffusion", "regression"]
  problem: Literal["step", "chunk", "batch"]
  diffusion_steps: int


class PolicyBatch(sections.Section):
  """Sizes of one step: observations, and G generated (noisy) chunks of each."""

  size: Size
  generated: Size


class PolicyEval(sections.Eval):
  """Rollouts in the loop, of the episodes seed, seed + 1, ...

  A diffusion policy has `samplers`, 'ddpm:N' or 'ddim:N'; each is rolled out.
  figures.json has means over the last `checkpoints` evaluations.
  """

  episodes: Size
  seed: Count
  parallel: Size
  threads: Size
  samplers: tuple[str, ...]
  checkpoints: Size
  videos: Count


# Simulators; '': none, so that nothing is rolled out.
_ENVIRONMENTS = (*ENVIRONMENTS, "")
_SOURCES = ("expert", "zarr:DIR", "hdf5:FILE")


class PolicyConfig(sections.RunConfig):
  """A run that trains a policy of robot control: config.task = 'policy'."""

  environment: str
  data: PolicyData
  model: PolicyModel
  loss: PolicyLoss
  drift: sections.Drift
  batch: PolicyBatch
  eval: PolicyEval

  def check(self) -> None:
    """Raises ConfigError if values are out of range or contradict."""
    checks.check_run(self)
    data, evaluation = self.data, self.eval
    # 1. Choices and ranges.
    checks.check_choice("environment", self.environment, _ENVIRONMENTS)
    checks.check_choice(
      "checkpoint.best_metric", self.checkpoint.best_metric, ("",)
    )
    for name in ("data.observations", "model.widths"):
      values = operator.attrgetter(name)(self)
      checks.require(len(values) > 0, f"{name}=() must name at least one")
    checks.check_distinct("data.observations", data.observations)
    checks.require(
      evaluation.videos <= evaluation.episodes,
      f"eval.videos={evaluation.videos} must lie in [0, eval.episodes = "
      f"{evaluation.episodes}]",
    )
    # 2. Demonstrations and their windows.
    kind, _, path = data.source.partition(":")
    checks.require(
      kind == "expert" and not path or kind in ("zarr", "hdf5") and path != "",
      f"data.source={data.source!r}: valid options are {_SOURCES}",
    )
    checks.require(
      kind != "expert" or (self.environment != "" and data.episodes >= 1),
      f"data.source='expert' with environment={self.environment!r} and data."
      f"episodes={data.episodes}: it needs one, and makes at least one episode",
    )
    checks.require(
      data.observation_horizon - 1 + data.executed <= data.prediction_horizon,
      f"data.executed={data.executed}: at most data.prediction_horizon - data."
      "observation_horizon + 1 = "
      f"{data.prediction_horizon - data.observation_horizon + 1}",
    )
    # 3. What goes together.
    checks.require(
      evaluation.every == 0 or self.environment != "",
      f"eval.every={evaluation.every} with environment='': there is nothing to "
      "roll out in; set eval.every=0",
    )
    _check_method(self)


def _check_method(config: PolicyConfig) -> None:
  loss, batch, method = config.loss, config.batch, config.loss.method
  if method == "drifting":
    checks.check_drift(
      config.drift, batch.size if loss.problem == "batch" else 1
    )
    checks.require(
      batch.generated >= 2 or config.drift.negatives != "own",
      f"batch.generated={batch.generated}: a single sample of an observation "
      "has no negative but itself, which is masked, so nothing repels it and "
      "the policy becomes a regression; use at least 2 (8 as published)",
    )
  checks.require(
    batch.generated == 1 or method != "regression",
    f"batch.generated={batch.generated} with loss.method='regression': want "
    "1, it has one prediction of an observation",
  )
  for name, value in (
    ("loss.diffusion_steps", loss.diffusion_steps),
    ("model.time_size", config.model.time_size),
    ("eval.samplers", len(config.eval.samplers)),
  ):
    diffuses = method == "diffusion"
    checks.require(
      value >= 1 if diffuses else value == 0,
      f"{name}: loss.method={method!r} wants "
      + ("at least 1" if diffuses else "none; only 'diffusion' reads it")
      + f", got {value}",
    )
