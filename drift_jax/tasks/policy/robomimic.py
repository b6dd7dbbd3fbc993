"""robomimic's demonstrations (arXiv:2108.03298): HDF5 files.

/data has for each episode a group demo_I with actions [T, A] and obs/NAME
[T, ...]; images are uint8. Its attribute `num_samples` is T, and dones [T] is 1
at the last step; some files, MimicGen's (arXiv:2310.17596), leave these out.
"""

import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from drift_jax.system import extras, paths
from drift_jax.system.console import logger
from drift_jax.system.errors import DataError
from drift_jax.tasks.policy.demonstrations import Demonstrations
from drift_jax.tasks.policy.selection import first, reading, select


def read_robomimic(
  path: os.PathLike[str] | str,
  observations: Sequence[str],
  *,
  max_episodes: int = 0,
) -> Demonstrations:
  """Demonstrations of a robomimic file, episodes in the order of their numbers.

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
    line = extras.install_line("robots")
    raise DataError(f"{path}: HDF5 files need h5py: {line}") from error
  path = pathlib.Path(paths.expand(path))
  with reading(path), h5py.File(path, "r") as file:
    group: Any = file.get("data")
    names: Any = group if _is_group(group) else ()
    numbers = {re.fullmatch(r"demo_(\d+)", name): name for name in names}
    episodes = sorted((int(m[1]), name) for m, name in numbers.items() if m)
    if not episodes:
      raise DataError("there is no /data/demo_I in it")
    parts = []
    for _, name in first(episodes, max_episodes):
      with reading(name):
        parts.append(_episode(group[name], observations))
    demonstrations = Demonstrations.joined(parts)
    steps, total = len(demonstrations.actions), group.attrs.get("total")
    if not max_episodes and total is not None and steps != total:
      logger.warning(
        "%s: episodes have %d steps, /data says total=%d", path, steps, total
      )
    return demonstrations


def _episode(demo: Any, observations: Sequence[str]) -> Demonstrations:
  if not _is_group(demo) or not _is_group(demo.get("obs")):
    raise DataError("want a group with actions and a group obs")
  seen = demo["obs"]
  values = select(observations, list(seen), lambda name: _stored(seen[name]))
  actions = select(["actions"], list(demo), lambda name: _stored(demo[name]))
  actions = actions["actions"]
  length = int(demo.attrs.get("num_samples", len(actions)))
  episode = Demonstrations(values, actions, np.array([length]))
  dones = _stored(demo["dones"]) if "dones" in demo else np.ones(length)
  if dones.shape != (length,) or dones[-1] != 1:
    raise DataError(
      f"an unfinished episode: dones is not 1 at the last of {length} steps"
    )
  return episode


def _is_group(value: Any) -> bool:
  return isinstance(value, Mapping)


def _stored(dataset: Any) -> Any:
  """A dataset, all of whose values are in the file.

  HDF5 reads what was never written, or lies in another file that is gone, as
  fill values.

  Raises:
    DataError: some are not.
  """
  import h5py

  if _is_group(dataset):
    raise DataError("it is a group, want an array")
  stored = dataset.id.get_space_status() == h5py.h5d.SPACE_STATUS_ALLOCATED
  if dataset.size and (dataset.is_virtual or dataset.external or not stored):
    raise DataError(
      "some of it is not in the file and would read as zeros: copy it anew"
    )
  return dataset
