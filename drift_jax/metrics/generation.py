"""Drawing exactly the samples that an evaluation asks for."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from drift_jax.metrics import files
from drift_jax.metrics.batches import Batch, PixelsFn, local_batches, one_late
from drift_jax.metrics.evaluators import Evaluator, Figures, merge_figures
from drift_jax.metrics.images import to_rgb
from drift_jax.system import options, paths, processes
from drift_jax.system.errors import EvaluationError
from drift_jax.system.storage import read_npy

SampleFn = Callable[[np.ndarray, np.ndarray, np.ndarray], jax.Array]


def balanced_labels(num_samples: int, num_classes: int) -> np.ndarray:
  """Labels 0, 1, ..., num_classes - 1, 0, 1, ...: [num_samples] int32.

  Raises:
    ValueError: when num_classes does not divide num_samples, naming the nearest
      counts that it divides.
  """
  if num_samples < 1 or num_samples % num_classes:
    below = num_samples - num_samples % num_classes
    valid = [n for n in (below, below + num_classes) if n]
    raise ValueError(
      f"num_samples={num_samples} cannot be balanced over"
      f" num_classes={num_classes}; the nearest valid counts are"
      f" {' and '.join(map(str, valid))}"
    )
  return np.arange(num_samples, dtype=np.int32) % np.int32(num_classes)


def in_order(labels: np.ndarray, order: options.LabelOrder) -> np.ndarray:
  """The labels as they are given, or sorted by class."""
  return np.sort(labels) if order == "class" else labels


def read_labels(
  path: files.PathLike, *, num_classes: int, count: int | None
) -> np.ndarray:
  """Labels [N] int32 that a file lists, in its order.

  Args:
    path: .npy of integers [N], or a text with one class index a line.
    num_classes: labels lie in [0, num_classes).
    count: N, or None for as many as there are.

  Raises:
    FileNotFoundError: when there is no such file.
    ValueError: for anything that is no label, naming it, or another count.
  """
  name = paths.expand(path)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", UserWarning)  # of an empty text
      labels = (
        read_npy(name) if name.endswith(".npy") else np.loadtxt(name, np.int64)
      )
  except ValueError as error:
    raise ValueError(f"{name} lists no labels: {error}") from error
  labels = np.atleast_1d(labels)
  if labels.ndim != 1 or not labels.size or labels.dtype.kind not in "iu":
    raise ValueError(
      f"{name} must list class indices, one a line (.txt), or as integers [N]"
      f" (.npy), found {labels.dtype} {labels.shape}"
    )
  wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
  if len(wrong):
    raise ValueError(
      f"{name}: entry {wrong[0]} is {labels[wrong[0]]}, labels lie in"
      f" [0, {num_classes})"
    )
  if count not in (None, len(labels)):
    raise ValueError(
      f"{name} lists {len(labels)} labels, but num_samples={count}: give a list"
      " of as many, or 0 for as many as it lists"
    )
  return labels.astype(np.int32)


@jax.jit
def _non_finite(samples: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(whether a sample is not finite, which are not [B])."""
  bad = ~jnp.isfinite(samples).all(axis=(1, 2, 3))
  return bad.any(), bad


def _check_finite(batch: Batch, alpha: float) -> None:
  """Raises in all processes if a sample of any of them is not finite."""
  some, bad = _non_finite(batch.samples)
  if not bool(some):
    return
  local = np.stack([batch.index, batch.labels], axis=1)[batch.rows(bad)]
  all_bad = np.concatenate(processes.gather(local))
  number, label = min(map(tuple, all_bad.tolist()))
  raise EvaluationError(
    f"generated sample {number} (label {label}, alpha {alpha}) is not finite;"
    f" {len(all_bad)} of its batch are not"
  )


