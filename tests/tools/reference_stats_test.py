"""Reference statistics: against NumPy, of files of several kinds."""

import dataclasses
import functools
import hashlib
import logging
import pathlib
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
  network = functools.partial(
    applied(artifact.module), {"params": artifact.params}
  )
  whole = pixels[np.arange(-(-len(pixels) // 5) * 5) % len(pixels)]
  parts = [network(part) for part in np.split(whole, len(whole) // 5)]
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


def folder_flags(pictures, vit, out, /, **changes) -> list[str]:
  return flags(
    **{
      "source": f"folder:{pictures}",
      "image_size": SIZE,
      "network": vit,
      "out": out,
      "batch_size": 5,
    }
    | changes
  )


@pytest.fixture
def out(tmp_path):
  return tmp_path / "new/stats.npz"


def test_a_folder(pictures, vit, features, out, log):
  reference_stats.main(folder_flags(pictures, vit, out))
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
  assert loaded.features is not None
  assert loaded.features.dtype == np.float32
  assert_close(loaded.features, features, 1e-6, "features")
  kept = loaded.features.astype(np.float64)
  assert_close(loaded.sigma, np.cov(kept.T), 1e-12, "of what is kept")
  assert log()[:2] == [
    "10000 single images were asked for; the features of all 23 are kept.",
    "23 images, but 33 are needed for a covariance of full rank: it will be "
    "singular.",
  ]
  assert log()[-1].startswith(
    f"Wrote {out}: 23 images, features of 23 single ones, Provenance("
  )


def test_progress(pictures, vit, out, monkeypatch, log):
  monkeypatch.setattr(console, "LOG_SECONDS", 0.0)
  reference_stats.main(folder_flags(pictures, vit, out))
  assert any(
    line.startswith("Features 16/23 images (") and "s left" in line
    for line in log()
  )


@pytest.mark.parametrize("num_features", [0, 1, 9, COUNT])
def test_single_images(pictures, vit, out, features, log, num_features):
  def run(**changes) -> np.ndarray | None:
    reference_stats.main(
      folder_flags(pictures, vit, out, num_features=num_features, **changes)
    )
    loaded = load_reference(out)
    assert loaded.count == COUNT
    assert_close(loaded.mean, features.mean(axis=0), 1e-6)
    return loaded.features

  found = run()
  if not num_features:
    assert found is None
    return
  assert found is not None
  order = np.random.default_rng(0).choice(COUNT, num_features, replace=False)
  assert_close(found, features[np.sort(order)], 1e-6)
  assert not any("were asked for" in line for line in log())
  # Batches don't matter, the seed does.
  again = run(batch_size=64)
  assert again is not None
  assert_close(again, found, 1e-6)
  other = run(seed=5)
  assert other is not None and other.shape == found.shape
  assert np.allclose(other, found) == (num_features == COUNT)


def test_crops_and_channels(pictures, vit, crops, out, tmp_path):
  """Images that fit: 'none' leaves them, 'pad' frames them."""
  folder = tmp_path / "fit/class"
  folder.mkdir(parents=True)
  for index, image in enumerate(crops[:5]):
    Image.fromarray(image).save(folder / f"{index}.png")
  padded = np.pad(crops[:5], ((0, 0), (2, 2), (2, 2), (0, 0)))
  grey = [np.asarray(Image.fromarray(i).convert("L")) for i in crops[:5]]
  for changes, want, source in (
    ({"crop": "none"}, crops[:5], "fit"),
    ({"crop": "pad", "image_size": SIZE + 4}, padded, "fit"),
    ({"channels": 1}, np.stack([grey] * 3, axis=-1), "fit, grey"),
  ):
    given = {"data_dir": tmp_path, "source": "folder:fit"} | changes
    reference_stats.main(folder_flags(pictures, vit, out, **given))
    loaded = load_reference(
      out,
      crop=changes.get("crop", "center"),
      resolution=changes.get("image_size", SIZE),
    )
    assert loaded.provenance is not None and loaded.features is not None
    assert loaded.provenance.source == f"folder:{source}"
    assert_close(loaded.features, direct(vit, want), 1e-6)


def test_splits_and_class_order(pictures, vit, out, tmp_path, capsys):
  (tmp_path / "data").mkdir()
  (tmp_path / "data/validation").symlink_to(pictures)
  given = {"source": f"folder:{tmp_path}/data", "split": "validation"}
  reference_stats.main(folder_flags(pictures, vit, out, **given))
  loaded = load_reference(out)
  assert loaded.count == COUNT and loaded.provenance is not None
  assert loaded.provenance.split == "validation"
  with pytest.raises(
    SystemExit, match=r"^Error: --source=.* --split=train: .* has no split"
  ):
    reference_stats.main(
      folder_flags(pictures, vit, out, source=given["source"])
    )
  with pytest.raises(SystemExit, match=r"class0.*not among its 1000 WordNet"):
    reference_stats.main(
      folder_flags(pictures, vit, out, class_order="imagenet")
    )


def test_digits(vit, out, monkeypatch):
  """Float images: their own pixels, as three channels."""
  monkeypatch.setattr(sources, "DIGITS_TEST_PER_CLASS", 5)
  given = {"source": "digits", "split": "test", "network": vit}
  right = {"image_size": 8, "channels": 1, "crop": "none"}
  reference_stats.main(flags(**given, **right, out=out, num_features=20))
  source = digits("test")
  pixels = np.rint((source.images + 1) * 127.5).astype(np.uint8)
  want = direct(vit, pixels.repeat(3, axis=-1)).astype(np.float64)
  loaded = load_reference(out, resolution=8, crop="none")
  assert loaded.provenance is not None
  assert loaded.provenance.source == "digits"
  assert loaded.count == 50 and loaded.features is not None
  assert loaded.features.shape == (20, DIMENSIONS)
  assert_close(loaded.mean, want.mean(axis=0), 1e-6, "mean")
  assert_close(loaded.sigma, np.cov(want.T), 1e-6, "covariance")
  for name, value in (
    ("image_size", 16),
    ("channels", 3),
    ("crop", "center"),
  ):
    with pytest.raises(
      SystemExit, match="give --image_size=8 --channels=1 --crop=none$"
    ):
      reference_stats.main(flags(**given, **right | {name: value}, out="never"))


def test_a_corrupt_image(pictures, vit, crops, out, tmp_path):
  folder = tmp_path / "pictures"
  for path in pictures.glob("*/*"):
    (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
    (folder / path.parent.name / path.name).write_bytes(path.read_bytes())
  cut(folder / "class1/10.jpg")
  given = folder_flags(folder, vit, out, num_threads=1)
  with pytest.raises(
    SystemExit, match=r"^Error: 1 corrupt(.|\n)*class1/10.jpg"
  ):
    reference_stats.main(given)
  assert not out.exists()
  reference_stats.main([*given, "--max_corrupt=1"])
  index = 8 + 3  # eight images of class0 come first
  loaded = load_reference(out)
  assert loaded.features is not None
  # The next of its class stands in.
  np.testing.assert_allclose(
    loaded.features[index], loaded.features[index + 1], rtol=1e-5
  )


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
def test_a_public_file(public, published, out, log):
  given = flags(public=public, network=published, out=out, batch_size=8)
  reference_stats.main(given)
  with np.load(public) as archive:
    arrays = dict(archive.items())
  loaded = load_reference(out)
  np.testing.assert_array_equal(loaded.mean, arrays["mu"])
  np.testing.assert_allclose(loaded.sigma, arrays["sigma"], rtol=1e-12)
  assert loaded.count is None and loaded.features is not None
  digest = hashlib.sha256(public.read_bytes()).hexdigest()
  assert loaded.provenance == Provenance(
    source=f"VIRTUAL_tiny.npz, SHA-256 {digest}",
    split="train",
    crop="center",
    resolution=SIZE,
    network="inception-v3 pool3, published weights",
    network_sha256=artifacts.load(published).sha256,
  )
  want = direct(published, arrays["arr_0"])
  assert_close(loaded.features, want, 1e-6)
  # That the weights and the file belong together shows in a small distance.
  distance = frechet_distance(FeatureStats.from_features(want), loaded)
  assert any(f"at a Frechet distance of {distance:.4g}" in x for x in log())
  assert "? images, features of 130 single ones" in log()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("num_features", [0, 40])
def test_some_images_of_a_public_file(public, published, out, num_features):
  given = flags(public=public, network=published, out=out, seed=3, batch_size=8)
  reference_stats.main([*given, f"--num_features={num_features}"])
  loaded = load_reference(out)
  if not num_features:
    assert loaded.features is None
    return
  order = np.random.default_rng(3).choice(130, num_features, replace=False)
  with np.load(public) as archive:
    images = archive["arr_0"][np.sort(order)]
  assert loaded.features is not None
  assert_close(loaded.features, direct(published, images), 1e-6)


@pytest.mark.slow
def test_public_files_that_do_not_do(public, published, vit, out, tmp_path):
  with np.load(public) as archive:
    arrays = dict(archive.items())

  def fails(message: str, network: str = published, **changes) -> None:
    path = tmp_path / "public.npz"
    content = {k: v for k, v in (arrays | changes).items() if v is not None}
    np.savez(path, **content)
    with pytest.raises(SystemExit, match=f"^Error: .*{message}"):
      reference_stats.main(flags(public=path, network=network, out=out))
    assert not out.exists()

  fails("can be used as it is for FID", arr_0=None)
  fails("float32 .*want uint8.* for FID", arr_0=np.zeros((2, 4, 4, 3), "f4"))
  fails("must hold either mu and sigma", mu=None)
  fails("which --network=.* is not", network=vit)
  fails(
    "of 3 dimensions, --network=.* has 128", mu=np.zeros(3), sigma=np.eye(3)
  )
  with pytest.raises(SystemExit, match="^Error: .*No such file.*none.npz"):
    reference_stats.main(flags(public="none.npz", network=published, out=out))
  reference_stats.main(
    flags(public=public, network=published, out=out, num_features=0)
  )
  with pytest.raises(SystemExit, match="records already what it was computed"):
    reference_stats.main(
      flags(public=out, network=published, out=tmp_path / "never")
    )


# Mistakes.


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"network": "/nowhere"}, "no exported model in /nowhere"),
    ({"source": "folder:/nowhere"}, "--source=folder:/nowhere --split=train: "),
    ({"source": "floppy:a"}, "valid options are .*'digits', 'folder:DIR'"),
    ({"image_size": 0}, "data.image_size=0 must be at least 1"),
    ({"crop": "none"}, "but data.crop='none' wants every image to be 12 x 12"),
    ({"num_features": -1}, "--num_features=-1 must be at least 0"),
    ({"batch_size": 0}, "--batch_size=0 must be at least 1"),
    ({"num_threads": 0}, "--num_threads=0 must be at least 1"),
    ({"seed": -1}, "--seed=-1 must be at least 0"),
    ({"crop": "random"}, "argument --crop: invalid choice: 'random'"),
    ({"public": "file"}, "argument --public: not allowed with argument --sour"),
    ({"process_id": 1}, "coordinator='', num_processes=None, process_id=1: "),
    ({"out": "/"}, "--out=/ is a folder"),
  ],
)
def test_mistakes(pictures, vit, out, changes, message):
  with pytest.raises(SystemExit, match=f"^Error: .*{message}") as error:
    reference_stats.main(folder_flags(pictures, vit, out, **changes))
  assert "\n" not in str(error.value)
  assert not out.exists()


def test_usage(public, vit, out):
  with pytest.raises(SystemExit, match="one of the arguments --source --publi"):
    reference_stats.main(flags(network=vit, out=out))
  with pytest.raises(SystemExit, match="--crop goes with --source, not with"):
    reference_stats.main(
      flags(public=public, network=vit, out=out, crop="center")
    )


def test_a_network_of_another_kind(pictures, vit, out, monkeypatch, networks):
  monkeypatch.setattr(work, "Network", networks.__wrapped__)
  load = artifacts.load
  monkeypatch.setattr(
    artifacts,
    "load",
    lambda *args, **kw: dataclasses.replace(load(*args, **kw), kind="mae"),
  )
  with pytest.raises(
    SystemExit, match=r"^Error: .* kind 'mae', want one of \['inception', 'vit'"
  ):
    reference_stats.main(folder_flags(pictures, vit, out))


def test_the_name_of_a_vit(vit):
  artifact = artifacts.load(vit)
  for source, want in (
    (
      {"location": "hf://facebook/dinov2-large", "family": "dinov2"},
      "dinov2, weights of hf://facebook/dinov2-large",
    ),
    (None, "vit, weights of unknown origin"),
  ):
    vit = dataclasses.replace(
      artifact, kind="vit", metadata={"source": source} if source else {}
    )
    assert name_of(vit) == want


def test_too_few_images(vit, out, tmp_path):
  Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "0.png")
  (tmp_path / "data/class").mkdir(parents=True)
  (tmp_path / "0.png").rename(tmp_path / "data/class/0.png")
  with pytest.raises(
    SystemExit, match="^Error: .* has 1 images of split 'train': .*at least 2"
  ):
    reference_stats.main(folder_flags(tmp_path / "data", vit, out))


def test_features_that_are_not_finite(
  pictures, vit, out, tmp_path, monkeypatch
):
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
  with pytest.raises(
    SystemExit, match="^Error: --network=.*image 0 of folder:.* are not finite"
  ):
    reference_stats.main(folder_flags(pictures, str(tmp_path / "huge"), out))


# Several processes.


def test_processes_that_differ(pictures, vit, out, monkeypatch):
  """Each learns that the other's images are not its own."""
  gather = processes.gather
  monkeypatch.setattr(
    processes,
    "gather",
    lambda array: [*gather(array), np.zeros((1, 32), np.uint8)],
  )
  with pytest.raises(
    SystemExit, match="^Error: process 1 has other images or an"
  ):
    reference_stats.main(folder_flags(pictures, vit, out))
  assert not out.exists()


def free_port() -> int:
  with socket.socket() as server:
    server.bind(("127.0.0.1", 0))
    return server.getsockname()[1]


def run_two(*argvs: list[str]) -> list[tuple[int, str]]:
  """(return code, standard error) of real processes of two devices each."""
  coordinator = f"127.0.0.1:{free_port()}"
  running = [
    subprocess.Popen(
      [
        sys.executable,
        "-m",
        "drift_jax.tools.reference_stats",
        *argv,
        f"--coordinator={coordinator}",
        f"--num_processes={len(argvs)}",
        f"--process_id={process}",
      ],
      stderr=subprocess.PIPE,
      text=True,
      env=process_environment(2),
      cwd=ROOT,
    )
    for process, argv in enumerate(argvs)
  ]
  errors = [process.communicate(timeout=240)[1] for process in running]
  return [
    (process.returncode, text)
    for process, text in zip(running, errors, strict=True)
  ]


@pytest.mark.system
def test_two_processes_make_what_one_makes(pictures, vit, out, tmp_path):
  given = {"num_features": 9, "batch_size": 4}
  reference_stats.main(folder_flags(pictures, vit, out, **given))
  paths = [tmp_path / f"{process}.npz" for process in range(2)]
  first, second = run_two(
    *[folder_flags(pictures, vit, path, **given) for path in paths]
  )
  assert first[0] == second[0] == 0, first[1] + second[1]
  assert "Wrote" in first[1] and "Wrote" not in second[1]
  assert paths[0].exists() and not paths[1].exists()
  one, two = (load_reference(path) for path in (out, paths[0]))
  assert one.count == two.count == COUNT
  assert one.provenance == two.provenance
  assert_close(two.mean, one.mean, 1e-6)
  assert_close(two.sigma, one.sigma, 1e-6)
  assert one.features is not None and two.features is not None
  assert_close(two.features, one.features, 1e-6)


@pytest.mark.system
def test_one_failing_process_ends_both(pictures, vit, out, tmp_path):
  """Soon, and each in one line."""
  good = folder_flags(pictures, vit, out)
  bad = folder_flags(pictures, vit, out, source="folder:/nowhere")
  for code, message in run_two(good, bad):
    assert code == 1 and "Traceback" not in message
    assert "Error: " in message
  assert not out.exists()
