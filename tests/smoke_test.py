"""The smoke variants, from image files to pictures."""

import importlib
import json

import numpy as np
import pytest
from PIL import Image

import drift_jax
from drift_jax.metrics.writers import read_jsonl
from drift_jax.serve import requests
from drift_jax.system.errors import ERRORS
from drift_jax.tasks.generator import train as train_generator
from drift_jax.tasks.mae import train as train_mae
from drift_jax.tools.cache_latents import parse
from drift_jax.tools.work import cache_latents
from drift_jax.training import artifacts, released
from tests.autoencoders import save_vae
from tests.builders import save_model
from tests.data import pictures
from tests.fake_hub import hub
from tests.models.small import CONVNEXT
from tests.process import call

pytestmark = pytest.mark.slow

CLASSES = ("n01440764", "n01443537", "n02124075")
SIDE = 128  # of images: half of what is published
LABELS = 8  # one for each device


def train(name, variant, workdir, **changes):
  """Runs a config with {section: {key: value}} changed; what it wrote last."""
  config = importlib.import_module(f"configs.{name}").get_config(variant)
  config.data.image_size = SIDE
  for section, values in changes.items():
    config[section].update(values)
  task = train_mae if config.task == "mae" else train_generator
  task.train_and_evaluate(config, str(workdir))
  lines = read_jsonl(workdir / "metrics.jsonl")
  assert lines[-1]["step"] == 2
  return {key: value for line in lines for key, value in line.items()}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  """SPLIT/CLASS/FILE: JPEGs of smooth colours, none of SIDE x SIDE."""
  folder = tmp_path_factory.mktemp("images")
  rng = np.random.default_rng(0)
  for split, count in (("train", 3), ("validation", 2)):
    for label, name in enumerate(CLASSES):
      for number in range(count):
        coarse = rng.integers(0, 256, (4, 4, 3), np.uint8)
        coarse[..., label] = 255
        path = folder / split / name / f"{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((150, 140)).save(path)
  return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
  # As deep as the SD-VAE, which makes 8 pixels one.
  return save_vae(
    tmp_path_factory.mktemp("vae"), widths=(4, 4, 4, 8), latent_channels=4
  )


