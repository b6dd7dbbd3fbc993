"""The sample queue (A.8): ring buffers of real samples in host memory.

Per class a ring buffer of the newest samples, plus one over all classes for
the unconditional reals. The rings are NumPy arrays, changed in place: they
may be most of a host's memory, and a gather of whole rows by NumPy takes a
third of the time that XLA takes on the CPU. The random numbers are JAX's.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped


@dataclasses.dataclass
class Bank:
  """Ring buffers of samples; a slot is filled where slot < count.

  Its memory is (K S + U) samples; pages are taken as slots are filled.

  Attributes:
    samples: [K, S, ...] S slots for each of K classes.
    pointer: [K] int32, the slot that the next sample of the class takes.
    count: [K] int32, filled slots of the class.
    any_samples: [U, ...] slots for samples of every class.
    any_pointer: [] int32, the slot that the next sample takes.
    any_count: [] int32, filled slots.
  """

  samples: Shaped[np.ndarray, "K S ..."]
  pointer: Int[np.ndarray, " K"]
  count: Int[np.ndarray, " K"]
  any_samples: Shaped[np.ndarray, "U ..."]
  any_pointer: Int[np.ndarray, ""]
  any_count: Int[np.ndarray, ""]

  def arrays(self) -> dict[str, np.ndarray]:
    """The live arrays by name: the next push changes them."""
    return {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
    }


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


def _rank_in_group(group: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
  """How many earlier entries equal each entry: [3, 5, 3] -> [0, 0, 1]."""
  order = np.argsort(group, kind="stable")
  ordered = group[order]
  first = np.searchsorted(ordered, ordered)
  rank = np.empty(len(group), np.int32)
  rank[order] = np.arange(len(group)) - first
  return rank


def push(
  bank: Bank,
  samples: Shaped[np.ndarray, "n ..."],
  labels: Int[np.ndarray, " n"],
) -> None:
  """Appends samples in order, in place; a full ring overwrites its oldest.

  Raises:
    ValueError: a label outside [0, K), or samples of another dtype.
  """
  num_classes, class_size = bank.samples.shape[:2]
  bad = labels[(labels < 0) | (labels >= num_classes)]
  if bad.size:
    raise ValueError(
      f"label {int(bad[0])} can't be queued: the queue has classes "
      f"[0, {num_classes})"
    )
  if samples.dtype != bank.samples.dtype:
    raise ValueError(
      f"{samples.dtype} samples can't be queued: the queue holds "
      f"{bank.samples.dtype}"
    )
  pushed = np.bincount(labels, minlength=num_classes).astype(np.int32)
  rank = _rank_in_group(labels)
  # Of more samples than slots only the last `size` stay.
  stays = rank >= pushed[labels] - class_size
  slot = (bank.pointer[labels] + rank) % class_size
  bank.samples[labels[stays], slot[stays]] = samples[stays]
  bank.pointer[:] = (bank.pointer + pushed) % class_size
  bank.count[:] = np.minimum(bank.count + pushed, class_size)
  size, total = len(bank.any_samples), len(labels)
  kept = min(total, size)
  slot = (int(bank.any_pointer) + np.arange(total - kept, total)) % size
  bank.any_samples[slot] = samples[total - kept :]
  bank.any_pointer[...] = (int(bank.any_pointer) + total) % size
  bank.any_count[...] = min(int(bank.any_count) + total, size)


def merged_slots(
  pointer: Int[np.ndarray, " R"], count: Int[np.ndarray, " R"], size: int
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
  """(ring, slot) of the `size` newest entries of some rings, oldest first.

  The newest entries of all rings count as equally old, and so on: they are
  filled at one pace. n is less than `size` where there are fewer.
  """
  rings = np.arange(len(count))
  age = np.arange(int(count.max(initial=0)))
  there = age[:, None] < count
  # Row after row: the newest of each ring, then the second newest, ...
  ring = np.broadcast_to(rings, there.shape)[there][:size]
  slot = ((pointer - 1 - age[:, None]) % size)[there][:size]
  return ring[::-1], slot[::-1]


def refill(
  bank: Bank, rings: Mapping[str, Shaped[np.ndarray, "R ..."]]
) -> None:
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
  for label in range(len(bank.count)):
    ring, slot = merged_slots(
      rings["pointer"][:, label],
      rings["count"][:, label],
      bank.samples.shape[1],
    )
    bank.samples[label, : len(ring)] = rings["samples"][ring, label, slot]
    bank.count[label] = len(ring)
    bank.pointer[label] = len(ring) % bank.samples.shape[1]
  size = len(bank.any_samples)
  ring, slot = merged_slots(rings["any_pointer"], rings["any_count"], size)
  bank.any_samples[: len(ring)] = rings["any_samples"][ring, slot]
  bank.any_count[...] = len(ring)
  bank.any_pointer[...] = len(ring) % size


def draw_slots(
  score: Float[np.ndarray, "L S"], count: Int[np.ndarray, " L"], num: int
) -> Int[np.ndarray, "L num"]:
  """Slots of filled entries, uniformly and without replacement.

  A row with fewer than `num` filled slots repeats them, each as often as every
  other, or once more.

  Args:
    score: independent uniform float32 in [0, 1): a row's slots come in the
      order of its scores, ties in the order of slots.
    count: filled slots of each row; the others are never drawn.
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


