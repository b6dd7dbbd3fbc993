"""Generators in Python: load, sample, show.

model = drift_jax.load("runs/digits")   # or an export, or hf://NAME
samples = model.sample(["3", "7"], count=8, alpha=1.5, seed=0)
samples.show()
"""

import csv
import dataclasses
import difflib
import io
import itertools
import math
import operator
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from drift_jax.config import ConfigError
from drift_jax.metrics.batches import Batch
from drift_jax.metrics.files import PathLike
from drift_jax.metrics.generation import generate
from drift_jax.metrics.images import require_finite, save_image, to_uint8
from drift_jax.system import numerics, options, paths, sharding
from drift_jax.system.errors import naming
from drift_jax.tasks.generator.judges import make_decoder, make_pixels
from drift_jax.tasks.generator.restore import (
  OpenedGenerator,
  check_alpha,
  open_generator,
  read_style,
)
from drift_jax.tasks.generator.samplers import (
  bind_sampler,
  gathered,
  grid_image,
  jit_interpolator,
  jit_sampler,
)
from drift_jax.training.conditions import check_values
from drift_jax.training.run import pad_to_mesh

_LISTED = 5
# Classes as people give them: one or several, indices, ranges or names.
Labels = str | int | Iterable[str | int]
# Conditions [n, D] or [n, T, D], or one without the first axis.
Conditions = np.ndarray | jax.Array | Sequence[Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
  """Images with their labels.

  Attributes:
    images: [n, H, W, C] float32 in [-1, 1]; arrays that are no images
      have no bounds.
    labels: [n] int32.
    columns: of the grid.
  """

  images: np.ndarray
  labels: np.ndarray
  columns: int

  def __post_init__(self) -> None:
    """Raises EvaluationError if an image is not finite."""
    require_finite(self.images, self.labels)

  def __len__(self) -> int:
    return len(self.images)

  def pixels(self) -> np.ndarray:
    """[n, H, W, C] uint8."""
    return to_uint8(self.images)

  def grid(self) -> np.ndarray:
    """All of them in rows: uint8 [h, w, 3]; small images are magnified."""
    return grid_image(self.images, self.columns)

  def save(self, path: PathLike) -> None:
    """Writes the grid to a .png, .jpg or .webp file.

    Raises:
      ValueError: another suffix.
    """
    save_image(self.grid(), path)

  def show(self) -> None:
    """Shows the grid: in a notebook below the cell, else in a window."""
    ipython = sys.modules.get("IPython")
    if ipython is not None and ipython.get_ipython() is not None:
      ipython.display.display(self)
    else:
      Image.fromarray(self.grid()).show()

  def _repr_png_(self) -> bytes:
    """The grid as a notebook shows it."""
    return png_bytes(self.grid())


def png_bytes(pixels: np.ndarray) -> bytes:
  """A PNG file of uint8 [H, W, 3]."""
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, format="png")
  return file.getvalue()


@numerics.pinned()
def load(
  source: PathLike,
  *,
  vae: PathLike = "",
  step: int | None = None,
  ema_decay: float | None = None,
) -> "Sampler":
  """A generator, on all devices.

  Args:
    source: a run's workdir, an export, an artifact's folder, or hf://NAME of
      the authors' release, hf://OWNER/NAME[@REVISION][/FOLDER].
    vae: folder of the autoencoder of an artifact's latents, or hf://OWNER/NAME
      of diffusers'; runs, exports and the authors' release know theirs, a run's
      may be given if it is not found.
    step: of a run: checkpoint; None for the best, else the newest.
    ema_decay: of a run: which average; None for the evaluated one.

  Raises:
    ArtifactError, CheckpointError: weights that can't be loaded.
    ConfigError: an option that this kind of source has no use for, or latents
      without their autoencoder.
  """
  mesh = sharding.make_mesh()
  opened = open_generator(
    paths.expand(source),
    mesh,
    vae=paths.expand(vae),
    step=step,
    ema_decay=ema_decay,
    decoded=True,
  )
  return Sampler(opened, mesh)


