"""Images: decoding, crops, batches."""

import importlib
import importlib.util
import io
import pathlib
import tarfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent import futures
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import plain
from benchmarks.timing import Case, Report
from drift_jax.data import decode, encoded
from drift_jax.data.images import ImageReader, MemoryReader
from drift_jax.data.loader import Loader
from drift_jax.data.readers import Reader
from drift_jax.data.sources import Source, open_source

SIZE = 256  # pixels
SPLIT = "train"


def open_images(path: pathlib.Path, decoder: str) -> encoded.EncodedSource:
  """A folder, or a tar of one."""
  kind = "folder" if path.is_dir() else "tar"
  source = open_source(
    f"{kind}:{path.resolve()}",
    split=SPLIT,
    data_dir="",
    class_order="",
    max_corrupt=0,
    decoder=decoder,
  )
  assert isinstance(source, encoded.EncodedSource)
  return source


def copy_some(
  images: pathlib.Path, limit: int, to: pathlib.Path
) -> list[pathlib.Path]:
  """Files spread evenly over `images`, into the folder `to` and `to`.tar."""
  source = open_images(images, "pillow")
  chosen = np.linspace(0, len(source) - 1, min(limit, len(source)), dtype=int)
  paths = []
  for index in chosen.tolist():
    folder = to / SPLIT / f"{source.labels[index]:05d}"
    folder.mkdir(parents=True, exist_ok=True)
    suffix = pathlib.PurePath(source.path(index)).suffix
    paths.append(folder / f"{index:08d}{suffix}")
    paths[-1].write_bytes(source.read_bytes(index))
  with tarfile.open(f"{to}.tar", "w") as archive:
    archive.add(to / SPLIT, SPLIT)
  return sorted(paths)


def decoders() -> list[str]:
  """Those of the package that are installed."""
  found = importlib.util.find_spec("simplejpeg")
  return ["pillow", "simplejpeg"] if found else ["pillow"]


def opencv() -> Any:
  """The module, None where it is not installed."""
  found = importlib.util.find_spec("cv2")
  return importlib.import_module("cv2") if found else None


def effect(
  images: Iterable[np.ndarray], reference: Iterable[np.ndarray]
) -> str:
  """How many images differ, and the PSNR of those."""
  pairs = zip(images, reference, strict=True)
  errors = [np.mean((a.astype(float) - b) ** 2) for a, b in pairs]
  changed = 10 * np.log10(255**2 / np.array([e for e in errors if e]))
  if not len(changed):
    return f"same pixels in all {len(errors)} images"
  return (
    f"other pixels in {len(changed)} of {len(errors)} images, PSNR of these "
    f"{changed.mean():.1f} dB on average, {changed.min():.1f} at worst"
  )


def image_reader(source: Source, size: int, crop: str) -> ImageReader:
  """Without flips, as the plain ways are."""
  return ImageReader(
    source,
    size=size,
    channels=3,
    crop=crop,
    crop_scale=plain.CROP_SCALE,
    flip=False,
    wire="uint8",
  )


def reading(reader: Reader) -> Case:
  """Every record, in calls of the reader's chunk."""
  rngs: list[np.random.Generator] = []
  blocks = np.split(
    np.arange(len(reader)), range(reader.chunk, len(reader), reader.chunk)
  )

  def before() -> None:
    rngs[:] = [np.random.default_rng(i) for i in range(len(reader))]

  def run() -> np.ndarray:
    return np.concatenate(
      [reader.read(b, rngs[b[0] : b[-1] + 1]) for b in blocks]
    )

  return Case(run, before)


def loading(reader: Reader, batch_size: int, batches: int) -> Case:
  """Batches by a loader with two threads, the first of them not timed."""
  loader = Loader(reader, batch_size=batch_size, seed=0, num_threads=2)

  def before() -> None:
    loader.seek(0)
    next(loader)

  def run() -> None:
    for _ in range(batches):
      next(loader)

  return Case(run, before, loader.close)


def records(case: Case) -> Any:
  """What one run gives."""
  case.before()
  return case.run()


