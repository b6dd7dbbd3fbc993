"""What a run compiles, with abstract arguments: no data, weights or devices."""

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from drift_jax.system import sharding
from drift_jax.tasks.generator.config import (
  JUDGED_METRICS,
  GeneratorConfig,
  GeneratorEval,
)
from drift_jax.tasks.generator.judges import image_size, jit_network, judging
from drift_jax.tasks.generator.samplers import jit_sampler
from drift_jax.tasks.generator.setup import (
  abstract_encoders,
  check_encoders,
  check_labels,
  frozen_params,
  generator_recipe,
  generator_task,
)
from drift_jax.tasks.generator.step import GeneratorBatch
from drift_jax.training import artifacts
from drift_jax.training.frozen import abstract_vae, decoding
from drift_jax.training.programs import Program, abstract_batch
from drift_jax.training.run import make_training, pad_to_mesh

# Arguments of a published Inception-v3, for runs whose weights are not there.
_INCEPTION = {"width": 16, "num_classes": 1008}


def programs(config: GeneratorConfig, mesh: Mesh) -> list[Program]:
  """Training step, sampler and evaluation steps; see tasks.programs."""
  sizes = config.batch
  check_labels(config, mesh)
  vae = abstract_vae(config.vae, mesh)
  encoders = abstract_encoders(config.encoders, mesh)
  task = generator_task(config, encoders, mesh, vae)
  check_encoders(config, task, encoders, vae)
  frozen = frozen_params(task, encoders, vae)
  training = make_training(config, mesh, generator_recipe(task, frozen))
  wire = jnp.dtype(config.data.wire)
  reals = (
    abstract_batch(mesh, sizes.labels, count, *task.sample_shape, dtype=wire)
    for count in (sizes.positives, sizes.unconditional)
  )
  labels = abstract_batch(mesh, sizes.labels, dtype=jnp.int32)
  count = pad_to_mesh(config.eval.batch_size, mesh)
  samples = abstract_batch(mesh, count, *task.sample_shape)
  indices = abstract_batch(mesh, count, dtype=jnp.int32)
  found = [
    Program(
      "train",
      training.step,
      {
        "state": training.abstract,
        "batch": GeneratorBatch(labels, *reals),
        "frozen": frozen,
      },
    ),
    Program(
      "sample",
      jit_sampler(task, mesh),
      {
        "params": training.abstract.params,
        "seed": jax.ShapeDtypeStruct((), jnp.uint32),
        "style": jax.ShapeDtypeStruct((task.style_tokens,), jnp.int32),
        "labels": indices,
        "alpha": abstract_batch(mesh, count),
        "index": indices,
      },
    ),
  ]
  if vae is not None:
    found.append(
      Program(
        "decode",
        jit_network(decoding(vae), vae.params, mesh),
        {"params": vae.params, "samples": samples},
      )
    )
  side = image_size(task.sample_shape, vae)
  pixels = abstract_batch(mesh, count, side, side, 3, dtype=jnp.uint8)
  for name, artifact in _judges(config.eval).items():
    params = sharding.abstract(
      artifact.params,
      jax.tree.map(lambda _: sharding.replicated(mesh), artifact.params),
    )
    found.append(
      Program(
        f"judge {name}",
        jit_network(judging(artifact), params, mesh),
        {"params": params, "pixels": pixels},
      )
    )
  return found


def _judges(
  chosen: GeneratorEval,
) -> dict[str, artifacts.Artifact]:
  """The networks of the figures that an evaluation asks for."""
  sections = {"inception": chosen.inception, "dinov2": chosen.dinov2}
  found = {}
  for name, figures in JUDGED_METRICS.items():
    if not set(figures) & set(chosen.metrics):
      continue
    path = sections[name].path
    if epath.Path(path).exists():
      found[name] = artifacts.load(path)
    elif name == "inception":
      found[name] = artifacts.abstract(name, _INCEPTION)
    else:
      raise artifacts.ArtifactError(
        f"eval.{name}.path={path!r} is not there, and nothing else says which "
        "model it will be: convert it first, or leave its figures out of "
        "eval.metrics"
      )
  return found
