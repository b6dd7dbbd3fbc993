"""Folders of images by class, and uncompressed tar files of such folders.

Two layouts: DIR/SPLIT/CLASS/FILE, or DIR/CLASS/FILE, which is one training
split. Without class folders (DIR/FILE, or DIR/SPLIT/FILE with SPLITS alone) all
images are of one class, sources.ONE_CLASS. Images are the files ending in .jpg,
.jpeg, .png or .webp, in capitals or not; other files, and what does not lie
directly in a class folder, are left out with a warning; hidden ones
(`paths.is_hidden`: .git, @eaDir) without. Classes and files come in the order
of their names, compared as code points. In a folder symbolic links are
followed; in a tar links are an error. A tar may be several archives one after
the other; all of them are read.
"""

import bisect
import functools
import hashlib
import itertools
import os
import pathlib
import tarfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from drift_jax.data import encoded, sources
from drift_jax.system import console, paths, storage
from drift_jax.system.storage import PathLike

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# Folders with these names are splits, never the one folder that a tar was
# made of.
SPLITS = ("train", "test", "val", "validation")
_LAYOUT = "the layout is SPLIT/CLASS/FILE, CLASS/FILE or, of one class, FILE"
_LISTED = 5
_LOG_SECONDS = 10.0
# By their first bytes.
_DECOMPRESS = {
  b"\x1f\x8b": "gunzip -k",
  b"\xfd7zXZ\x00": "xz -dk",
  b"BZh": "bunzip2 -k",
  b"\x28\xb5\x2f\xfd": "zstd -d",
}


def _is_image(name: str, suffixes: tuple[str, ...] = SUFFIXES) -> bool:
  return name.lower().endswith(suffixes)


def _join(path: str, name: str) -> str:
  return f"{path}/{name}" if path else name


class _Tree(NamedTuple):
  """Folders by their path from the root ('' is the root), '/' between.

  Attributes:
    name: name of the folder or tar, for messages.
    listed: path -> names of its folders and of its files, sorted, none hidden.
    suffixes: of images.
  """

  name: str
  listed: Callable[[str], tuple[Sequence[str], ...]]
  suffixes: tuple[str, ...] = SUFFIXES

  def folders(self, path: str) -> Sequence[str]:
    return self.listed(path)[0]

  def files(self, path: str) -> Sequence[str]:
    return self.listed(path)[1]

  def is_image(self, name: str) -> bool:
    return _is_image(name, self.suffixes)

  def has_images(self, path: str) -> bool:
    return any(map(self.is_image, self.files(path)))

  def holds_classes(self, path: str) -> bool:
    return bool(self.folders(path)) and not self.has_images(path)


def _find_split(tree: _Tree, split: str) -> tuple[str, str]:
  """Paths of the split's folder and of the one whose classes give labels.

  A folder of images is a class, whatever folders are in it, unless it has the
  split's name.
  """
  # 1. Down to the folder of splits or classes.
  base, inside = "", tree.folders("")
  while (
    len(inside) == 1
    and inside[0] not in (*SPLITS, split)
    and tree.holds_classes(_join(base, inside[0]))
  ):
    base = _join(base, inside[0])
    inside = tree.folders(base)
  # 2. What is in it.
  splits = [
    name
    for name in inside
    if tree.holds_classes(_join(base, name))
    or (name in ("train", split) and tree.folders(_join(base, name)))
  ]
  if (len(inside) > 1 or "train" in inside) and all(
    name in SPLITS and tree.has_images(_join(base, name)) for name in inside
  ):
    splits = list(inside)  # of images without class folders
  classes = [
    name
    for name in inside
    if name not in splits and tree.has_images(_join(base, name))
  ]
  # 3. The split among that.
  if split in splits:
    if classes and tree.has_images(_join(base, split)):
      raise ValueError(
        f"{tree.name}: {split!r} holds images and folders, and lies beside "
        f"folders of images {classes[:_LISTED]}: move its images out if it is "
        "a split, its folders if it is a class"
      )
    labels_from = "train" if "train" in splits else split
    return _join(base, split), _join(base, labels_from)
  if not inside and not tree.has_images(base):
    raise ValueError(f"{tree.name} holds no images: {_LAYOUT}")
  if splits:
    mixed = f" beside the class folders {classes[:_LISTED]}" * bool(classes)
    raise sources.NoSplitError(
      f"{tree.name} has no split {split!r}: its splits are "
      f"{splits[:_LISTED]}{mixed}; {_LAYOUT}"
    )
  if split != "train":
    raise sources.NoSplitError(
      f"{tree.name} has no split {split!r}: it holds class folders or images "
      "directly, which are its split 'train'"
    )
  return base, base