def decode_rows(
  report: Report, paths: Sequence[pathlib.Path], what: str
) -> None:
  """Bytes in memory to pixels."""
  files = [path.read_bytes() for path in paths]

  def case(function: Callable[[bytes], np.ndarray]) -> Case:
    return Case(lambda: [function(file) for file in files])

  plainly = case(lambda file: np.asarray(plain.open_image(io.BytesIO(file))))
  ours = {
    name: case(lambda file, name=name: decode.decode(file, name))
    for name in decoders()
  }
  if cv2 := opencv():
    ours["opencv, not offered"] = case(lambda x: plain.opencv_decode(cv2, x))
  wanted = records(plainly)
  report.compare(
    f"decode, {what}, 1 thread",
    "images/s",
    len(files),
    plainly,
    ours,
    clock=time.thread_time,
    notes={name: effect(records(c), wanted) for name, c in ours.items()},
  )


def reader_rows(
  report: Report,
  what: str,
  readers: dict[str, ImageReader],
  record: Callable[[int], np.ndarray],
  others: dict[str, Case],
  *,
  exact: bool,
) -> None:
  """Files to records: by one thread, and to batches by two.

  Args:
    report: to add to.
    what: the section.
    readers: of the same images, by name.
    record: the plain way.
    others: plain ways to give other records.
    exact: whether the readers should give the plain way's records.
  """
  count = len(next(iter(readers.values())))

  def plainly() -> np.ndarray:
    return np.stack([record(i) for i in range(count)])

  def threaded() -> np.ndarray:
    return np.stack(list(pool.map(record, range(count))))

  ours = {name: reading(reader) for name, reader in readers.items()}
  wanted = plainly()
  compared = (ours if exact else {}) | others
  notes = {name: effect(records(c), wanted) for name, c in compared.items()}
  report.compare(
    f"{what}, 1 thread",
    "images/s",
    count,
    Case(plainly),
    ours | others,
    clock=time.thread_time,
    notes=notes,
  )
  with futures.ThreadPoolExecutor(2) as pool:
    report.compare(
      f"{what}, Loader, 2 threads",
      "images/s",
      count,
      Case(threaded),
      {name: loading(reader, count, 1) for name, reader in readers.items()},
    )


def photographs(
  report: Report, images: pathlib.Path, limit: int, temp: pathlib.Path
) -> None:
  """Decoding, and the two crops to 256 px."""
  paths = copy_some(images, limit, temp / "images")
  sizes = [Image.open(path).size for path in paths]
  width, height = np.median(sizes, axis=0).astype(int)
  decode_rows(report, paths, f"{len(paths)} images of about {width} x {height}")

  def readers(crop: str) -> dict[str, ImageReader]:
    return {
      f"{path.suffix[1:] or 'folder'}, {decoder}": image_reader(
        open_images(path, decoder), SIZE, crop
      )
      for path in (temp / "images", temp / "images.tar")
      for decoder in decoders()
    }

  others = {
    "Pillow's draft mode, not offered": Case(
      lambda: [plain.draft_crop(path, SIZE) for path in paths]
    )
  }
  if cv2 := opencv():
    others["opencv INTER_AREA, not offered"] = Case(
      lambda: [plain.opencv_crop(cv2, path, SIZE) for path in paths]
    )
  reader_rows(
    report,
    "centre crop to 256 px",
    readers("center"),
    lambda i: plain.center_crop(plain.open_image(paths[i]), SIZE),
    others,
    exact=True,
  )
  reader_rows(
    report,
    "random resized crop to 256 px",
    readers("random"),
    lambda i: plain.random_crop(plain.open_image(paths[i]), SIZE, i),
    {},
    exact=False,  # ours filters across the box's edge
  )
  report.memory("after these")


def small_images(
  report: Report, images: pathlib.Path, limit: int, temp: pathlib.Path
) -> None:
  """Images of one size: from files, and from memory."""
  paths = copy_some(images, limit, temp / "small")
  size = Image.open(paths[0]).width
  what = f"{size} x {size} px"
  decode_rows(report, paths, f"{len(paths)} images of {what}")
  files = {
    f"folder, {decoder}": image_reader(
      open_images(temp / "small", decoder), size, "center"
    )
    for decoder in decoders()
  }
  reader_rows(
    report,
    f"{what} from files",
    files,
    lambda i: np.asarray(plain.open_image(paths[i])),
    {},
    exact=True,
  )
  source = open_images(temp / "small", "pillow")
  reader = image_reader(source, size, "center")
  memory = {"MemoryReader": MemoryReader(reader, flip=False)}
  # An array, from which a plain script takes image after image.
  pixels = reader.pixels(np.arange(len(source)))
  reader_rows(
    report,
    f"{what} from memory",
    memory,
    pixels.__getitem__,
    {},
    exact=True,
  )
  report.memory("after these")
