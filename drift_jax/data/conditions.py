"""Feed of reals by condition: an embedding or tokens for each image."""

from typing import Any

import numpy as np

from drift_jax.data.feed import GroupedFeed
from drift_jax.data.loader import Batch
from drift_jax.data.order import ClassGrouped, DistinctStream, check_counts
from drift_jax.data.readers import Reader


class ConditionGrouped(ClassGrouped):
  """Conditions of a step, their positives and unconditional reals, by index.

  Step s has N_c images whose conditions are asked for, N_pos positives of each
  and N_unc reals of any condition for each, as a pure function of (seed, s):
  - The images are consecutive blocks of N_c of a stream of permutations: each
    condition is asked for once an epoch, none twice in a step.
  - The positives of a condition are its own image and, after it, the N_pos - 1
    images of the same class whose conditions are nearest (Euclidean distance;
    of tokens, between their means).
  - Unconditional reals are those of ClassGrouped.
  """

  def __init__(
    self,
    reader: Reader,
    seed: int,
    num_labels: int,
    num_positives: int,
    num_unconditional: int,
    *,
    section: str = "batch",
  ):
    """Finds the images of each class.

    Args:
      reader: of images with conditions.
      seed: of every draw.
      num_labels: N_c.
      num_positives: N_pos.
      num_unconditional: N_unc, may be 0.
      section: section of the config that sets these numbers.

    Raises:
      ValueError: fewer images of a class (or in all) than one step can draw;
        names the class and both numbers.
    """
    labels, count = reader.labels, len(reader.labels)
    total = num_labels * num_unconditional
    self.size = num_labels * num_positives + total
    self.rows = ("batch.labels", num_labels)
    self._each = (num_positives, num_unconditional)
    # 1. Enough images.
    counts = np.bincount(labels, minlength=len(reader.class_names))
    told: Any = {"section": section, "remedy": "or merge classes"}
    check_counts(counts, reader.class_names, num_positives, 0, **told)
    for name, drawn in (("labels", num_labels), ("unconditional", total)):
      if drawn > count:
        lower = count if name == "labels" else count // num_labels
        raise ValueError(
          f"the data hold {count} images, but a step draws {drawn} "
          f"({section}.{name}) without replacement: lower {section}.{name} to "
          f"{lower}, or add images"
        )
    # 2. Streams, and what distances are taken between.
    self._class_of = labels
    self._by_class = np.argsort(labels, kind="stable").astype(np.int32)
    self._offsets = np.concatenate([[0], np.cumsum(counts)])
    self._asked = DistinctStream(count, num_labels, 1, seed, "conditions")
    self._unconditional = None
    if total:
      use = "unconditional"
      self._unconditional = DistinctStream(count, total, 1, seed, use)
    self._points = None
    if num_positives > 1:
      values = reader.conditions
      means = (
        values.mean(axis=1, dtype=np.float32) if values.ndim == 3 else values
      )
      self._points = means.astype(np.float32)

  def asked(self, step: int) -> np.ndarray:
    """[N_c] int32: the images whose conditions a step asks for."""
    count = self.rows[1]
    return self._asked.take(step * count, (step + 1) * count)

  def labels(self, step: int) -> np.ndarray:
    """[N_c] int32: their classes."""
    return self._class_of[self.asked(step)].astype(np.int32)

  def _row(self, draw: int, start: int, stop: int) -> np.ndarray:
    """Positives start to stop - 1 of condition number `draw` of the run."""
    image = int(self._asked.take(draw, draw + 1)[0])
    if self._points is None:
      return np.array([image], np.int32)[start:stop]
    label = self._class_of[image]
    members = self._by_class[self._offsets[label] : self._offsets[label + 1]]
    distances = np.sum((self._points[members] - self._points[image]) ** 2, -1)
    distances[members == image] = -1.0
    nearest = np.argsort(distances, kind="stable")[: self._each[0]]
    return members[nearest][start:stop]


class ConditionFeed(GroupedFeed):
  """Positives and unconditional reals of each condition, read by index.

  Batches are those of GroupedFeed, with 'conditions': [l, D] or [l, T, D]
  float32, as ConditionGrouped chooses them.
  """

  _order: ConditionGrouped

  def _ordered(self, reader: Reader, *sizes: int) -> ConditionGrouped:
    self._conditions = reader.conditions
    return ConditionGrouped(reader, *sizes)

  def __next__(self) -> Batch:
    asked = self._order.asked(self.position)[list(self.rows)]
    conditions = self._conditions[asked].astype(np.float32)
    return super().__next__() | {"conditions": conditions}
