"""JAX's settings that decide which numbers come out of this package.

Variables (JAX_ENABLE_X64, ...) and jax.config change them. Programs pin them
for the whole process, calls of the Python API for their own time.
"""

import contextlib
from collections.abc import Iterator

import jax

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
