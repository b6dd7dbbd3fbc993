"""Data: embedded sets, the Grain loader, the sample queue and the feeds."""

from drift_jax.data.bank import Bank
from drift_jax.data.feed import ImageFeed, QueueFeed
from drift_jax.data.loader import Loader
from drift_jax.data.sources import ImageSource, make_source

__all__ = [
  "Bank",
  "ImageFeed",
  "ImageSource",
  "Loader",
  "QueueFeed",
  "make_source",
]
