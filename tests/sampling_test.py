"""Samples of a loaded generator: what they depend on, and what is refused."""

import dataclasses
import functools
import io
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from PIL import Image

import drift_jax
from drift_jax import sample, sampling
from drift_jax.config import ConfigError
from drift_jax.metrics.images import to_uint8
from drift_jax.system.errors import EvaluationError
from drift_jax.tasks.generator.samplers import (
  generate,
  sample_inputs,
  sample_step,
)
from drift_jax.training import artifacts
from drift_jax.training.step import apply
from tests.autoencoders import save_vae
from tests.conftest import GOLDEN, assert_close
from tests.small_generator import save_generator


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return save_generator(tmp_path_factory.mktemp("generator"))


@pytest.fixture(scope="module")
def model(folder):
  return drift_jax.load(folder)


def drawn(model, labels, alpha, index, seed):
  """The step itself, with a seed that is no argument of what is compiled."""
  opened = model.generator
  step = jax.jit(functools.partial(sample_step, seed=seed, task=opened.task))
  return step(
    jax.device_get(opened.params),
    np.asarray(labels, np.int32),
    np.full(len(labels), alpha, np.float32),
    np.asarray(index, np.int32),
  )


def test_images_are_those_of_the_step(model):
  """Traced as well as not, whatever the batch size."""
  seed = 2**32 - 1
  labels = np.array([0, 3, 3, 1, 2], np.int32)
  expected = drawn(model, labels, 1.5, range(5), seed)
  samples = model.sample(labels.tolist(), alpha=1.5, seed=seed, batch_size=3)
  assert_close(samples.images, expected, 1e-5)
  np.testing.assert_array_equal(samples.labels, labels)
  fewer = model.sample(labels[:2].tolist(), alpha=1.5, seed=seed)
  assert_close(samples.images[:2], fewer.images, 1e-6)


def test_images_end_at_black_and_white(model):
  """A generator's values are not bounded, and nobody sees what is beyond."""
  opened = model.generator
  params = jax.tree.map(lambda x: 3 * x, opened.params)
  inputs = sample_inputs(np.arange(4, dtype=np.int32), seed=0, task=opened.task)
  of_each = (np.arange(4), np.ones(4, np.float32), *inputs)
  made, seen = (
    np.asarray(generate(params, *of_each, task=task))
    for task in (dataclasses.replace(opened.task, pixels=False), opened.task)
  )
  assert made.min() < -1.5 and made.max() > 1.5
  np.testing.assert_array_equal(seen, np.clip(made, -1, 1))


def test_label_alpha_seed_and_style_change_an_image(model):
  """A style index for all tokens is the same as each; -1 is chance."""

  def draw(labels=(1,), **changes):
    return model.sample(labels, count=3, **{"seed": 1, **changes}).images

  base, fixed = draw(), draw(style=[3])
  for other in (draw([2]), draw(alpha=3.0), draw(seed=2), fixed):
    assert np.abs(other - base).max() > 1e-4
  np.testing.assert_array_equal(fixed, draw(style=[3, 3, 3, 3]))
  np.testing.assert_array_equal(fixed, draw(style=3))
  np.testing.assert_array_equal(draw(style=[-1]), base)
  assert np.abs(draw(style=[3, -1, 3, 3]) - fixed).any()


@pytest.mark.slow
def test_walk_between_two_noises(model):
  """It begins with the image of `sample`; every step is a small one."""
  walk = model.interpolate([1, 2], frames=5, count=2, seed=4)
  assert len(walk) == 5 and walk[0].images.shape == (4, 8, 8, 1)
  first = model.sample([1, 2], count=2, seed=4).images
  assert_close(walk[0].images, first, 1e-5)
  task = model.generator.task

  @jax.jit
  def end(params):
    inputs = functools.partial(sample_inputs, seed=4, task=task)
    noise, _ = inputs(np.arange(4, 8, dtype=np.int32))
    _, style = inputs(np.arange(4, dtype=np.int32))
    alpha = np.ones(4, np.float32)
    return generate(params, walk[0].labels, alpha, noise, style, task=task)

  last = end(jax.device_get(model.generator.params))
  assert_close(walk[-1].images, last, 1e-4)


