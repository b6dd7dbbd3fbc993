"""Will it fit? Compiles a run's programs for devices that need not be there.

  python -m drift_jax.tools.compile_check --config=configs/imagenet_latent.py:l2
      --topology=v6e:8x16 [--mesh=data=1,fsdp=-1] [--config.KEY=VALUE ...]

compiles the training step, the sampler and the evaluation steps as the run
would, without data or weights, for a TPU topology (needs the package libtpu,
but no TPU) or, without --topology, for this machine's devices. For each
device it says what is in memory and how much, what is computed and moved,
which collectives run, and what to change if it does not fit. Exits with 1
if a program does not fit.
"""

import dataclasses
import math
import os
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from drift_jax import config as config_lib
from drift_jax import tasks
from drift_jax.config.sections import RunConfig
from drift_jax.system import paths, programs
from drift_jax.tools.compile_report import Report, advice, describe, whole_sums

# What a chip's programs may use of its memory, bytes: as the compiler says it.
HBM = {
  "TPU v4": 31.25 * 2**30,
  "TPU v5 lite": 15.75 * 2**30,
  "TPU v5": 95.74 * 2**30,
  "TPU v6 lite": 31.24 * 2**30,
}


def define_flags() -> None:
  """Defines the flags: not on import, as other programs have the same names."""
  config_flags.DEFINE_config_file(
    "config", None, "Config file, e.g. configs/imagenet_latent.py:l2"
  )
  flags.DEFINE_string(
    "topology",
    "",
    "TPU generation and chips, e.g. v6e:8x16, v5e:4x8 or v5p:4x4x4; this "
    "machine's devices if not given.",
  )
  flags.DEFINE_string(
    "mesh", "", "Sizes instead of config.mesh's, e.g. data=2,fsdp=-1."
  )
  flags.DEFINE_list("programs", None, "Only these, e.g. train,sample.")
  paths.define_flag("json", "", "File for the figures; '-': standard output.")
  paths.define_flag(
    "hlo",
    "",
    "Folder for the optimised programs, PROGRAM.txt, and for TPUs what takes "
    "their memory, PROGRAM_memory.txt.",
  )
  flags.mark_flag_as_required("config")


def main(argv: Sequence[str]) -> None:
  """Compiles what the command line asks for; a mistake is one line."""
  values = flags.FLAGS
  with programs.checking(argv):
    config = with_mesh(tasks.parse(values.config), values.mesh)
    check_topology(values.topology)
  if values.topology:
    prepare_libtpu()

  def program() -> None:
    devices = find_devices(values.topology)
    reports = check(config, devices, values.programs, values.hlo)
    _tell(config, devices, reports)
    if any(report.fits is False for report in reports):
      sys.exit(1)

  programs.run(program)


def _tell(config: RunConfig, devices: Sequence[Any], reports: Any) -> None:
  """Prints the reports, and writes them to the file of --json."""
  from drift_jax.metrics.files import report_text, write_report
  from drift_jax.system import sharding

  values = flags.FLAGS
  name, overrides = config_lib.config_arguments(sys.argv[1:])
  mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices)
  result = {
    "config": " ".join(
      [f"{name}", *(f"{k}={v}" for k, v in overrides.items())]
    ),
    "topology": values.topology or "local",
    "devices": len(devices),
    "device_kind": devices[0].device_kind,
    "mesh": dict(mesh.shape),
    "programs": [dataclasses.asdict(report) for report in reports],
  }
  print(
    report_text(result) if values.json == "-" else describe(result, reports)
  )
  if values.json not in ("", "-"):
    write_report(values.json, result)


def prepare_libtpu() -> None:
  """Before JAX is imported: no TPU is looked for, nothing is logged."""
  for name, value in {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v6e-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
  }.items():
    os.environ.setdefault(name, value)


def check_topology(topology: str) -> None:
  """Raises ConfigError unless it has a topology's form, or is ''."""
  if topology and not re.fullmatch(r"[a-z0-9]+:\d+x\d+(x\d+)?", topology):
    raise config_lib.ConfigError(
      f"--topology={topology!r}: want GENERATION:CHIPS, e.g. v6e:8x16"
    )


