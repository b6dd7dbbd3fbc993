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
    # Imported at use: it takes a third of a second with google-cloud-storage.
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
      self._write(step=purge_step, file_version="brain.Event:2")
      self._write(step=purge_step, session_log=log(status=log.START))

  def _write(self, **event: Any) -> None:
    with storage.naming_errors(self._path):
      record = self._events.Event(wall_time=time.time(), **event)
      self._writer.write(record.SerializeToString())

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    for name, value in scalars.items():
      number = float(np.asarray(value).item())
      self._write(step=step, summary=self._summary.scalar(name, number))
    with storage.naming_errors(self._path):
      self._writer._writer.flush()  # TensorBoard follows a run that goes on

  def write_images(self, step: int, images: Mapping[str, Any]) -> None:
    """Writes [H, W, C], uint8 or in [0, 1]."""
    for name, value in images.items():
      image = self._summary.image(name, np.asarray(value), dataformats="HWC")
      self._write(step=step, summary=image)

  def _refuse(self, *values: Any, **options: Any) -> None:
    raise ValueError("only scalars and images are written to TensorBoard")

  write_texts = write_histograms = write_hparams = _refuse
  write_summaries = write_videos = write_audios = _refuse

  def flush(self) -> None:
    with storage.naming_errors(self._path):
      self._writer.flush()

  def close(self) -> None:
    with storage.naming_errors(self._path):
      self._writer.close()


def register() -> None:
  """Makes clu.metric_writers importable without TensorFlow."""
  module = types.ModuleType(_CLU_MODULE, __doc__)
  vars(module)["SummaryWriter"] = SummaryWriter
  sys.modules.setdefault(_CLU_MODULE, module)
