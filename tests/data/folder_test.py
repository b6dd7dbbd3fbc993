"""Folders and tars of images: layouts, labels, what is left out, damage."""

import io
import logging
import os
import pickle
import subprocess
import tarfile

import numpy as np
import pytest

from drift_jax.data import encoded, folder
from drift_jax.system import console
from tests.data.pictures import cut, picture, write

OPTIONS = {"class_order": "", "max_corrupt": 0, "decoder": "pillow"}


@pytest.fixture(autouse=True)
def _heard(monkeypatch):
  monkeypatch.setattr(console.logger, "propagate", True)


def make(kind, root, tmp_path, split="train", **options):
  """A source of the folder `root`, through a tar of it for kind 'tar'."""
  options = OPTIONS | options
  if kind == "folder":
    return folder.FolderSource(root, split=split, **options)
  path = tmp_path / "data.tar"
  with tarfile.open(path, "w") as archive:
    archive.add(root, arcname=root.name)
  return folder.TarSource(path, split=split, **options)


both = pytest.mark.parametrize("kind", ["folder", "tar"])


@pytest.fixture
def root(tmp_path):
  """train: 2 cats, 3 dogs, 1 emu; test: 1 cat, 1 emu."""
  root = tmp_path / "pets"
  names = ["train/dog/b.png", "train/dog/a.PNG", "train/dog/c.webp"]
  names += ["train/cat/2.png", "train/cat/10.png", "train/emu/x.png"]
  names += ["test/cat/z.png", "test/emu/y.png"]
  for seed, name in enumerate(names):
    write(root / name, seed)
  return root


@both
def test_split_folders(kind, root, tmp_path):
  train = make(kind, root, tmp_path)
  assert train.class_names == ("cat", "dog", "emu")
  assert train.labels.tolist() == [0, 0, 1, 1, 1, 2]
  assert train.labels.dtype == np.int32 and len(train) == 6
  names = [train.path(i).split("pets/")[1] for i in range(6)]
  assert names == [
    "train/cat/10.png",
    "train/cat/2.png",
    "train/dog/a.PNG",
    "train/dog/b.png",
    "train/dog/c.webp",
    "train/emu/x.png",
  ]
  for index, seed in enumerate([4, 3, 1, 0, 2, 5]):
    np.testing.assert_array_equal(train[index], np.asarray(picture(seed)))
    assert train.image(index).mode == "RGB"
  for index in (-1, 6):
    with pytest.raises(IndexError, match=f"{index} of 6"):
      train[index]


@both
def test_labels_of_every_split_are_those_of_train(kind, root, tmp_path):
  """The test split has no dog: an emu stays label 2."""
  test = make(kind, root, tmp_path, split="test")
  assert test.class_names == ("cat", "dog", "emu")
  assert test.labels.tolist() == [0, 2]


@both
def test_a_class_that_train_lacks_is_an_error(kind, root, tmp_path):
  write(root / "test/fox/a.png", 9)
  with pytest.raises(ValueError, match=r"\['fox'\].*not classes of.*train"):
    make(kind, root, tmp_path, split="test")


@both
def test_missing_split_names_those_there_are(kind, root, tmp_path):
  with pytest.raises(
    encoded.NoSplitError, match=r"no split 'val'.*\['test', 'train'\]"
  ):
    make(kind, root, tmp_path, split="val")


@both
def test_class_folders_alone_are_the_train_split(kind, root, tmp_path):
  flat = root / "train"
  if kind == "tar":  # else the tar's one folder is a split by its name
    flat = flat.rename(tmp_path / "flat")
  source = make(kind, flat, tmp_path)
  assert source.class_names == ("cat", "dog", "emu") and len(source) == 6
  with pytest.raises(
    encoded.NoSplitError, match="no split 'test'.* its split 'train'"
  ):
    make(kind, flat, tmp_path, split="test")


def test_a_tar_of_a_split_folder_is_that_split(root, tmp_path):
  assert len(make("tar", root / "train", tmp_path)) == 6
  with pytest.raises(
    encoded.NoSplitError, match=r"no split 'test'.*\['train'\]"
  ):
    make("tar", root / "train", tmp_path, split="test")


