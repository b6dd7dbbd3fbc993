"""Rules that say which checkpoints of a run are kept."""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any


@dataclasses.dataclass
class Retention:
  """Says which checkpoints are kept; a preservation policy of Orbax'.

  Orbax' own policy ranks by metrics that come with the save, but a step is
  evaluated afterwards.

  Attributes:
    latest: newest checkpoints to keep.
    every: also keep every step that is a multiple of it; 0 for none.
    best_metric: also keep the checkpoint with the smallest one; '' for none.
    scores: {evaluated step: its metric}; inf for one that is never the best.
  """

  latest: int
  every: int
  best_metric: str
  scores: dict[int, float] = dataclasses.field(default_factory=dict)

  def set_score(self, step: int, figures: Mapping[str, float | None]) -> None:
    """Ranks a step: last if its figures lack the metric, or it is NaN.

    A resumed run may rank by another metric than its older checkpoints hold.
    """
    value = figures.get(self.best_metric)
    if value is None or math.isnan(value):
      value = math.inf
    self.scores[step] = value

  def best(self, steps: Collection[int]) -> int | None:
    """The one with the smallest finite score, if any has one."""
    score, best = min(
      ((self.scores.get(step, math.inf), step) for step in steps),
      default=(math.inf, None),
    )
    return best if score < math.inf else None

  def kept(self, steps: Sequence[int]) -> set[int]:
    """Those of some steps, oldest first, that are kept."""
    kept = {*steps[-self.latest :], self.best(steps)}
    kept |= {s for s in steps if self.every and s % self.every == 0}
    return kept & {*steps}

  def should_preserve(
    self, checkpoints: Sequence[Any], *, context: Any
  ) -> list[bool]:
    """Answers Orbax, of checkpoints with a `step`."""
    del context
    kept = self.kept([checkpoint.step for checkpoint in checkpoints])
    return [checkpoint.step in kept for checkpoint in checkpoints]
