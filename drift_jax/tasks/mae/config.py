"""Config of task 'mae', and what may go together in it."""

from drift_jax.config.checks import (
  check_choice,
  check_images,
  require,
)
from drift_jax.config.sections import (
  ImageConfig,
  ImageModel,
  Section,
  Size,
)


class MaeModel(ImageModel):
  """Arguments of drift_jax.models.build_mae."""

  in_channels: int
  base_channels: int
  layers: tuple[int, ...]
  input_patch_size: int
  mask_patch_size: int
  norm_groups: int
  remat: bool


class MaeLoss(Section):
  """Masked reconstruction and the classification fine-tune (A.3)."""

  batch_size: Size
  mask_ratio: float
  classification_steps: int
  classification_ramp: Size
  classification_weight: float


class MaeConfig(ImageConfig):
  """A run that trains a feature encoder: config.task = 'mae'."""

  model: MaeModel
  mae: MaeLoss

  def check(self) -> None:
    """Raises ConfigError if values are out of range or contradict."""
    check_mae(self)


def check_mae(config: MaeConfig) -> None:
  """Raises ConfigError for what a run of an encoder does not allow."""
  check_images(config)
  mae = config.mae
  require(
    0 < mae.mask_ratio < 1,
    f"mae.mask_ratio={mae.mask_ratio} must lie strictly between 0 and 1",
  )
  require(
    0 <= mae.classification_steps <= config.train.num_steps,
    f"mae.classification_steps={mae.classification_steps} must lie in "
    f"[0, train.num_steps={config.train.num_steps}]",
  )
  require(
    0 <= mae.classification_weight <= 1,
    f"mae.classification_weight={mae.classification_weight} must lie in [0, 1]",
  )
  require(
    len(config.model.layers) == 4 and min(config.model.layers) >= 1,
    f"model.layers={config.model.layers} must hold 4 counts of at least 1",
  )
  check_choice("checkpoint.best_metric", config.checkpoint.best_metric, ("",))
