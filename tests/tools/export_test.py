"""Exports: the same images without this package, in a clean environment."""

import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.export
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

import drift_jax
from drift_jax import config as config_lib
from drift_jax import sampling
from drift_jax.config import ConfigError
from drift_jax.system import sharding
from drift_jax.tasks.generator import samplers
from drift_jax.tasks.generator.restore import identity, open_generator
from drift_jax.tools import export as command
from drift_jax.tools.work import export
from drift_jax.training import artifacts
from drift_jax.training.frozen import load_vae
from tests.autoencoders import save_vae
from tests.conftest import GOLDEN, assert_close
from tests.small_generator import NAMES, save_generator

# What `pip install jax flatbuffers` brings.
CLEAN = (
  "flatbuffers",
  "jax",
  "jaxlib",
  "ml_dtypes",
  "numpy",
  "opt_einsum",
  "scipy",
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  return save_generator(tmp_path_factory.mktemp("generator"))


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory):
  out = tmp_path_factory.mktemp("exports") / "small"
  export.export(source, str(out), formats=("stablehlo", "release"))
  return out


def clean_environment(folder: pathlib.Path) -> dict[str, str]:
  """Variables of a Python that finds CLEAN and nothing else."""
  for name in CLEAN:
    place = pathlib.Path(importlib.util.find_spec(name).origin).parent
    for path in (place, place.with_name(f"{name}.libs")):
      if path.exists():
        (folder / path.name).symlink_to(path)
  kept = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
  return kept | {"PYTHONPATH": str(folder), "JAX_PLATFORMS": "cpu"}