def find_devices(topology: str) -> list[Any]:
  """Devices of a topology, or this machine's for ''.

  Raises:
    ConfigError: a topology that does not exist, or no libtpu to compile with.
  """
  from jax.experimental import topologies

  from drift_jax.system import sharding

  if not topology:
    return sharding.find_devices()
  try:
    return list(topologies.get_topology_desc(topology, "tpu").devices)
  except (RuntimeError, ValueError, NotImplementedError) as error:
    text = " ".join(str(error).split())
    hint = "valid ones are those that Cloud TPU rents, e.g. v6e:4x4, v5p:4x4x4"
    if "libtpu" in text.lower() and "not" in text.lower():
      hint = "pip install libtpu"
    raise config_lib.ConfigError(
      f"--topology={topology!r} can't be compiled for ({text[:300]}): {hint}"
    ) from error


def with_mesh(config: Any, sizes: str) -> Any:
  """The config with mesh sizes of the form 'data=2,fsdp=-1'.

  Raises:
    ConfigError: another form, an unknown axis.
  """
  if not sizes:
    return config
  axes = [field.name for field in dataclasses.fields(config.mesh)]
  changed: dict[str, int] = {}
  for part in sizes.split(","):
    name, _, size = part.partition("=")
    if name not in axes or not re.fullmatch(r"-?\d+", size):
      raise config_lib.ConfigError(
        f"--mesh={sizes!r}: {part!r} is not AXIS=SIZE with one of {axes}"
      )
    changed[name] = int(size)
  mesh = dataclasses.replace(config.mesh, **changed)
  config = dataclasses.replace(config, mesh=mesh)
  config.check()
  return config


def check(
  config: Any,
  devices: Sequence[Any],
  names: Sequence[str] | None = None,
  hlo_folder: str = "",
) -> list[Report]:
  """Compiles a run's programs for the devices, one after the other.

  Args:
    config: typed, of either task.
    devices: of the mesh; need not be there.
    names: of programs; None for all.
    hlo_folder: gets the optimised programs; '' for none.

  Raises:
    ConfigError, ArtifactError: see tasks.programs; an unknown program.
  """
  from drift_jax.system import sharding
  from drift_jax.system.errors import naming

  with naming("mesh"):
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, devices)
  there = {program.name: program for program in tasks.programs(config, mesh)}
  for name in names or ():
    if name not in there:
      raise config_lib.ConfigError(
        f"--programs: there is no {name!r}, valid options are {list(there)}"
      )
  return [
    compile_program(program, mesh, config, hlo_folder)
    for name, program in there.items()
    if not names or name in names
  ]


def compile_program(
  program: Any, mesh: Any, config: Any, hlo_folder: str = ""
) -> Report:
  """One program's report."""
  import jax

  from drift_jax.tools import hlo

  # 1. What is known before it is compiled
  start = time.perf_counter()
  traced = program.jitted.trace(*program.arguments.values())
  lowered = traced.lower()
  device = mesh.devices.flat[0]
  report = Report(
    program.name,
    fits=None,
    seconds=0.0,
    arguments=argument_bytes(program.arguments),
    available=_available(device),
    flops=hlo.matmul_flops(traced.jaxpr, mesh.size),
    asked=hlo.totals(hlo.requested_collectives(traced.jaxpr)),
  )
  # 2. The compiler, which may refuse it
  with tempfile.TemporaryDirectory() as folder:
    options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    try:
      compiled = lowered.compile(options if device.platform == "tpu" else None)
    except jax.errors.JaxRuntimeError as error:
      text = " ".join(str(error).split())
      if "RESOURCE_EXHAUSTED" not in text:
        raise
      report.seconds = time.perf_counter() - start
      report.fits = False
      report.message = text.split(" See https")[0]
      report.peak = needed_bytes(text)
      report.advice = advice(report, config, mesh.size)
      return report
    report.seconds = time.perf_counter() - start
    # As the compiler wrote it on its way: libtpu 0.0.52 can't give the text of
    # some programs that it has compiled.
    text = _dumped(folder, "after_codegen")
    largest = _dumped(folder, "memory-usage-report")
  # 3. What it says
  _read_memory(report, compiled.memory_analysis())
  costs: Mapping[str, float] = compiled.cost_analysis() or {}
  report.bytes_accessed = costs.get("bytes accessed")
  try:
    text = text or compiled.as_text() or ""
  except jax.errors.JaxRuntimeError as error:
    report.message = (
      "the optimised program can't be read: bytes count each loop once, "
      f"collectives are those asked for ({str(error)[:100]} ...)"
    )
    report.collectives = report.asked
  else:
    _read_program(report, text)
    if hlo_folder:
      _keep(hlo_folder, program.name, {"": text, "_memory": largest})
  if report.fits is False:
    report.advice = advice(report, config, mesh.size)
  report.advice += whole_sums(report)
  return report


