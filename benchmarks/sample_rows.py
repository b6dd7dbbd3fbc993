"""Rows of benchmarks/sample.py: throughput and latency."""

import dataclasses
from typing import Any

import jax
import numpy as np

from benchmarks import configs, timing
from configs import models as sizes
from drift_jax.metrics.generation import generate
from drift_jax.system import devices, jaxprs, sharding
from drift_jax.tasks.generator.judges import make_decoder, make_pixels
from drift_jax.tasks.generator.restore import OpenedGenerator, sampling_task
from drift_jax.tasks.generator.samplers import (
  bind_sampler,
  jit_sampler,
  sample_step,
)
from drift_jax.tasks.generator.setup import (
  attention_kernel_for,
  memory_on_chip_for,
  unroll_for,
)
from drift_jax.training import artifacts
from drift_jax.training.step import apply

_PUBLISHED = {
  "b2": "generator_b2_latent",
  "b2_vae": "generator_b2_latent",
  "b16": "generator_b16_pixel",
  "l16": "generator_l16_pixel",
}


def arguments(name: str, dtype: str, tiny: bool) -> dict[str, Any]:
  """Of models.build_generator."""
  if name == "digits":
    chosen = configs.load("configs/digits.py")["model"]
    chosen["depth"] = 1 if tiny else chosen["depth"]
  else:
    chosen = sizes.GENERATORS[_PUBLISHED[name]]().to_dict()
    if dtype == "float32":
      chosen["attention_dtype"] = dtype
  return {**chosen, "dtype": dtype, "remat": "none"}


def open_random(
  name: str, dtype: str, tiny: bool, mesh: jax.sharding.Mesh
) -> OpenedGenerator:
  """A generator of random weights, and its autoencoder if there is one."""
  artifact = artifacts.abstract("gen", arguments(name, dtype, tiny))
  module: Any = artifact.module
  vae = None
  if name == "b2_vae":
    found = artifacts.abstract("vae", sizes.sd_vae().to_dict(), dtype=dtype)
    vae = dataclasses.replace(found, params=_random(found.params))
  task = sampling_task(
    module.clone(
      attention_kernel=attention_kernel_for("auto", mesh),
      memory_on_chip=memory_on_chip_for("auto", mesh),
      unroll=unroll_for(module.depth, mesh),
    ),
    pixels=vae is None,
  )
  return OpenedGenerator(
    task=task,
    params=_random(artifact.params),
    vae=vae,
    model_config=artifact.metadata["model_config"],
    num_classes=module.num_classes,
    class_names=(),
    alpha_range=(1.0, 4.0),
    step=None,
    ema_decay=None,
    provenance={},
  )


def rows(
  report: timing.Report, name: str, dtype: str, count: int, tiny: bool
) -> None:
  """Throughput and latency of one model."""
  mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
  opened = open_random(name, dtype, tiny, mesh)
  section = f"{name}, {dtype}"

  def ours(n: int) -> timing.Case:
    labels = np.arange(n, dtype=np.int32) % opened.num_classes
    sample = bind_sampler(step, opened.params, opened.task, mesh, 0)

    def run() -> None:
      for batch in generate(
        sample,
        labels,
        1.0,
        batch_size=n,
        to_pixels=make_pixels(decode),
      ):
        batch.rows(batch.pixels)

    return timing.Case(run)

  step = jit_sampler(opened.task, mesh)
  decode = make_decoder(opened.vae, mesh)
  if opened.vae is None and opened.task.sample_shape[-1] not in (1, 3):
    # Latents, as they are.
    decode = _first_channels

  def plain_image() -> None:
    samples = sample_step(
      opened.params,
      np.zeros(1, np.int32),
      np.ones(1, np.float32),
      np.zeros(1, np.int32),
      seed=0,
      task=opened.task,
    )
    if opened.vae is not None:
      samples = apply(
        opened.vae.module, opened.vae.params, samples, method="decode"
      )
    jax.block_until_ready(samples)

  case = timing.Case(plain_image)
  report.compare(section, "ms", 1, case, {"latency of one image": ours(1)})
  latency = report.rows[-1]
  assert latency.plain is not None
  report.compare(section, "images/s", count, None, {"throughput": ours(count)})
  rate = report.rows.pop().value
  plain_rate = 1e3 / latency.plain
  flops = _flops(opened)
  peak = devices.PEAK_FLOPS.get(jax.devices()[0].device_kind)
  share = f", {flops * rate / peak:.0%} of the peak" if peak else ""
  report.add(
    section,
    f"throughput, {count} at a time",
    "images/s",
    rate,
    plain_rate,
    rate / plain_rate,
    f"{flops * rate / 1e12:.3g} TFLOP/s{share}",
  )


def _first_channels(samples: Any) -> Any:
  return samples[..., :3]


def _flops(opened: OpenedGenerator) -> float:
  """Floating-point operations of one image's products."""

  def image(params: Any, decoder: Any, index: Any) -> Any:
    samples = sample_step(
      params,
      np.zeros(1, np.int32),
      np.ones(1, np.float32),
      index,
      seed=0,
      task=dataclasses.replace(
        opened.task,
        generator=opened.task.generator.clone(
          attention_kernel="xla", memory_on_chip=0
        ),
      ),
    )
    if opened.vae is None:
      return samples
    return apply(opened.vae.module, decoder, samples, method="decode")

  decoder = None if opened.vae is None else opened.vae.params
  traced = jax.jit(image).trace(opened.params, decoder, np.zeros(1, np.int32))
  return jaxprs.matmul_flops(traced.jaxpr, 1)


def _random(shapes: Any) -> Any:
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: jax.numpy.asarray(
      0.02 * rng.standard_normal(x.shape, np.float32), x.dtype
    ),
    shapes,
  )
