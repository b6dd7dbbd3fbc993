"""The sample queue (A.8): ring buffers of real samples as one pytree.

Per class a ring buffer of the newest samples, plus one over all classes for
the unconditional reals. Every function is pure: it takes a Bank and returns
arrays or a new Bank. Jit with donation to update in place.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray, Shaped


@flax.struct.dataclass
class Bank:
  """Ring buffers of samples; a slot is filled where slot < count.

  Attributes:
    samples: [K, S, ...] S slots for each of K classes.
    pointer: [K] int32, the slot that the next sample of the class takes.
    count: [K] int32, filled slots of the class.
    any_samples: [U, ...] slots for samples of every class.
    any_pointer: int32, the slot that the next sample takes.
    any_count: int32, filled slots.
  """

  samples: Shaped[Array, "K S ..."]
  pointer: Int[Array, " K"]
  count: Int[Array, " K"]
  any_samples: Shaped[Array, "U ..."]
  any_pointer: Int[Array, ""]
  any_count: Int[Array, ""]


def create(
  *,
  num_classes: int,
  class_size: int,
  unconditional_size: int,
  sample_shape: tuple[int, ...],
) -> Bank:
  """An empty bank of float32 samples."""
  return Bank(
    samples=jnp.zeros((num_classes, class_size, *sample_shape)),
    pointer=jnp.zeros(num_classes, jnp.int32),
    count=jnp.zeros(num_classes, jnp.int32),
    any_samples=jnp.zeros((unconditional_size, *sample_shape)),
    any_pointer=jnp.zeros((), jnp.int32),
    any_count=jnp.zeros((), jnp.int32),
  )


def _rank_in_group(group: Int[Array, " n"]) -> Int[Array, " n"]:
  """How many earlier entries equal each entry: [3, 5, 3] -> [0, 0, 1]."""
  same = group[:, None] == group[None, :]
  return jnp.sum(jnp.tril(same, -1), axis=1, dtype=jnp.int32)


def push(
  bank: Bank, samples: Shaped[Array, "n ..."], labels: Int[Array, " n"]
) -> Bank:
  """Appends samples in order; a full ring overwrites its oldest.

  Labels must lie in [0, K): `check_labels` says so on the host.
  """
  num_classes, class_size = bank.samples.shape[:2]
  pushed = jnp.zeros(num_classes, jnp.int32).at[labels].add(1)
  rank = _rank_in_group(labels)
  # Of more samples than slots only the last `size` stay: scatter would leave
  # the order of writes to one slot open, so the others go out of bounds.
  slot = (bank.pointer[labels] + rank) % class_size
  slot = jnp.where(rank >= pushed[labels] - class_size, slot, class_size)
  size = bank.any_samples.shape[0]
  rank = jnp.arange(len(labels), dtype=jnp.int32)
  any_slot = (bank.any_pointer + rank) % size
  any_slot = jnp.where(rank >= len(labels) - size, any_slot, size)
  samples = samples.astype(bank.samples.dtype)
  return Bank(
    samples=bank.samples.at[labels, slot].set(samples, mode="drop"),
    pointer=(bank.pointer + pushed) % class_size,
    count=jnp.minimum(bank.count + pushed, class_size),
    any_samples=bank.any_samples.at[any_slot].set(samples, mode="drop"),
    any_pointer=(bank.any_pointer + len(labels)) % size,
    any_count=jnp.minimum(bank.any_count + len(labels), size),
  )


def draw_slots(
  key: PRNGKeyArray, count: Int[Array, " L"], size: int, num: int
) -> Int[Array, "L num"]:
  """Slots of filled entries, uniformly and without replacement.

  A row with fewer than `num` filled slots uses all of them equally often,
  up to one: it is drawn with replacement only then.
  """
  score = jax.random.uniform(key, (len(count), size))
  score = jnp.where(jnp.arange(size) < count[:, None], score, jnp.inf)
  order = jnp.argsort(score, axis=1)
  column = jnp.arange(num) % jnp.maximum(count, 1)[:, None]
  return jnp.take_along_axis(order, column, axis=1)


def take(
  bank: Bank, labels: Int[Array, " L"], slots: Int[Array, "L P"]
) -> Shaped[Array, "L P ..."]:
  """The samples in the given slots of the given classes."""
  return bank.samples[labels[:, None], slots]


def sample(
  bank: Bank,
  key: PRNGKeyArray,
  labels: Int[Array, " L"],
  *,
  num_positives: int,
  num_unconditional: int,
) -> tuple[Shaped[Array, "L P ..."], Shaped[Array, "L U ..."]]:
  """Positives of each label and unconditional reals for each label.

  Without replacement within a label. `check` must have passed.
  """
  positive_key, unconditional_key = jax.random.split(key)
  slots = draw_slots(
    positive_key, bank.count[labels], bank.samples.shape[1], num_positives
  )
  any_slots = draw_slots(
    unconditional_key,
    jnp.broadcast_to(bank.any_count, labels.shape),
    bank.any_samples.shape[0],
    num_unconditional,
  )
  return take(bank, labels, slots), bank.any_samples[any_slots]


def draw_labels(
  key: PRNGKeyArray, newest: Int[Array, " n"], num: int
) -> Int[Array, " num"]:
  """The step's labels: drawn from those just pushed, without replacement."""
  return jax.random.choice(key, newest, (num,), replace=False)


def check_labels(labels: np.ndarray, num_classes: int) -> None:
  """Raises ValueError for a label outside [0, num_classes)."""
  bad = labels[(labels < 0) | (labels >= num_classes)]
  if bad.size:
    raise ValueError(
      f"the data hold label {int(bad[0])}, outside [0, {num_classes}) "
      "(model.num_classes)"
    )


def check(
  count: np.ndarray,
  any_count: int,
  labels: np.ndarray,
  *,
  num_positives: int,
  num_unconditional: int,
  with_replacement: bool,
) -> None:
  """Raises ValueError where a draw would need more samples than are there.

  Names the class, how many samples it has and how many are wanted. With
  replacement, one sample is enough.
  """
  need = 1 if with_replacement else num_positives
  for label in labels:
    if count[label] < need:
      raise ValueError(
        f"class {int(label)} has {int(count[label])} samples in the queue, "
        f"but batch.positives={num_positives} are drawn without replacement: "
        "raise queue.prefill or queue.class_size, lower batch.positives, or "
        "set queue.with_replacement=True"
        if not with_replacement
        else f"class {int(label)} has no sample in the queue: raise "
        "queue.prefill"
      )
  need = min(1, num_unconditional) if with_replacement else num_unconditional
  if any_count < need:
    raise ValueError(
      f"the unconditional queue holds {any_count} samples, but "
      f"batch.unconditional={num_unconditional} are drawn: raise "
      "queue.prefill or queue.unconditional_size"
    )


__all__ = [
  "Bank",
  "check",
  "check_labels",
  "create",
  "draw_labels",
  "draw_slots",
  "push",
  "sample",
  "take",
]
