"""Training and sampling steps: pure functions, no I/O, testable alone.

With a layout a step runs on a mesh: each device takes its part of the batch
through whole parameters. Every random number is drawn for the whole batch
beforehand, so that a step is the same on any mesh, up to rounding.
"""

from drift_jax.steps.common import Metrics, apply, from_wire
from drift_jax.steps.drifting import Temperature, drift_metrics
from drift_jax.steps.generator import (
  VAE_KEY,
  Draws,
  FeatureSpace,
  GeneratorBatch,
  GeneratorTask,
  by_label,
  draw,
  generate,
  generator_gradients,
  generator_loss,
  sample_inputs,
  sample_step,
  train_step,
)
from drift_jax.steps.mae import (
  MaeBatch,
  MaeTask,
  classification_lambda,
  mae_eval_step,
  mae_inputs,
  mae_step,
)
from drift_jax.steps.policy import (
  PolicyBatch,
  PolicyDraws,
  PolicyTask,
  act_step,
  draw_policy,
  policy_gradients,
  policy_loss,
  policy_step,
)

__all__ = [
  "VAE_KEY",
  "Draws",
  "FeatureSpace",
  "GeneratorBatch",
  "GeneratorTask",
  "MaeBatch",
  "MaeTask",
  "Metrics",
  "PolicyBatch",
  "PolicyDraws",
  "PolicyTask",
  "Temperature",
  "act_step",
  "apply",
  "by_label",
  "classification_lambda",
  "draw",
  "draw_policy",
  "drift_metrics",
  "from_wire",
  "generate",
  "generator_gradients",
  "generator_loss",
  "mae_eval_step",
  "mae_inputs",
  "mae_step",
  "policy_gradients",
  "policy_loss",
  "policy_step",
  "sample_inputs",
  "sample_step",
  "train_step",
]
