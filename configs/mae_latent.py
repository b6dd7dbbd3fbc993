"""The latent-MAE: encoder of 32x32x4 latents of 256 px images (A.3), or 512 px.

  python -m drift_jax.main --config=configs/mae_latent.py:256 \\
    --workdir=runs/mae_latent_256

Images are cut by a random resized crop, so the autoencoder runs in the training
step, on the device. Variants, joined by commas:
  256    (or none) base width 256 for the ablations: 30k steps (192 epochs), no
         classification
  640    base width 640: 200k steps (1280 epochs), the last 3k with
         classification
  640_512px
         the same for 512 px: it folds 2x2 cells of the 64x64x4 latents into
         one, so that grid, features and their number are those of 256 px.
         Nobody has trained it; neither the paper nor the release has it.
  folder ImageNet as an ImageFolder: data/imagenet/{train,val}/WNID/FILE
  smoke  the same code path in a minute, with a tiny network
"""

from ml_collections import ConfigDict

from configs import common, models

WIDTHS = ("256", "640", "640_512px")


def get_config(variant: str = "") -> ConfigDict:
  """The config of the named variants."""
  width, smoke, folder = common.choose(variant, WIDTHS, common.SWITCHES)
  config = common.mae()
  common.imagenet(config, folder)
  config.data.crop = "random"
  config.vae.path = "weights/sd_vae"
  config.vae.model = common.frozen_model("vae", models.sd_vae())
  if width == "256":
    config.model = models.mae_256_latent()
    config.train.num_steps = 30_000
    config.mae.classification_steps = 0
  else:
    config.model = models.mae_640_latent()
    if width == "640_512px":
      config.model = models.mae_640_latent_512px()
      config.data.image_size = 512
    config.train.num_steps = 200_000
    config.mae.classification_steps = 3_000
  config.mesh.update(data=1, fsdp=-1)
  config.eval.every = 5_000
  config.checkpoint.every = 5_000
  if smoke:
    common.smoke_mae(config)
  return config
