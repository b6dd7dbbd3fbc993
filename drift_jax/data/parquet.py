"""Images in parquet files of a data set on the Hugging Face hub.

A data set is hf://datasets/OWNER/NAME[@REVISION][/CONFIG][:COLUMNS]. Its files
are named CONFIG/SPLIT-00000-of-00004.parquet or CONFIG/SPLIT/0000.parquet, as
the hub's own programs name them; COLUMNS is image=COLUMN, label=COLUMN or both,
with a comma between.
"""

import bisect
import contextlib
import fnmatch
import hashlib
import itertools
import json
import pathlib
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from drift_jax.data import encoded, hub_files, sources
from drift_jax.system import console, hub
from drift_jax.system.errors import DataError, one_line

# Of row groups that a process keeps.
_KEPT_BYTES = 2**28
_FORM = f"{hub_files.DATASETS}OWNER/NAME[@REVISION][/CONFIG][:image=A,label=B]"
# What a file is called after its split: its number, how many there are, a hash.
_NUMBERED = re.compile(r"(?:(.+?)[-_.])?\d+(?:-of-(\d+))?(?:-[0-9a-f]{16})?")
_LISTED = 10  # names that an error shows


class _Place(NamedTuple):
  """Where a file belongs by its name; shards: files of the split, or 0."""

  config: str
  split: str
  shards: int


def _parse(spec: str) -> tuple[hub.Address, dict[str, str]]:
  """(repository, revision and folder; columns) of a source.

  Raises:
    ValueError: another form.
  """
  place, colon, rest = spec.removeprefix(hub_files.DATASETS).partition(":")
  pairs = [pair.partition("=") for pair in rest.split(",") if colon]
  columns = {name: column for name, _, column in pairs}
  address = hub.parse(f"hf://{place}")
  if not spec.startswith(hub_files.DATASETS) or address is None:
    raise ValueError(f"data.source={spec!r}: want {_FORM}")
  if not columns.keys() <= {"image", "label"}:
    raise ValueError(f"data.source={spec!r}: {rest!r} is unknown, want {_FORM}")
  return address, columns


def _place(path: str) -> _Place:
  *folders, name = path.removesuffix(".parquet").split("/")
  numbered = _NUMBERED.fullmatch(name)
  split = name if numbered is None else numbered[1]
  if not split:  # a number alone, in the split's folder
    split = folders.pop() if folders else "train"
  count = int(numbered[2] or 0) if numbered else 0
  return _Place("/".join(folders), split, count)


def _files_of(dataset: hub_files.Dataset, folder: str, split: str) -> list[str]:
  """The split's files, in the order of their names.

  Raises:
    NoSplitError: no such split; the message lists those that there are.
    DataError: no parquet files, several configs, or files that are missing.
  """
  prefix = f"{folder}/" if folder else ""
  names = sorted(name for name in dataset.files if name.endswith(".parquet"))
  places = {name: _place(name) for name in names if name.startswith(prefix)}
  configs = sorted({place.config for place in places.values()})
  # 1. One config.
  if not places:
    known = sorted({_place(name).config for name in names})
    has = (
      f"its folders of them are {known[:_LISTED]}"
      if known
      else (
        "if the hub has made some of its other files, they are at revision "
        "@refs/convert/parquet; images in folders: download and unpack them, "
        "and use folder:DIR"
      )
    )
    raise DataError(f"{dataset}: no parquet files in {folder or '/'!r}; {has}")
  if len(configs) > 1 and not split.endswith(".parquet"):
    raise DataError(
      f"{dataset} has {len(configs)} configs, {configs[:_LISTED]}: name one, "
      f"e.g. {hub_files.DATASETS}{dataset.repository}/{configs[-1]}"
    )
  # 2. Its split, or the files of a pattern.
  if split.endswith(".parquet"):
    return _matching(dataset, list(places), split)
  chosen = [name for name, place in places.items() if place.split == split]
  splits = sorted({place.split for place in places.values()})
  if not chosen:
    raise sources.NoSplitError(
      f"{dataset} has no split {split!r}: its splits are {splits[:_LISTED]}"
    )
  count = max(places[name].shards for name in chosen)
  if count and len(chosen) != count:
    raise DataError(
      f"{dataset} has {len(chosen)} files of split {split!r}, but they are "
      f"numbered as {count}: {chosen[0]}"
    )
  return chosen


def _listed(spec: str, split: str) -> tuple[hub_files.Dataset, list[str]]:
  """The data set, and the names of the split's files."""
  address, _ = _parse(spec)
  dataset = hub_files.list_dataset(address.repository, address.revision)
  return dataset, _files_of(dataset, address.path, split)


