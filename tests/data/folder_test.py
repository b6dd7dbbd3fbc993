"""Folders and tars of images: layouts, labels, what is left out, damage."""

import io
import logging
import os
import pickle
import subprocess
import tarfile

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from drift_jax.data import encoded, sources
from drift_jax.system import console
from tests.data.pictures import cut, opened, picture, seeds_of, write


@pytest.fixture(autouse=True)
def _heard(monkeypatch):
  monkeypatch.setattr(console.logger, "propagate", True)


def make(kind, root, tmp_path, split="train", **options):
  """A source of the folder `root`, through a tar of it for kind 'tar'."""
  if kind == "folder":
    return opened(f"folder:{root}", split, **options)
  path = tmp_path / "data.tar"
  with tarfile.open(path, "w") as archive:
    archive.add(root, arcname=root.name)
  return opened(f"tar:{path}", split, **options)


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
  files = "cat/10.png cat/2.png dog/a.PNG dog/b.png dog/c.webp emu/x.png"
  assert names == [f"train/{file}" for file in files.split()]
  assert seeds_of(train) == [4, 3, 1, 0, 2, 5]
  for index in (-1, 6):
    with pytest.raises(IndexError, match=f"{index} of 6"):
      train[index]
  # The test split has no dog: an emu stays label 2.
  test = make(kind, root, tmp_path, split="test")
  assert test.class_names == ("cat", "dog", "emu")
  assert test.labels.tolist() == [0, 2]


@both
@pytest.mark.parametrize(
  ("names", "split", "message"),
  [
    (["train/a/0.png", "test/b/0.png"], "test", r"\['b'\].*not classes of"),
    (["train/a/0.png"], "val", r"no split 'val'.*\['train'\]"),
    (["a/0.png"], "test", "no split 'test'.* its split 'train'"),
    (["train/0.png", "val/1.png"], "test", r"no split 'test': its splits"),
    (
      ["doll/a.png", "train/a.png", "train/red/b.png"],
      "train",
      r"'train' holds images and .*\['doll",
    ),
    (["train/a/0.png", "train/ant/"], "train", "no image .*ant'.* .1 of 2"),
  ],
)
def test_layouts_that_are_refused(kind, names, split, message, tmp_path):
  for name in names:
    if name.endswith("/"):
      (tmp_path / "pets" / name).mkdir()
    else:
      write(tmp_path / "pets" / name, 0)
  with pytest.raises(ValueError, match=message) as caught:
    make(kind, tmp_path / "pets", tmp_path, split)
  missing = "no split" in message
  assert isinstance(caught.value, sources.NoSplitError) == missing


@both
def test_what_is_left_out_is_named_and_counted(kind, root, tmp_path, caplog):
  for name in ("train/cat/Thumbs.db", "train/stray.gif", "train/dog/x.gif"):
    (root / name).write_bytes(b"x")
  write(root / "train/cat/raw/a.png", 0)
  for hidden in ("train/cat/@eaDir", "__MACOSX/train/cat", "train/.cache"):
    write(root / hidden / "a.png", 0)
  with caplog.at_level(logging.WARNING):
    source = make(kind, root, tmp_path)
  assert len(source) == 6 and source.class_names == ("cat", "dog", "emu")
  (said,) = [record.getMessage() for record in caplog.records]
  for part in ("1 folders in", "3 files that", "cat/raw", "Thumbs", "stray"):
    assert part in said
  assert "eaDir" not in said and "a.png" not in said


@pytest.mark.parametrize("folder", ["", "train/"])
def test_images_beside_class_folders_are_left_out(folder, tmp_path, caplog):
  """And counted, however many there are."""
  for seed, name in enumerate(("red/a.png", "b.png", "c.png", "blue/d.png")):
    write(tmp_path / "pets" / folder / name, seed)
  (tmp_path / "pets" / folder / "notes.txt").write_text("x")
  with caplog.at_level(logging.WARNING):
    source = make("folder", tmp_path / "pets", tmp_path)
  assert source.class_names == ("blue", "red") and seeds_of(source) == [3, 0]
  strays, others = [record.getMessage() for record in caplog.records]
  for part in ("2 images", f"{folder}b.png", "'blue', 'red'", "move them into"):
    assert part in strays
  assert "1 files" in others and "notes.txt" in others


