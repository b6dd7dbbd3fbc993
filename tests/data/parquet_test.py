"""Parquet files of data sets on a hub: columns, splits, row groups, damage."""

import functools
import http.server
import io
import json
import pickle
import re
import tarfile
from concurrent import futures

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from drift_jax.data import hub_files, parquet, sources
from drift_jax.data.images import ImageReader
from drift_jax.data.loader import Loader
from drift_jax.system.errors import DataError
from tests.data.decode_test import encode
from tests.data.pictures import opened, picture, seeds_of
from tests.fake_hub import COMMIT, hub, serving
from tests.process import call, call_together

NAMES = ["cat", "dog", "eel"]
LABELS = [2, 0, 1, 1, 2, 0, 0, 1, 2]
SPEC = "hf://datasets/someone/pictures"
SHARD = "data/{}-{:05d}-of-{:05d}.parquet"


def png(seed):
  return encode(picture(seed), "PNG")


def table(
  seeds, *, image="image", label="label", names=NAMES, as_struct=True, **more
):
  """Pictures of these seeds, with their labels, as `datasets` writes them."""
  data = [png(seed) for seed in seeds]
  structs = [{"bytes": each, "path": f"{i}.png"} for i, each in enumerate(data)]
  columns = {image: structs if as_struct else data}
  features = {image: {"_type": "Image"}}
  if label:
    columns[label] = [LABELS[seed] for seed in seeds]
    features[label] = {"names": names, "_type": "ClassLabel"}
  columns |= more
  metadata = {"huggingface": json.dumps({"info": {"features": features}})}
  return pa.table(columns).replace_schema_metadata(metadata if names else None)


def parquet_bytes(contents, rows=2):
  sink = pa.BufferOutputStream()
  pq.write_table(contents, sink, row_group_size=rows)
  return sink.getvalue().to_pybytes()


def pictures(**options):
  """{FILE: bytes}: seven images for training in two files, two held out."""
  return {
    SHARD.format("train", 0, 2): parquet_bytes(table(range(4), **options)),
    SHARD.format("train", 1, 2): parquet_bytes(table(range(4, 7), **options)),
    SHARD.format("test", 0, 1): parquet_bytes(table([7, 8], **options)),
    "README.md": b"# Pictures",
  }


