"""Files of 8-bit images that were made elsewhere.

ADM's evaluator (arXiv:2105.05233) set the format: an .npz of `arr_0`, uint8
[N, H, W, 3], and of `arr_1`, integers [N], if the images have labels.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import struct
import zipfile
from collections.abc import Callable, Iterator
from concurrent import futures

import numpy as np

from drift_jax.data import decode
from drift_jax.metrics import files
from drift_jax.metrics.sample_folder import FACTS_FILE
from drift_jax.system import options, paths
from drift_jax.system.console import logger

IMAGES, LABELS = "arr_0", "arr_1"
_READ_BYTES = 2**24
# A zip file's local header. A name and extra data follow, whose lengths are its
# last two numbers.
_LOCAL_HEADER = struct.Struct("<26xHH")


@dataclasses.dataclass(frozen=True, eq=False)
class ImageSet:
  """8-bit RGB images of one size, read when they are needed.

  Attributes:
    path: where they are.
    count: N >= 2.
    side: their width and height in pixels.
    labels: [N] integers, None if nobody recorded them.
    pixels: numbers [n] -> uint8 [n, H, W, 3]; ValueError for an image file that
      can't be decoded, naming it.
  """

  path: pathlib.Path
  count: int
  side: int
  labels: np.ndarray | None
  pixels: Callable[[np.ndarray], np.ndarray]

  def __post_init__(self) -> None:
    if self.count < 2:
      raise ValueError(
        f"{self.path}: want at least two images, found {self.count}"
      )

  def __len__(self) -> int:
    return self.count

  @property
  def shape(self) -> tuple[int, int, int]:
    """(H, W, 3)."""
    return self.side, self.side, 3

  @property
  def description(self) -> str:
    """Their number, size and place, for messages."""
    return f"{self.count} images of {self.side} x {self.side} px in {self.path}"


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
      two, or files that can't be read, naming both.
  """
  path = pathlib.Path(paths.expand(path))
  return _open_folder(path) if path.is_dir() else _open_npz(path)


def _header(
  archive: zipfile.ZipFile, member: zipfile.ZipInfo
) -> tuple[tuple[int, ...], bool, np.dtype, int]:
  """(shape, Fortran's order, dtype, length in bytes) of a .npy's header.

  Raises:
    ValueError: there is none.
  """
  with archive.open(member) as file:
    version = np.lib.format.read_magic(file)
    name = "read_array_header_{}_{}".format(*version)
    read = getattr(np.lib.format, name, None)
    if read is None:
      raise ValueError(f"version {version} of the .npy format is not known")
    return *read(file), file.tell()


