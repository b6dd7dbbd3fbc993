"""Generator training: `train_and_evaluate(config, workdir)`."""

import functools
from typing import Any

from etils import epath

from drift_jax.tasks import parse_as
from drift_jax.tasks.generator import setup
from drift_jax.tasks.generator.config import (
  GeneratorConfig,
  check_tuned,
  fd_networks,
)
from drift_jax.tasks.generator.evaluation import Evaluation
from drift_jax.tasks.generator.evaluators import judge_inputs, needs_reals
from drift_jax.training import frozen, inputs
from drift_jax.training.drifting import drift_arguments
from drift_jax.training.places import of_resumed
from drift_jax.training.run import at_end, open_mesh, run
from drift_jax.training.state import TrainState
from drift_jax.training.workdir import alone, has_checkpoints, open_workdir


@alone
def train_and_evaluate(config: Any, workdir: str) -> TrainState:
  """Trains the generator that a config describes, evaluating as it goes.

  Continues from the newest checkpoint in the workdir if there is one.

  Args:
    config: ConfigDict of task 'generator'.
    workdir: gets config.json, checkpoints/, metrics.jsonl, TensorBoard
      events, samples/*.png and plots/*.png.

  Returns:
    The final state.

  Raises:
    ConfigError: a config that can't be run, or a workdir in use.
    ArtifactError: an encoder that can't be loaded.
    CheckpointError: a damaged checkpoint.
    DataError, OSError: images that can't be read.
    NonFiniteError: a loss or gradient that is not finite.
    PeerError: any of these, in the first of several processes.
    Preempted: by SIGTERM, with the step saved.
  """
  # 1. What the run reads, and its networks.
  config = parse_as(config, GeneratorConfig)
  drift_arguments(config.drift)  # a mistake there, before data
  if not has_checkpoints(epath.Path(workdir)):
    check_tuned(config)
  mesh = open_mesh(config.mesh)
  setup.check_labels(config, mesh)
  config = of_resumed(config, workdir)
  inputs.require(_inputs(config, workdir), config)
  vae = frozen.load_vae(config.vae, mesh)
  readers = inputs.open_readers(config, vae)
  config = setup.with_classes(config, readers.train, workdir)
  encoders = frozen.load_encoders(config.encoders, mesh)
  task = setup.generator_task(config, encoders, mesh, vae)
  setup.check_encoders(config, task, encoders, vae)
  inputs.check_shape(readers.train, task.sample_shape, "the model makes")
  # 2. How it trains, and what it draws from.
  start_params = frozen.start_params(config, readers.train.class_names)
  sums, tuning = frozen.frozen_sums(encoders, vae), None
  if config.fd_loss.population:
    from drift_jax.tasks.generator import fd_setup  # seldom wanted

    judges = fd_setup.load_judges(config, mesh)
    tuning = fd_setup.Tuning(config, task, encoders, judges, vae, mesh)
    sums |= tuning.sums()
    feed = tuning.feed(readers.train)
  else:
    feed = setup.generator_feed(config, readers.train)
  evaluation = Evaluation(config, encoders, task, readers, vae, mesh)
  path = open_workdir(
    workdir, config, sums, readers.train.class_names, readers.facts
  )
  if tuning is None:
    params = setup.frozen_params(task, encoders, vae)
    recipe = setup.generator_recipe(task, params)
  else:
    recipe, start_params = tuning.prepare(readers.train, path, start_params)

  # 3. The steps.
  with at_end(functools.partial(evaluation.plot, path)):
    return run(
      config,
      path,
      mesh,
      recipe,
      start_params=start_params,
      feed=feed,
      evaluate=functools.partial(evaluation, path=path),
      best_metric=evaluation.best_metric,
      images=config.batch.labels * config.batch.generated,
    )


def _inputs(config: GeneratorConfig, workdir: str) -> list[inputs.Input]:
  """All that a run reads, in the order in which it is made."""
  chosen = config.eval
  metrics = chosen.metrics if chosen.every else ()
  wanted = inputs.image_inputs(
    config,
    # Trust needs what the run began with in all its starts.
    is_new=not has_checkpoints(epath.Path(workdir)) or config.fd_loss.trust > 0,
    tested=bool(metrics) and needs_reals(config),
  )
  wanted += [
    inputs.frozen_input(f"encoders.{name}", encoder.path)
    for name, encoder in config.encoders.items()
  ]
  wanted += [
    inputs.frozen_input(f"fd_loss.{name}", path)
    for name, path in fd_networks(config).items()
  ]
  judges = {"inception": chosen.inception, "dinov2": chosen.dinov2}
  return wanted + judge_inputs(metrics, judges, chosen.classifier)