def test_labels(model):
  for names, labels in (
    (None, [0, 1, 2, 3]),
    (["1-3", "0"], [1, 2, 3, 0]),
    (["TENCH", "Tinca tinca", "tench, tinca tinca"], [0, 0, 0]),
    (["shark"], [2]),  # a whole synonym before a part of another name
    (["hammer"], [3]),
    # As people give them, alone or several.
    ("1-2, goldfish", [1, 2, 1]),
    ("tench, Tinca tinca", [0]),
    ('"tench, Tinca tinca",3', [0, 3]),
    (3, [3]),
    ((1, "0"), [1, 0]),
    (range(3), [0, 1, 2]),
    ({2: "a", 1: "b"}, [2, 1]),
    (np.int64(2), [2]),
    (np.array(["1", "shark"]), [1, 2]),
    (np.array(3), [3]),
    (jax.numpy.array([1, 3]), [1, 3]),
  ):
    found = model.labels(names)
    np.testing.assert_array_equal(found, labels, err_msg=repr(names))
    assert found.dtype == np.int32


def test_classes_that_are_called_by_numbers(model, monkeypatch):
  """One reading, or an error that names both and how to write them."""
  shifted, ranges = ("1", "2", "3", "4"), ("0-2", "3-7", "8-12", "13-99")
  others = ("1", "10", "11", "2")
  for classes, entry, label in (
    (shifted, "2", ["1 '2'", "index:2", "name:2"]),
    (others, "1-3", ["0 '1'", "3 '2'", "index:1-3", "name:1"]),
    (others, "index:1-3", [1, 2, 3]),
    (shifted, "index:2", [2]),
    (shifted, np.int64(2), [2]),
    (shifted, "name:2", [1]),
    (shifted, "0", [0]),  # nobody is called so
    (shifted, "4", [3]),  # no index
    (shifted, "5", ["'5' is no class index"]),
    (("01", "02", "03", "04"), "02", ["name:02"]),
    (("0", "1", "2", "3"), "1-2", [1, 2]),
    (ranges, "3-7", [1]),
    (ranges, "0-2", ["index:0-2", "name:0-2"]),
    (ranges, "1-3", [1, 2, 3]),
    (("a", "b", "c", "d"), "index:b", ["'b' is no class index"]),
    (("a", "b", "c", "d"), "index:4", ["'4' is no class index"]),
  ):
    monkeypatch.setattr(model, "class_names", classes)
    if isinstance(label[0], int):
      assert model.labels([entry]).tolist() == label
      continue
    with pytest.raises(ConfigError) as refused:
      model.labels([entry])
    assert all(part in str(refused.value) for part in label)


def test_labels_that_are_none(model):
  for names, message in (
    ("4", r"'4' is no class index in \[0, 4\)"),
    (["2-4"], r"'2-4' is no class index in \[0, 4\), nor a range"),
    (["3-2"], "'3-2' is no class index"),
    ([-1], "'-1' is no class index"),
    (["²"], "'²' is no class index"),
    (["goldfsh"], "'goldfsh' is no .*close to it: 1 'goldfish'"),
    (["a"], r"'a' is in the names of 3 classes, 0 .*give more of it"),
    ([""], "'' is no class index"),
    ([], "names no class"),
    (2.0, "labels=2.0 must be an integer"),
    ([True], "labels=True must be an integer"),
    (np.zeros((1, 2), int), r"labels=array\(\[0, 0\]\) must be an integer"),
    ('"tench', "labels='\"tench'"),
  ):
    with pytest.raises(ConfigError, match=message):
      model.labels(names)


def test_arguments_out_of_range(model):
  for name, value, message in (
    ("alpha", 3.5, r"alpha=3.5: .* trained for alpha in \[1.0, 3.0\]"),
    ("alpha", float("nan"), "alpha=nan"),
    ("alpha", [1.0, 2.0], "must be one number"),
    ("seed", 2**32, "seed=4294967296 must lie"),
    ("seed", 0.5, "seed=0.5 must be an integer"),
    ("count", 0, r"count=0 must lie in \[1, inf\]"),
    ("batch_size", 0, "batch_size=0"),
    ("style", [0.5], "style=.0.5."),
    ("style", [[1]], "style="),
    ("style", [1, 2], "want one index, or 4"),
    ("style", [16], r"16 is not in \[0, 16\)"),
  ):
    with pytest.raises(ConfigError, match=message):
      model.sample([0], **{name: value})


def test_a_path_object_and_one_class(folder, model):
  loaded = drift_jax.load(pathlib.Path(folder))
  expected = model.sample(["3", "1"], count=2, seed=1)
  samples = loaded.sample("3,1", count=np.int64(2), seed=np.uint32(1))
  np.testing.assert_array_equal(samples.images, expected.images)
  assert model.sample(2).labels.tolist() == [2]
  for labels in ([4], [-1], [0.0], [[0]]):
    with pytest.raises(ConfigError, match="labels"):
      model.batches(labels, alpha=1.0, seed=0)


