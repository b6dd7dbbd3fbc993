"""Compiled programs on disk, so that the next start compiles nothing again."""

import hashlib
import pathlib
import platform
from typing import Any

import jax

from drift_jax.system import paths, processes, storage
from drift_jax.system.console import logger

FOLDER = "compiled"
MAX_BYTES = 4 * 2**30  # of a folder; what was not used for longest goes first


def keep(workdir: str = "") -> None:
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
  remote = storage.is_remote(workdir)
  folder = settings.jax_compilation_cache_dir
  if not folder:
    if workdir and (remote or processes.several()):
      folder = f"{workdir.rstrip('/')}/{FOLDER}"
    else:
      folder = str(paths.user_cache() / FOLDER / _processor())
    try:
      if not remote:
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
      logger.warning(
        "Compiled programs are not kept: %s. JAX_COMPILATION_CACHE_DIR names "
        "another folder.",
        error,
      )
      return
    settings.update("jax_compilation_cache_dir", folder)
  # A bound needs a lock, which buckets don't have.
  if settings.jax_compilation_cache_max_size == -1 and not remote:
    settings.update("jax_compilation_cache_max_size", MAX_BYTES)
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
