"""A small generator of pixels with random weights, for tests of samples."""

import os
import pathlib

import jax
import numpy as np

from configs import digits
from drift_jax import config as config_lib
from drift_jax.system import sharding
from drift_jax.tasks import parse
from drift_jax.tasks.generator.setup import generator_task, init_generator
from drift_jax.training import checkpoint, state
from drift_jax.training.run import make_optimizer
from tests.builders import random_like, save_model

NAMES = ("tench, Tinca tinca", "goldfish", "white shark, shark", "hammer shark")
# Of the digits' model, which is larger.
TINY = {"depth": 1, "hidden_size": 16, "cond_dim": 16, "num_heads": 2}


def arguments(**changes):
  """Of models.build_generator."""
  config = digits.get_config("smoke").model
  config.update({**TINY, "num_classes": len(NAMES), **changes})
  return config.to_dict()


def save_generator(
  folder: str | os.PathLike[str], *, seed: int = 0, facts=None, **changes
) -> str:
  """Writes it as an artifact; returns its folder."""
  if facts is None:
    facts = {"class_names": NAMES, "alpha_range": (1.0, 3.0)}
  save_model(
    *(folder, "gen", arguments(**changes)),
    **{"scale": 0.2, "seed": seed, "step": 3, "ema_decay": 0.9},
    facts=facts,
  )
  return str(folder)


def save_checkpoint(workdir: pathlib.Path, config, change=lambda state: state):
  """Writes a checkpoint of step 1, of a parsed config without encoders.

  Its generator draws something else for each label and noise. `change` is
  applied to the state's arrays.
  """
  mesh = sharding.make_mesh()
  abstract, _ = state.abstract_and_init(
    init_generator(generator_task(config, {}, mesh)),
    make_optimizer(config.optim, config.train.num_steps)[0],
    ema_decays=config.ema.decays,
    seed=config.seed,
    mesh=mesh,
  )
  arrays = jax.tree.map(
    lambda x, s: jax.device_put(x, s.sharding),
    change(random_like(abstract, 0.2)),
    abstract,
  )
  saver = checkpoint.Checkpointer(workdir / "checkpoints")
  saver.save(1, arrays, {"position": np.asarray(0)})
  saver.close()


def save_run(path: pathlib.Path, change=lambda state: state) -> str:
  """Writes a run of one checkpoint, step 1; returns its workdir."""
  config = digits.get_config("smoke")
  config.model.update(TINY)
  typed = parse(config)
  save_checkpoint(path, typed, change)
  (path / "config.json").write_text(config_lib.to_json(typed))
  return str(path)
