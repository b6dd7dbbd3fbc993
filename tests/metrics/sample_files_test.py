"""Image files made elsewhere, and files of generated images for others."""

import io
import logging
import os
import tracemalloc
import zipfile

import numpy as np
import pytest
from PIL import Image

from drift_jax.metrics.evaluators import Evaluator
from drift_jax.metrics.images import to_uint8
from drift_jax.metrics.sample_files import open_images
from drift_jax.metrics.sample_folder import SampleFolder
from drift_jax.metrics.sample_writer import SampleWriter
from drift_jax.system import processes
from tests import process
from tests.data.pictures import cut, write
from tests.metrics.conftest import batch_of, full_disk

COUNT, SIDE = 7, 6


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.fixture
def path(tmp_path):
  return tmp_path / "images.npz"


# Reading an .npz.


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npz(path, save, order):
  images, labels = pixels(COUNT, SIDE, SIDE, 3), np.arange(COUNT)[::-1]
  # Two arrays before it: its place in the file is not the beginning.
  save(
    path, arr_1=labels, mu=np.zeros(3), arr_0=np.asarray(images, order=order)
  )
  opened = open_images(path)
  assert len(opened) == COUNT and opened.shape == (SIDE, SIDE, 3)
  assert opened.description == f"7 images of 6 x 6 px in {path}"
  np.testing.assert_array_equal(opened.labels, labels)
  for indices in ([0], [5, 1, 1, 6], [], range(COUNT)):
    got = opened.pixels(np.array(indices, np.int32))
    assert got.dtype == np.uint8 and got.flags.writeable
    np.testing.assert_array_equal(got, images[np.array(indices, int)])


@pytest.mark.parametrize("shape", [(3, 4, 4), (3, 4, 4, 1)])
def test_grey_npz_without_labels(path, shape):
  images = pixels(*shape)
  np.savez(path, images)
  opened = open_images(str(path))
  assert opened.shape == (4, 4, 3) and opened.labels is None
  want = np.stack([images.reshape(3, 4, 4)] * 3, axis=-1)
  np.testing.assert_array_equal(opened.pixels(np.array([2, 0])), want[[2, 0]])


def test_npz_stays_on_the_disk(path):
  images = pixels(50, 128, 128, 3)
  np.savez(path, images)
  tracemalloc.start()
  try:
    opened = open_images(path)
    few = opened.pixels(np.array([49, 3]))
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  np.testing.assert_array_equal(few, images[[49, 3]])
  assert peak < images.nbytes / 5


FEW = pixels(4, 4, 4, 3)


@pytest.mark.parametrize(
  ("images", "message"),
  [
    (FEW.astype(np.float32), r"float32 \[4, 4, 4, 3\], want uint8 in"),
    (np.array([{}, None], object), "found object .* want uint8"),
    (pixels(4, 3, 4, 4), r"uint8 \[4, 3, 4, 4\], want \[N, H, W, 3"),
    (FEW[0, 0], r"want \[N, H, W, 3\]"),
    (FEW[:0], r"want \[N, H, W, 3\]"),
    (FEW[:, :, :3], "want square images"),
    (FEW[:1], "want at least two images"),
  ],
)
def test_other_images(path, images, message):
  np.savez(path, images)
  with pytest.raises(ValueError, match=f"images.npz.*{message}"):
    open_images(path)