# Runs the example for each of some files to write.
BARE = """if True:
  import importlib.util
  import runpy
  import sys

  for name in ("flax", "drift_jax"):
    assert importlib.util.find_spec(name) is None, name
  _, script, *asked = sys.argv
  sys.argv = [script, "--count=1"]
  sys.modules["flatbuffers"] = None
  try:
    runpy.run_path(script, run_name="__main__")
  except SystemExit as end:
    assert "Error: pip install jax flatbuffers" in end.code, end.code
  del sys.modules["flatbuffers"]
  for out in ("grid.png", "images.npy"):
    sys.argv = [script, *asked, f"--out={out}"]
    runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.system
def test_runs_with_jax_and_numpy_alone(exported, tmp_path):
  asked = [
    "--labels",
    "3,1",
    "index:2",
    "--count=4",
    "--alpha=1.5",
    "--seed=11",
  ]
  done = subprocess.run(
    # -S: no site-packages.
    [sys.executable, "-S", "-c", BARE, exported / "run.py", *asked],
    cwd=tmp_path,
    env=clean_environment(tmp_path),
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.endswith("Wrote images.npy\n")
  images = np.load(tmp_path / "images.npy")
  expected = drift_jax.load(str(exported)).sample(
    [3, 1, 2], count=4, alpha=1.5, seed=11
  )
  assert_close(images, expected.images, 1e-5)
  with Image.open(tmp_path / "grid.png") as image:
    grid = np.asarray(image)
  assert grid.shape == (3 * 48, 4 * 48, 3)
  pixels = expected.pixels()[5].astype(int)  # second row, second column
  assert np.abs(grid[48:96:6, 48:96:6, :1] - pixels).max() <= 1


@pytest.fixture
def run(exported, tmp_path, monkeypatch):
  """(run.py as a module, what it says when it is called with arguments)."""
  monkeypatch.chdir(tmp_path)
  # Else a cache of it lies in the export, which others list.
  monkeypatch.setattr(sys, "dont_write_bytecode", True)
  spec = importlib.util.spec_from_file_location("run", exported / "run.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)

  def call(*arguments):
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    with pytest.raises(SystemExit) as ended:
      module.main()
    assert not list(tmp_path.iterdir())
    return str(ended.value)

  return module, call


@pytest.mark.slow
def test_example_checks_what_it_is_asked(run, exported, monkeypatch):
  """And draws no black pictures, nor from damaged files."""
  module, call = run
  assert "drift_jax" not in (exported / "run.py").read_text()
  for flag, value, message in (
    ("--labels", "99", "class indices are 0 to 3"),
    ("--alpha", "nan", "want 1.0 to 3.0"),
    ("--seed", "-1", "want 0 to 4294967295"),
    ("--count", "0", "want at least 1"),
    ("--out", "grid.jpg", "want .png or .npy"),
  ):
    assert call(flag, value).startswith(f"Error: {flag} {value}: {message}")
  names = [str(number) for number in range(1, 13)]
  for text, index in (("index:10", 10), ("name:10", 9), ("0", 0)):
    assert module.class_index(text, names, 12) == index
  for text in ("10", "99", "name:99", "index:a"):
    with pytest.raises(ValueError, match=text):
      module.class_index(text, names, 12)
  read = module.read_safetensors

  def spoilt(data):
    return {
      name: np.full_like(array, np.nan) for name, array in read(data).items()
    }

  monkeypatch.setattr(module, "read_safetensors", spoilt)
  assert call("--count=1") == "Error: the images are not finite"
  path_type = type(module.HERE)
  read_bytes = path_type.read_bytes
  monkeypatch.setattr(path_type, "read_bytes", lambda p: read_bytes(p)[:-9])
  assert "model.safetensors is damaged" in call("--count=1")


@pytest.mark.slow
def test_what_it_says_and_holds(exported, source):
  manifest = json.loads((exported / "manifest.json").read_text())
  assert manifest["class_names"] == list(NAMES)
  assert manifest["alpha_range"] == [1.0, 3.0]
  assert (manifest["step"], manifest["ema_decay"]) == (3, 0.9)
  assert manifest["provenance"]["weights"] == source
  sample = manifest["functions"]["sample"]
  assert sample["platforms"] == ["cpu", "cuda", "tpu"]
  assert sample["result"] == "float32[b, 8, 8, 1]"
  assert manifest["files"] == {
    path.relative_to(exported).as_posix(): {
      "bytes": path.stat().st_size,
      "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    for path in exported.rglob("*")
    if path.is_file() and path.name != "manifest.json"
  }
  model, original = drift_jax.load(str(exported)), drift_jax.load(source)
  assert identity(model.generator) == identity(original.generator)
  assert model.class_names == NAMES and model.alpha_range == (1.0, 3.0)
  # The release's format holds the same tree.
  files = [
    pathlib.Path(folder, artifacts.SUBDIRECTORY, artifacts.PARAMS_FILE)
    for folder in (exported, source)
  ]
  assert files[0].read_bytes() == files[1].read_bytes()


def call(folder, name, weights, *arrays):
  """What an exported function returns."""
  program = bytearray((folder / f"{name}.stablehlo").read_bytes())
  tensors = {
    part: safetensors.numpy.load_file(folder / part / "model.safetensors")
    for part in weights
  }
  return jax.export.deserialize(program).call(tensors, *arrays)


@pytest.mark.slow
def test_given_noise_gives_the_released_samples(tmp_path, golden):
  """Latents, of the golden artifact."""
  source = str(GOLDEN / "artifact_gen")
  export.export(source, str(tmp_path / "out"), platforms=("cpu",))
  data = golden("gen_latent")
  inputs = (data[key] for key in ("labels", "cfg_scale", "x", "noise_labels"))
  samples = call(tmp_path / "out", "generate", ["generator"], *inputs)
  assert_close(samples, data["samples"], 1e-4)


def test_bfloat16_rounds_only_what_the_network_rounds(source, tmp_path):
  """And the release's format has all bits of all weights."""
  out = tmp_path / "out"
  export.export(source, str(out), dtype="bfloat16", formats=("release",))
  original = artifacts.load(source).params
  stored = artifacts.load(out / "generator").params
  assert stored["patch_embed"]["kernel"].dtype.name == "bfloat16"
  for name in ("attention_norm", "mlp_norm"):
    scale = stored["blocks"][name]["scale"]
    np.testing.assert_array_equal(scale, original["blocks"][name]["scale"])
  released = artifacts.load(out / artifacts.SUBDIRECTORY)
  assert str(released.module.dtype) == "bfloat16"
  jax.tree.map(np.testing.assert_array_equal, released.params, original)


def test_autoencoder_of_a_run_keeps_its_precision(tmp_path, monkeypatch):
  """Its decoder is bfloat16 in the functions, and when the export is loaded."""
  monkeypatch.setattr(export, "_write_stablehlo", lambda *_: {})
  mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
  section = config_lib.Vae(
    path=str(save_vae(tmp_path / "vae", latent_channels=4)),
    dtype="bfloat16",
    sharding="replicate",
    remat=False,
    model={},
  )
  opened = open_generator(str(GOLDEN / "artifact_gen"), mesh)
  opened = dataclasses.replace(opened, vae=load_vae(section, mesh))
  monkeypatch.setattr(export, "open_generator", lambda *_, **__: opened)
  export.export("runs/latents", str(tmp_path / "out"))
  monkeypatch.undo()
  vae = drift_jax.load(str(tmp_path / "out")).generator.vae
  assert vae.module.dtype == opened.vae.module.dtype
  jax.tree.map(np.testing.assert_array_equal, vae.params, opened.vae.params)


