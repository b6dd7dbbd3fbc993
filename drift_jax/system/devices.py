"""The devices that JAX finds, and facts of those that need not be there."""

import dataclasses
import importlib.metadata
import os
import pathlib
from typing import Any

from drift_jax.system.errors import EvaluationError, UserError


class DeviceError(UserError, RuntimeError):
  """There are no devices to run on; the message says which and what now."""


# A figure's share: the rest is the run's, its data's and the system's.
_SHARE = 0.5
# Where containers are told their limit (cgroups 2 and 1).
_LIMITS = (
  "/sys/fs/cgroup/memory.max",
  "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)
# What a TPU's programs may use of its memory, bytes: as the compiler says it.
TPU_MEMORY = {
  "TPU v4": 31.25 * 2**30,
  "TPU v5 lite": 15.75 * 2**30,
  "TPU v5": 95.74 * 2**30,
  "TPU v6 lite": 31.24 * 2**30,
}
# Dense products of bfloat16 with sums in float32, operations per second: data
# sheets of Google and NVIDIA.
PEAK_FLOPS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
  "NVIDIA A100-SXM4-40GB": 312e12,
  "NVIDIA A100-SXM4-80GB": 312e12,
  "NVIDIA H100 80GB HBM3": 989e12,
  "NVIDIA H200": 989e12,
  "NVIDIA B200": 2250e12,
  "NVIDIA A10G": 70e12,
  "NVIDIA RTX A6000": 154.8e12,
  "NVIDIA L4": 121e12,
  "NVIDIA L40S": 362e12,
  "NVIDIA GeForce RTX 3060": 25.6e12,
  "NVIDIA GeForce RTX 3090": 71e12,
  "NVIDIA GeForce RTX 4090": 165.2e12,
  "NVIDIA GeForce RTX 5090": 209.5e12,
}


@dataclasses.dataclass(frozen=True)
class Card:
  """Facts of an NVIDIA GPU, of which XLA compiles for it.

  Attributes:
    kind: JAX's name, device_kind.
    capability: of CUDA, a key of _CORES.
    cores: number of streaming multiprocessors.
    memory: bytes that CUDA has for programs, less than the data sheet's.
    bandwidth: of the memory, bytes per second.
    cache: bytes of the L2 cache.
    clock: GHz, boosted.
  """

  kind: str
  capability: str
  cores: int
  memory: int
  bandwidth: float
  cache: int
  clock: float


_MIB = 2**20
# From XLA's target_config/specs (a100, a6000, b200, h100) and NVIDIA's data
# sheets; memory in MiB as CUDA programs on such cards report it.
CARDS = {
  "a100-40gb": Card(
    *("NVIDIA A100-SXM4-40GB", "8.0", 108, 42298834944),
    *(1555.2e9, 40 * _MIB, 1.41),
  ),
  "a100-80gb": Card(
    *("NVIDIA A100-SXM4-80GB", "8.0", 108, 85100068864),
    *(2039.04e9, 40 * _MIB, 1.41),
  ),
  "h100": Card(
    *("NVIDIA H100 80GB HBM3", "9.0", 132, 84978434048),
    *(3352.32e9, 50 * _MIB, 1.98),
  ),
  "h200": Card(
    *("NVIDIA H200", "9.0", 132, 143156 * _MIB),
    *(4800e9, 50 * _MIB, 1.98),
  ),
  "b200": Card(
    *("NVIDIA B200", "10.0", 148, 191514673152),
    *(7672.32e9, 132644864, 1.965),
  ),
  "a10g": Card(
    *("NVIDIA A10G", "8.6", 80, 22587 * _MIB),
    *(600e9, 6 * _MIB, 1.71),
  ),
  "a6000": Card(
    *("NVIDIA RTX A6000", "8.6", 84, 51041271808),
    *(768.096e9, 6 * _MIB, 1.8),
  ),
  "l4": Card(
    *("NVIDIA L4", "8.9", 58, 22558 * _MIB),
    *(300e9, 48 * _MIB, 2.04),
  ),
  "l40s": Card(
    *("NVIDIA L40S", "8.9", 142, 45455 * _MIB),
    *(864e9, 96 * _MIB, 2.52),
  ),
  "rtx3060": Card(
    *("NVIDIA GeForce RTX 3060", "8.6", 28, 12031 * _MIB),
    *(360e9, 3 * _MIB, 1.777),
  ),
  "rtx3090": Card(
    *("NVIDIA GeForce RTX 3090", "8.6", 82, 24259 * _MIB),
    *(936e9, 6 * _MIB, 1.695),
  ),
  "rtx4090": Card(
    *("NVIDIA GeForce RTX 4090", "8.9", 128, 24207 * _MIB),
    *(1008e9, 72 * _MIB, 2.52),
  ),
  "rtx5090": Card(
    *("NVIDIA GeForce RTX 5090", "12.0", 170, 32112 * _MIB),
    *(1792e9, 96 * _MIB, 2.407),
  ),
}
# Of each capability, from the CUDA programming guide: (float32 lanes, KiB of
# shared memory, threads) of a multiprocessor.
_CORES = {
  "8.0": (64, 164, 2048),
  "8.6": (128, 100, 1536),
  "8.9": (128, 100, 1536),
  "9.0": (128, 228, 2048),
  "10.0": (128, 228, 2048),
  "12.0": (128, 100, 1536),
}
# Those with instructions that no later capability has.
_OWN_INSTRUCTIONS = ("9.0", "10.0")


