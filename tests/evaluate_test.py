"""Evaluation as a job: runs, exported weights, images, several processes."""

import functools
import hashlib
import json
import pathlib
import shutil
import socket
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from PIL import Image

from drift_jax.metrics.frechet import FeatureStats, frechet_distance
from drift_jax.metrics.images import to_uint8
from drift_jax.metrics.reference import ReferenceStats
from drift_jax.system import sharding
from drift_jax.tasks.generator.judges import load_judge, network_fn
from drift_jax.tasks.generator.restore import open_artifact
from drift_jax.tasks.generator.samplers import sample_step
from drift_jax.training import artifacts
from tests.conftest import assert_close
from tests.judges import (
  digit_pixels,
  save_inception,
  save_random_statistics,
  save_statistics,
  save_vit,
)
from tests.process import process_environment
from tests.programs import call_each
from tests.small_generator import save_generator, save_run

pytestmark = pytest.mark.system

ROOT = pathlib.Path(__file__).parent.parent
GEN = ROOT / "tests" / "golden" / "artifact_gen"
ALPHAS = (1.0, 2.5)
COUNT = 50
BATCH = "--batch_size=24"  # the judges are compiled for one size
REALS = 150
# Of Inception's features, of samples, of keeping all images; merged in every
# way that there is.
FIGURES = ("fd_inception", "fd_pixel", "coverage")
# Of published weights only.
NAMED = ("fid", "inception_score", "precision_recall", "kid")


