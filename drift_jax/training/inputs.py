"""From a config to readers, loaders and feeds."""

import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from drift_jax import config as config_lib
from drift_jax.config.sections import GeneratorReals, ImageConfig
from drift_jax.data import sources as sources_lib
from drift_jax.data.loader import Loader
from drift_jax.data.order import ClassGrouped, check_queue
from drift_jax.data.readers import ArrayReader, Reader
from drift_jax.system import paths, processes, storage
from drift_jax.system.console import logger
from drift_jax.system.errors import ERRORS, naming
from drift_jax.training import artifacts, frozen
from drift_jax.training.facts import Facts, image_facts
from drift_jax.training.places import in_lines

_Config = TypeVar("_Config", bound=ImageConfig)
_Read = TypeVar("_Read")
LATENTS = "latents:"
# Which images are held out does not change with the run's seed: runs of
# several seeds are judged by the same images.
HELD_OUT_SEED = 0


class Input(NamedTuple):
  """A file or folder that a run reads.

  Attributes:
    key, value: of the config that names it.
    check: raises what opening it would if it is not there; returns hub.Need of
      what is to be downloaded. It opens nothing and costs little.
    split: of a latent cache, which has a folder for each.
  """

  key: str
  value: str
  check: Callable[[], Sequence[Any]]
  split: str = ""


def require(wanted: Sequence[Input], config: ImageConfig | None) -> None:
  """Looks for all inputs of a run before any is opened or downloaded.

  Args:
    wanted: in the order in which they are made.
    config: of the run, for what makes them; None if there is none.

  Raises:
    UserError, OSError: the error of the only one that is missing.
    ConfigError: several are; a line for each says what makes it.
    PeerError: other processes lack some, or the first one lists them.
  """
  # 1. Each by itself, then the space that downloads take together.
  missing: list[tuple[Input, Exception]] = []
  needs: list[Any] = []
  for entry in wanted:
    try:
      needs += entry.check()
    except ERRORS as error:
      missing.append((entry, error))
  if needs:
    from drift_jax.training import autoencoders  # converters take a while

    try:
      autoencoders.require_space(needs)
    except ERRORS as error:
      missing.append((Input("", "", lambda: ()), error))
  # 2. What the processes lack, said once.
  lines = []
  if missing:
    from drift_jax.training import remedies

    told_once = dict.fromkeys(
      remedies.line(entry, error, config) for entry, error in missing
    )
    lines = list(told_once)
  told = processes.from_all(lambda: lines)
  where: dict[str, list[int]] = {}
  for index, texts in enumerate(told):
    for text in texts:
      where.setdefault(text, []).append(index)
  if not where:
    return
  if len(where) == 1 and missing:
    raise missing[0][1]
  if not processes.is_first():
    raise processes.PeerError("inputs are missing, which process 0 lists")
  text = in_lines(
    [
      text + f" (in processes {at})" * (len(at) < len(told))
      for text, at in where.items()
    ]
  )
  raise config_lib.ConfigError(text) if missing else processes.PeerError(text)


def frozen_input(key: str, path: str) -> Input:
  """The weights of the frozen network KEY.path."""
  return Input(f"{key}.path", path, functools.partial(frozen.find, key, path))


def image_inputs(
  config: ImageConfig, *, is_new: bool, tested: bool
) -> list[Input]:
  """What every task of images reads: autoencoder, data, first weights.

  Args:
    config: of the run.
    is_new: whether it begins, and not goes on from a checkpoint.
    tested: whether held-out images will be read.
  """
  data, wanted = config.data, []
  if config.vae.path:
    wanted.append(frozen_input("vae", config.vae.path))
  splits = [data.train_split]
  if (tested and data.source.startswith(LATENTS)) or (
    (tested or data.held_out)
    and data.source.startswith(storage.HUB)
    and data.test_split
  ):
    splits.append(data.test_split)
  for split in splits:
    check = functools.partial(_find_data, data, split)
    wanted.append(Input("data.source", data.source, check, split))
  if file := conditions_file(config):
    check = functools.partial(_find_file, "data.conditions", file)
    wanted.append(Input("data.conditions", file, check))
  if config.init_from and is_new:
    check = functools.partial(frozen.find, "init_from", config.init_from)
    wanted.append(Input("init_from", config.init_from, check))
  return wanted


