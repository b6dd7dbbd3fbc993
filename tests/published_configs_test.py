"""Every config file parses; the published ones hold Table 8's values."""

import dataclasses
import importlib

import pytest

from drift_jax.config import flatten
from drift_jax.tasks import parse

VARIANTS = {
  "cifar10": [
    *("", "encoder", "smoke", "encoder,smoke", "cpu_judge"),
    *("fd_tune", "fd_tune,smoke", "cpu", "cpu_encoder"),
  ],
  "images": [
    *("", "64", "128", "256", "cpu", "256,smoke", "smoke"),
    *("64,encoder", "128,encoder", "cpu,encoder", "128,encoder,smoke"),
  ],
  "imagenet_latent": [
    *("", "ablation", "b2", "l2", "l2,smoke", "smoke"),
    *("convnext", "convnext,smoke", "moco", "simclr"),
    *("l2,folder", "ablation,folder,smoke"),
    *("wflow_ablation", "wflow_b2", "wflow_l2", "wflow_xl2,smoke"),
    *("b4_512px", "l4_512px", "b4_512px,folder", "l4_512px,smoke"),
    *("one_gpu_24gb", "one_gpu_80gb", "one_gpu_24gb,smoke"),
    *("l2_fd_tune", "l2_fd_tune,folder"),
  ],
  "imagenet_rae": ["", "b1", "b1,folder", "smoke"],
  "imagenet_pixel": ["", "b16", "l16", "l16,smoke", "l16,folder"],
  "mae_latent": [
    *("", "256", "640", "640,smoke", "640,folder"),
    *("640_512px", "640_512px,smoke"),
  ],
  "mae_pixel": ["", "640", "smoke", "folder,smoke"],
  "mnist": [
    *("", "encoder", "smoke", "encoder,smoke", "cpu_judge"),
    *("fd_tune", "fd_tune,smoke", "cpu_fd_tune", "cpu", "cpu_encoder"),
  ],
}


def get(name, variant=""):
  module = importlib.import_module(f"configs.{name}")
  return parse(module.get_config(variant))


@pytest.mark.parametrize(
  ("name", "variant"), [(n, v) for n, vs in VARIANTS.items() for v in vs]
)
def test_configs_are_valid(name, variant):
  config = get(name, variant)
  if "smoke" in variant:
    assert config.train.num_steps <= 20
    assert config.model.dtype == "float32"


@pytest.mark.parametrize("name", VARIANTS)
def test_unknown_variants_are_named(name):
  module = importlib.import_module(f"configs.{name}")
  with pytest.raises(ValueError, match="'smok'.*smoke"):
    module.get_config("smok")
  first, *others = [v for v in VARIANTS[name] if v.isalnum() and v != "smoke"]
  if others:
    with pytest.raises(ValueError, match="exclude each other"):
      module.get_config(f"{first},{others[0]}")


@pytest.mark.parametrize(
  "name", ["imagenet_latent", "imagenet_pixel", "mae_latent", "mae_pixel"]
)
def test_a_folder_of_imagenet_changes_the_data_alone(name):
  module = importlib.import_module(f"configs.{name}")
  folder, tfds = module.get_config("folder"), module.get_config()
  if name != "imagenet_latent":  # else a cache, which has the labels
    assert folder.data.source == "folder:data/imagenet"
    assert folder.data.class_order == "imagenet"
  assert folder.data.test_split == "val"
  folder.data = tfds.data
  assert folder.to_dict() == tfds.to_dict()


