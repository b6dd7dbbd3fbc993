"""From a config to readers, loaders and feeds."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import TypeVar

import jax

from drift_jax import config as config_lib
from drift_jax.config.sections import ImageConfig
from drift_jax.data import sources as sources_lib
from drift_jax.data.loader import Loader
from drift_jax.data.readers import ArrayReader, Reader
from drift_jax.system import storage
from drift_jax.system.console import logger
from drift_jax.system.errors import naming
from drift_jax.training import artifacts
from drift_jax.training.facts import Facts, image_facts

_Config = TypeVar("_Config", bound=ImageConfig)
LATENTS = "latents:"
# Which images are held out does not change with the run's seed: runs of
# several seeds are judged by the same images.
HELD_OUT_SEED = 0


@dataclasses.dataclass(frozen=True)
class Readers:
  """Training images, how to open the held-out ones, and facts.

  Attributes:
    train: the training images.
    test: opens the held-out ones.
    facts: facts of the training images (see facts.py).
  """

  train: Reader
  test: Callable[[], Reader]
  facts: Facts = dataclasses.field(default_factory=dict)


def open_readers(
  config: ImageConfig, vae: artifacts.Artifact | None
) -> Readers:
  """Opens the data that config.data names.

  If the data have no split called config.data.test_split, config.data.held_out
  images of each class are taken from the training split.

  Args:
    config: config of the run.
    vae: autoencoder that must have made the latents of a cache.

  Raises:
    ConfigError: data that are not there, are damaged, or do not fit the
      config.
  """
  settings = config.data
  kind = settings.source.partition(":")[0]
  with naming("data"):
    if settings.source.startswith(LATENTS):
      assert vae is not None  # the config's checks ask for vae.path
      train = source = _open_latents(settings, settings.train_split, vae)
      open_test = functools.partial(
        _open_latents, settings, settings.test_split, vae
      )
    else:
      sources = _Sources(settings)
      source = sources.train()
      train = _reader(source, settings)

      def open_test() -> Reader:
        return _reader(sources.test(), settings)

    facts = image_facts(kind, source)

  @functools.cache
  def held_out() -> Reader:
    with naming("data"):
      return open_test()

  return Readers(train, held_out, facts)


def _open_latents(
  settings: config_lib.Data, split: str, vae: artifacts.Artifact
) -> Reader:
  """Opens a split of a latent cache.

  Raises:
    StorageError: a URL.
    ValueError: a cache that is incomplete, damaged or of another autoencoder.
  """
  storage.check_local(
    f"data.source={settings.source!r}",
    settings.source.removeprefix(LATENTS),
    settings.data_dir,
  )
  from drift_jax.data.latents import LatentReader  # for those who use it

  reader = LatentReader(
    pathlib.Path(settings.data_dir) / settings.source.removeprefix(LATENTS),
    split,
    dtype=settings.wire,
    flip=settings.flip,
    expected_vae_sha256=vae.sha256,
  )
  # The checksum is that of the parameters alone.
  cached = reader.settings.scaling_factor
  scaling_factor = vae.metadata["model_config"]["scaling_factor"]
  if cached != scaling_factor:
    raise ValueError(
      f"{settings.source} was scaled by {cached}, but vae.path has a "
      f"scaling_factor of {scaling_factor}: give the autoencoder that it was "
      "made with"
    )
  return reader


class _Sources:
  """Splits of the data; none of their images is read."""

  def __init__(self, settings: config_lib.Data):
    self._settings = settings

  def _open(self, split: str) -> sources_lib.Source:
    settings = self._settings
    return sources_lib.open_source(
      settings.source,
      split=split,
      data_dir=settings.data_dir,
      class_order=settings.class_order,
      max_corrupt=settings.max_corrupt,
      decoder=settings.decoder,
      exif=settings.exif,
    )

  @functools.cached_property
  def _own_test(self) -> sources_lib.Source | None:
    """The data's own test split, if they have one."""
    if not self._settings.test_split:
      return None
    try:
      return self._open(self._settings.test_split)
    except sources_lib.NoSplitError as error:
      if self._settings.held_out:
        return None
      raise sources_lib.NoSplitError(
        f"{error}. Evaluation needs held-out images: name another "
        "data.test_split, set data.held_out to take images of each class from "
        "the training split, or eval.every=0"
      ) from error

  @functools.cached_property
  def _divided(self) -> tuple[sources_lib.Source, sources_lib.Source]:
    """The training split without its held-out images, and these."""
    per_class = self._settings.held_out
    logger.info(
      "data: no split %r, %d images of each class are held out of %r.",
      self._settings.test_split,
      per_class,
      self._settings.train_split,
    )
    return sources_lib.held_out(
      self._open(self._settings.train_split),
      per_class=per_class,
      seed=HELD_OUT_SEED,
    )

  def train(self) -> sources_lib.Source:
    """Returns the training images: the whole split if nothing is held out."""
    if not self._settings.held_out or self._own_test is not None:
      return self._open(self._settings.train_split)
    return self._divided[0]

  def test(self) -> sources_lib.Source:
    """Returns the held-out images.

    Raises:
      ValueError: there are none.
    """
    if self._own_test is not None:
      return self._own_test
    if not self._settings.held_out:
      raise ValueError(
        "evaluation needs held-out images, but data.test_split and "
        "data.held_out are empty: set one of them, or eval.every=0"
      )
    return self._divided[1]


def _reader(source: sources_lib.Source, settings: config_lib.Data) -> Reader:
  if isinstance(source, sources_lib.ArraySource):
    return ArrayReader(source, wire=settings.wire)
  from drift_jax.data import images  # for those who use it

  drawn = settings.crop == "random"
  if settings.in_memory and drawn:
    source = images.MemorySource(source, num_threads=settings.num_threads)
  smallest, largest = settings.crop_scale
  reader = images.ImageReader(
    source,
    size=settings.image_size,
    channels=settings.channels,
    crop=settings.crop,
    crop_scale=(smallest, largest),
    flip=settings.flip,
    wire=settings.wire,
    num_threads=settings.num_threads,
  )
  if settings.in_memory and not drawn:
    return images.MemoryReader(reader, flip=settings.flip)
  return reader


def with_num_classes(config: _Config, reader: Reader) -> _Config:
  """Returns the config with the number of the data's classes.

  Raises:
    ConfigError: another count than the data's, or one that does not go with
      the rest of the config.
  """
  classes = len(reader.class_names)
  if config.model.num_classes not in (0, classes):
    raise config_lib.ConfigError(
      f"the data have {classes} classes, model.num_classes="
      f"{config.model.num_classes}: set it to {classes}, or to 0 for as many "
      "as the data have"
    )
  model = dataclasses.replace(config.model, num_classes=classes)
  config = dataclasses.replace(config, model=model)
  config.check()
  return config


def check_shape(reader: Reader, shape: tuple[int, ...], what: str) -> None:
  """Raises ConfigError if the data do not fit the model."""
  if reader.sample_shape != shape:
    raise config_lib.ConfigError(
      f"the data have images of shape {reader.sample_shape}, {what} {shape}: "
      "set data.image_size, data.channels and the model's sizes to match"
    )


def make_loader(config: ImageConfig, reader: Reader, batch_size: int) -> Loader:
  """Makes endless shuffled batches of the training images."""
  return Loader(
    reader,
    batch_size=batch_size,
    seed=config.seed,
    num_threads=config.data.num_threads,
    num_workers=config.data.num_workers,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
  )
