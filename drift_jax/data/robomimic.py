"""robomimic's demonstrations (arXiv:2108.03298): HDF5 files.

/data has the attributes `total` (steps) and `env_args`, and for each episode a
group demo_I with the attribute `num_samples` and actions [T, A], dones [T] and
obs/NAME [T, ...]; images are uint8.
"""

import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from drift_jax import paths
from drift_jax.console import logger
from drift_jax.data.demonstrations import Demonstrations
from drift_jax.data.errors import DataError
from drift_jax.data.selection import select

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
      disagree, or an episode that is not done at its end.
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
  names = [
    name
    for name in group or ()
    if name.startswith(_PREFIX) and name.removeprefix(_PREFIX).isdigit()
  ]
  return sorted(names, key=lambda name: int(name.removeprefix(_PREFIX)))


def _episode(
  group: Any, observations: Sequence[str], where: str
) -> tuple[dict[str, np.ndarray], np.ndarray]:
  missing = [key for key in ("actions", "dones", "obs") if key not in group]
  if missing:
    raise DataError(f"{where}: {missing} are missing; there are {list(group)}")
  actions = np.asarray(_stored(group, "actions", where), np.float32)
  dones = np.asarray(_stored(group, "dones", where))
  seen = group["obs"]

  def opened(name: str) -> Any:
    return _stored(seen, name, where)

  values = select(observations, list(seen), opened, where)
  steps = int(group.attrs["num_samples"])
  for name, array in {**values, "actions": actions, "dones": dones}.items():
    if len(array) != steps:
      raise DataError(
        f"{where}: {name!r} has {len(array)} steps, num_samples is {steps}"
      )
  if not steps or dones[-1] != 1:
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
