"""Reference statistics: against NumPy, of files of several kinds."""

import dataclasses
import functools
import hashlib
import logging
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from drift_jax.data import sources, transforms
from drift_jax.data.sources import digits
from drift_jax.metrics.frechet import FeatureStats, frechet_distance
from drift_jax.metrics.reference import Provenance, load_reference
from drift_jax.system import console, processes
from drift_jax.tasks.generator.judges import name_of
from drift_jax.tools import reference_stats
from drift_jax.tools.work import reference_stats as work
from drift_jax.training import artifacts
from tests.conftest import assert_close
from tests.data.pictures import cut
from tests.judges import save_inception, save_vit
from tests.process import process_environment

ROOT = pathlib.Path(__file__).parent.parent.parent
SIZE = 12
COUNT = 23
DIMENSIONS = 32
PUBLIC_DIMENSIONS = 128


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
  folder = tmp_path_factory.mktemp("vit")
  return str(save_vit(folder, hidden_size=DIMENSIONS))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
  """An Inception, which takes seconds to compile: for public files."""
  folder = tmp_path_factory.mktemp("published")
  return str(save_inception(folder, published=True))


def picture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
  """Four colours: features of noise alone hardly differ between pictures."""
  rows = (2, 2, 3)
  coarse = rng.integers(0, 256, rows).repeat(-(-height // 2), axis=0)
  coarse = coarse.repeat(-(-width // 2), axis=1)[:height, :width]
  return (coarse // 2 + rng.integers(0, 128, coarse.shape)).astype(np.uint8)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  """23 pictures of three classes, of several sizes and formats."""
  path = tmp_path_factory.mktemp("pictures")
  rng = np.random.default_rng(0)
  for index in range(COUNT):
    folder = path / f"class{index % 3}"
    folder.mkdir(exist_ok=True)
    height, width = rng.integers(SIZE - 3, 3 * SIZE, 2)
    suffix = ("png", "jpg", "webp")[index % 3]
    Image.fromarray(picture(rng, height, width)).save(
      folder / f"{index:02d}.{suffix}"
    )
  return path


@pytest.fixture(scope="module")
def crops(pictures):
  """[23, 12, 12, 3] uint8, made from the files without readers."""
  paths = sorted(pictures.glob("*/*"))
  return np.stack(
    [
      np.asarray(
        transforms.center_crop(Image.open(path).convert("RGB"), SIZE), np.uint8
      )
      for path in paths
    ]
  )


@functools.cache
def applied(module):
  """One for all networks of a kind; equal modules are one key."""
  return jax.jit(module.apply)


def direct(folder: str, pixels: np.ndarray) -> np.ndarray:
  """Features [n, D] of the network alone on one device, by fives."""
  artifact = artifacts.load(folder)
  whole = pixels[np.arange(-(-len(pixels) // 5) * 5) % len(pixels)]
  parts = [
    applied(artifact.module)({"params": artifact.params}, part)
    for part in np.split(whole, len(whole) // 5)
  ]
  parts = [getattr(part, "pool3", part) for part in parts]
  return np.concatenate(parts)[: len(pixels)]


@pytest.fixture(scope="module")
def networks():
  """Opens each network once: compiling it takes most of a run's time."""
  return functools.cache(work.Network)


@pytest.fixture(scope="module")
def features(vit, crops):
  return direct(vit, crops)


@pytest.fixture(autouse=True)
def log(monkeypatch, caplog, networks):
  monkeypatch.setattr(work, "Network", networks)
  monkeypatch.setattr(console, "setup", lambda *process: None)
  monkeypatch.setattr(console.logger, "propagate", True)
  caplog.set_level(logging.INFO, "drift_jax")
  return lambda: [record.getMessage() for record in caplog.records]


def flags(**given: object) -> list[str]:
  return [f"--{name}={value}" for name, value in given.items()]


@pytest.fixture
def folder_flags(pictures, vit, out):
  """The flags for the folder of pictures, with changes."""
  source = f"folder:{pictures}"
  chosen = {"source": source, "image_size": SIZE, "network": vit, "out": out}
  return lambda **changes: flags(**chosen | {"batch_size": 5} | changes)


@pytest.fixture
def run(folder_flags, out):
  """Runs the program; returns what it wrote."""

  def call(*arguments, **changes):
    reference_stats.main([*(arguments or folder_flags(**changes))])
    return load_reference(out)

  return call


@pytest.fixture
def refuses(folder_flags, out):
  """Runs the program, which must end with an error and write nothing."""

  def call(message, *arguments, **changes):
    with pytest.raises(SystemExit, match=f"^Error: .*{message}") as error:
      reference_stats.main([*(arguments or folder_flags(**changes))])
    assert not out.exists()
    return str(error.value)

  return call


@pytest.fixture
def out(tmp_path):
  return tmp_path / "new/stats.npz"


def test_a_folder(pictures, vit, features, run, out, log, monkeypatch):
  monkeypatch.setattr(console, "LOG_SECONDS", 0.0)
  run()
  digest = artifacts.load(vit).sha256
  loaded = load_reference(
    out,
    dimensions=DIMENSIONS,
    resolution=SIZE,
    crop="center",
    network_sha256=digest,
  )
  assert loaded.count == COUNT
  assert loaded.provenance == Provenance(
    source=f"folder:{pictures}",
    split="train",
    crop="center",
    resolution=SIZE,
    network="dinov2, weights of tests/judges.py",
    network_sha256=digest,
  )
  wide = features.astype(np.float64)
  assert_close(loaded.mean, wide.mean(axis=0), 1e-6, "mean")
  assert_close(loaded.sigma, np.cov(wide.T), 1e-6, "covariance")
  assert loaded.features.dtype == np.float32
  assert_close(loaded.features, features, 1e-6, "features")
  kept = loaded.features.astype(np.float64)
  assert_close(loaded.sigma, np.cov(kept.T), 1e-12, "of what is kept")
  assert log()[0].startswith("10000 single images were asked for; the features")
  assert log()[1].startswith("23 images, but 33 are needed for a covariance")
  assert any(line.startswith("Features 16/23 images (") for line in log())
  assert "23 images, features of 23 single ones, Provenance(" in log()[-1]


@pytest.mark.parametrize("num_features", [0, 1, 9, COUNT])
def test_single_images(features, run, num_features):
  loaded = run(num_features=num_features)
  assert loaded.count == COUNT
  assert_close(loaded.mean, features.mean(axis=0), 1e-6)
  if not num_features:
    assert loaded.features is None
    return
  order = np.random.default_rng(0).choice(COUNT, num_features, replace=False)
  assert_close(loaded.features, features[np.sort(order)], 1e-6)
  # Batches don't matter, the seed does.
  again = run(num_features=num_features, batch_size=64).features
  assert_close(again, loaded.features, 1e-6)
  other = run(num_features=num_features, seed=5).features
  assert np.allclose(other, loaded.features) == (num_features == COUNT)


def test_crops_and_channels(vit, crops, run, tmp_path):
  """Images that fit: 'none' leaves them, 'pad' frames them."""
  folder = tmp_path / "fit/class"
  folder.mkdir(parents=True)
  for index, image in enumerate(crops[:5]):
    Image.fromarray(image).save(folder / f"{index}.png")
  padded = np.pad(crops[:5], ((0, 0), (2, 2), (2, 2), (0, 0)))
  grey = [np.asarray(Image.fromarray(i).convert("L")) for i in crops[:5]]
  for changes, want, source in (
    ({"crop": "none"}, crops[:5], "folder:fit"),
    ({"crop": "pad", "image_size": SIZE + 4}, padded, "folder:fit"),
    ({"channels": 1}, np.stack([grey] * 3, axis=-1), "folder:fit, grey"),
  ):
    loaded = run(**{"data_dir": tmp_path, "source": "folder:fit"} | changes)
    assert loaded.provenance.source == source
    assert loaded.provenance.crop == changes.get("crop", "center")
    assert_close(loaded.features, direct(vit, want), 1e-6)


def test_images_are_turned_upright_if_asked(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 8
  file = tmp_path / "a" / "0.jpg"
  file.parent.mkdir()
  pixels = picture(np.random.default_rng(0), SIZE, SIZE)
  Image.fromarray(pixels).save(file, exif=exif)
  stored = np.asarray(Image.open(file))
  for turned, given in ((0, {}), (1, {"exif": True})):
    images = work.open_images(f"folder:{tmp_path}", image_size=SIZE, **given)
    assert images.facts["source"].endswith("upright by EXIF") == bool(turned)
    (first,) = images.pixels(np.arange(1))
    np.testing.assert_array_equal(first, np.rot90(stored, turned))


def test_splits_and_class_order(pictures, run, refuses, out, tmp_path):
  (tmp_path / "data").mkdir()
  (tmp_path / "data/validation").symlink_to(pictures)
  loaded = run(source=f"folder:{tmp_path}/data", split="validation")
  assert loaded.count == COUNT and loaded.provenance.split == "validation"
  out.unlink()
  refuses("--split=train: .* has no split", source=f"folder:{tmp_path}/data")
  refuses("class0.*not among its 1000 WordNet", class_order="imagenet")


def test_digits(vit, run, refuses, out, monkeypatch):
  """Float images: their own pixels, as three channels."""
  monkeypatch.setattr(sources, "DIGITS_TEST_PER_CLASS", 5)
  given = {"source": "digits", "split": "test", "image_size": 8, "crop": "none"}
  loaded = run(**given, channels=1, num_features=20)
  pixels = np.rint((digits("test").images + 1) * 127.5).astype(np.uint8)
  want = direct(vit, pixels.repeat(3, axis=-1)).astype(np.float64)
  assert loaded.provenance.source == "digits" and loaded.count == 50
  assert loaded.features.shape == (20, DIMENSIONS)
  assert_close(loaded.mean, want.mean(axis=0), 1e-6, "mean")
  assert_close(loaded.sigma, np.cov(want.T), 1e-6, "covariance")
  out.unlink()
  refuses("give --image_size=8 --channels=1 --crop=none$", **given, channels=3)


def test_a_corrupt_image(pictures, run, refuses, tmp_path):
  shutil.copytree(pictures, tmp_path / "pictures")
  cut(tmp_path / "pictures/class1/10.jpg")
  given = {"source": f"folder:{tmp_path / 'pictures'}", "num_threads": 1}
  refuses(r"1 corrupt(.|\n)*class1/10.jpg", **given)
  loaded = run(**given, max_corrupt=1)
  # The next of its class stands in; eight images of class0 come first.
  np.testing.assert_allclose(*loaded.features[[11, 12]], rtol=1e-5)


# Public files.


@pytest.fixture(scope="module")
def public(tmp_path_factory):
  """Moments of more images than the 130 that are in the file."""
  path = tmp_path_factory.mktemp("public") / "VIRTUAL_tiny.npz"
  rng = np.random.default_rng(1)
  values = rng.normal(size=(400, PUBLIC_DIMENSIONS))
  images = np.stack([picture(rng, SIZE, SIZE) for _ in range(130)])
  np.savez(path, mu=values.mean(axis=0), sigma=np.cov(values.T), arr_0=images)
  return path


@pytest.mark.slow
@pytest.mark.parametrize("num_features", [0, 40, 200])
def test_a_public_file(public, published, run, out, log, num_features):
  loaded = run(
    *flags(public=public, network=published, out=out, seed=3, batch_size=8),
    f"--num_features={num_features}",
  )
  with np.load(public) as archive:
    arrays = dict(archive.items())
  np.testing.assert_array_equal(loaded.mean, arrays["mu"])
  np.testing.assert_allclose(loaded.sigma, arrays["sigma"], rtol=1e-12)
  assert loaded.count is None
  digest = hashlib.sha256(public.read_bytes()).hexdigest()
  assert loaded.provenance == Provenance(
    source=f"VIRTUAL_tiny.npz, SHA-256 {digest}",
    split="train",
    crop="center",
    resolution=SIZE,
    network="inception-v3 pool3, published weights",
    network_sha256=artifacts.load(published).sha256,
  )
  if not num_features:
    assert loaded.features is None
    return
  count = min(num_features, 130)
  order = np.random.default_rng(3).choice(130, count, replace=False)
  want = direct(published, arrays["arr_0"][np.sort(order)])
  assert_close(loaded.features, want, 1e-6)
  if count == 130:
    # That the weights and the file belong together shows in a small distance.
    distance = frechet_distance(FeatureStats.from_features(want), loaded)
    assert any(f"at a Frechet distance of {distance:.4g}" in x for x in log())
  assert f"? images, features of {count} single ones" in log()[-1]


@pytest.mark.slow
def test_public_files_that_do_not_do(
  public, published, vit, out, refuses, run, tmp_path
):
  path = tmp_path / "public.npz"
  with np.load(public) as archive:
    arrays = dict(archive.items())
  for message, network, changes in (
    ("can be used as it is for FID", published, {"arr_0": None}),
    ("want uint8.* for FID", published, {"arr_0": np.zeros((2, 4, 4, 3))}),
    ("must hold either mu and sigma", published, {"mu": None}),
    ("which --network=.* is not", vit, {}),
    ("of 3 .* has 128", published, {"mu": np.zeros(3), "sigma": np.eye(3)}),
  ):
    content = {k: v for k, v in (arrays | changes).items() if v is not None}
    np.savez(path, **content)
    refuses(message, *flags(public=path, network=network, out=out))
  missing = flags(public="none.npz", network=published, out=out)
  refuses("No such file.*none.npz", *missing)
  run(*flags(public=public, network=published, out=out, num_features=0))
  shutil.move(out, path)
  again = flags(public=path, network=published, out=out)
  refuses("records already what it was computed", *again)


@pytest.mark.slow
def test_single_images_of_another_file(
  public, published, vit, run, refuses, out, pictures, tmp_path
):
  """FID by one file, precision and recall by another's images."""
  rng = np.random.default_rng(2)
  images = np.stack([picture(rng, SIZE, SIZE) for _ in range(20)])
  stats, singles = tmp_path / "fid_stats.npz", tmp_path / "prc_arr0.npz"
  with np.load(public) as archive:
    np.savez(stats, ref_mu=archive["mu"], ref_sigma=archive["sigma"])
    mean = archive["mu"]
  np.savez(singles, arr_0=images)
  given = {"network": published, "out": out, "images": singles}
  loaded = run(*flags(public=stats, **given))
  np.testing.assert_array_equal(loaded.mean, mean)
  assert_close(loaded.features, direct(published, images), 1e-6)
  digests = [
    hashlib.sha256(path.read_bytes()).hexdigest() for path in (stats, singles)
  ]
  assert loaded.provenance.source == (
    f"fid_stats.npz, SHA-256 {digests[0]}; "
    f"single images of prc_arr0.npz, SHA-256 {digests[1]}"
  )
  # Of a file that this program wrote, which says what it is of.
  shutil.move(out, stats)
  again = run(*flags(public=stats, **given), "--num_features=7")
  assert len(again.features) == 7
  assert again.provenance.source.startswith(loaded.provenance.source)
  out.unlink()
  np.savez(singles, arr_0=images[:, 2:-2, 2:-2])
  refuses("resolution found 12, expected 8", *flags(public=stats, **given))
  np.savez(singles, other=images)
  refuses("--images: .*no array 'arr_0'", *flags(public=stats, **given))
  np.savez(singles, arr_0=images)
  given |= {"network": vit}
  refuses("network_sha256 found", *flags(public=stats, **given))


# Mistakes.


def test_mistakes(refuses, pictures, tmp_path):
  for changes, message in (
    ({"network": "/nowhere"}, "convert_weights inception --out=/nowhere "),
    ({"source": "folder:/nowhere"}, "--source=folder:/nowhere --split=train: "),
    ({"source": "floppy:a"}, "valid options are .*'digits', 'tfds:NAME'"),
    ({"image_size": 0}, "data.image_size=0"),
    ({"crop": "none"}, "data.crop='none' wants every image to be 12 x 12"),
    ({"num_features": -1}, "--num_features=-1 must be at least 0"),
    ({"num_threads": 0}, "--num_threads=0 must be at least 1"),
    ({"crop": "random"}, "argument --crop: invalid choice: 'random'"),
    ({"public": "file"}, "argument --public: not allowed with argument --sour"),
    ({"images": "file"}, "--images goes with --public, not with --source"),
    ({"process_id": 1}, "coordinator='', num_processes=None, process_id=1: "),
    ({"out": "/"}, "--out=/ is a folder"),
  ):
    assert "\n" not in refuses(message, **changes)
  new = tmp_path / "weights"
  refuses("no exported model", network="/nowhere", out=new / "stats.npz")
  assert not new.exists()
  refuses("one of the arguments --source --publi", "--network=x", "--out=y")
  public = flags(public="x", network="x", out="y", crop="center")
  refuses("--crop goes with --source, not with", *public)


def test_the_name_of_a_vit(vit):
  artifact = dataclasses.replace(artifacts.load(vit), kind="vit", metadata={})
  assert name_of(artifact) == "vit, weights of unknown origin"


def test_too_few_images(refuses, tmp_path):
  (tmp_path / "data/class").mkdir(parents=True)
  Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "data/class/0.png")
  refuses(
    "has 1 images of split 'train': .*at least 2",
    source=f"folder:{tmp_path / 'data'}",
  )


def test_features_that_are_not_finite(vit, refuses, tmp_path):
  artifact = artifacts.load(vit)
  params = jax.tree.map(lambda x: np.full_like(x, 1e38), artifact.params)
  artifacts.save(
    tmp_path / "huge",
    kind=artifact.kind,
    model_config=artifact.metadata["model_config"],
    params=params,
    step=None,
    ema_decay=None,
  )
  message = "--network=.*image 0 of folder:.* are not finite"
  refuses(message, network=tmp_path / "huge")


# Several processes.


def test_processes_that_differ(refuses, monkeypatch):
  """Each learns that the other's images are not its own."""
  gather = processes.gather
  monkeypatch.setattr(
    processes,
    "gather",
    lambda array: [*gather(array), np.zeros((1, 32), np.uint8)],
  )
  refuses("process 1 has other images or an")


def run_two(*argvs: list[str]) -> list[tuple[int, str]]:
  """(return code, standard error) of real processes of two devices each."""
  with socket.create_server(("127.0.0.1", 0)) as server:
    address = f"127.0.0.1:{server.getsockname()[1]}"
  running = [
    subprocess.Popen(
      [
        *(sys.executable, "-m", "drift_jax.tools.reference_stats", *argv),
        *flags(coordinator=address, num_processes=2, process_id=process),
      ],
      stderr=subprocess.PIPE,
      text=True,
      env=process_environment(2),
      cwd=ROOT,
    )
    for process, argv in enumerate(argvs)
  ]
  errors = [process.communicate(timeout=240)[1] for process in running]
  codes = [process.returncode for process in running]
  return list(zip(codes, errors, strict=True))


@pytest.mark.system
def test_two_processes_make_what_one_makes(folder_flags, run, tmp_path):
  given = {"num_features": 9, "batch_size": 4}
  one = run(**given)
  paths = [tmp_path / f"{process}.npz" for process in range(2)]
  first, second = run_two(*[folder_flags(out=p, **given) for p in paths])
  assert first[0] == second[0] == 0, first[1] + second[1]
  assert "Wrote" in first[1] and "Wrote" not in second[1]
  assert paths[0].exists() and not paths[1].exists()
  two = load_reference(paths[0])
  assert one.count == two.count == COUNT
  assert one.provenance == two.provenance
  assert_close(two.mean, one.mean, 1e-6)
  assert_close(two.sigma, one.sigma, 1e-6)
  assert_close(two.features, one.features, 1e-6)
