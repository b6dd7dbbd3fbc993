"""What a run says of itself at its start and at its end."""

import contextlib
import time
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from drift_jax.system import processes
from drift_jax.system.console import logger
from drift_jax.system.devices import PEAK_FLOPS
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


class Step:
  """A jitted step; its first call says how long it takes to compile."""

  def __init__(
    self,
    step: Any,
    frozen: Any,
    path: epath.Path,
    mesh: Mesh,
    images: int,
  ):
    """Calls nothing yet.

    Args:
      step: jitted (state, batch, frozen) -> (state, metrics).
      frozen: its last argument.
      path: the workdir, which remembers the seconds for the next start.
      mesh: of the run.
      images: of a step; 0: none.
    """
    self._step, self._frozen, self._mesh = step, frozen, mesh
    self._file = path / SECONDS_FILE
    self._images = images
    self._called = False
    # Operations of a step on each device, at most in a second.
    self._flops = 0
    self._peak = PEAK_FLOPS.get(mesh.devices.flat[0].device_kind)

  def __call__(self, state: Any, batch: Any) -> Any:
    """Returns (state, metrics)."""
    if self._called:
      return self._step(state, batch, self._frozen)
    file = self._file
    before = f" ({file.read_text():.20} last time)" if file.exists() else ""
    logger.info("Compiling the training step%s.", before)
    begin = time.perf_counter()
    if self._peak:
      from drift_jax.system import jaxprs

      traced = self._step.trace(state, batch, self._frozen)
      self._flops = jaxprs.matmul_flops(traced.jaxpr, self._mesh.size)
    result = self._step(state, batch, self._frozen)
    seconds = f"{time.perf_counter() - begin:.1f} s"
    self._called = True
    logger.info("Compiled it in %s.", seconds)
    if processes.is_first():
      with contextlib.suppress(OSError):  # a hint, and no reason to end
        file.write_text(seconds)
    return result

  def speeds(self, steps_per_second: float) -> dict[str, float]:
    """Names the speed for metrics.

    'perf/mfu' is the share of the device's peak in bfloat16 that the step's
    products reach, those that are computed again included; it is there if the
    peak is known.
    """
    scalars = {"perf/steps_per_second": steps_per_second}
    if self._images:
      scalars["perf/images_per_second"] = steps_per_second * self._images
    if self._peak:
      scalars["perf/mfu"] = steps_per_second * self._flops / self._peak
    return scalars


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
