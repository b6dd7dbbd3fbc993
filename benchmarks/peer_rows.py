"""Rows of benchmarks/peers.py: losses, generator and features, ours."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.step_rows import Compiled
from configs import models
from drift_jax import drift
from drift_jax.system import sharding
from drift_jax.tasks.generator.setup import (
  attention_kernel_for,
  remat_for,
  unroll_for,
)
from drift_jax.training import artifacts

# Labels x locations, channels; 64 samples, 64 positives, 16 unconditional.
LOSSES = ((64, 64), (64, 256), (16, 1024), (256, 128))
SAMPLES, POSITIVES, UNCONDITIONAL = 64, 64, 16
TEMPERATURES = (0.02, 0.05, 0.2)


def normal(*shape: int) -> jax.Array:
  """Standard normal numbers."""
  rng = np.random.default_rng(sum(shape))
  return jnp.asarray(rng.standard_normal(shape, np.float32))


def loss(x: jax.Array, pos: jax.Array, neg: jax.Array) -> jax.Array:
  """Mean drifting loss of one feature key, of the paper's options."""
  weight = jnp.ones(neg.shape[:2])
  losses, _ = drift.drift_loss(
    *(x, pos, neg), weight_neg=weight, temperatures=TEMPERATURES
  )
  return losses.mean()


def plain_loss(x: jax.Array, pos: jax.Array, neg: jax.Array) -> jax.Array:
  """The same as the paper's text has it: unstable softmaxes, whole products."""
  weight = jnp.ones(neg.shape[:2])
  return drift.paper_loss(x, pos, neg, weight, TEMPERATURES).mean()


def generator(tiny: bool) -> tuple[Callable[..., jax.Array], Any]:
  """(samples [n, 32, 32, 4] of parameters and labels, parameters) of B/2."""
  mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
  arguments = models.generator_b2_latent().to_dict()
  arguments |= {"dtype": "float32", "attention_dtype": "float32"}
  arguments |= {"depth": 1} if tiny else {}
  found = artifacts.abstract("gen", arguments)
  module: Any = found.module
  module = module.clone(
    attention_kernel=attention_kernel_for("auto", mesh),
    remat=remat_for("auto", mesh),
    unroll=unroll_for(module.depth, mesh),
  )

  def samples(params: Any, labels: jax.Array) -> jax.Array:
    alpha = jnp.ones(len(labels))
    rngs = {"noise": jax.random.key(0)}
    return module.apply({"params": params}, labels, alpha, rngs=rngs)

  return samples, _random(found.params)


def features(tiny: bool) -> tuple[Callable[..., Any], Any]:
  """(features of samples and parameters, parameters) of MAE-256."""
  arguments = models.mae_256_latent().to_dict() | {"dtype": "float32"}
  if tiny:
    arguments |= {"base_channels": 32, "layers": (1, 1, 1, 1)}
  found = artifacts.abstract("mae", arguments)
  module: Any = found.module

  def of(x: jax.Array, params: Any) -> Any:
    return module.apply({"params": params}, x, method="features")

  return of, _random(found.params)


def total(function: Callable[..., Any], *inputs: Any) -> jax.Array:
  """Sum of the squares of all results: something to differentiate."""
  return sum(jnp.sum(x**2) for x in jax.tree.leaves(function(*inputs)))


def _random(tree: Any) -> Any:
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: jnp.asarray(0.02 * rng.standard_normal(x.shape), x.dtype), tree
  )


def rows(report: timing.Report, tiny: bool) -> None:
  """All of the table."""

  def add(
    section: str,
    name: str,
    unit: str,
    function: Any,
    *inputs: Any,
    plain: Any = None,
  ) -> None:
    def case(function: Any) -> tuple[timing.Case, str]:
      compiled = Compiled(jax.jit(function), inputs)
      run = timing.Case(lambda: jax.block_until_ready(compiled.run(*inputs)))
      return run, f"{compiled.memory / 1e6:.0f} MB"

    ours, note = case(function)
    beside = None
    if plain is not None:
      beside, memory = case(plain)
      note += f"; plain {memory}"
    report.compare(section, unit, 1, beside, {name: ours}, notes={name: note})

  for problems, channels in ((2, 8),) if tiny else LOSSES:
    arrays = [
      normal(problems, count, channels)
      for count in (SAMPLES, POSITIVES, UNCONDITIONAL)
    ]
    name = f"{problems} problems of {channels} channels"
    section = "drifting loss and gradient"
    gradient, plain = map(jax.value_and_grad, (loss, plain_loss))
    add(section, name, "ms", gradient, *arrays, plain=plain)
  samples, params = generator(tiny)
  labels = jnp.arange(1 if tiny else 8)
  section = f"generator B/2, {len(labels)} samples"
  squares = functools.partial(total, samples)
  add(section, "forward", "s", samples, params, labels)
  gradient = jax.grad(squares)
  add(section, "forward and backward", "s", gradient, params, labels)
  of, params = features(tiny)
  images = normal(1 if tiny else 4, 32, 32, 4)
  section = f"features of MAE-256, {len(images)} samples"
  squares = functools.partial(total, of)
  add(section, "forward", "s", of, images, params)
  gradient = jax.grad(squares)
  add(section, "forward and backward", "s", gradient, images, params)
