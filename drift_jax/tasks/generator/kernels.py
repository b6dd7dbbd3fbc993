"""What computes attention and losses on which devices."""

from jax.sharding import Mesh

from drift_jax import config as config_lib
from drift_jax import drift


def attention_kernel_for(kernels: str, mesh: Mesh) -> str:
  """Names the kernel of attention on the mesh's devices; see layers.Attention.

  cuDNN's needs NVIDIA's Ampere or newer; AMD's devices are 'gpu' as well, but
  their capability is no number.
  """
  capability = str(getattr(mesh.devices.flat[0], "compute_capability", ""))
  major = capability.partition(".")[0]
  if kernels == "auto" and major.isdigit() and int(major) >= 8:
    return "cudnn"
  return kernel_for(kernels, mesh)


def kernels_there(kernels: str, mesh: Mesh) -> str:
  """Adapts train.kernels of a run to the devices that sample from it.

  A kernel changes how a network is computed, not its numbers: 'pallas' becomes
  'auto' if there are no TPUs.
  """
  on_tpu = mesh.devices.flat[0].platform == "tpu"
  return "auto" if kernels == "pallas" and not on_tpu else kernels


def kernel_for(kernels: str, mesh: Mesh) -> drift.Kernel:
  """Names the kernel of the drifting losses on the mesh's devices.

  Raises:
    ConfigError: kernels that these devices don't run.
  """
  platform = mesh.devices.flat[0].platform
  if kernels == "pallas" and platform != "tpu":
    raise config_lib.ConfigError(
      f"train.kernels='pallas' needs TPUs, but this mesh is of {platform} "
      "devices: 'auto' takes what there is, 'xla' runs anywhere"
    )
  if kernels == "auto":
    return "pallas" if platform == "tpu" else "xla"
  return "xla" if kernels == "xla" else "pallas"


def unroll_for(depth: int, mesh: Mesh) -> int:
  """Returns how many blocks a round of the loop over the depth holds.

  A loop copies what it keeps for the backward pass into stacks. CPUs feel it:
  on two cores the digits generator's step takes 1.6 times as long. But unrolled
  blocks take longer to compile, and blocks of parameters in parts are to be
  gathered one by one.
  """
  is_cpu = mesh.devices.flat[0].platform == "cpu"
  return depth if is_cpu and mesh.shape["fsdp"] == 1 and depth <= 4 else 1
