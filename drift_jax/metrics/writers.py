"""Writers of a run's numbers: JSON lines and TensorBoard events."""

import json
import math
import os
import pathlib
import shutil
import socket
import sys
import tempfile
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from etils import epath

from drift_jax.metrics import files
from drift_jax.system import options, storage

_CLU_MODULE = "clu.metric_writers.summary_writer"


class SummaryWriter:
  """TensorBoard events without TensorFlow: clu's MetricWriter on tensorboardX.

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


# Importing clu.metric_writers, clu.periodic_actions or clu.checkpoint imports
# TensorFlow for clu's SummaryWriter, unless a module of its name is there.
_module = types.ModuleType(_CLU_MODULE, __doc__)
vars(_module)["SummaryWriter"] = SummaryWriter
sys.modules.setdefault(_CLU_MODULE, _module)

from clu.metric_writers import MetricWriter, MultiWriter  # noqa: E402

MetricWriter.register(SummaryWriter)

_FILE = "metrics.jsonl"
# Prefix of the names of an evaluation's figures.
EVALUATION = "eval/"
# A bucket's copy of the numbers is at most so much older than a write.
_UPLOAD_SECONDS = 60.0


def _records(path: files.PathLike) -> Iterator[tuple[str, dict[str, Any]]]:
  """(line, what it holds) of lines that end in a newline.

  A last one without was cut off by a kill.

  Raises:
    ValueError: when a line is no JSON object with a step, naming the line.
  """
  text = epath.Path(path).read_text(encoding="utf-8")
  lines = text[: text.rfind("\n") + 1].splitlines()
  for number, line in enumerate(lines, 1):
    try:
      record = json.loads(line)
      if not isinstance(record["step"], int):
        raise TypeError
    except (json.JSONDecodeError, KeyError, TypeError) as error:
      raise ValueError(
        f"{path}, line {number} is no JSON object with an integer 'step':"
        f" {line[:80]!r}"
      ) from error
    yield line, record


def read_jsonl(path: files.PathLike) -> list[dict[str, float | int]]:
  """Reads metrics.jsonl: one dict {"step": int, name: float} a line, in order.

  null (a number that was not finite) is read as NaN. A last line without its
  newline, of a process that was killed, is left out.

  Raises:
    ValueError: when a line is no JSON object with a step, naming the line.
  """
  return [
    {k: math.nan if value is None else value for k, value in record.items()}
    for _, record in _records(path)
  ]


def _drop_later_lines(
  path: pathlib.Path, resume_step: int, evaluated: bool
) -> None:
  """Keeps the complete lines with step <= resume_step, byte for byte.

  But for those of an evaluation of resume_step that will be made again.
  """

  def stays(record: dict[str, Any]) -> bool:
    if record["step"] != resume_step or evaluated:
      return record["step"] <= resume_step
    figures = [name for name in record if name.startswith(EVALUATION)]
    return len(record) > 1 and not figures

  kept = [line + "\n" for line, record in _records(path) if stays(record)]
  with files.replacing(path) as temporary:
    temporary.write_text("".join(kept), encoding="utf-8")


class JsonlWriter(MultiWriter):
  """Scalars as JSON lines; images and everything else are left to others.

  Each call of write_scalars makes one line, {"step": step, name: value, ...},
  which is handed to the operating system at once. Non-finite numbers become
  null, since JSON has none.
  """

  def __init__(
    self, path: files.PathLike, resume_step: int, *, evaluated: bool = True
  ):
    """Opens path for appending.

    Args:
      path: file of JSON lines; made with its folder when missing.
      resume_step: lines of later steps are dropped first, atomically. A resumed
        run that repeats them thus ends with the file of an uninterrupted one.
        -1 drops all: a fresh start.
      evaluated: False drops the figures of resume_step as well.
    """
    super().__init__([])  # ignores all but scalars
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
      _drop_later_lines(path, resume_step, evaluated)
    self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    """Appends one line.

    Raises:
      ValueError: a value that is not a single number.
    """
    record: dict[str, float | int | None] = {"step": int(step)}
    for name, value in scalars.items():
      number = float(np.asarray(jax.device_get(value)).item())
      record[name] = number if math.isfinite(number) else None
    with storage.naming_errors(self._file.name):
      self._file.write(json.dumps(record, allow_nan=False) + "\n")
      self._file.flush()

  def close(self) -> None:
    with storage.naming_errors(self._file.name):
      self._file.close()


class _Uploading(MultiWriter):
  """Writers to a local folder whose files are copied to a bucket.

  An object can't be appended to, so a file that has grown is written anew: at
  flush(), at close(), and when _UPLOAD_SECONDS have passed.
  """

  def __init__(
    self, writers: Sequence[Any], folder: pathlib.Path, workdir: files.PathLike
  ):
    super().__init__(writers)
    self._folder = folder
    self._workdir = epath.Path(workdir)
    self._sizes: dict[str, int] = {}
    self.flush()

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    super().write_scalars(step, scalars)
    if time.monotonic() - self._uploaded >= _UPLOAD_SECONDS:
      self.flush()

  def flush(self) -> None:
    super().flush()
    self._upload()

  def close(self) -> None:
    super().close()
    try:
      self._upload()
    finally:
      shutil.rmtree(self._folder)

  def _upload(self) -> None:
    for path in sorted(self._folder.iterdir()):
      size = path.stat().st_size
      if self._sizes.get(path.name) != size:
        storage.upload(path, self._workdir / path.name)
        self._sizes[path.name] = size
    self._uploaded = time.monotonic()


def create_writer(
  workdir: files.PathLike,
  *,
  resume_step: int,
  is_main: bool,
  evaluated: bool = True,
  names: Sequence[options.Writer] = ("jsonl", "tensorboard"),
  config: Mapping[str, Any] | None = None,
) -> MultiWriter:
  """clu's MultiWriter for a training run.

  Args:
    workdir: gets metrics.jsonl and TensorBoard event files.
    resume_step: step of the checkpoint that the run goes on from; later records
      are dropped from metrics.jsonl and hidden in TensorBoard. -1 for a fresh
      start, which drops all.
    is_main: False for all processes but one: they write nothing and touch no
      file.
    evaluated: False if resume_step will be evaluated again: figures of it
      are dropped from metrics.jsonl too.
    names: where to write.
    config: the resolved config, for services.

  Returns:
    A writer whose write_scalars(step, {name: number}) and write_images(step,
    {name: uint8 [H, W, 3]}) may be called any number of times a step.

  Raises:
    ConfigError: a service that can't start.
  """
  if not is_main:
    return MultiWriter([])
  services: list[Any] = []
  if asked := [name for name in names if name in options.SERVICES]:
    from drift_jax.metrics.services import start

    services = start(asked, workdir, config or {})
  folder = pathlib.Path(workdir)
  if storage.is_remote(workdir):
    folder = pathlib.Path(tempfile.mkdtemp(prefix="drift_jax_"))
    earlier = epath.Path(workdir) / _FILE
    if earlier.exists():
      (folder / _FILE).write_bytes(earlier.read_bytes())
  writers: list[Any] = []
  if "jsonl" in names:
    writers += [JsonlWriter(folder / _FILE, resume_step, evaluated=evaluated)]
  if "tensorboard" in names:
    writers += [SummaryWriter(str(folder), purge_step=resume_step + 1)]
  if storage.is_remote(workdir):
    writers = [_Uploading(writers, folder, workdir)]
  return MultiWriter([*writers, *services])
