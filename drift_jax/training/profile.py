"""A profile of some steps, for TensorBoard and Perfetto."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from drift_jax.config.checks import profile_window
from drift_jax.system import processes, storage
from drift_jax.system.console import logger

FOLDER = "profile"


class Profile:
  """Traces the steps of a window in the first process, by JAX's profiler."""

  def __init__(self, window: str, workdir: epath.Path, steps: range):
    """Traces nothing yet.

    Args:
      window: train.profile.
      workdir: gets profile/, which TensorBoard's plugin and Perfetto read.
      steps: of this start.
    """
    first, count = profile_window(window)
    if first not in steps:
      logger.warning(
        "train.profile=%s traces nothing: this start has steps %d to %d.",
        window,
        steps.start,
        steps.stop - 1,
      )
    self._starts = first if count and processes.is_first() else 0
    self._ends = first + count
    self._last = 0  # that was traced
    self._folder = workdir / FOLDER
    self._tracing = contextlib.ExitStack()

  def __call__(self, step: int, state: Any) -> None:
    """Begins or ends the trace before a step, when the device is idle."""
    if self._starts <= step < self._ends:
      self._last = step
    if self._starts and step in (self._starts, self._ends):
      jax.block_until_ready(state)
      self.close()
      if step == self._starts:
        self._tracing.enter_context(self._trace())

  def close(self) -> None:
    """Ends a trace that goes on."""
    self._tracing.close()

  @contextlib.contextmanager
  def _trace(self) -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
      # 1. The profiler writes to disks only.
      with jax.profiler.trace(folder):
        yield
      # 2. To the workdir, wherever it is.
      for file in sorted(pathlib.Path(folder).rglob("*")):
        if file.is_file():
          target = self._folder / os.fspath(file.relative_to(folder))
          target.parent.mkdir(parents=True, exist_ok=True)
          with storage.naming_errors(target):
            target.write_bytes(file.read_bytes())
    logger.info(
      "Profile of steps %d to %d: tensorboard --logdir=%s (it needs "
      "tensorboard-plugin-profile).",
      self._starts,
      self._last,
      self._folder,
    )
