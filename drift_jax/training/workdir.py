"""A run's folder: who works there, its config, its facts, who may go on."""

import contextlib
import functools
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

from etils import epath

from drift_jax import config as config_lib
from drift_jax.config.sections import RunConfig
from drift_jax.metrics.files import replacing
from drift_jax.system import exits, options, paths, processes, storage
from drift_jax.system.console import logger
from drift_jax.system.lease import Lease
from drift_jax.training import checkpoint, places
from drift_jax.training import facts as facts_lib

LOCK_FILE = "run.lock"
WEIGHTS_FILE = "frozen_weights.json"
CHECKPOINTS = "checkpoints"
_Train = TypeVar("_Train", bound=Callable[..., Any])


def check_workdir(workdir: str) -> None:
  """Checks at the start that the workdir can be written; makes nothing.

  The first process tries; all end if it can't.

  Raises:
    ConfigError: it can't, or it is a file.
    PeerError: the same, in the other processes.
  """

  def check() -> None:
    if storage.is_remote(workdir):
      return  # storage.check has looked at it.
    path = pathlib.Path(paths.expand(workdir))
    try:
      storage.check_characters(workdir)
      while not path.is_dir():
        if path.exists():
          raise NotADirectoryError(f"{path} is a file")
        path = path.parent
      with tempfile.TemporaryFile(dir=path):
        pass
    except OSError as error:
      raise config_lib.ConfigError(
        f"--workdir={workdir} can't be written: {error}; give a folder on a "
        "disk that is writable, and that all processes share"
      ) from error

  processes.from_first(check)


def alone(train: _Train) -> _Train:
  """Makes a task's (config, workdir) -> state the only run in its workdir.

  It raises ConfigError before anything is read or written if another run is
  going on there, the workdir can't be written, or a service that the run
  reports to can't be used. A run that was not heard of
  for a minute may lose the workdir to another one: its process ends then.
  """

  @functools.wraps(train)
  def run(config: Any, workdir: str, **options: Any) -> Any:
    workdir = paths.expand(workdir)
    check_workdir(workdir)
    _check_services(getattr(config, "writers", ()))
    with holding(epath.Path(workdir) / LOCK_FILE, f"--workdir={workdir}"):
      return train(config, workdir, **options)

  return cast(_Train, run)


def _check_services(writers: Sequence[str]) -> None:
  if names := [name for name in writers if name in options.SERVICES]:
    from drift_jax.metrics import services

    processes.from_first(functools.partial(services.check, names))


@contextlib.contextmanager
def alone_with(out: str) -> Iterator[None]:
  """Keeps a file to be written, --out, for one program at a time.

  Raises:
    ConfigError: another process is about to write it.
    StorageError: a bucket that can't be used.
  """
  storage.check(out)
  path = epath.Path(f"{out}.lock")
  with contextlib.ExitStack() as stack:
    # It makes no folder: a program that fails would leave it.
    if processes.from_first(path.parent.exists):
      stack.enter_context(holding(path, f"--out={out}"))
    yield


@contextlib.contextmanager
def holding(path: epath.Path, what: str) -> Iterator[None]:
  """Holds a lease meanwhile, the first process for all.

  Args:
    path: file or object of the lease.
    what: the thing that it is for, in messages.

  Raises:
    ConfigError: another process holds it.
    PeerError: the same, in the other processes.
    StorageError: it can't be read or written.
  """
  lease = Lease(path, what, exits.give_up)
  with exits.last(lease.release):
    try:
      processes.from_first(lease.take)
      yield
    finally:
      lease.release()


def has_checkpoints(path: epath.Path) -> bool:
  """Whether a folder holds a run that goes on from a checkpoint."""
  return any(
    entry.name[0].isdecimal() for entry in storage.entries(path / CHECKPOINTS)
  )


def open_workdir(
  workdir: str,
  config: RunConfig,
  frozen: Mapping[str, str],
  class_names: Sequence[str],
  facts: facts_lib.Facts,
) -> epath.Path:
  """Creates the workdir; writes config, classes, data's facts, weights' sums.

  It also records where the config's paths start. If the workdir holds a
  checkpoint already, the config, the data and the frozen weights must be those
  of that run. The first process writes for all; the others check that they have
  its data.

  Args:
    workdir: folder of the run.
    config: resolved config.
    frozen: {'encoders.NAME' or 'vae': SHA-256 of its weights}.
    class_names: one for each label, if there are labels.
    facts: facts of the data, if there are any; see facts.py.

  Raises:
    ConfigError: if the workdir holds a run of another experiment or of other
      data, or is not there for all processes.
    PeerError: what the first process raised, in the others.
  """
  path = epath.Path(paths.expand(workdir))
  names_of_first, facts_of_first = processes.from_first(
    functools.partial(_write_facts, path, config, frozen, class_names, facts)
  )
  if not (path / config_lib.CONFIG_FILE).exists():
    raise config_lib.ConfigError(
      f"--workdir={workdir}: process {processes.index()} does not see the "
      f"{config_lib.CONFIG_FILE} that process 0 wrote there: give a folder "
      "that all processes share"
    )
  found = facts_lib.differences(
    names_of_first, facts_of_first, class_names, facts
  )
  if found:
    raise config_lib.ConfigError(
      f"data: process {processes.index()} reads other data than process 0 "
      f"({'; '.join(found)}): give all processes the same"
    )
  return path


