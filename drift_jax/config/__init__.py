"""The typed form of a config, and its validation with messages that teach.

configs/*.py hold the values (every default included); the dataclasses of
`schema` hold names, types and what may go together. `parse` turns a ConfigDict
into them before anything is compiled: an unknown key, a missing key, a wrong
type or contradicting values raise ConfigError with the key, the value and what
would be valid.
"""

from drift_jax.config.checks import check, check_judges, check_new
from drift_jax.config.command_line import (
  config_arguments,
  define_process_flags,
  define_source_flags,
  load_config,
  parse_flags,
  process_flags,
  source,
)
from drift_jax.config.parsing import check_override, parse, unknown_key
from drift_jax.config.resume import (
  RESUMABLE,
  RESUMABLE_ENDS,
  check_resumable,
  flat_values,
  flatten,
  to_json,
)
from drift_jax.config.schema import (
  EVAL_METRICS,
  JUDGED_METRICS,
  LEAST_TEMPERATURE_SCALE,
  TASKS,
  AnyConfig,
  Checkpoint,
  ConfigError,
  Data,
  Drift,
  Encoder,
  GeneratorConfig,
  GeneratorEval,
  GeneratorModel,
  Guidance,
  Judge,
  MaeConfig,
  MaeModel,
  Mesh,
  Optim,
  PolicyConfig,
  Section,
  ToyConfig,
  Vae,
)

__all__ = [
  "EVAL_METRICS",
  "JUDGED_METRICS",
  "LEAST_TEMPERATURE_SCALE",
  "RESUMABLE",
  "RESUMABLE_ENDS",
  "TASKS",
  "AnyConfig",
  "Checkpoint",
  "ConfigError",
  "Data",
  "Drift",
  "Encoder",
  "GeneratorConfig",
  "GeneratorEval",
  "GeneratorModel",
  "Guidance",
  "Judge",
  "MaeConfig",
  "MaeModel",
  "Mesh",
  "Optim",
  "PolicyConfig",
  "Section",
  "ToyConfig",
  "Vae",
  "check",
  "check_judges",
  "check_new",
  "check_override",
  "check_resumable",
  "config_arguments",
  "define_process_flags",
  "define_source_flags",
  "flat_values",
  "flatten",
  "load_config",
  "parse",
  "parse_flags",
  "process_flags",
  "source",
  "to_json",
  "unknown_key",
]