def _classes(tree: _Tree, root: str) -> dict[str, str]:
  """{class name: its folder} of a split's folder.

  One class, if images lie there and no folders of images.
  """
  folders = {name: _join(root, name) for name in tree.folders(root)}
  if tree.has_images(root) and not any(map(tree.has_images, folders.values())):
    return {sources.ONE_CLASS: root}
  return folders


class _FileSource(encoded.EncodedSource):
  """Images of one split of a tree, in the order of their paths."""

  def __init__(self, path: PathLike, tree: _Tree, split, class_order, **rest):
    # 1. The classes, by which the labels number those of every split.
    root, labels_from = _find_split(tree, split)
    classes, known = _classes(tree, root), list(_classes(tree, labels_from))
    class_names, label_of = sources.order_classes(known, class_order)
    unknown = sorted(set(classes) - set(known))
    if unknown:
      raise ValueError(
        f"{tree.name}: {unknown[:_LISTED]} in {root!r} are not classes of "
        f"{labels_from!r}"
      )
    # 2. Their images, and what is left out.
    images: dict[str, list[str]] = {}
    files: list[str] = []
    folders: list[str] = []
    if root not in classes.values():
      files = [_join(root, name) for name in tree.files(root)]
      if strays := list(filter(tree.is_image, files)):
        console.logger.warning(
          f"{tree.name}: {len(strays)} images ({strays[0]}, ...) are left out, "
          f"as they lie beside class folders {list(classes)[:_LISTED]}: move "
          "them into class folders or, if all images are of one class, move "
          "these folders away"
        )
        files = list(itertools.filterfalse(tree.is_image, files))
    for folder in classes.values():
      images[folder] = list(filter(tree.is_image, tree.files(folder)))
      others = itertools.filterfalse(tree.is_image, tree.files(folder))
      files += [_join(folder, name) for name in others]
      folders += [_join(folder, name) for name in tree.folders(folder)]
    if files or folders:
      some = ", ".join((folders + files)[:_LISTED])
      console.logger.warning(
        f"{tree.name}: left out: {len(folders)} folders in class folders and "
        f"{len(files)} files that are no images in a class folder: {some}, ..."
      )
    empty = [folder for folder, names in images.items() if not names]
    if len(empty) == len(classes) or (empty and not class_order):
      raise ValueError(
        f"{tree.name}: no image (*{', *'.join(tree.suffixes)}) directly in the "
        f"class folders {empty[:_LISTED]} ({len(empty)} of {len(classes)} "
        "classes): remove these or fill them"
      )
    # 3. One entry for each image.
    labels = dict(zip(known, label_of, strict=True))
    counts = [len(names) for names in images.values()]
    of_classes = np.array([labels[name] for name in classes], np.int32)
    self.labels = np.repeat(of_classes, counts)
    self._path = path
    self._folders = tuple(images)
    self._ends = list(itertools.accumulate(counts))
    # As the file system has them, since names need not be valid UTF-8; in one
    # array, as a million strings take ten times the memory.
    names = itertools.chain.from_iterable(images.values())
    self._names = np.array([os.fsencode(name) for name in names])
    super().__init__(class_names, **rest)

  def names_sha256(self) -> str:
    """Checksum of the files' names, as they come in their class folders."""
    ends = np.cumsum(np.char.str_len(self._names), dtype=np.int64)
    names = b"".join(self._names.tolist())
    return hashlib.sha256(names + ends.tobytes()).hexdigest()

  def name(self, index: int) -> str:
    """Path of an image within the tree."""
    folder = self._folders[bisect.bisect_right(self._ends, index)]
    return _join(folder, os.fsdecode(self._names[index]))

  def path(self, index: int) -> str:
    """FOLDER/FILE or TAR/MEMBER."""
    return f"{self._path}/{self.name(index)}"


