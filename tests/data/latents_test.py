"""The latent cache: what is written is read, and damage is never believed."""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import pickle
import re
import resource
import shutil

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from scipy import stats

from drift_jax.data import latent_format, latent_writer, latents
from drift_jax.data.latent_format import LatentCacheError, Settings
from drift_jax.data.sources import labels_sha256
from tests.conftest import assert_close

LABELS = np.arange(11, dtype=np.int32) % 3
SETTINGS = Settings(
  source="folder:pictures",
  split="train",
  num_images=11,
  labels_sha256=labels_sha256(LABELS),
  class_names=("cat", "dog", "owl"),
  image_size=32,
  vae_sha256="a" * 64,
  scaling_factor=0.18215,
  downsampling=8,
  latent_channels=3,
  dtype="float16",
  compute_dtype="float32",
  images_per_shard=4,
)


def random_moments(count: int, settings: Settings = SETTINGS) -> np.ndarray:
  """[count, 2, h, w, 2 c]: mean ~ 5 N(0, 1), log of variance in [-20, 2]."""
  rng = np.random.default_rng(0)
  height, width, channels = settings.latent_shape
  shape = (count, 2, height, width, channels)
  mean = 5 * rng.standard_normal(shape)
  return np.concatenate([mean, rng.uniform(-20, 2, shape)], -1).astype(
    np.float32
  )


def write(directory, settings: Settings, moments, shards=None) -> None:
  folder = latent_writer.prepare(directory, settings)
  for shard in range(settings.num_shards) if shards is None else shards:
    with latent_writer.ShardWriter(folder, settings, shard) as writer:
      for index in settings.images(shard):
        writer.add(index, moments[index])
      writer.finish()


def make(directory, settings: Settings, moments, labels=LABELS) -> None:
  write(directory, settings, moments)
  folder = latent_writer.prepare(directory, settings)
  assert latent_writer.write_manifest(folder, settings, labels)


def generators(*seeds):
  return [np.random.default_rng([seed, 5]) for seed in seeds]


@pytest.fixture(scope="module")
def moments():
  return random_moments(11)


@pytest.fixture(scope="module")
def cache(tmp_path_factory, moments):
  path = tmp_path_factory.mktemp("cache")
  make(path, SETTINGS, moments)
  return path


@pytest.fixture
def copy(cache, tmp_path):
  shutil.copytree(cache, tmp_path / "copy")
  return tmp_path / "copy"


def files(folder: pathlib.Path) -> dict[str, bytes]:
  return {p.name: p.read_bytes() for p in folder.iterdir()}


# --- content ---------------------------------------------------------------


def test_reader_describes_the_cache(cache):
  reader = latents.LatentReader(cache, "train", dtype="bfloat16")
  assert len(reader) == 11 and reader.sample_shape == (4, 4, 3)
  assert reader.class_names == ("cat", "dog", "owl")
  assert reader.labels.dtype == np.int32
  assert_array_equal(reader.labels, LABELS)
  assert reader.dtype == ml_dtypes.bfloat16 and reader.grid is None
  assert reader.settings == SETTINGS
  assert reader.read(np.zeros(0, int), []).shape == (0, 4, 4, 3)
  for index in (11, -1):
    with pytest.raises(IndexError, match="of 11"):
      reader.fixed(np.array([3, index]))


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_fixed_is_the_scaled_mean_of_the_image_itself(
  tmp_path, moments, stored
):
  settings = dataclasses.replace(SETTINGS, dtype=stored)
  make(tmp_path, settings, moments)
  reader = latents.LatentReader(tmp_path, "train")
  indices = np.array([10, 0, 3, 4, 3])
  fixed = reader.fixed(indices)
  dtype = ml_dtypes.bfloat16 if stored == "bfloat16" else np.float16
  mean = moments[indices, 0, :, :, :3].astype(dtype).astype(np.float32)
  assert fixed.dtype == np.float32
  assert_array_equal(fixed, mean * np.float32(0.18215))