def conditions_file(config: ImageConfig) -> str:
  """The file of the images' conditions, which generators alone have; or ''."""
  return getattr(config.data, "conditions", "")


def _find_file(key: str, path: str) -> Sequence[Any]:
  """Raises ConfigError if a local file is not there."""
  storage.check_local(key, path)
  if not os.path.isfile(paths.expand(path)):
    raise config_lib.ConfigError(f"{key}={path!r}: there is no such file")
  return ()


def _find_data(settings: config_lib.Data, split: str) -> Sequence[Any]:
  """Raises what opening a split would if nothing is at its place."""
  kind, _, place = settings.source.partition(":")
  root = settings.data_dir
  if kind == "hf":
    with naming("data"):
      return Splits(settings).missing(split)
  if kind == "latents":
    _check_local_latents(settings)
    place = os.path.join(place, split)
  elif kind == "tfds" and not place.startswith(("/", ".", "~", "gs://")):
    root = root or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    place = re.split("[:/]", place)[0]
  path = paths.expand(place)
  if not storage.is_remote(place):
    path = os.path.join(paths.expand(root), path)
  if kind in ("folder", "tfds") and path.startswith("gs://"):
    is_there = storage.check_data(path)
  else:
    is_there = os.path.exists(path)
  if not place or is_there:
    return ()
  with naming("data"):
    if kind == "latents":
      from drift_jax.data.latent_format import load_manifest

      load_manifest(os.path.dirname(path), split)
    else:
      Splits(settings).open(split)
  return ()


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
    vae: autoencoder that must have made the latents of a cache; None of one of
      arrays.

  Raises:
    ConfigError: data that are not there, are damaged, or do not fit the
      config.
  """
  settings = config.data
  kind = settings.source.partition(":")[0]
  conditioned = _conditioned(conditions_file(config))
  with naming("data"):
    if settings.source.startswith(LATENTS):
      train = source = _open_latents(settings, settings.train_split, vae)

      def open_test() -> Reader:
        reader = _open_latents(settings, settings.test_split, vae)
        return conditioned(reader, reader, settings.test_split)

    else:
      sources = Splits(settings)
      source = sources.train()
      train = _reader(source, settings)

      def open_test() -> Reader:
        test = sources.test()
        split = sources.split_of(test)
        return conditioned(_reader(test, settings), test, split)

    facts = image_facts(kind, source)
    train = conditioned(train, source, settings.train_split)
    if train.conditions is not None:
      from drift_jax.training.conditions import sha256

      facts = {**facts, "conditions_sha256": sha256(train.conditions)}

  @functools.cache
  def held_out() -> Reader:
    with naming("data"):
      return open_test()

  return Readers(train, held_out, facts)


def _conditioned(file: str) -> Callable[[Reader, Any, str], Reader]:
  """(reader, its source, split) -> the reader with the file's conditions."""
  if not file:
    return lambda reader, source, split: reader
  from drift_jax.training.conditions import Conditions  # for those who use it

  with naming("data.conditions"):
    conditions = Conditions(file)

  def conditioned(reader: Reader, source: Any, split: str) -> Reader:
    with naming("data.conditions"):
      reader.conditions = conditions.of(source, split)
    return reader

  return conditioned


