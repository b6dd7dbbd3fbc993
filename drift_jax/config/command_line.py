"""--config=FILE[:VARIANT] and --config.KEY=VALUE, with messages that teach."""

import pathlib
import re
import runpy
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from drift_jax.config.parsing import check_override
from drift_jax.system import options, paths
from drift_jax.system.errors import ConfigError

# Flags that are defined here belong to the program that asks for them, in whose
# --help they are.
flags.disclaim_key_flags()


def parse_flags(argv: Sequence[str]) -> list[str]:
  """Parses the command line; a mistake in it ends the process with one line."""
  try:
    argv = [_expanded(argument) for argument in argv]
    path, overrides = config_arguments(
      flags.FLAGS.read_flags_from_files(argv, force_gnu=False)
    )
    if path is None:
      return flags.FLAGS(argv)
    config = load_config(path)
    for key, value in overrides.items():
      check_override(config, key, value)
    try:
      return flags.FLAGS(argv)
    except flags.IllegalFlagValueError as error:
      message = _explain(str(error), config, overrides)
      raise ConfigError(message) from error
  except (ConfigError, flags.Error, paths.PathError) as error:
    sys.exit(f"Error: {'; '.join(str(error).splitlines())}")


def _expanded(argument: str) -> str:
  """An argument of the command line; the `~` of --config=~/FILE expanded.

  Raises:
    PathError: see `paths.expand`.
  """
  name, equals, value = argument.partition("=")
  if name.lstrip("-") != "config":
    return argument
  return f"{name}{equals}{paths.expand(value)}"


def define_process_flags(*, waits: bool = False) -> None:
  """Defines the flags by which a process finds the others.

  Args:
    waits: whether a flag says for how long; else its config does.
  """
  flags.DEFINE_string(
    "coordinator",
    "",
    "HOST:PORT of process 0 where several work together; auto: found by itself "
    "(TPU pods, SLURM).",
  )
  flags.DEFINE_integer("num_processes", None, "How many.")
  flags.DEFINE_integer("process_id", None, "Which one this is.")
  if waits:
    flags.DEFINE_integer(
      "join_timeout",
      options.JOIN_SECONDS,
      "Seconds to wait at the start until all are there.",
      lower_bound=1,
    )


def process_flags() -> tuple[str, int | None, int | None]:
  """Returns their values: coordinator, number of processes, own number."""
  values = flags.FLAGS
  return values.coordinator, values.num_processes, values.process_id


# What --from may name if it is a generator.
GENERATORS = (
  "a run's workdir, an export, an artifact's folder, hf://NAME of the authors' "
  "release or hf://OWNER/NAME[@REVISION][/FOLDER]"
)


class _Once(flags.Flag[Any]):
  """A flag of several names, which is given once."""

  def parse(self, argument: Any) -> None:
    if self.present:
      raise flags.IllegalFlagValueError(
        f"--{self.name}={argument}: {self.value} is given already (former "
        f"names of --{self.name} mean the same); leave one of them out"
      )
    super().parse(argument)


def define_source_flag(
  help: str,
  *former: str,
  required: bool = True,
  parser: flags.ArgumentParser[Any] | None = None,
) -> None:
  """Defines --from: the run, the export or the weights that a program reads.

  Args:
    help: what it may name.
    *former: names that it had, which still answer.
    required: whether the program needs it.
    parser: of the value; None: of one path.
  """
  flag = _Once(parser or paths.FlagParser(), None, "from", None, help)
  flags.DEFINE_flag(flag, required=required)
  for name in former:
    flags.DEFINE_alias(name, "from")


def define_generator_flags() -> None:
  """Defines the flags that name a generator to draw with."""
  define_source_flag(f"The generator: {GENERATORS}.", "workdir")
  paths.define_flag(
    "vae",
    "",
    "Autoencoder that decodes an artifact's latents, a folder or "
    "hf://OWNER/NAME; for a run, its place now, if it has moved.",
  )
  flags.DEFINE_integer(
    "step",
    None,
    "Of a run: checkpoint; the best one, else the newest, if not given.",
  )
  flags.DEFINE_float(
    "ema_decay", None, "Of a run: which EMA; the evaluated one if not given."
  )


def source() -> Any:
  """Returns the value of --from: `from` is no attribute's name."""
  return flags.FLAGS["from"].value


def config_arguments(
  argv: Sequence[str],
) -> tuple[str | None, dict[str, str]]:
  """Returns (value of --config or None, {KEY: VALUE} of --config.KEY=VALUE).

  Raises:
    PathError: see `paths.expand`, for --config=~USER/FILE.
  """
  path, overrides = None, {}
  for argument, following in zip(argv, [*argv[1:], ""], strict=True):
    name, equals, value = argument.partition("=")
    value = value if equals else following
    if name in ("--config", "-config"):
      path = paths.expand(value)
    elif match := re.fullmatch(r"--?(no)?config\.(.*)", name):
      overrides[match[2]] = "False" if match[1] else value
  return path, overrides


def load_config(argument: str) -> dict[str, Any]:
  """Loads the values of the config that 'FILE' or 'FILE:VARIANT' names.

  Raises:
    ConfigError: no such file, a file that defines no config, or a variant
      that the file refuses with a ValueError.
    PathError: see `paths.expand`.
  """
  name, colon, variant = argument.partition(":")
  name = paths.expand(name)
  file = pathlib.Path(name)
  if not file.is_file():
    raise ConfigError(
      f"--config={argument}: there is no file {name!r}; {_configs(file)}"
    )
  get_config = runpy.run_path(name).get("get_config")
  if get_config is None:
    raise ConfigError(
      f"--config={argument}: {name} has no get_config(); {_configs(file)}"
    )
  try:
    config = get_config(variant) if colon else get_config()
  except ValueError as error:
    raise ConfigError(f"--config={argument}: {error}") from error
  if not isinstance(config, ConfigDict):
    raise ConfigError(
      f"--config={argument}: get_config() gave {config!r}, want a ConfigDict"
    )
  return config.to_dict()


def default_workdir(argument: str) -> str:
  """The workdir of a run of --config=FILE[:VARIANT] that is given none.

  It is runs/NAME: the file's name and the variant, without characters that
  shells, Orbax or URLs read otherwise.
  """
  name, _, variant = argument.partition(":")
  words = re.findall(r"[\w.-]+", f"{pathlib.Path(name).stem} {variant}", re.A)
  return f"runs/{'_'.join(words)}"


def _configs(file: pathlib.Path) -> str:
  """Lists the configs beside a file, or else in configs/."""
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
  """Adds to absl's message about a flag what an overridden key may hold."""
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
