"""The caching job: what it stores, and what survives a kill."""

import dataclasses
import functools
import importlib.util
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image

from drift_jax.data import encoded, latents, sources, transforms
from drift_jax.data.latent_format import LatentCacheError
from drift_jax.system import console
from drift_jax.system.errors import DataError
from drift_jax.tools import cache_latents
from drift_jax.tools.work import cache_latents as work
from drift_jax.training import artifacts
from drift_jax.training.inputs import HELD_OUT_SEED
from tests.autoencoders import save_vae
from tests.conftest import assert_close
from tests.data.pictures import opened, picture
from tests.process import process_environment
from tests.tools.published import as_tensors, fake_torch

ROOT = pathlib.Path(__file__).parent.parent.parent
SIZE = 16
KEYS = ("moments", "moments_flip")
HAS_TORCH = importlib.util.find_spec("torch") is not None
NUM_IMAGES = 23


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
  return save_vae(tmp_path_factory.mktemp("vae"), seed=0)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  """23 pictures of three classes, of several sizes and formats."""
  path = tmp_path_factory.mktemp("pictures")
  rng = np.random.default_rng(0)
  for index in range(NUM_IMAGES):
    folder = path / f"class{index % 3}"
    folder.mkdir(exist_ok=True)
    height, width = rng.integers(SIZE - 3, 3 * SIZE, 2)
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    suffix = ("png", "jpg", "webp")[index % 3]
    Image.fromarray(pixels).save(folder / f"{index:02d}.{suffix}")
  return path


def flags(pictures, vae, out, /, **changes) -> list[str]:
  given = {
    "source": f"folder:{pictures}",
    "vae": vae,
    "out": out,
    "image_size": SIZE,
    "batch_size": 3,
    "images_per_shard": 4,
  } | changes
  return [f"--{name}={value}" for name, value in given.items()]


def run(pictures, vae, out, /, **changes):
  """The job in this process, on its eight devices."""
  return work.run(cache_latents.parse(flags(pictures, vae, out, **changes)))


@pytest.fixture(scope="module")
def whole(pictures, vae, tmp_path_factory):
  """The cache that an uninterrupted run makes."""
  out = tmp_path_factory.mktemp("whole")
  assert run(pictures, vae, out)
  return out