# Table 8, the release, W-Flow: labels, generated, positives, unconditional, and
# push; learning rate, weight decay, warm-up, steps; exponent, no_cfg_frac;
# attention.
TABLE_8 = {
  ("imagenet_latent", "ablation"): (
    (64, 64, 64, 16, 64),
    (2e-4, 0.01, 5_000, 30_000),
    (3.0, 0.0),
    ("float32", "auto"),
  ),
  ("imagenet_latent", "b2"): (
    (128, 64, 64, 32, 128),
    (4e-4, 0.0, 10_000, 200_000),
    (5.0, 0.0),
    ("bfloat16", "auto"),
  ),
  ("imagenet_latent", "l2"): (
    (128, 64, 64, 32, 64),
    (4e-4, 0.01, 10_000, 200_000),
    (3.0, 0.5),
    ("bfloat16", "branches"),
  ),
  ("imagenet_latent", "wflow_ablation"): (
    (64, 64, 64, 16, 64),
    (2e-4, 0.01, 5_000, 30_000),
    (3.0, 0.0),
    ("float32", "auto"),
  ),
  ("imagenet_latent", "wflow_b2"): (
    (128, 64, 64, 32, 128),
    (4e-4, 0.0, 10_000, 200_000),
    (5.0, 0.0),
    ("bfloat16", "auto"),
  ),
  ("imagenet_latent", "wflow_l2"): (
    (128, 64, 64, 32, 64),
    (4e-4, 0.01, 10_000, 200_000),
    (3.0, 0.5),
    ("bfloat16", "branches"),
  ),
  ("imagenet_latent", "wflow_xl2"): (
    (128, 64, 128, 32, 128),
    (3e-4, 0.01, 10_000, 200_000),
    (4.0, 0.2),
    ("bfloat16", "branches"),
  ),
  ("imagenet_pixel", "b16"): (
    (128, 64, 128, 32, 128),
    (2e-4, 0.01, 10_000, 100_000),
    (5.0, 0.0),
    ("float32", "full"),
  ),
  ("imagenet_pixel", "l16"): (
    (128, 64, 128, 32, 128),
    (4e-4, 0.01, 10_000, 100_000),
    (5.0, 0.0),
    ("float32", "full"),
  ),
}


@pytest.mark.parametrize(("name", "variant"), TABLE_8)
def test_generators_of_table_8(name, variant):
  config = get(name, variant)
  sizes, schedule, guidance, precision = TABLE_8[name, variant]
  batch, optim, model = config.batch, config.optim, config.model
  assert batch.reals == "queue"
  assert sizes == (
    batch.labels,
    batch.generated,
    batch.positives,
    batch.unconditional,
    config.queue.push_per_step,
  )
  assert schedule == (
    optim.learning_rate,
    optim.weight_decay,
    optim.warmup_steps,
    config.train.num_steps,
  )
  assert guidance == (config.guidance.exponent, config.guidance.no_cfg_frac)
  assert precision == (model.attention_dtype, model.remat)
  assert model.dtype == "bfloat16"
  assert (optim.schedule, optim.b1, optim.b2) == ("constant", 0.9, 0.95)
  assert (optim.grad_clip, config.ema.decays) == (2.0, (0.999,))
  if variant not in WFLOW:
    assert config.drift.field == "softmax"
    assert config.drift.temperatures == (0.02, 0.05, 0.2)
    assert config.drift.affinity_floor == 1e-6
  assert (config.guidance.minimum, config.guidance.maximum) == (1.0, 4.0)
  assert (config.queue.class_size, config.queue.unconditional_size) == (
    128,
    1_000,
  )
  assert config.features.sample
  encoders = {"mae"} if "latent" in name else {"mae", "convnext"}
  assert set(config.encoders) == encoders
  assert all(e.in_loss for e in config.encoders.values())


@pytest.mark.parametrize(
  ("name", "kind"),
  [("convnext", "convnext"), ("moco", "resnet"), ("simclr", "resnet")],
)
def test_an_encoder_of_pixels_in_place_of_the_ablations(name, kind):
  """All else is the ablation's; it and the decoder recompute their blocks."""
  ablation, config = (
    importlib.import_module("configs.imagenet_latent").get_config(variant)
    for variant in ("ablation", name)
  )
  encoder = config.encoders[name]
  assert encoder.decode and encoder.in_loss
  assert encoder.remat and config.vae.remat
  assert encoder.model.kind == kind
  assert len(config.encoders) == 1 and not ablation.encoders.mae.decode
  config.encoders = ablation.encoders
  assert config.to_dict() == ablation.to_dict()


# Temperature R, iterations; width, depth and heads; encoder.
WFLOW = {
  "wflow_ablation": (0.05, 10, (768, 12, 12), 256),
  "wflow_b2": (0.05, 10, (768, 12, 12), 640),
  "wflow_l2": (0.05, 1, (1024, 24, 16), 640),
  "wflow_xl2": (0.01, 1, (1152, 28, 16), 640),
}