def test_pictures(model, tmp_path):
  samples = model.sample([0, 1], count=3)
  assert len(samples) == 6
  for suffix, written in {"JPEG": "JPEG", "png": "PNG", "webp": "WEBP"}.items():
    samples.save(tmp_path / f"grid.{suffix}")
    with Image.open(tmp_path / f"grid.{suffix}") as image:
      assert (image.format, image.mode) == (written, "RGB")
      difference = np.asarray(image).astype(int) - samples.grid()
    # JPEG rounds; the others keep every pixel.
    assert np.abs(difference).mean() <= (2 if written == "JPEG" else 0)
  with pytest.raises(ValueError, match="valid options are .*'.png'"):
    samples.save(tmp_path / "grid.tif")
  assert not (tmp_path / "grid.tif").exists()
  with Image.open(io.BytesIO(samples._repr_png_())) as image:
    np.testing.assert_array_equal(np.asarray(image), samples.grid())
  np.testing.assert_array_equal(samples.pixels(), to_uint8(samples.images))


@pytest.mark.slow
def test_latents_need_their_autoencoder(tmp_path):
  """The released golden artifact makes latents of 4 channels."""
  source = str(GOLDEN / "artifact_gen")
  with pytest.raises(ConfigError, match="4 channels .*vae=FOLDER"):
    drift_jax.load(source)
  vae = str(save_vae(tmp_path / "vae", latent_channels=4))
  model = drift_jax.load(source, vae=vae)
  assert model.image_shape == (16, 16, 3) and model.class_names == ()
  assert model.alpha_range == (1.0, 4.0)
  assert not model.generator.task.pixels
  images = model.sample([1], count=2, seed=3).images
  assert images.shape == (2, 16, 16, 3)
  autoencoder = model.generator.vae
  decode = functools.partial(apply, autoencoder.module, method="decode")
  decoded = jax.jit(decode)(
    jax.device_get(autoencoder.params), drawn(model, [1, 1], 1.0, range(2), 3)
  )
  assert_close(images, np.clip(decoded, -1, 1), 1e-4)
  with pytest.raises(ConfigError, match="names of its .* are not known"):
    model.labels(["tench"])


def test_facts_that_say_nothing(tmp_path):
  for facts in (
    {"alpha_range": None},
    {"alpha_range": [1.0]},
    {"alpha_range": [3.0, 1.0]},
    {"class_names": 5},
    {"class_names": ["one"]},
    {"class_names": [1, 2, 3, 4]},
  ):
    source = save_generator(tmp_path, facts=facts)
    message = f"have {next(iter(facts))}="
    with pytest.raises(artifacts.ArtifactError, match=message):
      drift_jax.load(source)


@pytest.fixture(scope="module", autouse=True)
def command_flags():
  sample.define_flags()


def run_command(out, **flags):
  chosen = {"labels": ["0-1"], "count": 3, "seed": 7, **flags}
  with flagsaver.flagsaver(out=str(out), **chosen):
    try:
      sample.main(["sample"])
    except SystemExit as ended:
      return str(ended.code)
  return ""


def test_folder_goes_on_where_it_was_interrupted(folder, model, tmp_path):
  out = tmp_path / "samples"
  flags = {"from": folder, "batch_size": 8}
  assert run_command(f"{out}/", **flags) == ""
  images = sorted(out.glob("*.png"))
  assert [path.name for path in images] == [f"{i:06d}.png" for i in range(6)]
  facts = json.loads((out / "samples.json").read_text())
  assert facts["labels"] == [0, 0, 0, 1, 1, 1] and facts["seed"] == 7
  expected = model.sample(["0-1"], count=3, seed=7).pixels()
  for path, image in zip(images, expected, strict=True):
    with Image.open(path) as picture:
      difference = np.asarray(picture).astype(int) - image
      assert np.abs(difference).max() <= 1
  lost = images.pop(4)
  before = [path.stat().st_mtime_ns for path in images]
  content = lost.read_bytes()
  lost.unlink()
  assert run_command(out, **flags) == ""
  assert lost.read_bytes() == content
  assert before == [path.stat().st_mtime_ns for path in images]
  assert not [path for path in out.iterdir() if path.name.startswith(".")]
  message = run_command(out, **flags | {"seed": 8})
  assert "holds images of another request (seed: 7, now 8)" in message
  other = save_generator(tmp_path / "other", seed=1)
  message = run_command(out, **flags | {"from": other})
  assert "holds images of another request (weights: " in message
  # The same weights are the same wherever they lie.
  shutil.copytree(folder, tmp_path / "moved")
  assert run_command(out, **flags | {"from": str(tmp_path / "moved")}) == ""
  (out / "samples.json").unlink()
  assert "no samples.json that says" in run_command(out, **flags)


