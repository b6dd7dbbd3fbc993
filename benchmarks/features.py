"""Figures from features, on the host: seconds and memory beside a short script.

All run in a process of their own, without torch and without a device. What they
are given lives there before they start; memory is what comes on top, in whole
pages, results included.
"""

import concurrent.futures
import dataclasses
import multiprocessing
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from absl import logging
from scipy import linalg

from benchmarks import plain_figures
from benchmarks.timing import Case, Peak, Report, Row
from drift_jax.metrics.coverage import precision_recall
from drift_jax.metrics.frechet import (
  FeatureStats,
  FeatureStream,
  frechet_distance,
)
from drift_jax.metrics.inception import InceptionScore
from drift_jax.metrics.kid import kernel_distance_subsets
from drift_jax.metrics.neighbours import nearest_neighbours


@dataclasses.dataclass(frozen=True)
class Sizes:
  """How much each section works on; those of published figures.

  Attributes:
    generated: samples, also those that neighbours are searched in.
    dimensions: of features.
    classes, splits: of the Inception score.
    batch: samples that come at a time.
    singular: samples of a covariance without full rank.
    compared: reals, and as many fakes, for precision, recall and KID.
    k: neighbours.
    subsets, subset_size: of KID.
    queries: samples whose neighbours are searched.
  """

  generated: int = 50_000
  dimensions: int = 2048
  classes: int = 1008
  splits: int = 10
  batch: int = 250
  singular: int = 1000
  compared: int = 10_000
  k: int = 3
  subsets: int = 100
  subset_size: int = 1000
  queries: int = 1000


TINY = Sizes(
  generated=60,
  dimensions=8,
  classes=5,
  splits=2,
  batch=16,
  singular=6,
  compared=40,
  subsets=3,
  subset_size=10,
  queries=7,
)


def rows(report: Report, sizes: Sizes, seconds: float) -> None:
  """Adds the rows of all sections, each timed for so many seconds a row."""
  with concurrent.futures.ProcessPoolExecutor(
    1, mp_context=multiprocessing.get_context("spawn")
  ) as process:
    report.rows += process.submit(_all_rows, sizes, seconds).result()


def _all_rows(sizes: Sizes, seconds: float) -> list[Row]:
  """Runs in the other process."""
  jax.config.update("jax_platforms", "cpu")
  jax.process_count()  # starts JAX, whose memory is not of a figure
  for dtype in (np.float32, np.float64):  # so do the libraries of NumPy, SciPy
    ones = np.ones((512, 512), dtype)
    linalg.eigvalsh(ones @ ones)
  logging.set_verbosity(logging.ERROR)  # no warnings of too few samples
  report = Report(seconds)
  _statistics(report, sizes)
  _kept(report, sizes)
  _frechet(report, sizes, 3 * sizes.dimensions, "full rank")
  _frechet(report, sizes, sizes.singular, f"rank {sizes.singular - 1}")
  _inception_score(report, sizes)
  _precision_recall(report, sizes)
  _kernel_distance(report, sizes)
  _neighbours(report, sizes)
  return report.rows


def _compare(
  report: Report,
  section: str,
  name: str,
  ours: Callable[[], object],
  plain: Callable[[], object],
  *,
  script: str,
  once: bool = False,
) -> None:
  """Adds a row of seconds and one of memory; both give (nearly) one result.

  Args:
    report: gets the rows.
    section, name: of the rows.
    ours, plain: give numbers.
    script: names the plain way.
    once: see `Report.compare`.
  """
  results: dict[str, np.ndarray] = {}

  def keep(key: str, run: Callable[[], object]) -> Callable[[], object]:
    def kept() -> None:
      results[key] = np.asarray(run(), np.float64)

    return kept

  peak, plain_peak = Peak(), Peak()
  report.compare(
    section,
    "s",
    1,
    plain_peak.around(keep("plain", plain)),
    {name: peak.around(keep("ours", ours))},
    once=once,
  )
  difference = np.abs(results["ours"] - results["plain"]).max()
  difference /= np.abs(results["plain"]).max()
  note = f"plain: {script}; results differ by {difference:.0e} (relative)"
  report.rows[-1] = dataclasses.replace(report.rows[-1], note=note)
  _add_memory(report, section, name, peak, plain_peak)


def _add_memory(
  report: Report,
  section: str,
  name: str,
  peak: Peak,
  plain: Peak | None = None,
  note: str = "",
) -> None:
  times = None
  if plain and peak.bytes > 0:
    times = plain.bytes / peak.bytes
  of_plain = plain and plain.bytes / 1e6
  name = f"{name}: memory"
  report.add(section, name, "MB", peak.bytes / 1e6, of_plain, times, note)


def draw(count: int, width: int, seed: int) -> np.ndarray:
  """Normal float32, of scales from 1 down to 0.01, as spectra are."""
  random = np.random.default_rng(seed)
  features = random.standard_normal((count, width), np.float32)
  features *= np.logspace(0, -2, width, dtype=np.float32)
  return features


def _batches(array: np.ndarray, size: int) -> Iterator[np.ndarray]:
  for start in range(0, len(array), size):
    yield array[start : start + size]


