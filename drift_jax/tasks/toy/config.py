"""Config of task 'toy' and its checks."""

from drift_jax.config.checks import (
  check_at_least,
  check_choice,
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
)

# Choices of data.distribution, in the order of data.DISTRIBUTIONS.
DISTRIBUTIONS = ("bimodal", "checkerboard", "swiss_roll", "eight_gaussians")
DISTRIBUTIONS += ("moons", "spiral")
TOY_MODELS = ("mlp", "particles")


class ToyData(RunData):
  """Points of the plane: a distribution, and the noise on it.

  `noise` is the standard deviation of the Gaussian that is added.
  """

  distribution: str
  noise: float


class ToyModel(Section):
  """Model of the points: `kind` is one of TOY_MODELS.

  The others are arguments of tasks.toy.model.Mlp; particles have its location
  and spread, and batch.generated is their number.
  """

  kind: str
  noise_size: int
  width: int
  depth: int
  location: tuple[float, ...]
  spread: float


class ToyBatch(Section):
  """Sizes of one step: N_c independent problems of N samples, N_pos data."""

  labels: int
  generated: int
  positives: int


class ToyEval(Eval):
  """Evaluation against as many fresh data."""

  num_samples: int


class ToyConfig(RunConfig):
  """A run that fits points of the plane (5.1): config.task = 'toy'.

  With model.kind='particles' there is no network: a step is x <- x + eta V with
  eta = optim.learning_rate, and only the schedule of `optim` counts.
  """

  data: ToyData
  model: ToyModel
  drift: Drift
  batch: ToyBatch
  eval: ToyEval

  def check(self) -> None:
    """Raises ConfigError if values are out of range or contradict."""
    check_run(self)
    model, batch, drift = self.model, self.batch, self.drift
    check_drift(drift, batch.positives)
    check_choice("data.distribution", self.data.distribution, DISTRIBUTIONS)
    check_at_least("data.noise", self.data.noise, 0)
    check_choice("model.kind", model.kind, TOY_MODELS)
    for name in ("noise_size", "width", "depth"):
      check_at_least(f"model.{name}", getattr(model, name), 1)
    require(
      len(model.location) == 2,
      f"model.location={model.location} must be the two coordinates of a point",
    )
    require(
      model.spread > 0,
      f"model.spread={model.spread} must be positive: samples that start as "
      "one point can't be told apart",
    )
    for name in ("labels", "positives"):
      check_at_least(f"batch.{name}", getattr(batch, name), 1)
    require(
      batch.generated >= 2 or drift.negatives != "own",
      f"batch.generated={batch.generated}: a single sample has no negative but "
      "itself, which is masked, so nothing repels it; use at least 2",
    )
    if self.has_particles:
      require(
        not drift.normalize_features,
        "drift.normalize_features=True with model.kind='particles': their step "
        "is x <- x + eta V on raw distances; set it to False",
      )
      require(
        drift.negatives != "independent",
        "drift.negatives='independent' with model.kind='particles': there is "
        "no noise to draw a second batch from; use 'own' or 'own_with_self'",
      )
    require(
      self.eval.num_samples >= 2,
      f"eval.num_samples={self.eval.num_samples}: figures need at least 2",
    )
    check_choice("checkpoint.best_metric", self.checkpoint.best_metric, ("",))

  @property
  def has_particles(self) -> bool:
    """Whether there is no network."""
    return self.model.kind == "particles"

  @property
  def num_samples(self) -> int:
    """How many points are judged: all particles, or eval.num_samples."""
    if self.has_particles:
      return self.batch.generated
    return self.eval.num_samples