def missing(spec: str, split: str) -> Sequence[hub.Need]:
  """What a source would download; for errors see `ParquetSource`."""
  return [hub_files.need(*_listed(spec, split))]


def _matching(
  dataset: hub_files.Dataset, names: Sequence[str], pattern: str
) -> list[str]:
  chosen = fnmatch.filter(names, pattern)
  if not chosen:
    raise sources.NoSplitError(
      f"{dataset} has no files {pattern!r}: it has {names[:_LISTED]}"
    )
  return chosen


class _Columns(NamedTuple):
  """Image and label columns of a schema.

  Attributes:
    image: path of the column of encoded bytes.
    label: name of the column; '' if there is none.
    class_names: None if the labels are numbers without names.
  """

  image: str
  label: str
  class_names: tuple[str, ...] | None


def _is_image(field: pa.Field, feature: Mapping[str, Any] | None) -> bool:
  if feature is not None and feature.get("_type") != "Image":
    return False
  kind = field.type
  if pa.types.is_struct(kind):
    return kind.get_field_index("bytes") >= 0
  return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _columns(
  schema: pa.Schema, asked: Mapping[str, str], where: str
) -> _Columns:
  """Finds the columns by the hub's metadata, else by their types.

  Raises:
    DataError: no such column, several that may be meant, or one of another
      type; the message lists the columns.
  """
  there = ", ".join(f"{field.name}: {field.type}" for field in schema)
  listed = f"; the columns of {where} are {there}"
  # 1. What the hub's programs wrote of the columns.
  stored = (schema.metadata or {}).get(b"huggingface", b"{}")
  try:
    described = json.loads(stored).get("info", {}).get("features", {})
    # A list of something is a list with its feature.
    features = {k: v for k, v in described.items() if isinstance(v, dict)}
  except (ValueError, AttributeError) as error:
    raise DataError(f"{where}: its 'huggingface' metadata: {error}") from error
  unknown = [
    name for name in asked.values() if name and name not in schema.names
  ]
  if unknown:
    raise DataError(f"there is no column {unknown[0]!r}{listed}")
  # 2. The image.
  images = [f.name for f in schema if _is_image(f, features.get(f.name))]
  named = [asked["image"]] if asked.get("image") else images
  if len(named) != 1 or named[0] not in images:
    problem = (
      f"{named} are columns of images" if named else "no column of images"
    )
    if named and named[0] not in images:
      problem = f"{named[0]!r} is no column of encoded images"
    raise DataError(f"{problem}: name one by :image=COLUMN{listed}")
  image = schema.field(named[0])
  leaf = f"{image.name}.bytes" if pa.types.is_struct(image.type) else image.name
  # 3. The label.
  label = asked.get("label")
  if label is None:
    classes = [
      name
      for name in schema.names
      if features.get(name, {}).get("_type") == "ClassLabel"
    ]
    labels = ["label"] if "label" in schema.names else classes
    if len(labels) > 1:
      raise DataError(f"{labels} are labels: name one by :label=COLUMN{listed}")
    label = labels[0] if labels else ""
  if label and not pa.types.is_integer(schema.field(label).type):
    raise DataError(
      f"the labels {label!r} are no integers: name others by :label=COLUMN, or "
      f"take the images as one class by :label={listed}"
    )
  names = features.get(label, {}).get("names")
  return _Columns(leaf, label, tuple(map(str, names)) if names else None)


@contextlib.contextmanager
def _reading(path: pathlib.Path) -> Iterator[None]:
  """Names the file in what pyarrow raises."""
  try:
    yield
  except (pa.ArrowException, OSError) as error:
    raise DataError(
      f"{path} can't be read as parquet ({one_line(error)}): remove "
      f"{path.resolve()}, and the next start downloads it anew"
    ) from error


class _Group:
  """A row group's images; one thread reads them, others wait."""

  def __init__(self):
    self.lock = threading.Lock()
    self.images: pa.ChunkedArray | None = None


