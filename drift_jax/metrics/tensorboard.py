"""TensorBoard events without TensorFlow, in the shape that clu expects.

Importing clu.metric_writers imports TensorFlow for its SummaryWriter, unless a
module of that name is registered already: `register` does that, with a writer
built on tensorboardX. It must run before the first import of
clu.metric_writers, clu.periodic_actions or clu.checkpoint, and importing
drift_jax.metrics runs it.
"""

import os
import socket
import sys
import time
import types
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from drift_jax.system import storage

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
    from tensorboardX import record_writer, summary
    from tensorboardX.proto import event_pb2

    self._summary, self._events = summary, cast(Any, event_pb2)
    # Not by tensorboardX's SummaryWriter: it writes in a thread, which dies on
    # a full disk, and the run would then wait for it for ever.
    now = f"{time.time():.0f}.{socket.gethostname()}"
    self._path = os.path.join(logdir, f"events.out.tfevents.{now}")
    with storage.naming_errors(self._path):
      os.makedirs(logdir, exist_ok=True)
      self._writer: Any = record_writer.RecordWriter(self._path)
      self._write(file_version="brain.Event:2")
      if purge_step is not None:
        log = self._events.SessionLog
        start = log(status=log.START)
        self._write(step=purge_step, file_version="brain.Event:2")
        self._write(step=purge_step, session_log=start)

  def _write(self, **event: Any) -> None:
    with storage.naming_errors(self._path):
      made = self._events.Event(wall_time=time.time(), **event)
      self._writer.write(made.SerializeToString())

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    for name, value in scalars.items():
      number = float(np.asarray(value).item())
      self._write(step=step, summary=self._summary.scalar(name, number))
    with storage.naming_errors(self._path):
      self._writer._writer.flush()  # TensorBoard follows a run that goes on

  def write_images(self, step: int, images: Mapping[str, Any]) -> None:
    """Writes [H, W, C] or [N, H, W, C] (as name/0 ...), uint8 or in [0, 1]."""
    for name, value in images.items():
      array = np.asarray(value)
      named = {name: array}
      if array.ndim == 4:
        named = {f"{name}/{i}": image for i, image in enumerate(array)}
      for tag, image in named.items():
        made = self._summary.image(tag, image, dataformats="HWC")
        self._write(step=step, summary=made)

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    for name, value in texts.items():
      self._write(step=step, summary=self._summary.text(name, value))

  def write_histograms(
    self,
    step: int,
    arrays: Mapping[str, Any],
    num_buckets: Mapping[str, int] | None = None,
  ) -> None:
    """Writes histograms in tensorboardX's own buckets, whatever num_buckets."""
    for name, value in arrays.items():
      made = self._summary.histogram(name, np.asarray(value), "auto")
      self._write(step=step, summary=made)

  def write_hparams(self, hparams: Mapping[str, Any]) -> None:
    """Writes a table of hyper-parameters as text."""
    rows = [f"| {name} | {value} |" for name, value in sorted(hparams.items())]
    table = "\n".join(["| name | value |", "| --- | --- |", *rows])
    self._write(step=0, summary=self._summary.text("hparams", table))

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
    with storage.naming_errors(self._path):
      self._writer.flush()

  def close(self) -> None:
    with storage.naming_errors(self._path):
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
