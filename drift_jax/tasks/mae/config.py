"""Config of task 'mae', and what may go together in it."""

from drift_jax.config import checks, sections


class MaeModel(sections.ImageModel):
  """Arguments of drift_jax.models.build_mae."""

  in_channels: int
  base_channels: int
  layers: tuple[int, ...]
  input_patch_size: int
  mask_patch_size: int
  norm_groups: int
  remat: bool


class MaeLoss(sections.Section):
  """Masked reconstruction and the classification fine-tune (A.3)."""

  batch_size: sections.Size
  mask_ratio: float
  classification_steps: int
  classification_ramp: sections.Size
  classification_weight: sections.Fraction


NO_GENERATOR = sections.GeneratorReals(
  reals="queue", labels=0, positives=1, unconditional=0
)


class MaeConfig(sections.ImageConfig):
  """A run that trains a feature encoder: config.task = 'mae'."""

  model: MaeModel
  mae: MaeLoss
  # What the generator that will drift in its features takes of the same data:
  # earlier runs have none.
  generator: sections.GeneratorReals = NO_GENERATOR

  def check(self) -> None:
    """Raises ConfigError if values are out of range or contradict."""
    checks.check_images(self)
    mae = self.mae
    checks.require(
      0 <= mae.mask_ratio < 1,
      f"mae.mask_ratio={mae.mask_ratio} must lie in [0, 1)",
    )
    checks.require(
      mae.mask_ratio > 0 or mae.classification_steps == self.train.num_steps,
      "mae.mask_ratio=0 hides nothing, so only classification trains, for "
      f"mae.classification_steps={mae.classification_steps} of train.num_steps="
      f"{self.train.num_steps}: make them equal",
    )
    checks.require(
      0 <= mae.classification_steps <= self.train.num_steps,
      f"mae.classification_steps={mae.classification_steps} must lie in "
      f"[0, train.num_steps={self.train.num_steps}]",
    )
    checks.require(
      len(self.model.layers) == 4 and min(self.model.layers) >= 1,
      f"model.layers={self.model.layers} must hold 4 counts of at least 1",
    )
    checks.check_choice(
      "checkpoint.best_metric", self.checkpoint.best_metric, ("",)
    )