class ParquetSource(encoded.EncodedSource):
  """Images of one split, in the order of files and rows.

  A read takes a row group from its file, and a process keeps the latest ones,
  256 MB of encoded images. So small data sets are in memory after one pass,
  larger ones are fast to read in order, and any order costs a row group an
  image.
  """

  _UNSENT = (*encoded.EncodedSource._UNSENT, "_groups")

  def __init__(self, spec: str, *, split: str, class_order: str, **rest: Any):
    """Downloads the split's files if the hub's cache lacks them.

    Args:
      spec: see the module.
      split: of the data set, or a pattern of its files that ends in .parquet.
      class_order: '' or 'imagenet', for classes that are WordNet ids (see
        `sources.order_classes`).
      **rest: max_corrupt, decoder, exif: see `encoded.EncodedSource`.

    Raises:
      NoSplitError: the data set has no such split.
      HubError: see `hub_files`.
      DataError: no parquet files, several configs, missing or damaged files,
        no column of images, or labels that are no numbers.
    """
    # 1. The files.
    _, asked = _parse(spec)
    dataset, names = _listed(spec, split)
    self._files = hub_files.fetch_dataset(dataset, names)
    self._name, self._file_names = str(dataset), names
    # 2. Their columns and row groups, and the labels.
    columns: _Columns | None = None
    labels: list[np.ndarray] = []
    self._places: list[tuple[int, int]] = []  # file and row group
    rows: list[int] = []
    for number, path in enumerate(self._files):
      with _reading(path), pq.ParquetFile(path, memory_map=True) as file:
        if columns is None:
          columns = _columns(file.schema_arrow, asked, names[number])
        groups = range(file.num_row_groups)
        self._places += [(number, group) for group in groups]
        rows += [file.metadata.row_group(group).num_rows for group in groups]
        if columns.label:
          column = file.read([columns.label], use_threads=False).column(0)
          if column.null_count:
            raise DataError(
              f"{path}: rows without a label in {columns.label!r}"
            )
          labels.append(column.to_numpy().astype(np.int32))
    assert columns is not None
    self._column = columns.image
    self._ends = list(itertools.accumulate(rows))
    sizes = [(name, dataset.files[name]) for name in names]
    facts = json.dumps([sizes, self._ends, asked])
    self._sha256 = hashlib.sha256(facts.encode()).hexdigest()
    # 3. Their classes.
    count = self._ends[-1] if rows else 0
    label_of_row = (
      np.concatenate(labels) if labels else np.zeros(count, np.int32)
    )
    class_names = columns.class_names
    if not columns.label:
      class_names = (dataset.repository.rpartition("/")[2],)
    elif class_names is None:
      class_names = tuple(map(str, range(label_of_row.max(initial=-1) + 1)))
    class_names, label_of = sources.order_classes(class_names, class_order)
    bad = (label_of_row < 0) | (label_of_row >= len(label_of))
    if bad.any():
      index = int(bad.argmax())
      raise DataError(
        f"{self.path(index)}: label {label_of_row[index]} is none of "
        f"{len(label_of)} classes ({bad.sum()} rows): is split {split!r} "
        "without labels? :label= takes its images as one class"
      )
    self.labels = label_of[label_of_row]
    super().__init__(class_names, **rest)
    console.logger.info(
      "%s: split %r has %d images of %d classes.",
      *(self._name, split, count, len(class_names)),
    )

  def _open(self) -> None:
    super()._open()
    self._groups: dict[int, _Group] = {}  # the latest last

  def names_sha256(self) -> str:
    """Checksum of the files' names and sizes, their rows, and the columns."""
    return self._sha256

  def _find(self, index: int) -> tuple[int, int]:
    """(number of the row group, row in it)."""
    number = bisect.bisect_right(self._ends, index)
    return number, index - (self._ends[number - 1] if number else 0)

  def path(self, index: int) -> str:
    """hf://datasets/OWNER/NAME@COMMIT/FILE, row of the file's group."""
    number, row = self._find(index)
    file, group = self._places[number]
    return f"{self._name}/{self._file_names[file]}, row {row} of group {group}"

  def _images(self, number: int) -> pa.ChunkedArray:
    """The images of a row group, kept or read."""
    with self._lock:
      group = self._groups.pop(number, None) or _Group()
      self._groups[number] = group
    with group.lock:
      if group.images is None:
        file, of_file = self._places[number]
        path = self._files[file]
        with _reading(path), pq.ParquetFile(path, memory_map=True) as opened:
          table = opened.read_row_group(
            of_file, columns=[self._column], use_threads=False
          )
        group.images = table.column(0)
        with self._lock:
          self._drop_oldest()
      return group.images

  def _drop_oldest(self) -> None:
    """Keeps the newest row groups, up to the bound; the last one always."""
    kept = 0
    for number, group in reversed([*self._groups.items()]):
      kept += group.images.nbytes if group.images is not None else 0
      if kept > _KEPT_BYTES and number != next(reversed(self._groups)):
        del self._groups[number]

  def read_bytes(self, index: int) -> bytes:
    """The encoded image of a row; b'' of one that has none.

    Raises:
      DataError: the file is damaged or gone.
    """
    number, row = self._find(index)
    value = self._images(number)[row].as_py()
    # Images are structs of their bytes and the path that they had.
    return (value["bytes"] if isinstance(value, dict) else value) or b""
