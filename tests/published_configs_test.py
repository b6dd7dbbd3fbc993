"""Every config file parses, and names the variants that it has."""

import importlib

import pytest

from drift_jax.tasks import parse

VARIANTS = {
  "cifar10": ["", "encoder", "smoke", "encoder,smoke"],
  "imagenet_latent": [
    *("", "ablation", "b2", "l2", "l2,smoke", "smoke"),
    *("convnext", "convnext,smoke", "moco", "simclr"),
  ],
  "imagenet_pixel": ["", "b16", "l16", "l16,smoke"],
  "mae_latent": ["", "256", "640", "640,smoke"],
  "mae_pixel": ["", "640", "smoke"],
  "mnist": ["", "encoder", "smoke", "encoder,smoke"],
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


# Two variants of each config that can't be one.
EXCLUSIVE = {
  "digits": "encoder,features",
  "imagenet_latent": "ablation,b2",
  "imagenet_pixel": "b16,l16",
  "mae_latent": "256,640",
  "policy": "push,reach",
  "toy": "moons,spiral",
}


@pytest.mark.parametrize("name", sorted({*VARIANTS, *EXCLUSIVE}))
def test_other_variants_are_named(name):
  module = importlib.import_module(f"configs.{name}")
  with pytest.raises(ValueError, match="'smok'.*smoke"):
    module.get_config("smok")
  if name in EXCLUSIVE:
    with pytest.raises(ValueError, match="exclude"):
      module.get_config(EXCLUSIVE[name])


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
