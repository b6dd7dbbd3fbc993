"""The typed form of a config, and its checks with messages that teach.

configs/*.py hold the values (every default included). `sections` holds the
section classes that tasks share and `checks` what may go together in them; each
task adds its own in tasks/TASK/config.py. `tasks.parse` turns a ConfigDict into
these before anything is compiled: an unknown key, a missing key, a wrong type
or contradicting values raise ConfigError with the key, the value and what would
be valid.
"""

# ruff: noqa: F401, the names that this folder offers

from drift_jax.config.checks import check_new
from drift_jax.config.command_line import (
  GENERATORS,
  config_arguments,
  default_workdir,
  define_generator_flags,
  define_process_flags,
  define_source_flag,
  find_config,
  load_config,
  parse_flags,
  process_flags,
  run_config,
  source,
)
from drift_jax.config.parsing import check_override
from drift_jax.config.resume import (
  CONFIG_FILE,
  RESUMABLE,
  RESUMABLE_ENDS,
  check_resumable,
  completed,
  flatten,
  is_run,
  to_json,
)
from drift_jax.config.sections import (
  LEAST_TEMPERATURE_SCALE,
  Checkpoint,
  Data,
  Drift,
  Encoder,
  Frozen,
  Mesh,
  Optim,
  Section,
  Vae,
)
from drift_jax.system.errors import ConfigError
