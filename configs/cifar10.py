"""32x32 images on one GPU: CIFAR-10, or any folder of small images.

  python -m drift_jax.main --config=configs/cifar10.py:encoder \\
    --workdir=runs/cifar10_encoder
  python -m drift_jax.main --config=configs/cifar10.py --workdir=runs/cifar10

With --config.data.source=hf://datasets/uoft-cs/cifar10 they come from the
Hugging Face hub, else from TFDS, which must have prepared them (docs/data.md).

Other images by one more flag, e.g. --config.data.source=folder:DIR, where DIR
holds a folder of images for each class, or images alone. Variants, joined by
commas:
  (none)   a generator that drifts in the encoder's features
  encoder  the ResNet-MAE whose features those are
  fd_tune  that generator, tuned by Frechet distances: docs/fd_tune.md
  cpu      for two CPU cores: a small generator that drifts in the features of
           the next; raw pixels first: docs/results.md
  cpu_encoder  for two CPU cores: a small ResNet-MAE
  cpu_judge  for two CPU cores: a small classifier, to judge a generator with
           --config.eval.classifier.path=WORKDIR/encoder
  smoke    the first three in minutes on two CPU cores
"""

from ml_collections import ConfigDict

from configs import common

CPU = ("cpu", "cpu_encoder", "cpu_judge")
VARIANTS = ("generator", "encoder", "fd_tune", *CPU)


def get_config(variant: str = "") -> ConfigDict:
  """The config of the named variants."""
  task, smoke = common.choose(variant, VARIANTS)
  if smoke and task in CPU:
    raise ValueError(f"variants {task!r} and 'smoke' exclude each other")
  encoders = ("encoder", "cpu_encoder", "cpu_judge")
  config = _encoder() if task in encoders else _generator()
  config.data.update(
    source="tfds:cifar10",
    image_size=32,
    in_memory=True,
    held_out=100,
  )
  if task == "fd_tune":
    fd_tune(config, "cifar10")
  if smoke:
    _smoke(config)
  if task == "cpu":
    _cpu_generator(config)
  if task == "cpu_judge":
    common.classifier(config, 4_000)
    config.data.update(num_threads=2, crop_scale=(0.5, 1.0))
    config.model.input_patch_size = 2
  if task == "encoder":
    common.for_generator(
      config, get_config("generator,smoke" if smoke else "generator")
    )
  if task == "cpu_encoder":
    _cpu_encoder(config)
    common.for_generator(config, get_config("cpu"))
  return config


def _generator() -> ConfigDict:
  config = common.generator()
  common.add_encoder(config, "mae", "runs/cifar10_encoder/encoder")
  config.model.update(
    input_size=32,
    in_channels=3,
    out_channels=3,
    patch_size=2,
    hidden_size=384,
    depth=12,
    num_heads=6,
    num_classes=0,
    cond_dim=384,
    context_tokens=8,
    style_vocab=64,
    style_tokens=16,
    dtype="bfloat16",
    # In 12 GB: cuDNN's attention and one block's activations at a time.
    attention_dtype="bfloat16",
    remat="full",
  )
  # Small batches want larger temperatures than Table 8's.
  config.drift.update(temperatures=(0.1, 0.2, 0.4), affinity_floor=0.0)
  config.batch.update(
    reals="class_grouped",
    labels=16,
    generated=32,
    positives=64,
    unconditional=16,
  )
  config.guidance.update(exponent=5.0, no_cfg_frac=0.5)
  config.optim.update(learning_rate=4e-4, warmup_steps=1_000, weight_decay=0.0)
  config.ema.decays = (0.999, 0.9995)
  config.train.num_steps = 50_000
  config.eval.update(
    every=2_500,
    num_samples=0,
    batch_size=500,
    alphas=(1.0, 1.5),
    ema_decay=0.999,
    metrics=("fd_encoder", "fd_pixel"),
  )
  config.checkpoint.update(every=2_500, best_metric="fd_encoder")
  return config


def fd_tune(config: ConfigDict, name: str) -> None:
  """Tunes the generator of runs/NAME in its encoder's features alone."""
  common.fd_tune(config, population=50_000, start=f"exports/{name}")
  config.eval.classifier.path = f"runs/{name}_judge/encoder"
  config.features.sample = False
  config.batch.labels = 512
  config.fd_loss.trust = 0.1
  config.optim.learning_rate = 5e-5
  config.train.num_steps = 5_000


def _encoder() -> ConfigDict:
  config = common.mae()
  config.data.crop = "random"
  config.model.update(
    in_channels=3,
    base_channels=64,
    layers=(2, 2, 2, 2),
    input_patch_size=1,
    num_classes=0,
    dtype="bfloat16",
  )
  config.mae.update(batch_size=512, classification_steps=3_000)
  config.optim.update(learning_rate=1e-3, warmup_steps=500)
  config.ema.decays = (0.999,)
  config.train.num_steps = 20_000
  config.eval.update(every=2_500, batch_size=500, ema_decay=0.999)
  config.checkpoint.every = 2_500
  return config


def _cpu_generator(config: ConfigDict) -> None:
  common.cpu_generator(config)
  config.model.patch_size = 4
  config.features.shift = 2  # the encoder folds patches of 4 pixels
  config.batch.update(labels=4, generated=32, positives=64)
  config.ema.decays = (0.99, 0.995)
  config.train.update(num_steps=3_000, log_every=50)
  config.eval.update(
    every=500,
    num_samples=2_000,
    batch_size=500,
    ema_decay=0.995,
    metrics=("fd_encoder", "fd_pixel", "coverage"),
  )
  config.checkpoint.every = 500


def _cpu_encoder(config: ConfigDict) -> None:
  common.cpu_encoder(config)
  config.mae.update(
    batch_size=128, classification_steps=1_000, classification_ramp=100
  )
  config.train.update(num_steps=2_000, log_every=50)
  config.eval.update(every=1_000, batch_size=500)
  config.checkpoint.every = 1_000


def _smoke(config: ConfigDict) -> None:
  config.model.dtype = "float32"
  config.train.update(num_steps=20, log_every=5)
  config.optim.warmup_steps = 5
  config.checkpoint.every = 10
  config.eval.update(every=10, batch_size=200)
  config.data.num_threads = 2
  if config.task == "mae":
    config.model.update(base_channels=8, layers=(1, 1, 1, 1), norm_groups=4)
    config.mae.update(
      batch_size=64, classification_steps=10, classification_ramp=5
    )
    return
  config.model.update(
    patch_size=4,
    hidden_size=64,
    depth=2,
    num_heads=2,
    cond_dim=64,
    context_tokens=2,
    style_tokens=4,
    attention_dtype="float32",
    remat="none",
  )
  config.batch.update(labels=8, generated=8, positives=16, unconditional=4)
  config.features.update(patch_mean_size=(2,), patch_std_size=(2,))
  metrics = ("fd_encoder",)
  if config.fd_loss.population:
    config.fd_loss.update(population=1_024, reals=1_000)
    config.batch.update(labels=64, generated=1)
    metrics = ("fd_encoder", "fd_classifier")
  config.eval.update(alphas=(1.0,), metrics=metrics)
