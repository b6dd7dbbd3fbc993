"""Rows of benchmarks/growth.py: one step for each size of each quantity."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import configs, step_rows, timing
from drift_jax import config as config_lib
from drift_jax import tasks
from drift_jax.system import sharding
from drift_jax.tools import compile_check

SMALLEST, LARGEST = 0.02, 0.2  # temperatures, evenly spaced in logarithms


@dataclasses.dataclass(frozen=True)
class Quantity:
  """What doubles.

  Attributes:
    start: its smallest size.
    keys: of the config.
    must: how time grows at least where it is all there is.
  """

  start: int
  keys: tuple[str, ...]
  must: str


QUANTITIES = {
  "labels": Quantity(4, ("batch.labels",), "1"),
  "generated": Quantity(32, ("batch.generated",), "1; losses 2"),
  "positives": Quantity(64, ("batch.positives",), "1 of the encoder, losses"),
  "temperatures": Quantity(3, ("drift.temperatures",), "1 of the losses"),
  "channels": Quantity(
    64, ("encoders.mae.model.base_channels",), "2 of the encoder; losses 1"
  ),
  "pixels": Quantity(
    32, ("model.input_size", "data.image_size"), "2; attention 4"
  ),
  "devices": Quantity(1, (), "-1; here devices share the cores: 0"),
}


def base(tiny: bool) -> dict[str, Any]:
  """cifar10.py:cpu in the features of cifar10.py:cpu_encoder."""
  values = configs.load("configs/cifar10.py:cpu")
  encoder = configs.load("configs/cifar10.py:cpu_encoder")["model"]
  values["encoders"]["mae"]["path"] = "none"
  values["encoders"]["mae"]["model"] = {"kind": "mae", **encoder}
  values["encoders"]["mae"]["model"]["num_classes"] = 10
  values["model"]["num_classes"] = 10
  values["drift"]["temperatures"] = _temperatures(3)
  if tiny:
    values["model"].update(hidden_size=32, cond_dim=32, depth=1)
    values["features"].update(patch_mean_size=(), patch_std_size=())
    values["batch"].update(labels=2, generated=16, positives=32)
    values["encoders"]["mae"]["model"]["base_channels"] = 32
  return values


def rows(
  names: Sequence[str],
  doublings: int,
  topology: str,
  seconds: float,
  tiny: bool,
) -> list[dict[str, Any]]:
  """Sizes, seconds and bytes of one device for each quantity."""
  devices = compile_check.find_devices(topology)
  if "devices" in names and 2**doublings > len(devices):
    raise config_lib.ConfigError(
      f"--doublings={doublings}: {2**doublings} devices are wanted, there are "
      f"{len(devices)}; leave 'devices' out of --quantities, or double less"
    )
  measure = _compiled if topology else _timed
  # All quantities start from the same step.
  known: dict[tuple[str, int], tuple[float, float, str]] = {}
  found: list[dict[str, Any]] = []
  for name in names:
    quantity = QUANTITIES[name]
    start = quantity.start
    if tiny and name in ("labels", "generated", "positives", "channels"):
      start //= 2
    sizes = [start << n for n in range(doublings + 1)]
    values: list[tuple[float, float, str]] = []
    for size in sizes:
      config = _config(name, size, tiny)
      count = size if name == "devices" else 1
      key = config_lib.to_json(config), count
      if key not in known:
        mesh = sharding.make_mesh(count, 1, devices[:count])
        known[key] = measure(config, mesh, seconds)
      values.append(known[key])
    times, memory, notes = zip(*values, strict=True)
    found.append(
      {
        "section": "step of cifar10.py:cpu",
        "name": name,
        "sizes": sizes,
        "seconds": times,
        "memory": memory,
        "must": quantity.must,
        "note": notes[-1],
      }
    )
  return found


def _config(name: str, size: int, tiny: bool) -> Any:
  """The step's config with the quantity at its size."""
  values = base(tiny)
  keys = QUANTITIES[name].keys
  configs.change(values, [f"{key}={size}" for key in keys])
  if name == "temperatures":
    values["drift"]["temperatures"] = _temperatures(size)
  return tasks.parse(values)


def _temperatures(count: int) -> tuple[float, ...]:
  return tuple(map(float, np.geomspace(SMALLEST, LARGEST, count)))


def _timed(config: Any, mesh: Any, seconds: float) -> tuple[float, float, str]:
  """Median time here, and what the compiler plans."""
  case, memory = timed_step(config, mesh)
  report = timing.Report(seconds)
  report.compare("", "s", 1, None, {"step": case})
  return report.rows[-1].value, memory, ""


def timed_step(config: Any, mesh: Any) -> tuple[timing.Case, int]:
  """A training step of random inputs, and the bytes that it needs."""
  program = tasks.programs(config, mesh)[0]
  inputs = step_rows.random_inputs(config, program)
  compiled = step_rows.Compiled(program.jitted, tuple(inputs))
  run = step_rows.Chain(compiled.run, inputs[0], inputs[1:])
  return timing.Case(run), compiled.arguments + compiled.memory


def _compiled(
  config: Any, mesh: Any, seconds: float
) -> tuple[float, float, str]:
  """The compiler's estimate and peak."""
  del seconds
  program = tasks.programs(config, mesh)[0]
  report = compile_check.compile_program(program, mesh, config)
  collective = sum(kind["bytes"] for kind in report.collectives.values())
  note = f"collectives {collective / 1e6:.3g} MB" if collective else ""
  return report.estimated_seconds or 0.0, report.peak or 0.0, note
