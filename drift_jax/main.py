"""The entry point: python -m drift_jax.main --config=FILE --workdir=DIR."""

import pathlib
import re
import runpy
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from drift_jax import config as config_lib
from drift_jax import storage

_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Folder of the run, local or gs://BUCKET/PATH; a run found there is "
  "continued.",
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
    storage.check(_WORKDIR.value, write=True)
  except (config_lib.ConfigError, storage.StorageError) as error:
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


def parse_flags(argv: Sequence[str]) -> list[str]:
  """Parses the command line; a mistake in it ends the process with one line."""
  try:
    path, overrides = config_arguments(
      flags.FLAGS.read_flags_from_files(list(argv), force_gnu=False)
    )
    if path is None:
      return flags.FLAGS(argv)
    config = load_config(path)
    for key, value in overrides.items():
      config_lib.check_override(config, key, value)
    try:
      return flags.FLAGS(argv)
    except flags.IllegalFlagValueError as error:
      message = _explain(str(error), config, overrides)
      raise config_lib.ConfigError(message) from error
  except (config_lib.ConfigError, flags.Error) as error:
    sys.exit(f"Error: {error}")


def config_arguments(
  argv: Sequence[str],
) -> tuple[str | None, dict[str, str]]:
  """(value of --config or None, {KEY: VALUE} of every --config.KEY=VALUE)."""
  path, overrides = None, {}
  for argument, following in zip(argv, [*argv[1:], ""], strict=True):
    name, equals, value = argument.partition("=")
    value = value if equals else following
    if name in ("--config", "-config"):
      path = value
    elif match := re.fullmatch(r"--?(no)?config\.(.*)", name):
      overrides[match[2]] = "False" if match[1] else value
  return path, overrides


def load_config(argument: str) -> dict[str, Any]:
  """The values of the config that 'FILE' or 'FILE:VARIANT' names.

  Raises:
    ConfigError: no such file, a file that defines no config, or a variant
      that the file refuses with a ValueError.
  """
  name, colon, variant = argument.partition(":")
  file = pathlib.Path(name)
  if not file.is_file():
    raise config_lib.ConfigError(
      f"--config={argument}: there is no file {name!r}; {_configs(file)}"
    )
  get_config = runpy.run_path(name).get("get_config")
  if get_config is None:
    raise config_lib.ConfigError(
      f"--config={argument}: {name} has no get_config(); {_configs(file)}"
    )
  try:
    config = get_config(variant) if colon else get_config()
  except ValueError as error:
    raise config_lib.ConfigError(f"--config={argument}: {error}") from error
  if not isinstance(config, ConfigDict):
    raise config_lib.ConfigError(
      f"--config={argument}: get_config() gave {config!r}, want a ConfigDict"
    )
  return config.to_dict()


def _configs(file: pathlib.Path) -> str:
  """Which configs there are beside a file, or else in configs/."""
  for folder in (file.parent, pathlib.Path("configs")):
    found = [
      str(path)
      for path in sorted(folder.glob("*.py"))
      if "\ndef get_config(" in path.read_text()
    ]
    if found:
      return f"valid options are {found}"
  return "give the path of a file with a function get_config"


def _explain(
  message: str, config: Mapping[str, Any], overrides: Mapping[str, str]
) -> str:
  """absl's message about a flag, with what an overridden key may hold."""
  for key, value in overrides.items():
    if not message.startswith(f"flag --config.{key}="):
      continue
    old: Any = config
    for name in key.split("."):
      old = old[name]
    if isinstance(old, Mapping):
      return f"{key}={value!r} is no section; set one of its keys {sorted(old)}"
    return (
      f"{key}={value!r} can't be read as {type(old).__name__}, want a value "
      f"like the config file's {key}={old!r}"
    )
  return message


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