def _open_npz(path: pathlib.Path) -> ImageSet:
  with files.reading_npz(path), zipfile.ZipFile(path) as archive:
    images = _array(path, archive, IMAGES, _images_wrong)
    if images.ndim == 3:
      images = images[..., None]
    count, side, _, channels = images.shape

    def labels_wrong(shape: tuple[int, ...], dtype: np.dtype) -> str:
      fits = dtype.kind in "iu" and shape == (count,)
      return "" if fits else f"want integers [{count}], labels of the images"

    labels = None
    if f"{LABELS}.npy" in archive.namelist():
      labels = np.asarray(_array(path, archive, LABELS, labels_wrong))

  def pixels(indices: np.ndarray) -> np.ndarray:
    # Picking rows by a list of numbers copies them out of the file.
    return np.asarray(images[indices]).repeat(3 // channels, axis=-1)

  return ImageSet(path, count, side, labels, pixels)


def _images_wrong(shape: tuple[int, ...], dtype: np.dtype) -> str:
  """Says what is wrong with an array of images; '': nothing."""
  if dtype != np.uint8:
    return (
      "want uint8 in [0, 255]: (255 * x.clip(0, 1)).astype('uint8') makes it"
      " of x in [0, 1], and (127.5 * (x.clip(-1, 1) + 1)).astype('uint8') of x"
      " in [-1, 1]"
    )
  if len(shape) < 3 or shape[3:] not in ((), (1,), (3,)) or 0 in shape:
    return "want [N, H, W, 3], or [N, H, W, 1] or [N, H, W] of grey images"
  return "" if shape[1] == shape[2] else "want square images"


def _array(
  path: pathlib.Path,
  archive: zipfile.ZipFile,
  key: str,
  wrong: Callable[[tuple[int, ...], np.dtype], str],
) -> np.ndarray:
  """An array of an .npz, left in the file if that is possible.

  Raises:
    ValueError: no such array, one that `wrong` has something against, or bytes
      that are none.
  """
  if f"{key}.npy" not in archive.namelist():
    names = [name.removesuffix(".npy") for name in archive.namelist()]
    raise ValueError(f"there is no array {key!r}, but {names}")
  info = archive.getinfo(f"{key}.npy")
  try:
    # 1. Before anything is read: it may be large, or hold objects.
    shape, fortran, dtype, length = _header(archive, info)
    description = f"{dtype} {list(shape)}"
    if fault := wrong(shape, dtype):
      raise ValueError(f"found {description}, {fault}")
    held = info.file_size - length
    needed = math.prod(shape) * dtype.itemsize
    if held != needed:
      raise ValueError(f"{description} are {needed} bytes, but it has {held}")
    # 2. Compressed, it is read.
    if info.compress_type != zipfile.ZIP_STORED:
      with archive.open(info) as member:
        return np.lib.format.read_array(member)
    # 3. Stored, it is mapped.
    with path.open("rb") as file:
      file.seek(info.header_offset)
      lengths = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
      start = info.header_offset + _LOCAL_HEADER.size + sum(lengths)
      if file.seek(start, os.SEEK_HOLE) < start + info.file_size:
        # Images of zeros, or what a copy left out: the checksum knows.
        with archive.open(info) as member:
          while member.read(_READ_BYTES):
            pass
    order, start = "F" if fortran else "C", start + length
    return np.memmap(path, dtype, "r", start, shape, order)
  except ValueError as error:
    raise ValueError(f"{key}: {error}") from error


def _open_folder(path: pathlib.Path) -> ImageSet:
  images = _listed(path)
  _check_complete(path, len(images))
  with futures.ThreadPoolExecutor() as pool:
    sizes = list(pool.map(_size, images))
  side = sizes[0][0] if sizes else 0
  for image, size in zip(images, sizes, strict=True):
    _check_size(image, size, side)

  def pixels(indices: np.ndarray) -> np.ndarray:
    out = np.empty((len(indices), side, side, 3), np.uint8)

    def fill(row: np.ndarray, index: int) -> None:
      path = images[index]
      with _naming_image(path):
        image = decode.decode(pathlib.Path(path).read_bytes(), "pillow")
      _check_size(path, image.shape[1::-1], side)
      row[...] = image

    with futures.ThreadPoolExecutor() as pool:
      # Raises what a thread raised.
      list(pool.map(fill, out, indices.tolist()))
    return out

  return ImageSet(path, len(images), side, None, pixels)


def _check_complete(path: pathlib.Path, count: int) -> None:
  """Raises ValueError for a folder of samples that is not finished."""
  facts = path / FACTS_FILE
  if not facts.exists():
    return
  try:
    expected = len(json.loads(facts.read_text())["labels"])
  except (ValueError, KeyError, TypeError):
    return  # of another program
  if count < expected:
    raise ValueError(
      f"{path}: {count} of the {expected} images that {FACTS_FILE} lists are "
      "there: give drift_jax.sample the same command again, which makes the "
      f"missing ones, or remove {FACTS_FILE}"
    )


def _listed(path: pathlib.Path) -> list[str]:
  """Paths of the images in a folder, sorted; warns of other files."""
  images: list[str] = []
  others: list[str] = []
  for folder, names in paths.walk(path):
    for name in names:
      is_image = name.lower().endswith(options.PICTURES)
      (images if is_image else others).append(os.path.join(folder, name))
  if others:
    logger.warning(
      "%s: %d files do not end in %s and are left out, e.g. %s",
      path,
      len(others),
      ", ".join(options.PICTURES),
      others[0],
    )
  return sorted(images)


@contextlib.contextmanager
def _naming_image(path: str) -> Iterator[None]:
  """Gives the errors of a damaged or too large image its path."""
  try:
    yield
  except decode.LimitError as error:
    raise ValueError(f"{path}: {error}") from error
  except (OSError, decode.DecodeError) as error:
    raise ValueError(f"{path} can't be read as an image: {error}") from error


def _size(path: str) -> tuple[int, int]:
  """(width, height) that the header of an image file says."""
  with _naming_image(path), decode.opened(path) as image:
    return image.size


def _check_size(path: str, size: tuple[int, ...], side: int) -> None:
  if size != (side, side):
    raise ValueError(
      f"{path} is {size[0]} x {size[1]} px (width x height), want square images"
      f" of one size, {side} x {side}"
    )
