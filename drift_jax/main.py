"""The entry point: python -m drift_jax.main --config=FILE [--workdir=DIR].

Several processes: the same command in each of them with
--coordinator=HOST:PORT --num_processes=N --process_id=I, or --coordinator=auto.
"""

from absl import app, flags
from ml_collections import config_flags

from drift_jax import config as config_lib
from drift_jax.system import paths, programs, storage
from drift_jax.system.console import logger
from drift_jax.tasks import parse, trainer


def define_flags() -> None:
  """Defines the flags: not on import, as other programs have the same names."""
  paths.define_flag(
    "workdir",
    None,
    "Folder of the run, local or gs://BUCKET/PATH; a run found there is "
    "continued. Default: runs/NAME, by the config's file and variants.",
  )
  config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file or name, e.g. configs/digits.py, digits or digits:smoke",
  )
  config_lib.define_process_flags()
  flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
  """Validates the config, then runs the task that it names."""
  values = flags.FLAGS
  default = config_lib.default_workdir(
    config_flags.get_config_filename(values["config"])
  )
  workdir = default if values.workdir is None else values.workdir
  with programs.checking(argv):
    config = parse(values.config)
    storage.check(workdir, write=True)

  def program() -> None:
    if values.workdir is None:
      logger.info("The run is in %s; --workdir=DIR takes another.", workdir)
    trainer(config.task).train_and_evaluate(config, workdir)

  programs.run(
    program,
    processes=config_lib.process_flags(),
    resumes=True,
    workdir=workdir,
    keep_compiled=config.train.keep_compiled,
    heartbeat_timeout=config.processes.heartbeat_timeout,
    join_timeout=config.processes.join_timeout,
  )


if __name__ == "__main__":
  define_flags()
  app.run(main, flags_parser=config_lib.parse_flags)