@both
def test_a_class_may_be_called_train(kind, tmp_path):
  write(tmp_path / "toys/train/a.png", 0)
  write(tmp_path / "toys/doll/a.png", 1)
  source = make(kind, tmp_path / "toys", tmp_path)
  assert source.class_names == ("doll", "train")


@both
def test_what_is_left_out_is_said(kind, root, tmp_path, caplog):
  for name in ("train/cat/Thumbs.db", "train/stray.png", "train/dog/x.gif"):
    (root / name).write_bytes(b"x")
  for name in ("train/cat/._2.png", ".DS_Store", "train/.cache/a.png"):
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_bytes(b"x")
  with caplog.at_level(logging.WARNING):
    source = make(kind, root, tmp_path)
  assert len(source) == 6 and source.class_names == ("cat", "dog", "emu")
  (said,) = [record.getMessage() for record in caplog.records]
  assert "3 files" in said
  for name in ("Thumbs.db", "stray.png", "x.gif"):
    assert name in said
  assert "._2" not in said


@both
@pytest.mark.parametrize("flat", [False, True])
def test_folders_in_class_folders_are_named_and_counted(
  kind, flat, root, tmp_path, caplog
):
  for name in ("train/cat/raw/a.png", "train/cat/raw/old/b.png"):
    write(root / name, 0)
  for folder_of in ("train/cat", "train/dog", "train", "."):
    write(root / folder_of / "@eaDir/a.png/thumbnail.png", 0)
  write(root / "__MACOSX/train/cat/a.png", 0)
  place = (root / "train").rename(tmp_path / "flat") if flat else root
  with caplog.at_level(logging.WARNING):
    source = make(kind, place, tmp_path)
  assert len(source) == 6 and source.class_names == ("cat", "dog", "emu")
  (said,) = [record.getMessage() for record in caplog.records]
  assert (
    "1 folders" in said and "1 files directly" in said and "cat/raw" in said
  )
  assert "eaDir" not in said


@both
def test_a_split_that_may_be_a_class_is_refused(kind, tmp_path):
  for name in ("doll/a.png", "train/a.png", "train/red/b.png"):
    write(tmp_path / "toys" / name, 0)
  with pytest.raises(ValueError, match=r"'train' holds images and .*\['doll"):
    make(kind, tmp_path / "toys", tmp_path)


@both
def test_empty_class_and_no_images(kind, root, tmp_path):
  (root / "train/ant").mkdir()
  with pytest.raises(ValueError, match=r"no image .*\['ant'\] \(1 of 4"):
    make(kind, root, tmp_path)
  (tmp_path / "none/cat").mkdir(parents=True)
  (tmp_path / "none/cat/readme.txt").write_text("x")
  with pytest.raises(ValueError, match="no image .*in the class folders"):
    make(kind, tmp_path / "none", tmp_path)


def test_images_without_class_folders(tmp_path):
  write(tmp_path / "bare/a.png", 0)
  with pytest.raises(ValueError, match="holds no class folders.*CLASS/FILE"):
    make("folder", tmp_path / "bare", tmp_path)


def test_missing_paths(tmp_path):
  with pytest.raises(ValueError, match="nowhere is not a folder"):
    folder.FolderSource(tmp_path / "nowhere", split="train", **OPTIONS)
  with pytest.raises(ValueError, match="nowhere.tar is not a file"):
    folder.TarSource(tmp_path / "nowhere.tar", split="train", **OPTIONS)


@both
def test_imagenet_order(kind, tmp_path):
  ids = list(encoded.imagenet_classes())
  root = tmp_path / "data"
  for seed, label in enumerate([999, 3, 500]):
    write(root / ids[label] / f"{ids[label]}_1.png", seed)
  (root / ids[7]).mkdir()  # without an image
  source = make(kind, root, tmp_path, class_order="imagenet")
  assert source.labels.tolist() == [3, 500, 999]
  assert len(source.class_names) == 1000
  write(root / "cat/a.png", 3)
  with pytest.raises(ValueError, match=r"\['cat'\].*1000 WordNet ids"):
    make(kind, root, tmp_path, class_order="imagenet")


@both
def test_corrupt_file_raises_and_names_the_path(kind, root, tmp_path):
  cut(root / "train/dog/b.png")
  source = make(kind, root, tmp_path)
  with pytest.raises(
    encoded.CorruptImageError, match=r"max_corrupt=0[^$]*train/dog/b.png"
  ):
    source[3]


