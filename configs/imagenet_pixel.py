"""ImageNet at 256 px in pixels, no autoencoder: B/16 and L/16.

  python -m drift_jax.main --config=configs/imagenet_pixel.py:l16 \\
    --workdir=runs/imagenet_l16

reads ImageNet, an encoder (--config.encoders.mae.path=hf://mae_pixel_640, or
one trained by configs/mae_pixel.py), and an exported ConvNeXt-V2 base; and for
its FID the Inception-v3 and statistics of the training images (docs/imagenet.md
has all commands). Variants, joined by commas:
  b16    (or none) B/16, 100k steps
  l16    L/16, 100k steps
  folder ImageNet as an ImageFolder: data/imagenet/{train,val}/WNID/FILE
  smoke  the same code path in a minute, with tiny networks, no ConvNeXt

FID-50K in the paper (Table 8) and of the authors' release: B/16 1.76 / 1.73,
L/16 1.61 / 1.62, on 128 TPU v6e.

The queue of 1000 x 128 images takes 25 GB of each host's memory;
--config.batch.reals=class_grouped needs none, but reads 20 480 images a step.
"""

from ml_collections import ConfigDict

from configs import common, models

SIZES = ("b16", "l16")


def get_config(variant: str = "") -> ConfigDict:
  """The config of the named variants."""
  size, smoke, folder = common.choose(variant, SIZES, common.SWITCHES)
  config = common.generator()
  common.imagenet(config, folder)
  common.add_encoder(
    config, "mae", "runs/mae_pixel_640/encoder", "mae", models.mae_640_pixel()
  )
  if not smoke:
    common.add_encoder(
      config,
      "convnext",
      "weights/convnextv2_base",
      "convnext",
      models.convnextv2_base(),
    )
  # Both: 128 labels; B/16 and L/16 differ in size and learning rate.
  config.batch.update(labels=128, generated=64, positives=128, unconditional=32)
  config.queue.push_per_step = 128
  config.guidance.update(exponent=5.0, no_cfg_frac=0.0)
  config.optim.update(weight_decay=0.01, warmup_steps=10_000)
  if size == "b16":
    config.model = models.generator_b16_pixel()
    config.optim.learning_rate = 2e-4
  else:
    config.model = models.generator_l16_pixel()
    for encoder in config.encoders.values():
      encoder.remat = True  # to fit 32 GB
    config.optim.learning_rate = 4e-4
  config.train.num_steps = 100_000
  config.mesh.update(data=1, fsdp=-1)
  common.judge_by_fid(config)
  if smoke:
    common.smoke_generator(config)
  return config
