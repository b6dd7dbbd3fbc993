"""Files of generated images for other tools, see `sample_files`."""

import contextlib
import weakref
import zipfile
from collections.abc import Generator, Sequence

import numpy as np
from etils import epath

from drift_jax.metrics import files
from drift_jax.metrics.batches import Batch
from drift_jax.metrics.sample_files import IMAGES, LABELS
from drift_jax.system import processes


def _archive(
  path: epath.Path, shape: tuple[int, ...], labels: np.ndarray
) -> Generator[None, np.ndarray | None]:
  """Writes an .npz of images that are sent; None, sent, ends it.

  The file appears then; if the generator is closed before, it never does.

  Args:
    shape: of all images, [N, H, W, 3].
    labels: [N], theirs.
  """
  # 50,000 images of 256 px are 9.8 GB, which a plain zip file can't hold.
  images, numbers = (zipfile.ZipInfo(f"{key}.npy") for key in (IMAGES, LABELS))
  with (
    files.replacing(path) as temporary,
    zipfile.ZipFile(temporary, "w") as archive,
  ):
    with archive.open(images, "w", force_zip64=True) as member:
      header = {"descr": "|u1", "fortran_order": False, "shape": shape}
      np.lib.format.write_array_header_1_0(member, header)
      while (part := (yield)) is not None:
        member.write(np.ascontiguousarray(part).data)
    with archive.open(numbers, "w") as member:
      np.lib.format.write_array(member, labels.astype(np.int64))


def _close(archive: Generator[None, np.ndarray | None]) -> None:
  """Drops a file; says nothing of a full disk."""
  with contextlib.suppress(OSError, ValueError):
    archive.close()


class SampleWriter:
  """Writes generated images as ADM's evaluator reads them: an `Evaluator`.

  The images go to the file as they come, in the order of their numbers, from
  all processes; the first process writes. A file appears when it is whole. It
  is not compressed, so that `open_images` need not read it.
  """

  def __init__(self, paths: Sequence[files.PathLike], labels: np.ndarray):
    """Writes nothing yet.

    Args:
      paths: of the .npz files; each reset() goes on to the next one.
      labels: [N] integers, of the images that will come for each.

    Raises:
      ValueError: a path that comes twice.
    """
    self.name = "samples"
    self._paths = [epath.Path(path) for path in paths]
    if len(set(self._paths)) < len(self._paths):
      raise ValueError(f"files of samples must differ, got {paths}")
    self._labels = np.asarray(labels)
    self._started = 0
    self._written = 0
    self._held: Batch | None = None
    self._archive: Generator[None, np.ndarray | None] | None = None

  def reset(self) -> None:
    """Starts the next file; one that was begun and not finished is dropped."""
    self.close()
    self._started += 1
    self._written = 0

  def update(self, batch: Batch) -> None:
    """Appends the images of all processes.

    Raises:
      OSError: the file can't be written.
      ValueError: images out of order, or more than labels.
    """
    # Asked for now, fetched when the device has the next batch.
    _ = batch.pixels
    held, self._held = self._held, batch
    self._append(held)

  def result(self) -> dict[str, float]:
    """No figures; the file is there.

    Raises:
      OSError: the file can't be written.
      ValueError: there are fewer images than labels.
    """
    held, self._held = self._held, None
    self._append(held)
    if self._written != len(self._labels):
      self.close()
      raise ValueError(
        f"{self.name}: {self._written} images came, expected"
        f" {len(self._labels)}"
      )
    if self._archive is not None:
      with contextlib.suppress(StopIteration):
        self._archive.send(None)
    return {}

  def baseline(self) -> dict[str, float]:
    return {}

  def close(self) -> None:
    """Drops a file that is not finished."""
    self._held = None
    if self._archive is not None:
      self._abandon()
      self._archive = None

  def _append(self, batch: Batch | None) -> None:
    if batch is None:
      return
    index = np.concatenate(processes.gather(batch.index))
    end = self._written + len(index)
    expected = np.arange(self._written, end)
    if end > len(self._labels) or not np.array_equal(index, expected):
      raise ValueError(
        f"{self.name}: after {self._written} of {len(self._labels)} images come"
        f" those of the numbers {index.tolist()}"
      )
    parts = processes.gather(batch.rows(batch.pixels))
    self._written = end
    if not processes.is_first():
      return
    if self._archive is None:
      shape = (len(self._labels), *parts[0].shape[1:])
      path = self._paths[self._started - 1]
      self._archive = _archive(path, shape, self._labels)
      # Also when the writer or the program ends.
      self._abandon = weakref.finalize(self, _close, self._archive)
      next(self._archive)
    for part in parts:
      self._archive.send(part)