def test_latents(tmp_path, images, vae):
  """Images -> latent cache; encoder on images; generator on the cache."""
  cache = tmp_path / "latents"
  flags = {"source": f"folder:{images}", "vae": vae, "out": cache}
  flags |= {"image_size": SIDE, "batch_size": 8}
  argv = [f"--{name}={value}" for name, value in flags.items()]
  assert cache_latents.run(parse(argv))
  encoder = tmp_path / "encoder"
  last = train(
    "mae_latent",
    "smoke",
    encoder,
    data={"source": f"folder:{images}", "class_order": "imagenet"},
    vae={"path": str(vae)},
  )
  assert np.isfinite([last["recon_loss"], last["eval/recon_loss"]]).all()
  workdir = tmp_path / "generator"
  frozen = {"data": {"source": f"latents:{cache}"}, "vae": {"path": str(vae)}}
  changes = {
    "model": {"input_size": SIDE // 8},
    "batch": {"labels": LABELS},
    "queue": {"push_per_step": LABELS},
    "encoders": {"mae": {"path": str(encoder / train_mae.EXPORT)}},
    # The generator of pixels has them: they take long to compile.
    "features": {
      "patch_mean_size": (),
      "patch_std_size": (),
      "use_std": False,
    },
  }
  variant = "wflow_ablation,smoke"
  last = train("imagenet_latent", variant, workdir, **frozen, **changes)
  assert np.isfinite(last["loss"]) and "scale/layer1" in last
  # Two classes of two images: decoded, not latents.
  with Image.open(workdir / "samples" / "step_0000002.png") as grid:
    assert grid.size == (2 * (SIDE + 2) + 2, 2 * (SIDE + 2) + 2)
  sums = json.loads((workdir / "frozen_weights.json").read_text())
  # Another one, in the features of what the autoencoder makes of latents.
  through = tmp_path / "through"
  small = CONVNEXT | {"depths": (1, 1, 1, 1), "widths": (4, 4, 8, 8)}
  convnext = save_model(tmp_path / "convnext", "convnext", small)
  last = train(
    "imagenet_latent",
    "convnext,smoke",
    through,
    **frozen,
    model={"input_size": SIDE // 8},
    encoders={"convnext": {"path": str(convnext)}},
    # Its images are of SIDE px and of 224: a few are enough.
    batch={
      "labels": LABELS,
      "generated": 2,
      "positives": 1,
      "unconditional": 1,
    },
    queue={"push_per_step": LABELS},
    eval={"every": 0},
  )
  assert np.isfinite(last["loss"]) and "scale/convenxt" in last
  others = json.loads((through / "frozen_weights.json").read_text())
  assert others.keys() == {"encoders.convnext", "vae"}
  assert others["vae"] == sums["vae"]
  model = drift_jax.load(str(workdir))
  grid = model.sample([2], count=1, alpha=1.5, seed=0).grid()
  assert grid.shape[:2] == (SIDE + 4, SIDE + 4)
  assert np.std(grid[2:-2, 2:-2].astype(np.float64)) > 0


def test_pixels(tmp_path, images):
  """The recipe: train/ and val/ of WordNet ids, an encoder from a hub."""
  (tmp_path / "imagenet").mkdir()
  for name, split in (("train", "train"), ("val", "validation")):
    (tmp_path / "imagenet" / name).symlink_to(images / split)
  source = {"source": "folder:imagenet", "data_dir": str(tmp_path)}
  train("mae_pixel", "folder,smoke", tmp_path / "encoder", data=source)
  encoder = tmp_path / "encoder" / train_mae.EXPORT
  files = {
    f"models/mae/jax/mae_pixel_640/{path.relative_to(encoder)}": (
      path.read_bytes()
    )
    for path in encoder.rglob("*")
    if path.is_file()
  }
  workdir = tmp_path / "generator"
  with hub({released.REPOSITORY: files}) as address:
    done = call(
      *("-m", "drift_jax.main", f"--workdir={workdir}"),
      "--config=configs/imagenet_pixel.py:folder,smoke",
      "--config.encoders.mae.path=hf://mae_pixel_640",
      "--config.data.source=folder:imagenet",
      *(f"--config.data.data_dir={tmp_path}", "--config.data.num_workers=1"),
      *(
        f"--config.data.image_size={SIDE}",
        f"--config.model.input_size={SIDE}",
      ),
      f"--config.batch.labels={LABELS}",
      f"--config.queue.push_per_step={LABELS}",
      devices=LABELS,
      timeout=600,
      HF_ENDPOINT=address,
      HF_HOME=str(tmp_path / "hub"),
      HF_HUB_DISABLE_XET="1",
    )
  assert done.returncode == 0, done.stderr[-3000:]
  last = read_jsonl(workdir / "metrics.jsonl")
  loss = [line["loss"] for line in last if "loss" in line]
  assert len(loss) == 2 and np.isfinite(loss).all()
  assert any("scale/layer1" in line for line in last)
  assert (
    json.loads((workdir / "frozen_weights.json").read_text())["encoders.mae"]
    == artifacts.load(str(encoder)).sha256
  )
  names = json.loads((workdir / "classes.json").read_text())
  assert len(names) == 1000 and names[0] == "tench, Tinca tinca"
  with Image.open(workdir / "samples" / "step_0000002.png") as grid:
    assert grid.size == (2 * (SIDE + 2) + 2, 2 * (SIDE + 2) + 2)


def test_images_without_classes_train_encoder_and_generator(tmp_path):
  """A flat folder, to the samples of its one class."""
  for seed in range(50):
    pictures.write(tmp_path / "images" / f"{seed}.jpg", seed, (40, 36))
  source = {"source": f"folder:{tmp_path / 'images'}", "image_size": 32}
  train("images", "cpu,encoder,smoke", tmp_path / "encoder", data=source)
  encoder = tmp_path / "encoder" / train_mae.EXPORT
  workdir = tmp_path / "generator"
  last = train(
    "images",
    "cpu,smoke",
    workdir,
    data=source,
    encoders={"mae": {"path": str(encoder)}},
    batch={"labels": LABELS},
    queue={"push_per_step": LABELS},
    eval={"metrics": ("fd_encoder", "label_accuracy")},
  )
  assert np.isfinite([last["loss"], last["eval/fd_encoder/alpha_1.0"]]).all()
  assert not any("label_accuracy" in key for key in last)
  config = json.loads((workdir / "config.json").read_text())
  assert config["guidance"]["maximum"] == 1 == config["model"]["num_classes"]
  assert config["batch"]["unconditional"] == 0
  assert json.loads((workdir / "classes.json").read_text()) == ["images"]
  # The same command finds its run, and samples need no labels.
  model = drift_jax.load(str(workdir))
  samples = model.sample(count=3, seed=0)
  assert samples.images.shape == (3, 32, 32, 3)
  assert samples.labels.tolist() == [0, 0, 0]
  assert requests.read_request(b'{"count": 2}', model, 8).labels.tolist() == [
    0,
    0,
  ]
  with pytest.raises(ERRORS, match="alpha=2.0"):
    model.sample(count=1, alpha=2.0)
