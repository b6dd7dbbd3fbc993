"""Folders of images by class, and uncompressed tar files of such folders.

Two layouts: DIR/SPLIT/CLASS/FILE, or DIR/CLASS/FILE, which is one training
split. Images are the files ending in .jpg, .jpeg, .png or .webp, in capitals
or not; other files, and what does not lie directly in a class folder, are left
out with a warning; hidden ones (`paths.is_hidden`: .git, @eaDir) without.
Classes and files come in the order of their names, compared as code points. In
a folder symbolic links are followed; in a tar links are an error. A tar may be
several archives one after the other; all of them are read.
"""

import bisect
import collections
import contextlib
import hashlib
import itertools
import os
import pathlib
import tarfile
import time
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, Self

import numpy as np

from drift_jax.data import encoded
from drift_jax.system import console, paths

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# Folders with these names are splits, never the one folder that a tar was
# made of.
SPLITS = ("train", "test", "val", "validation")
_LISTED = 5
_LOG_SECONDS = 10.0
_COMPRESSED = {
  b"\x1f\x8b": ("gzip", "gunzip -k {}"),
  b"\xfd7zXZ\x00": ("xz", "xz -dk {}"),
  b"BZh": ("bzip2", "bunzip2 -k {}"),
  b"\x28\xb5\x2f\xfd": ("zstd", "zstd -d {}"),
}


def _is_image(name: str) -> bool:
  return name.lower().endswith(SUFFIXES)


class _Tree(Protocol):
  """Folders by their path from the root ('' is the root), '/' between."""

  name: str  # of the whole, for messages

  def folders(self, path: str) -> Sequence[str]:
    """Names of the folders in the folder, sorted, none hidden."""
    ...

  def files(self, path: str) -> Sequence[str]:
    """Names of the files in the folder, sorted, none hidden."""
    ...


def _join(path: str, name: str) -> str:
  return f"{path}/{name}" if path else name


def _has_images(tree: _Tree, path: str) -> bool:
  return any(_is_image(name) for name in tree.files(path))


def _find_split(tree: _Tree, split: str) -> tuple[str, str]:
  """Paths of the split's folder and of the one whose classes give labels.

  A folder of images is a class, whatever folders are in it, unless it has the
  split's name.
  """

  def holds_classes(path: str) -> bool:
    return bool(tree.folders(path)) and not _has_images(tree, path)

  base = ""
  while True:  # a folder that holds nothing but the data's folder
    inside = tree.folders(base)
    if len(inside) != 1 or inside[0] in (*SPLITS, split):
      break
    if not holds_classes(_join(base, inside[0])):
      break
    base = _join(base, inside[0])
  splits = [
    name
    for name in inside
    if holds_classes(_join(base, name))
    or (name in ("train", split) and tree.folders(_join(base, name)))
  ]
  classes = [
    name
    for name in inside
    if name not in splits and _has_images(tree, _join(base, name))
  ]
  if split in splits:
    if classes and _has_images(tree, _join(base, split)):
      raise ValueError(
        f"{tree.name}: {split!r} holds images and folders, and lies beside "
        f"folders of images {classes[:_LISTED]}: move its images out if it is "
        "a split, its folders if it is a class"
      )
    labels_from = "train" if "train" in splits else split
    return _join(base, split), _join(base, labels_from)
  if splits:
    mixed = f", beside the class folders {classes[:_LISTED]}" * bool(classes)
    raise encoded.NoSplitError(
      f"{tree.name} has no split {split!r}: its splits are "
      f"{splits[:_LISTED]} (folders that hold no images but folders{mixed}; "
      "the layout is SPLIT/CLASS/FILE or CLASS/FILE)"
    )
  if not inside:
    raise ValueError(
      f"{tree.name} holds no class folders: the layout is SPLIT/CLASS/FILE or "
      "CLASS/FILE"
    )
  if split != "train":
    raise encoded.NoSplitError(
      f"{tree.name} has no split {split!r}: it holds class folders directly, "
      "which are its split 'train'"
    )
  return base, base