@pytest.fixture
def served(tmp_path, monkeypatch):
  """Files in the place of the hub's: a function that sets them."""
  files = {}

  def fetch(dataset, names):
    assert dataset.files.keys() == files.keys()
    return [tmp_path / name for name in names]

  def serve(content):
    files.update(content)
    for name, data in content.items():
      (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
      (tmp_path / name).write_bytes(data)
    return tmp_path

  def listed(repository, revision):
    del revision
    sizes = {name: len(data) for name, data in files.items()}
    return hub_files.Dataset(repository, COMMIT, sizes)

  monkeypatch.setattr(hub_files, "list_dataset", listed)
  monkeypatch.setattr(hub_files, "fetch_dataset", fetch)
  return serve


def test_images_labels_and_names_come_by_index(served):
  served(pictures())
  source = opened(SPEC)
  assert source.class_names == tuple(NAMES)
  assert (
    source.labels.tolist() == LABELS[:7] and source.labels.dtype == np.int32
  )
  assert seeds_of(source) == list(range(7))
  assert seeds_of(source, [6, 0, 5]) == [6, 0, 5]
  test = opened(f"{SPEC}@{COMMIT}/data", "test")
  assert test.labels.tolist() == LABELS[7:] and seeds_of(test) == [7, 8]
  assert seeds_of(opened(SPEC, "data/*-00001-of-*.parquet")) == [4, 5, 6]
  copy = pickle.loads(pickle.dumps(source))
  assert seeds_of(copy) == list(range(7)) and copy.path(5) == source.path(5)
  assert f"@{COMMIT}/data/train-00001-of-00002" in source.path(5)
  assert source.names_sha256() == copy.names_sha256() != test.names_sha256()


@pytest.mark.parametrize(
  ("path", "place"),
  [
    ("mnist/train-00000-of-00001.parquet", ("mnist", "train", 1)),
    ("data/val-00003-of-00010-0123456789abcdef.parquet", ("data", "val", 10)),
    ("full/train/0002.parquet", ("full", "train", 0)),
    ("test.parquet", ("", "test", 0)),
    ("0000.parquet", ("", "train", 0)),
    ("a/cifar10_train_1.parquet", ("a", "cifar10_train", 0)),
  ],
)
def test_where_a_file_belongs_by_its_name(path, place):
  assert parquet._place(path) == place


def test_the_same_batches_for_any_threads_and_workers(served, monkeypatch):
  """Also if row groups are dropped all the time."""
  served(pictures())

  def batches(kept, **reading):
    monkeypatch.setattr(parquet, "_KEPT_BYTES", kept)
    reader = ImageReader(
      opened(SPEC),
      size=8,
      channels=3,
      crop="random",
      crop_scale=(0.5, 1.0),
      flip=True,
      wire="uint8",
    )
    loader = Loader(reader, batch_size=5, seed=1, **reading)
    try:
      return np.stack([next(loader)["image"] for _ in range(6)])
    finally:
      loader.close()

  first = batches(2**28, num_threads=0)
  for kept, reading in (
    (0, {"num_threads": 4}),
    (1500, {"num_threads": 3}),
    (0, {"num_threads": 2, "num_workers": 2}),
  ):
    np.testing.assert_array_equal(batches(kept, **reading), first)


def test_memory_is_bounded_by_the_row_groups_that_are_kept(served, monkeypatch):
  served(pictures())
  reads = []
  read = pq.ParquetFile.read_row_group
  monkeypatch.setattr(
    pq.ParquetFile,
    "read_row_group",
    lambda self, *args, **options: (
      reads.append(1) or read(self, *args, **options)
    ),
  )
  source = opened(SPEC)
  with futures.ThreadPoolExecutor(8) as pool:
    assert seeds_of(source) == list(range(7))
    assert list(pool.map(lambda i: seeds_of(source, [i]), [*range(7)] * 20))
  assert len(reads) == 4  # one for each row group, whoever asks first
  monkeypatch.setattr(parquet, "_KEPT_BYTES", 0)
  del reads[:]
  source = opened(SPEC)
  assert seeds_of(source, [0, 1, 0, 4, 5, 0]) == [0, 1, 0, 4, 5, 0]
  assert len(reads) == 3 and len(source._groups) == 1


@pytest.mark.parametrize(
  ("options", "spec", "class_names", "labels"),
  [
    ({"image": "img"}, "", NAMES, LABELS),
    ({"label": "fine"}, "", NAMES, LABELS),
    ({"names": None, "as_struct": False}, "", list("012"), LABELS),
    ({"names": None}, ":image=image,label=label", list("012"), LABELS),
    ({"label": ""}, "", ["pictures"], [0] * 9),
    ({}, ":label=", ["pictures"], [0] * 9),
  ],
)
def test_columns(served, options, spec, class_names, labels):
  served(pictures(**options))
  source = opened(SPEC + spec)
  assert source.class_names == tuple(class_names)
  assert source.labels.tolist() == labels[:7]
  assert seeds_of(source) == list(range(7))


def test_columns_of_lists_are_left_alone(served):
  contents = table(range(7)).append_column("caps", pa.array([["a", "b"]] * 7))
  described = json.loads(contents.schema.metadata[b"huggingface"])
  described["info"]["features"]["caps"] = [{"dtype": "string"}]
  contents = contents.replace_schema_metadata(
    {"huggingface": json.dumps(described)}
  )
  served({"train.parquet": parquet_bytes(contents)})
  source = opened(SPEC)
  assert source.class_names == tuple(NAMES)
  assert seeds_of(source) == list(range(7))
  with pytest.raises(DataError, match="labels 'caps' are no integers"):
    opened(f"{SPEC}:label=caps")


def test_wordnet_ids_and_greyscale(served):
  names = ["n02123045", "n01440764", "n15075141"]
  contents = table(range(7), names=names)
  grey = encode(picture(0).convert("L"), "PNG")
  images = [{"bytes": grey, "path": None}] * 7
  contents = contents.set_column(0, "image", pa.array(images))
  served({"train.parquet": parquet_bytes(contents)})
  source = opened(SPEC, class_order="imagenet")
  assert source.labels.tolist() == [[281, 0, 999][i] for i in LABELS[:7]]
  want = np.asarray(picture(0).convert("L"))
  np.testing.assert_array_equal(np.asarray(source.image(3).convert("L")), want)


def test_images_are_turned_upright_if_asked_wherever_they_lie(served, tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6
  data = encode(picture(0), "JPEG", exif=exif)
  stored = np.asarray(Image.open(io.BytesIO(data)))
  images = pa.array([{"bytes": data, "path": None}])
  contents = table([0]).set_column(0, "image", images)
  served({"train.parquet": parquet_bytes(contents)})
  (tmp_path / "images" / "a").mkdir(parents=True)
  (tmp_path / "images" / "a" / "0.jpg").write_bytes(data)
  with tarfile.open(tmp_path / "images.tar", "w") as archive:
    archive.add(tmp_path / "images", "images")
  for spec in (SPEC, f"folder:{tmp_path}/images", f"tar:{tmp_path}/images.tar"):
    np.testing.assert_array_equal(opened(spec)[0], stored)
    upright = opened(spec, exif=True)
    again = pickle.loads(pickle.dumps(upright))
    np.testing.assert_array_equal(upright[0], np.rot90(stored, -1))
    np.testing.assert_array_equal(again[0], upright[0])
  with pytest.raises(ValueError, match="exif=True: the digits"):
    opened("digits", exif=True)


def test_an_image_that_can_not_be_decoded_is_replaced(served):
  images = [{"bytes": png(seed), "path": None} for seed in range(7)]
  images[1]["bytes"], images[2] = b"<html>", None
  contents = table(range(7)).set_column(0, "image", pa.array(images))
  served({"train.parquet": parquet_bytes(contents)})
  assert seeds_of(opened(SPEC, max_corrupt=2)) == [0, 5, 3, 3, 4, 5, 6]
  with pytest.raises(DataError, match="train.parquet, row 1 of group 0: not a"):
    opened(SPEC).image(1)


def broken(seeds=range(4)):
  """A file whose footer is whole, but not its row groups."""
  data = bytearray(parquet_bytes(table(seeds), rows=2))
  data[100:1100] = bytes(1000)
  return bytes(data)


BAD = [
  ({"README.md": b""}, SPEC, "no parquet files.*refs/convert/parquet"),
  (pictures(), f"{SPEC}/fine", r"no parquet files in 'fine'.*\['data'\]"),
  (
    {f"{n}/train.parquet": b"" for n in ("coarse", "fine")},
    SPEC,
    r"2 configs, \['coarse', 'fine'\]: name one",
  ),
  (
    {SHARD.format("train", 0, 2): b""},
    SPEC,
    "has 1 files of split 'train', but .* numbered as 2",
  ),
  (pictures(), f"{SPEC}:image=img", "no column 'img'.*image: struct.*label"),
  (pictures(), f"{SPEC}:image=label", "'label' is no column of encoded images"),
  (pictures(), f"{SPEC}:label=image", "labels 'image' are no integers"),
  (pictures(), f"{SPEC}:crop=a", "'crop=a' is unknown, want hf://datasets/O"),
  (pictures(), "hf://mae_latent_640", "want hf://datasets/OWNER/NAME"),
  (
    {"train.parquet": parquet_bytes(pa.table({"text": ["a"], "n": [1]}))},
    SPEC,
    "no column of images.*text: string, n: int64",
  ),
  (
    {"train.parquet": parquet_bytes(table([0], img=[b"a"], names=None))},
    SPEC,
    r"\['image', 'img'\] are columns of images: name one",
  ),
  (
    {"train.parquet": parquet_bytes(table([0], names=["cat"]))},
    SPEC,
    r"row 0 of group 0: label 2 is none of 1 classes \(1 rows\)",
  ),
  ({"train.parquet": b"PAR1"}, SPEC, "train.parquet can't be read.*remove"),
  ({"train.parquet": broken()}, SPEC, "train.parquet can't be read.*remove"),
]


@pytest.mark.parametrize(("content", "spec", "message"), BAD)
def test_bad_data_sets_are_one_line(served, content, spec, message):
  served(content)
  with pytest.raises((DataError, ValueError), match=message) as caught:
    opened(spec).image(0)
  assert "\n" not in str(caught.value)


def test_a_split_that_is_not_there(served):
  served(pictures())
  for split in ("validation", "data/x*.parquet"):
    with pytest.raises(sources.NoSplitError, match="test.*train"):
      opened(SPEC, split)


@pytest.mark.parametrize("status", [404, 429, 503])
def test_a_hub_that_is_out_of_order_is_done_without(
  status, tmp_path, monkeypatch, caplog
):
  """But not what it says: a data set that is gone is gone."""

  class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, format, *args):
      del format, args

    def do_GET(self):
      self.send_response(status)
      self.send_header("Content-Length", "0")
      self.end_headers()

  def listed(address):
    api = functools.partial(huggingface_hub.HfApi, endpoint=address)
    monkeypatch.setattr(hub_files.huggingface_hub, "HfApi", api)
    return hub_files.list_dataset("someone/pictures", None)

  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  caplog.set_level("INFO", "drift_jax")
  with hub({"datasets/someone/pictures": {"train.parquet": b"1"}}) as address:
    known = listed(address)
  with serving(Handler) as address:
    if status == 404:
      with pytest.raises(hub_files.hub.HubError, match="someone/pictures"):
        listed(address)
      return
    assert listed(address) == known and known.files == {"train.parquet": 1}
  assert str(status) in caplog.text


OPEN_EACH = """
import sys
from huggingface_hub import constants
from drift_jax.data.sources import open_source
from drift_jax.system import console
console.setup()
# Bytes that are lost at most when a download breaks off.
constants.DOWNLOAD_CHUNK_SIZE = 100
for spec in sys.argv[1:]:
  spec, _, split = spec.partition("!")
  try:
    source = open_source(spec, split=split or "train", data_dir="",
      class_order="", max_corrupt=0, decoder="pillow")
    print(len(source), len(source[len(source) - 1]))
  except (ValueError, OSError) as error:
    print(error)
"""


def said(*specs, **variables):
  done = call("-c", OPEN_EACH, *specs, **variables)
  assert done.returncode == 0, done.stderr
  return done.stdout.splitlines(), done.stderr


@pytest.mark.system
def test_a_hub_is_asked_once_and_the_cache_from_then_on(tmp_path):
  """Two processes at a time; a download that broke off; then no hub."""
  home, other = tmp_path / "cache", tmp_path / "other"
  cache = {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
  files = pictures()
  repositories = {
    "datasets/someone/pictures": files,
    "datasets/someone/private": None,
  }
  train = sorted(name for name in files if "train" in name)
  downloads = []
  with hub(repositories, cut=train[:1], downloads=downloads) as address:
    online = cache | {"HF_ENDPOINT": address}
    # 1. Both get all of it, and each byte comes once.
    call_together(*[("-c", OPEN_EACH, SPEC) for _ in range(2)], **online)
    fetched = [name for _, name, first in downloads if not first]
    assert sorted(fetched) == train
    (first,) = [first for _, name, first in downloads if first]
    half = len(files[train[0]]) // 2
    assert half - 100 <= first <= half  # it went on from there
    # 2. Revisions, and what can't be had.
    lines, told = said(
      SPEC,
      f"{SPEC}@{COMMIT}",
      f"{SPEC}@v2",
      "hf://datasets/someone/private",
      "hf://datasets/someone/nothing",
      **online,
    )
    assert lines[:2] == ["7 10", "7 10"] and "Downloading" not in told
    for line, words in zip(
      lines[2:],
      ("no revision 'v2'", "it is gated: accept", "no such data set, or it is"),
      strict=True,
    ):
      assert words in line, line
    # 3. What comes is said before.
    _, told = said(SPEC, HF_HOME=str(other), HF_ENDPOINT=address)
    assert re.search(r"Downloading 2 of 2 files of .* \(\d.* kB\) to", told)
  # 4. Without the hub: what is there, and no part of a split.
  offline = cache | {"HF_HUB_OFFLINE": "1"}
  lines, told = said(SPEC, f"{SPEC}@{COMMIT}", f"{SPEC}!test", **offline)
  assert lines[:2] == ["7 10", "7 10"] and "is taken from the cache" in told
  assert "1 of 1 files" in lines[2] and "are not there" in lines[2]
  ((line,), _) = said("hf://datasets/someone/unseen", **offline)
  assert "HF_HUB_OFFLINE" in line
  gone = cache | {"HF_ENDPOINT": address}
  assert said(SPEC, **gone)[0] == ["7 10"]
