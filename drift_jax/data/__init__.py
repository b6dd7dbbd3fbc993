"""Data: sources, readers, the Grain loader, the sample queue and the feeds."""

from drift_jax.data.encoded import (
  NoSplitError,
  imagenet_classes,
  readable_classes,
)
from drift_jax.data.errors import DataError
from drift_jax.data.feed import GroupedFeed, ImageFeed, QueueFeed
from drift_jax.data.latent_format import labels_sha256
from drift_jax.data.latents import LatentReader
from drift_jax.data.loader import Loader
from drift_jax.data.memory import MemoryReader, MemorySource
from drift_jax.data.npy import read_npy
from drift_jax.data.prefetch import Prefetcher
from drift_jax.data.readers import ArrayReader, ImageReader, Reader
from drift_jax.data.sources import (
  ArraySource,
  Source,
  digits,
  held_out,
  names_sha256,
  open_source,
)
from drift_jax.tasks.policy.demonstrations import Demonstrations
from drift_jax.tasks.policy.replay import FETCH, read_replay, write_replay
from drift_jax.tasks.policy.robomimic import read_robomimic
from drift_jax.tasks.policy.windows import Normalizer, PolicyFeed, Windows
from drift_jax.tasks.toy.data import (
  TOYS,
  Modes,
  ToyFeed,
  draw_points,
  fixed_points,
  modes_of,
)

__all__ = [
  "FETCH",
  "TOYS",
  "ArrayReader",
  "ArraySource",
  "DataError",
  "Demonstrations",
  "GroupedFeed",
  "ImageFeed",
  "ImageReader",
  "LatentReader",
  "Loader",
  "MemoryReader",
  "MemorySource",
  "Modes",
  "NoSplitError",
  "Normalizer",
  "PolicyFeed",
  "Prefetcher",
  "QueueFeed",
  "Reader",
  "Source",
  "ToyFeed",
  "Windows",
  "digits",
  "draw_points",
  "fixed_points",
  "held_out",
  "imagenet_classes",
  "labels_sha256",
  "modes_of",
  "names_sha256",
  "open_source",
  "read_npy",
  "read_replay",
  "read_robomimic",
  "readable_classes",
  "write_replay",
]
