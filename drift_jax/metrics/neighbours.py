"""Nearest training images of generated ones: does the model memorise?

arXiv:2602.04770, B.4. The search is exact and holds the generated images'
features and one block of the training set's at a time; pictures and figures
show the neighbours.
"""

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Float64, Int64
from numpy.typing import ArrayLike

from drift_jax.metrics import distances, files, plots
from drift_jax.metrics.coverage import NEAR_QUANTILE
from drift_jax.metrics.images import image_grid

_PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


@dataclasses.dataclass(frozen=True, eq=False)
class Neighbours:
  """The k nearest training samples of N samples.

  Attributes:
    distance: [N, k] float64 Euclidean distances, ascending.
    index: [N, k] int64 numbers of the training samples in the order they were
      streamed.
    count: training samples that were searched.
  """

  distance: Float64[np.ndarray, "N k"]
  index: Int64[np.ndarray, "N k"]
  count: int


def nearest_neighbours(
  query: ArrayLike, blocks: Iterable[ArrayLike], k: int
) -> Neighbours:
  """Finds the exact k nearest training samples of each query (B.4).

  Distances are Euclidean, decided in float64 from differences of coordinates;
  for the order of cosine similarity, pass features of unit length. Equally near
  ones are ordered by number, so the result does not depend on how the training
  set is cut into blocks. Memory: the queries, one block as it came, k
  neighbours of each query and about 7 blocks of 2^22 float64 numbers.

  Args:
    query: [N, D] features, e.g. of generated images.
    blocks: features [M_i, D] of the training set, read once, in order.
    k: neighbours, >= 1; 10 in the paper.

  Raises:
    ValueError: for empty, non-finite or ill-matched features (naming the
      block), or fewer than k training samples in all.
  """
  if k < 1:
    raise ValueError(f"k must be at least 1, got {k}")
  (query,) = distances.as_points(query=query)

  def checked() -> Iterator[np.ndarray]:
    for number, block in enumerate(blocks):
      name = f"block {number} of the training set"
      yield distances.as_points(query=query[:1], **{name: block})[1]

  squared, index, count = distances.nearest(query, checked(), k)
  if count < k:
    raise ValueError(
      f"k = {k} neighbours among {count} training samples: valid are 1 to"
      f" {count}"
    )
  return Neighbours(np.sqrt(squared), index, count)


def neighbour_grid(
  generated: np.ndarray, neighbours: np.ndarray, *, padding: int, scale: int
) -> np.ndarray:
  """Each generated image beside its nearest training images, row by row.

  Args:
    generated: [N, H, W, C] in [-1, 1], C = 1 (grey) or 3 (RGB).
    neighbours: [N, k, H, W, C] in [-1, 1], nearest first.
    padding: white pixels between images; the generated column is set off by
      H * scale / 4 more.
    scale: each pixel becomes scale x scale equal ones.

  Returns:
    uint8 [rows, columns, 3], ready for `save_image`.
  """
  left = image_grid(generated, columns=1, padding=padding, scale=scale)
  columns = neighbours.shape[1]
  flat = neighbours.reshape(-1, *neighbours.shape[2:])
  right = image_grid(flat, columns=columns, padding=padding, scale=scale)
  gap = max(1, generated.shape[1] * scale // 4)
  white = np.full((len(left), gap, 3), 255, np.uint8)
  return np.concatenate([left, white, right], axis=1)


def distance_summary(
  generated: ArrayLike, heldout: ArrayLike
) -> dict[str, float]:
  """Distances to the nearest training sample, generated against held-out.

  A generator that memorises draws images nearer to the training set than new
  real images are.

  Args:
    generated: [N] distance of each generated sample to its nearest training
      sample.
    heldout: [H] the same for real samples that were not trained on.

  Returns:
    generated_pXX and heldout_pXX: percentiles 01, 05, 25, 50, 75, 95 and 99;
    threshold: the 1 % quantile of held-out distances;
    generated_closer, heldout_closer: fraction in [0, 1] strictly below the
    threshold, about 0.01 for held-out reals by construction;
    generated_identical, heldout_identical: fraction at distance 0;
    generated_count, heldout_count: N and H.
  """
  sets = {
    "generated": np.asarray(generated, np.float64),
    "heldout": np.asarray(heldout, np.float64),
  }
  threshold = float(np.quantile(sets["heldout"], NEAR_QUANTILE))
  summary = {
    f"{name}_p{percent:02d}": float(np.percentile(values, percent))
    for name, values in sets.items()
    for percent in _PERCENTILES
  }
  summary["threshold"] = threshold
  for name, values in sets.items():
    summary |= {
      f"{name}_closer": float(np.mean(values < threshold)),
      f"{name}_identical": float(np.mean(values == 0.0)),
      f"{name}_count": float(len(values)),
    }
  return summary


def plot_nearest_distances(
  generated: ArrayLike, heldout: ArrayLike, path: files.PathLike, *, space: str
) -> None:
  """Histogram and cumulative distribution of nearest distances as a PNG file.

  Args:
    generated, heldout: as in `distance_summary`.
    path: PNG file to write.
    space: names the feature space on the axis.
  """
  summary = distance_summary(generated, heldout)
  sets = (
    ("generated", np.asarray(generated, np.float64)),
    ("held-out real", np.asarray(heldout, np.float64)),
  )
  highest = max(float(values.max()) for _, values in sets)
  # A width of zero has no histogram: all distances may be 0.
  edges = np.linspace(0.0, highest or 1.0, 61)
  figure, axes = plots.new_figure((7.5, 6.4), 2, 1, sharex=True)
  histogram, cumulative = axes[:, 0]
  for (label, values), colour in zip(sets, plots.COLOURS, strict=False):
    fractions = np.histogram(values, edges)[0] / len(values)
    histogram.stairs(
      fractions, edges, label=label, color=colour, fill=True, alpha=0.45
    )
    cumulative.step(
      np.concatenate([[0.0], np.sort(values)]),
      np.arange(len(values) + 1) / len(values),
      where="post",
      label=label,
      color=colour,
      linewidth=1.6,
    )
  closer = f"{summary['generated_closer']:.1%} of generated are closer"
  for axis in (histogram, cumulative):
    label = f"1 % of held-out reals; {closer}"
    plots.dashed_line(axis, summary["threshold"], label, vertical=True)
  histogram.set_ylabel("fraction of images in a bin")
  figure.legend(
    *histogram.get_legend_handles_labels(),
    loc="outside upper center",
    ncols=3,
    frameon=False,
  )
  cumulative.set(
    xlim=(0.0, None),
    ylim=(0.0, 1.02),
    xlabel=f"Euclidean distance to the nearest training image ({space})",
    ylabel="fraction of images\nat or below the distance",
  )
  plots.save_figure(figure, path)
