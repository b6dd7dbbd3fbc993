"""Finds the files that a run's config names, after the run was moved or copied.

A config names files relative to the folder in which training was started. The
workdir records that folder and its own place, so that files that were moved
together with it are found.
"""

import copy
import fnmatch
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from etils import epath

from drift_jax import config as config_lib
from drift_jax.config.parsing import build
from drift_jax.config.sections import RunConfig
from drift_jax.metrics.files import replacing
from drift_jax.system import options, storage

STARTED_FILE = "started.json"
# Keys that hold paths, and the flag of drift_jax.evaluate that gives another.
_FLAGS = {
  "vae.path": "--vae=DIR",
  "encoders.*.path": "--encoder=NAME=DIR",
  "eval.inception.path": "--inception=DIR",
  "eval.inception.reference": "--inception_reference=FILE",
  "eval.dinov2.path": "--dinov2=DIR",
  "eval.dinov2.reference": "--dinov2_reference=FILE",
  "eval.classifier.path": "--classifier=DIR",
  "eval.labels": "--labels=FILE",
  "data.conditions": "--conditions=FILE",
  "data.data_dir": "--data_dir=DIR",
  "data.source": "--data_source=KIND:PATH",
  "init_from": "",
  "fd_loss.*.path": "",
  "fd_loss.*.reference": "",
}
# Kinds of data.source whose other half may be a path; the last two hold
# demonstrations.
_KINDS = [s.partition(":")[0] for s in options.SOURCES if ":" in s]
_KINDS += ["zarr", "hdf5"]
_Config = TypeVar("_Config", bound=RunConfig)


class Started(NamedTuple):
  """Current folder and place of the workdir when the config was written."""

  folder: str
  workdir: str


def here(workdir: str) -> Started:
  """Returns the places of a run that starts now."""
  if not storage.is_remote(workdir):
    workdir = os.path.abspath(workdir)
  return Started(os.getcwd(), workdir)


def write_started(workdir: epath.Path) -> None:
  """Records where a run's paths start; the config is written at the same time.

  Raises:
    OSError: it can't be written.
  """
  with replacing(workdir / STARTED_FILE) as file:
    file.write_text(json.dumps(here(os.fspath(workdir))._asdict(), indent=1))


def read_started(workdir: epath.Path) -> Started | None:
  """Reads the places of a workdir; None if an old version recorded none.

  Raises:
    ConfigError: the file is damaged.
  """
  file = workdir / STARTED_FILE
  if not file.exists():
    return None
  try:
    return Started(**json.loads(file.read_text()))
  except (ValueError, TypeError) as error:
    raise config_lib.ConfigError(
      f"{file} can't be read: {error}; remove it, and paths are looked for in "
      "the current folder"
    ) from error


def of_run(
  values: Mapping[str, Any], workdir: str, given: Mapping[str, str]
) -> dict[str, Any]:
  """Returns the values of a run's config with paths to where files are now.

  The place with the same relation to the workdir comes first, then the place at
  the start of training, then the current folder. An absolute path stays if
  something is there. A path stays as it is if nothing is found.

  Args:
    values: content of the run's config.json.
    workdir: where the run is now.
    given: {dotted key: path} in place of the config's.

  Raises:
    ConfigError: a key that the config does not have, or weights that the run
      does without.
  """
  started = read_started(epath.Path(workdir))

  def move(path: str) -> str:
    places = _places(path, started, workdir)
    if os.path.isabs(path):
      places = [path, *places]
    return _first(places, path)

  moved = _with_paths(values, move)
  for key, path in given.items():
    config_lib.check_override(moved, key, path)
    if key.endswith(".path") and not config_lib.flatten(moved)[key]:
      raise config_lib.ConfigError(
        f"{key}={path!r}: the run in {workdir} has none, leave it out"
      )
    _put(moved, key, path)
  return moved


def of_resumed(config: _Config, workdir: str) -> _Config:
  """Returns the config of a resumed run with paths to where files are now.

  A path stays if something is there; others are looked for as `of_run` does.
  """
  started = read_started(epath.Path(workdir))
  if started is None:
    return config
  values = json.loads(config_lib.to_json(config))
  moved = _with_paths(
    values,
    lambda path: _first([path, *_places(path, started, workdir)], path),
  )
  if moved == values:
    return config
  parsed = build(type(config), moved)
  parsed.check()
  return parsed


