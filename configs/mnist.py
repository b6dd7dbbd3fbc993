"""MNIST on one GPU: 28x28 grey digits in a black frame of 32x32.

  python -m drift_jax.main --config=configs/mnist.py:encoder \\
    --workdir=runs/mnist_encoder
  python -m drift_jax.main --config=configs/mnist.py --workdir=runs/mnist

Variants as in configs/cifar10.py, whose sizes these are.
"""

from ml_collections import ConfigDict

from configs import cifar10


def get_config(variant: str = "") -> ConfigDict:
  """The config of the named variants."""
  config = cifar10.get_config(variant)
  config.data.update(source="tfds:mnist", channels=1, crop="pad", flip=False)
  if config.task == "mae":
    config.model.in_channels = 1
  else:
    config.model.update(in_channels=1, out_channels=1)
    config.encoders.mae.path = "runs/mnist_encoder/encoder"
  return config
