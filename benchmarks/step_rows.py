"""Rows of benchmarks/step.py: the step, and the drifting losses alone."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import configs, plain_step, timing
from drift_jax import drift
from drift_jax.models.mae import build_mae
from drift_jax.system import devices, jaxprs, sharding
from drift_jax.tasks import parse, programs
from drift_jax.tasks.generator import setup as networks
from drift_jax.tasks.generator.setup import kernel_for
from drift_jax.training.frozen import load_encoders, load_vae
from drift_jax.training.programs import Program
from drift_jax.training.run import make_optimizer


@dataclasses.dataclass(frozen=True)
class LossSizes:
  """Of the drifting losses on their own.

  Attributes:
    side: of the encoder's square input.
    base_channels: the encoder's.
    layers: the encoder's.
    labels, generated, positives, unconditional: of the batch.
  """

  side: int = 16
  layers: tuple[int, ...] = (3, 4, 6, 3)
  base_channels: int = 64
  labels: int = 16
  generated: int = 16
  positives: int = 16
  unconditional: int = 4


TINY = LossSizes(8, (1, 1, 1, 1), 8, 2, 4, 3, 2)


def changed(name: str, overrides: Sequence[str]) -> Any:
  """The parsed config with KEY=VALUE set.

  Encoders whose model nothing describes are those of configs/digits.py.
  """
  values = configs.load(name, overrides)
  digits = configs.load("configs/digits.py:encoder")["model"]
  for encoder in values["encoders"].values():
    encoder["path"] = encoder["path"] or "none"
    encoder["model"] = encoder["model"] or {"kind": "mae", **digits}
  return parse(values)


def rows(report: timing.Report, name: str, overrides: Sequence[str]) -> None:
  """Time, memory and compilation of both steps."""
  config = changed(name, overrides)
  mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
  program = programs(config, mesh)[0]
  state, batch, frozen = random_inputs(config, program)
  encoders = load_encoders(config.encoders, mesh, weights=False)
  vae = load_vae(config.vae, mesh, weights=False)
  task = networks.generator_task(config, encoders, mesh, vae)
  optimizer, _ = make_optimizer(config.optim, config.train.num_steps)
  plain = jax.jit(
    functools.partial(
      plain_step.train_step,
      task=task,
      optimizer=optimizer,
    )
  )
  images = len(batch.labels) * task.num_generated
  section = (
    f"step of {name.removeprefix('configs/')}, {len(batch.labels)} x "
    f"{task.num_generated} samples"
  )
  flops = jaxprs.matmul_flops(plain.trace(state, batch, frozen).jaxpr, 1)
  compiled = {
    "plain": Compiled(plain, (state, batch, frozen)),
    "ours": Compiled(program.jitted, (state, batch, frozen)),
  }
  ours, plain_case = (
    Chain(compiled[which].run, state, (batch, frozen))
    for which in ("ours", "plain")
  )
  report.compare(
    section,
    "images/s",
    images,
    timing.Case(plain_case),
    {"train_step": timing.Case(ours)},
  )
  row = report.rows[-1]
  for which, rate in (("ours", row.value), ("plain", row.plain)):
    assert rate is not None
    per_second = flops * rate / images
    peak = devices.PEAK_FLOPS.get(jax.devices()[0].device_kind)
    share = f", {per_second / peak:.0%} of the peak" if peak else ""
    report.add(
      section,
      f"operations, {which}",
      "TFLOP/s",
      per_second / 1e12,
      note=f"products of the plain step{share}",
    )
  _size_rows(report, section, compiled)


def loss_rows(report: timing.Report, sizes: LossSizes) -> None:
  """Value and gradient of the drifting losses of many features."""
  mae = build_mae(
    in_channels=4,
    base_channels=sizes.base_channels,
    layers=sizes.layers,
    input_patch_size=1,
    mask_patch_size=2,
    num_classes=10,
    norm_groups=32,
    dtype="float32",
    remat=False,
  )
  image = jax.ShapeDtypeStruct((1, sizes.side, sizes.side, 4), jnp.float32)
  found = jax.eval_shape(
    lambda x: mae.init_with_output(
      {"params": jax.random.key(0)}, x, method="features"
    )[0],
    image,
  )

  def features(seed: int, count: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {
      key: jnp.asarray(
        rng.standard_normal((sizes.labels, count, *x.shape[1:]), np.float32)
      )
      for key, x in found.items()
    }

  generated = features(0, sizes.generated)
  real = features(1, sizes.positives + sizes.unconditional)
  weight = jnp.linspace(1.0, 3.0, sizes.labels)
  options: dict[str, Any] = {
    "num_positives": sizes.positives,
    "temperatures": (0.02, 0.05, 0.2),
    "affinity_floor": 1e-6,
  }
  kernel = kernel_for("auto", sharding.make_mesh())

  def ours(generated: Any, real: Any, weight: Any) -> jax.Array:
    return drift.drift_losses(
      generated, real, weight, kernel=kernel, **options
    )[0].sum()

  plain = functools.partial(plain_step.drift_losses, **options)
  inputs = (generated, real, weight)
  compiled = {
    name: Compiled(jax.jit(jax.value_and_grad(function)), inputs)
    for name, function in (("plain", plain), ("ours", ours))
  }
  values, gradients = zip(
    *(compiled[name].run(*inputs) for name in compiled), strict=True
  )
  apart = abs(float(values[1] / values[0]) - 1)
  worst = max(
    float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a))
    for a, b in zip(*map(jax.tree.leaves, gradients), strict=True)
  )
  section = (
    f"drifting losses of {sizes.labels} labels, {len(found)} features of width "
    f"{sizes.base_channels} to {8 * sizes.base_channels}"
  )
  report.compare(
    section,
    "ms",
    1,
    timing.Case(lambda: jax.block_until_ready(compiled["plain"].run(*inputs))),
    {
      "value and gradient": timing.Case(
        lambda: jax.block_until_ready(compiled["ours"].run(*inputs))
      )
    },
    notes={
      "value and gradient": f"values differ by {apart:.1e}, gradients by "
      f"{worst:.1e}"
    },
  )
  _size_rows(report, section, compiled)


class Compiled:
  """A compiled function.

  Attributes:
    run: calls it.
    seconds: of tracing and compiling it.
    memory: bytes of its temporaries, and of results that replace no argument.
    arguments: bytes of what it is called with.
  """

  def __init__(self, jitted: Any, inputs: tuple[Any, ...]):
    """Compiles it for the inputs."""
    start = time.perf_counter()
    compiled = jitted.lower(*inputs).compile()
    self.seconds = time.perf_counter() - start
    self.run: Callable[..., Any] = compiled
    memory: Any = compiled.memory_analysis()
    self.arguments: int = memory.argument_size_in_bytes
    self.memory: int = (
      memory.temp_size_in_bytes
      + memory.output_size_in_bytes
      - memory.alias_size_in_bytes
    )


class Chain:
  """Step after step, each with the state of the last; waits for its metrics."""

  def __init__(self, step: Callable[..., Any], state: Any, rest: Any):
    # Its own: a step that donates its state must not take another's.
    self._state = jax.tree.map(jnp.copy, state)
    self._step, self._rest = step, rest

  def __call__(self) -> None:
    self._state, metrics = self._step(self._state, *self._rest)
    jax.block_until_ready((self._state, metrics))


def _size_rows(
  report: timing.Report, section: str, compiled: dict[str, Compiled]
) -> None:
  for name, unit, values in (
    (
      "memory beside arguments",
      "MB",
      {k: c.memory / 1e6 for k, c in compiled.items()},
    ),
    ("compilation", "s", {k: c.seconds for k, c in compiled.items()}),
  ):
    ours, plain = values["ours"], values["plain"]
    report.add(section, name, unit, ours, plain, plain / ours)


def random_inputs(config: Any, program: Program) -> list[Any]:
  """Random state, batch and frozen parameters of a generator's step."""
  state, batch, frozen = (_random(tree) for tree in program.arguments.values())
  labels = batch.labels % config.model.num_classes
  return [state, batch._replace(labels=labels), frozen]


def _random(tree: Any) -> Any:
  """Arrays of the shapes: small normal numbers, or integers that count up."""
  leaves, structure = jax.tree.flatten(tree)
  rng = np.random.default_rng(0)

  def value(x: Any) -> jax.Array:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      return jax.random.key(0)
    if jnp.issubdtype(x.dtype, jnp.integer):
      return jnp.arange(x.size, dtype=x.dtype).reshape(x.shape)
    numbers = 0.02 * rng.standard_normal(x.shape, np.float32)
    array = jnp.asarray(numbers, x.dtype)
    # Kernels lie as cuDNN takes them, see training/frozen.py.
    laid = x.sharding is not None and x.format.layout is not None
    return jax.device_put(array, x.format) if laid else array

  return structure.unflatten([value(leaf) for leaf in leaves])
