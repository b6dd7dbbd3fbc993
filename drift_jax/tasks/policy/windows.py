"""Windows of demonstrations: a few observations and the actions from there."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from drift_jax.data.errors import DataError
from drift_jax.data.loader import share
from drift_jax.data.order import generator
from drift_jax.tasks.policy.demonstrations import Demonstrations

ACTIONS = "actions"
# A dimension that moves by less stands still: dividing by its range would
# make signal of noise.
_STILL = 1e-4
# An action is out of range by more than this part of it.
_TOLERANCE = 1e-3

Vectors = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Normalizer:
  """Per dimension, the demonstrations' range <-> [-1, 1].

  A dimension whose range is below 1e-4 is only shifted: its centre <-> 0.

  Attributes:
    ranges: {name: (minimum [D], maximum [D])} float32, of vector observations
      and 'actions', in the units of the task.
  """

  ranges: Mapping[str, tuple[np.ndarray, np.ndarray]]

  @classmethod
  def fit(cls, demonstrations: Demonstrations) -> "Normalizer":
    """The ranges of the demonstrations' vectors; images have none."""
    values = {**demonstrations.observations, ACTIONS: demonstrations.actions}
    return cls(
      {
        name: (array.min(axis=0), array.max(axis=0))
        for name, array in values.items()
        if array.ndim == 2
      }
    )

  def normalize(self, name: str, values: np.ndarray) -> np.ndarray:
    """[..., D] in the units of the task -> float32, [-1, 1] in the range.

    Raises:
      DataError: an unknown name, another number of dimensions.
    """
    centre, half = self._scale(name, values)
    return ((values - centre) / half).astype(np.float32)

  def unnormalize(self, name: str, values: np.ndarray) -> np.ndarray:
    """Undoes `normalize`, float32; of what stands still it gives the centre.

    Raises:
      DataError: an unknown name, another number of dimensions.
    """
    centre, half = self._scale(name, values)
    still = self._is_still(name)
    return (centre + np.where(still, 0, values * half)).astype(np.float32)

  def check_actions(self, values: np.ndarray, where: str) -> None:
    """Makes sure that actions are such as were demonstrated.

    Args:
      values: [..., D] in the units of the task, the last axis but one being
        steps.
      where: what the message calls them.

    Raises:
      DataError: one is not finite, or outside of its dimension's range by more
        than 1e-3 of it.
    """
    self._scale(ACTIONS, values)
    minimum, maximum = self.ranges[ACTIONS]
    margin = _TOLERANCE * (maximum.astype(np.float64) - minimum)
    inside = (values >= minimum - margin) & (values <= maximum + margin)
    if inside.all():
      return
    *_, step, column = place = tuple(np.argwhere(~inside)[0])
    raise DataError(
      f"{where}: step {step} has {values[place]:g} in dimension {column}, "
      f"outside of the demonstrations' [{minimum[column]:g}, "
      f"{maximum[column]:g}]"
    )

  def _is_still(self, name: str) -> np.ndarray:
    minimum, maximum = self.ranges[name]
    return maximum.astype(np.float64) - minimum < _STILL

  def _scale(
    self, name: str, values: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Centre and half of the range; a half of 1 for what stands still."""
    if name not in self.ranges:
      raise DataError(f"{name!r} has no range: there are {list(self.ranges)}")
    minimum, maximum = (x.astype(np.float64) for x in self.ranges[name])
    if values.ndim < 1 or values.shape[-1] != len(minimum):
      raise DataError(
        f"{name!r} has shape {values.shape}, want {len(minimum)} dimensions on "
        "the last axis"
      )
    half = np.where(self._is_still(name), 1.0, (maximum - minimum) / 2)
    return (minimum + maximum) / 2, half

  def as_tree(self) -> dict[str, dict[str, np.ndarray]]:
    """{name: {'minimum': [D], 'maximum': [D]}} float32, to be saved."""
    return {
      name: {"minimum": minimum, "maximum": maximum}
      for name, (minimum, maximum) in self.ranges.items()
    }

  @classmethod
  def from_tree(cls, tree: Mapping[str, Mapping[str, Any]]) -> "Normalizer":
    """Undoes `as_tree`."""
    return cls(
      {
        name: (
          np.asarray(pair["minimum"], np.float32),
          np.asarray(pair["maximum"], np.float32),
        )
        for name, pair in tree.items()
      }
    )


class Windows:
  """All windows of prediction_horizon steps, as Diffusion Policy has them.

  A window starts at most observation_horizon - 1 steps before its episode and
  ends at most executed - 1 steps behind it; there the first and the last step
  are repeated. So each step of an episode is once the last that is observed,
  but for those behind which the episode's actions would all be executed.
  """

  def __init__(
    self,
    demonstrations: Demonstrations,
    observation_horizon: int,
    prediction_horizon: int,
    executed: int,
  ):
    """Lists the steps of each window; copies no data.

    Args:
      demonstrations: whose windows.
      observation_horizon: To, first steps of a window that are observed.
      prediction_horizon: T, steps of a window.
      executed: actions that are executed, from the last observed step on.

    Raises:
      DataError: horizons that don't fit into each other, or no window at all.
    """
    _check_horizons(observation_horizon, prediction_horizon, executed)
    self._demonstrations = demonstrations
    self._observed = observation_horizon
    offsets = np.arange(prediction_horizon)
    steps = []
    for episode in demonstrations.episodes():
      first = episode.start - (observation_horizon - 1)
      last = episode.stop + (executed - 1) - prediction_horizon
      starts = np.arange(first, last + 1)
      steps.append(
        np.clip(starts[:, None] + offsets, episode.start, episode.stop - 1)
      )
    self._steps = np.concatenate(steps)
    if not len(self._steps):
      raise DataError(
        f"no episode of {len(demonstrations)} is as long as a window: "
        f"prediction_horizon={prediction_horizon}, of which "
        f"{observation_horizon - 1} + {executed - 1} steps may lie outside"
      )

  def __len__(self) -> int:
    return len(self._steps)

  def take(
    self, indices: np.ndarray
  ) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """({name: [n, To, ...]}, actions [n, T, A]) of windows, as demonstrated."""
    steps = self._steps[indices]
    observed = steps[:, : self._observed]
    return (
      {
        name: values[observed]
        for name, values in self._demonstrations.observations.items()
      },
      self._demonstrations.actions[steps],
    )


def _check_horizons(observed: int, predicted: int, executed: int) -> None:
  if observed < 1 or executed < 1 or observed - 1 + executed > predicted:
    raise DataError(
      f"prediction_horizon={predicted} must hold observation_horizon="
      f"{observed} steps, whose last one is the first of executed={executed}: "
      f"{observed} - 1 + {executed} = {observed - 1 + executed}; each at least "
      "1"
    )


class PolicyFeed:
  """Batches of windows, each window once an epoch, in a new order each time.

  Batches are {'observations': {name: [b, To, D] normalised float32 or [b, To,
  H, W, 3] uint8}, 'actions': [b, T, A] normalised float32}: those of step s
  follow from (seed, s) alone, whatever the number of processes, and go on
  across the ends of epochs. Process p of P holds the p-th of P equal parts of
  a batch.

  Attributes:
    windows: what is drawn from.
    normalizer: of the vectors.
  """

  def __init__(
    self,
    demonstrations: Demonstrations,
    normalizer: Normalizer,
    *,
    observation_horizon: int,
    prediction_horizon: int,
    executed: int,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
  ):
    """Draws nothing yet.

    Args:
      demonstrations: of the task.
      normalizer: of their vectors.
      observation_horizon: see Windows, as for the following two.
      prediction_horizon: T.
      executed: actions.
      batch_size: windows of a step, of all processes.
      seed: of the orders.
      process_index, process_count: whose part to draw.

    Raises:
      DataError: actions outside of the normaliser's range; see Windows.
      ValueError: a batch that the processes can't share.
    """
    rows = share("batch_size", batch_size, process_index, process_count)
    normalizer.check_actions(demonstrations.actions, "the demonstrations")
    self._rows = np.arange(rows.start, rows.stop)
    # Normalised once, instead of once a window.
    vectors = {
      name: values if values.ndim > 2 else normalizer.normalize(name, values)
      for name, values in demonstrations.observations.items()
    }
    self.windows = Windows(
      Demonstrations(
        vectors,
        normalizer.normalize(ACTIONS, demonstrations.actions),
        demonstrations.ends,
      ),
      observation_horizon,
      prediction_horizon,
      executed,
    )
    self.normalizer = normalizer
    self._batch_size = batch_size
    self._seed = seed
    self._position = 0
    self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

  def __iter__(self) -> Iterator[dict[str, Any]]:
    return self

  def __next__(self) -> dict[str, Any]:
    step, self._position = self._position, self._position + 1
    numbers = step * self._batch_size + self._rows
    epochs, places = np.divmod(numbers, len(self.windows))
    indices = np.empty(len(numbers), np.int64)
    for epoch in np.unique(epochs):
      rows = epochs == epoch
      indices[rows] = self._permutation(int(epoch))[places[rows]]
    observations, actions = self.windows.take(indices)
    return {"observations": observations, "actions": actions}

  def _permutation(self, epoch: int) -> np.ndarray:
    if self._order[0] != epoch:
      rng = generator(self._seed, "windows", epoch)
      self._order = (epoch, rng.permutation(len(self.windows)))
    return self._order[1]

  def start(self) -> None:
    """Nothing to prepare: any step can be drawn first."""

  def state(self) -> dict[str, Any]:
    """The next step's number and the ranges, the same on every process."""
    return {
      "position": np.asarray(self._position, np.int64),
      "normalizer": self.normalizer.as_tree(),
    }

  def abstract(self, saved: Any) -> dict[str, Any]:
    """Shapes to restore into, given those that were saved.

    Raises:
      DataError: see `restore`.
    """
    shapes = {
      name: {key: tuple(x.shape) for key, x in pair.items()}
      for name, pair in saved["normalizer"].items()
    }
    mine = {
      name: {key: x.shape for key, x in pair.items()}
      for name, pair in self.normalizer.as_tree().items()
    }
    if shapes != mine:
      raise DataError(
        "the run began with other demonstrations: dimensions were "
        f"{_sizes(shapes)}, now they are {_sizes(mine)}"
      )
    return self.state()

  def restore(self, state: dict[str, Any]) -> None:
    """Continues where `state` was taken, by however many processes.

    Raises:
      DataError: the run began with demonstrations of other ranges.
    """
    saved = Normalizer.from_tree(state["normalizer"]).ranges
    for name in sorted({*saved, *self.normalizer.ranges}):
      old, new = saved.get(name), self.normalizer.ranges.get(name)
      if old is None or new is None or not _same(old, new):
        raise DataError(
          f"the run began with other demonstrations: {name!r} was in "
          f"{_text(old)}, now it is in {_text(new)}"
        )
    self._position = int(state["position"])

  def close(self) -> None:
    """Nothing to stop."""


def _same(
  a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]
) -> bool:
  return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def _text(pair: tuple[np.ndarray, np.ndarray] | None) -> str:
  if pair is None:
    return "none"
  return " to ".join(str(x.tolist()) for x in pair)


def _sizes(shapes: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
  return {name: pair["minimum"][0] for name, pair in shapes.items()}
