"""Demonstrations of a control task: episodes of observations and actions."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from drift_jax.system.errors import DataError


@dataclasses.dataclass(frozen=True)
class Demonstrations:
  """Episodes, one after the other.

  Attributes:
    observations: {name: [S, ...]} of S steps: float32 vectors [S, D], in the
      units of the task, or uint8 images [S, H, W, 3].
    actions: [S, A] float32, taken after the observation of the same step.
    ends: [E] int64, the step after the last one of each episode; the last end
      is S.

  Raises:
    DataError: shapes, types or ends that disagree, numbers that are not finite.
  """

  observations: Mapping[str, np.ndarray]
  actions: np.ndarray
  ends: np.ndarray

  def __post_init__(self) -> None:
    steps = len(self.actions)
    for name, values in self.arrays.items():
      is_image = values.ndim == 4 and values.dtype == np.uint8
      is_vector = values.ndim == 2 and values.dtype == np.float32
      if not is_vector and (name == "actions" or not is_image):
        raise DataError(
          f"{name!r} is {values.dtype} {values.shape}: want float32 vectors "
          "[S, D]; observations may be uint8 images [S, H, W, 3]"
        )
      if len(values) != steps:
        raise DataError(f"{name!r} has {len(values)} steps, want {steps}")
      if is_vector and not np.isfinite(values).all():
        step, column = place = tuple(np.argwhere(~np.isfinite(values))[0])
        value = f"{values[place]} in column {column}"
        raise DataError(f"{name!r}: step {step} has {value}")
    ends = self.ends
    if not len(ends) or np.any(np.diff(ends, prepend=0) < 1):
      text = "must grow: an episode has at least one step"
      raise DataError(f"episode ends {ends.tolist()} {text}")
    if ends[-1] != steps:
      raise DataError(
        f"an unfinished episode: the last one ends at step {ends[-1]}, but "
        f"there are {steps} steps; cut them off or mark its end"
      )

  @classmethod
  def joined(cls, episodes: Sequence["Demonstrations"]) -> "Demonstrations":
    """Several demonstrations of one episode each, in their order."""
    return cls(
      {
        name: np.concatenate([each.observations[name] for each in episodes])
        for name in episodes[0].observations
      },
      np.concatenate([each.actions for each in episodes]),
      np.cumsum([len(each.actions) for each in episodes], dtype=np.int64),
    )

  @property
  def arrays(self) -> dict[str, np.ndarray]:
    """The observations, and 'actions'."""
    return {**self.observations, "actions": self.actions}

  @property
  def shapes(self) -> dict[str, list[int]]:
    """{name: shape of a step's}, of 'actions' too."""
    return {name: list(x.shape[1:]) for name, x in self.arrays.items()}

  def __len__(self) -> int:
    """Number of episodes."""
    return len(self.ends)

  def episodes(self) -> Iterator[slice]:
    """The steps of each."""
    start = 0
    for end in self.ends:
      yield slice(start, int(end))
      start = int(end)