def files(folder: pathlib.Path) -> dict[str, bytes]:
  return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_moments_of_the_crop_and_of_its_mirror_image(whole, pictures, vae):
  """Every image against the encoder alone, without batches and padding."""
  reader = latents.LatentReader(whole, "train", dtype="float32")
  source = opened(f"folder:{pictures}")
  assert_array_equal(reader.labels, source.labels)
  assert reader.class_names == ("class0", "class1", "class2")
  assert reader.sample_shape == (8, 8, 2) and len(reader) == NUM_IMAGES
  artifact = artifacts.load(vae)
  assert reader.settings.vae_sha256 == artifact.sha256
  crops = np.stack(
    [
      np.asarray(transforms.center_crop(source.image(i), SIZE))
      for i in range(NUM_IMAGES)
    ]
  )
  encode = jax.jit(functools.partial(artifact.module.apply, method="encode"))
  means = []
  for flip, pixels in enumerate((crops, crops[:, :, ::-1])):
    images = pixels.astype(np.float32) / 127.5 - 1
    want = encode({"params": artifact.params}, images)
    records = [
      np.frombuffer(reader._record(i // 4, 2 * (i % 4) + flip), np.float16)
      for i in range(NUM_IMAGES)
    ]
    stored = np.stack(records).reshape(NUM_IMAGES, 2, 8, 8, 2)
    # Stored as float16: 2^-11 at worst.
    assert_close(stored[:, 0], want[..., :2], 3e-4, "mean")
    assert_close(stored[:, 1], want[..., 2:], 3e-4, "log variance")
    means.append(stored[:, 0])
  # The encoder is no mirror: a flip of the latent would be something else.
  difference = np.abs(means[0][:, :, ::-1] - means[1]).mean()
  assert difference > 0.05 * means[0].std()


def test_shards_are_made_where_they_are_missing(whole, pictures, vae, tmp_path):
  """By two processes; again, what is damaged or gone."""
  folder = tmp_path / "train"
  assert not run(pictures, vae, tmp_path, process_index=1, process_count=2)
  names = [f"train-0000{k}-of-00006" for k in (1, 3, 5)]
  assert sorted(files(folder)) == ["settings.json"] + sorted(
    f"{name}.{suffix}" for name in names for suffix in ("arrayrecord", "json")
  )
  with pytest.raises(LatentCacheError, match="3 of its 6 shards are missing"):
    latents.LatentReader(tmp_path, "train")
  assert run(pictures, vae, tmp_path, process_index=0, process_count=2)
  assert files(folder) == files(whole / "train")
  damaged, gone = (
    folder / f"train-0000{k}-of-00006.arrayrecord" for k in (2, 4)
  )
  data = bytearray(damaged.read_bytes())
  data[70_000] ^= 4
  damaged.write_bytes(data)
  gone.unlink()
  before = {p: p.stat().st_mtime_ns for p in folder.glob("*.arrayrecord")}
  assert run(pictures, vae, tmp_path)
  assert files(folder) == files(whole / "train")
  redone = {
    path
    for path in folder.glob("*.arrayrecord")
    if path.stat().st_mtime_ns != before.get(path)
  }
  assert redone == {damaged, gone}


SLOW = """
import sys, time
from drift_jax.data import transforms
from drift_jax.tools import cache_latents

crop = transforms.center_crop

def slow(image, size):
  time.sleep(0.2)
  return crop(image, size)

transforms.center_crop = slow
cache_latents.main(sys.argv[1:])
"""


@pytest.mark.system
def test_a_killed_job_goes_on(whole, pictures, vae, tmp_path):
  """SIGKILL while a shard is being written, then the same command again."""
  folder = tmp_path / "train"
  job = subprocess.Popen(
    [
      *(sys.executable, "-c", SLOW),
      *flags(pictures, vae, tmp_path, num_threads=2),
    ],
    cwd=ROOT,
    env=process_environment(8),
    stderr=subprocess.PIPE,
    text=True,
  )
  deadline = time.monotonic() + 120
  while not (list(folder.glob("*-of-*.json")) and list(folder.glob(".*.tmp"))):
    assert job.poll() is None, job.communicate()[1]
    assert time.monotonic() < deadline
    time.sleep(0.01)
  job.send_signal(signal.SIGKILL)
  job.communicate()
  assert not (folder / "manifest.json").exists()
  finished = {
    path: path.stat()
    for record in folder.glob("*-of-*.json")
    for path in (record, record.with_suffix(".arrayrecord"))
  }
  assert 0 < len(finished) < 12 and list(folder.glob(".*.tmp"))
  with pytest.raises(LatentCacheError, match="of its 6 shards are missing"):
    latents.LatentReader(tmp_path, "train")
  assert run(pictures, vae, tmp_path)
  assert files(folder) == files(whole / "train")
  for path, stat in finished.items():
    assert path.stat().st_ino == stat.st_ino, "a finished shard was redone"
    assert path.stat().st_mtime_ns == stat.st_mtime_ns


def test_a_corrupt_image(pictures, vae, tmp_path, whole):
  """Stops the job by default; its shard is not finished."""
  shutil.copytree(pictures, tmp_path / "pictures")
  victim = tmp_path / "pictures/class1/10.jpg"
  os.truncate(victim, victim.stat().st_size // 2)
  places = tmp_path / "pictures", vae, tmp_path / "out"
  with pytest.raises(encoded.CorruptImageError, match="class1/10.jpg"):
    run(*places)
  index = 8 + 3  # eight images of class0 come first
  shard = f"train-0000{index // 4}-of-00006.arrayrecord"
  names = files(tmp_path / "out/train")
  assert shard not in names and "manifest.json" not in names
  assert not any(name.startswith(".") for name in names)
  assert run(*places, max_corrupt=1)
  reader = latents.LatentReader(tmp_path / "out", "train")
  healthy = latents.LatentReader(whole, "train")
  others = np.delete(np.arange(NUM_IMAGES), index)
  assert_array_equal(reader.fixed(others), healthy.fixed(others))
  # The next of its class stands in.
  assert_array_equal(
    reader.fixed(np.array([index])), healthy.fixed(np.array([index + 1]))
  )


def test_other_settings_are_refused(whole, pictures, vae, tmp_path):
  shutil.copytree(pictures, tmp_path / "more")
  (tmp_path / "more/class0/00.png").rename(tmp_path / "more/class2/00.png")
  for changes, part in (
    ({"vae": save_vae(tmp_path / "other", seed=1)}, "vae_sha256: cached '"),
    ({"image_size": 18}, "image_size: cached 16, now 18"),
    ({"dtype": "bfloat16"}, "dtype: cached 'float16', now 'bfloat16'"),
    ({"compute_dtype": "bfloat16"}, "compute_dtype: cached 'float32', now"),
    ({"images_per_shard": 5}, "images_per_shard: cached 4, now 5"),
    ({"source": f"folder:{tmp_path}/more"}, "labels_sha256: cached"),
  ):
    with pytest.raises(LatentCacheError, match=part):
      run(pictures, vae, whole, **changes)


def test_a_folder_without_a_test_split_is_divided(
  whole, pictures, vae, tmp_path
):
  """As training divides it: what is held out is in one split alone."""
  for split in ("train", "test"):
    assert run(pictures, vae, tmp_path, split=split, held_out=0.25)
  source = opened(f"folder:{pictures}")
  divided = sources.held_out(source, per_class=0.25, seed=HELD_OUT_SEED)
  every = latents.LatentReader(whole, "train", dtype="float32")
  for split, part in zip(("train", "test"), divided, strict=True):
    reader = latents.LatentReader(tmp_path, split, dtype="float32")
    assert_array_equal(reader.labels, part.labels)
    values = reader.fixed(np.arange(len(reader)))
    assert_close(values, every.fixed(part.indices), 1e-3)
  assert np.bincount(reader.labels).tolist() == [2, 2, 2]


@pytest.mark.parametrize(
  ("changes", "part"),
  [
    ({"image_size": 17}, "image_size=17 must be a positive multiple"),
    ({"source": "folder:/nowhere"}, "--source=folder:/nowhere --split=train: "),
    ({"source": "digits"}, "no 8-bit RGB.* valid options are .*folder:DIR"),
    ({"split": "test"}, "--split=test: .* has no split 'test'"),
  ],
)
def test_mistakes(pictures, vae, tmp_path, changes, part):
  with pytest.raises(LatentCacheError, match=part):
    run(pictures, vae, tmp_path / "never", **changes)
  assert not (tmp_path / "never").exists()


def test_a_model_that_is_no_autoencoder(pictures, vae, tmp_path, monkeypatch):
  found = artifacts.opened(vae)
  mae = dataclasses.replace(found.artifact, kind="mae")
  changed = found._replace(artifact=mae)
  monkeypatch.setattr(artifacts, "opened", lambda *args, **kw: changed)
  with pytest.raises(LatentCacheError, match="kind 'mae', want 'vae'"):
    run(pictures, vae, tmp_path)


def save_torch(monkeypatch, path, content):
  """With torch if it is installed, else as its stand-in reads it."""
  path.parent.mkdir(parents=True, exist_ok=True)
  if HAS_TORCH:
    import torch

    tensors = {k: torch.from_numpy(v) for k, v in content.items()}
    torch.save(tensors, path)
    return
  with path.open("wb") as file:
    np.savez(file, **content)

  def read(path):
    with np.load(path) as arrays:
      return as_tensors(arrays)

  fake_torch(monkeypatch, read)


@pytest.fixture
def drawn(tmp_path, monkeypatch):
  """The authors' cache: 7 images of two classes; a split with other classes."""
  rng = np.random.default_rng(0)
  values = rng.standard_normal((7, 2, 8, 8, 2)).astype(np.float32)
  for i, pair in enumerate(values):
    path = tmp_path / f"train/n0{i % 2}/{i}.pt"
    content = dict(zip(KEYS, pair, strict=True))
    save_torch(monkeypatch, path, content)
  path = tmp_path / "val/n01/0.pt"
  save_torch(monkeypatch, path, {"moments_flip": pair[0], "moments": pair[1]})
  return tmp_path, values[[0, 2, 4, 6, 1, 3, 5]]


def test_the_authors_cache_is_imported_to_the_bit(drawn, vae, tmp_path):
  folder, values = drawn
  out = tmp_path / "out"
  for split in ("train", "val"):
    assert run("", vae, out, source=f"torch:{folder}", split=split)
  reader = latents.LatentReader(
    out,
    "train",
    dtype="float32",
    expected_vae_sha256=artifacts.load(vae).sha256,
  )
  assert reader.class_names == ("n00", "n01")
  assert_array_equal(reader.labels, [0] * 4 + [1] * 3)
  indices = np.arange(7).repeat(8)
  read = reader.read(indices, [np.random.default_rng(i) for i in range(56)])
  is_mirrored = (read == values[indices, 1]).all((1, 2, 3))
  assert 10 < is_mirrored.sum() < 46
  want = values[indices, is_mirrored.astype(int)]
  assert_array_equal(read, want)
  held_out = latents.LatentReader(out, "val", dtype="float32")
  assert_array_equal(held_out.labels, [1])
  assert_array_equal(held_out.fixed(np.array([0])), values[None, 3, 1])


@pytest.mark.parametrize(
  ("content", "part"),
  [
    ({"latent": np.zeros((8, 8, 2), "f4")}, "no arrays moments and moments_fl"),
    ({"moments": np.zeros((8, 8, 2), "f4")}, "no arrays moments and moments_f"),
    (dict.fromkeys(KEYS, np.zeros((4, 8, 2), "f4")), r"\(4, 8, 2\), but the"),
    (dict.fromkeys(KEYS, np.zeros((8, 8, 2), "f2")), "moments is float16"),
    (dict.fromkeys(KEYS, np.full((8, 8, 2), np.inf, "f4")), "not finite"),
    (b"PK", r"0.pt \(2 bytes\) can't be read as a torch file"),
    (None, "torch, which is not installed: pip install torch"),
  ],
)
def test_a_file_of_something_else(
  drawn, vae, tmp_path, monkeypatch, content, part
):
  folder, _ = drawn
  path = folder / "train/n00/0.pt"
  if content is None:
    monkeypatch.setitem(sys.modules, "torch", None)
  elif isinstance(content, bytes):
    path.write_bytes(content)
  else:
    save_torch(monkeypatch, path, content)
  with pytest.raises(DataError, match=part) as error:
    run("", vae, tmp_path / "out", source=f"torch:{folder}")
  assert content is None or str(path) in str(error.value)
  assert not (tmp_path / "out/train/manifest.json").exists()


def test_images_are_turned_upright_and_the_cache_says_so(vae, tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 3
  for name in ("turned", "upright"):
    (tmp_path / name / "a").mkdir(parents=True)
  file = tmp_path / "turned" / "a" / "0.jpg"
  picture(0, (SIZE, SIZE)).save(file, exif=exif)
  upright = Image.open(file).transpose(Image.Transpose.ROTATE_180)
  upright.save(tmp_path / "upright" / "a" / "0.png")
  shards = {}
  for name, also in (("turned", ["--exif"]), ("upright", [])):
    out = tmp_path / f"{name}_latents"
    given = flags(tmp_path / name, vae, out) + also
    assert work.run(cache_latents.parse(given))
    (shard,) = (out / "train").glob("*.arrayrecord")
    shards[name] = shard.read_bytes()
    reader = latents.LatentReader(out, "train", dtype="float32")
    assert ("EXIF" in reader.settings.source) == bool(also)
  assert shards["turned"] == shards["upright"]


def test_half_precision(pictures, vae, tmp_path, whole):
  half_precision = {"dtype": "bfloat16", "compute_dtype": "bfloat16"}
  run(pictures, vae, tmp_path, batch_size=64, **half_precision)
  half = latents.LatentReader(tmp_path, "train")
  full = latents.LatentReader(whole, "train")
  indices = np.arange(NUM_IMAGES)
  assert_close(half.fixed(indices), full.fixed(indices), 3e-2)
  assert not np.array_equal(half.fixed(indices), full.fixed(indices))


@pytest.mark.parametrize(
  ("argv", "part"),
  [
    ([], "required: --source, --vae"),
    (["--process_index=0"], "give both"),
    (["--process_index=2", "--process_count=2"], "must lie in [0, 2)"),
    (["--batch_size=0"], "--batch_size=0 must be at least 1"),
    (["--dtype=int8"], "invalid choice: 'int8'"),
    (["--source=torch:d", "--dtype=bfloat16"], "--dtype=bfloat16: of images"),
    (["--held_out=1.5"], "--held_out=1.5 --split=train: want a number"),
    (["--held_out=2", "--split=val"], "one of ['train', 'test']"),
    (["--source=torch:d", "--max_corrupt=1"], "--max_corrupt=1: of images"),
    (["--source=npy:d", "--image_size=9"], "--image_size=9: of images only"),
    (["--source=npy:d", "--vae=v"], "--vae=v: of images only; the latents of"),
  ],
)
def test_usage(argv, part):
  needed = ["--source=s", "--vae=v"] if argv else []
  with pytest.raises(SystemExit) as error:
    cache_latents.main(["--out=o", *needed, *argv])
  assert part in str(error.value.code)


def test_main(whole, pictures, vae, tmp_path, monkeypatch, caplog):
  """The command line: cache, verify, and one line for a mistake."""
  monkeypatch.setattr(console, "setup", lambda: None)
  monkeypatch.setattr(console.logger, "propagate", True)
  monkeypatch.setattr(console, "LOG_SECONDS", 0.0)
  caplog.set_level(logging.INFO, "drift_jax")
  cache_latents.main(flags(pictures, vae, tmp_path))
  assert files(tmp_path / "train") == files(whole / "train")
  log = [record.getMessage() for record in caplog.records]
  assert any(
    line.startswith("Encoding 20/23 images (") and "s left" in line
    for line in log
  )
  assert log[-1] == f"{tmp_path}/train is complete: 23 images."
  cache_latents.main(["--verify", f"--out={tmp_path}"])
  assert "is whole" in caplog.records[-1].getMessage()
  shard = tmp_path / "train/train-00003-of-00006.arrayrecord"
  data = bytearray(shard.read_bytes())
  data[-1] ^= 1
  shard.write_bytes(data)
  with pytest.raises(SystemExit, match=f"Error: 1 of 6 shards: {shard} is dam"):
    cache_latents.main(["--verify", f"--out={tmp_path}"])
  with pytest.raises(SystemExit, match="convert_weights vae .*--out=/nowhere"):
    cache_latents.main(flags(pictures, "/nowhere", tmp_path))
  # It is not damaged, so that --max_corrupt does not pass over it.
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
  with pytest.raises(SystemExit, match="Error: .* too large, not damaged"):
    cache_latents.main(flags(pictures, vae, tmp_path / "new"))
