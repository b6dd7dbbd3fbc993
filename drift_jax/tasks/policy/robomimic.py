"""robomimic's demonstrations (arXiv:2108.03298): HDF5 files.

/data has for each episode a group demo_I with actions [T, A] and obs/NAME
[T, ...]; images are uint8. Its attribute `num_samples` is T, and dones [T] is 1
at the last step; some files, MimicGen's (arXiv:2310.17596), leave these out.
"""

import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from drift_jax.data.errors import DataError
from drift_jax.system import paths
from drift_jax.system.console import logger
from drift_jax.tasks.policy.demonstrations import Demonstrations
from drift_jax.tasks.policy.selection import select

_PREFIX = "demo_"


def read_robomimic(
  path: os.PathLike[str] | str,
  observations: Sequence[str],
  *,
  max_episodes: int = 0,
) -> Demonstrations:
  """Demonstrations of a robomimic file, episodes in the order of their numbers.

  replay.FETCH has the commands that get Diffusion Policy's files.

  Args:
    path: the file.
    observations: names in obs/; 'NAME[:K]' are the first K columns of one.
    max_episodes: only the first ones; 0: all.

  Raises:
    DataError: h5py is missing, no such file, missing names, lengths that
      disagree, or an episode that is empty or says that it is not done at its
      end.
  """
  try:
    import h5py
  except ImportError as error:
    raise DataError(
      f"{path}: HDF5 files need h5py: pip install -r requirements-robots.txt"
    ) from error
  path = paths.expand(path)
  if not pathlib.Path(path).is_file():
    raise DataError(f"{path}: there is no such file")
  try:
    file = h5py.File(path, "r")
  except OSError as error:
    raise DataError(f"{path} can't be read: {error}") from error
  with file:
    group: Any = file.get("data")
    names = _episodes(group)
    if not names:
      raise DataError(f"{path}: there is no /data/{_PREFIX}I in it")
    if not 0 <= max_episodes <= len(names):
      raise DataError(
        f"{path}: max_episodes={max_episodes}, there are {len(names)}"
      )
    chosen = names[: max_episodes or None]
    parts = [
      _episode(group[name], observations, f"{path}: {name}") for name in chosen
    ]
    total = group.attrs.get("total")
  actions = [part for _, part in parts]
  steps = sum(map(len, actions))
  if not max_episodes and total is not None and steps != total:
    logger.warning(
      "%s: its episodes have %d steps, /data says total=%d", path, steps, total
    )
  return Demonstrations(
    {
      name: np.concatenate([seen[name] for seen, _ in parts])
      for name in parts[0][0]
    },
    np.concatenate(actions),
    np.cumsum([len(part) for part in actions], dtype=np.int64),
  )


def _episodes(group: Any) -> list[str]:
  """Names of the episodes by number: 2 before 10."""
  if not isinstance(group, Mapping):
    return []
  names = [
    name
    for name in group
    if name.startswith(_PREFIX) and name.removeprefix(_PREFIX).isdigit()
  ]
  return sorted(names, key=lambda name: int(name.removeprefix(_PREFIX)))


def _episode(
  group: Any, observations: Sequence[str], where: str
) -> tuple[dict[str, np.ndarray], np.ndarray]:
  attributes = group.attrs
  if not isinstance(group, Mapping):
    raise DataError(f"{where} is no group of arrays, but {group}")
  missing = [key for key in ("actions", "obs") if key not in group]
  if missing:
    raise DataError(f"{where}: {missing} are missing; there are {list(group)}")
  seen = group["obs"]
  if not isinstance(seen, Mapping):
    raise DataError(f"{where}: obs is no group of arrays, but {seen}")

  def chosen(names: Sequence[str], arrays: Any) -> dict[str, np.ndarray]:
    return select(
      names, list(arrays), lambda name: _stored(arrays, name, where), where
    )

  values = chosen(observations, seen)
  actions = chosen(["actions"], group)["actions"]
  arrays = {**values, "actions": actions}
  if "dones" in group:
    arrays["dones"] = _dones(_stored(group, "dones", where), where)
  steps, source = len(actions), "the actions have"
  if "num_samples" in attributes:
    steps, source = attributes["num_samples"], "num_samples is"
  for name, array in arrays.items():
    if len(array) != steps:
      raise DataError(
        f"{where}: {name!r} has {len(array)} steps, {source} {steps}"
      )
  if not steps:
    raise DataError(f"{where}: an episode without steps")
  if "dones" in arrays and arrays["dones"][-1] != 1:
    raise DataError(
      f"{where}: an unfinished episode: dones is not 1 at the last of its "
      f"{steps} steps"
    )
  return values, actions


def _stored(group: Any, name: str, where: str) -> Any:
  """A dataset, all of whose values are in the file.

  HDF5 reads what was never written, or lies in another file that is gone, as
  fill values.

  Raises:
    DataError: some are not.
  """
  dataset = group[name]
  if isinstance(dataset, Mapping):
    raise DataError(f"{where}: {name!r} is a group, want an array")
  if not dataset.size:
    return dataset
  if dataset.is_virtual or dataset.external:
    raise DataError(
      f"{where}: {name!r} lies in other files, whose loss would read as zeros: "
      "write all into one file"
    )
  if dataset.chunks is None:
    stored, wanted, unit = (
      dataset.id.get_storage_size(),
      dataset.nbytes,
      "bytes",
    )
  else:
    stored = dataset.id.get_num_chunks()
    wanted = math.prod(
      -(-n // c) for n, c in zip(dataset.shape, dataset.chunks, strict=True)
    )
    unit = "chunks"
  if stored < wanted:
    raise DataError(
      f"{where}: {name!r} has {stored} of its {wanted} {unit}, the rest was "
      "never written and would read as zeros: copy or make the file anew"
    )
  return dataset


def _dones(dataset: Any, where: str) -> np.ndarray:
  try:
    dones = np.asarray(dataset)
  except (ValueError, OSError) as error:
    raise DataError(f"{where}: 'dones': {error}") from error
  if dones.ndim != 1:
    raise DataError(f"{where}: 'dones' has the shape {dones.shape}, want [T]")
  return dones
