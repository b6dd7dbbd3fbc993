"""The entry point: python -m drift_jax.main --config=FILE --workdir=DIR."""

import sys

from absl import app, flags
from ml_collections import config_flags

_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Folder of the run; a run found there is continued.",
  required=True,
)
_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "Config file, e.g. configs/digits.py or configs/digits.py:smoke",
)
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
  """Validates the config, then runs the task that it names."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  # Everything heavy is imported here, so that --help and a config that can't
  # be run cost nothing.
  from drift_jax import config as config_lib
  from drift_jax import console

  try:
    task = config_lib.parse(_CONFIG.value).task
    console.setup()
    if task == "mae":
      from drift_jax import train_mae as loop
    else:
      from drift_jax import train as loop
    loop.train_and_evaluate(_CONFIG.value, _WORKDIR.value)
  except config_lib.ConfigError as error:
    sys.exit(f"Config error: {error}")


if __name__ == "__main__":
  app.run(main)