def generate(
  sample_fn: SampleFn,
  labels: np.ndarray,
  alpha: float,
  *,
  batch_size: int,
  to_pixels: PixelsFn = to_rgb,
  numbers: np.ndarray | None = None,
) -> Iterator[Batch]:
  """Draws one sample for each label, in batches of one compiled shape.

  The last batch is filled up by repeating its last sample, and no row of these
  is handed out: exactly N samples come out of all processes, each once. If the
  noise of a sample depends on its number alone, the samples do not depend on
  batch_size, devices or processes. The next batch is under way when one is
  handed out.

  Args:
    sample_fn: (labels [b] int32, alpha [b] float32, index [b] int32), NumPy
      arrays of this process' part of a batch, b = batch_size / processes ->
      samples [batch_size, H, W, C]. index numbers the samples 0 ... N - 1.
    labels: [N] integers, the same in all processes.
    alpha: guidance scale, the same for all samples.
    batch_size: samples per call of all processes together.
    to_pixels: samples -> 8-bit RGB images; called for `Batch.pixels` only.
    numbers: [n] int32, the samples to draw; None: all N.

  Raises:
    EvaluationError: a sample that is not finite, naming its number, label and
      alpha: 8-bit images would show it black.
    ValueError: a batch_size that the processes can't share.
  """
  labels = np.asarray(labels, np.int32)
  if numbers is None:
    numbers = np.arange(len(labels), dtype=np.int32)

  def drawn() -> Iterator[Batch]:
    for position, valid in local_batches(len(numbers), batch_size):
      index = numbers[position]
      alphas = np.full(len(index), alpha, np.float32)
      samples = sample_fn(labels[index], alphas, index)
      index = index[:valid]
      yield Batch(samples, index, labels[index], to_pixels)

  for batch in one_late(drawn()):
    _check_finite(batch, alpha)
    yield batch


def evaluate(
  evaluators: Sequence[Evaluator],
  sample_fn: SampleFn,
  labels: np.ndarray,
  alphas: Sequence[float],
  batch_size: int,
  *,
  to_pixels: PixelsFn = to_rgb,
  check: Callable[[], None] = lambda: None,
) -> dict[float, Figures]:
  """Figures of all evaluators for each guidance scale alpha.

  Each sample is drawn once per alpha and handed to every evaluator. Sample
  numbers restart at 0 for each alpha, so the same noise is compared. Several
  processes share the work; each returns the figures of all samples.

  Args:
    evaluators: they are reset for each alpha.
    sample_fn, labels, batch_size, to_pixels: as in `generate`.
    alphas: guidance scales, each once.
    check: called before each batch is looked at, in all processes as often;
      what it raises ends the evaluation.

  Returns:
    {alpha: {figure: value}} in the order of alphas.

  Raises:
    EvaluationError: when a generated sample is not finite (naming its alpha,
      number and label), or a figure is not (naming it).
    ValueError: alphas that repeat.
  """
  if len(set(alphas)) < len(alphas):
    raise ValueError(f"alphas repeat: {list(alphas)}")
  results = {}
  for alpha in map(float, alphas):
    for evaluator in evaluators:
      evaluator.reset()
    for batch in generate(
      sample_fn, labels, alpha, batch_size=batch_size, to_pixels=to_pixels
    ):
      check()
      for evaluator in evaluators:
        evaluator.update(batch)
    results[alpha] = merge_figures(
      (evaluator.name, evaluator.result()) for evaluator in evaluators
    )
  return results


def evaluation_scalars(
  results: Mapping[float, Figures], baseline: Figures
) -> Figures:
  """Flat names for a metrics file.

  `eval/FIGURE/alpha_A` for results[A][FIGURE], A written as a Python float
  (`eval/fd_pixel/alpha_1.0`), and `eval/FIGURE/baseline` for baseline[FIGURE].
  """
  named = {f"alpha_{float(alpha)}": each for alpha, each in results.items()}
  return {
    f"eval/{figure}/{name}": float(value)
    for name, figures in {**named, "baseline": baseline}.items()
    for figure, value in figures.items()
  }
