"""Meshes, rules and batch placement."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from drift_jax import config as config_lib
from drift_jax.system import sharding
from drift_jax.training import run as run_lib
from drift_jax.training import state as state_lib
from tests.conftest import assert_close


@pytest.mark.parametrize(
  ("sizes", "shape"),
  [((-1, 1), (8, 1)), ((-1, 4), (2, 4)), ((2, -1), (2, 4)), ((8, 1), (8, 1))],
)
def test_mesh_shapes(sizes, shape):
  mesh = sharding.make_mesh(*sizes)
  assert tuple(mesh.shape.items()) == (("data", shape[0]), ("fsdp", shape[1]))


@pytest.mark.parametrize(
  "sizes", [(3, 1), (-1, 3), (-1, -1), (2, 2), (0, 8), (-2, -4)]
)
def test_mesh_that_does_not_fit(sizes):
  with pytest.raises(ValueError, match="does not fit 8 devices"):
    sharding.make_mesh(*sizes)


@pytest.mark.parametrize(
  ("name", "shape", "spec"),
  [
    ("params/blocks/mlp/up/kernel", (12, 64, 192), (None, "fsdp")),
    ("params/blocks/mlp/down/kernel", (12, 192, 64), (None, "fsdp")),
    ("params/square/kernel", (64, 64), ("fsdp",)),
    ("params/last/kernel", (3, 3, 5, 64), (None, None, None, "fsdp")),
    ("params/odd/kernel", (3, 5), ()),
    ("params/blocks/norm/scale", (12, 64), ()),
    ("opt_state/1/0/count", (), ()),
  ],
)
def test_rules(name, shape, spec):
  assert sharding.spec_for(name, shape, 4) == PartitionSpec(*spec)
  assert sharding.spec_for(name, shape, 1) == PartitionSpec()


def test_batches_are_split_over_all_axes():
  mesh = sharding.make_mesh(2, 4)
  batch = sharding.put_batch({"x": np.arange(16.0)}, mesh)
  assert [s.data.shape for s in batch["x"].addressable_shards] == [(2,)] * 8
  np.testing.assert_array_equal(batch["x"], np.arange(16.0))


def test_arrays_without_values_are_empty_on_every_device():
  """One that enters jax.shard_map ends a process of jaxlib 0.11.2."""
  mesh = sharding.make_mesh()
  split = sharding.batch_sharding(mesh).spec
  places = ({"points": split, "reals": split}, split)
  points = np.arange(48.0, dtype=np.float32).reshape(8, 3, 2)
  empty = np.zeros((8, 0, 2), np.float32)

  def body(arrays, offset):
    assert arrays["reals"].shape == (1, 0, 2)
    return jax.numpy.concatenate(list(arrays.values()), axis=1) + offset

  whole = jax.jit(sharding.over_devices(body, mesh, places, split))
  result = whole({"points": points, "reals": empty}, np.ones((8, 1, 1), "f4"))
  np.testing.assert_array_equal(result, points + 1)


@pytest.mark.parametrize("kind", ["const", "cosine"])
def test_golden_learning_rates(golden, kind):
  archive = golden("extras")
  schedule = state_lib.learning_rate_schedule(
    kind={"const": "constant", "cosine": "cosine"}[kind],
    peak=float(archive[f"lr/{kind}/learning_rate"]),
    warmup_steps=int(archive[f"lr/{kind}/warmup_steps"]),
    total_steps=int(archive[f"lr/{kind}/total_steps"]),
  )
  values = [float(schedule(int(n))) for n in archive[f"lr/{kind}/step"]]
  assert_close(values, archive[f"lr/{kind}/value"], 1e-7)


def test_clip_then_adamw():
  """The first AdamW step is the sign of the gradient, whatever its size."""
  optimizer = state_lib.make_optimizer(
    optax.constant_schedule(0.1),
    b1=0.9,
    b2=0.95,
    eps=1e-8,
    weight_decay=0.5,
    grad_clip=1.0,
  )
  params = {"w": jax.numpy.array([2.0, -4.0])}
  updates, _ = optimizer.update(
    {"w": jax.numpy.array([30.0, -40.0])}, optimizer.init(params), params
  )
  # -lr (sign(g) + decay * w)
  assert_close(updates["w"], [-0.1 * (1 + 1), -0.1 * (-1 - 2)], 1e-5)


@pytest.mark.parametrize("chosen", ["blocks", "all"])
def test_muon_turns_kernels_and_adamw_moves_the_rest(chosen):
  """A first step of singular values near the rate; others by their sign."""
  rng = np.random.RandomState(0)
  params = {
    "blocks": {
      "mlp": {"kernel": rng.randn(3, 8, 32), "bias": rng.randn(3, 32)}
    },
    "stage1_block1": {"conv1": {"kernel": rng.randn(3, 3, 4, 6)}},
    "head": {"kernel": rng.randn(8, 32)},
  }
  params = jax.tree.map(jax.numpy.float32, params)
  settings = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "grad_clip": 1.0}
  optim = config_lib.Optim(
    **settings,
    schedule="constant",
    learning_rate=0.1,
    warmup_steps=0,
    weight_decay=0.0,
    muon_learning_rate=0.2,
    muon_kernels=chosen,
  )
  optimizer, _ = run_lib.make_optimizer(optim, num_steps=1)
  gradients = jax.tree.map(lambda x: x + np.sign(x), params)
  updates, _ = optimizer.update(gradients, optimizer.init(params), params)
  stacked = updates["blocks"]["mlp"]["kernel"]
  conv = updates["stage1_block1"]["conv1"]["kernel"].reshape(36, 6)
  head, bias = updates["head"]["kernel"], updates["blocks"]["mlp"]["bias"]
  # By sqrt(max(1, outputs / inputs)), which is 2 and 1.
  turned = [*((layer, 0.4) for layer in stacked), (conv, 0.2)]
  moved = [bias]
  if chosen == "all":
    turned.append((head, 0.4))
  else:
    moved.append(head)
  for matrix, rate in turned:
    values = np.linalg.svd(matrix, compute_uv=False) / rate
    assert 0.6 < values.min() and values.max() < 1.3
  for update in moved:
    np.testing.assert_allclose(abs(update), 0.1, rtol=1e-5)
