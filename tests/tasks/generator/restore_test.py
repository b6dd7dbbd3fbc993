"""Generators of runs: on other machines than theirs, and damaged ones."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import drift_jax
from drift_jax.tasks.generator.restore import identity
from drift_jax.training.checkpoint import CheckpointError
from tests.small_generator import save_generator, save_run


@pytest.mark.slow
def test_run_of_another_machine_is_sampled_on_this_one(tmp_path):
  """Kernels are how it was computed there, and its mesh had other devices."""
  run = save_run(tmp_path)
  file = tmp_path / "config.json"
  config = json.loads(file.read_text())
  opened = []
  for kernels, devices in (("auto", -1), ("pallas", 128)):
    config["train"]["kernels"], config["mesh"]["data"] = kernels, devices
    file.write_text(json.dumps(config))
    opened.append(drift_jax.load(run).generator)
  assert opened[0].task == opened[1].task
  jax.tree.map(
    np.testing.assert_array_equal, opened[0].params, opened[1].params
  )


def test_checkpoint_that_is_not_finite_is_named(tmp_path):
  def spoil(state):
    ema = jax.tree.map(np.copy, state.ema)
    for params in ema.values():
      params["pos_embed"][0, 0, 0] = np.nan
    return dataclasses.replace(state, ema=ema)

  run = save_run(tmp_path / "run", spoil)
  with pytest.raises(CheckpointError, match="step 1 of .*pos_embed .*finite"):
    drift_jax.load(run)


def test_identity_is_that_of_the_numbers(tmp_path):
  """Wherever the weights lie; each of them counts, and where it stands."""
  first, same, other = (
    drift_jax.load(save_generator(tmp_path / name, seed=seed)).generator
    for name, seed in (("a", 0), ("b", 0), ("c", 1))
  )
  told = identity(first)
  assert told == identity(same) != identity(other)
  table = first.params["pos_embed"]
  for changed in (table.at[0, 1, 2].add(1e-6), jnp.flip(table, axis=1)):
    params = first.params | {"pos_embed": changed}
    assert told != identity(dataclasses.replace(first, params=params))
