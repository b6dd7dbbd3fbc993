"""Files of 8-bit images: those made elsewhere, and generated ones for others.

ADM's evaluator (arXiv:2105.05233) set the format: an .npz of `arr_0`, uint8
[N, H, W, 3], and of `arr_1`, integers [N], where the images have labels.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import pathlib
import struct
import weakref
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import NamedTuple

import numpy as np
from absl import logging
from etils import epath

from drift_jax.data import decode
from drift_jax.metrics import files
from drift_jax.metrics.batches import Batch
from drift_jax.metrics.sample_folder import FACTS_FILE
from drift_jax.system import paths, processes

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_IMAGES, _LABELS = "arr_0", "arr_1"
# What zipfile raises for bytes that it can't make sense of, or has no means to.
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError)
_READ_BYTES = 2**24
# Of a zip file's local header; then come a name and something extra, whose
# lengths are its last two numbers.
_LOCAL_HEADER = struct.Struct("<26xHH")


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
  """8-bit RGB images of one size, read when they are needed.

  Attributes:
    description: how many they are, of what size, and where, for messages.
    count: N >= 2.
    shape: (H, W, 3), H = W.
    labels: [N] integers, None where nobody recorded them.
    read: see `pixels`.
  """

  description: str
  count: int
  shape: tuple[int, int, int]
  labels: np.ndarray | None
  read: Callable[[np.ndarray], np.ndarray]

  def __len__(self) -> int:
    return self.count

  def pixels(self, indices: np.ndarray) -> np.ndarray:
    """uint8 [n, H, W, 3]: the images of these numbers.

    Raises:
      ValueError: an image file that can't be decoded, naming it.
    """
    return self.read(indices)


def open_images(path: files.PathLike) -> ImageSet:
  """Images made elsewhere; grey ones become three equal channels.

  Args:
    path: an .npz as ADM's evaluator reads it (grey [N, H, W] or [N, H, W, 1]
      too), which is not read whole unless it is compressed; or a folder, whose
      .png, .jpg, .jpeg and .webp files are the images, in the order of their
      paths, those of folders within it included, hidden ones not. Links are
      followed, but no folder is read twice.

  Raises:
    FileNotFoundError: when there is none.
    ValueError: images that are not square, 8-bit and of one size, fewer than
      two, or files that can't be read, naming what was found and expected.
  """
  path = pathlib.Path(paths.expand(path))
  return _open_folder(path) if path.is_dir() else _open_npz(path)


def _described(path: pathlib.Path, count: int, side: int) -> str:
  return f"{count} images of {side} x {side} px in {path}"


class _Header(NamedTuple):
  """What precedes the numbers of a .npy file, and its length in bytes."""

  shape: tuple[int, ...]
  fortran: bool
  dtype: np.dtype
  length: int

  @classmethod
  def read(cls, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> "_Header":
    """Raises ValueError where there is none."""
    with archive.open(member) as file:
      version = np.lib.format.read_magic(file)
      read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
      }.get(version)
      if read is None:
        raise ValueError(f"version {version} of the .npy format is not known")
      return cls(*read(file), file.tell())

  def __str__(self) -> str:
    return f"{self.dtype} {list(self.shape)}"


def _open_npz(path: pathlib.Path) -> ImageSet:
  # A missing file is no zip file either: opening it says so.
  with path.open("rb") as file:
    if not zipfile.is_zipfile(file):
      raise ValueError(
        f"{path} is no .npz file (or is cut short), and no folder"
      )
  try:
    files.check_one_zip(path)
    with zipfile.ZipFile(path) as archive:
      images = _array(path, archive, _IMAGES, _check_images)
      if images.ndim == 3:
        images = images[..., None]
      labels = None
      if f"{_LABELS}.npy" in archive.namelist():
        check = functools.partial(_check_labels, len(images))
        labels = np.asarray(_array(path, archive, _LABELS, check))
  except _DAMAGED as error:
    raise ValueError(f"{path} is damaged: {error}") from error
  count, side, _, channels = images.shape

  def read(indices: np.ndarray) -> np.ndarray:
    # Picking rows by a list of numbers copies them out of the file.
    return np.asarray(images[indices]).repeat(3 // channels, axis=-1)

  return ImageSet(
    _described(path, count, side), count, (side, side, 3), labels, read
  )


def _check_images(header: _Header) -> str | None:
  """What is wrong with an array of images; None where nothing is."""
  if header.dtype != np.uint8:
    return (
      "want uint8 in [0, 255]: (255 * x.clip(0, 1)).astype('uint8') makes it"
      " of x in [0, 1], and (127.5 * (x.clip(-1, 1) + 1)).astype('uint8') of x"
      " in [-1, 1]"
    )
  shape = header.shape
  if (
    len(shape) not in (3, 4)
    or 0 in shape[1:]
    or shape[3:]
    not in (
      (),
      (1,),
      (3,),
    )
  ):
    return "want [N, H, W, 3], or [N, H, W, 1] or [N, H, W] of grey images"
  if shape[1] != shape[2]:
    return "want square images"
  if shape[0] < 2:
    return "want at least two images"
  return None


def _check_labels(count: int, header: _Header) -> str | None:
  """What is wrong with the labels of so many images; None: nothing."""
  if header.dtype.kind in "iu" and header.shape == (count,):
    return None
  return f"want integers [{count}], the labels of the images"


def _array(
  path: pathlib.Path,
  archive: zipfile.ZipFile,
  key: str,
  check: Callable[[_Header], str | None],
) -> np.ndarray:
  """An array of an .npz, left in the file where that is possible.

  Raises:
    ValueError: no such array, one that `check` has something against, or bytes
      that are none.
  """
  try:
    info = archive.getinfo(f"{key}.npy")
  except KeyError:
    raise ValueError(
      f"{path} holds no array {key!r}, it holds"
      f" {[name.removesuffix('.npy') for name in archive.namelist()]}"
    ) from None
  try:
    header = _Header.read(archive, info)
    # Before anything is read: it may be large, or hold objects.
    wrong = check(header)
    if wrong is not None:
      raise ValueError(f"found {header}, {wrong}")
    held = info.file_size - header.length
    needed = math.prod(header.shape) * header.dtype.itemsize
    if held != needed:
      raise ValueError(f"{header} are {needed} bytes, but it has {held}")
    if info.compress_type != zipfile.ZIP_STORED:
      with archive.open(info) as member:
        return np.lib.format.read_array(member)
    with path.open("rb") as file:
      file.seek(info.header_offset)
      lengths = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
      start = info.header_offset + _LOCAL_HEADER.size + sum(lengths)
      if file.seek(start, os.SEEK_HOLE) < start + info.file_size:
        # Images of zeros, or what a copy left out: the checksum knows.
        with archive.open(info) as member:
          while member.read(_READ_BYTES):
            pass
    return np.memmap(
      path,
      header.dtype,
      "r",
      offset=start + header.length,
      shape=header.shape,
      order="F" if header.fortran else "C",
    )
  except ValueError as error:
    raise ValueError(f"{path}: {key}: {error}") from error


def _open_folder(path: pathlib.Path) -> ImageSet:
  images, others = _listed(path)
  if others:
    logging.warning(
      "%s: %d files do not end in %s and are left out, e.g. %s",
      path,
      len(others),
      ", ".join(SUFFIXES),
      others[0],
    )
  _check_complete(path, len(images))
  if len(images) < 2:
    raise ValueError(
      f"{path}: want at least two images (*{', *'.join(SUFFIXES)}), found"
      f" {len(images)}"
    )
  with futures.ThreadPoolExecutor() as pool:
    sizes = list(pool.map(_size, images))
  width, height = sizes[0]
  if width != height:
    raise ValueError(
      f"{images[0]} is {width} x {height} px (width x height), want square"
      " images"
    )
  for other, size in zip(images, sizes, strict=True):
    _check_size(other, size, width)
  shape = (height, width, 3)

  def read(indices: np.ndarray) -> np.ndarray:
    out = np.empty((len(indices), *shape), np.uint8)

    def fill(row: np.ndarray, index: int) -> None:
      row[...] = _decoded(images[index], width)

    with futures.ThreadPoolExecutor() as pool:
      # Raises what a thread raised.
      list(pool.map(fill, out, indices.tolist()))
    return out

  return ImageSet(
    _described(path, len(images), width), len(images), shape, None, read
  )


def _check_complete(path: pathlib.Path, count: int) -> None:
  """Raises ValueError for a folder of samples that is not finished."""
  facts = path / FACTS_FILE
  if not facts.exists():
    return
  try:
    wanted = len(json.loads(facts.read_text())["labels"])
  except (ValueError, KeyError, TypeError):
    return  # of another program
  if count < wanted:
    raise ValueError(
      f"{path}: {count} of the {wanted} images that {FACTS_FILE} lists are "
      "there: give drift_jax.sample the same command again, which makes the "
      f"missing ones, or remove {FACTS_FILE}"
    )


def _listed(path: pathlib.Path) -> tuple[list[str], list[str]]:
  """Paths of the images in a folder, sorted, and of the other files."""
  images: list[str] = []
  others: list[str] = []
  for folder, names in paths.walk(path):
    for name in names:
      is_image = name.lower().endswith(SUFFIXES)
      (images if is_image else others).append(os.path.join(folder, name))
  return sorted(images), sorted(others)


def _size(path: str) -> tuple[int, int]:
  """(width, height) that the header of an image file says."""
  try:
    with decode.opened(path) as image:
      return image.size
  except decode.LimitError as error:
    raise ValueError(f"{path}: {error}") from error
  except (OSError, decode.DecodeError) as error:
    raise ValueError(f"{path} can't be read as an image: {error}") from error


def _check_size(path: str, size: tuple[int, ...], side: int) -> None:
  if size != (side, side):
    raise ValueError(
      f"{path} is {size[0]} x {size[1]} px (width x height), but the images"
      f" before it are {side} x {side}"
    )


def _decoded(path: str, side: int) -> np.ndarray:
  """uint8 [side, side, 3]."""
  try:
    pixels = decode.decode(pathlib.Path(path).read_bytes(), "pillow")
  except decode.LimitError as error:
    raise ValueError(f"{path}: {error}") from error
  except (OSError, decode.DecodeError) as error:
    raise ValueError(f"{path} can't be read as an image: {error}") from error
  _check_size(path, pixels.shape[1::-1], side)
  return pixels


class _Unfinished(Exception):
  """Ends the writing of a file that is not to appear."""


def _abandon(stack: contextlib.ExitStack) -> None:
  """Closes what is open as after an error; says nothing of a full disk."""
  with contextlib.suppress(_Unfinished, OSError, ValueError), stack:
    raise _Unfinished


class _Archive:
  """An .npz of images that is being written; only `finish` makes it appear.

  Attributes:
    abandon: closes and removes what was written, unless it is finished. It
      happens by itself when the object or the program ends.
  """

  def __init__(self, path: epath.Path, shape: tuple[int, ...]):
    """Opens the file for uint8 images of `shape`, [N, H, W, 3].

    Raises:
      OSError: it can't be written.
    """
    self._shape = shape
    self._stack = contextlib.ExitStack()
    self.abandon = weakref.finalize(self, _abandon, self._stack)
    enter = self._stack.enter_context
    temporary = enter(files.replacing(path))
    self._zip = enter(zipfile.ZipFile(enter(temporary.open("wb")), "w"))
    # 50,000 images of 256 px are 9.8 GB, which a plain zip file can't hold.
    self._member = enter(
      self._zip.open(zipfile.ZipInfo(f"{_IMAGES}.npy"), "w", force_zip64=True)
    )
    np.lib.format.write_array_header_1_0(
      self._member, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )

  def add(self, images: np.ndarray) -> None:
    """Appends uint8 [b, H, W, 3].

    Raises:
      OSError: it can't be written.
      ValueError: another dtype or shape.
    """
    if images.dtype != np.uint8 or images.shape[1:] != self._shape[1:]:
      raise ValueError(
        f"samples became {images.dtype} {images.shape}, want uint8 [b,"
        f" {', '.join(map(str, self._shape[1:]))}]"
      )
    self._member.write(np.ascontiguousarray(images).data)

  def finish(self, labels: np.ndarray) -> None:
    """Appends labels [N] and gives the file its name.

    Raises:
      OSError: it can't be written.
    """
    self._member.close()
    with self._zip.open(zipfile.ZipInfo(f"{_LABELS}.npy"), "w") as member:
      np.lib.format.write_array(member, labels.astype(np.int64))
    self._stack.close()
    self.abandon.detach()


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
      ValueError: no labels, or a path that comes twice.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not labels.size or labels.dtype.kind not in "iu":
      raise ValueError(
        f"labels must be a non-empty [N] integer array, got {labels.dtype}"
        f" {labels.shape}"
      )
    self.name = "samples"
    self._paths = [epath.Path(path) for path in paths]
    if len(set(self._paths)) < len(self._paths):
      raise ValueError(f"files of samples must differ, got {paths}")
    self._labels = labels
    self._started = 0
    self._written = 0
    self._held: Batch | None = None
    self._archive: _Archive | None = None

  def reset(self) -> None:
    """Starts the next file; one that was begun and not finished is dropped.

    Raises:
      ValueError: there is no path left.
    """
    self.close()
    if self._started == len(self._paths):
      raise ValueError(
        f"{self.name}: there are {len(self._paths)} files, and one more is to"
        " be started"
      )
    self._started += 1
    self._written = 0

  def update(self, batch: Batch) -> None:
    """Appends the images of all processes.

    Raises:
      OSError: the file can't be written.
      ValueError: images out of order, more than labels, or with other labels.
    """
    if not self._started:
      raise ValueError(f"{self.name}: update() comes before reset()")
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
      written = self._written
      self.close()
      raise ValueError(
        f"{self.name}: {written} images came, expected {len(self._labels)}"
      )
    archive, self._archive = self._archive, None
    if archive is not None:
      archive.finish(self._labels)
    return {}

  def baseline(self) -> dict[str, float]:
    return {}

  def close(self) -> None:
    """Drops a file that is not finished."""
    self._held = None
    if self._archive is not None:
      self._archive.abandon()
      self._archive = None

  def _append(self, batch: Batch | None) -> None:
    if batch is None:
      return
    index = np.concatenate(processes.gather(batch.index))
    end = self._written + len(index)
    if end > len(self._labels) or not np.array_equal(
      index, np.arange(self._written, end)
    ):
      raise ValueError(
        f"{self.name}: after {self._written} of {len(self._labels)} images come"
        f" those of the numbers {index.tolist()}"
      )
    if not np.array_equal(batch.labels, self._labels[batch.index]):
      raise ValueError(f"{self.name}: images came with other labels")
    parts = processes.gather(batch.rows(batch.pixels))
    self._written = end
    if not processes.is_first():
      return
    if self._archive is None:
      shape = (len(self._labels), *parts[0].shape[1:])
      self._archive = _Archive(self._paths[self._started - 1], shape)
    for part in parts:
      self._archive.add(part)
