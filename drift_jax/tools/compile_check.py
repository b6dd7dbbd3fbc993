"""Will it fit? Compiles a run's programs for devices that need not be there.

  python -m drift_jax.tools.compile_check --config=configs/imagenet_latent.py:l2
      --topology=v6e:8x16 [--mesh=data=1,fsdp=-1] [--config.KEY=VALUE ...]

compiles the training step, the sampler and the evaluation steps as the run
would, without data or weights, for a TPU slice (v6e:8x16), for NVIDIA GPUs
(rtx4090, h100:8, or HOSTSxGPUS: h100:2x8) or, without --topology, for this
machine's devices. It needs JAX's compiler for TPUs or GPUs, but none of them.
For each device it says what is in memory and how much, what is computed and
moved, by which kernels, which collectives run, and what to change if it does
not fit. Exits with 1 if a program does not fit.
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
from drift_jax.system import devices as devices_lib
from drift_jax.system import paths, programs
from drift_jax.tools.compile_report import (
  Report,
  advice,
  attention,
  describe,
  whole_sums,
)

_TPUS = re.compile(r"(v|tpu)\d\w*:\d+x\d+(x\d+)?")
_GPUS = re.compile(
  r"(?P<card>[a-z0-9-]+)(:((?P<hosts>[1-9]\d*)x)?(?P<gpus>[1-9]\d*))?"
)


def define_flags() -> None:
  """Defines the flags: not on import, as other programs have the same names."""
  config_flags.DEFINE_config_file(
    "config", None, "Config file, e.g. configs/imagenet_latent.py:l2"
  )
  flags.DEFINE_string(
    "topology",
    "",
    "TPU generation and chips, e.g. v6e:8x16, v5e:4x8 or v5p:4x4x4, or NVIDIA "
    "GPUs, e.g. rtx4090, h100:8 or h100:2x8; this machine's devices if not "
    "given.",
  )
  flags.DEFINE_string(
    "mesh", "", "Sizes instead of config.mesh's, e.g. data=2,fsdp=-1."
  )
  flags.DEFINE_list("programs", None, "Only these, e.g. train,sample.")
  paths.define_flag("json", "", "File for the figures; '-': standard output.")
  paths.define_flag(
    "hlo",
    "",
    "Folder for the optimised programs, PROGRAM.txt, and for TPUs and GPUs "
    "what takes their memory, PROGRAM_memory.txt.",
  )
  flags.mark_flag_as_required("config")


def main(argv: Sequence[str]) -> None:
  """Compiles what the command line asks for; a mistake is one line."""
  values = flags.FLAGS
  with programs.checking(argv):
    config = with_mesh(tasks.parse(values.config), values.mesh)
    check_topology(values.topology)
  if values.topology:
    prepare_compilers()

  def program() -> None:
    devices = find_devices(values.topology)
    reports = check(config, devices, values.programs, values.hlo)
    _tell(config, devices, reports)
    if any(report.fits is False for report in reports):
      sys.exit(1)

  programs.run(program, keep_compiled=False)  # it is asked what it compiles


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


def prepare_compilers() -> None:
  """Before JAX is imported: no device is looked for, nothing is logged."""
  for name, value in {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v6e-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
  }.items():
    os.environ.setdefault(name, value)


def check_topology(topology: str) -> None:
  """Raises ConfigError unless it is '' or has a form, and a compiler here."""
  gpus = _GPUS.fullmatch(topology)
  if not topology:
    return
  if gpus and gpus["card"] in devices_lib.CARDS:
    there = devices_lib.installed("jax-cuda13-plugin", "jax-cuda12-plugin")
    extra, kind = "cuda13", "GPUs"
  elif _TPUS.fullmatch(topology):
    there = devices_lib.installed("libtpu")
    extra, kind = "tpu", "TPUs"
  else:
    raise config_lib.ConfigError(
      f"--topology={topology!r}: want GENERATION:AxB of TPUs, e.g. v6e:8x16, "
      "or CARD, CARD:GPUS or CARD:HOSTSxGPUS of NVIDIA GPUs, e.g. h100:2x8; "
      f"{_same(topology)}cards are {', '.join(devices_lib.CARDS)}"
    )
  if there is None:
    raise config_lib.ConfigError(
      f"--topology={topology!r}: JAX's compiler for {kind} is not installed "
      f"({kind} are not needed): {install_line(extra)}"
    )


def _same(topology: str) -> str:
  """The form of a type of Cloud TPU such as v6e-64, for a message."""
  given = re.fullmatch(
    r"(v6e|v5e|v5litepod)-(1|4|8|16|32|64|128|256)", topology
  )
  if not given:
    return ""
  chips = int(given[2])
  width = 2 ** ((chips.bit_length() - 1) // 2)
  generation = given[1].replace("litepod", "e")
  return f"{topology} is {generation}:{width}x{chips // width}; "


def install_line(extra: str) -> str:
  """The command that installs a compiler of the version of JAX that is here."""
  return f"pip install 'jax[{extra}]=={devices_lib.installed('jax')}'"


def find_devices(topology: str) -> list[Any]:
  """Devices of a topology, or this machine's for ''.

  Raises:
    ConfigError: a topology that does not exist, or that the compiler refuses.
  """
  if not topology:
    return devices_lib.find_devices()
  gpus = _GPUS.fullmatch(topology)
  card = gpus and devices_lib.CARDS.get(gpus["card"])
  try:
    if gpus and card:
      return _gpus(card, int(gpus["hosts"] or 1), int(gpus["gpus"] or 1))
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(topology, "tpu").devices)
  except (RuntimeError, ValueError, NotImplementedError) as error:
    text = " ".join(str(error).split())
    hint = "valid ones are those that Cloud TPU rents, e.g. v6e:4x4, v5p:4x4x4"
    if card:
      hint = f"JAX and its compiler must agree: {install_line('cuda13')}"
    raise config_lib.ConfigError(
      f"--topology={topology!r} can't be compiled for ({text[:300]}): {hint}"
    ) from error


def _gpus(card: devices_lib.Card, hosts: int, each: int) -> list[Any]:
  """Abstract devices of GPUs; the hosts share no NVLink."""
  from jax.experimental import topologies

  description = topologies.get_topology_desc(
    platform="cuda",
    target_config=devices_lib.target_config(card),
    topology=f"{hosts}x1x{each}",
  )
  return list(description.devices)


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

  from drift_jax.system import jaxprs
  from drift_jax.tools import gpu_memory, hlo

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
    flops=jaxprs.matmul_flops(traced.jaxpr, mesh.size),
    asked=hlo.totals(hlo.requested_collectives(traced.jaxpr)),
  )
  report.available, report.memory = devices_lib.available_memory(device)
  # 2. The compiler, which may refuse it
  with tempfile.TemporaryDirectory() as folder:
    options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    try:
      compiled = lowered.compile(options if device.platform != "cpu" else None)
    except jax.errors.JaxRuntimeError as error:
      text = " ".join(str(error).split())
      if "RESOURCE_EXHAUSTED" not in text:
        raise
      report.seconds = time.perf_counter() - start
      report.fits = False
      report.message = text.split(" See https")[0]
      report.peak = needed_bytes(text)
      report.advice = advice(report, config, mesh)
      return report
    report.seconds = time.perf_counter() - start
    # As the compiler wrote it on its way: libtpu 0.0.52 can't give the text of
    # some programs that it has compiled.
    text = _dumped(folder, "after_codegen")
    usage = _dumped(folder, "memory-usage-report")
    assignment = _dumped(folder, "buffer-assignment")
    ranges = _dumped(folder, "live-range")
  # 3. What it says
  report.outputs = _device_bytes(
    jax.tree.map(_result, traced.out_info, compiled.output_shardings)
  )
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
    if device.platform == "gpu":
      report.largest = gpu_memory.largest(text, assignment, ranges)
      report.attention = attention(report, config)
    if hlo_folder:
      _keep(hlo_folder, program.name, {"": text, "_memory": usage})
  if report.fits is False:
    report.advice = advice(report, config, mesh)
  report.advice += whole_sums(report)
  return report


def _result(shape: Any, sharding: Any) -> Any:
  """The abstract array of a result on its devices."""
  import jax

  return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


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
  if report.bytes_accessed is None:
    report.bytes_accessed = analysed.bytes
  elif analysed.bytes_once:
    report.bytes_accessed *= analysed.bytes / analysed.bytes_once
  report.parts = {
    name or "rest": {"bytes": size}
    for name, (_, size) in analysed.parts.items()
  }
  report.overflown = analysed.cycles >= hlo.OVERFLOWN
  if analysed.cycles and not report.overflown:
    report.estimated_seconds = analysed.cycles / hlo.CYCLES_PER_SECOND
    for name, (cycles, _) in analysed.parts.items():
      part = report.parts[name or "rest"]
      part["seconds"] = cycles / hlo.CYCLES_PER_SECOND
  report.kernels = analysed.kernels
  report.collectives = analysed.by_kind()


def argument_bytes(arguments: Mapping[str, Any]) -> dict[str, int]:
  """Bytes on each device of what a program is called with, by what it is."""
  sizes: dict[str, int] = {}
  for name, tree in arguments.items():
    parts = {name if name in ("params", "frozen") else "batch": tree}
    if name == "state":
      parts = {"params": tree.params, "optimizer": tree.opt_state}
      parts |= {"ema": tree.ema, "rest": (tree.step, tree.rng, tree.drift)}
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


def needed_bytes(message: str) -> int | None:
  """Memory that a program would take, as the compiler's refusal says."""
  match = re.search(r"(?:\(|Used )([\d.]+)([KMGT])", message)
  if match is None:
    return None
  return int(float(match[1]) * 2 ** (10 * (1 + "KMGT".index(match[2]))))


if __name__ == "__main__":
  define_flags()
  app.run(main, flags_parser=config_lib.parse_flags)
