"""The pixel-MAE: encoder of 256 px images, folded by 8x8 patches (A.3).

  python -m drift_jax.main --config=configs/mae_pixel.py \\
    --workdir=runs/mae_pixel_640

Variants, joined by commas:
  640    (or none) base width 640: 200k steps (1280 epochs), the last 3k with
         classification
  folder ImageNet as an ImageFolder: data/imagenet/{train,val}/WNID/FILE
  smoke  the same code path in a minute, with a tiny network
"""

from ml_collections import ConfigDict

from configs import common, models

WIDTHS = ("640",)


def get_config(variant: str = "") -> ConfigDict:
  """The config of the named variants."""
  _, smoke, folder = common.choose(variant, WIDTHS, common.SWITCHES)
  config = common.mae()
  common.imagenet(config, folder)
  config.data.crop = "random"
  config.model = models.mae_640_pixel()
  config.train.num_steps = 200_000
  config.mesh.update(data=1, fsdp=-1)
  config.eval.every = 5_000
  config.checkpoint.every = 5_000
  if smoke:
    common.smoke_mae(config)
  return config
