"""The entry point: python -m drift_jax.main --config=FILE --workdir=DIR."""

import signal
import sys

from absl import app, flags
from ml_collections import config_flags

from drift_jax import config as config_lib

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
  try:
    task = config_lib.parse(_CONFIG.value).task
  except config_lib.ConfigError as error:
    sys.exit(f"Error: {error}")
  # Everything heavy is imported here, so that --help and a config that can't
  # be run cost nothing.
  from drift_jax import console, experiment

  console.setup()
  if task == "mae":
    from drift_jax import train_mae as trainer
  else:
    from drift_jax import train as trainer
  try:
    trainer.train_and_evaluate(_CONFIG.value, _WORKDIR.value)
  except experiment.ERRORS as error:
    sys.exit(f"Error: {error}")
  except KeyboardInterrupt:
    console.logger.info(
      "Interrupted: the same command goes on from the newest checkpoint."
    )
    sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
  app.run(main, flags_parser=config_lib.parse_flags)
