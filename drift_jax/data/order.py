"""Which records come when: index arithmetic, seeded, random access.

An order says which records make up batch number b as a pure function of
(seed, b): nothing is read, no state is carried, any batch can be asked for
next. What one process holds of a batch, and who reads it, is the loader's.
"""

import functools
import math
import zlib
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from numpy.random import Generator

# A permutation is kept while draws walk through it; the one before it too,
# because threads that read ahead cross the boundary at different times.
_KEPT_PERMUTATIONS = 2


@functools.cache
def _tag(use: str) -> int:
  return zlib.crc32(use.encode())


def generator(seed: int, use: str, *numbers: int) -> Generator:
  """A NumPy generator of (seed, use, numbers) alone.

  Args:
    seed: of the run, >= 0.
    use: a name; different uses share no stream.
    numbers: e.g. of a record or a permutation, >= 0.
  """
  return np.random.default_rng([seed, _tag(use), *numbers])


class _Words(np.random.bit_generator.ISeedSequence):
  """Hands four given words to a bit generator that asks for its seed."""

  def __init__(self, words: np.ndarray):
    self._words = words

  def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
    return self._words


def record_generators(seed: int, numbers: np.ndarray) -> list[Generator]:
  """One generator for each record number, of (seed, number) alone.

  The four words of PCG64's seed are outputs of four SplitMix64 generators at
  place `number` (Steele, Lea and Flood, 2014), whose starts NumPy's
  SeedSequence draws from the seed: ten times quicker than a SeedSequence for
  each record, which would take as long as a latent's read.

  Args:
    seed: of the run, >= 0.
    numbers: [n] of the records in the run, >= 0.
  """
  sequence = np.random.SeedSequence([seed, _tag("augment")])
  start = sequence.generate_state(4, np.uint64)
  place = numbers.astype(np.uint64)[:, None] + np.uint64(1)
  word = start + place * np.uint64(0x9E3779B97F4A7C15)
  word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  word ^= word >> np.uint64(31)
  seeds: list[Any] = [_Words(row) for row in word]
  return [Generator(np.random.PCG64(seed)) for seed in seeds]


def check_labels(labels: np.ndarray, class_names: Sequence[str]) -> None:
  """Raises ValueError for a label without a class name, saying which."""
  bad = np.flatnonzero((labels < 0) | (labels >= len(class_names)))
  if bad.size:
    raise ValueError(
      f"record {int(bad[0])} of the data has label {int(labels[bad[0]])}, "
      f"outside [0, {len(class_names)}): the data name {len(class_names)} "
      f"classes ({bad.size} of {len(labels)} records are like that)"
    )


def check_counts(
  counts: np.ndarray,
  class_names: Sequence[str],
  num_positives: int,
  num_unconditional: int,
  *,
  section: str,
  remedy: str,
  in_step: int = 1,
  num_labels: int = 0,
) -> None:
  """Raises ValueError for fewer images than are drawn without replacement.

  Args:
    counts: [K] images of each class.
    class_names: one for each label.
    num_positives: number of positives that each label draws.
    num_unconditional: number of unconditional reals that each label draws.
    section: section of the config that sets these numbers.
    remedy: advice that the message gives besides lowering them.
    in_step: how many labels of one step may be the same class.
    num_labels: number of labels of a step that draws no image twice; 0 if only
      a label draws no image twice, and if empty classes are never drawn.
  """
  need = in_step * num_positives
  few = np.flatnonzero((counts < need) & ((counts > 0) | (num_labels > 0)))
  step = f"a step of {section}.labels={num_labels} and " * (num_labels > 0)
  if few.size:
    label = int(few[np.argmin(counts[few])])
    has, name = int(counts[label]), f"{section}.positives"
    lower = f"lower {name} to {has // in_step}, " * (has >= in_step)
    raise ValueError(
      f"class {label} ({class_names[label]}) has {has} images, but {step}"
      f"{name}={num_positives} can draw {need} of it without replacement; "
      f"{few.size} of the {len(counts)} classes have too few: {lower}add "
      f"images, {remedy}"
    )
  groups = num_labels or 1
  total, has = groups * num_unconditional, int(counts.sum())
  if has < total:
    name = f"{section}.unconditional"
    lower = f"lower {name} to {has // groups}, " * (has >= groups)
    raise ValueError(
      f"the data hold {has} images, but {step}{name}={num_unconditional} draws "
      f"{total} without replacement: {lower}add images, {remedy}"
    )


def check_queue(
  counts: np.ndarray,
  class_names: Sequence[str],
  num_positives: int,
  num_unconditional: int,
  *,
  section: str = "batch",
  remedy: str = "or set queue.with_replacement=True, which repeats them",
) -> None:
  """Raises ValueError for fewer images than a sample queue's labels draw.

  See `check_counts`.
  """
  check_counts(
    counts,
    class_names,
    num_positives,
    num_unconditional,
    section=section,
    remedy=remedy,
  )


