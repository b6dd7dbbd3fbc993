"""Your own images, from any folder: 64 or 128 px, 256 px in latents, or CPUs.

  python -m drift_jax.main --config=configs/images.py:64,encoder \\
    --workdir=runs/encoder --config.data.source=folder:DIR
  python -m drift_jax.main --config=configs/images.py:64 \\
    --workdir=runs/images --config.data.source=folder:DIR \\
    --config.encoders.mae.path=runs/encoder/encoder

DIR holds a folder of images for each class, or images alone: one class, without
guidance. At least 50 images of each class; a tenth of each judges, unless there
are folders train and test. docs/your_images.md goes the whole way. Variants,
joined by commas:
  64       (or none) 64 x 64 pixels, one GPU of 24 GB
  128      128 x 128 pixels, one GPU of 24 GB
  256      256 x 256 pixels in latents, one GPU of 24 GB: reads a cache, in the
           features of the authors' encoder hf://mae_latent_256 (see below)
  cpu      32 x 32 pixels, two CPU cores
  encoder  the ResNet-MAE of 64, 128 or cpu
  smoke    the same code path in minutes on two CPU cores

For 256, once for each of the splits train and test:

  python -m drift_jax.tools.cache_latents --source=folder:DIR --split=train \\
    --held_out=0.1 --vae=hf://stabilityai/sd-vae-ft-mse --out=data/latents
  python -m drift_jax.main --config=configs/images.py:256 \\
    --workdir=runs/images --config.data.source=latents:data/latents

`cpu` was run on two CPU cores: docs/your_images.md has times and pictures.
Nobody has trained 64, 128 and 256; no time or FID of theirs is known. By the
compiler 64 takes 9.2 GB of an RTX 4090, 128 9.3 GB, 256 7.9 GB, encoders less
(docs/scaling.md).
"""

from ml_collections import ConfigDict

from configs import cifar10, common, models

SIZES = ("64", "128", "256", "cpu")


def get_config(variant: str = "") -> ConfigDict:
  """The config of the named variants."""
  size, encoder, smoke = common.choose(variant, SIZES, ("encoder", "smoke"))
  if size == "256" and encoder:
    raise ValueError(
      "variants '256' and 'encoder' exclude each other: its encoder is the "
      "authors', hf://mae_latent_256"
    )
  config = _generator(size, smoke)
  if encoder:
    generator, config = config, _encoder(size, smoke)
    common.for_generator(config, generator)
  if size == "256":
    config.data.update(source="latents:data/latents", wire="bfloat16")
    return config
  config.data.update(
    source="folder:data/images",
    image_size={"cpu": 32}.get(size) or int(size),
    held_out=0.1,
  )
  return config


def _generator(size: str, smoke: bool) -> ConfigDict:
  config = common.generator()
  if size == "256":
    _latents(config)
  else:
    _pixels(config, size)
  # Images come from the disk, few at a time. 32 positives: 50 images of a class
  # are enough.
  config.batch.update(reals="queue", positives=32, unconditional=16)
  config.queue.update(class_size=128, push_per_step=64, prefill=2_000)
  config.drift.update(temperatures=(0.1, 0.2, 0.4), affinity_floor=0.0)
  config.guidance.update(exponent=5.0, no_cfg_frac=0.5)
  config.eval.update(num_samples=0, metrics=("fd_encoder",))
  config.checkpoint.best_metric = "fd_encoder"
  if size == "cpu":
    _cpu(config)
  else:
    config.optim.update(
      learning_rate=4e-4, warmup_steps=1_000, weight_decay=0.0
    )
    config.ema.decays = (0.999, 0.9995)
    config.train.num_steps = 50_000
    config.eval.update(every=2_500, batch_size=250, alphas=(1.0, 1.5))
    config.checkpoint.every = 2_500
  if smoke:
    common.smoke_generator(config)
  return config


def _pixels(config: ConfigDict, size: str) -> None:
  """256 tokens, whatever the size; 16 for CPUs."""
  common.add_encoder(config, "mae", "runs/encoder/encoder")
  side = 32 if size == "cpu" else int(size)
  config.model.update(
    input_size=side,
    in_channels=3,
    out_channels=3,
    patch_size=side // 16,
    hidden_size=512,
    depth=12,
    num_heads=8,
    num_classes=0,  # as many as the data have
    cond_dim=512,
    context_tokens=8,
    style_vocab=64,
    style_tokens=16,
    dtype="bfloat16",
    attention_dtype="bfloat16",  # cuDNN's
    remat="full",
  )
  config.batch.update(labels=16, generated=32)


def _latents(config: ConfigDict) -> None:
  """B/2 in the sizes of imagenet_latent.py:one_gpu_24gb."""
  config.vae.path = "hf://stabilityai/sd-vae-ft-mse"
  config.vae.model = common.frozen_model("vae", models.sd_vae())
  common.add_encoder(
    config, "mae", "hf://mae_latent_256", "mae", models.mae_256_latent()
  )
  config.model = models.generator_b2_latent()
  config.model.num_classes = 0
  config.batch.update(labels=8, generated=16)


def _cpu(config: ConfigDict) -> None:
  common.cpu_generator(config)
  config.data.in_memory = True
  config.batch.update(labels=8, generated=16)
  config.queue.update(push_per_step=16, prefill=1_000)
  config.ema.decays = (0.99,)
  config.train.update(num_steps=1_500, log_every=50)
  config.eval.update(
    every=250, batch_size=100, ema_decay=0.99, grid_per_class=8
  )
  config.checkpoint.every = 250


def _encoder(size: str, smoke: bool) -> ConfigDict:
  config = cifar10.get_config("encoder")
  # Patches are folded to 32 x 32 cells, as for CIFAR-10.
  side = 32 if size == "cpu" else int(size)
  config.model.update(base_channels=128, input_patch_size=side // 32)
  config.mae.batch_size = 256
  config.data.in_memory = False
  if size == "cpu":
    common.cpu_encoder(config)
    config.data.in_memory = True
    config.mae.update(
      batch_size=64, classification_steps=100, classification_ramp=50
    )
    config.train.update(num_steps=200, log_every=25)
    config.eval.update(every=100, batch_size=100)
    config.checkpoint.every = 100
  if smoke:
    common.smoke_mae(config)
  return config