@both
@pytest.mark.parametrize("folder", ["", "train"])
def test_images_without_class_folders_are_one_class(kind, folder, tmp_path):
  """Those of splits too; the folder at the top of a tar is a class' own."""
  root = tmp_path / "pets"
  for seed, name in enumerate(("a.png", "b.PNG")):
    write(root / folder / name, seed)
  (root / folder / "notes").mkdir()
  if folder:
    alone = make(kind, root, tmp_path)
    assert alone.class_names == ("images",) and seeds_of(alone) == [0, 1]
    with pytest.raises(sources.NoSplitError):
      make(kind, root, tmp_path, split="test")
    write(root / "test" / "c.png", 2)
    test = make(kind, root, tmp_path, split="test")
    assert test.class_names == ("images",) and seeds_of(test) == [2]
  source = make(kind, root, tmp_path)
  name = "images" if kind == "folder" or folder else "pets"
  assert source.class_names == (name,) and source.labels.tolist() == [0, 0]
  assert source.path(1).endswith(f"/{folder}/b.PNG" if folder else "s/b.PNG")
  assert seeds_of(source) == [0, 1]


@pytest.mark.parametrize(
  ("names", "split", "message"),
  [
    ([], "train", "pets holds no images: the layout is .* of one class, FILE"),
    (["0.png"], "test", "no split 'test'.* its split 'train'"),
  ],
)
def test_folders_of_images_that_are_refused(names, split, message, tmp_path):
  (tmp_path / "pets").mkdir()
  for name in names:
    write(tmp_path / "pets" / name, 0)
  with pytest.raises(ValueError, match=message):
    make("folder", tmp_path / "pets", tmp_path, split)


@both
def test_a_class_may_be_called_train(kind, tmp_path):
  write(tmp_path / "toys/train/a.png", 0)
  write(tmp_path / "toys/doll/a.png", 1)
  source = make(kind, tmp_path / "toys", tmp_path)
  assert source.class_names == ("doll", "train")


@both
def test_imagenet_order(kind, tmp_path):
  ids = list(sources.imagenet_classes())
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
def test_goes_to_another_process(kind, root, tmp_path):
  cut(root / "train/dog/b.png")
  with pytest.raises(encoded.CorruptImageError, match="train/dog/b.png"):
    make(kind, root, tmp_path)[3]
  source = make(kind, root, tmp_path, max_corrupt=1)
  source[3]
  copy = pickle.loads(pickle.dumps(source))
  assert copy.corrupt == {} and len(source.corrupt) == 1
  for index in range(6):
    assert_array_equal(copy[index], source[index])
  assert_array_equal(copy.labels, source.labels)


def test_symbolic_links_are_followed_in_folders(root, tmp_path):
  (root / "train/fox").symlink_to(root / "train/cat")
  (root / "train/dog/d.png").symlink_to(root / "train/emu/x.png")
  (root / "train/dog/e.png").symlink_to(root / "gone.png")
  source = make("folder", root, tmp_path)
  assert source.class_names == ("cat", "dog", "emu", "fox")
  assert np.bincount(source.labels).tolist() == [2, 5, 1, 2]
  assert_array_equal(source[5], source[7])
  with pytest.raises(FileNotFoundError, match="train/dog/e.png"):
    source[6]


def test_names_that_are_not_utf8(tmp_path):
  inside = tmp_path / "data/cat"
  inside.mkdir(parents=True)
  path = write(inside / "a.png", 0)
  os.rename(path, os.fsencode(inside) + b"/\xff\xe9.png")
  source = make("folder", tmp_path / "data", tmp_path)
  assert_array_equal(source[0], np.asarray(picture(0)))


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
  source = opened(f"tar:{path}")
  assert source.labels.tolist() == [0, 0, 0, 1, 1, 1, 2]
  assert_array_equal(source[1], np.asarray(picture(7)))
  assert source.path(2) == f"{path}/train/cat/{long}"
  assert_array_equal(source[2], np.asarray(picture(6)))