class Sampler:
  """A generator that draws images; made by `load`.

  Image number i of a call depends on (seed, i), its label, alpha and style
  alone: any batch size and number of devices gives the same ones.

  Attributes:
    generator: see restore.OpenedGenerator.
    num_classes: labels lie in [0, num_classes).
    class_names: one for each label, or () if nobody recorded them.
    alpha_range: guidance scales that it was trained for.
    image_shape: (H, W, C).
    condition_shape: shape of a condition, (D,) or (T, D); () for a generator of
      classes alone.
    are_images: whether samples are images; else arrays of an encoder's space,
      for which there is no decoder here.
  """

  def __init__(self, generator: OpenedGenerator, mesh: jax.sharding.Mesh):
    self.generator = generator
    self.num_classes = generator.num_classes
    self.class_names = generator.class_names
    self.alpha_range = generator.alpha_range
    self.condition_shape = generator.task.condition_shape
    self._mesh = mesh
    self._step = jit_sampler(generator.task, mesh)
    self._between = jit_interpolator(generator.task, mesh)
    self._decode = make_decoder(generator.vae, mesh)
    self.are_images = not generator.arrays
    height, width, channels = generator.task.sample_shape
    if generator.vae is not None:
      module: Any = generator.vae.module
      height, width = (n * module.downsampling for n in (height, width))
      channels = module.in_channels
    self.image_shape = (height, width, channels)

  def padded(self, size: int) -> int:
    """The batch size that is compiled for `size` images on these devices."""
    return pad_to_mesh(size, self._mesh)

  def labels(self, names: Labels | None = None) -> np.ndarray:
    """Class indices [n] int32 of what a person calls classes.

    Args:
      names: indices (3 or "3"), ranges ("3-7", both ends included), names
        ("golden retriever", or the part of a name that only one class has), one
        of them or several; in one string separated by commas, "3,5-7,tench".
        Integers are indices; a string that is the index of one class and the
        name of another is written "index:3" or "name:3". None: all classes.

    Raises:
      ConfigError: naming the entry that is none of these, or two of them.
    """
    if names is None:
      return np.arange(self.num_classes, dtype=np.int32)
    names = self._entries(names)
    indices = [i for name in names for i in self._find(name)]
    if not indices:
      raise ConfigError(f"labels={list(names)} names no class")
    return np.array(indices, np.int32)

  def asked(
    self,
    labels: Labels | None = None,
    condition: Conditions | None = None,
    count: int = 1,
  ) -> tuple[np.ndarray, np.ndarray | None]:
    """Class [n * count] and condition of each image that `sample` draws.

    Raises:
      ConfigError: a condition that the model does not take, or none though it
        takes one.
    """
    count, shape = _integer("count", count, 1), self.condition_shape
    if not shape:
      if condition is not None:
        raise ConfigError("condition: this generator knows classes alone")
      return np.repeat(self.labels(labels), count), None
    if condition is None:
      raise ConfigError(
        f"condition: this generator needs one of shape {shape} for each image "
        "(--conditions=FILE.npz, or sample(condition=array))"
      )
    if labels is None and self.num_classes > 1:
      raise ConfigError(
        f"labels: this generator has {self.num_classes} classes beside its "
        "conditions, name one for all conditions or one for each"
      )
    given = np.asarray(condition)
    given = given[None] if given.shape == shape else given
    if given.shape[1:] != shape or given.dtype.kind not in "fiu":
      want = ", ".join(map(str, ("n", *shape)))
      raise ConfigError(
        f"condition is {given.dtype} {given.shape}, this generator was trained "
        f"on conditions of shape {shape}: want [{want}]"
      )
    with naming("condition"):
      given = check_values("condition", given.astype(np.float32))
    chosen = self.labels(labels)
    number = max(len(chosen), len(given))
    if {len(chosen), len(given)} - {1, number}:
      raise ConfigError(
        f"{len(chosen)} labels with {len(given)} conditions: give one for all, "
        "or as many"
      )
    return (
      np.repeat(np.resize(chosen, number), count),
      np.repeat(np.resize(given, (number, *shape)), count, axis=0),
    )

  def describe(self, labels: np.ndarray) -> str:
    """The classes among labels [n], for people: index and name of each."""
    chosen = np.unique(labels).tolist()
    return self._shown(chosen) + ", ..." * (len(chosen) > _LISTED)

  def _shown(self, indices: Iterable[int]) -> str:
    """The first of some classes: index and name of each."""
    shown = itertools.islice(indices, _LISTED)
    if not self.class_names:
      return ", ".join(map(str, shown))
    return ", ".join(f"{i} {self.class_names[i]!r}" for i in shown)

  def _entries(self, names: Labels) -> Sequence[str | int]:
    """Each class among `names`, NumPy's integers as Python's."""
    if isinstance(names, str):
      if names.casefold() in (name.casefold() for name in self.class_names):
        return [names]  # which may hold a comma
      try:
        return next(csv.reader([names], strict=True), [])
      except csv.Error as error:
        raise ConfigError(f"labels={names!r}: {error}") from error
    if getattr(names, "ndim", 1) == 0 or not isinstance(names, Iterable):
      names = [_integer("labels", names)]
    return [
      entry if isinstance(entry, str) else _integer("labels", entry)
      for entry in names
    ]

  def _find(self, entry: str | int) -> Sequence[int]:
    """The classes that an entry means: an index, a range or a name."""
    text = str(entry).strip()
    kind, colon, rest = text.partition(":")
    if colon and kind == "name":
      return [self._find_name(rest)]
    is_index = not isinstance(entry, str)
    if colon and kind == "index":
      text, is_index = rest, True
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if match is None and not is_index:
      return [self._find_name(text)]
    numbers = range(0)
    if match is not None:
      numbers = range(int(match[1]), int(match[2] or match[1]) + 1)
    is_valid = bool(numbers) and numbers[-1] < self.num_classes
    named = [] if is_index else self._called(text, numbers)
    if named and not is_valid and ("-" not in text or text in self.class_names):
      return [self._find_name(text)]
    if named:
      by_name = ",".join(f"name:{self.class_names[i]}" for i in named)
      raise ConfigError(
        f"labels: {text!r} may mean class indices or the names of others "
        f"({self._shown(named)}): write index:{text} or {by_name}"
      )
    if not is_valid:
      raise ConfigError(f"{self._no_index(text)}, nor a range of them")
    return numbers

  def _no_index(self, entry: object) -> str:
    return f"labels: {entry!r} is no class index in [0, {self.num_classes})"

  def _called(self, name: str, numbers: range) -> list[int]:
    """The first classes of that name, or called by a number of others."""
    named = []
    for i, entry in enumerate(self.class_names):
      parts = [part.strip() for part in entry.split(",")]
      called = [int(part) for part in parts if part.isdecimal()]
      if any(number in numbers and number != i for number in called) or (
        name in parts and numbers != range(i, i + 1)
      ):
        named.append(i)
    return named[:_LISTED]

  def _find_name(self, name: str) -> int:
    text = self._no_index(name)
    if not self.class_names:
      raise ConfigError(f"{text}; the names of its classes are not known")
    key = name.casefold()
    names = [entry.casefold() for entry in self.class_names]
    synonyms = [[part.strip() for part in entry.split(",")] for entry in names]
    for matches in (
      [i for i, entry in enumerate(names) if entry == key],
      [i for i, entry in enumerate(synonyms) if key in entry],
      [i for i, entry in enumerate(names) if key and key in entry],
    ):
      if len(matches) == 1:
        return matches[0]
      if matches:
        raise ConfigError(
          f"labels: {name!r} is in the names of {len(matches)} classes, "
          f"{self._shown(matches)}...: give more of it, or the index"
        )
    index = {part: i for i, entry in enumerate(synonyms) for part in entry}
    close = difflib.get_close_matches(key, index, n=_LISTED)
    hint = f"; close to it: {self._shown(index[c] for c in close)}"
    raise ConfigError(f"{text}, range or class name{hint * bool(close)}")

  @numerics.pinned()
  def sample(
    self,
    labels: Labels | None = None,
    *,
    condition: Conditions | None = None,
    count: int = 1,
    alpha: float = 1.0,
    seed: int = 0,
    style: int | Sequence[int] | None = None,
    batch_size: int = options.BATCH_SIZE,
  ) -> Samples:
    """Draws `count` images of each label, or of each condition.

    Args:
      labels: see `labels`; None for all classes. With conditions one for all of
        them, or one for each.
      condition: [n, *condition_shape], or one of that shape for all labels, of
        a generator that was trained on such.
      count: images of each.
      alpha: guidance scale, inside the trained range.
      seed: of noise and style, in [0, 2**32).
      style: style indices that all images share, one for all tokens or one for
        each; -1 leaves one to chance. None: all of them.
      batch_size: images at a time, on all devices.

    Raises:
      ConfigError: for anything out of range, naming it.
    """
    each, conditions = self.asked(labels, condition, count)
    batches = self.batches(
      *(each, conditions),
      **{"alpha": alpha, "seed": seed, "style": style},
      batch_size=batch_size,
    )
    images = [gathered(batch, self._decode(batch.samples)) for batch in batches]
    return Samples(np.concatenate(images), each, count)

  @numerics.pinned()
  def batches(
    self,
    labels: np.ndarray,
    conditions: np.ndarray | None = None,
    *,
    alpha: float,
    seed: int,
    style: int | Sequence[int] | None = None,
    batch_size: int = options.BATCH_SIZE,
    numbers: np.ndarray | None = None,
  ) -> Iterator[Batch]:
    """Images of labels [n] as they are ready; the devices work ahead.

    `batch.pixels` are 8-bit RGB images. A batch has `batch_size` images, or n
    if there are fewer, filled up to a multiple of the devices; each size is
    compiled once.

    Args:
      labels: class indices.
      conditions: [n, *condition_shape], see `asked`; None if it has none.
      alpha, seed, style, batch_size: see `sample`.
      numbers: numbers of the images to draw; None for all n.

    Raises:
      ConfigError: for anything out of range, naming it.
    """
    self._check(alpha, seed, batch_size)
    labels = self._checked(labels)
    sample_fn = bind_sampler(
      self._step,
      self.generator.params,
      self.generator.task,
      self._mesh,
      seed,
      self._style(style),
      conditions,
    )
    count = len(labels) if numbers is None else len(numbers)
    batches = generate(
      sample_fn,
      labels,
      alpha,
      batch_size=self.padded(min(batch_size, count)),
      to_pixels=numerics.pinned()(make_pixels(self._decode)),
      numbers=numbers,
    )
    # Not around the loop: between two batches the caller has its own settings.
    following = numerics.pinned()(lambda: next(batches, None))
    return iter(following, None)

  @numerics.pinned()
  def interpolate(
    self,
    labels: Labels | None = None,
    *,
    condition: Conditions | None = None,
    frames: int = 16,
    count: int = 1,
    alpha: float = 1.0,
    seed: int = 0,
    style: int | Sequence[int] | None = None,
  ) -> list[Samples]:
    """Pictures on the way from one noise to another, `count` of each label.

    With angle t from 0 to pi / 2 the noise is cos(t) a + sin(t) b, which has a
    standard normal's distribution for every t. a is that of image i of
    `sample`, b that of image n + i; style indices are a's.

    Args:
      labels, condition, count, alpha, seed, style: see `sample`.
      frames: at least 2, both ends included.

    Raises:
      ConfigError: for anything out of range, naming it.
    """
    self._check(alpha, seed, options.BATCH_SIZE)
    _integer("frames", frames, 2)
    each, conditions = self.asked(labels, condition, count)
    size = self.padded(len(each))
    index = np.arange(size, dtype=np.int32)
    given = (
      np.resize(each, size),
      np.full(size, alpha, np.float32),
      index,
      index + np.int32(len(each)),
    )
    if conditions is not None:
      given += (np.resize(conditions, (size, *self.condition_shape)),)
    of_each = sharding.put_batch(given, self._mesh)
    shared = (self.generator.params, np.uint32(seed), self._style(style))
    walk = []
    for angle in np.linspace(0, np.pi / 2, frames, dtype=np.float32):
      samples = self._between(*shared, angle, *of_each)
      images = sharding.local_rows(self._decode(samples))[: len(each)]
      walk.append(Samples(images.astype(np.float32), each, count))
    return walk

  def _checked(self, labels: Any) -> np.ndarray:
    """Class indices [n] as int32."""
    array = np.asarray(labels)
    if array.ndim != 1 or array.dtype.kind not in "iu":
      raise ConfigError(
        f"labels are {array.dtype} {array.shape}: want class indices [n]"
      )
    for label in array[(array < 0) | (array >= self.num_classes)].tolist():
      raise ConfigError(self._no_index(label))
    return array.astype(np.int32)

  def _style(self, style: int | Sequence[int] | None) -> np.ndarray:
    return read_style((-1,) if style is None else style, self.generator.task)

  def _check(self, alpha: float, seed: int, batch_size: int) -> None:
    if np.ndim(alpha) or np.asarray(alpha).dtype.kind not in "fiu":
      raise ConfigError(f"alpha={alpha!r} must be one number")
    check_alpha(alpha, self.alpha_range)
    _integer("seed", seed, 0, options.MAX_SEED)
    _integer("batch_size", batch_size, 1)


def _integer(
  name: str, value: Any, low: float = -math.inf, high: float = math.inf
) -> int:
  """A whole number in [low, high], of Python's, NumPy's or JAX' types."""
  try:
    if isinstance(value, (bool, np.bool_)):
      raise TypeError
    number = operator.index(value)
  except TypeError as error:
    raise ConfigError(f"{name}={value!r} must be an integer") from error
  if not low <= number <= high:
    raise ConfigError(f"{name}={value} must lie in [{low}, {high}]")
  return number
