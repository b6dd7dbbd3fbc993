"""The devices that JAX finds."""

from typing import Any

import jax

from drift_jax.system.errors import UserError


class DeviceError(UserError, RuntimeError):
  """There are no devices to run on; the message says which and what now."""


def find_devices(*, local: bool = False) -> list[Any]:
  """All devices, or those of this process.

  Raises:
    DeviceError: JAX finds none of the platform that it was told to use.
  """
  try:
    return list(jax.local_devices() if local else jax.devices())
  # The second is what JAX 0.10 makes of 'cuda' without its plugin.
  except (RuntimeError, AssertionError) as error:
    platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    reason = " ".join(str(error).split()) or "no plugin for it is installed"
    raise DeviceError(
      f"JAX finds no devices with JAX_PLATFORMS={platforms or ''} ({reason}): "
      "install JAX for them (GPUs: pip install 'jax[cuda13]', TPUs: "
      "'jax[tpu]'), see whether the driver lists them (nvidia-smi), or leave "
      "JAX_PLATFORMS unset for what there is"
    ) from error
