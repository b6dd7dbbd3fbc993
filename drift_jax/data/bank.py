"""The sample queue (A.8): ring buffers of real samples in host memory.

Per class a ring buffer of the newest samples, plus one over all classes for
the unconditional reals. The rings are NumPy arrays, changed in place: they
may be most of a host's memory, and a gather of whole rows by NumPy takes a
third of the time that XLA takes on the CPU. The random numbers are JAX's.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass
class Bank:
  """Ring buffers of samples; a slot is filled if slot < count.

  Its memory is (K S + U) samples; pages are taken as slots are filled.

  Attributes:
    samples: [K, S, ...] S slots for each of K classes.
    pointer: [K] int32, the slot that the next sample of the class takes.
    count: [K] int32, filled slots of the class.
    any_samples: [U, ...] slots for samples of every class.
    any_pointer: [] int32, the slot that the next sample takes.
    any_count: [] int32, filled slots.
  """

  samples: np.ndarray
  pointer: np.ndarray
  count: np.ndarray
  any_samples: np.ndarray
  any_pointer: np.ndarray
  any_count: np.ndarray

  def arrays(self) -> dict[str, np.ndarray]:
    """The live arrays by name: the next push changes them."""
    return dict(vars(self))


def create(
  *,
  num_classes: int,
  class_size: int,
  unconditional_size: int,
  sample_shape: tuple[int, ...],
  dtype: np.dtype | type = np.float32,
) -> Bank:
  """An empty bank of samples of the dtype in which they travel."""
  return Bank(
    samples=np.zeros((num_classes, class_size, *sample_shape), dtype),
    pointer=np.zeros(num_classes, np.int32),
    count=np.zeros(num_classes, np.int32),
    any_samples=np.zeros((unconditional_size, *sample_shape), dtype),
    any_pointer=np.zeros((), np.int32),
    any_count=np.zeros((), np.int32),
  )


def _rings(arrays: Mapping[str, Any], axis: int) -> list[list[np.ndarray]]:
  """[samples, pointer, count] of the classes' rings, then of the one over all.

  These are views. The second gets an axis of one class, as the first has.
  """
  names = ("samples", "pointer", "count")
  return [
    [arrays[name] for name in names],
    [np.expand_dims(arrays[f"any_{name}"], axis) for name in names],
  ]


def _rank_in_group(group: np.ndarray) -> np.ndarray:
  """How many earlier entries equal each entry: [3, 5, 3] -> [0, 0, 1]."""
  order = np.argsort(group, kind="stable")
  ordered = group[order]
  first = np.searchsorted(ordered, ordered)
  rank = np.empty(len(group), np.int32)
  rank[order] = np.arange(len(group)) - first
  return rank


def push(bank: Bank, samples: np.ndarray, labels: np.ndarray) -> None:
  """Appends samples in order, in place; a full ring overwrites its oldest.

  Args:
    bank: of samples of the same dtype.
    samples: [n, ...].
    labels: [n] int32 in [0, K).
  """
  groups = (labels, np.zeros_like(labels))
  for rings, label in zip(_rings(bank.arrays(), 0), groups, strict=True):
    slots, pointer, count = rings
    size = slots.shape[1]
    pushed = np.bincount(label, minlength=len(count)).astype(np.int32)
    rank = _rank_in_group(label)
    # Of more samples than slots only the last `size` stay.
    stays = rank >= pushed[label] - size
    slot = (pointer[label] + rank) % size
    slots[label[stays], slot[stays]] = samples[stays]
    pointer[:] = (pointer + pushed) % size
    count[:] = np.minimum(count + pushed, size)


def merged_slots(
  pointer: np.ndarray, count: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
  """(ring [n], slot [n]) of the `size` newest entries of R rings, oldest first.

  The newest entries of all rings count as equally old, and so on: they are
  filled at one pace. n is less than `size` if there are fewer.

  Args:
    pointer: [R] slot that the next sample of the ring takes.
    count: [R] filled slots.
    size: number of slots of each ring.
  """
  age = np.arange(int(count.max(initial=0)))
  there = age[:, None] < count
  # Row after row: the newest of each ring, then the second newest, ...
  ring = np.nonzero(there)[1][:size]
  slot = ((pointer - 1 - age[:, None]) % size)[there][:size]
  return ring[::-1], slot[::-1]


def refill(bank: Bank, rings: Mapping[str, np.ndarray]) -> None:
  """Puts saved rings of several banks into one, in place.

  One bank is copied bit by bit. Of several the newest samples of each class
  stay, as many as there are slots: at least as many as in any of them.

  Args:
    bank: of the same sizes; what it holds is lost.
    rings: its `arrays()` of R banks, stacked.
  """
  if len(rings["count"]) == 1:
    for name, array in bank.arrays().items():
      array[...] = rings[name][0]
    return
  stacked = _rings(rings, 1)
  for mine, saved in zip(_rings(bank.arrays(), 0), stacked, strict=True):
    (samples, pointer, count), (theirs, pointers, counts) = mine, saved
    size = samples.shape[1]
    for label in range(len(count)):
      ring, slot = merged_slots(pointers[:, label], counts[:, label], size)
      samples[label, : len(ring)] = theirs[ring, label, slot]
      count[label] = len(ring)
      pointer[label] = len(ring) % size


def draw_slots(score: np.ndarray, count: np.ndarray, num: int) -> np.ndarray:
  """Slots [L, num] of filled entries, uniformly and without replacement.

  A row with fewer than `num` filled slots repeats them, each as often as every
  other, or once more.

  Args:
    score: [L, S] independent uniform float32 in [0, 1): a row's slots come in
      the order of its scores, ties in the order of slots.
    count: [L] filled slots of each row; the others are never drawn.
    num: slots to draw.
  """
  size = score.shape[1]
  slot = np.arange(size, dtype=np.uint64)
  # Floats >= 0 are ordered as their bits are. With the slot below them they
  # are distinct, and the smallest can be set apart before they are sorted.
  rank = score.view(np.uint32).astype(np.uint64) << np.uint64(32) | slot
  rank[slot >= count[:, None]] = np.iinfo(np.uint64).max
  first = min(num, size)
  if first < size:
    rank = np.partition(rank, first - 1, axis=1)[:, :first]
  order = np.sort(rank, axis=1) & np.uint64(2**32 - 1)
  column = np.arange(num) % np.maximum(count, 1)[:, None]
  return np.take_along_axis(order, column, axis=1).astype(np.int64)


def take(bank: Bank, labels: np.ndarray, slots: np.ndarray) -> np.ndarray:
  """The samples [L, P, ...] in slots [L, P] of classes [L]."""
  num_classes, class_size, *shape = bank.samples.shape
  flat = bank.samples.reshape(num_classes * class_size, *shape)
  return flat.take(labels[:, None] * class_size + slots, axis=0)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _scores(key: jax.Array, *shapes: tuple[int, int]) -> list[jax.Array]:
  """Uniform numbers in [0, 1) of two shapes."""
  keys = jax.random.split(key)
  return [jax.random.uniform(k, s) for k, s in zip(keys, shapes, strict=True)]


def sample(
  bank: Bank,
  key: jax.Array,
  labels: np.ndarray,
  *,
  num_positives: int,
  num_unconditional: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Positives [L, P, ...] and unconditional reals [L, U, ...] of labels [L].

  Without replacement within a label, but for one that the queue has too few
  samples of (see `draw_slots`).

  Raises:
    ValueError: the queue has no sample of a label.
  """
  empty = labels[bank.count[labels] == 0]
  if empty.size:
    raise ValueError(f"class {int(empty[0])} has no sample in the queue")
  sizes = (bank.samples.shape[1], len(bank.any_samples))
  scores = _scores(key, *((len(labels), size) for size in sizes))
  score, any_score = map(np.asarray, scores)
  any_count = np.broadcast_to(bank.any_count, labels.shape)
  slots = draw_slots(score, bank.count[labels], num_positives)
  any_slots = draw_slots(any_score, any_count, num_unconditional)
  return take(bank, labels, slots), bank.any_samples.take(any_slots, axis=0)


@functools.partial(jax.jit, static_argnames="num")
def draw_labels(key: jax.Array, newest: Any, num: int) -> jax.Array:
  """[num] of the labels just pushed, [n], drawn without replacement."""
  return jax.random.choice(key, newest, (num,), replace=False)
