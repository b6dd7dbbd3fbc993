"""Diffusion Policy's replay buffers: demonstrations as zarr arrays.

A folder in zarr's format 2: data/action [S, A], data/NAME [S, ...] and
meta/episode_ends [E] int64, behind the last step of each episode. Arrays are
read through TensorStore, which knows their compression.
"""

import json
import os
import pathlib
import re
import secrets
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorstore

from drift_jax.data.errors import DataError
from drift_jax.system import paths
from drift_jax.tasks.policy.demonstrations import Demonstrations
from drift_jax.tasks.policy.selection import is_selection, select

_ACTION = "action"
_ENDS = "meta/episode_ends"
# What makes the files that are read; robomimic's HDF5 files as well, for
# drift_jax.data.robomimic.
_SITE = "https://diffusion-policy.cs.columbia.edu/data/training"
FETCH = {
  name: f"curl -O {_SITE}/{name}.zip && unzip {name}.zip"
  for name in ("pusht", "robomimic_lowdim", "robomimic_image")
}
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
  [0, 255]; FETCH['pusht'] is the command that gets it.

  Args:
    path: the folder.
    observations: names of arrays beside 'action'; 'NAME[:K]' are the first K
      columns of one.
    max_episodes: only the first ones; 0: all.

  Raises:
    DataError: no such folder, missing arrays or chunks, or ones that disagree.
  """
  folder = pathlib.Path(paths.expand(path))
  if not (folder / "data").is_dir():
    raise DataError(
      f"{folder}: no replay buffer is there; PushT's comes by "
      f"{FETCH['pusht']!r}"
    )
  present = {file.parent.name for file in (folder / "data").glob("*/.zarray")}
  if _ACTION not in present or not (folder / _ENDS / ".zarray").is_file():
    raise DataError(
      f"{folder}: want data/{_ACTION} and {_ENDS}; data/ has {sorted(present)}"
    )
  ends = _ends(folder)
  steps = None
  if max_episodes:
    if not 1 <= max_episodes <= len(ends):
      raise DataError(
        f"{folder}: max_episodes={max_episodes}, there are {len(ends)}"
      )
    ends = ends[:max_episodes]
    steps = int(ends[-1])

  def opened(name: str) -> Any:
    return _Array(folder / "data" / name)[slice(steps)]

  values = select(observations, present - {_ACTION}, opened, str(folder))
  actions = select([_ACTION], [_ACTION], opened, str(folder))[_ACTION]
  try:
    return Demonstrations(values, actions, ends)
  except DataError as error:
    raise DataError(f"{folder}: {error}") from error


def _ends(folder: pathlib.Path) -> np.ndarray:
  try:
    return np.asarray(_Array(folder / _ENDS)[:], np.int64)
  except (ValueError, OSError) as error:
    raise DataError(f"{folder}: {_ENDS}: {error}") from error


class _Array:
  """An array in a folder, of which a chunk that is missing is an error.

  A writer may leave out chunks that hold nothing but the fill value. Nothing
  tells them from chunks that were lost, so that they are not read as zeros.
  """

  def __init__(self, folder: pathlib.Path, array: Any = None):
    if array is None:
      array = tensorstore.open(_spec(folder), open=True).result()
    self._folder, self._array = folder, array

  @property
  def shape(self) -> tuple[int, ...]:
    return self._array.shape

  def __getitem__(self, steps: slice) -> "_Array":
    return _Array(self._folder, self._array[steps])

  def __array__(
    self, dtype: Any = None, copy: bool | None = None
  ) -> np.ndarray:
    del copy
    try:
      return np.asarray(self._array.read().result(), dtype)
    except ValueError as error:
      if "NOT_FOUND" not in str(error):
        raise
      found = re.search(r"chunk \{([\d, ]*)\}", str(error))
      chunk = found[1].replace(" ", "").replace(",", ".") if found else "?"
      raise DataError(
        f"chunk {chunk} of {self._folder} is missing: copy the data anew; if "
        "its values are the fill value, which the writer left out, write it "
        "again with zarr's write_empty_chunks=True"
      ) from error


def write_replay(
  path: os.PathLike[str] | str, demonstrations: Demonstrations
) -> None:
  """Writes demonstrations in the same format; they appear when whole.

  Raises:
    DataError: something is there, or an observation's name is that of a part
      of another, 'NAME[:K]', under which it could not be read again.
  """
  parts = [name for name in demonstrations.observations if is_selection(name)]
  if parts:
    raise DataError(f"{path}: observations {parts} are parts of others: rename")
  folder = pathlib.Path(paths.expand(path))
  if folder.exists():
    raise DataError(f"{folder} is there: remove it, or write elsewhere")
  part = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
  arrays = {
    f"data/{_ACTION}": demonstrations.actions,
    _ENDS: np.asarray(demonstrations.ends, np.int64),
    **{f"data/{n}": x for n, x in demonstrations.observations.items()},
  }
  try:
    for name, values in arrays.items():
      _write(part / name, values)
    for group in (part, part / "data", part / "meta"):
      (group / ".zgroup").write_text(json.dumps({"zarr_format": 2}))
    part.rename(folder)
  finally:
    shutil.rmtree(part, ignore_errors=True)


def _write(folder: pathlib.Path, values: np.ndarray) -> None:
  metadata = {
    "shape": list(values.shape),
    "chunks": [min(_CHUNK, len(values)), *values.shape[1:]],
    "dtype": values.dtype.str,
    "compressor": {"id": "blosc", "cname": "zstd", "clevel": 5, "shuffle": 2},
  }
  # Chunks of zeros as well: one that is not there counts as lost.
  stored = {"metadata": metadata, "store_data_equal_to_fill_value": True}
  array: Any = tensorstore.open(_spec(folder) | stored, create=True).result()
  array.write(values).result()


def _spec(folder: pathlib.Path) -> dict[str, Any]:
  path = os.fspath(folder.absolute())
  return {
    "driver": "zarr",
    "kvstore": {"driver": "file", "path": path},
    "fill_missing_data_reads": False,
  }
