"""Windows of demonstrations: a few observations and the actions from there."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from drift_jax.data.loader import share
from drift_jax.data.order import generator
from drift_jax.system.errors import DataError
from drift_jax.tasks.policy.demonstrations import Demonstrations

# A dimension that moves by less stands still: divided by its range, noise would
# become signal.
_STILL = 1e-4


@dataclasses.dataclass(frozen=True)
class Normalizer:
  """Per dimension, the demonstrations' range <-> [-1, 1].

  A dimension whose range is below 1e-4 is only shifted: its centre <-> 0.

  Attributes:
    ranges: {name: {'minimum': [D], 'maximum': [D]}} float32, of vector
      observations and 'actions', in the units of the task. Checkpoints hold it.
  """

  ranges: Mapping[str, Mapping[str, np.ndarray]]

  @classmethod
  def fit(cls, demonstrations: Demonstrations) -> "Normalizer":
    """The ranges of the demonstrations' vectors; images have none."""
    return cls(
      {
        name: {"minimum": values.min(axis=0), "maximum": values.max(axis=0)}
        for name, values in demonstrations.arrays.items()
        if values.ndim == 2
      }
    )

  def normalize(self, name: str, values: np.ndarray) -> np.ndarray:
    """[..., D] in the units of the task -> float32, [-1, 1] in the range.

    Raises:
      DataError: another number of dimensions.
    """
    centre, half, _ = self._scale(name, values)
    return ((values - centre) / half).astype(np.float32)

  def unnormalize(self, name: str, values: np.ndarray) -> np.ndarray:
    """Undoes `normalize`, float32; a still dimension becomes its centre.

    Raises:
      DataError: another number of dimensions.
    """
    centre, half, still = self._scale(name, values)
    return (centre + np.where(still, 0, values * half)).astype(np.float32)

  def _scale(
    self, name: str, values: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centre, half of the range (1 if still), whether a dimension is still."""
    minimum = self.ranges[name]["minimum"].astype(np.float64)
    maximum = self.ranges[name]["maximum"].astype(np.float64)
    if values.shape[-1] != len(minimum):
      raise DataError(
        f"{name!r} has shape {values.shape}, want {len(minimum)} dimensions"
      )
    still = maximum - minimum < _STILL
    half = np.where(still, 1.0, (maximum - minimum) / 2)
    return (minimum + maximum) / 2, half, still


def window_steps(
  demonstrations: Demonstrations,
  observation_horizon: int,
  prediction_horizon: int,
  executed: int,
) -> np.ndarray:
  """Steps [W, T] of all windows, as Diffusion Policy has them.

  A window starts at most observation_horizon - 1 steps before its episode and
  ends at most executed - 1 steps after it; there the first and the last step
  are repeated. So each step of an episode is once the last that is observed,
  except for the last steps, after which the episode's actions would all be
  executed.

  Args:
    demonstrations: the episodes.
    observation_horizon: To, first steps of a window that are observed.
    prediction_horizon: T, steps of a window.
    executed: actions that are executed, from the last observed step on.

  Raises:
    DataError: no window at all.
  """
  offsets = np.arange(
    1 - observation_horizon, 1 - observation_horizon + prediction_horizon
  )
  outside = observation_horizon - 1 + executed - 1
  windows = []
  for steps in demonstrations.episodes():
    count = steps.stop - steps.start + outside - prediction_horizon + 1
    starts = np.arange(steps.start, steps.start + count)
    windows.append(
      np.clip(starts[:, None] + offsets, steps.start, steps.stop - 1)
    )
  windows = np.concatenate(windows)
  if not len(windows):
    raise DataError(
      f"no episode of {len(demonstrations)} is as long as a window: at least "
      f"prediction_horizon={prediction_horizon} - {outside} steps"
    )
  return windows


@dataclasses.dataclass
class PolicyFeed:
  """Batches of windows, each window once an epoch, in a new order each time.

  Batches are {'observations': {name: [b, To, D] normalised float32 or [b, To,
  H, W, 3] uint8}, 'actions': [b, T, A] normalised float32}. A step's batch
  follows from (seed, step) alone, for any number of processes; batches go on
  across the ends of epochs. Process p of P holds the p-th of P equal parts of
  a batch.

  Attributes:
    demonstrations: of the task; not kept.
    observation_horizon, prediction_horizon, executed: see window_steps.
    batch_size: windows of a step, of all processes.
    seed: of the orders.
    process_index, process_count: whose part to draw.
    normalizer: of the vectors.
    windows: [W, T], see window_steps.

  Raises:
    DataError: see window_steps.
    ValueError: a batch that the processes can't share.
  """

  demonstrations: dataclasses.InitVar[Demonstrations]
  observation_horizon: int
  prediction_horizon: int
  executed: int
  batch_size: int
  seed: int
  process_index: int = 0
  process_count: int = 1

  def __post_init__(self, demonstrations: Demonstrations) -> None:
    processes = self.process_index, self.process_count
    rows = share("batch_size", self.batch_size, *processes)
    self._rows = np.arange(rows.start, rows.stop)
    self.normalizer = Normalizer.fit(demonstrations)
    # Normalised once, instead of once a window.
    self._arrays = {
      name: x if x.ndim > 2 else self.normalizer.normalize(name, x)
      for name, x in demonstrations.arrays.items()
    }
    horizons = self.observation_horizon, self.prediction_horizon, self.executed
    self.windows = window_steps(demonstrations, *horizons)
    self._position = 0
    self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

  def __iter__(self) -> Iterator[dict[str, Any]]:
    return self

  def __next__(self) -> dict[str, Any]:
    step, self._position = self._position, self._position + 1
    numbers = step * self.batch_size + self._rows
    epochs, places = np.divmod(numbers, len(self.windows))
    indices = np.empty(len(numbers), np.int64)
    for epoch in np.unique(epochs):
      rows = epochs == epoch
      indices[rows] = self._permutation(int(epoch))[places[rows]]
    steps = self.windows[indices]
    observed = steps[:, : self.observation_horizon]
    batch = {name: values[observed] for name, values in self._arrays.items()}
    del batch["actions"]
    return {"observations": batch, "actions": self._arrays["actions"][steps]}

  def _permutation(self, epoch: int) -> np.ndarray:
    if self._order[0] != epoch:
      rng = generator(self.seed, "windows", epoch)
      self._order = (epoch, rng.permutation(len(self.windows)))
    return self._order[1]

  def start(self) -> None:
    """Nothing to prepare: any step can be drawn first."""

  def state(self) -> dict[str, Any]:
    """The next step's number and the ranges, the same on every process."""
    return {
      "position": np.asarray(self._position, np.int64),
      "normalizer": self.normalizer.ranges,
    }

  def abstract(self, saved: Any) -> dict[str, Any]:
    """Arrays of the saved shapes, to restore into."""
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), saved)

  def restore(self, state: dict[str, Any]) -> None:
    """Continues from a `state`, with any number of processes.

    Raises:
      DataError: the run began with demonstrations of other ranges.
    """
    before, now = (
      jax.tree.map(lambda x: x.tolist(), ranges)
      for ranges in (state["normalizer"], self.normalizer.ranges)
    )
    for name in sorted({*before, *now}):
      old, new = before.get(name), now.get(name)
      if old != new:
        raise DataError(
          f"the run began with other demonstrations: {name!r} was in {old}, "
          f"now it is in {new}"
        )
    self._position = int(state["position"])

  def close(self) -> None:
    """Nothing to stop."""