def _warn_of_leftovers(
  tree: _Tree, files: Sequence[str], folders: Sequence[str]
) -> None:
  """Says in one line what is left out: other files, and folders in classes."""

  def some(names: Sequence[str]) -> str:
    return ", ".join(names[:_LISTED]) + ", ..." * (len(names) > _LISTED)

  said = []
  if files:
    suffixes = (os.path.splitext(name)[1].lower() for name in files)
    kinds = ", ".join(
      f"{count} {suffix or 'without a suffix'}"
      for suffix, count in collections.Counter(suffixes).most_common(_LISTED)
    )
    said.append(
      f"{len(files)} files that are no images in a class folder ({kinds}): "
      f"{some(files)}"
    )
  if folders:
    inside = 0
    for folder in folders:
      with contextlib.suppress(OSError):  # nobody asks to read it
        inside += len(tree.files(folder))
    said.append(
      f"{len(folders)} folders in class folders, with {inside} files directly "
      f"in them: {some(folders)}"
    )
  if said:
    console.logger.warning("%s: left out: %s", tree.name, "; ".join(said))


class _Layout:
  """The images of one split: their paths, labels and class names."""

  def __init__(self, tree: _Tree, *, split: str, class_order: str):
    root, labels_from = _find_split(tree, split)
    folders = tree.folders(root)
    known = tree.folders(labels_from)
    self.class_names, label_of = encoded.order_classes(known, class_order)
    unknown = sorted(set(folders) - set(known))
    if unknown:
      raise ValueError(
        f"{tree.name}: {unknown[:_LISTED]} in {root!r} are not classes of "
        f"{labels_from!r}"
      )
    labels = dict(zip(known, label_of.tolist(), strict=True))
    self.root = root
    self.folders = tuple(folders)
    self.files: list[Sequence[str]] = []
    leftovers = [_join(root, name) for name in tree.files(root)]
    deeper: list[str] = []
    for folder in folders:
      path = _join(root, folder)
      names = tree.files(path)
      images = [name for name in names if _is_image(name)]
      if len(images) < len(names):
        others = (name for name in names if not _is_image(name))
        leftovers.extend(_join(path, name) for name in others)
      deeper.extend(_join(path, name) for name in tree.folders(path))
      self.files.append(images)
    _warn_of_leftovers(tree, leftovers, deeper)
    empty = [
      f for f, images in zip(folders, self.files, strict=True) if not images
    ]
    if len(empty) == len(folders):
      raise ValueError(
        f"{tree.name}: no image (*{', *'.join(SUFFIXES)}) in the class folders "
        f"of {root or '.'!r} (they must lie directly in these)"
      )
    if empty and not class_order:
      raise ValueError(
        f"{tree.name}: no image (*{', *'.join(SUFFIXES)}) in class "
        f"{empty[:_LISTED]} ({len(empty)} of {len(folders)} classes): remove "
        "the folder or fill it"
      )
    counts = [len(images) for images in self.files]
    self.labels = np.repeat(
      np.array([labels[folder] for folder in folders], np.int32), counts
    )


class _Names:
  """Strings in two flat buffers: a million cost no more than their bytes."""

  def __init__(self, names: Iterable[str]):
    # As the file system gave them: names need not be valid UTF-8.
    encoded_names = [os.fsencode(name) for name in names]
    self._bytes = b"".join(encoded_names)
    self._ends = np.cumsum([len(n) for n in encoded_names], dtype=np.int64)

  def __getitem__(self, index: int) -> str:
    start = int(self._ends[index - 1]) if index else 0
    return os.fsdecode(self._bytes[start : int(self._ends[index])])

  def sha256(self) -> str:
    """Of all strings, in hexadecimal."""
    return hashlib.sha256(self._bytes + self._ends.tobytes()).hexdigest()


