"""--config=FILE[:VARIANT] and --config.KEY=VALUE, with messages that teach."""

import importlib
import importlib.machinery
import importlib.util
import pathlib
import re
import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
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
    argv = flags.FLAGS.read_flags_from_files(argv, force_gnu=False)
    path, overrides = config_arguments(argv)
    if path is None:
      return flags.FLAGS(argv)
    config = load_config(path)
    for key, value in overrides.items():
      check_override(config, key, value)
    try:
      return flags.FLAGS(_with_file(argv))
    except flags.IllegalFlagValueError as error:
      message = _explain(str(error), config, overrides)
      raise ConfigError(message) from error
  except (ConfigError, flags.Error, paths.PathError) as error:
    text = "; ".join(str(error).splitlines())
    lacking = re.match(r"flag --(\w+)=None: .* other than None", text)
    if lacking is not None:
      text = f"--{lacking[1]} is missing: {flags.FLAGS[lacking[1]].help}"
    sys.exit(f"Error: {text}")


def _with_file(argv: Sequence[str]) -> list[str]:
  """The arguments, with the file that --config names as its value."""
  arguments = iter(argv)
  changed = []
  for argument in arguments:
    name, equals, value = argument.partition("=")
    if name in ("--config", "-config"):
      value = value if equals else next(arguments, "")
      argument = f"--config={find_config(value)}"
    changed.append(argument)
  return changed


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
    parser: reads the value; None reads one path.
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
  for argument, following in zip(argv, [*argv[1:], ""], strict=False):
    name, equals, value = argument.partition("=")
    value = value if equals else following
    if name in ("--config", "-config"):
      path = paths.expand(value)
    elif match := re.fullmatch(r"--?(no)?config\.(.*)", name):
      overrides[match[2]] = "False" if match[1] else value
  return path, overrides


def find_config(argument: str) -> str:
  """Finds the file of a config; returns FILE or FILE:VARIANT.

  NAME is short for configs/NAME.py, which is looked for in the current folder
  and then among those that come with drift_jax.

  Raises:
    PathError: see `paths.expand`.
  """
  name, colon, variant = argument.partition(":")
  file = pathlib.Path(paths.expand(name))
  if re.fullmatch(r"[\w-]+", name):
    file = pathlib.Path("configs", f"{name}.py")
  ours = _folder() / file.name
  if file.parent == pathlib.Path("configs") and not file.is_file():
    file = ours if ours.is_file() else file
  if not name:  # pathlib would say '.'
    return argument
  return f"{file}{colon}{variant}"


def load_config(argument: str) -> dict[str, Any]:
  """Loads the values of the config that FILE or FILE:VARIANT names.

  Raises:
    ConfigError: no such file, a file that defines no config, or a variant
      that the file refuses with a ValueError.
    PathError: see `paths.expand`.
  """
  name, colon, variant = find_config(argument).partition(":")
  file = pathlib.Path(name)
  if not file.is_file():
    raise ConfigError(
      f"--config={argument}: there is no file {name!r}; {_configs(file)}"
    )
  get_config = run_config(file).get("get_config")
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


def run_config(file: pathlib.Path) -> dict[str, Any]:
  """Runs a config file; returns the names that it defines.

  Its `from configs import NAME` looks in the file's own folder if that is
  called configs, in the package `configs` that Python finds by itself, and at
  last among the configs that come with drift_jax.
  """
  folder, ours = file.resolve().parent, _folder()
  if "configs" not in sys.modules:
    if folder != ours and importlib.util.find_spec("configs"):
      importlib.import_module("configs")
    else:
      spec = importlib.machinery.ModuleSpec("configs", None, is_package=True)
      sys.modules["configs"] = importlib.util.module_from_spec(spec)
  package = sys.modules["configs"]
  own = [str(folder)] if folder.name == "configs" else []
  there = getattr(package, "__path__", [])
  package.__path__ = [*dict.fromkeys([*own, *there, str(ours)])]
  return runpy.run_path(str(file))


def _folder() -> pathlib.Path:
  """Folder of drift_jax's own configs: in a wheel inside it, else beside it."""
  package = pathlib.Path(__file__).resolve().parent.parent
  inside = package / "configs"
  return inside if inside.is_dir() else package.parent / "configs"


def default_workdir(argument: str) -> str:
  """The workdir of a run of --config=FILE[:VARIANT] that is given none.

  It is runs/NAME: the file's name and the variant, without characters that
  shells, Orbax or URLs read otherwise.
  """
  name, _, variant = argument.partition(":")
  words = re.findall(r"[\w.-]+", f"{pathlib.Path(name).stem} {variant}", re.A)
  return f"runs/{'_'.join(words)}"


def _configs(file: pathlib.Path) -> str:
  """Lists the configs beside a file, and the names of those of drift_jax."""

  def defined(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    for path in folder.glob("*.py"):
      if "\ndef get_config(" in path.read_text():
        yield path

  found = {path.stem: path.stem for path in defined(_folder())}
  found |= {path.stem: str(path) for path in defined(file.parent)}
  return f"valid options are {[found[name] for name in sorted(found)]}"


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