def _statistics(report: Report, sizes: Sizes) -> None:
  features = draw(sizes.generated, sizes.dimensions, 0)

  def ours() -> np.ndarray:
    stream = FeatureStream()
    for batch in _batches(features, sizes.batch):
      stream.update(batch)
    return stream.result().covariance()

  def plain() -> np.ndarray:
    held = np.empty(features.shape)
    start = 0
    for batch in _batches(features, sizes.batch):
      held[start : start + len(batch)] = batch
      start += len(batch)
    return np.cov(held, rowvar=False)

  section = (
    f"mean and covariance of {sizes.generated} x {sizes.dimensions}, batches"
    f" of {sizes.batch}"
  )
  script = "all held in float64, numpy.cov, as in pytorch-fid"
  _compare(report, section, "FeatureStream", ours, plain, script=script)


def _kept(report: Report, sizes: Sizes) -> None:
  """What figures of single samples need."""

  def batches() -> Iterator[np.ndarray]:
    for start in range(0, sizes.generated, sizes.batch):
      count = min(sizes.batch, sizes.generated - start)
      yield np.ones((count, sizes.dimensions), np.float32)

  def joined() -> None:
    np.concatenate(list(batches()))

  def filled() -> None:
    held = np.empty((sizes.generated, sizes.dimensions), np.float32)
    start = 0
    for batch in batches():
      held[start : start + len(batch)] = batch
      start += len(batch)

  section = f"{sizes.generated} x {sizes.dimensions} features held, float32"
  for name, run in (
    ("batches, joined at the end", joined),
    ("filled in place", filled),
  ):
    peak = Peak()
    peak.around(run).seconds(time.perf_counter)
    _add_memory(report, section, name, peak)


def _frechet(report: Report, sizes: Sizes, count: int, name: str) -> None:
  a, b = (
    FeatureStats.from_features(draw(count, sizes.dimensions, seed))
    for seed in range(2)
  )
  _compare(
    report,
    f"Frechet distance of {sizes.dimensions} dimensions",
    name,
    lambda: frechet_distance(a, b),
    lambda: plain_figures.frechet_distance(a, b),
    script="scipy.linalg.sqrtm, as in pytorch-fid",
    once=sizes.dimensions > 1000,
  )


def _inception_score(report: Report, sizes: Sizes) -> None:
  count = sizes.generated // sizes.splits * sizes.splits
  logits = draw(count, sizes.classes, 0) * 4

  def ours() -> tuple[float, float]:
    score = InceptionScore(count, sizes.classes, sizes.splits)
    numbers = np.arange(count)
    for batch, indices in zip(
      _batches(logits, sizes.batch),
      _batches(numbers, sizes.batch),
      strict=True,
    ):
      score.update(batch, indices)
    return score.result()

  section = (
    f"Inception score of {count} x {sizes.classes}, batches of {sizes.batch}"
  )
  plain = lambda: plain_figures.inception_score(logits, sizes.splits)  # noqa: E731
  script = "all probabilities in float64"
  _compare(report, section, "InceptionScore", ours, plain, script=script)


def _precision_recall(report: Report, sizes: Sizes) -> None:
  count = sizes.compared
  real, fake = (draw(count, sizes.dimensions, seed) for seed in range(2))
  section = f"precision and recall, {sizes.dimensions} dimensions"
  _compare(
    report,
    section,
    f"{count} reals, {count} fakes",
    lambda: precision_recall(real, fake, sizes.k),
    lambda: plain_figures.precision_recall(real, fake, sizes.k),
    script="three whole matrices of distances, in float32; ours: float64",
    once=count > 1000,
  )
  part = 5
  fake = draw(sizes.generated // part, sizes.dimensions, 2)
  run = Case(lambda: precision_recall(real[: count // part], fake, sizes.k))
  report.add(
    section,
    f"{count} reals, {sizes.generated} fakes, estimated",
    "s",
    run.seconds(time.perf_counter) * part**2,
    note=f"{part**2} times the time of {count // part} and {len(fake)}",
  )


def _kernel_distance(report: Report, sizes: Sizes) -> None:
  real, fake = (
    draw(sizes.compared, sizes.dimensions, seed) for seed in range(2)
  )
  fake += 0.5  # a distance that float32 can tell from 0
  _compare(
    report,
    f"KID, {sizes.dimensions} dimensions",
    f"{sizes.subsets} subsets of {sizes.subset_size}",
    lambda: kernel_distance_subsets(
      real,
      fake,
      subsets=sizes.subsets,
      subset_size=sizes.subset_size,
      seed=0,
    )[0],
    lambda: plain_figures.kernel_distance_subsets(
      real, fake, subsets=sizes.subsets, size=sizes.subset_size, seed=0
    ),
    script="the same in float32; ours: float64",
    once=sizes.subsets > 10,
  )


def _neighbours(report: Report, sizes: Sizes) -> None:
  query = draw(sizes.queries, sizes.dimensions, 0)
  searched = draw(sizes.generated, sizes.dimensions, 1)

  def ours() -> np.ndarray:
    blocks = _batches(searched, sizes.batch)
    return nearest_neighbours(query, blocks, sizes.k).distance

  def plain() -> np.ndarray:
    squares = plain_figures.squared_distances(query, searched)
    nearest = np.partition(squares, sizes.k, axis=1)[:, : sizes.k]
    return np.sqrt(np.sort(nearest, axis=1))

  section = f"neighbours, {sizes.dimensions} dimensions"
  name = f"{sizes.k} nearest of {sizes.generated} to {sizes.queries}"
  script = "a whole matrix of distances, in float32; ours: float64"
  _compare(report, section, name, ours, plain, script=script)