@both
def test_goes_to_another_process(kind, root, tmp_path):
  cut(root / "train/dog/b.png")
  source = make(kind, root, tmp_path, max_corrupt=1)
  source[3]
  copy = pickle.loads(pickle.dumps(source))
  assert copy.corrupt == () and len(source.corrupt) == 1
  for index in range(6):
    np.testing.assert_array_equal(copy[index], source[index])
  np.testing.assert_array_equal(copy.labels, source.labels)


def test_symbolic_links_are_followed_in_folders(root, tmp_path):
  (root / "train/fox").symlink_to(root / "train/cat")
  (root / "train/dog/d.png").symlink_to(root / "train/emu/x.png")
  (root / "train/dog/e.png").symlink_to(root / "gone.png")
  source = make("folder", root, tmp_path)
  assert source.class_names == ("cat", "dog", "emu", "fox")
  assert np.bincount(source.labels).tolist() == [2, 5, 1, 2]
  np.testing.assert_array_equal(source[5], source[7])
  with pytest.raises(FileNotFoundError, match="train/dog/e.png"):
    source[6]


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_links_in_a_tar_are_an_error(link, root, tmp_path):
  link(root / "train/emu/x.png", root / "train/dog/d.png")
  with pytest.raises(ValueError, match="is a link.*--dereference"):
    make("tar", root, tmp_path)


def test_sparse_members_of_a_tar_are_an_error(tmp_path):
  path = write(tmp_path / "data/cat/a.png", 0)
  os.truncate(path, 1 << 20)
  tar = tmp_path / "data.tar"
  subprocess.run(["tar", "cSf", tar, "-C", tmp_path, "data"], check=True)
  if tar.stat().st_size > 1 << 20:
    pytest.skip("the file system keeps no holes")
  with pytest.raises(ValueError, match="cat/a.png is a link or sparse"):
    folder.TarSource(tar, split="train", **OPTIONS)


def test_tar_without_entries_for_folders(root, tmp_path):
  path = tmp_path / "files.tar"
  with tarfile.open(path, "w") as archive:
    for file in sorted(root.glob("*/*/*")):
      archive.add(file, arcname=file.relative_to(root))
  source = folder.TarSource(path, split="train", **OPTIONS)
  assert source.labels.tolist() == [0, 0, 1, 1, 1, 2]


def test_names_that_are_not_utf8(tmp_path):
  inside = tmp_path / "data/cat"
  inside.mkdir(parents=True)
  path = write(inside / "a.png", 0)
  os.rename(path, os.fsencode(inside) + b"/\xff\xe9.png")
  source = make("folder", tmp_path / "data", tmp_path)
  np.testing.assert_array_equal(source[0], np.asarray(picture(0)))


def test_tar_made_by_the_tar_command(root, tmp_path):
  """GNU tar, './' before each name, a long name, a file appended again."""
  long = "n" * 150 + ".png"
  write(root / "train/cat" / long, 6)
  path = tmp_path / "gnu.tar"
  subprocess.run(["tar", "cf", path, "-C", root, "."], check=True)
  write(root / "train/cat/2.png", 7)
  subprocess.run(
    ["tar", "rf", path, "-C", root, "./train/cat/2.png"], check=True
  )
  source = folder.TarSource(path, split="train", **OPTIONS)
  assert source.labels.tolist() == [0, 0, 0, 1, 1, 1, 2]
  np.testing.assert_array_equal(source[1], np.asarray(picture(7)))
  assert source.path(2) == f"{path}/train/cat/{long}"
  np.testing.assert_array_equal(source[2], np.asarray(picture(6)))


def test_tar_of_tars_by_class(tmp_path):
  """As ILSVRC2012_img_train.tar: one tar for each class."""
  path = tmp_path / "all.tar"
  with tarfile.open(path, "w") as outer:
    for seed, name in enumerate(["n2", "n1"]):
      file = write(tmp_path / "x" / f"{name}_1.png", seed)
      buffer = io.BytesIO()
      with tarfile.open(fileobj=buffer, mode="w") as inner:
        inner.add(file, arcname=file.name)
      info = tarfile.TarInfo(f"{name}.tar")
      info.size = len(buffer.getvalue())
      outer.addfile(info, io.BytesIO(buffer.getvalue()))
  source = folder.TarSource(path, split="train", **OPTIONS)
  assert source.class_names == ("n1", "n2")
  for index, seed in enumerate([1, 0]):
    np.testing.assert_array_equal(source[index], np.asarray(picture(seed)))