def start(*arguments, devices=1):
  return subprocess.Popen(
    [sys.executable, *map(str, arguments)],
    cwd=ROOT,
    env=process_environment(devices),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
  """Folders of a published and of another Inception, and their statistics.

  Stand-ins: narrow, and 'published' by their metadata only.
  """
  folder = tmp_path_factory.mktemp("judges")
  for name, published in (("published", True), ("other", False)):
    save_inception(folder / name, published=published, seed=int(published))
  save_statistics(
    folder / "published.npz",
    folder / "published",
    digit_pixels(REALS),
    crop="none",
  )
  save_random_statistics(
    folder / "other.npz", folder / "other", resolution=8, crop="none"
  )
  return folder


def judge_flags(judges, name="other"):
  return (
    f"--inception={judges / name}",
    f"--inception_reference={judges / name}.npz",
  )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A run whose generator draws something else for each label and noise."""
  path = tmp_path_factory.mktemp("run")
  save_run(path)
  return path


# Draws the samples that the job judges, before they are rounded.
DRAW = """if True:
  import sys
  import numpy as np
  from drift_jax import evaluate
  from drift_jax.metrics import generation
  from drift_jax.system import processes, sharding
  from drift_jax.tasks.generator import restore, samplers
  from absl import app

  evaluate.define_flags()

  def main(argv):
    judge = evaluate.judge

    def judge_and_draw(*arguments):
      judge(*arguments)
      draw(*argv[1:3])

    evaluate.judge = judge_and_draw  # one of several processes ends with it
    evaluate.main(argv[:1])

  def draw(workdir, out):
    mesh = sharding.make_mesh()
    run = restore.open_run(workdir, mesh)
    sample_fn = samplers.make_sampler(run.task, mesh, 7)(run.params)
    labels = generation.balanced_labels(50, 10)
    batches = generation.generate(sample_fn, labels, 2.5, batch_size=24)
    drawn = [samplers.gathered(b, b.samples) for b in batches]
    if processes.is_first():
      np.save(out, np.concatenate(drawn))

  app.run(main)
"""


def run_on(tmp_path, workdir, judges, processes, devices):
  """(report, samples before rounding, samples written) of one job."""
  folder = tmp_path / f"{processes}x{devices}"
  with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
  flags = [
    f"--workdir={workdir}",
    f"--alphas={','.join(map(str, ALPHAS))}",
    f"--num_samples={COUNT}",
    BATCH,
    f"--metrics={','.join((*FIGURES, *NAMED))}",
    *judge_flags(judges, "published"),
    *("--seed=7", "--neighbours=3", "--neighbour_space=pixel"),
    "--neighbour_samples=30",
    f"--samples_out={folder / 'samples.npz'}",
    f"--out={folder / 'report.json'}",
  ]
  if processes > 1:
    flags += [
      f"--coordinator=127.0.0.1:{port}",
      f"--num_processes={processes}",
    ]
  started = [
    start(
      *("-c", DRAW, workdir, folder / "floats.npy", *flags),
      *[f"--process_id={process}"] * (processes > 1),
      devices=devices,
    )
    for process in range(processes)
  ]
  for process in started:
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr[-3000:]
  report = json.loads((folder / "report.json").read_text())
  written = []
  for alpha in ALPHAS:
    with np.load(folder / f"samples_alpha_{alpha:g}.npz") as archive:
      written.append((archive["arr_0"], archive["arr_1"]))
  return report, np.load(folder / "floats.npy"), written, folder


@pytest.fixture(scope="module")
def one_device(tmp_path_factory, workdir, judges):
  return run_on(tmp_path_factory.mktemp("one"), workdir, judges, 1, 1)


def test_report_samples_and_pictures(one_device, workdir):
  report, floats, written, folder = one_device
  assert report["num_samples"] == COUNT and report["seed"] == 7
  assert list(report["results"]) == ["1.0", "2.5"]
  figures = report["results"]["2.5"]
  assert {"fid", "fd_inception", "inception_score", "precision"} <= set(figures)
  assert figures["fid"] == figures["fd_inception"] > 0
  assert figures["fid"] != report["results"]["1.0"]["fid"]
  assert report["judges"]["inception"]["reference"]["count"] == REALS
  # Exactly as many as asked for, truncated to 8 bits, labels in their order.
  images, labels = written[1]
  assert images.shape == (COUNT, 8, 8, 3) and images.dtype == np.uint8
  np.testing.assert_array_equal(labels, np.arange(COUNT) % 10)
  np.testing.assert_array_equal(
    images, np.broadcast_to(to_uint8(floats), images.shape)
  )
  assert len(np.unique(floats.reshape(COUNT, -1), axis=0)) == COUNT
  neighbours = report["neighbours"]
  assert neighbours["generated_count"] == 30
  assert neighbours["heldout_count"] == 540
  assert neighbours["training_images"] == 1257
  for name in ("_alphas", "_neighbours", "_nearest_distances"):
    with Image.open(folder / f"report{name}.png") as picture:
      assert min(picture.size) > 100


def test_devices_and_processes_agree(tmp_path, workdir, judges, one_device):
  report, floats, written, _ = one_device
  other, other_floats, other_written, _ = run_on(
    tmp_path, workdir, judges, processes=2, devices=4
  )
  assert_close(other_floats, floats, 1e-5)
  for (images, labels), (others, other_labels) in zip(
    written, other_written, strict=True
  ):
    np.testing.assert_array_equal(labels, other_labels)
    # Truncation tells 1e-7 on either side of a level apart.
    assert np.mean(images != others) < 1e-3
  for alpha, figures in report["results"].items():
    close = pytest.approx(figures, rel=1e-4, abs=1e-12)
    assert other["results"][alpha] == close, alpha
  for name, value in report["neighbours"].items():
    if isinstance(value, float):
      value = pytest.approx(value, rel=1e-5)
    assert other["neighbours"][name] == value, name


# What one process is asked for, one after the other.


@pytest.fixture(scope="module")
def answers(images_of_the_run, heldout, exported, protocols, mistakes):
  """{a request's name: what the job printed and ended with}."""
  requests = images_of_the_run | heldout | exported.request
  requests |= protocols.requests | mistakes[0]
  told = call_each("drift_jax.evaluate", requests.values())
  return dict(zip(requests, told, strict=True))


@pytest.fixture(scope="module")
def images_of_the_run(tmp_path_factory, judges, one_device):
  """{report to write: arguments}: of the .npz, and of a folder of the same."""
  _, _, written, folder = one_device
  pictures = tmp_path_factory.mktemp("pictures")
  for number, image in enumerate(written[1][0]):
    Image.fromarray(image).save(pictures / f"{number:03d}.png")
  flags = (f"--metrics={','.join(NAMED)}", *judge_flags(judges, "published"))
  requests = {}
  for source in (folder / "samples_alpha_2.5.npz", pictures):
    out = tmp_path_factory.mktemp("scored") / "out.json"
    requests[out] = (f"--images={source}", f"--out={out}", BATCH, *flags)
  return requests


def test_images_that_the_run_wrote_score_the_same(
  answers, images_of_the_run, one_device
):
  expected = one_device[0]["results"]["2.5"]
  for out in images_of_the_run:
    printed, end = answers[out]
    assert "| 50 samples | images |" in printed and end == ""
    scored = json.loads(out.read_text())["results"]["images"]
    for name in ("fid", "inception_score", "precision", "recall", "kid"):
      assert scored[name] == pytest.approx(expected[name], rel=1e-5), name


@pytest.fixture(scope="module")
def heldout(tmp_path_factory, workdir):
  """{report to write, in a new folder: arguments}; a seed of zero."""
  out = tmp_path_factory.mktemp("heldout") / "new" / "out.json"
  few = ("--num_samples=0", "--metrics=fd_pixel", "--seed=0", f"--out={out}")
  return {out: (f"--workdir={workdir}", *few)}


def test_as_many_samples_as_are_held_out(answers, heldout):
  (out,) = heldout
  printed, end = answers[out]
  assert "| 540 samples" in printed and end == ""
  report = json.loads(out.read_text())
  assert (report["num_samples"], report["seed"]) == (540, 0)
  assert "fd_pixel" in report["results"]["1.0"]


class Exported(NamedTuple):
  """A generator of pixels, exported; labels from a list."""

  folder: pathlib.Path
  labels: np.ndarray
  request: dict[str, tuple[str, ...]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory, judges):
  path = tmp_path_factory.mktemp("exported")
  save_generator(path / "gen", facts={}, num_classes=10)
  labels = np.asarray([3, 3, 7] * 6)
  np.savetxt(path / "labels.txt", labels, fmt="%d")
  save_vit(path / "dinov2")
  save_statistics(
    path / "dinov2.npz", path / "dinov2", digit_pixels(100), crop="none"
  )
  request = (
    f"--weights={path / 'gen'}",
    "--metrics=fd_inception,fd_dinov2",
    *judge_flags(judges),
    f"--dinov2={path / 'dinov2'}",
    f"--dinov2_reference={path / 'dinov2.npz'}",
    f"--labels={path / 'labels.txt'}",
    "--num_samples=0",
    BATCH,
    "--alphas=1.5",
    f"--samples_out={path / 'samples.npz'}",
    f"--out={path / 'out.json'}",
  )
  return Exported(path, labels, {"exported": request})


def samples_of(folder, labels, alpha):
  """[N, H, W, C]: what the job draws with seed 0, before it is 8 bits."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  task = open_artifact(str(folder), "", mesh).task
  step = jax.jit(functools.partial(sample_step, seed=0, task=task))
  drawn = step(
    artifacts.load(folder).params,
    labels.astype(np.int32),
    np.full(len(labels), alpha, np.float32),
    np.arange(len(labels), dtype=np.int32),
  )
  return np.asarray(drawn)


def test_exported_weights(answers, exported, judges):
  assert answers["exported"][1] == ""
  folder, labels, _ = exported
  report = json.loads((folder / "out.json").read_text())
  assert (report["step"], report["num_samples"]) == (3, 18)
  with np.load(folder / "samples.npz") as archive:
    np.testing.assert_array_equal(archive["arr_1"], labels)
    images = archive["arr_0"]
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  expected = to_uint8(samples_of(folder / "gen", labels, 1.5))
  # Another program may round the last bit to the other side of a level.
  assert np.abs(images.astype(int) - expected).max() <= 1
  assert np.mean(images != expected) < 1e-3
  for name, network, file in (
    ("inception", judges / "other", judges / "other.npz"),
    ("dinov2", folder / "dinov2", folder / "dinov2.npz"),
  ):
    with np.load(file) as reference:
      mean, sigma = reference["mu"], reference["sigma"]
    judge = load_judge(str(network), mesh)
    # In a batch of the size that has been compiled for the judges.
    batch = np.resize(images, (REALS, *images.shape[1:]))
    features = network_fn(judge, mesh)(batch)[0][: len(images)]
    distance = frechet_distance(
      FeatureStats.from_features(features),
      ReferenceStats(mean, sigma, None, None),
    )
    assert report["judges"][name]["sha256"] == judge.sha256
    assert report["results"]["1.5"][f"fd_{name}"] == pytest.approx(
      distance, rel=1e-4
    ), name


class Protocols(NamedTuple):
  """A generator of two classes, judged as published figures were."""

  folder: pathlib.Path
  requests: dict[str, tuple[str, ...]]

  def report(self, name: str) -> Any:
    return json.loads((self.folder / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def protocols(tmp_path_factory, judges, workdir):
  path = tmp_path_factory.mktemp("protocols")
  save_generator(path / "gen", facts={}, num_classes=2)
  for name in ("imagenet_256_fid_stats", "VIRTUAL_imagenet256_labeled"):
    shutil.copy(judges / "published.npz", path / f"{name}.npz")
  samples = path / "samples.npz"
  of_each = {
    "wflow": (
      *(f"--weights={path / 'gen'}", f"--samples_out={samples}"),
      f"--inception_reference={judges / 'published.npz'}",
    ),
    "adm": (
      f"--images={path / 'samples_alpha_1.5.npz'}",
      f"--inception_reference={path / 'VIRTUAL_imagenet256_labeled.npz'}",
    ),
    "drifting": (
      *(f"--workdir={workdir}", "--alphas=1.3", "--metrics=fd_pixel"),
      f"--inception_reference={path / 'imagenet_256_fid_stats.npz'}",
    ),
  }
  network = f"--inception={judges / 'published'}"
  requests = {
    name: (
      *(f"--protocol={name}", f"--out={path / name}.json", network, BATCH),
      *flags,
    )
    for name, flags in of_each.items()
  }
  return Protocols(path, requests)


def test_a_protocol_rounds_and_goes_class_by_class(answers, protocols, judges):
  assert answers["wflow"][1] == ""
  report = protocols.report("wflow")
  assert report["num_samples"] == 100
  assert list(report["results"]) == ["1.09", "1.14", "1.19", "1.5"]
  told = report["protocol"]
  reference = judges / "published.npz"
  digest = hashlib.sha256(reference.read_bytes()).hexdigest()
  assert told["reference"]["sha256"] == digest
  (differs,) = told["differs"]
  assert str(reference) in differs and "jit_in256_stats.npz" in differs
  assert (told["pixels"], told["label_order"]) == ("round", "class")
  assert told["metrics"] == ["fid", "inception_score"] and told["shuffle"]
  with np.load(protocols.folder / "samples_alpha_1.5.npz") as archive:
    images, labels = archive["arr_0"], archive["arr_1"]
  np.testing.assert_array_equal(labels, np.repeat([0, 1], 50))
  drawn = samples_of(protocols.folder / "gen", labels, 1.5).astype(np.float64)
  exact = np.clip((drawn + 1) * 127.5, 0, 255)
  # float32 may take the other of two levels that are as near.
  assert np.abs(images - exact).max() <= 0.5 + 1e-3
  assert np.mean(images > np.floor(exact)) > 0.2


def test_a_protocol_of_images_and_of_a_run(answers, protocols):
  assert answers["adm"][1] == answers["drifting"][1] == ""
  adm, drifting = protocols.report("adm"), protocols.report("drifting")
  # The same images; but parts of one class each, where they are not shuffled.
  shuffled = protocols.report("wflow")["results"]["1.5"]
  scored = adm["results"]["images"]
  assert scored["fid"] == pytest.approx(shuffled["fid"], rel=1e-5)
  scores = [x["inception_score"] - 1 for x in (scored, shuffled)]
  assert 0 < scores[0] < 0.95 * scores[1]
  assert {"precision", "recall"} <= scored.keys()
  assert not adm["protocol"]["shuffle"]
  assert adm["protocol"]["differs"] == [
    "labels, their order, pixels and alpha: as the images are"
  ]
  assert drifting["num_samples"] == 500
  told = drifting["protocol"]
  assert (told["pixels"], told["per_class"]) == ("truncate", 50)
  # An alpha and a figure that it has not.
  keys = [text.partition(":")[0] for text in told["differs"]]
  assert keys == ["alphas", "metrics"]


# Arguments, and below them what the job must say.
MISTAKES = """

give --from=SOURCE of a generator, or --images=DIR|FILE.npz; got neither
{gen} --images=b
give --from=SOURCE of a generator, or --images=DIR|FILE.npz; got both
--images=a --data_dir=a
--data_dir=a with --images=a: it goes with a run
--images=a --alphas=2
--alphas=['2'] with --images=a: it goes with a generator, --from=SOURCE
{few} --neighbours=10
--neighbours=10 with --from={pixels}: it goes with a run
--images=nowhere.npz
Error: [Errno 2] No such file
{run} --ema_decay=0
ema_decay=0.0 was not kept
{run} --encoder=mae
--encoder=mae: want NAME=DIR
{run} --num_samples=20 --data_dir=d --data_source=folder:e
data.data_dir: d of the run in
{few} --samples_out=a.png
a.png: the suffix '.png' says in which format
{few} --metrics=fd_pixel
metrics='fd_pixel' needs a run (--from=WORKDIR): valid options are
{run} --num_samples=5400 --metrics=fd_pixel
training images, fewer than the 540 generated
{gen} {other} {frechet} {reference} --num_samples=25
num_samples=25 cannot be balanced over num_classes=10
{few}
['fid', 'inception_score'], which need eval.inception.path
{few} {other} {frechet}
['fd_inception'], which need eval.inception.reference
{few} --inception={tmp}/gen {reference}
holds a model of kind 'gen', want one of
{few} {other} {reference}
holds ['fid', 'inception_score'], but eval.inception.path=
{few} {other} {frechet} --inception_reference=nowhere.npz
there are no reference statistics nowhere.npz: python -m
{few} --inception=none --inception_reference=nowhere.npz
eval.inception.path='none': the Inception-v3 of FID (95 MB): python -m
--from={tmp}/gen --num_samples=20 {other} {frechet} {reference}
samples of 4 channels are the latents of an autoencoder: give it
{few} {other} {frechet} --inception_reference={tmp}/narrow.npz
narrow.npz holds statistics of 6 dimensions, expected 128
{run} --num_samples=0 --labels={tmp}/few.txt {published} --metrics=inception_score
'inception_score' needs at least 10 samples and 0 single
{run} --metrics=fid {published} {reference}
or another network than asked for: network_sha256 found
{few} --metrics=fd_dinov2 --dinov2={tmp}/clip --dinov2_reference={tmp}/narrow.npz
clip' holds a model 'clip', want 'dinov2'
{few} {other} {frechet} {reference} --alphas=0.5
alpha=0.5 must be at least 1
{run} --num_samples=20 --metrics=fd_pixel --neighbours=2000 --neighbour_space=pixel
2000 nearest training images are asked for, there are 1257
--from={tmp}/renamed --num_samples=20 --metrics=fd_pixel
began with other data (class 0 was '9', now '0'; class 1 was '8'
{gen} --protocol=wflow --pixels=truncate
--pixels=truncate with --protocol=wflow, which says the same
{run} --protocol=adm --num_samples=500
--num_samples=500 with --protocol=adm, which says the same
--images=a --protocol=adm --label_order=class
--label_order=class with --images=a: it goes with a generator
{few} --label_order=class {other} {frechet} --metrics=fd_pixel
metrics='fd_pixel' needs a run (--from=WORKDIR): valid options
{run} --coordinator=127.0.0.1:1 --num_processes=2 --process_id=2
process_id=2 must lie in [0, num_processes=2)
"""  # noqa: E501


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory, workdir, judges):
  """({what the job says: arguments}, report that it does not write)."""
  tmp_path = tmp_path_factory.mktemp("mistakes")
  (tmp_path / "gen").symlink_to(GEN)
  # What it learned of a label would be judged by another's images.
  shutil.copytree(workdir, tmp_path / "renamed")
  names = json.dumps([str(9 - label) for label in range(10)])
  (tmp_path / "renamed" / "classes.json").write_text(names)
  np.savez(tmp_path / "narrow.npz", mu=np.zeros(6), sigma=np.eye(6))
  np.savetxt(tmp_path / "few.txt", range(9), fmt="%d")
  save_vit(tmp_path / "clip", family="clip")
  other, reference = judge_flags(judges)
  pixels = save_generator(tmp_path / "pixels", facts={}, num_classes=10)
  text = MISTAKES.format(
    tmp=tmp_path,
    gen=f"--weights={pixels}",
    pixels=pixels,
    few=f"--from={pixels} --num_samples=20",
    run=f"--from={workdir}",
    other=other,
    reference=reference,
    published=f"--inception={judges / 'published'}",
    frechet="--metrics=fd_inception",
  )
  out = tmp_path / "out.json"
  arguments, messages = (text.splitlines()[first::2] for first in (1, 2))
  return {
    message: [*given.split(), f"--out={out}"]
    for message, given in zip(messages, arguments, strict=True)
  }, out


def test_mistakes(answers, mistakes):
  requests, out = mistakes
  for message in requests:
    _, end = answers[message]
    assert end.startswith("Error: ") and message in end, end
    assert "\n" not in end or " inputs are missing:\n" in end
  assert not out.exists()
