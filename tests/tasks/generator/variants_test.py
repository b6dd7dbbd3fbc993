"""Fields other than the default, from configs to checkpoints."""

import json
import shutil

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from configs import digits
from drift_jax import config as config_lib
from drift_jax.metrics.writers import read_jsonl
from drift_jax.tasks import parse
from drift_jax.tasks.generator import train
from drift_jax.tasks.generator.setup import generator_task
from drift_jax.training import state as state_lib
from drift_jax.training.drifting import Temperature


def small(**changes):
  """A config of some steps of a tiny generator, {drift key: value} changed."""
  config = digits.get_config("smoke")
  config.model.update(depth=1, hidden_size=16, cond_dim=16, num_heads=2)
  config.batch.update(labels=8, generated=4, positives=8, unconditional=2)
  config.queue.prefill = 320
  config.optim.update(schedule="constant", warmup_steps=0)
  config.train.update(num_steps=4, log_every=1)
  config.eval.every = 0
  config.checkpoint.update(every=2, best_metric="")
  config.drift.update(changes)
  return config


@pytest.mark.slow
def test_a_learned_scale_is_in_the_checkpoint(tmp_path):
  """4 steps are 2 and 2 more, to the bit, with a field that has everything,
  extra negatives too."""
  changes = {
    "field": "sinkhorn",
    "negatives": "independent",
    "guidance": "velocity",
    "own_in_scale": True,
    "reduction": "mean",
    "diagnostics": True,
    "temperature_scale": {"kind": "learned", "rate": 0.1},
  }
  config = small(**changes)
  config.batch.negatives, config.train.detached_at_once = 3, 2
  whole = train.train_and_evaluate(config, str(tmp_path / "whole"))
  shutil.copytree(tmp_path / "whole", tmp_path / "parts")
  shutil.rmtree(tmp_path / "parts" / "checkpoints" / "4")
  parts = train.train_and_evaluate(config, str(tmp_path / "parts"))
  jax.tree.map(np.testing.assert_array_equal, parts, whole)
  assert float(np.exp(whole.drift["log_scale"])) != 1.0
  records = read_jsonl(tmp_path / "whole" / "metrics.jsonl")
  scales = [r["temperature_scale"] for r in records if "loss" in r]
  assert scales[0] == 1.0 and len(set(scales)) == 4
  assert all("marginal_error/0.05" in r for r in records if "loss" in r)
  assert (tmp_path / "whole" / "plots" / "diagnostics.png").exists()


@pytest.mark.slow
def test_an_annealed_scale_follows_the_step(tmp_path):
  changes = {
    "field": "gaussian",
    "temperature_scale": {"kind": "annealed", "rate": 0.5},
  }
  state = train.train_and_evaluate(small(**changes), str(tmp_path))
  assert state.drift == {}
  records = read_jsonl(tmp_path / "metrics.jsonl")
  scales = [r["temperature_scale"] for r in records if "loss" in r]
  np.testing.assert_allclose(scales, np.exp(-0.5 * np.arange(4)), rtol=1e-6)
  config = json.loads((tmp_path / "config.json").read_text())
  assert config["drift"]["field"] == "gaussian"


def test_an_annealed_scale_ends_above_zero():
  """exp(-88) is 0 in float32, and so would be all kernels' temperatures."""
  temperature = Temperature("annealed", 0.5, config_lib.LEAST_TEMPERATURE_SCALE)
  for step in (0, 4, 27, 28, 175, 10**6):
    state = state_lib.TrainState(jnp.int32(step), *[jnp.zeros(())] * 4)
    expected = max(np.exp(-0.5 * step), 1e-6)
    np.testing.assert_allclose(temperature.scale(state), expected, rtol=1e-5)
  # Runs of before may have begun so: they are still read.
  scale = {"kind": "annealed", "rate": 4.0}
  assert parse(small(temperature_scale=scale))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"field": "sinkhorm"}, "drift: field='sinkhorm' .*softmax, mmd"),
    (
      {"field": "kl", "normalization": "y"},
      "normalization='y' is of the field 'softmax', but field='kl'",
    ),
    (
      {"own_in_scale": True},
      "drift: own_in_scale=True needs negatives='independent': with 'own'",
    ),
    (
      {"temperature_scale": {"kind": "learned"}},
      "temperature_scale.rate=0.0 with kind='learned'",
    ),
    (
      {"temperature_scale": {"kind": "annealed", "rate": 4.0}},
      r"scale.rate=4.0 with train.num_steps=4: .*exp\(-16\).*at most 3.45",
    ),
    (
      {"temperature_scale": {"kind": "adaptive", "neighbours": 8.0}},
      "neighbours=8.0 .*batch.positives=8",
    ),
  ],
)
def test_mistakes_are_named_before_anything_is_loaded(
  tmp_path, changes, message
):
  # Annotations, which speak first, are enforced in tests only.
  jaxtyping.config.update("jaxtyping_disable", True)
  try:
    with pytest.raises(config_lib.ConfigError, match=message):
      train.train_and_evaluate(small(**changes), str(tmp_path / "run"))
  finally:
    jaxtyping.config.update("jaxtyping_disable", False)
  assert not (tmp_path / "run").exists()


def test_the_fused_kernel_is_of_the_default_field():
  config = small(field="kl")
  config.train.kernels = "pallas"
  mesh = jax.make_mesh((1, 1), ("data", "fsdp"), devices=jax.devices()[:1])
  with pytest.raises(config_lib.ConfigError, match="kernels='pallas'"):
    generator_task(parse(config), {}, mesh)
