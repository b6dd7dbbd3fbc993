"""What a run says of itself at its start and at its end."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from drift_jax.system import processes
from drift_jax.system.console import logger
from drift_jax.training.checkpoint import Checkpointer

SECONDS_FILE = "compile_seconds.txt"
# Networks of more parameters take days to train on a CPU.
_CPU_SIZED = 30_000_000


def start(name: str, computed: str, params: Any, mesh: Mesh) -> None:
  """Says what will be trained, and on what.

  Args:
    name: the model's.
    computed: its precision and kernels, for a reader.
    params: arrays, or their shapes.
    mesh: of the run.
  """
  count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(params))
  device = mesh.devices.flat[0]
  sizes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
  logger.info(
    "%s: %s parameters%s; on %d %s (%s), processes: %d, mesh: %s.",
    name,
    f"{count:,}",
    f", {computed}" * bool(computed),
    mesh.size,
    device.platform.upper(),
    device.device_kind,
    jax.process_count(),
    sizes,
  )
  if device.platform == "cpu" and count > _CPU_SIZED:
    logger.warning(
      "JAX FOUND NO GPU OR TPU: a network of %s parameters takes days on a "
      "CPU. Install JAX for the device (GPUs: pip install 'jax[cuda13]', TPUs: "
      "'jax[tpu]'); JAX_PLATFORMS=%s.",
      f"{count:,}",
      jax.config.jax_platforms or "",  # pyright: ignore[reportAttributeAccessIssue]
    )


def timing_first(
  step: Callable[..., Any], path: epath.Path
) -> Callable[..., Any]:
  """Returns the step; its first call says how long it takes to compile.

  Args:
    step: jitted.
    path: the workdir, which remembers the seconds for the next start.
  """
  pending = True

  def call(*arguments: Any) -> Any:
    nonlocal pending
    if not pending:
      return step(*arguments)
    pending = False
    file = path / SECONDS_FILE
    before = f" ({file.read_text():.20} last time)" if file.exists() else ""
    logger.info("Compiling the training step%s.", before)
    begin = time.perf_counter()
    result = step(*arguments)
    seconds = f"{time.perf_counter() - begin:.1f} s"
    logger.info("Compiled it in %s.", seconds)
    if processes.is_first():
      file.write_text(seconds)
    return result

  return call


def end(path: epath.Path, step: int, checkpointer: Checkpointer) -> None:
  """Says that a run is done, its best figure, and where its pictures are."""
  best = checkpointer.best()
  ranked = f" Best {best[0]}: {best[1]:.4g}, step {best[2]}." if best else ""
  folders = [x for x in ("samples", "plots") if (path / x).is_dir()]
  pictures = f" Pictures: {' and '.join(str(path / x) for x in folders)}."
  logger.info(
    "Done: %s has all of its %d steps.%s%s",
    path,
    step,
    ranked,
    pictures if folders else "",
  )
