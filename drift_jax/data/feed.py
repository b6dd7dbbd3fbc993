"""Feeds: what the training loop draws a step's batch from.

A feed is an iterator over host batches whose whole future follows from
`state()`: save that, `restore` it, and the same batches come again.
"""

import functools
import math
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from drift_jax import streams
from drift_jax.data import bank as bank_lib
from drift_jax.data.loader import Loader

Batch = dict[str, np.ndarray]


class ImageFeed:
  """Batches {'image', 'label'} straight from a loader."""

  def __init__(self, loader: Loader):
    self._loader = loader

  def __iter__(self) -> Iterator[Batch]:
    return self

  def __next__(self) -> Batch:
    return next(self._loader)

  def start(self) -> None:
    """Nothing to prepare: a loader starts anywhere."""

  def state(self) -> dict[str, Any]:
    """The data position."""
    return {"position": np.asarray(self._loader.position, np.int64)}

  def abstract(self) -> dict[str, Any]:
    """Shapes of `state()`, to restore into."""
    return self.state()

  def restore(self, state: dict[str, Any]) -> None:
    """Continues where `state` was taken."""
    self._loader.seek(int(state["position"]))


@functools.partial(
  jax.jit,
  static_argnames=("num_labels", "num_positives", "num_unconditional"),
  donate_argnames="bank",
)
def _advance(
  bank: bank_lib.Bank,
  key: jax.Array,
  samples: jax.Array,
  labels: jax.Array,
  *,
  num_labels: int,
  num_positives: int,
  num_unconditional: int,
) -> tuple[bank_lib.Bank, dict[str, jax.Array]]:
  bank = bank_lib.push(bank, samples, labels)
  label_key, sample_key = jax.random.split(key)
  drawn = bank_lib.draw_labels(label_key, labels, num_labels)
  positives, unconditional = bank_lib.sample(
    bank,
    sample_key,
    drawn,
    num_positives=num_positives,
    num_unconditional=num_unconditional,
  )
  batch = {
    "labels": drawn,
    "positives": positives,
    "unconditional": unconditional,
  }
  return bank, batch


_push = jax.jit(bank_lib.push, donate_argnames="bank")


def _host_device() -> Any:
  """This process' CPU.

  Raises:
    RuntimeError: if JAX was told to leave the CPU out.
  """
  try:
    return jax.local_devices(backend="cpu")[0]
  except RuntimeError as error:
    raise RuntimeError(
      "the sample queue lives in host memory and needs JAX's CPU backend: "
      "include cpu in JAX_PLATFORMS after the accelerator, e.g. "
      f"JAX_PLATFORMS=cuda,cpu (it is {os.environ.get('JAX_PLATFORMS')!r})"
    ) from error


class QueueFeed:
  """Positives and unconditional reals through the sample queue (A.8).

  Each step pushes one loader batch, draws its labels from it, and samples
  from the queue. The queue lives in host memory, whatever the accelerator.
  """

  def __init__(
    self,
    loader: Loader,
    *,
    num_classes: int,
    sample_shape: tuple[int, ...],
    seed: int,
    class_size: int,
    unconditional_size: int,
    push_per_step: int,
    prefill: int,
    with_replacement: bool,
    num_labels: int,
    num_positives: int,
    num_unconditional: int,
  ):
    """Creates an empty queue; `start` or `restore` comes before the first step.

    Args:
      loader: yields push_per_step records {'image', 'label'} a batch.
      num_classes: labels lie in [0, num_classes).
      sample_shape: of one image.
      seed: of every draw of labels and samples.
      class_size: slots for each class.
      unconditional_size: slots of the unconditional ring.
      push_per_step: reals pushed each step.
      prefill: reals pushed by `start`, rounded up to whole batches.
      with_replacement: whether a class with too few samples may repeat them.
      num_labels: labels of a step.
      num_positives: positives of each label.
      num_unconditional: unconditional reals of each label.
    """
    self._loader = loader
    self._num_classes = num_classes
    self._seed = seed
    self._prefill_batches = math.ceil(prefill / push_per_step)
    self._with_replacement = with_replacement
    self._sizes = {
      "num_labels": num_labels,
      "num_positives": num_positives,
      "num_unconditional": num_unconditional,
    }
    self._host = _host_device()
    with jax.default_device(self._host):
      self._bank = bank_lib.create(
        num_classes=num_classes,
        class_size=class_size,
        unconditional_size=unconditional_size,
        sample_shape=sample_shape,
      )

  def _next_reals(self) -> Batch:
    reals = next(self._loader)
    bank_lib.check_labels(reals["label"], self._num_classes)
    return reals

  def start(self) -> None:
    """Fills the queue of a new run."""
    with jax.default_device(self._host):
      for _ in range(self._prefill_batches):
        reals = self._next_reals()
        self._bank = _push(self._bank, reals["image"], reals["label"])

  def __iter__(self) -> Iterator[Batch]:
    return self

  def __next__(self) -> Batch:
    step = self._loader.position - self._prefill_batches
    reals = self._next_reals()
    with jax.default_device(self._host):
      root = streams.stream(self._seed, "queue")
      key = jax.random.fold_in(root, step)
      self._bank, batch = _advance(
        self._bank, key, reals["image"], reals["label"], **self._sizes
      )
    batch = jax.tree.map(np.asarray, batch)
    bank_lib.check(
      np.asarray(self._bank.count),
      int(self._bank.any_count),
      batch["labels"],
      num_positives=self._sizes["num_positives"],
      num_unconditional=self._sizes["num_unconditional"],
      with_replacement=self._with_replacement,
    )
    return batch

  def state(self) -> dict[str, Any]:
    """The data position and the queue."""
    return {
      "position": np.asarray(self._loader.position, np.int64),
      "bank": self._bank,
    }

  def abstract(self) -> dict[str, Any]:
    """Shapes of `state()`, to restore into."""
    place = jax.sharding.SingleDeviceSharding(self._host)
    return {
      "position": np.asarray(0, np.int64),
      "bank": jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        self._bank,
      ),
    }

  def restore(self, state: dict[str, Any]) -> None:
    """Continues where `state` was taken; the queue is not refilled."""
    self._loader.seek(int(state["position"]))
    self._bank = state["bank"]