class FolderSource(_FileSource):
  """Images in a folder of class folders (see the module).

  Attributes:
    suffixes: of images.
  """

  suffixes = SUFFIXES

  def __init__(self, path: PathLike, **options: Any):
    """Lists the files.

    Args:
      path: DIR.
      **options: split: name of the split's folder; 'train' if there are
        none. class_order: '' or 'imagenet' (see `sources.order_classes`); with
        '' the labels number the sorted names of the train split's folders, for
        every split. max_corrupt, decoder: see `encoded.EncodedSource`.

    Raises:
      NoSplitError: the split does not exist.
      ValueError: the folder does not exist or has another layout; a class has
        no image.
    """
    root = pathlib.Path(paths.expand(path))
    if not root.is_dir():
      where = root.absolute()
      raise ValueError(f"data.source='folder:{path}': {where} is not a folder")
    listed = functools.cache(lambda folder: paths.listed(root / folder))
    super().__init__(root, _Tree(str(root), listed, self.suffixes), **options)

  def read_bytes(self, index: int) -> bytes:
    """The file's content."""
    with open(self.path(index), "rb", buffering=0) as file:
      return file.read()


# Under names of their own: tarfile calls an argument like the module.
_BLOCK, _HeaderError = tarfile.BLOCKSIZE, tarfile.HeaderError
_ReadError = tarfile.ReadError


class _Header(tarfile.TarInfo):
  """A header whose damage is an error, where tarfile takes it for the end."""

  @classmethod
  def fromtarfile(cls, tarfile: Any) -> Self:
    start = tarfile.fileobj.tell()
    tarfile.has_end = getattr(tarfile, "has_end", False)
    try:
      header = super().fromtarfile(tarfile)
    except _HeaderError as error:
      tarfile.fileobj.seek(start)
      block = tarfile.fileobj.read(_BLOCK)
      # The end of an archive or its padding; another archive may follow.
      is_end = block.count(0) == _BLOCK
      if is_end or (tarfile.has_end and not block.strip(b"\0")):
        tarfile.has_end = True
        raise
      problem = f"the header at byte {start} is damaged ({error})"
      if not block:
        problem = f"it stops at byte {start} without the zeros at an end"
      raise _ReadError(
        f"{problem}: copy or make the tar anew (or, if only zeros are missing, "
        "append them: head -c 1024 /dev/zero >> FILE)"
      ) from error
    tarfile.has_end = False
    return header


def _members(
  file: Any, within: str, start: int
) -> Iterator[tuple[str, tuple[int, int] | None]]:
  """(path, (offset, size)) of the files in a tar, (path, None) of folders.

  A tar within the tar counts as a folder of its name less the suffix, which
  is how ILSVRC2012_img_train.tar holds its classes.

  Args:
    file: path of the tar.
    within: path of the folder that the tar stands for.
    start: offset of `file` in the whole file.
  """
  # Zeros end an archive, but another may follow.
  archive: Any = tarfile.open(
    fileobj=file, mode="r:", tarinfo=_Header, ignore_zeros=True
  )
  while (member := archive.next()) is not None:
    archive.members.clear()  # a million TarInfo are a gigabyte
    parts = [p for p in member.name.split("/") if p not in ("", ".")]
    if not parts or any(map(paths.is_hidden, parts)):
      continue
    path, offset = _join(within, "/".join(parts)), start + member.offset_data
    if member.isdir():
      yield path, None
    elif not member.isreg() or member.sparse is not None:
      if _is_image(path):
        raise _ReadError(
          f"{path} is a link or sparse: make the tar with `tar --dereference "
          "--hard-dereference` and without --sparse"
        )
    elif path.endswith(".tar"):
      yield path.removesuffix(".tar"), None
      inner = archive.extractfile(member)
      yield from _members(inner, path.removesuffix(".tar"), offset)
    else:
      yield path, (offset, member.size)