@pytest.mark.slow
def test_autoencoder_is_folded_in_and_bfloat16_is_half_as_large(tmp_path):
  golden_gen = GOLDEN / "artifact_gen"
  vae = str(save_vae(tmp_path / "vae", latent_channels=4))
  out = tmp_path / "out"
  manifest = export.export(
    str(golden_gen), str(out), vae=vae, dtype="bfloat16", platforms=("cpu",)
  )
  assert manifest["functions"]["sample"]["result"] == "float32[b, 16, 16, 3]"
  released = golden_gen / "params_ema" / "ema_params.msgpack"
  size = manifest["files"]["generator/model.safetensors"]["bytes"]
  assert size < 0.75 * released.stat().st_size
  weights = safetensors.numpy.load_file(out / "generator/model.safetensors")
  assert weights["class_embed/embedding"].dtype == np.float32
  assert weights["patch_embed/kernel"].dtype.name == "bfloat16"
  images = call(
    out,
    "sample",
    ["generator", "vae"],
    np.array([1, 2, 3], np.int32),
    np.ones(3, np.float32),
    np.arange(3, dtype=np.int32),
    np.uint32(5),
    np.full(4, -1, np.int32),
  )
  # The model itself, from the export, which knows its autoencoder.
  model = drift_jax.load(str(out))
  assert str(model.generator.task.generator.dtype) == "bfloat16"
  assert_close(images, model.sample([1, 2, 3], seed=5).images, 2e-2)
  exact = drift_jax.load(str(golden_gen), vae=vae).sample([1, 2, 3], seed=5)
  assert_close(images, exact.images, 5e-2)


def test_nothing_is_overwritten_or_half_written(source, tmp_path, monkeypatch):
  def fail(*_, **__):
    raise OSError("No space left on device")

  monkeypatch.setattr(export, "_write_stablehlo", fail)
  with pytest.raises(OSError, match="No space"):
    export.export(source, str(tmp_path / "out"))
  monkeypatch.setitem(sys.modules, "jax2onnx", None)
  with pytest.raises(ConfigError, match="--no-deps jax2onnx"):
    export.export(source, str(tmp_path / "out"), formats=("onnx",))
  with pytest.raises(ConfigError, match="must be a local folder"):
    export.export(source, "gs://bucket/out")
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the converter's own
def test_onnx_gives_the_same_images(source, tmp_path):
  """In batches of any size."""
  import onnxruntime

  out = tmp_path / "out"
  if not hasattr(jax._src.core, "ClosedJaxpr"):
    # jax2onnx 0.17.1 looks for it, which JAX 0.12 has no more.
    with pytest.raises(ConfigError, match="jax2onnx fails with JAX 0"):
      export.export(source, str(out), formats=("onnx",))
    return
  export.export(source, str(out), formats=("onnx",))
  assert not (out / "sample.stablehlo").exists()
  options = onnxruntime.SessionOptions()
  options.log_severity_level = 3
  session = onnxruntime.InferenceSession(str(out / "generate.onnx"), options)
  opened = sampling.load(str(out)).generator
  rng = np.random.default_rng(0)
  for count in (2, 5):
    inputs = {
      "labels": np.arange(count, dtype=np.int32) % 4,
      "alpha": np.linspace(1, 3, count, dtype=np.float32),
      "noise": rng.standard_normal((count, 8, 8, 1), np.float32),
      "style": rng.integers(0, 16, (count, 4), np.int32),
    }
    (images,) = session.run(["images"], inputs)
    step = jax.jit(functools.partial(samplers.generate, task=opened.task))
    expected = step(jax.device_get(opened.params), *inputs.values())
    assert_close(images, expected, 1e-5)


def test_command(source, tmp_path, monkeypatch):
  monkeypatch.setattr(export, "_write_stablehlo", lambda *_: {})
  command.main([f"--init_from={source}", f"--out={tmp_path / 'out'}"])
  assert sampling.load(str(tmp_path / "out")).num_classes == 4
  with pytest.raises(SystemExit, match="Error: --out=.* is there already"):
    command.main([f"--init_from={source}", f"--out={tmp_path / 'out'}"])
  with pytest.raises(SystemExit, match="'gpu': valid options are"):
    command.main(["--workdir=x", "--out=y", "--platforms=gpu"])