def installed(*packages: str) -> str | None:
  """The version of the first of these packages that is installed, if any."""
  for package in packages:
    try:
      return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      pass
  return None


def target_config(card: Card) -> str:
  """The card as text of XLA's GpuTargetConfigProto, with the libraries here."""
  lanes, shared, threads = _CORES[card.capability]
  accelerated = card.capability in _OWN_INSTRUCTIONS
  major, minor = card.capability.split(".")
  cuda = 13 if installed("jax-cuda13-plugin") else 12
  cudnn = (installed(f"nvidia-cudnn-cu{cuda}") or "9.8").split(".")
  return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: {threads}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {(shared - 1) * 1024}
  shared_memory_per_core: {shared * 1024}
  core_count: {card.cores}
  fpus_per_core: {lanes}
  clock_rate_ghz: {card.clock}
  memory_bandwidth: {card.bandwidth:.0f}
  l2_cache_size: {card.cache}
  device_memory_size: {card.memory}
  cuda_compute_capability {{
    major: {major}
    minor: {minor}
    feature_extension: {"ACCELERATED_FEATURES" if accelerated else "NONE"}
  }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: {cudnn[0]} minor: {cudnn[1]} }}
runtime_version {{ major: {cuda} }}
device_description_str: "{card.kind}"
"""


def memory_fraction() -> float:
  """The part of a GPU's memory that JAX takes for its programs.

  Raises:
    DeviceError: the environment's is no number of (0, 1].
  """
  name = "XLA_PYTHON_CLIENT_MEM_FRACTION"
  text = os.environ.get(name, "0.75")
  try:
    fraction = float(text)
  except ValueError:
    fraction = 0.0
  if not 0 < fraction <= 1:
    raise DeviceError(f"{name}={text!r}: want a number in (0, 1], e.g. 0.95")
  return fraction


def available_memory(device: Any) -> tuple[int | None, int | None]:
  """Bytes that programs may use on a device, and all; None if nobody says.

  Raises:
    DeviceError: see memory_fraction.
  """
  kind = device.device_kind
  if kind in TPU_MEMORY:
    whole = int(TPU_MEMORY[kind])
    return whole, whole
  try:
    stats = device.memory_stats() or {}
  except (RuntimeError, NotImplementedError):  # it is not there
    stats = {}
  whole = {card.kind: card.memory for card in CARDS.values()}.get(kind)
  part = whole and int(memory_fraction() * whole)
  return stats.get("bytes_limit", part), whole


def find_devices(*, local: bool = False) -> list[Any]:
  """All devices, or those of this process.

  Raises:
    DeviceError: JAX finds none of the platform that it was told to use.
  """
  import jax

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


def machine_memory() -> int:
  """Bytes of this machine, or of the container if that has fewer."""
  memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  for limit in map(pathlib.Path, _LIMITS):
    text = limit.read_text().strip() if limit.is_file() else ""
    if text.isdecimal():
      memory = min(memory, int(text))
  return memory


def check_fits(needed: int, what: str, remedy: str) -> None:
  """Refuses memory that the system would kill the process for.

  Args:
    needed: bytes.
    what: begins the message: who takes them, with the arithmetic.
    remedy: ends it.

  Raises:
    EvaluationError: more than half of the machine's memory.
  """
  memory = machine_memory()
  if needed > _SHARE * memory:
    raise EvaluationError(
      f"{what}: {needed / 1e9:.3g} GB, but this machine has"
      f" {memory / 1e9:.3g} GB, of which a figure may take half:"
      f" {remedy}"
    )
