"""What a run compiles, with abstract arguments: no data, weights or devices."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from drift_jax import artifacts, sharding, steps
from drift_jax import config as config_lib
from drift_jax.experiment.evaluation import jit_mae_evaluation, jit_sampler
from drift_jax.experiment.inputs import LATENTS
from drift_jax.experiment.judges import image_size, jit_network, judging
from drift_jax.experiment.networks import (
  abstract_encoders,
  abstract_vae,
  check_encoders,
  decoding,
  frozen_params,
  generator_task,
  init_drift,
  init_generator,
  init_mae,
  mae_input_shape,
  mae_task,
)
from drift_jax.experiment.runs import (
  AnyConfig,
  check_divides,
  check_labels,
  make_training,
  pad_to_mesh,
)
from drift_jax.streams import stream

# Arguments of a published Inception-v3, for runs whose weights are not there.
_INCEPTION = {"width": 16, "num_classes": 1008}


class Program(NamedTuple):
  """A jitted function of a run and what it is called with.

  Attributes:
    name: 'train', 'sample', ...
    jitted: the function that the run itself calls.
    arguments: {what they are: tree of ShapeDtypeStructs with shardings}, in
      the function's order.
  """

  name: str
  jitted: Any
  arguments: dict[str, Any]


def programs(config: AnyConfig, mesh: Mesh) -> list[Program]:
  """Training step, sampler and evaluation steps of a run on a mesh.

  Raises:
    ArtifactError: a network that nothing describes.
    ConfigError: sizes that the mesh or the networks don't allow.
  """
  if isinstance(config, config_lib.ToyConfig | config_lib.PolicyConfig):
    raise config_lib.ConfigError(
      f"task={config.task!r} needs no check beforehand: it fits any device; "
      "valid options here are ['generator', 'mae']"
    )
  if not config.model.num_classes:
    raise config_lib.ConfigError(
      "model.num_classes=0 takes as many as the data have, but no data are "
      "read here: set it"
    )
  if isinstance(config, config_lib.GeneratorConfig):
    return _of_generator(config, mesh)
  return _of_encoder(config, mesh)


def _batch(mesh: Mesh, *shape: int, dtype: Any = jnp.float32) -> Any:
  return jax.ShapeDtypeStruct(
    shape, dtype, sharding=sharding.batch_sharding(mesh)
  )


def _of_generator(
  config: config_lib.GeneratorConfig, mesh: Mesh
) -> list[Program]:
  sizes = config.batch
  check_labels(config, mesh)
  vae = abstract_vae(config.vae, mesh)
  encoders = abstract_encoders(config.encoders, mesh)
  task = generator_task(config, encoders, mesh, vae)
  check_encoders(config, task, encoders, vae)
  frozen = frozen_params(task, encoders, vae)
  training = make_training(
    config,
    mesh,
    init_params=init_generator(task),
    init_drift=functools.partial(init_drift, task),
    step=functools.partial(steps.train_step, task=task),
    frozen=frozen,
  )
  wire = jnp.dtype(config.data.wire)
  reals = (
    _batch(mesh, sizes.labels, count, *task.sample_shape, dtype=wire)
    for count in (sizes.positives, sizes.unconditional)
  )
  labels = _batch(mesh, sizes.labels, dtype=jnp.int32)
  count = pad_to_mesh(config.eval.batch_size, mesh)
  samples = _batch(mesh, count, *task.sample_shape)
  indices = _batch(mesh, count, dtype=jnp.int32)
  found = [
    Program(
      "train",
      training.step,
      {
        "state": training.abstract,
        "batch": steps.GeneratorBatch(labels, *reals),
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
        "alpha": _batch(mesh, count),
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
  pixels = _batch(mesh, count, side, side, 3, dtype=jnp.uint8)
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
  chosen: config_lib.GeneratorEval,
) -> dict[str, artifacts.Artifact]:
  """The networks of the figures that an evaluation asks for."""
  sections = {"inception": chosen.inception, "dinov2": chosen.dinov2}
  found = {}
  for name, figures in config_lib.JUDGED_METRICS.items():
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


def _of_encoder(config: config_lib.MaeConfig, mesh: Mesh) -> list[Program]:
  check_divides("mae.batch_size", config.mae.batch_size, mesh)
  vae = abstract_vae(config.vae, mesh)
  side, channels = config.data.image_size, config.data.channels
  sample_shape = (side, side, channels)
  if config.data.source.startswith(LATENTS):
    assert vae is not None  # the config's checks ask for vae.path
    module: Any = vae.module
    sample_shape = (
      side // module.downsampling,
      side // module.downsampling,
      module.latent_channels,
    )
    vae = None
  task = mae_task(config, vae)
  vae_params = None if vae is None else vae.params
  input_shape = mae_input_shape(
    task, vae_params, sample_shape, config.model.in_channels
  )
  training = make_training(
    config,
    mesh,
    init_params=init_mae(task, input_shape),
    step=functools.partial(steps.mae_step, task=task),
    frozen=vae_params,
  )

  def batch(size: int) -> steps.MaeBatch:
    wire = jnp.dtype(config.data.wire)
    return steps.MaeBatch(
      _batch(mesh, size, *sample_shape, dtype=wire),
      _batch(mesh, size, dtype=jnp.int32),
    )

  found = [
    Program(
      "train",
      training.step,
      {
        "state": training.abstract,
        "batch": batch(config.mae.batch_size),
        "frozen": vae_params,
      },
    )
  ]
  if config.eval.every:
    count = pad_to_mesh(config.eval.batch_size, mesh)
    found.append(
      Program(
        "evaluate",
        jit_mae_evaluation(task, mesh, vae_params),
        {
          "params": training.abstract.params,
          "batch": batch(count),
          "valid": _batch(mesh, count, dtype=jnp.bool_),
          "key": jax.eval_shape(lambda: stream(config.seed, "mask")),
          "number": jax.ShapeDtypeStruct((), jnp.int32),
          "frozen": vae_params,
        },
      )
    )
  return found