def test_latents_that_were_drawn_before_are_read_as_they_are(tmp_path):
  """To the bit, whatever the noise; those of the mirror image if it flips."""
  drawn = random_moments(11)[..., :3]
  settings = dataclasses.replace(SETTINGS, dtype="float32", compute_dtype="")
  make(tmp_path, settings, drawn)
  reader = latents.LatentReader(tmp_path, "train", dtype="float32")
  indices = np.array([10, 0, 3, 4, 3])
  assert_array_equal(reader.fixed(indices), drawn[indices, 0])
  mirrored = [int(rng.random() < 0.5) for rng in generators(*range(5))]
  assert set(mirrored) == {0, 1}
  read = reader.read(indices, generators(*range(5)))
  assert_array_equal(read, drawn[indices, mirrored])
  still = latents.LatentReader(tmp_path, "train", dtype="float16", flip=False)
  read = still.read(indices, generators(*range(5)))
  assert_array_equal(read, drawn[indices, 0].astype(np.float16))


def eps_of(tmp_path, rngs, flip):
  """The noise that a reader draws: mean 0, variance 1, no scaling."""
  settings = dataclasses.replace(SETTINGS, scaling_factor=1.0)
  if not tmp_path.exists():
    make(tmp_path, settings, np.zeros((11, 2, 4, 4, 6), np.float32))
  reader = latents.LatentReader(tmp_path, "train", dtype="float32", flip=flip)
  return reader.read(np.zeros(len(rngs), int), rngs)


@pytest.mark.parametrize("wire", ["float16", "bfloat16", "float32"])
def test_read_samples_the_posterior(cache, moments, tmp_path, wire):
  """z = (mean + exp(logvar / 2) eps) * scaling, against float64."""
  indices = np.array([10, 2, 2, 7, 0])
  reader = latents.LatentReader(cache, "train", dtype=wire, flip=False)
  drawn = reader.read(indices, generators(*range(5)))
  assert drawn.dtype == reader.dtype and drawn.shape == (5, 4, 4, 3)
  eps = eps_of(tmp_path / "unit", generators(*range(5)), flip=False)
  stored = moments[indices, 0].astype(np.float16).astype(np.float64)
  mean, log_variance = stored[..., :3], stored[..., 3:]
  want = (mean + np.exp(log_variance / 2) * eps) * 0.18215
  # The rounding of the wire: 2^-9, 2^-12 and float32's.
  tolerance = {"bfloat16": 2e-3, "float16": 3e-4, "float32": 2e-7}[wire]
  assert_close(drawn, want, tolerance)


def test_flip_reads_the_mirror_image_of_half(cache, moments):
  reader = latents.LatentReader(cache, "train", dtype="float32")
  count = 400
  drawn = reader.read(np.full(count, 9), generators(*range(count)))
  means = moments[9, :, :, :, :3] * 0.18215
  distance = np.abs(drawn[:, None] - means).mean(axis=(2, 3, 4))
  mirrored = distance[:, 1] < distance[:, 0]
  assert 0.4 < mirrored.mean() < 0.6  # 4 standard deviations
  assert (distance.min(axis=1) < 0.2 * distance.max(axis=1)).all()
  never = latents.LatentReader(cache, "train", dtype="float32", flip=False)
  drawn = never.read(np.full(count, 9), generators(*range(count)))
  assert np.abs(drawn.mean(axis=0) - means[0]).max() < 0.05


def test_an_image_depends_on_its_own_index_and_generator(cache):
  """Bit by bit the same alone, in any company, block and thread."""
  reader = latents.LatentReader(cache, "train")
  count = 2 * latents.LatentReader.chunk + 3
  indices = np.arange(count) * 7 % 11
  together = reader.read(indices, generators(*range(count)))
  order = np.random.default_rng(1).permutation(count)
  shuffled = reader.read(indices[order], generators(*order))
  assert_array_equal(shuffled, together[order])
  other = pickle.loads(pickle.dumps(reader))
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    alone = pool.map(
      lambda i: other.read(indices[i : i + 1], generators(i)), range(count)
    )
  assert_array_equal(np.concatenate(list(alone)), together)
  assert not np.array_equal(
    together[:1], reader.read(indices[:1], generators(999))
  )


class Raw:
  """Stands for a Generator and its BitGenerator: the given raw values."""

  def __init__(self, value, before=lambda: None):
    self.bit_generator = self
    self._value = value
    self._before = before

  def random_raw(self, count):
    self._before()
    return np.full(count, self._value, np.uint64)


def test_a_thread_does_not_disturb_another_one(cache):
  """One reads while another one is in the middle of a block."""
  reader = latents.LatentReader(cache, "train", flip=False)
  want = reader.read(np.array([5, 8]), [Raw(2**62), Raw(2**61)])
  with concurrent.futures.ThreadPoolExecutor(1) as pool:

    def disturb():
      pool.submit(reader.read, np.arange(9), generators(*range(9))).result()

    disturbed = reader.read(
      np.array([5, 8]), [Raw(2**62), Raw(2**61, before=disturb)]
    )
  assert_array_equal(disturbed, want)


