"""JAX's settings: those that decide the numbers, and where programs stay.

Variables (JAX_ENABLE_X64, ...) and jax.config change them. Programs pin those
that decide which numbers come out for the whole process, calls of the Python
API for their own time.
"""

import contextlib
import hashlib
import pathlib
import platform
from collections.abc import Iterator
from typing import Any

import jax

from drift_jax.system import paths, processes, storage
from drift_jax.system.console import logger
from drift_jax.system.errors import ConfigError

# Other values draw other noise and parameters, or end in errors. The precision
# of matrix products is not among them: it is the user's choice.
PINNED = {
  "jax_enable_x64": False,
  "jax_default_prng_impl": "threefry2x32",
  "jax_threefry_partitionable": True,
  "jax_random_seed_offset": 0,
  "jax_numpy_rank_promotion": "allow",
  "jax_disable_jit": False,
}

COMPILED = "compiled"
MAX_COMPILED = (
  4 * 2**30
)  # of a folder; what was not used for longest goes first


def _others() -> dict[str, object]:
  """Settings that are not as they must be."""
  now = {name: getattr(jax.config, name) for name in PINNED}
  return {name: now[name] for name in PINNED if now[name] != PINNED[name]}


def pin() -> None:
  """Pins the settings of this process; a program's first act with JAX."""
  for name, value in _others().items():
    logger.warning(
      "%s=%s is not heeded: this program computes with %s.",
      name.upper(),
      value,
      PINNED[name],
    )
    jax.config.update(name, PINNED[name])


def require() -> None:
  """Raises ConfigError unless all settings are as they must be."""
  for name, value in _others().items():
    raise ConfigError(
      f"{name}={value} would give other numbers: "
      f"jax.config.update({name!r}, {PINNED[name]!r}) first"
    )


@contextlib.contextmanager
def pinned() -> Iterator[None]:
  """Pins the settings in this thread, whatever the process has chosen.

  Raises:
    ConfigError: jax_random_seed_offset is set, which no thread has for itself.
  """
  with (
    jax.enable_x64(False),
    jax.default_prng_impl("threefry2x32"),
    jax.threefry_partitionable(True),
    jax.numpy_rank_promotion("allow"),
    jax.disable_jit(False),
  ):
    require()
    yield


def keep_compiled(workdir: str = "") -> None:
  """Has JAX keep compiled programs: its persistent compilation cache.

  They lie in a folder of the user's cache; in one of the workdir if several
  processes work together or it is in a bucket: the first process writes, and
  hosts that are replaced keep nothing. JAX_COMPILATION_CACHE_DIR names another
  folder, JAX_ENABLE_COMPILATION_CACHE=false keeps nothing.

  Args:
    workdir: of the run, if there is one.
  """
  settings: Any = jax.config
  if not settings.jax_enable_compilation_cache:
    return
  if not settings.jax_compilation_cache_dir:
    if workdir and (storage.is_remote(workdir) or processes.several()):
      # No bound: it would have all processes wait for one lock.
      folder = f"{workdir.rstrip('/')}/{COMPILED}"
    else:
      try:
        path = paths.user_cache() / COMPILED / _processor()
        path.mkdir(parents=True, exist_ok=True)
      except OSError as error:
        logger.warning(
          "Compiled programs are not kept: %s. JAX_COMPILATION_CACHE_DIR names "
          "another folder.",
          error,
        )
        return
      folder = str(path)
      if settings.jax_compilation_cache_max_size == -1:
        settings.update("jax_compilation_cache_max_size", MAX_COMPILED)
    settings.update("jax_compilation_cache_dir", folder)
  # Small programs as well: there are many.
  settings.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _processor() -> str:
  """Names the processor's kind: CPU code may not run on one of another.

  Machines may share a home folder, and JAX does not tell their processors
  apart.
  """
  features = platform.processor()
  file = pathlib.Path("/proc/cpuinfo")
  if file.exists():
    lines = file.read_text().splitlines()
    kinds = ("model name", "flags", "Features")
    features = "".join(sorted({x for x in lines if x.startswith(kinds)}))
  checksum = hashlib.sha256(features.encode()).hexdigest()
  return f"{platform.machine()}-{checksum[:8]}"