def _open_latents(
  settings: config_lib.Data, split: str, vae: artifacts.Artifact | None
) -> Reader:
  """Opens a split of a latent cache.

  Raises:
    StorageError: a URL.
    ValueError: a cache that is incomplete, damaged or of another autoencoder.
  """
  _check_local_latents(settings)
  from drift_jax.data.latents import LatentReader  # for those who use it

  reader = LatentReader(
    pathlib.Path(settings.data_dir) / settings.source.removeprefix(LATENTS),
    split,
    dtype=settings.wire,
    flip=settings.flip,
    expected_vae_sha256=vae.sha256 if vae else None,
  )
  if vae is None:
    if reader.settings.vae_sha256:
      raise ValueError(
        f"{settings.source} needs vae.path, the autoencoder that made the "
        "latents: python -m drift_jax.tools.convert_weights vae writes it"
      )
    return reader
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


def _check_local_latents(settings: config_lib.Data) -> None:
  place = settings.source.removeprefix(LATENTS)
  what = f"data.source={settings.source!r}"
  storage.check_local(what, place, settings.data_dir)


class Splits:
  """Splits of the data; none of their images is read."""

  def __init__(self, settings: config_lib.Data):
    self._settings = settings

  def open(self, split: str) -> sources_lib.Source:
    """Opens a split of that name."""
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

  def missing(self, split: str) -> Sequence[Any]:
    """hub.Need of what is to be downloaded of a split that is on the hub."""
    find = functools.partial(sources_lib.missing, self._settings.source)
    if split == self._settings.train_split:
      return find(split)
    return self._of_test(find) or ()

  @functools.cached_property
  def _own_test(self) -> sources_lib.Source | None:
    """The data's own test split, if they have one."""
    if not self._settings.test_split:
      return None
    return self._of_test(self.open)

  def _of_test(self, read: Callable[[str], _Read]) -> _Read | None:
    """Reads the data's own test split; None if others are held out instead."""
    try:
      return read(self._settings.test_split)
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
      "data: no split %r, %s of each class are held out of %r.",
      self._settings.test_split,
      f"{per_class:.3g} of the images"
      if per_class < 1
      else f"{per_class:g} images",
      self._settings.train_split,
    )
    return sources_lib.held_out(
      self.open(self._settings.train_split),
      per_class=per_class,
      seed=HELD_OUT_SEED,
    )

  def split_of(self, test: sources_lib.Source) -> str:
    """The name of the split of held-out images, or that they are divided of."""
    own = test is self._own_test
    return self._settings.test_split if own else self._settings.train_split

  def train(self) -> sources_lib.Source:
    """Returns the training images: the whole split if nothing is held out."""
    if not self._settings.held_out or self._own_test is not None:
      return self.open(self._settings.train_split)
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


def check_reals(needs: GeneratorReals, readers: Readers, judged: bool) -> None:
  """Checks when an encoder starts that its generator will have enough images.

  Args:
    needs: what that generator takes; nothing if it has no labels.
    readers: the data of both.
    judged: whether held-out images are compared with training images, which
      stand in for generated ones.

  Raises:
    ConfigError: too few images of a class, with what to set.
  """
  if not needs.labels:
    return
  from drift_jax.metrics.evaluators import class_subset  # for those who use it
  from drift_jax.metrics.generation import balanced_labels

  train = readers.train
  labels, names = train.labels, train.class_names
  sizes = needs.positives, needs.unconditional
  remedy = "or set generator.labels=0, which trains the encoder all the same"
  told = {"section": "generator", "remedy": remedy}
  with naming(
    "the generator that will drift in this encoder's features (its batch.* and "
    "eval.num_samples are generator.* here: change both)"
  ):
    if needs.reals == "class_grouped":
      ClassGrouped(labels, names, 0, needs.labels, *sizes, **told)
    elif needs.reals == "queue":
      counts = np.bincount(labels, minlength=len(names))
      check_queue(counts, names, *sizes, **told)
    if judged:
      test = readers.test().labels
      count = needs.num_samples
      generated = balanced_labels(count, len(names)) if count else test
      class_subset(labels, generated, 0, "generator.num_samples")


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
