"""A small generator of pixels with random weights, for tests of samples."""

import os
import pathlib

import jax
import numpy as np

from configs import digits
from drift_jax import config as config_lib
from drift_jax.models import release
from drift_jax.models.generator import build_generator
from drift_jax.system import sharding
from drift_jax.tasks import parse
from drift_jax.tasks.generator.setup import generator_task, init_generator
from drift_jax.training import artifacts, checkpoint, state
from drift_jax.training.run import adamw

NAMES = ("tench, Tinca tinca", "goldfish", "white shark, shark", "hammer shark")


def arguments(**changes):
  """Of models.build_generator."""
  config = digits.get_config("smoke").model
  sizes = {"depth": 1, "hidden_size": 16, "cond_dim": 16, "num_heads": 2}
  config.update({**sizes, "num_classes": len(NAMES), **changes})
  return config.to_dict()


def random_params(arguments, seed: int = 0):
  """None of them zero, as initial ones would be."""
  module = build_generator(**arguments)
  shapes = jax.eval_shape(
    lambda: module.init(
      {"params": jax.random.key(0), "noise": jax.random.key(0)},
      np.zeros(1, np.int32),
      np.ones(1, np.float32),
    )["params"]
  )
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: (0.2 * rng.normal(size=x.shape)).astype(x.dtype), shapes
  )


def save_generator(
  folder: str | os.PathLike[str], *, seed: int = 0, facts=None, **changes
) -> str:
  """Writes it as an artifact; returns its folder."""
  chosen = arguments(**changes)
  artifacts.save(
    folder,
    kind="gen",
    model_config=release.published_config("gen", chosen),
    params=random_params(chosen, seed),
    step=3,
    ema_decay=0.9,
    facts={"class_names": NAMES, "alpha_range": (1.0, 3.0)}
    if facts is None
    else facts,
  )
  return str(folder)


def save_run(path: pathlib.Path, change=lambda state: state) -> str:
  """Writes a run of one checkpoint, step 1; returns its workdir.

  Its generator draws something else for each label and noise. `change` is
  applied to the state's arrays.
  """
  config = digits.get_config("smoke")
  config.model.update(depth=1, hidden_size=16, cond_dim=16, num_heads=2)
  typed = parse(config)
  task = generator_task(typed, {}, sharding.make_mesh())
  abstract, _ = state.abstract_and_init(
    init_generator(task),
    adamw(typed.optim, typed.train.num_steps)[0],
    ema_decays=typed.ema.decays,
    seed=typed.seed,
    mesh=sharding.make_mesh(),
  )
  rng = np.random.default_rng(0)
  # No parameters are zero, as initial ones would be.
  arrays = jax.tree.map(
    lambda x: (0.2 * rng.normal(size=x.shape)).astype(x.dtype), abstract
  )
  arrays = jax.tree.map(
    lambda x, s: jax.device_put(x, s.sharding), change(arrays), abstract
  )
  saver = checkpoint.Checkpointer(path / "checkpoints")
  saver.save(1, arrays, {"position": np.asarray(0)})
  saver.close()
  (path / "config.json").write_text(config_lib.to_json(typed))
  return str(path)