def take(
  bank: Bank, labels: Int[np.ndarray, " L"], slots: Int[np.ndarray, "L P"]
) -> Shaped[np.ndarray, "L P ..."]:
  """The samples in the given slots of the given classes."""
  num_classes, class_size, *shape = bank.samples.shape
  flat = bank.samples.reshape(num_classes * class_size, *shape)
  return flat.take(labels[:, None] * class_size + slots, axis=0)


@functools.partial(
  jax.jit, static_argnames=("num_labels", "class_size", "unconditional_size")
)
def _scores(
  key: PRNGKeyArray,
  num_labels: int,
  class_size: int,
  unconditional_size: int,
) -> tuple[Float[Array, "L S"], Float[Array, "L U"]]:
  positive_key, unconditional_key = jax.random.split(key)
  return (
    jax.random.uniform(positive_key, (num_labels, class_size)),
    jax.random.uniform(unconditional_key, (num_labels, unconditional_size)),
  )


def sample(
  bank: Bank,
  key: PRNGKeyArray,
  labels: Int[np.ndarray, " L"],
  *,
  num_positives: int,
  num_unconditional: int,
) -> tuple[Shaped[np.ndarray, "L P ..."], Shaped[np.ndarray, "L U ..."]]:
  """Positives of each label and unconditional reals for each label.

  Without replacement within a label, but for one that the queue has too few
  samples of (see `draw_slots`).

  Raises:
    ValueError: the queue has no sample of a label.
  """
  empty = labels[bank.count[labels] == 0]
  if empty.size:
    raise ValueError(f"class {int(empty[0])} has no sample in the queue")
  score, any_score = _scores(
    key,
    num_labels=len(labels),
    class_size=bank.samples.shape[1],
    unconditional_size=len(bank.any_samples),
  )
  slots = draw_slots(np.asarray(score), bank.count[labels], num_positives)
  any_slots = draw_slots(
    np.asarray(any_score),
    np.broadcast_to(bank.any_count, labels.shape),
    num_unconditional,
  )
  return take(bank, labels, slots), bank.any_samples.take(any_slots, axis=0)


@functools.partial(jax.jit, static_argnames="num")
def _draw_labels(
  key: PRNGKeyArray, newest: Int[Array, " n"], num: int
) -> Int[Array, " num"]:
  return jax.random.choice(key, newest, (num,), replace=False)


def draw_labels(
  key: PRNGKeyArray, newest: Int[np.ndarray, " n"], num: int
) -> Int[np.ndarray, " num"]:
  """The step's labels: drawn from those just pushed, without replacement."""
  return np.asarray(_draw_labels(key, newest, num))


__all__ = [
  "Bank",
  "create",
  "draw_labels",
  "draw_slots",
  "merged_slots",
  "push",
  "refill",
  "sample",
  "take",
]
