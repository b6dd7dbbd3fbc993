"""Flow matching with our generator: its step, its samplers, its figures.

On the line x_t = (1 - t) noise + t data the velocity is data - noise, and the
network learns its mean v(x_t, t, class) (arXiv:2210.02747, 2209.03003). A
sample is noise that follows v from t = 0 to 1.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from drift_jax.metrics import generation
from drift_jax.metrics.evaluators import baselines
from drift_jax.metrics.files import PathLike
from drift_jax.metrics.images import as_shown, save_image
from drift_jax.metrics.writers import read_jsonl
from drift_jax.system import sharding, storage
from drift_jax.system.console import logger
from drift_jax.tasks.generator import evaluators, judges, samplers, setup
from drift_jax.tasks.generator.config import GeneratorConfig
from drift_jax.training import frozen, inputs
from drift_jax.training import step as step_lib
from drift_jax.training.run import (
  Recipe,
  make_training,
  open_mesh,
  pad_to_mesh,
  run,
)
from drift_jax.training.state import TrainState
from drift_jax.training.workdir import alone, has_checkpoints, open_workdir

FILE = "flow_matching.jsonl"
# The generator's input alpha is TIME_SCALE t: its embedding's fastest wave has
# a period of 2 pi.
TIME_SCALE = 1000.0
# The generator adds the embedding of alpha, whose RMS is 1 at first, with a
# weight of 0.02: little for time, on which all of a velocity depends. That of
# time is this at first: more drowns the classes.
TIME_WEIGHT = 10.0
# Share of the samples that learn the velocity of all classes together.
DROPPED = 0.1


class FlowBatch(NamedTuple):
  """Images as they travel, see from_wire, and their labels."""

  image: jax.Array
  label: jax.Array


class Run(NamedTuple):
  """What was trained, and what judges it."""

  config: GeneratorConfig
  path: epath.Path
  mesh: jax.sharding.Mesh
  task: Any
  encoders: dict[str, Any]
  readers: inputs.Readers
  vae: Any


def velocity(
  generator: Any,
  params: Any,
  x: jax.Array,
  t: jax.Array,
  labels: jax.Array,
  scale: jax.Array | None = None,
) -> jax.Array:
  """v(x, t, class), [B, H, W, C]; with scales w [B] v_all + w (v - v_all)."""
  if scale is not None:
    x, t = (jnp.concatenate([each, each]) for each in (x, t))
    null = jnp.full_like(labels, generator.num_classes - 1)
    both = velocity(generator, params, x, t, jnp.concatenate([labels, null]))
    own, of_all = jnp.split(both, 2)
    return of_all + scale[:, None, None, None] * (own - of_all)
  return step_lib.apply(generator, params, labels, TIME_SCALE * t, noise=x)


def train_step(
  state: TrainState,
  batch: FlowBatch,
  frozen: Any,
  *,
  generator: Any,
  optimizer: Any,
  schedule: Any,
  layout: sharding.Layout | None = None,
) -> tuple[TrainState, step_lib.Metrics]:
  """One step on E |v(x_t, t, class) - (data - noise)|^2, a mean over pixels."""
  del frozen
  noise_key, time_key, class_key = jax.random.split(state.key(), 3)
  data = step_lib.from_wire(batch.image)
  noise = jax.random.normal(noise_key, data.shape)
  t = jax.random.uniform(time_key, batch.label.shape)
  dropped = jax.random.bernoulli(class_key, DROPPED, batch.label.shape)
  labels = jnp.where(dropped, generator.num_classes - 1, batch.label)

  def loss_of(
    params: Any, axes: Any, data: Any, noise: Any, t: Any, labels: Any
  ) -> tuple[jax.Array, None]:
    del axes
    share = t[:, None, None, None]
    x = (1 - share) * noise + share * data
    v = velocity(generator, params, x, t, labels)
    return jnp.mean(jnp.square(v - (data - noise))), None

  split = (data, noise, t, labels)
  loss, _, grads = step_lib.gradients_over(
    loss_of, state.params, split, (), layout
  )
  state, metrics = step_lib.update(state, grads, optimizer, schedule)
  return state, {"loss": loss, **metrics}


def flow_recipe(config: GeneratorConfig, mesh: Any) -> tuple[Recipe, Any]:
  """How it is trained, and the task that has its generator.

  The generator has one more class, which stands for all, and no style: a random
  style is drawn for a sample, and would tell nothing of the data on its line.
  """
  model = config.model
  model = dataclasses.replace(model, num_classes=model.num_classes + 1)
  task = setup.generator_task(
    dataclasses.replace(config, model=model), {}, mesh
  )

  def init(key: jax.Array) -> Any:
    params = setup.init_generator(task)(key)
    scale = params["alpha_embed"]["norm"]["scale"]
    params["alpha_embed"]["norm"]["scale"] = TIME_WEIGHT * scale
    return params

  step = functools.partial(train_step, generator=task.generator)
  recipe = Recipe(
    name="flow matching",
    init_params=init,
    step=step,
    batch=FlowBatch,
    frozen={},
  )
  return recipe, task


@alone
def train(
  config: GeneratorConfig, workdir: str, minutes: float | None
) -> tuple[TrainState, Run]:
  """Trains for so many minutes, or config.train.num_steps."""
  replace, path = dataclasses.replace, epath.Path(workdir)
  mesh = open_mesh(config.mesh)
  # 1. The data, and networks that judge.
  vae = frozen.load_vae(config.vae, mesh)
  readers = inputs.open_readers(config, vae)
  config = setup.with_classes(config, readers.train, workdir)
  encoders = frozen.load_encoders(config.encoders, mesh)
  config = replace(
    config,
    model=replace(config.model, style_tokens=0, clip=False),
    eval=replace(config.eval, every=0),
    checkpoint=replace(config.checkpoint, best_metric=""),
  )
  recipe, task = flow_recipe(config, mesh)
  inputs.check_shape(readers.train, task.sample_shape, "the model makes")
  images = config.batch.labels * config.batch.generated
  make_feed = functools.partial(
    inputs.make_loader, config, readers.train, images
  )
  # 2. For how long.
  steps = config.train.num_steps
  if minutes is not None and has_checkpoints(path):
    written = storage.read_json(path / "config.json", dict)
    steps = written["train"]["num_steps"]
  elif minutes is not None:
    speed = steps_per_second(config, mesh, recipe, make_feed(), minutes)
    steps = max(1, round(60 * minutes * speed))
    logger.info("%.3g steps a second: %d steps.", speed, steps)
  every = max(config.checkpoint.every, steps // 10)
  config = replace(
    config,
    train=replace(config.train, num_steps=steps),
    checkpoint=replace(config.checkpoint, every=every),
  )
  # 3. The training.
  names = readers.train.class_names
  path = open_workdir(workdir, config, {}, names, readers.facts)
  state = run(
    config,
    path,
    mesh,
    recipe,
    feed=make_feed(),
    evaluate=lambda *_, **__: {},
    images=images,
  )
  return state, Run(config, path, mesh, task, encoders, readers, vae)


def steps_per_second(
  config: GeneratorConfig, mesh: Any, recipe: Recipe, feed: Any, minutes: float
) -> float:
  """Speed of first steps, which nobody keeps, over a tenth of the minutes."""
  training = make_training(config, mesh, recipe)
  state, count, start, last = training.init(), 0, 0.0, {}
  while count < 3 or time.perf_counter() < start + min(6 * minutes, 30):
    batch = FlowBatch(**sharding.put_batch(next(feed), mesh))
    state, metrics = training.step(state, batch, recipe.frozen)
    # As in the loop, a step is under way while the next batch is made.
    jax.block_until_ready(last)
    last = metrics
    if count == 0:  # which compiles
      jax.block_until_ready(metrics)
      start = time.perf_counter()
    count += 1
  jax.block_until_ready(last)
  feed.close()
  return (count - 1) / (time.perf_counter() - start)


def make_sampler(
  of: Run, params: Any, solver: str, evaluations: int, guided: bool
) -> generation.SampleFn:
  """(labels, guidance scales, numbers) -> samples, from our numbered noise."""
  heun = solver == "heun"
  steps = evaluations // 2 if heun else evaluations
  width = 1.0 / steps

  def sample(
    params: Any, labels: jax.Array, scale: jax.Array, index: jax.Array
  ) -> jax.Array:
    x, _ = samplers.sample_inputs(index, seed=of.config.seed, task=of.task)

    def v(x: jax.Array, t: jax.Array) -> jax.Array:
      t = jnp.full(labels.shape, t)
      weight = scale if guided else None
      return velocity(of.task.generator, params, x, t, labels, weight)

    def advance(x: jax.Array, t: jax.Array) -> tuple[jax.Array, None]:
      slope = v(x, t)
      if heun:
        slope = (slope + v(x + width * slope, t + width)) / 2
      return x + width * slope, None

    times = jnp.linspace(0.0, 1.0, steps, endpoint=False)
    x = jax.lax.scan(advance, x, times)[0]
    return as_shown(x) if of.task.pixels else x

  step = jax.jit(sharding.over_batch(sample, of.mesh, sharding.specs(params)))
  return lambda *batch: step(params, *sharding.put_batch(batch, of.mesh))


def judge(
  state: TrainState,
  of: Run,
  counts: Sequence[int],
  scales: Sequence[float],
  solvers: Sequence[str],
) -> None:
  """Prints and writes the figures of each way to draw samples."""
  # 1. What judges, and what all lines say.
  config, chosen = of.config, of.config.eval
  params = state.ema[str(chosen.ema_decay)]
  num_classes = config.model.num_classes
  labels = evaluators.evaluation_labels(chosen, num_classes, of.readers)
  judging, _ = evaluators.run_evaluators(
    config, of.encoders, of.readers, labels, of.vae, of.mesh
  )
  size = pad_to_mesh(chosen.batch_size, of.mesh)
  decode = judges.make_decoder(of.vae, of.mesh)
  facts = {
    "steps": int(state.step),
    "images_per_step": config.batch.labels * config.batch.generated,
    "train_seconds": train_seconds(of.path),
    "real": baselines(judging),
  }
  # 2. The figures and a picture of each way.
  ways = [
    (solver, count, scale)
    for scale in scales
    for solver in solvers
    for count in counts
    if solver == "euler" or count % 2 == 0
  ]
  lines = []
  for solver, count, scale in ways:
    guided = scale != 1
    sample = make_sampler(of, params, solver, count, guided)
    figures = generation.evaluate(
      judging,
      sample,
      labels,
      [scale],
      size,
      to_pixels=judges.make_pixels(decode, chosen.pixels),
    )[scale]
    grid = samplers.sample_grid(
      sample,
      decode,
      num_classes=num_classes,
      classes=chosen.grid_classes,
      per_class=chosen.grid_per_class,
      alpha=scale,
      batch_size=size,
    )
    name = f"{solver}_{count}" + f"_guided_{scale:g}" * guided
    (of.path / "samples").mkdir(exist_ok=True)
    save_image(grid, of.path / "samples" / f"{name}.png")
    row = {
      "solver": solver,
      "guidance": scale,
      "evaluations": count * (1 + guided),
      "figures": figures,
      "samples_per_second": samples_per_second(sample, labels, scale, size),
      **facts,
    }
    lines.append(f"{json.dumps(row)}\n")
    print(lines[-1], end="", flush=True)
    (of.path / FILE).write_text("".join(lines))


def samples_per_second(
  sample: generation.SampleFn, labels: np.ndarray, scale: float, size: int
) -> float:
  """Of the fastest of three batches."""
  index = np.arange(size, dtype=np.int32)
  batch = np.resize(labels, size), np.full(size, scale, np.float32), index
  seconds = []
  for _ in range(3):
    start = time.perf_counter()
    jax.block_until_ready(sample(*batch))
    seconds.append(time.perf_counter() - start)
  return size / min(seconds)


def train_seconds(workdir: PathLike) -> float:
  """Seconds of the steps of a run of any task, by its metrics.jsonl."""
  logged = [
    (record["step"], record["perf/steps_per_second"])
    for record in read_jsonl(epath.Path(workdir) / "metrics.jsonl")
    if "perf/steps_per_second" in record
  ]
  before = [0, *(step for step, _ in logged)]
  return sum(
    (step - last) / speed
    for (step, speed), last in zip(logged, before, strict=False)
  )