@pytest.mark.parametrize("variant", WFLOW)
def test_wflow(variant):
  config = get("imagenet_latent", variant)
  temperature, iterations, sizes, width = WFLOW[variant]
  field, model = config.drift, config.model
  assert (field.field, field.temperatures) == ("sinkhorn", (temperature,))
  assert field.options["sinkhorn"] == {
    "cost": "quadratic",
    "iterations": iterations,
  }
  assert (field.negatives, field.guidance) == ("independent", "velocity")
  assert field.own_in_scale and field.reduction == "mean"
  assert sizes == (model.hidden_size, model.depth, model.num_heads)
  assert model.cond_dim == model.hidden_size
  assert config.encoders["mae"].model["base_channels"] == width


@pytest.mark.parametrize(
  ("name", "variant", "smaller"),
  [
    ("imagenet_latent", "b4_512px", "b2"),
    ("imagenet_latent", "l4_512px", "l2"),
    ("mae_latent", "640_512px", "640"),
  ],
)
def test_512_px_changes_what_depends_on_the_size_alone(name, variant, smaller):
  module = importlib.import_module(f"configs.{name}")
  large, small = module.get_config(variant), module.get_config(smaller)
  flat = [flatten(c.to_dict()) for c in (large, small)]
  changed = {key for key in flat[0] | flat[1] if flat[0][key] != flat[1][key]}
  assert changed == (
    {"data.image_size", "model.input_patch_size"}
    if name == "mae_latent"
    else {
      *("data.image_size", "data.source"),
      *("model.input_size", "model.patch_size"),
      *("encoders.mae.path", "encoders.mae.model.input_patch_size"),
      "eval.inception.reference",
    }
  )
  assert large.data.image_size == 512
  if name == "imagenet_latent":
    encoder = importlib.import_module("configs.mae_latent").get_config(
      "640_512px"
    )
    assert {"kind": "mae", **encoder.model} == dict(large.encoders.mae.model)


# Base width, steps, steps of classification.
MAES = {
  ("mae_latent", "256"): (256, 30_000, 0),
  ("mae_latent", "640"): (640, 200_000, 3_000),
  ("mae_pixel", "640"): (640, 200_000, 3_000),
}


@pytest.mark.parametrize(("name", "variant"), MAES)
def test_encoders_of_the_paper(name, variant):
  config = get(name, variant)
  assert MAES[name, variant] == (
    config.model.base_channels,
    config.train.num_steps,
    config.mae.classification_steps,
  )
  assert (config.mae.batch_size, config.mae.mask_ratio) == (8_192, 0.5)
  assert (config.mae.classification_ramp, config.mae.classification_weight) == (
    1_000,
    0.1,
  )
  assert (config.optim.learning_rate, config.optim.warmup_steps) == (
    4e-3,
    4_000,
  )
  assert config.ema.decays == (0.9995,)
  assert (config.data.crop, config.data.crop_scale) == ("random", (0.2, 1.0))
  assert config.model.layers == (3, 4, 6, 3)


# Side, patch of the generator, patch of the encoder.
IMAGES = {"64": (64, 4, 2), "128": (128, 8, 4), "cpu": (32, 8, 4)}


@pytest.mark.parametrize("variant", IMAGES)
def test_own_images(variant):
  """50 of a class are enough, and the encoder's start checks what is drawn."""
  generator, encoder = (
    get("images", variant),
    get("images", variant + ",encoder"),
  )
  side, patch, folded = IMAGES[variant]
  assert generator.model.input_size == generator.data.image_size == side
  assert encoder.data.image_size == side
  assert (generator.model.patch_size, encoder.model.input_patch_size) == (
    patch,
    folded,
  )
  for config in (generator, encoder):
    assert config.data.source == "folder:data/images"
    assert (config.data.held_out, config.model.num_classes) == (0.1, 0)
  batch = generator.batch
  assert batch.positives <= 50 - round(50 * generator.data.held_out)
  assert dataclasses.asdict(encoder.generator) == {
    name: getattr(batch, name)
    for name in ("reals", "labels", "positives", "unconditional")
  } | {"num_samples": generator.eval.num_samples}


def test_small_images_take_what_small_batches_want():
  """Temperatures of one GPU's batch, positives by index, no affinity floor."""
  for name in ("cifar10", "mnist"):
    config = get(name)
    assert config.drift.temperatures == (0.1, 0.2, 0.4)
    assert config.drift.affinity_floor == 0.0
    assert config.batch.reals == "class_grouped"
    assert config.model.num_classes == 0