def _write_facts(
  path: epath.Path,
  config: RunConfig,
  frozen: Mapping[str, str],
  class_names: Sequence[str],
  facts: facts_lib.Facts,
) -> tuple[Sequence[str], facts_lib.Facts]:
  text = config_lib.to_json(config)
  if has_checkpoints(path):
    if (path / config_lib.CONFIG_FILE).exists():
      try:
        _check_resumable(path, config, frozen, class_names, facts)
      except config_lib.ConfigError as error:
        # model.num_classes may be the data's, which nobody has typed.
        found = "; ".join(
          facts_lib.differences(*facts_lib.recorded(path), class_names, facts)
        )
        raise config_lib.ConfigError(
          f"{error}" + f"; the data differ: {found}" * bool(found)
        ) from error
    facts_lib.check_data(path, class_names, facts)
    if facts and not (path / facts_lib.DATA_FILE).exists():
      logger.warning(
        "%s is a run that has not recorded its data: they are taken for those "
        "of this start.",
        path,
      )
    check_frozen(path, frozen)
  else:
    config_lib.check_new(config)
  path.mkdir(parents=True, exist_ok=True)
  with replacing(path / config_lib.CONFIG_FILE) as file:
    file.write_text(text)
  places.write_started(path)
  if class_names:
    with replacing(path / facts_lib.CLASSES_FILE) as file:
      file.write_text(json.dumps(list(class_names), indent=1))
  if facts:
    with replacing(path / facts_lib.DATA_FILE) as file:
      file.write_text(json.dumps(facts))
  if frozen:
    with replacing(path / WEIGHTS_FILE) as file:
      file.write_text(json.dumps(frozen, indent=2))
  return class_names, facts


def _check_resumable(
  path: epath.Path,
  config: RunConfig,
  frozen: Mapping[str, str],
  class_names: Sequence[str],
  facts: facts_lib.Facts,
) -> None:
  """Raises ConfigError if a config is not that of the workdir's run.

  Paths are the same if they lead to the same place. Weights, and data that are
  known by checksums, may lie anywhere; a source of the same text starts at
  data.data_dir, which may change.
  """
  written = config_lib.completed(
    storage.read_json(path / config_lib.CONFIG_FILE, dict), config
  )
  new = json.loads(config_lib.to_json(config))
  old = places.of_run(written, os.fspath(path), {})
  before, after = (
    config_lib.flatten(places.absolute(values)) for values in (old, new)
  )
  sums = _frozen_before(path)
  for name, found in frozen.items():
    if sums.get(name) == found and f"{name}.path" in before:
      after[f"{name}.path"] = before[f"{name}.path"]
  source = "data.source"
  texts = [config_lib.flatten(values).get(source) for values in (written, new)]
  is_same = facts_lib.is_same_data(
    *facts_lib.recorded(path), class_names, facts
  )
  if source in before and (is_same or texts[0] == texts[1]):
    after[source] = before[source]
  config_lib.check_resumable(json.dumps(before), json.dumps(after))


def _frozen_before(path: epath.Path) -> dict[str, str]:
  """Reads the checksums of the weights that a run began with."""
  file = path / WEIGHTS_FILE
  return storage.read_json(file, dict) if file.exists() else {}


def check_frozen(path: epath.Path, frozen: Mapping[str, str]) -> None:
  """Raises ConfigError if weights are not those that the run began with."""
  before = _frozen_before(path)
  if not before:
    return
  for name in frozen:
    if before.get(name) != frozen[name]:
      raise config_lib.ConfigError(
        f"{name}: the run in {path} began with other weights (SHA-256 "
        f"{before.get(name)}, now {frozen[name]}): give it those again or use "
        "a new workdir"
      )


def make_checkpointer(
  config: config_lib.Checkpoint, path: epath.Path, *, read_only: bool = False
) -> checkpoint.Checkpointer:
  """Opens the checkpoints of a workdir; read_only while its run goes on."""
  return checkpoint.Checkpointer(
    path / CHECKPOINTS,
    keep_latest=config.keep_latest,
    keep_every=config.keep_every,
    best_metric=config.best_metric,
    on_corrupt=config.on_corrupt,
    read_only=read_only,
  )
