"""Config of task 'toy' and its checks."""

from typing import Annotated, Literal, get_args

from drift_jax.config import checks, sections

# In the order of data.DISTRIBUTIONS.
Distribution = Literal[
  "bimodal",
  "checkerboard",
  "swiss_roll",
  "eight_gaussians",
  "moons",
  "spiral",
]
DISTRIBUTIONS = get_args(Distribution)


class ToyData(sections.RunData):
  """Points of the plane: a distribution, and the noise on it.

  `noise` is the standard deviation of the Gaussian that is added.
  """

  distribution: Distribution
  noise: Annotated[float, sections.AtLeast(0)]


class ToyModel(sections.Section):
  """Model of the points: a network, or particles without one.

  All but `kind` are arguments of tasks.toy.model.Mlp. Particles have its
  location and spread; batch.generated is their number.
  """

  kind: Literal["mlp", "particles"]
  noise_size: sections.Size
  width: sections.Size
  depth: sections.Size
  location: tuple[float, ...]
  spread: float


class ToyBatch(sections.Section):
  """Sizes of one step: N_c independent problems of N samples, N_pos data."""

  labels: sections.Size
  generated: sections.Size
  positives: sections.Size


class ToyEval(sections.Eval):
  """Evaluation against as many fresh data."""

  num_samples: Annotated[int, sections.AtLeast(2)]


class ToyConfig(sections.RunConfig):
  """A run that fits points of the plane (5.1): config.task = 'toy'.

  With model.kind='particles' there is no network: a step is x <- x + eta V with
  eta = optim.learning_rate, and only the schedule of `optim` counts.
  """

  data: ToyData
  model: ToyModel
  drift: sections.Drift
  batch: ToyBatch
  eval: ToyEval

  def check(self) -> None:
    """Raises ConfigError if values are out of range or contradict."""
    checks.check_run(self)
    model, batch, drift = self.model, self.batch, self.drift
    checks.check_drift(drift, batch.positives)
    checks.require(
      not self.optim.muon_learning_rate,
      f"optim.muon_learning_rate={self.optim.muon_learning_rate}: no toy has "
      "blocks that Muon could move; set it to 0",
    )
    checks.require(
      len(model.location) == 2,
      f"model.location={model.location} must be the two coordinates of a point",
    )
    checks.require(
      model.spread > 0,
      f"model.spread={model.spread} must be positive: samples that start as "
      "one point can't be told apart",
    )
    checks.require(
      batch.generated >= 2 or drift.negatives != "own",
      f"batch.generated={batch.generated}: a single sample has no negative but "
      "itself, which is masked, so nothing repels it; use at least 2",
    )
    if self.has_particles:
      checks.require(
        not drift.normalize_features,
        "drift.normalize_features=True with model.kind='particles': their step "
        "is x <- x + eta V on raw distances; set it to False",
      )
      checks.require(
        drift.negatives != "independent",
        "drift.negatives='independent' with model.kind='particles': there is "
        "no noise to draw a second batch from; use 'own' or 'own_with_self'",
      )
    checks.check_choice(
      "checkpoint.best_metric", self.checkpoint.best_metric, ("",)
    )

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