class _FileSource(encoded.EncodedSource):
  """What a folder and a tar share: paths and labels of a layout."""

  def __init__(self, layout: _Layout, *, max_corrupt: int, decoder: str):
    super().__init__(
      class_names=layout.class_names, max_corrupt=max_corrupt, decoder=decoder
    )
    self._labels = layout.labels
    self._root = layout.root
    self._folders = layout.folders
    self._folder_ends = list(itertools.accumulate(map(len, layout.files)))
    self._names = _Names(itertools.chain.from_iterable(layout.files))

  @property
  def labels(self) -> np.ndarray:
    """[N] int32."""
    return self._labels

  def __len__(self) -> int:
    return len(self._labels)

  def names_sha256(self) -> str:
    """Of the files' names, as they come within their class folders."""
    return self._names.sha256()

  def _inner_path(self, index: int) -> str:
    folder = self._folders[bisect.bisect_right(self._folder_ends, index)]
    return f"{_join(self._root, folder)}/{self._names[index]}"


class _Directory:
  """A _Tree of the file system; each folder is listed once."""

  def __init__(self, path: pathlib.Path):
    self.name = str(path)
    self._path = path
    self._listings: dict[str, tuple[list[str], list[str]]] = {}

  def _list(self, path: str) -> tuple[list[str], list[str]]:
    if path not in self._listings:
      self._listings[path] = paths.listed(self._path / path)
    return self._listings[path]

  def folders(self, path: str) -> Sequence[str]:
    return self._list(path)[0]

  def files(self, path: str) -> Sequence[str]:
    return self._list(path)[1]


class FolderSource(_FileSource):
  """Images in a folder of class folders (see the module)."""

  def __init__(
    self,
    path: str | os.PathLike[str],
    *,
    split: str,
    class_order: str,
    max_corrupt: int,
    decoder: str,
  ):
    """Lists the files.

    Args:
      path: DIR.
      split: name of the split's folder; 'train' where there are none.
      class_order: '' or 'imagenet' (see `encoded.order_classes`). With '' the
        labels number the sorted names of the train split's folders, for
        every split.
      max_corrupt: images that may turn out undecodable before it is an error.
      decoder: see `decode.decode`.

    Raises:
      NoSplitError: the split does not exist.
      ValueError: the folder does not exist or has another layout; a class has
        no image.
    """
    self._path = pathlib.Path(paths.expand(path))
    if not self._path.is_dir():
      raise ValueError(
        f"data.source='folder:{path}': {self._path.absolute()} is not a folder"
      )
    tree = _Directory(self._path)
    layout = _Layout(tree, split=split, class_order=class_order)
    super().__init__(layout, max_corrupt=max_corrupt, decoder=decoder)

  def path(self, index: int) -> str:
    """The file's path."""
    return str(self._path / self._inner_path(index))

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
    try:
      header = super().fromtarfile(tarfile)
    except _HeaderError as error:
      tarfile.fileobj.seek(start)
      block = tarfile.fileobj.read(_BLOCK)
      has_end = getattr(tarfile, "has_end", False)
      if block.count(0) == _BLOCK:  # the end, unless another archive follows
        tarfile.has_end = True
        raise
      if has_end and not block.strip(b"\0"):  # it was padded
        raise
      if not block:
        raise _ReadError(
          f"it stops at byte {start} without the zeros that end an archive, "
          "as one that was cut short does: copy it anew (or, if nothing is "
          "missing, append them: head -c 1024 /dev/zero >> FILE)"
        ) from error
      raise _ReadError(
        f"the header at byte {start} is damaged ({error}): copy or make the "
        "tar anew"
      ) from error
    tarfile.has_end = False
    return header


class _Part:
  """A file up to a place in it, positions being those of the file."""

  def __init__(self, file: Any, end: int):
    self._file = file
    self._end = end
    self.seek, self.tell = file.seek, file.tell

  def read(self, size: int) -> bytes:
    return self._file.read(max(0, min(size, self._end - self.tell())))