def test_folder_is_of_the_same_conditions(tmp_path):
  source = save_generator(tmp_path / "generator", condition_size=2)
  files = [tmp_path / f"{name}.npz" for name in "ab"]
  given = np.random.default_rng(0).normal(size=(2, 3, 2)).astype(np.float32)
  for file, conditions in zip(files, given, strict=True):
    np.savez(file, conditions=conditions)
  out, flags = tmp_path / "samples", {"from": source, "labels": ["2"]}
  flags |= {"count": 2}
  message = run_command(f"{out}/", conditions=str(files[0]), **flags)
  assert message == ""
  expected = drift_jax.load(source).sample(
    [2], condition=given[0], count=2, seed=7
  )
  assert len([*out.glob("*.png")]) == 6
  with Image.open(out / "000005.png") as picture:
    difference = np.asarray(picture).astype(int) - expected.pixels()[5]
    assert np.abs(difference).max() <= 1
  message = run_command(out, conditions=str(files[1]), **flags)
  assert "holds images of another request (conditions: " in message
  assert "this generator needs one of shape (2,)" in run_command(out, **flags)
  none = run_command(out, conditions=str(tmp_path / "no.npz"), **flags)
  assert "no.npz" in none and "No such file" in none


def test_folder_is_of_one_autoencoder(tmp_path, monkeypatch):
  monkeypatch.setattr(sampling.Sampler, "batches", lambda *_, **__: iter(()))
  flags = {"from": str(GOLDEN / "artifact_gen")}
  vaes = [
    str(save_vae(tmp_path / f"vae{seed}", seed, latent_channels=4))
    for seed in (0, 1)
  ]
  out = tmp_path / "samples"
  assert run_command(f"{out}/", vae=vaes[0], **flags) == ""
  message = run_command(out, vae=vaes[1], **flags)
  assert "holds images of another request (vae: " in message


def test_no_black_pictures(folder, tmp_path):
  """Of weights that are not finite, nor of samples that overflow."""
  artifact = artifacts.load(folder)
  last = {part: artifact.params["final"][part] for part in ("norm", "linear")}

  def saved(name, factor):
    changed = jax.tree.map(lambda x: x * np.float32(factor), last)
    artifacts.save(
      tmp_path / name,
      kind="gen",
      model_config=artifact.metadata["model_config"],
      params=artifact.params | {"final": artifact.params["final"] | changed},
      step=3,
      ema_decay=0.9,
    )
    return str(tmp_path / name)

  with pytest.raises(artifacts.ArtifactError, match="FinalLayer.* not finite"):
    drift_jax.load(saved("nan", np.nan))
  flags = {"from": saved("large", 1e30)}
  images = np.full((1, 8, 8, 1), np.inf, np.float32)
  with pytest.raises(EvaluationError, match="image 0 .label 1. is not"):
    sampling.Samples(images, np.ones(1, np.int32), 1)
  for out in ("a.png", "a/"):
    message = run_command(tmp_path / out, **flags)
    assert "sample 0 (label 0, alpha 1.0) is not finite" in message
    assert not [*tmp_path.glob("a.*"), *tmp_path.glob("a/*.png")]


def test_files(folder, model, tmp_path):
  flags = {"from": folder}
  assert run_command(tmp_path / "a.npz", **flags) == ""
  with np.load(tmp_path / "a.npz") as archive:
    assert archive["arr_0"].shape == (6, 8, 8, 3)
    np.testing.assert_array_equal(archive["arr_1"], [0, 0, 0, 1, 1, 1])
  assert run_command(tmp_path / "a.png", **flags) == ""
  with Image.open(tmp_path / "a.png") as image:
    expected = model.sample(["0-1"], count=3, seed=7).grid()
    assert np.asarray(image).shape == expected.shape
  assert run_command(tmp_path / "a.gif", interpolate=3, **flags) == ""
  with Image.open(tmp_path / "a.gif") as image:
    assert image.n_frames == 4  # 0 1 2 1


def test_mistakes(folder, tmp_path):
  for out, flags, message in (
    ("a.tif", {}, "'.tif' is none of"),
    ("a.gif", {}, "a .gif is a walk"),
    ("a.png", {"interpolate": 3}, "only a .gif is"),
    ("a.png", {"style": ["x"]}, "--style: invalid literal"),
    ("a.png", {"from": "/nowhere"}, "there is no /nowhere: give"),
    ("a.png", {"step": 3}, "step=3 chooses among a run's"),
  ):
    code = run_command(tmp_path / out, **{"from": folder} | flags)
    assert code.startswith("Error: ") and message in code
    assert not (tmp_path / out).exists()
  with pytest.raises(AttributeError, match="no attribute 'lod'"):
    _ = drift_jax.lod
