"""Demonstrations of a control task: episodes of observations and actions."""

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np

from drift_jax.data.errors import DataError


@dataclasses.dataclass(frozen=True)
class Demonstrations:
  """Episodes, one behind the other.

  Attributes:
    observations: {name: [S, ...]} of S steps: float32 vectors [S, D], in the
      units of the task, or uint8 images [S, H, W, 3].
    actions: [S, A] float32, taken after the observation of the same step.
    ends: [E] int64, behind the last step of each episode; the last one is S.

  Raises:
    DataError: shapes, types or ends that disagree, numbers that are not finite.
  """

  observations: Mapping[str, np.ndarray]
  actions: np.ndarray
  ends: np.ndarray

  def __post_init__(self) -> None:
    steps = len(self.actions)
    for name, values in {**self.observations, "actions": self.actions}.items():
      if len(values) != steps:
        raise DataError(
          f"{name!r} has {len(values)} steps, the actions {steps}: a step has "
          "one of each"
        )
      is_image = values.ndim == 4 and values.dtype == np.uint8
      is_vector = values.ndim == 2 and values.dtype == np.float32
      if not is_vector and (name == "actions" or not is_image):
        raise DataError(
          f"{name!r} is {values.dtype} {values.shape}: want float32 vectors "
          "[S, D]" + (", or uint8 images [S, H, W, 3]" * (name != "actions"))
        )
      if is_vector and not np.isfinite(values).all():
        step, column = np.argwhere(~np.isfinite(values))[0]
        raise DataError(
          f"{name!r}: step {step} has {values[step, column]} in column {column}"
        )
    ends = self.ends
    if not len(ends) or np.any(np.diff(ends, prepend=0) < 1):
      raise DataError(
        f"episode ends {ends.tolist()} must grow: an episode has at least one "
        "step"
      )
    if ends[-1] != steps:
      raise DataError(
        f"an unfinished episode: the last one ends at step {ends[-1]}, but "
        f"there are {steps} steps; cut them off or mark its end"
      )

  def __len__(self) -> int:
    """Episodes."""
    return len(self.ends)

  def episodes(self) -> Iterator[slice]:
    """The steps of each."""
    start = 0
    for end in self.ends:
      yield slice(start, int(end))
      start = int(end)

  def first(self, count: int) -> "Demonstrations":
    """The first episodes.

    Raises:
      DataError: there are not as many.
    """
    if not 1 <= count <= len(self):
      raise DataError(f"{count} episodes are asked for, there are {len(self)}")
    end = int(self.ends[count - 1])
    return Demonstrations(
      {name: values[:end] for name, values in self.observations.items()},
      self.actions[:end],
      self.ends[:count],
    )
