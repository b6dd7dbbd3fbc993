"""TensorBoard events without TensorFlow, in the shape that clu expects.

Importing clu.metric_writers imports TensorFlow for its SummaryWriter, unless a
module of that name is registered already: `register` does that, with a writer
built on tensorboardX. It must run before the first import of
clu.metric_writers, clu.periodic_actions or clu.checkpoint, and importing
drift_jax.metrics runs it.
"""

import sys
import types
from collections.abc import Mapping
from typing import Any

import numpy as np

_CLU_MODULE = "clu.metric_writers.summary_writer"


class SummaryWriter:
  """clu's MetricWriter interface on tensorboardX.

  It is no subclass of clu's interface because importing that needs this class.
  """

  def __init__(self, logdir: str, purge_step: int | None = None):
    """Opens a new event file.

    Args:
      logdir: folder of event files.
      purge_step: TensorBoard hides what earlier files hold at this step and
        later; None hides nothing.
    """
    # Imported where it is used: a third of a second with google-cloud-storage.
    import tensorboardX

    self._writer = tensorboardX.SummaryWriter(logdir, purge_step=purge_step)

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    for name, value in scalars.items():
      self._writer.add_scalar(name, float(np.asarray(value).item()), step)

  def write_images(self, step: int, images: Mapping[str, Any]) -> None:
    """Writes [H, W, C] or [N, H, W, C] (as name/0 ...), uint8 or in [0, 1]."""
    for name, value in images.items():
      array = np.asarray(value)
      if array.ndim == 3:
        self._writer.add_image(name, array, step, dataformats="HWC")
        continue
      for i, image in enumerate(array):
        self._writer.add_image(f"{name}/{i}", image, step, dataformats="HWC")

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    for name, value in texts.items():
      self._writer.add_text(name, value, step)

  def write_histograms(
    self,
    step: int,
    arrays: Mapping[str, Any],
    num_buckets: Mapping[str, int] | None = None,
  ) -> None:
    """Writes histograms in tensorboardX's own buckets, whatever num_buckets."""
    for name, value in arrays.items():
      self._writer.add_histogram(name, np.asarray(value), step)

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    """Writes a table of hyper-parameters as text."""
    rows = [f"| {name} | {value} |" for name, value in sorted(hparams.items())]
    self._writer.add_text(
      "hparams", "\n".join(["| name | value |", "| --- | --- |", *rows]), 0
    )

  def write_summaries(
    self,
    step: int,
    values: Mapping[str, Any],
    metadata: Mapping[str, Any] | None = None,
  ) -> None:
    raise _unsupported("raw summaries", values)

  def write_videos(self, step: int, videos: Mapping[str, Any]) -> None:
    raise _unsupported("videos", videos)

  def write_audios(
    self, step: int, audios: Mapping[str, Any], *, sample_rate: int
  ) -> None:
    raise _unsupported("audio", audios)

  def flush(self) -> None:
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()


def _unsupported(kind: str, values: Mapping[str, Any]) -> ValueError:
  return ValueError(
    f"cannot write {kind} ({', '.join(values)}) to TensorBoard without"
    " TensorFlow; write scalars, images, texts or histograms"
  )


def register() -> None:
  """Makes clu.metric_writers importable without TensorFlow."""
  module = types.ModuleType(_CLU_MODULE, __doc__)
  vars(module)["SummaryWriter"] = SummaryWriter
  sys.modules.setdefault(_CLU_MODULE, module)