def _dumped(folder: str, name: str) -> str:
  """Text of the files NAME.txt in a folder of the compiler; '' if none."""
  files = pathlib.Path(folder).glob(f"*{name}.txt")
  return "".join(path.read_text() for path in files)


def _keep(folder: str, program: str, texts: Mapping[str, str]) -> None:
  from etils import epath

  epath.Path(folder).mkdir(parents=True, exist_ok=True)
  for suffix, text in texts.items():
    if text:
      name = f"{program.replace(' ', '_')}{suffix}.txt"
      (epath.Path(folder) / name).write_text(text)


def _read_memory(report: Report, memory: Any) -> None:
  """Fills in the compiler's figures of memory."""
  report.code = memory.generated_code_size_in_bytes
  resident: int = (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
  )
  temporary: int = memory.temp_size_in_bytes
  peak = max(memory.peak_memory_in_bytes, resident + temporary)
  report.peak = peak
  # libtpu 0.0.42 (of JAX 0.10.2) counts none among the temporary ones.
  report.activations = temporary or peak - resident
  if report.available is not None:
    report.fits = peak <= report.available


def _read_program(report: Report, text: str) -> None:
  """Fills in figures of the optimised program."""
  from drift_jax.tools import hlo

  analysed = hlo.analyse(text)
  if report.bytes_accessed is not None and analysed.bytes_once:
    report.bytes_accessed *= analysed.bytes / analysed.bytes_once
  if analysed.cycles:
    report.estimated_seconds = analysed.cycles / hlo.CYCLES_PER_SECOND
    report.parts = {
      name or "rest": {"seconds": cycles / hlo.CYCLES_PER_SECOND, "bytes": size}
      for name, (cycles, size) in analysed.parts.items()
    }
  report.collectives = analysed.by_kind()


def argument_bytes(arguments: Mapping[str, Any]) -> dict[str, int]:
  """Bytes on each device of what a program is called with, by what it is."""
  sizes: dict[str, int] = {}
  for name, tree in arguments.items():
    parts = {name if name in ("params", "frozen") else "batch": tree}
    if name == "state":
      parts = {"params": tree.params, "optimizer": tree.opt_state}
      parts["ema"] = tree.ema
    for key, part in parts.items():
      sizes[key] = sizes.get(key, 0) + _device_bytes(part)
  return {name: size for name, size in sizes.items() if size}


def _device_bytes(tree: Any) -> int:
  """Bytes of a tree of ShapeDtypeStructs on each device."""
  import jax

  def size(leaf: Any) -> int:
    shape = leaf.shape
    if leaf.sharding is not None:
      shape = leaf.sharding.shard_shape(shape)
    return math.prod(shape) * leaf.dtype.itemsize

  return sum(size(leaf) for leaf in jax.tree.leaves(tree))


def _available(device: Any) -> int | None:
  """Bytes that programs may use on a device; None if nobody says."""
  if device.device_kind in HBM:
    return int(HBM[device.device_kind])
  try:
    stats = device.memory_stats()
  except (RuntimeError, NotImplementedError):  # it is not there
    return None
  return stats.get("bytes_limit") if stats else None


def needed_bytes(message: str) -> int | None:
  """Memory that a program would take, as the compiler's refusal says."""
  match = re.search(r"(?:\(|Used )([\d.]+)([KMGT])", message)
  if match is None:
    return None
  return int(float(match[1]) * 2 ** (10 * (1 + "KMGT".index(match[2]))))


if __name__ == "__main__":
  define_flags()
  app.run(main, flags_parser=config_lib.parse_flags)
