"""Temperatures, metrics and update of all steps with a drifting loss."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from drift_jax import config as config_lib
from drift_jax.drift.family import check_field
from drift_jax.drift.many import DriftReport
from drift_jax.drift.variant import Variant
from drift_jax.system.errors import naming
from drift_jax.training import state as state_lib
from drift_jax.training.step import Metrics, update

# A learned scale of the temperatures stays within a factor of 100.
LOG_SCALES = (-4.6, 4.6)


class Temperature(NamedTuple):
  """A scale of all temperatures that changes in time.

  Attributes:
    kind: 'annealed', max(exp(-rate * step), least), or 'learned', from the
      likelihood of each problem's positives (see drift.DriftInfo), by Adam.
    rate: of annealing, per step, or of learning.
    least: where annealing ends, > 0: exp underflows, and a field of
      temperature 0 is no number.
  """

  kind: Literal["annealed", "learned"]
  rate: float
  least: float

  @property
  def optimizer(self) -> optax.GradientTransformation:
    """Optimiser of the learned scale's logarithm."""
    return optax.adam(self.rate)

  def init(self) -> dict[str, Any]:
    """Returns TrainState.drift at the start."""
    if self.kind == "annealed":
      return {}
    log_scale = jnp.zeros((), jnp.float32)
    return {"log_scale": log_scale, "opt": self.optimizer.init(log_scale)}

  def scale(self, state: state_lib.TrainState) -> Float[Array, ""]:
    """Returns the scale of the next step."""
    if self.kind == "annealed":
      scale = jnp.exp(-self.rate * state.step.astype(jnp.float32))
      return jnp.maximum(scale, self.least)
    return jnp.exp(state.drift["log_scale"])

  def update(self, held: dict[str, Any], report: DriftReport) -> dict[str, Any]:
    """Returns TrainState.drift after a step."""
    if self.kind == "annealed":
      return held
    gradients = report.info["extra"]["temperature_gradient"].values()
    gradient = jnp.mean(jnp.stack(list(gradients)))
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
      change, opt = self.optimizer.update(gradient, held["opt"])
    log_scale = jnp.clip(held["log_scale"] + change, *LOG_SCALES)
    return {"log_scale": log_scale, "opt": opt}


def drift_metrics(report: DriftReport) -> Metrics:
  """Returns the metrics of the field: raw drift RMS, scale, neighbours.

  With normalised drifts the loss is a key's agreement of temperatures, 0 to
  their number squared, and says nothing of how far the samples are. Raw drift
  ends at what reals in their place have: docs/troubleshooting.md.
  Overall and per group of keys (a group is a key's part before the first
  '_': conv1, layer1, ..., global): 'drift_rms/<tau>[/<group>]' is the root
  of the mean over keys of the raw drift's mean square, in units where the
  mean distance is sqrt(C); 'scale/<group>' the mean distance S itself;
  'neighbours/<tau>' the effective number of positives that a sample feels;
  'floor_fraction/<tau>' the share of affinities at the floor; and what else
  the drift's variant reports, means over keys.
  """
  groups: dict[str, list[int]] = {}
  for i, key in enumerate(report.keys):
    groups.setdefault(key.split("_")[0], []).append(i)
  info = report.info

  def means(name: str, values: jax.Array) -> Metrics:
    return {
      f"{name}/{group}": jnp.mean(values[jnp.asarray(members)])
      for group, members in groups.items()
    }

  out = means("scale", info["scale"])
  for tau, mean_squares in info["drift_ms"].items():
    rms = {f"drift_rms/{tau}": jnp.mean(mean_squares)}
    rms |= means(f"drift_rms/{tau}", mean_squares)
    out |= {name: jnp.sqrt(value) for name, value in rms.items()}
    out[f"neighbours/{tau}"] = jnp.mean(info["effective_positives"][tau])
  others = {"floor_fraction": info["floor_fraction"], **info["extra"]}
  for name, values in others.items():
    for tau, value in values.items():
      out[f"{name}/{tau}"] = jnp.mean(value)
  return out


def drift_update(
  state: state_lib.TrainState,
  loss: Float[Array, ""],
  report: DriftReport,
  grads: Any,
  *,
  temperature: Temperature | None,
  scale: Float[Array, ""] | None,
  optimizer: optax.GradientTransformation,
  schedule: optax.Schedule,
) -> tuple[state_lib.TrainState, Metrics]:
  """Returns the state after a step, and the step's metrics.

  Metrics: 'loss', update's, drift_metrics', and 'temperature_scale' if there is
  one.

  Args:
    state: state before the step.
    loss, report, grads: results of the step.
    temperature: schedule of the temperatures, or None.
    scale: its scale in the step.
    optimizer: updates the parameters.
    schedule: learning rate by step.
  """
  state, metrics = update(state, grads, optimizer, schedule)
  metrics |= {"loss": loss, **drift_metrics(report)}
  if temperature is not None and scale is not None:
    metrics["temperature_scale"] = scale
    held = temperature.update(state.drift, report)
    state = dataclasses.replace(state, drift=held)
  return state, metrics


# The section's keys that drift.drift_losses and drift.Variant take as they are.
_OF_LOSSES = (
  "temperatures",
  "affinity_floor",
  "normalization",
  "attraction",
  "repulsion",
)


_OF_VARIANT = (
  "field",
  "negatives",
  "guidance",
  "own_in_scale",
  "normalize_features",
  "normalize_drift",
  "diagnostics",
)


def drift_arguments(config: config_lib.Drift) -> dict[str, Any]:
  """Returns the fields of a task that describe its drifting field.

  Raises:
    ConfigError: an unknown field or option, or what does not go together.
  """
  kind, rate = config.temperature_scale.kind, config.temperature_scale.rate
  with naming("drift"):
    for name, options in config.options.items():
      with naming(f"drift.options.{name}"):
        check_field(name, options)
    if config.field != "softmax" and config.normalization != "xy":
      raise ValueError(
        f"normalization={config.normalization!r} is of the field 'softmax', "
        f"but field={config.field!r}: leave it at 'xy'"
      )
    variant = Variant(
      **{name: getattr(config, name) for name in _OF_VARIANT},
      options=dict(config.options.get(config.field, {})),
      neighbours=config.temperature_scale.neighbours,
      learned=kind == "learned",
    )
  temperature = None
  if kind in ("annealed", "learned"):
    temperature = Temperature(kind, rate, config_lib.LEAST_TEMPERATURE_SCALE)
  return {
    "drift": {name: getattr(config, name) for name in _OF_LOSSES},
    "variant": variant,
    "average": config.reduction == "mean",
    "temperature": temperature,
  }


def init_drift(temperature: Temperature | None) -> dict[str, Any]:
  """Returns TrainState.drift at the start: what the field learns."""
  return {} if temperature is None else temperature.init()