@pytest.mark.parametrize(
  ("mode", "command"),
  [("gz", "gunzip -k"), ("xz", "xz -dk"), ("bz2", "bunzip2")],
)
def test_compressed_tar_says_how_to_decompress(mode, command, root, tmp_path):
  path = tmp_path / f"pets.tar.{mode}"
  with tarfile.open(path, f"w:{mode}") as archive:
    archive.add(root, arcname="pets")
  with pytest.raises(ValueError, match=f"compressed.*`{command}"):
    folder.TarSource(path, split="train", **OPTIONS)


def test_damaged_tars(root, tmp_path):
  make("tar", root, tmp_path)
  path = tmp_path / "data.tar"
  whole = path.read_bytes()
  path.write_bytes(b"no tar at all" * 100)
  with pytest.raises(ValueError, match="not a whole tar"):
    folder.TarSource(path, split="train", **OPTIONS)
  path.write_bytes(whole)
  source = folder.TarSource(path, split="train", **OPTIONS)
  offset, size = source._places[2]
  path.write_bytes(whole[: offset + size // 2])
  with pytest.raises(OSError, match="train/dog/a.PNG.*cut short"):
    source[2]
  with pytest.raises(ValueError, match="not a whole tar"):
    folder.TarSource(path, split="train", **OPTIONS)


def test_a_tar_is_read_to_its_last_byte_or_refused(root, tmp_path):
  """As `cat a.tar b.tar` makes it; one whose later header is damaged."""
  make("tar", root, tmp_path)
  first = (tmp_path / "data.tar").read_bytes()
  write(root / "train/emu/y.png", 8)
  (root / "train/cat/2.png").unlink()
  path = tmp_path / "data.tar"
  make("tar", root, tmp_path)
  second = path.read_bytes()
  path.write_bytes(first + second)
  both_of = folder.TarSource(path, split="train", **OPTIONS)
  assert both_of.labels.tolist() == [0, 0, 1, 1, 1, 2, 2]
  np.testing.assert_array_equal(both_of[6], np.asarray(picture(8)))
  path.write_bytes(second + bytes(100))  # padded to no whole block
  padded = folder.TarSource(path, split="train", **OPTIONS)
  assert padded.labels.tolist() == [0, 1, 1, 1, 2, 2]
  with tarfile.open(fileobj=io.BytesIO(first)) as archive:
    members = archive.getmembers()
  start = members[-1].offset
  damaged = bytearray(first)
  damaged[start + 150] ^= 0xFF  # its checksum
  for content, said in (
    (bytes(damaged), f"byte {start} is damaged"),
    (first[:start], f"stops at byte {start} without"),
    (first[: start + 100], f"byte {start} is damaged"),
    (first + b"junk" * 200, f"byte {len(first)} is damaged"),
  ):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"data.tar is not .*{said}"):
      folder.TarSource(path, split="train", **OPTIONS)


def test_a_tar_within_a_tar_that_is_cut_short(tmp_path):
  file = write(tmp_path / "x/a.png", 0)
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode="w") as inner:
    inner.add(file, arcname="a.png")
  path = tmp_path / "all.tar"
  for size in (512 + 100, 512):
    with tarfile.open(path, "w") as outer:
      for name in ("n1.tar", "n2.tar"):
        info = tarfile.TarInfo(name)
        info.size = size if name == "n1.tar" else len(buffer.getvalue())
        outer.addfile(info, io.BytesIO(buffer.getvalue()))
    with pytest.raises(ValueError, match="all.tar is not a whole tar"):
      folder.TarSource(path, split="train", **OPTIONS)


def test_tar_keeps_one_descriptor_and_closes_it(root, tmp_path):
  before = len(os.listdir("/proc/self/fd"))
  source = make("tar", root, tmp_path)
  for index in range(6):
    source[index]
  assert len(os.listdir("/proc/self/fd")) == before + 1
  del source
  assert len(os.listdir("/proc/self/fd")) == before
