"""Rows of benchmarks/growth.py: one step for each size of each quantity."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import configs, step_rows
from drift_jax import tasks
from drift_jax.system import sharding
from drift_jax.tools import compile_check

SMALLEST, LARGEST = 0.02, 0.2  # temperatures, evenly spaced in logarithms


@dataclasses.dataclass(frozen=True)
class Quantity:
  """What doubles.

  Attributes:
    start: its smallest size.
    keys: of the config; '' has none.
    must: how time grows at least where it is all there is.
  """

  start: int
  keys: tuple[str, ...]
  must: str


QUANTITIES = {
  "labels": Quantity(8, ("batch.labels",), "1"),
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
  if tiny:
    values["model"].update(hidden_size=32, cond_dim=32, depth=1)
    values["encoders"]["mae"]["model"]["base_channels"] = 16
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
  measure = _compiled if topology else _timed
  found: list[dict[str, Any]] = []
  for name in names:
    quantity = QUANTITIES[name]
    start = quantity.start
    if tiny and name in ("labels", "generated", "positives", "channels"):
      start //= 4
    sizes = [start << n for n in range(doublings + 1)]
    if sizes[-1] > len(devices) and name == "devices":
      raise ValueError(
        f"--doublings={doublings}: wants {sizes[-1]} devices, there are "
        f"{len(devices)}"
      )
    values = [
      measure(*_step(name, size, devices, tiny), seconds) for size in sizes
    ]
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


def _step(
  name: str, size: int, devices: Sequence[Any], tiny: bool
) -> tuple[Any, Any, Any]:
  """(program, mesh, config) with the quantity at its size."""
  values = base(tiny)
  for key in QUANTITIES[name].keys:
    *sections, last = key.split(".")
    section = values
    for part in sections:
      section = section[part]
    section[last] = size
  if name == "temperatures":
    values["drift"]["temperatures"] = tuple(
      map(float, np.geomspace(SMALLEST, LARGEST, size))
    )
  config = tasks.parse(values)
  count = size if name == "devices" else 1
  mesh = sharding.make_mesh(count, 1, devices[:count])
  return tasks.programs(config, mesh)[0], mesh, config


def _timed(
  program: Any, mesh: Any, config: Any, seconds: float
) -> tuple[float, float, str]:
  """Median time here, and what the compiler plans."""
  inputs = step_rows.random_inputs(config, program)
  compiled = step_rows.Compiled(program.jitted, tuple(inputs))
  run = step_rows.Chain(compiled.run, inputs[0], inputs[1:])
  run()
  times: list[float] = []
  stop = time.monotonic() + seconds
  while len(times) < 5 or time.monotonic() < stop:
    start = time.perf_counter()
    run()
    times.append(time.perf_counter() - start)
  return float(np.median(times)), compiled.arguments + compiled.memory, ""


def _compiled(
  program: Any, mesh: Any, config: Any, seconds: float
) -> tuple[float, float, str]:
  """The compiler's estimate and peak."""
  report = compile_check.compile_program(program, mesh, config)
  collective = sum(kind["bytes"] for kind in report.collectives.values())
  note = f"collectives {collective / 1e6:.3g} MB" if collective else ""
  return report.estimated_seconds or 0.0, report.peak or 0.0, note