@pytest.mark.parametrize("value", [0, 2**64 - 1])
def test_the_ends_of_the_uniform_numbers(value):
  noise = latents.fill_normals(
    [Raw(value)], np.empty((1, 6), np.float32), np.empty((1, 3), np.uint64)
  )
  radius = np.hypot(noise[:, :3], noise[:, 3:])
  want = {0: (2 * 24 * np.log(2)) ** 0.5, 2**64 - 1: 0.0}[value]
  np.testing.assert_allclose(radius, want, rtol=1e-6)


def test_every_float16_is_read_exactly():
  every = np.arange(2**16, dtype=np.uint16)
  every = every[np.isfinite(every.view(np.float16))]
  values = np.empty(len(every), np.float32)
  values.view(np.int32)[...] = every.view(np.int16)
  assert_array_equal(
    latents._scale_halves(values), every.view(np.float16).astype(np.float32)
  )


def test_noise_is_standard_normal():
  """Moments to 4 standard errors, shape by Kolmogorov and Smirnov."""
  rows, count = 64, 4096
  noise = latents.fill_normals(
    [np.random.default_rng(seed) for seed in range(rows)],
    np.empty((rows + 1, count), np.float32),
    np.empty((rows + 1, count // 2), np.uint64),
  ).astype(np.float64)
  assert noise.shape == (rows, count) and np.isfinite(noise).all()
  total = noise.size
  assert abs(noise.mean()) < 4 / total**0.5
  assert abs((noise**2).mean() - 1) < 4 * (2 / total) ** 0.5
  assert abs((noise**4).mean() - 3) < 4 * (96 / total) ** 0.5
  assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-3
  # What shares a radius, an angle or a row is uncorrelated, squares too.
  cosine, sine = noise[:, : count // 2], noise[:, count // 2 :]
  for a, b in ((cosine, sine), (noise[:, 1:], noise[:, :-1])):
    for power in (1, 2):
      correlation = np.corrcoef((a**power).ravel(), (b**power).ravel())[0, 1]
      assert abs(correlation) < 4 / a.size**0.5
  # 2 x 2^18 P(|x| > 4) = 16.6 expected.
  assert 3 <= (np.abs(noise) > 4).sum() <= 36


# --- writing ---------------------------------------------------------------


def test_the_same_moments_make_the_same_bytes(cache, moments, tmp_path):
  make(tmp_path, SETTINGS, moments)
  assert files(tmp_path / "train") == files(cache / "train")


@pytest.mark.parametrize(
  ("value", "part"),
  [(1e5, "reach 100000, which float16 can't hold"), (np.nan, "reach nan")],
)
def test_moments_that_can_not_be_stored(tmp_path, moments, value, part):
  moments = moments.copy()
  moments[6, 1, 2, 3, 1] = value
  with pytest.raises(LatentCacheError, match=f"image 6 of .* {part}"):
    write(tmp_path, SETTINGS, moments)
  # Shard 0 is whole; of shard 1 nothing is left.
  assert sorted(files(tmp_path / "train")) == [
    "settings.json",
    "train-00000-of-00003.arrayrecord",
    "train-00000-of-00003.json",
  ]


@pytest.mark.parametrize(
  ("change", "part"),
  [
    ({"image_size": 33}, "image_size=33 .* multiple of .* downsampling 8"),
    ({"num_images": 0}, "'train', holds no images"),
    ({"images_per_shard": 0}, "images_per_shard=0 must be at least 1"),
    (
      {"num_images": 5121, "images_per_shard": 10},
      "images_per_shard=10 must be at least 11: .* at most 512",
    ),
  ],
)
def test_settings_that_no_cache_can_have(tmp_path, change, part):
  settings = dataclasses.replace(SETTINGS, **change)
  with pytest.raises(LatentCacheError, match=part):
    latent_writer.prepare(tmp_path / "new", settings)
  assert not (tmp_path / "new").exists()


def test_too_little_space_is_known_before(tmp_path):
  settings = dataclasses.replace(
    SETTINGS,
    num_images=10**12,
    images_per_shard=10**11,
  )
  folder = latent_writer.prepare(tmp_path, settings)
  with pytest.raises(
    LatentCacheError, match="free, but 10 shards to write take 3.84e[+]05 GB"
  ):
    latent_writer.require_space(folder, settings, range(10))
  latent_writer.require_space(folder, settings, [])


def test_a_file_that_may_not_grow(tmp_path):
  """EFBIG, which needs no rights to provoke."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    with pytest.raises(LatentCacheError) as error:
      write(tmp_path, SETTINGS, random_moments(11))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  for part in (
    "train-00000-of-00003.arrayrecord",
    "File too large",
    "finished shards are kept",
    "cache_latents with the same flags again",
  ):
    assert part in str(error.value)
  assert sorted(files(tmp_path / "train")) == ["settings.json"]


# --- damage ----------------------------------------------------------------

SHARD = "train-00001-of-00003.arrayrecord"


def edited(folder, name, change):
  """Changes the JSON content of a file."""
  content = json.loads((folder / name).read_text())
  change(content)
  (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
  ("harm", "parts"),
  [
    (
      lambda f: (f / SHARD).unlink(),
      (f"1 of 3 shards: .*{SHARD} is missing", "redoes what is damaged only"),
    ),
    (
      lambda f: os.truncate(f / SHARD, 65536),
      (f"1 of 3 shards: .*{SHARD} has 65536 bytes instead of 131072",),
    ),
    (
      lambda f: os.truncate(f / "manifest.json", 500),
      ("manifest.json can't be read: JSONDecodeError", "run python"),
    ),
    (
      lambda f: edited(f, "manifest.json", lambda c: c.update(version=2)),
      ("version 2, but this program reads 'drift_jax latents', version 1",),
    ),
    (
      lambda f: edited(
        f, "manifest.json", lambda c: c["settings"].update(vae_sha256="b" * 64)
      ),
      (
        "manifest.json can't be read: .*3 shards are not those of its settings",
      ),
    ),
    (
      lambda f: edited(
        f, "manifest.json", lambda c: c["settings"].update(num_images="11")
      ),
      ("manifest.json can't be read: TypeError",),
    ),
    (lambda f: (f / "labels.npy").unlink(), ("labels.npy can't be read",)),
    (
      lambda f: np.save(f / "labels.npy", LABELS[::-1].copy()),
      ("labels.npy .int32 .11,.. does not hold the 11 labels",),
    ),
  ],
)
def test_damage_found_at_opening(copy, harm, parts):
  harm(copy / "train")
  with pytest.raises(LatentCacheError) as error:
    latents.LatentReader(copy, "train")
  for part in parts:
    assert re.search(part, str(error.value)), str(error.value)


def test_a_flipped_bit_is_found_by_verify_and_by_reading(copy):
  path = copy / "train" / SHARD
  data = bytearray(path.read_bytes())
  # The third image's own record, by its content.
  reader = latents.LatentReader(copy, "train", flip=False)
  place = bytes(data).index(reader._record(1, 4)) + 17
  data[place] ^= 1
  path.write_bytes(data)
  reader = latents.LatentReader(copy, "train", flip=False)
  for _ in range(2):  # and again: the shard stays open
    with pytest.raises(
      LatentCacheError, match=f"record 4 of .*{SHARD} can't be read .*mismatch"
    ):
      reader.fixed(np.array([1, 5, 6, 7]))
    assert reader.fixed(np.array([1, 5, 7])).shape == (3, 4, 4, 3)
  with pytest.raises(
    LatentCacheError, match=f"1 of 3 shards: .*{SHARD} is damaged: its SHA-256"
  ):
    latent_format.verify(copy, "train")


def test_incomplete_missing_and_other_caches(tmp_path, moments, cache):
  write(tmp_path, SETTINGS, moments, shards=[1])
  with pytest.raises(
    LatentCacheError, match="not complete: 2 of its 3 shards are missing; run"
  ):
    latents.LatentReader(tmp_path, "train")
  with pytest.raises(
    LatentCacheError, match=r"split 'test' in .*valid options are \['train'\]"
  ):
    latents.LatentReader(cache, "test")
  with pytest.raises(LatentCacheError, match="make one with python -m"):
    latents.LatentReader(tmp_path / "nowhere", "train")
  latents.LatentReader(cache, "train", expected_vae_sha256="a" * 64)
  with pytest.raises(LatentCacheError, match=f"{'a' * 64}.*has {'c' * 64}"):
    latents.LatentReader(cache, "train", expected_vae_sha256="c" * 64)
