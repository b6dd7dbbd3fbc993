"""Config of task 'policy', and what may go together in it."""

from drift_jax.config.checks import (
  check_at_least,
  check_choice,
  check_distinct,
  check_drift,
  check_run,
  require,
)
from drift_jax.config.sections import (
  Drift,
  Eval,
  RunConfig,
  RunData,
  Section,
  Source,
)


class PolicyData(RunData):
  """Demonstrations, and how windows are cut from them.

  `source` is 'expert' (the environment's scripted one, `episodes` of them by
  `seed`), 'zarr:DIR' or 'hdf5:FILE' (the first `episodes`, 0 for all).
  `observations` may cut columns: 'state[:2]'.
  """

  source: Source
  episodes: int
  seed: int
  observations: tuple[str, ...]
  observation_horizon: int
  prediction_horizon: int
  executed: int


class PolicyModel(Section):
  """Arguments of drift_jax.models.Policy's two networks.

  `crop` is the side that images are cut to, 0 for whole ones; `time_size` of
  the embedding that a diffusion policy has.
  """

  widths: tuple[int, ...]
  kernel_size: int
  groups: int
  time_size: int
  crop: int
  keypoints: int
  image_features: int
  dtype: str


class PolicyLoss(Section):
  """What trains the policy: 'drifting', or a baseline of the same network.

  `problem` is the drifting loss': 'step', 'chunk' or 'batch';
  `diffusion_steps` are the noise levels of 'diffusion'.
  """

  method: str
  problem: str
  diffusion_steps: int


class PolicyBatch(Section):
  """Sizes of one step: observations, and G generated (noisy) chunks of each."""

  size: int
  generated: int


class PolicyEval(Eval):
  """Rollouts in the loop, of the episodes seed, seed + 1, ...

  `samplers` are those of a diffusion policy, 'ddpm:N' or 'ddim:N'; every one
  is rolled out. figures.json has means over the last `checkpoints`
  evaluations.
  """

  episodes: int
  seed: int
  parallel: int
  threads: int
  samplers: tuple[str, ...]
  checkpoints: int
  videos: int


class PolicyConfig(RunConfig):
  """A run that trains a policy of robot control: config.task = 'policy'."""

  environment: str
  data: PolicyData
  model: PolicyModel
  loss: PolicyLoss
  drift: Drift
  batch: PolicyBatch
  eval: PolicyEval

  def check(self) -> None:
    """Raises ConfigError if values are out of range or contradict."""
    check_policy(self)


# What a policy is rolled out in; '': nothing, where no simulator is at hand.
ENVIRONMENTS = (
  "obstacle",
  "fetch_reach",
  "fetch_push",
  "fetch_pick_and_place",
  "pusht",
  "",
)


DEMONSTRATIONS = ("expert", "zarr:DIR", "hdf5:FILE")


POLICY_METHODS = ("drifting", "diffusion", "regression")


POLICY_PROBLEMS = ("step", "chunk", "batch")


def check_policy(config: PolicyConfig) -> None:
  check_run(config)
  data, evaluation = config.data, config.eval
  check_choice("environment", config.environment, ENVIRONMENTS)
  kind, _, path = data.source.partition(":")
  require(
    kind == "expert" and not path or kind in ("zarr", "hdf5") and path != "",
    f"data.source={data.source!r}: valid options are {DEMONSTRATIONS}",
  )
  check_at_least("data.episodes", data.episodes, 0)
  check_at_least("data.seed", data.seed, 0)
  if kind == "expert":
    require(
      config.environment != "" and data.episodes >= 1,
      f"data.source='expert' with environment={config.environment!r}, "
      f"data.episodes={data.episodes}: the expert is the environment's, and "
      "makes at least one episode",
    )
  require(
    len(data.observations) > 0, "data.observations=() must name at least one"
  )
  check_distinct("data.observations", data.observations)
  for name in ("observation_horizon", "prediction_horizon", "executed"):
    check_at_least(f"data.{name}", getattr(data, name), 1)
  require(
    data.observation_horizon - 1 + data.executed <= data.prediction_horizon,
    f"data.executed={data.executed}: a chunk of data.prediction_horizon="
    f"{data.prediction_horizon} actions begins with the first of "
    f"data.observation_horizon={data.observation_horizon} observations, so at "
    f"most {data.prediction_horizon - data.observation_horizon + 1} are left",
  )
  _check_policy_loss(config)
  require(
    len(config.model.widths) > 0, "model.widths=() must name at least one"
  )
  for width in config.model.widths:
    check_at_least("model.widths", width, 1)
  for name in ("kernel_size", "groups", "keypoints", "image_features"):
    check_at_least(f"model.{name}", getattr(config.model, name), 1)
  check_at_least("model.crop", config.model.crop, 0)
  require(
    evaluation.every == 0 or config.environment != "",
    f"eval.every={evaluation.every} with environment='': there is nothing to "
    "roll out in; set eval.every=0",
  )
  check_at_least("eval.seed", evaluation.seed, 0)
  for name in ("episodes", "parallel", "threads", "checkpoints"):
    check_at_least(f"eval.{name}", getattr(evaluation, name), 1)
  require(
    0 <= evaluation.videos <= evaluation.episodes,
    f"eval.videos={evaluation.videos} must lie in [0, eval.episodes = "
    f"{evaluation.episodes}]",
  )
  check_choice("checkpoint.best_metric", config.checkpoint.best_metric, ("",))


def _check_policy_loss(config: PolicyConfig) -> None:
  loss, batch, samplers = config.loss, config.batch, config.eval.samplers
  check_choice("loss.method", loss.method, POLICY_METHODS)
  check_choice("loss.problem", loss.problem, POLICY_PROBLEMS)
  check_at_least("batch.size", batch.size, 1)
  if loss.method == "drifting":
    positives = batch.size if loss.problem == "batch" else 1
    check_drift(config.drift, positives)
    require(
      batch.generated >= 2 or config.drift.negatives != "own",
      f"batch.generated={batch.generated}: a single sample of an observation "
      "has no negative but itself, which is masked, so nothing repels it and "
      "the policy becomes a regression; use at least 2 (8 as published)",
    )
  elif loss.method == "regression":
    require(
      batch.generated == 1,
      f"batch.generated={batch.generated} with loss.method='regression': want "
      "1, it has one prediction of an observation",
    )
  else:
    check_at_least("batch.generated", batch.generated, 1)
  diffuses = loss.method == "diffusion"
  for name, value in (
    ("loss.diffusion_steps", loss.diffusion_steps),
    ("model.time_size", config.model.time_size),
    ("eval.samplers", len(samplers)),
  ):
    require(
      value >= 1 if diffuses else value == 0,
      f"{name}: loss.method={loss.method!r} wants "
      + ("at least 1" if diffuses else "none; only 'diffusion' reads it")
      + f", got {value}",
    )
