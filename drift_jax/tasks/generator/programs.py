"""What a run compiles, with abstract arguments: no data, weights or devices."""

import dataclasses
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from drift_jax.system import sharding
from drift_jax.system.errors import results_of
from drift_jax.tasks.generator import setup
from drift_jax.tasks.generator.config import (
  JUDGED_METRICS,
  GeneratorConfig,
  GeneratorEval,
  fd_networks,
)
from drift_jax.tasks.generator.judges import image_size, jit_network, judging
from drift_jax.tasks.generator.samplers import jit_sampler
from drift_jax.tasks.generator.step import GeneratorBatch, GeneratorTask
from drift_jax.training import artifacts
from drift_jax.training.frozen import decoding, load_encoders, load_vae
from drift_jax.training.programs import Program, abstract_batch, check_classes
from drift_jax.training.run import make_training, pad_to_mesh

# Arguments of a published Inception-v3, for runs whose weights are not there.
_INCEPTION = {"width": 16, "num_classes": 1008}


def programs(config: GeneratorConfig, mesh: Mesh) -> list[Program]:
  """Training step, sampler and evaluation steps; see tasks.programs."""
  sizes = config.batch
  *_, vae, encoders = results_of(
    lambda: check_classes(config.model.num_classes),
    lambda: setup.check_condition_size(config),
    lambda: setup.check_labels(config, mesh),
    lambda: load_vae(config.vae, mesh, weights=False),
    lambda: load_encoders(config.encoders, mesh, weights=False),
  )
  task = setup.generator_task(config, encoders, mesh, vae)
  setup.check_encoders(config, task, encoders, vae)
  labels = abstract_batch(mesh, sizes.labels, dtype=jnp.int32)
  if config.fd_loss.population:
    from drift_jax.tasks.generator import fd_setup  # seldom wanted
    from drift_jax.tasks.generator.fd_step import LabelBatch

    judges = _judges("fd_loss", fd_networks(config), mesh)
    tuning = fd_setup.Tuning(config, task, encoders, judges, vae, mesh)
    params = jax.eval_shape(setup.init_generator(task), jax.random.key(0))
    recipe, batch = tuning.abstract(params), LabelBatch(labels)
  else:
    frozen = setup.frozen_params(task, encoders, vae)
    recipe = setup.generator_recipe(task, frozen)
    wire = jnp.dtype(config.data.wire)
    reals = (
      abstract_batch(mesh, sizes.labels, count, *task.sample_shape, dtype=wire)
      for count in (sizes.positives, sizes.unconditional)
    )
    conditions = task.of_conditions(
      lambda shape: abstract_batch(mesh, sizes.labels, *shape)
    )
    batch = GeneratorBatch(labels, *reals, **conditions)
  training = make_training(config, mesh, recipe)
  train = {
    "state": training.abstract,
    "batch": batch,
    "frozen": recipe.frozen,
  }
  count = pad_to_mesh(config.eval.batch_size, mesh)
  indices = abstract_batch(mesh, count, dtype=jnp.int32)
  sample = {
    "params": training.abstract.params,
    "seed": jax.ShapeDtypeStruct((), jnp.uint32),
    "style": jax.ShapeDtypeStruct((task.style_tokens,), jnp.int32),
    "labels": indices,
    "alpha": abstract_batch(mesh, count),
    "index": indices,
    **task.of_conditions(lambda shape: abstract_batch(mesh, count, *shape)),
  }
  return [
    Program("train", training.step, train),
    Program("sample", jit_sampler(task, mesh), sample),
    *_evaluation_programs(config.eval, task, vae, mesh, count),
  ]


def _evaluation_programs(
  chosen: GeneratorEval,
  task: GeneratorTask,
  vae: artifacts.Artifact | None,
  mesh: Mesh,
  count: int,
) -> Iterator[Program]:
  """Frozen networks that evaluations run on `count` samples at a time."""
  if vae is not None:
    samples = abstract_batch(mesh, count, *task.sample_shape)
    decode = jit_network(decoding(vae), vae.params, mesh)
    yield Program("decode", decode, {"params": vae.params, "samples": samples})
  side = image_size(task.sample_shape, vae)
  pixels = abstract_batch(mesh, count, side, side, 3, dtype=jnp.uint8)
  wanted = {
    name: getattr(chosen, name).path
    for name, figures in JUDGED_METRICS.items()
    if set(figures) & set(chosen.metrics)
  }
  for name, artifact in _judges("eval", wanted, mesh).items():
    params = artifact.params
    judge = jit_network(judging(artifact), params, mesh)
    yield Program(f"judge {name}", judge, {"params": params, "pixels": pixels})


def _judges(
  section: str, paths: Mapping[str, str], mesh: Mesh
) -> dict[str, artifacts.Artifact]:
  """Networks of 8-bit images, with shapes for parameters, on every device.

  Args:
    section: of the config that names them.
    paths: {name: where its weights will be}.
    mesh: where they will run.
  """
  found = {}
  for name, path in paths.items():
    if epath.Path(path).exists():
      artifact = artifacts.load(path)
    elif name == "inception":
      artifact = artifacts.abstract(name, _INCEPTION)
    else:
      raise artifacts.ArtifactError(
        f"{section}.{name}.path={path!r} is not there, and nothing else says "
        "which model it will be: convert it first, or do without its figures "
        "and losses"
      )
    shardings = jax.tree.map(
      lambda _: sharding.replicated(mesh), artifact.params
    )
    params = sharding.abstract(artifact.params, shardings)
    found[name] = dataclasses.replace(artifact, params=params)
  return found