class _Index:
  """A _Tree of a tar file: where in the file each member's bytes lie.

  A tar within the tar counts as a folder of its name less the suffix, which
  is how ILSVRC2012_img_train.tar holds its classes.
  """

  def __init__(self, path: pathlib.Path):
    self.name = str(path)
    # By folder: the names of its folders; (offset, size) of its files.
    self._folders: dict[str, set[str]] = {"": set()}
    self._files: dict[str, dict[str, tuple[int, int]]] = {"": {}}
    self._count, self._logged = 0, time.monotonic()
    with open(path, "rb") as file:
      start = file.read(8)
      for magic, (kind, command) in _COMPRESSED.items():
        if start.startswith(magic):
          raise ValueError(
            f"{path} is compressed with {kind}, in which no single image can "
            f"be found: decompress it once with `{command.format(path)}`"
          )
      file.seek(0)
      try:
        self._add(file, "")
      except tarfile.TarError as error:
        raise ValueError(f"{path} is not a whole tar file: {error}") from error

  def _add_folder(self, folder: str) -> None:
    while folder not in self._files:
      self._files[folder] = {}
      self._folders.setdefault(folder, set())
      above, _, name = folder.rpartition("/")
      self._folders.setdefault(above, set()).add(name)
      folder = above

  def _add(self, file: Any, within: str) -> None:
    # Zeros end an archive, but another may follow.
    archive: Any = tarfile.open(
      fileobj=file, mode="r:", tarinfo=_Header, ignore_zeros=True
    )
    while (member := archive.next()) is not None:
      archive.members.clear()  # a million TarInfo are a gigabyte
      parts = [p for p in member.name.split("/") if p not in ("", ".")]
      if not parts or any(map(paths.is_hidden, parts)):
        continue
      path = _join(within, "/".join(parts))
      folder, _, name = path.rpartition("/")
      if member.isdir():
        self._add_folder(path)
      elif not member.isreg() or member.sparse is not None:
        if _is_image(name):
          raise ValueError(
            f"{self.name}: {path} is a link or sparse: make the tar with `tar "
            "--dereference --hard-dereference` and without --sparse"
          )
      else:
        if name.endswith(".tar"):
          self._add_folder(path.removesuffix(".tar"))
          file.seek(member.offset_data)
          part = _Part(file, member.offset_data + member.size)
          self._add(part, path.removesuffix(".tar"))
          continue
        self._add_folder(folder)
        # A file that was appended again replaces the earlier one.
        self._files[folder][name] = (member.offset_data, member.size)
        self._log_progress()

  def _log_progress(self) -> None:
    self._count += 1
    if time.monotonic() - self._logged > _LOG_SECONDS:
      self._logged = time.monotonic()
      console.logger.info("indexing %s: %d files", self.name, self._count)

  def folders(self, path: str) -> Sequence[str]:
    return sorted(self._folders[path])

  def files(self, path: str) -> Sequence[str]:
    return sorted(self._files[path])

  def place(self, folder: str, name: str) -> tuple[int, int]:
    """(offset, size) of a file."""
    return self._files[folder][name]


class TarSource(_FileSource):
  """Images in an uncompressed tar of class folders (see the module).

  The offsets are found in one pass over the headers; images are then read
  from their place in the file, nothing is extracted.
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    *,
    split: str,
    class_order: str,
    max_corrupt: int,
    decoder: str,
  ):
    """Indexes the tar; arguments as of `FolderSource`.

    Raises:
      ValueError: the file does not exist, is compressed or no whole tar, or
        what `FolderSource` raises.
    """
    self._path = pathlib.Path(paths.expand(path))
    if not self._path.is_file():
      raise ValueError(
        f"data.source='tar:{path}': {self._path.absolute()} is not a file"
      )
    index = _Index(self._path)
    layout = _Layout(index, split=split, class_order=class_order)
    super().__init__(layout, max_corrupt=max_corrupt, decoder=decoder)
    self._places = np.array(
      [
        index.place(_join(layout.root, folder), name)
        for folder, names in zip(layout.folders, layout.files, strict=True)
        for name in names
      ],
      np.int64,
    )
    self._open()

  def _open(self) -> None:
    # Reads carry their own offset, so threads share one descriptor.
    self._descriptor = os.open(self._path, os.O_RDONLY)
    weakref.finalize(self, os.close, self._descriptor)

  def __setstate__(self, state: dict[str, Any]) -> None:
    super().__setstate__(state)
    self._open()

  def path(self, index: int) -> str:
    """TAR/MEMBER."""
    return f"{self._path}/{self._inner_path(index)}"

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
