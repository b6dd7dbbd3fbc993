"""Diffusion Policy's replay buffers: demonstrations as zarr arrays.

A folder in zarr's format 2: data/action [S, A], data/NAME [S, ...] and
meta/episode_ends [E] int64, the step after the last one of each episode. Arrays
are read through TensorStore, which knows their compression.
"""

import json
import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorstore

from drift_jax.system import paths
from drift_jax.system.errors import DataError
from drift_jax.tasks.policy.demonstrations import Demonstrations
from drift_jax.tasks.policy.selection import first, parse, reading, select

_ACTION = "action"
_ENDS = "meta/episode_ends"
_FETCH = (
  "curl -O https://diffusion-policy.cs.columbia.edu/data/training/pusht.zip && "
  "unzip pusht.zip"
)
# Steps of a chunk that `write_replay` makes, as in the published file.
_CHUNK = 161


def read_replay(
  path: os.PathLike[str] | str,
  observations: Sequence[str],
  *,
  max_episodes: int = 0,
) -> Demonstrations:
  """Demonstrations of a replay buffer.

  PushT's is pusht_cchi_v7_replay.zarr, 206 episodes, with 'state' [S, 5],
  'keypoint' [S, 9, 2], 'n_contacts' [S, 1] and 'img' [S, 96, 96, 3] float32 in
  [0, 255].

  Args:
    path: the folder.
    observations: names of arrays beside 'action'; 'NAME[:K]' are the first K
      columns of one.
    max_episodes: only the first ones; 0: all.

  Raises:
    DataError: no such folder, missing arrays or chunks, or ones that disagree.
  """
  folder = pathlib.Path(paths.expand(path))
  present = {file.parent.name for file in folder.glob("data/*/.zarray")}
  with reading(folder):
    if not present:
      raise DataError(f"no replay buffer is there; PushT's comes by {_FETCH!r}")
    ends = np.asarray(_open(folder / _ENDS), np.int64)
    ends = first(ends, max_episodes)
    steps = int(ends[-1]) if max_episodes else None

    def opened(name: str) -> Any:
      return _open(folder / "data" / name)[:steps]

    values = select(observations, present - {_ACTION}, opened)
    actions = select([_ACTION], present, opened)[_ACTION]
    return Demonstrations(values, actions, ends)


def write_replay(
  path: os.PathLike[str] | str, demonstrations: Demonstrations
) -> None:
  """Writes demonstrations in the same format; they appear when whole.

  Raises:
    DataError: something is there, or an observation's name is that of a part
      of another, 'NAME[:K]', under which it could not be read again.
  """
  parts = [name for name in demonstrations.observations if parse(name)[1]]
  if parts:
    raise DataError(f"{path}: observations {parts} are parts of others: rename")
  folder = pathlib.Path(paths.expand(path))
  if folder.exists():
    raise DataError(f"{folder} is there: remove it, or write elsewhere")
  arrays = {_ACTION: demonstrations.actions, **demonstrations.observations}
  hidden = f".{folder.name}."
  folder.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(prefix=hidden, dir=folder.parent) as partial:
    whole = pathlib.Path(partial) / "whole"
    _write(whole / _ENDS, np.asarray(demonstrations.ends, np.int64))
    for name, values in arrays.items():
      _write(whole / "data" / name, values)
    for group in (whole, whole / "data", whole / "meta"):
      (group / ".zgroup").write_text(json.dumps({"zarr_format": 2}))
    whole.rename(folder)


def _write(folder: pathlib.Path, values: np.ndarray) -> None:
  metadata = {
    "shape": list(values.shape),
    "chunks": [min(_CHUNK, len(values)), *values.shape[1:]],
    "dtype": values.dtype.str,
    "compressor": {"id": "blosc", "cname": "zstd", "clevel": 5, "shuffle": 2},
  }
  # Chunks of zeros as well: one that is not there counts as lost.
  stored = {"metadata": metadata, "store_data_equal_to_fill_value": True}
  _open(folder, create=True, open=False, **stored).write(values).result()


def _open(folder: pathlib.Path, **options: Any) -> Any:
  """An array in a folder, of which a missing chunk can't be read.

  A writer may leave out chunks that hold nothing but the fill value. Nothing
  tells them from chunks that were lost, so that they are not read as zeros.
  """
  spec = {
    "driver": "zarr",
    "kvstore": {"driver": "file", "path": os.fspath(folder.absolute())},
    "fill_missing_data_reads": False,
    "open": True,
  }
  return tensorstore.open(spec | options).result()
