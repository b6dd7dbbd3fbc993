"""Drawing exactly the samples that an evaluation asks for."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np

from drift_jax.metrics.evaluators import Evaluator, merge_figures

SampleFn = Callable[
  [np.ndarray, np.ndarray, np.ndarray], np.ndarray | jax.Array
]


def balanced_labels(num_images: int, num_classes: int) -> np.ndarray:
  """Labels 0, 1, ..., num_classes - 1, 0, 1, ...: [num_images] int32.

  Raises:
    ValueError: when num_classes does not divide num_images, naming the nearest
      counts that it divides.
  """
  if num_classes < 1 or num_images < 1:
    raise ValueError(
      "balanced labels need at least one image and one class, got"
      f" num_images={num_images}, num_classes={num_classes}"
    )
  if num_images % num_classes:
    below = num_images - num_images % num_classes
    valid = [n for n in (below, below + num_classes) if n]
    raise ValueError(
      f"num_images={num_images} cannot be balanced over"
      f" num_classes={num_classes}; the nearest valid counts are"
      f" {' and '.join(map(str, valid))}"
    )
  return np.arange(num_images, dtype=np.int32) % np.int32(num_classes)


def generate(
  sample_fn: SampleFn, labels: np.ndarray, alpha: float, *, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Draws one image for each label, in batches of one compiled shape.

  The last batch is filled up by repeating its last sample, and its output is
  trimmed: exactly N images come out, each once. If the noise of a sample
  depends on its index alone, the images do not depend on batch_size.

  Args:
    sample_fn: (labels [batch_size] int32, alpha [batch_size] float32, index
      [batch_size] int32) -> images [batch_size, H, W, C]. Arguments are NumPy
      arrays; index numbers the samples 0 ... N - 1. The result must be
      addressable in full by this process.
    labels: [N] integers.
    alpha: guidance scale, the same for all samples.
    batch_size: samples per call, >= 1.

  Yields:
    (images [B, H, W, C] float32, labels [B] int32), B = batch_size but in the
    last one.

  Raises:
    ValueError: for empty or ill-shaped labels, batch_size < 1, or images of
      another shape.
  """
  labels = np.asarray(labels)
  if labels.ndim != 1 or not labels.size or labels.dtype.kind not in "iu":
    raise ValueError(
      f"labels must be a non-empty [N] integer array, got {labels.dtype}"
      f" {labels.shape}"
    )
  if batch_size < 1:
    raise ValueError(f"batch_size must be at least 1, got {batch_size}")
  labels = labels.astype(np.int32)
  scales = np.full(batch_size, alpha, np.float32)
  for start in range(0, len(labels), batch_size):
    index = np.arange(start, start + batch_size, dtype=np.int32)
    index = np.minimum(index, np.int32(len(labels) - 1))
    images = np.asarray(
      jax.device_get(sample_fn(labels[index], scales, index))
    ).astype(np.float32)
    if images.ndim != 4 or len(images) != batch_size:
      raise ValueError(
        f"sample_fn must return [{batch_size}, H, W, C] images, got shape"
        f" {images.shape}"
      )
    valid = min(batch_size, len(labels) - start)
    yield images[:valid], labels[start : start + valid]


def _check_finite(
  images: np.ndarray, labels: np.ndarray, alpha: float, start: int
) -> None:
  finite = np.isfinite(images).all(axis=(1, 2, 3))
  if not finite.all():
    first = int(np.argmin(finite))
    raise ValueError(
      f"generated image {start + first} (label {labels[first]}, alpha {alpha})"
      f" is not finite; {np.count_nonzero(~finite)} of its batch of"
      f" {len(images)} are not"
    )


def evaluate(
  evaluators: Sequence[Evaluator],
  sample_fn: SampleFn,
  labels: np.ndarray,
  alphas: Sequence[float],
  batch_size: int,
) -> dict[float, dict[str, float]]:
  """Figures of all evaluators for each guidance scale alpha.

  Each image is drawn once per alpha and handed to every evaluator. Sample
  numbers restart at 0 for each alpha, so the same noise is compared.

  Args:
    evaluators: at least one; they are reset for each alpha.
    sample_fn, labels, batch_size: as in `generate`.
    alphas: guidance scales, each once.

  Returns:
    {alpha: {figure: value}} in the order of alphas.

  Raises:
    ValueError: when a generated image is not finite (naming its alpha, index
      and label), two evaluators report the same figure, or alphas or evaluators
      are empty or repeat.
  """
  scales = [float(alpha) for alpha in alphas]
  if not evaluators or not scales or len(set(scales)) < len(scales):
    raise ValueError(
      "evaluate needs at least one evaluator and distinct alphas, got"
      f" {len(evaluators)} evaluators and alphas {scales}"
    )
  results = {}
  for alpha in scales:
    for evaluator in evaluators:
      evaluator.reset()
    start = 0
    for images, batch_labels in generate(
      sample_fn, labels, alpha, batch_size=batch_size
    ):
      _check_finite(images, batch_labels, alpha, start)
      start += len(images)
      for evaluator in evaluators:
        evaluator.update(images, batch_labels)
    results[alpha] = merge_figures(
      (evaluator.name, evaluator.result()) for evaluator in evaluators
    )
  return results


def evaluation_scalars(
  results: Mapping[float, Mapping[str, float]], baseline: Mapping[str, float]
) -> dict[str, float]:
  """Flat names for a metrics file.

  `eval/FIGURE/alpha_A` for results[A][FIGURE], A written as a Python float
  (`eval/fd_pixel/alpha_1.0`), and `eval/FIGURE/baseline` for baseline[FIGURE].
  """
  scalars = {
    f"eval/{figure}/alpha_{float(alpha)}": float(value)
    for alpha, figures in results.items()
    for figure, value in figures.items()
  }
  scalars |= {
    f"eval/{figure}/baseline": float(value)
    for figure, value in baseline.items()
  }
  return scalars