def test_other_arrays(path):
  np.savez(path, images=FEW)
  with pytest.raises(ValueError, match=r"no array 'arr_0', but \['images'\]"):
    open_images(path)
  for labels in (np.zeros(3, int), np.zeros(4), np.array([{}] * 4)):
    np.savez(path, FEW, labels)
    with pytest.raises(ValueError, match=r"arr_1: found .*want integers \[4\]"):
      open_images(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_npz(path, save):
  save(path, pixels(COUNT, SIDE, SIDE, 3))
  whole = path.read_bytes()
  # The beginning is lost: the table of contents at the end is not.
  path.write_bytes(whole[len(whole) // 2 :])
  with pytest.raises(ValueError, match="images.npz is damaged"):
    open_images(path)
  with pytest.raises(FileNotFoundError, match="none.npz"):
    open_images(path.parent / "none.npz")


def test_holes_in_an_npz(path):
  """A copy that left its middle out: black images, but for the checksum."""
  np.savez(path, arr_0=pixels(40, 64, 64, 3))
  size = path.stat().st_size
  data = path.read_bytes()
  with path.open("wb") as file:
    file.write(data[: size // 4])
    file.seek(size // 2)
    file.write(data[size // 2 :])
  with path.open("rb") as file:
    if file.seek(0, os.SEEK_HOLE) == size:
      pytest.skip("the file system keeps no holes")
  with pytest.raises(ValueError, match="images.npz is damaged: Bad CRC"):
    open_images(path)


@pytest.mark.parametrize("compression", [0, zipfile.ZIP_DEFLATED])
def test_a_member_that_is_no_whole_array(path, compression):
  whole = io.BytesIO()
  np.save(whole, pixels(COUNT, SIDE, SIDE, 3))
  for content, message in (
    (whole.getvalue()[:-1], "are 756 bytes, but it has 755"),
    (whole.getvalue()[:40], "arr_0: EOF"),
    (b"what is this", "arr_0: the magic string is not correct"),
    (b"\x93NUMPY\x07\x00", r"arr_0: version \(7, 0\) of the .npy format"),
  ):
    with zipfile.ZipFile(path, "w", compression) as archive:
      archive.writestr("arr_0.npy", content)
    with pytest.raises(ValueError, match=f"images.npz.*{message}"):
      open_images(path)


# Reading a folder.


@pytest.fixture
def folder(tmp_path):
  """Five files in the order of their paths."""
  folder = tmp_path / "images"
  for seed, name in enumerate(
    ("a/1.png", "a/10.PNG", "a/2.webp", "b.png", "c/d/e.png")
  ):
    write(folder / name, seed, (SIDE, SIDE))
  return folder


def test_folder(folder, caplog):
  opened = open_images(folder)
  assert len(opened) == 5 and opened.shape == (SIDE, SIDE, 3)
  assert opened.labels is None and not caplog.records
  for indices in ([4, 2, 2], [], range(5)):
    got = opened.pixels(np.array(indices, np.int32))
    assert got.shape == (len(indices), SIDE, SIDE, 3) and got.dtype == np.uint8
    for row, index in zip(got, indices, strict=True):
      np.testing.assert_array_equal(row, pixels(SIDE, SIDE, 3, seed=index))


def test_folder_of_other_kinds_of_images(tmp_path, caplog):
  grey, rgba = pixels(SIDE, SIDE), pixels(SIDE, SIDE, 4)
  smooth = np.full((SIDE, SIDE, 3), (200, 100, 30), np.uint8)
  images = {"0.png": grey, "1.png": rgba, "2.jpg": smooth, "3.JPEG": smooth}
  for name, image in images.items():
    Image.fromarray(image).save(tmp_path / name)
  # Neither hidden files nor other ones are images.
  for name in (".hidden.png", ".hidden/4.png", "grid.bmp", "notes.txt"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("no image")
  with caplog.at_level(logging.WARNING):
    opened = open_images(tmp_path)
  assert "2 files do not end in" in caplog.text and "grid.bmp" in caplog.text
  assert len(opened) == 4
  got = opened.pixels(np.arange(4))
  np.testing.assert_array_equal(got[0], np.stack([grey] * 3, axis=-1))
  np.testing.assert_array_equal(got[1], rgba[..., :3])
  assert np.abs(got[2:].astype(int) - smooth).max() <= 3


def test_links_are_followed_but_no_folder_is_counted_twice(folder, tmp_path):
  linked = tmp_path / "linked"
  linked.mkdir()
  (linked / "inside").symlink_to(folder / "a")
  (linked / "z.png").symlink_to(folder / "b.png")
  opened = open_images(linked)
  np.testing.assert_array_equal(
    opened.pixels(np.arange(4)), open_images(folder).pixels(np.arange(4))
  )
  count = len(open_images(folder))
  (folder / "again").symlink_to(folder)
  # Thumbnails that a NAS keeps beside images.
  write(folder / "@eaDir/a.png/thumbnail.png", 0, (SIDE, SIDE))
  assert len(open_images(folder)) == count


def test_samples_that_are_not_all_there(tmp_path):
  samples = SampleFolder(tmp_path / "out", {"seed": 0}, [0, 1, 2])
  samples.close()
  for number in range(2):
    write(tmp_path / f"out/00000{number}.png", number, (SIDE, SIDE))
  with pytest.raises(ValueError, match="2 of the 3 images that samples.json"):
    open_images(tmp_path / "out")
  (tmp_path / "out/samples.json").write_text("[1, 2]")  # of another program
  assert len(open_images(tmp_path / "out")) == 2


def test_folders_that_hold_something_else(folder, tmp_path):
  for name, size, message in (
    ("c/a.png", (8, 8), "8 x 8 px .*want square images of one size, 6 x 6"),
    ("b2.png", (6, 7), "6 x 7 px .*want square images of one size, 6 x 6"),
    ("a/0.png", (7, 6), "7 x 6 .*want square images"),
  ):
    write(folder / name, 9, size)
    with pytest.raises(ValueError, match=f"{name} is {message}"):
      open_images(folder)
  (folder / "a/0.png").write_text("no image")
  with pytest.raises(ValueError, match="0.png can't be read as an image"):
    open_images(folder)
  (tmp_path / "few").mkdir()
  for count in range(2):
    with pytest.raises(ValueError, match=f"at least two images, found {count}"):
      open_images(tmp_path / "few")
    write(tmp_path / "few/1.png", 0, (SIDE, SIDE))


def test_what_happens_to_files_later(folder):
  """A header may be whole where the image is not."""
  cut(folder / "c/d/e.png")
  opened = open_images(folder)
  assert len(opened.pixels(np.arange(4))) == 4
  write(folder / "b.png", 3, (SIDE, SIDE + 1))
  (folder / "a/2.webp").unlink()
  for number, message in (
    (4, "e.png can't be read as an image"),
    (3, "b.png is 6 x 7 px"),
    (2, "2.webp can't be read"),
  ):
    with pytest.raises(ValueError, match=message):
      opened.pixels(np.array([number]))


# Writing.


LABELS = (np.arange(COUNT) * 3) % 5


def samples(seed: int = 0, side: int = SIDE) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=(COUNT, side, side, 3))


def write_samples(writer: SampleWriter, images: np.ndarray, size: int = 3):
  """Batches of `size` images, the last one filled up."""
  for start in range(0, len(images), size):
    part = slice(start, min(start + size, len(images)))
    padding = size - (part.stop - start)
    labels = LABELS[part].astype(np.int32)
    images = images.astype(np.float32)
    writer.update(batch_of(images[part], labels, start, padding))


def names(folder) -> list[str]:
  return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("channels", [1, 3])
def test_files_of_samples(tmp_path, channels):
  paths = [tmp_path / f"new/{i}.npz" for i in range(3)]
  writer = SampleWriter(paths, LABELS)
  assert isinstance(writer, Evaluator)
  for path, seed, size in zip(paths, (0, 1, 0), (3, COUNT, 4), strict=True):
    images = samples(seed)[..., :channels]
    writer.reset()
    write_samples(writer, images, size)
    assert not path.exists()
    assert writer.result() == {} and writer.baseline() == {}
    want = np.broadcast_to(to_uint8(images), (COUNT, SIDE, SIDE, 3))
    with np.load(path) as archive:
      assert archive.files == ["arr_0", "arr_1"]
      assert archive["arr_1"].dtype == np.int64
    # Stored, not compressed: it need not be read whole.
    infos = zipfile.ZipFile(path).infolist()
    assert {info.compress_type for info in infos} == {zipfile.ZIP_STORED}
    assert {info.date_time[0] for info in infos} == {1980}, "says when"
    opened = open_images(path)
    np.testing.assert_array_equal(opened.pixels(np.arange(COUNT)), want)
    np.testing.assert_array_equal(opened.labels, LABELS)
  assert names(tmp_path / "new") == ["0.npz", "1.npz", "2.npz"]
  # The same samples make the same file.
  assert paths[0].read_bytes() == paths[2].read_bytes()


@pytest.mark.parametrize("end", ["reset", "close", "del", "result"])
def test_a_file_that_is_not_finished(tmp_path, end):
  """An older one stays, and no trace of the new one."""
  path = tmp_path / "0.npz"
  path.write_text("older")
  writer = SampleWriter([path, tmp_path / "1.npz"], LABELS)
  writer.reset()
  write_samples(writer, samples()[:4], 2)
  assert len(names(tmp_path)) == 2, "nothing is being written"
  if end == "result":
    with pytest.raises(ValueError, match="4 images came, expected 7"):
      writer.result()
  elif end == "del":
    del writer
  else:
    getattr(writer, end)()
  assert names(tmp_path) == ["0.npz"] and path.read_text() == "older"


@pytest.mark.system
def test_a_program_that_ends(tmp_path):
  """By an exception, with the writer still alive."""
  code = """
import sys
import numpy as np
from absl import flags
from drift_jax.metrics.batches import Batch
from drift_jax.metrics.images import to_rgb
from drift_jax.metrics.sample_writer import SampleWriter
flags.FLAGS.mark_as_parsed()
writer = SampleWriter([sys.argv[1]], np.zeros(9, int))
writer.reset()
for i in range(5):
  writer.update(Batch(np.zeros((1, 64, 64, 3), np.float32),
    np.array([i], np.int32), np.zeros(1, np.int32), to_rgb))
import pathlib
print(len(list(pathlib.Path(sys.argv[1]).parent.iterdir())))
sys.exit("Error: enough")
"""
  done = process.call("-c", code, tmp_path / "0.npz")
  assert done.returncode == 1 and done.stdout == "1\n"
  assert done.stderr.splitlines()[-1] == "Error: enough"
  assert names(tmp_path) == []


def test_a_full_disk(tmp_path):
  path = tmp_path / "0.npz"
  path.write_text("older")
  writer = SampleWriter([path], LABELS)
  writer.reset()
  with full_disk(100_000):
    with pytest.raises(OSError, match="File too large"):
      write_samples(writer, samples(side=128))
      writer.result()
    writer.close()
  assert names(tmp_path) == ["0.npz"] and path.read_text() == "older"


@pytest.mark.parametrize(("start", "count"), [(1, 2), (0, 8)])
def test_samples_that_are_not_expected(tmp_path, start, count):
  writer = SampleWriter([tmp_path / "0.npz"], LABELS)
  writer.reset()
  images = np.zeros((count, 4, 4, 3), np.float32)
  writer.update(batch_of(images, np.zeros(count, np.int32), start))
  with pytest.raises(ValueError, match="after 0 of 7 images come those of the"):
    writer.result()
  with pytest.raises(ValueError, match="files of samples must differ"):
    SampleWriter([tmp_path / "0", str(tmp_path / "0")], LABELS)
  assert names(tmp_path) == []


@pytest.mark.parametrize("process", [0, 1])
def test_of_two_processes_the_first_writes_all(tmp_path, monkeypatch, process):
  """Each holds its half of every batch of 4."""
  images, labels = samples().astype(np.float32), LABELS.astype(np.int32)
  batches = [
    [batch_of(images[a:b], labels[a:b], a) for a, b in halves]
    for halves in ([(0, 2), (2, 4)], [(4, 6), (6, 7)])
  ]
  gathered = []
  for batch in batches:
    gathered.append([one.index for one in batch])
    gathered.append([np.asarray(one.pixels) for one in batch])

  def gather(array):
    parts = gathered.pop(0)
    np.testing.assert_array_equal(array, parts[process])
    return parts

  monkeypatch.setattr(processes, "gather", gather)
  monkeypatch.setattr(processes, "is_first", lambda: process == 0)
  path = tmp_path / "0.npz"
  writer = SampleWriter([path], LABELS)
  writer.reset()
  for batch in batches:
    writer.update(batch[process])
  writer.result()
  assert not gathered
  assert names(tmp_path) == (["0.npz"] if process == 0 else [])
  if process == 0:
    opened = open_images(path).pixels(np.arange(COUNT))
    np.testing.assert_array_equal(opened, to_uint8(images))