def _tree_of(name: str, places: Mapping[str, object | None]) -> _Tree:
  """The tree of some paths: files have a place, folders None."""
  listing: dict[str, tuple[set[str], set[str]]] = {"": (set(), set())}
  for path, place in places.items():
    is_file = place is not None
    if not is_file:
      listing.setdefault(path, (set(), set()))
    while path:
      path, _, last = path.rpartition("/")
      listing.setdefault(path, (set(), set()))[is_file].add(last)
      is_file = False
  return _Tree(name, lambda path: tuple(map(sorted, listing[path])))


class TarSource(_FileSource):
  """Images in an uncompressed tar of class folders (see the module).

  The offsets are found in one pass over the headers; images are then read
  from their place in the file, nothing is extracted.
  """

  _UNSENT = (*_FileSource._UNSENT, "_descriptor")

  def __init__(self, path: PathLike, **options: Any):
    """Indexes the tar; arguments as of `FolderSource`.

    Raises:
      ValueError: the file does not exist, is compressed or no whole tar, or
        what `FolderSource` raises.
    """
    tar = pathlib.Path(paths.expand(path))
    if not tar.is_file():
      where = tar.absolute()
      raise ValueError(f"data.source='tar:{path}': {where} is not a file")
    places: dict[str, tuple[int, int] | None] = {}
    logged = time.monotonic()
    with open(tar, "rb") as file:
      for magic, command in _DECOMPRESS.items():
        if file.peek(8).startswith(magic):
          raise ValueError(
            f"{tar} is compressed, and no single image can be found in it: "
            f"decompress it once with `{command} {tar}`"
          )
      try:
        # A file that was appended again replaces the earlier one.
        for member, place in _members(file, "", 0):
          places[member] = place
          if time.monotonic() - logged > _LOG_SECONDS:
            logged = time.monotonic()
            console.logger.info("indexing %s: %d members", tar, len(places))
      except tarfile.TarError as error:
        raise ValueError(f"{tar} can't be indexed: {error}") from error
    super().__init__(tar, _tree_of(str(tar), places), **options)
    inside = [places[self.name(index)] for index in range(len(self))]
    self._places = np.array(inside, np.int64)

  def _open(self) -> None:
    super()._open()
    # Reads carry their own offset, so threads share one descriptor.
    self._descriptor = os.open(self._path, os.O_RDONLY)
    weakref.finalize(self, os.close, self._descriptor)

  def read_bytes(self, index: int) -> bytes:
    """The member's content.

    Raises:
      OSError: the tar ends before the member does.
    """
    offset, size = map(int, self._places[index])
    data = os.pread(self._descriptor, size, offset)
    if len(data) < size:
      raise OSError(
        f"{self.path(index)}: {len(data)} of {size} bytes: the tar was cut "
        "short after it was indexed"
      )
    return data


class BucketSource(_FileSource):
  """Images in class folders of a gs:// bucket, each a request when read.

  So a set that fits (data.in_memory) is read once; copy large ones to disks.
  """

  def __init__(self, path: str, **options: Any):
    """Lists the objects; arguments and errors as of `FolderSource`.

    Raises:
      StorageError: a missing package, or a bucket that can't be read.
    """
    names = storage.find(path)
    shown = [n for n in names if not any(map(paths.is_hidden, n.split("/")))]
    if not shown:
      raise ValueError(f"data.source='folder:{path}': nothing is there")
    tree = _tree_of(path, dict.fromkeys(shown, True))
    super().__init__(path, tree, **options)

  def read_bytes(self, index: int) -> bytes:
    """The object's content.

    Raises:
      FileNotFoundError, StorageError: it is gone, or can't be read.
    """
    return storage.read(self.path(index))
