"""MNIST: 28x28 grey digits in a black frame of 32x32.

  python -m drift_jax.main --config=configs/mnist.py:encoder \\
    --workdir=runs/mnist_encoder
  python -m drift_jax.main --config=configs/mnist.py --workdir=runs/mnist

With --config.data.source=hf://datasets/ylecun/mnist they come from the Hugging
Face hub, else from TFDS, which must have prepared them (docs/data.md).

Variants, joined by commas:
  (none)       for one GPU: the generator of configs/cifar10.py
  encoder      for one GPU: the ResNet-MAE whose features that one drifts in
  fd_tune      for one GPU: that generator, tuned by Frechet distances
  cpu          for two CPU cores: a small generator that drifts in the features
               of the next; raw pixels first: docs/results.md
  cpu_encoder  for two CPU cores: a small ResNet-MAE
  cpu_fd_tune  for two CPU cores: `cpu` tuned in that encoder's features
  style        `cpu`, of a slant and thickness asked for beside the class:
               docs/conditions.md
  cpu_judge    for two CPU cores: a small classifier, to judge `cpu` with
               --config.eval.classifier.path=WORKDIR/encoder
  smoke        the first two in minutes on two CPU cores
"""

from ml_collections import ConfigDict

from configs import cifar10, common

VARIANTS = (
  "generator",
  "encoder",
  "fd_tune",
  "cpu",
  "cpu_fd_tune",
  "style",
  "cpu_encoder",
  "cpu_judge",
)
# Those of two CPU cores, and the variant of configs/cifar10.py that each is of.
SMALL = {
  "cpu": "cpu",
  "cpu_fd_tune": "cpu",
  "style": "cpu",
  "cpu_encoder": "cpu_encoder",
  "cpu_judge": "cpu_judge",
}


def get_config(variant: str = "") -> ConfigDict:
  """The config of the named variants."""
  size, smoke = common.choose(variant, VARIANTS)
  if smoke and size in SMALL:
    raise ValueError(f"variants {size!r} and 'smoke' exclude each other")
  task = SMALL.get(size, size)
  config = cifar10.get_config(f"{task},smoke" if smoke else task)
  config.data.update(source="tfds:mnist", channels=1, crop="pad", flip=False)
  if config.task == "mae":
    config.model.in_channels = 1
  else:
    config.model.update(in_channels=1, out_channels=1)
    config.encoders.mae.path = "runs/mnist_encoder/encoder"
  if SMALL.get(size) == "cpu":
    config.model.patch_size = 8
    config.batch.labels = 8
    config.optim.muon_kernels = "all"  # not of photographs: docs/recipes.md
  if size == "fd_tune":
    config.init_from = "exports/mnist"
    config.eval.classifier.path = "runs/mnist_judge/encoder"
  elif size == "cpu_fd_tune":
    _cpu_fd_tune(config)
  elif size == "style":
    common.by_style(config, "runs/mnist_style.npz")
  elif size == "cpu_encoder":
    common.for_generator(config, get_config("cpu"))
  elif size == "cpu_judge":
    common.classifier(config, 900)
  return config


def _cpu_fd_tune(config: ConfigDict) -> None:
  cifar10.fd_tune(config, "mnist")
  config.fd_loss.population = 10_000
  config.optim.learning_rate = 1e-4
  config.train.num_steps = 500
  config.eval.ema_decay = 0.99