class Shuffled:
  """Every record once an epoch, each epoch in a new order, without end.

  Record number g (batch b holds numbers b*size to (b+1)*size - 1, across
  epochs) comes from a permutation of epoch g // N that Grain computes element
  by element, so that no permutation is ever stored.

  Attributes:
    size: records of one batch.
  """

  def __init__(self, num_records: int, *, size: int, seed: int):
    if num_records < 1:
      raise ValueError("the data hold no record to shuffle")
    self.size = size
    self.rows = ("global batch size", size)
    records = grain.MapDataset.range(num_records)
    self._dataset = records.seed(seed).shuffle().repeat(None)

  def parts(self, rows: range) -> list[range]:
    """The records themselves are the rows."""
    return [rows]

  def records(self, batch: int, start: int, stop: int) -> np.ndarray:
    """[stop - start] int64 indices of records [start, stop) of a batch."""
    first = batch * self.size
    numbers = range(first + start, first + stop)
    return np.array([self._dataset[g] for g in numbers], np.int64)


class DistinctStream:
  """An endless sequence over range(n) in blocks, its repeats far apart.

  It is a concatenation of seeded permutations, so that after any number of
  elements each has come as often as every other, or once more. In `window`
  consecutive blocks no element comes twice: where such a window crosses from
  permutation k to k + 1, the head of k + 1 takes the first of its elements
  that are not in the tail of k; the others follow in their order. The head
  never takes from k + 1's own tail, so that permutation k + 1 as it comes
  depends on the raw permutations k and k + 1 alone, and any block can be
  computed without those before it.

  That needs n elements to choose from, at most (3 * window - 1) * block - 1;
  `fresh` tells. With fewer, but window * block or more, the stream is one
  permutation again and again: the same two guarantees, but the same
  neighbours in every pass.

  Attributes:
    size: n.
    fresh: whether every pass is a new permutation.
  """

  def __init__(
    self, size: int, block: int, window: int, seed: int, use: str, *numbers: int
  ):
    """Computes nothing yet.

    Args:
      size: n >= window * block.
      block: elements of one block, >= 1.
      window: consecutive blocks that share no element, >= 1.
      seed: of the run.
      use: tells this stream from others, with `numbers`.
      *numbers: e.g. of a class.
    """
    self.size = size
    self._block = block
    self._window = window
    self._key = (seed, "order", _tag(use), *numbers)
    # The boundaries' places within a block repeat after this many passes; at
    # worst every head has enough before the pass' own tail.
    passes = block // math.gcd(block, size)
    tail, head = self._crossing(np.arange(1, passes + 2))
    self.fresh = bool(np.all(tail[1:] + tail[:-1] + head[:-1] <= size))
    self._kept: tuple[tuple[int, np.ndarray], ...] = ()

  def _crossing(self, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far the windows that hold elements of both permutation number - 1
    and permutation `number` reach into each, number >= 1."""
    boundary = number * self.size
    span = self._window * self._block
    first = ((boundary - span) // self._block + 1) * self._block
    last = (boundary - 1) // self._block * self._block
    return boundary - first, last + span - boundary

  def _raw(self, number: int) -> np.ndarray:
    order = generator(*self._key, number).permutation(self.size)
    return order.astype(np.int32)

  def permutation(self, number: int) -> np.ndarray:
    """[n] int32: elements number * n to (number + 1) * n - 1 of the stream."""
    if not self.fresh:
      number = 0
    for kept, order in self._kept:
      if kept == number:
        return order
    order = self._arranged(number)
    # One assignment, so that threads need no lock.
    self._kept = ((number, order), *self._kept)[:_KEPT_PERMUTATIONS]
    return order

  def _arranged(self, number: int) -> np.ndarray:
    order = self._raw(number)
    if number == 0:
      return order
    tail, head = self._crossing(np.asarray(number))
    if tail == 0 or head == 0:
      return order
    # Arranging leaves a permutation's tail alone: a kept one will do.
    before = dict(self._kept).get(number - 1)
    before = self._raw(number - 1) if before is None else before
    in_tail = np.zeros(self.size, bool)
    in_tail[before[-tail:]] = True
    # As `fresh` holds, these lie before this permutation's own tail.
    chosen = np.zeros(self.size, bool)
    chosen[np.flatnonzero(~in_tail[order])[:head]] = True
    return np.concatenate([order[chosen], order[~chosen]])

  def take(self, start: int, stop: int) -> np.ndarray:
    """[stop - start] int32: elements start to stop - 1 of the stream."""
    parts = [np.zeros(0, np.int32)]
    while start < stop:
      number, offset = divmod(start, self.size)
      count = min(stop - start, self.size - offset)
      parts.append(self.permutation(number)[offset : offset + count])
      start += count
    return np.concatenate(parts)


def _in_step(num_classes: int, num_labels: int) -> int:
  """How often a class can come in a step of a stream of permutations."""
  if num_labels <= num_classes:
    if DistinctStream(num_classes, num_labels, 1, 0, "labels").fresh:
      return 1
  # A step's block starts at most this far into a permutation, and may touch
  # the following ones.
  latest = num_classes - math.gcd(num_classes, num_labels)
  return (latest + num_labels - 1) // num_classes + 1


class ClassGrouped:
  """Labels, their positives and unconditional reals, by index
  without a queue.

  Step s has N_c labels, N_pos images of each label's class and N_unc of any
  class for each label, as a pure function of (seed, s):
  - Labels are consecutive blocks of N_c of a stream of permutations of the
    classes: each class is drawn as often as every other, or once more. No
    class comes twice in a step if the number of classes allows it (2 N_c - 1
    or more, or a multiple of N_c).
  - Positives are the next N_pos of the class' own stream, unconditional reals
    the next N_c * N_unc of a stream over everything. No image comes twice
    among a step's positives, nor among its unconditional reals; over time
    each image of a class comes as often as every other, or once more.

  A batch's records are the positives, label by label, then the unconditional
  reals, label by label.

  Attributes:
    size: records of one step, N_c * (N_pos + N_unc).
    rows: the labels.
  """

  def __init__(
    self,
    labels: np.ndarray,
    class_names: Sequence[str],
    seed: int,
    num_labels: int,
    num_positives: int,
    num_unconditional: int,
    *,
    section: str = "batch",
    remedy: str = "or take the sample queue, batch.reals='queue', with "
    "queue.with_replacement=True",
  ):
    """Sorts the data by class.

    Args:
      labels: [N] of every record, in [0, len(class_names)).
      class_names: one for each label.
      seed: of every draw.
      num_labels: N_c.
      num_positives: N_pos.
      num_unconditional: N_unc, may be 0.
      section, remedy: see `check_counts`.

    Raises:
      ValueError: fewer images of a class (or in all) than one step can draw;
        names the class and both numbers.
    """
    self.size = num_labels * (num_positives + num_unconditional)
    self.rows = ("batch.labels", num_labels)
    self._each = (num_positives, num_unconditional)
    # 1. The classes' stream, and how often one can come in a step.
    num_classes = len(class_names)
    in_step = _in_step(num_classes, num_labels)
    block = num_labels if in_step == 1 else 1
    self._labels = DistinctStream(num_classes, block, 1, seed, "labels")
    # 2. Enough images of each class and in all.
    counts = np.bincount(labels, minlength=num_classes)
    total = num_labels * num_unconditional
    most = counts.min() // max(num_positives, 1)
    if in_step > most:
      fitting = [
        n for n in range(1, num_labels) if _in_step(num_classes, n) <= most
      ]
      if fitting:
        remedy = f"lower {section}.labels to {fitting[-1]}, {remedy}"
    check_counts(
      counts,
      class_names,
      num_positives,
      num_unconditional,
      section=section,
      remedy=remedy,
      in_step=in_step,
      num_labels=num_labels,
    )
    # 3. Their streams.
    self._by_class = np.argsort(labels, kind="stable").astype(np.int32)
    self._offsets = np.concatenate([[0], np.cumsum(counts)])
    self._positives = [
      DistinctStream(count, num_positives, in_step, seed, "positives", label)
      for label, count in enumerate(counts.tolist())
    ]
    self._unconditional = None
    if total:
      use = "unconditional"
      self._unconditional = DistinctStream(len(labels), total, 1, seed, use)

  def labels(self, step: int) -> np.ndarray:
    """[N_c] int32: the labels of a step."""
    count = self.rows[1]
    return self._labels.take(step * count, (step + 1) * count)

  def parts(self, rows: range) -> list[range]:
    """The positives of some labels, and their unconditional reals."""
    firsts = (0, self.rows[1] * self._each[0])
    return [
      range(first + rows.start * each, first + rows.stop * each)
      for first, each in zip(firsts, self._each, strict=True)
    ]

  def _row(self, draw: int, start: int, stop: int) -> np.ndarray:
    """Positives start to stop - 1 of label number `draw` of the run."""
    label = int(self._labels.take(draw, draw + 1)[0])
    # Each pass over the classes draws each once: the pass' number is how
    # often the class has been drawn before.
    first = draw // self._labels.size * self._each[0]
    chosen = self._positives[label].take(first + start, first + stop)
    return self._by_class[self._offsets[label] + chosen]

  def records(self, batch: int, start: int, stop: int) -> np.ndarray:
    """[stop - start] int32 indices of records [start, stop) of a step."""
    parts = [np.zeros(0, np.int32)]
    num_labels, each = self.rows[1], self._each[0]
    positives = num_labels * each
    while start < min(stop, positives):
      row, offset = divmod(start, each)
      count = min(stop - start, each - offset)
      draw = batch * num_labels + row
      parts.append(self._row(draw, offset, offset + count))
      start += count
    if start < stop and self._unconditional is not None:
      first = batch * (self.size - positives) - positives
      parts.append(self._unconditional.take(first + start, first + stop))
    return np.concatenate(parts)


Order = Shuffled | ClassGrouped