def test_tar_keeps_one_descriptor_and_closes_it(root, tmp_path):
  def held():
    """Files of this test: others of the process come and go."""
    paths = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    paths = map(os.path.realpath, paths)
    return [path for path in paths if path.startswith(str(tmp_path))]

  assert held() == []
  source = make("tar", root, tmp_path)
  for index in range(6):
    source[index]
  assert held() == [str(tmp_path / "data.tar")]
  del source
  assert held() == []


def archive(path, files):
  """A tar of {name: content}, without entries for folders; its content."""
  with tarfile.open(path, "w") as tar:
    for name, content in files.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))
  return path.read_bytes()


def png(seed):
  file = io.BytesIO()
  picture(seed).save(file, "PNG")
  return file.getvalue()


def test_tar_of_tars_by_class(tmp_path):
  """As ILSVRC2012_img_train.tar: one tar for each class."""
  inner = {
    f"{name}.tar": archive(tmp_path / "inner.tar", {f"{name}_1.png": png(seed)})
    for seed, name in enumerate(["n2", "n1"])
  }
  archive(tmp_path / "all.tar", inner)
  source = opened(f"tar:{tmp_path}/all.tar")
  assert source.class_names == ("n1", "n2") and seeds_of(source) == [1, 0]
  inner["n2.tar"] = inner["n2.tar"][:612]
  archive(tmp_path / "all.tar", inner)
  with pytest.raises(ValueError, match="all.tar can't be indexed"):
    opened(f"tar:{tmp_path}/all.tar")


def test_members_without_bytes_of_their_own_are_an_error(root, tmp_path):
  os.link(root / "train/emu/x.png", root / "train/dog/d.png")
  with pytest.raises(ValueError, match="is a link.*--dereference"):
    make("tar", root, tmp_path)


def test_compressed_tar_says_how_to_decompress(root, tmp_path):
  path = tmp_path / "pets.tar.xz"
  with tarfile.open(path, "w:xz") as tar:
    tar.add(root, arcname="pets")
  with pytest.raises(ValueError, match="compressed.*`xz -dk .*pets.tar.xz`"):
    opened(f"tar:{path}")


def test_a_tar_is_read_to_its_last_byte_or_refused(tmp_path):
  """As `cat a.tar b.tar` makes it; one whose later header is damaged."""
  path = tmp_path / "data.tar"
  second = archive(path, {"a/1.png": png(1), "b/2.png": png(2)})
  first = archive(path, {"a/0.png": png(0), "a/1.png": png(3)})
  path.write_bytes(first + second)
  assert seeds_of(opened(f"tar:{path}")) == [0, 1, 2]
  path.write_bytes(second + bytes(100))  # padded to no whole block
  source = opened(f"tar:{path}")
  assert seeds_of(source) == [1, 2]
  offset, size = source._places[1]
  path.write_bytes(second[: offset + size // 2])
  with pytest.raises(OSError, match="b/2.png.*cut short"):
    source[1]
  with tarfile.open(fileobj=io.BytesIO(first)) as tar:
    start = tar.getmembers()[-1].offset
  damaged = bytearray(first)
  damaged[start + 150] ^= 0xFF  # its checksum
  for content, said in (
    (bytes(damaged), f"byte {start} is damaged"),
    (first[:start], f"stops at byte {start} without"),
    (first[: start + 100], f"byte {start} is damaged"),
    (first + b"junk" * 200, f"byte {len(first)} is damaged"),
    (second[: offset + size // 2], "unexpected end of data"),
  ):
    path.write_bytes(content)
    with pytest.raises(
      ValueError, match=f"data.tar can't be indexed: .*{said}"
    ):
      opened(f"tar:{path}")
