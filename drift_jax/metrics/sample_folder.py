"""A folder of generated images that an interrupted program goes on with."""

import json
import reprlib
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any

import numpy as np
from etils import epath

from drift_jax.metrics import files
from drift_jax.metrics.batches import Batch
from drift_jax.metrics.images import save_image
from drift_jax.system import processes, storage

FACTS_FILE = "samples.json"
_ABOUT = "about"
_AHEAD = 4  # batches whose files are being written


class SampleFolder:
  """Writes images, each to its own file, as they come.

    FOLDER/samples.json   how they were asked for, and their labels
    FOLDER/000017.png     image number 17

  A file is there whole or not at all, so those that are missing are what is
  left to do. Several processes write each their own.
  """

  def __init__(
    self,
    path: files.PathLike,
    facts: Mapping[str, Any],
    labels: Sequence[int],
    about: Mapping[str, Any] | None = None,
  ):
    """Writes samples.json, unless the folder has the same.

    Args:
      path: of the folder.
      facts: all that the images depend on, fit for JSON.
      labels: class index of each image, by number.
      about: what else is to be known of them; it may differ.

    Raises:
      ValueError: a folder that holds other images, naming what differs.
      OSError: it can't be written.
    """
    self._path = epath.Path(path)
    self._digits = max(6, len(str(len(labels) - 1)))
    self._count = len(labels)
    self._pool = futures.ThreadPoolExecutor()
    self._pending: list[list[futures.Future[None]]] = []
    wanted = {**facts, "labels": [int(label) for label in labels]}
    # As a reader of the file sees them: no tuples.
    wanted = json.loads(json.dumps(wanted))
    processes.from_first(lambda: self._claim(wanted, dict(about or {})))

  def _claim(self, wanted: dict[str, Any], about: dict[str, Any]) -> None:
    file = self._path / FACTS_FILE
    if not file.exists():
      if self._there():
        raise ValueError(
          f"{self._path} holds images, but no {FACTS_FILE} that says which:"
          " give another folder"
        )
      with files.replacing(file) as temporary:
        temporary.write_text(json.dumps({_ABOUT: about, **wanted}, indent=1))
      return
    try:
      there = json.loads(file.read_text())
    except ValueError as error:
      raise ValueError(f"{file} is no JSON: {error}") from error
    there.pop(_ABOUT, None)
    different = [
      f"{key}: {reprlib.repr(there.get(key))}, now"
      f" {reprlib.repr(wanted.get(key))}"
      for key in sorted(wanted.keys() | there.keys())
      if wanted.get(key) != there.get(key)
    ]
    if different:
      raise ValueError(
        f"{self._path} holds images of another request"
        f" ({'; '.join(different)}): give it the same, or another folder"
      )

  def missing(self) -> np.ndarray:
    """Numbers [n] int32 of the images that are not there yet."""

    def find() -> list[int]:
      there = self._there()
      return [i for i in range(self._count) if self._name(i) not in there]

    return np.array(processes.from_first(find), np.int32)

  def _there(self) -> set[str]:
    """Names of the images in the folder; raises OSError if it is unreadable."""
    names = {path.name for path in storage.entries(self._path, ".png")}
    return {name for name in names if not name.startswith(".")}

  def update(self, batch: Batch) -> None:
    """Writes this process' images while the next ones are computed.

    Raises:
      OSError: one of the files before them can't be written.
    """
    pixels = batch.rows(batch.pixels)
    self._pending.append(
      [
        self._pool.submit(save_image, image, self._path / self._name(i))
        for i, image in zip(batch.index.tolist(), pixels, strict=True)
      ]
    )
    while len(self._pending) > _AHEAD:
      self._wait()

  def close(self) -> None:
    """Waits for the files.

    Raises:
      OSError: one of them can't be written.
    """
    try:
      while self._pending:
        self._wait()
    finally:
      self._pool.shutdown(cancel_futures=True)

  def _wait(self) -> None:
    for future in self._pending.pop(0):
      future.result()

  def _name(self, number: int) -> str:
    return f"{number:0{self._digits}d}.png"
