"""Rows of benchmarks/fields.py: a field's loss and gradient, and its step."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import configs, growth_rows, timing
from drift_jax import drift, tasks
from drift_jax.system import sharding

# (name, labels x locations, channels, generated, positives, unconditional)
SHAPES = (
  ("digits, 16 x 64", 16, 64, 32, 96, 8),
  ("latent encoder, 64 locations x 512", 64, 512, 64, 64, 16),
)
TINY = (("tiny", 2, 8, 4, 6, 2),)
VARIANTS = {
  "mmd": drift.Variant(field="mmd"),
  "kl": drift.Variant(field="kl"),
  "gaussian": drift.Variant(field="gaussian"),
  "sharp": drift.Variant(field="sharp"),
  "sinkhorn, 10 iterations": drift.Variant(
    field="sinkhorn", options={"iterations": 10}
  ),
  "sinkhorn, 20 iterations, two batches, velocity guidance": drift.Variant(
    field="sinkhorn",
    options={"iterations": 20},
    negatives="independent",
    guidance="velocity",
  ),
  "softmax, adaptive temperature": drift.Variant(neighbours=4.0),
  "softmax, learned temperature": drift.Variant(learned=True),
  "softmax, diagnostics": drift.Variant(diagnostics=True),
}
# The settings of its ablation: docs/fields.md.
WFLOW = [
  "drift.field=sinkhorn",
  "drift.options.sinkhorn.cost=quadratic",
  "drift.options.sinkhorn.iterations=10",
  "drift.temperatures=[0.05]",
  "drift.negatives=independent",
  "drift.guidance=velocity",
  "drift.own_in_scale=true",
  "drift.reduction=mean",
]
STEPS = {
  **{
    name: [f"drift.field={name}"] for name in ("mmd", "kl", "gaussian", "sharp")
  },
  "W-Flow": WFLOW,
  "W-Flow, three temperatures": [
    *WFLOW,
    "drift.temperatures=[0.05, 0.1, 0.2]",
  ],
}


def case(
  variant: drift.Variant, b: int, c: int, n: int, p: int, u: int
) -> timing.Case:
  """One loss with its gradient."""
  rng = np.random.default_rng(0)

  def normal(count: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=(b, count, c)), jnp.float32)

  x, pos, neg, other = normal(n), normal(p), normal(u), normal(n)
  independent = other if variant.negatives == "independent" else None

  @jax.jit
  def gradient(x: jax.Array) -> Any:
    def loss(x: jax.Array) -> Any:
      value, info = drift.drift_loss(
        x,
        pos,
        neg,
        weight_neg=jnp.full((b, u), 0.5),
        temperatures=(0.02, 0.05, 0.2),
        variant=variant,
        independent=independent,
      )
      return value.mean(), info

    return jax.grad(loss, has_aux=True)(x)

  return timing.Case(lambda: jax.block_until_ready(gradient(x)))


def rows(report: timing.Report, shapes: Sequence[Any]) -> None:
  """Every variant on every shape."""
  for name, *sizes in shapes:
    plain = case(drift.PAPER, *sizes)
    cases = {key: case(v, *sizes) for key, v in VARIANTS.items()}
    report.compare(name, "ms", 1, plain, cases)


def step_rows(report: timing.Report, tiny: bool) -> None:
  """A whole step of each field, with growth.py's sizes."""
  mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
  found = {}
  for name, changes in {"softmax": [], **STEPS}.items():
    values = growth_rows.base(tiny)
    values["encoders"]["mae"]["in_loss"] = not tiny
    configs.change(values, changes)
    found[name] = growth_rows.timed_step(tasks.parse(values), mesh)
  plain, memory = found.pop("softmax")
  section = f"step of cifar10.py:cpu, softmax: {memory / 1e6:.0f} MB"
  report.compare(
    *(section, "ms", 1, plain),
    {name: case for name, (case, _) in found.items()},
    notes={name: f"{size / 1e6:.0f} MB" for name, (_, size) in found.items()},
  )