def absolute(values: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the values of a config with absolute paths."""
  return _with_paths(values, os.path.abspath)


def check_there(config: RunConfig, workdir: str, keys: Sequence[str]) -> None:
  """Raises ConfigError for all paths among these keys that lead nowhere.

  Args:
    config: config of a run, from `of_run`.
    workdir: folder of the run.
    keys: fnmatch patterns of dotted keys whose files are about to be read.
  """
  values = json.loads(config_lib.to_json(config))
  started = read_started(epath.Path(workdir))
  missing = []
  for key, path in _paths(values):
    wanted = any(fnmatch.fnmatchcase(key, pattern) for pattern in keys)
    if not wanted or _is_elsewhere(path) or os.path.exists(path):
      continue
    (flag,) = (
      flag
      for pattern, flag in _FLAGS.items()
      if fnmatch.fnmatchcase(key, pattern)
    )
    others = sorted({*_places(path, started, workdir)} - {path})
    also = f", nor is there {' or '.join(others)}" if others else ""
    missing.append(
      f"{key}: {path} of the run in {workdir} is not there{also}; give its "
      f"place: {flag.replace('NAME', key.split('.')[1])}"
    )
  if missing:
    raise config_lib.ConfigError(in_lines(missing))


def in_lines(missing: Sequence[str]) -> str:
  """One message of several: the only one, or a line for each."""
  if len(missing) == 1:
    return missing[0]
  return "\n  ".join([f"{len(missing)} inputs are missing:", *missing])


def _paths(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
  """Yields (dotted key, path) of all paths of a config, those on a hub too.

  The DIR of data.source is a path unless it starts at data.data_dir.
  """
  flat = config_lib.flatten(values)
  for key, value in flat.items():
    if not any(fnmatch.fnmatchcase(key, pattern) for pattern in _FLAGS):
      continue
    if key == "data.source":
      kind, _, path = value.partition(":")
      below = flat.get("data.data_dir") and not os.path.isabs(path)
      named = kind == "tfds" and not path.startswith(("/", "."))
      on_hub = value.startswith(storage.HUB)
      if kind not in _KINDS or below or named or on_hub:
        continue
      value = path
    if value and not value.startswith("~"):
      yield key, value


def _with_paths(
  values: Mapping[str, Any], change: Callable[[str], str]
) -> dict[str, Any]:
  """Copies a config's values with each local path changed."""
  changed = copy.deepcopy(dict(values))
  for key, path in _paths(values):
    if not _is_elsewhere(path):
      _put(changed, key, change(path))
  return changed


def _put(values: dict[str, Any], key: str, path: str) -> None:
  """Sets a dotted key to a path; data.source keeps its KIND."""
  *sections, last = key.split(".")
  for section in sections:
    values = values[section]
  kind, colon, _ = str(values[last]).partition(":")
  if key == "data.source" and path.partition(":")[0] not in _KINDS:
    path = f"{kind}{colon}{path}"
  values[last] = path


def _places(path: str, started: Started | None, workdir: str) -> list[str]:
  """Returns the places that a path may mean, but for the current folder."""
  if started is None:
    return []
  meant = os.path.normpath(os.path.join(started.folder, path))
  if storage.is_remote(workdir) or storage.is_remote(started.workdir):
    return [meant]
  relation = os.path.relpath(meant, started.workdir)
  # A link to a workdir has another folder around it than the workdir.
  around = dict.fromkeys((os.path.abspath(workdir), os.path.realpath(workdir)))
  return [
    *(os.path.normpath(os.path.join(place, relation)) for place in around),
    meant,
  ]


def _first(places: Sequence[str], path: str) -> str:
  """Returns the first place that exists; the path itself if none does."""
  found = next(filter(os.path.exists, places), path)
  return path if found == os.path.abspath(path) else found


def _is_elsewhere(path: str) -> bool:
  """Returns whether a path is not on this machine."""
  return storage.is_remote(path) or path.startswith(storage.HUB)
