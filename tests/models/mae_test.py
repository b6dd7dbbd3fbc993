import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from drift_jax.models import release
from drift_jax.models.mae import MAEOutput, ResidualBlock, build_mae, mae_loss
from tests.builders import random_like
from tests.conftest import assert_close, relative_error
from tests.models.published import under
from tests.models.small import MAE as ARGUMENTS

KEY_LISTS = {
  "default_every_k_2": {},
  "every_k_1": {"every_k_block": 1},
  "every_k_inf": {"every_k_block": math.inf},
  "no_std_no_patch_std": {"use_std": False, "patch_std_size": ()},
  "no_mean": {"use_mean": False},
  "none": {
    "use_mean": False,
    "use_std": False,
    "patch_mean_size": (),
    "patch_std_size": (),
    "every_k_block": math.inf,
  },
}


class Run(NamedTuple):
  arrays: dict[str, np.ndarray]
  golden_config: dict[str, Any]
  mae: Any
  variables: Any
  apply: Any


@pytest.fixture(
  scope="module",
  params=["mae_latent", pytest.param("mae_pixel", marks=pytest.mark.slow)],
)
def run(request, golden, golden_json, release_params) -> Run:
  config = golden_json(f"{request.param}_config")
  mae, params = release.from_release(
    "mae", config["model_config"], release_params(f"{request.param}_params")
  )
  return Run(
    golden(request.param),
    config,
    mae,
    {"params": params},
    jax.jit(mae.apply),
  )


# Of a map, or of one smaller than the kernel.
_CONVOLUTION = r"conv_general_dilated\[|dot_general\["


def test_golden_features(run: Run):
  x = run.arrays["x"]
  features = jax.jit(functools.partial(run.mae.apply, method="features"))(
    run.variables, x
  )
  np.testing.assert_array_equal(features.pop("global"), x.reshape(2, 1, -1))
  expected = under("act/", run.arrays)
  assert features.keys() == expected.keys()
  for key, value in features.items():
    assert_close(value, expected[key], 1e-5, key)


@pytest.mark.parametrize("name", KEY_LISTS)
def test_golden_key_lists(run: Run, name: str):
  assert run.golden_config["key_lists"].keys() == KEY_LISTS.keys()
  x = run.arrays["x"]
  features = jax.eval_shape(
    lambda: run.mae.apply(
      run.variables, x, method="features", **KEY_LISTS[name]
    )
  )
  shapes = {key: list(value.shape) for key, value in features.items()}
  assert shapes.pop("global") == [2, 1, x[0].size]
  assert shapes == run.golden_config["key_lists"][name]


def test_golden_reconstruction_logits_and_losses(run: Run):
  for name in ("mask_random", "mask_none_all"):
    mask = run.arrays[f"loss/{name}/mask"]
    output = run.apply(run.variables, run.arrays["x"], mask)
    np.testing.assert_array_equal(output.mask, mask)
    folded = run.arrays.get("patched_x", run.arrays["x"])
    np.testing.assert_array_equal(output.target, folded)
    assert_close(output.recon, run.arrays[f"loss/{name}/recon"], 5e-5, name)
    assert_close(output.logits, run.arrays[f"loss/{name}/logits"], 1e-5, name)
    for lam in (0.0, 0.1):
      losses = mae_loss(output, run.arrays["loss/labels"], lam)
      expected = under(f"loss/{name}/lambda{lam}/", run.arrays)
      assert losses.keys() == {x for x in expected if "grad_norm" not in x}
      for key, value in losses.items():
        assert_close(value, expected[key], 1e-5, key)


def test_golden_gradient_norms(run: Run):
  def objective(params, lam):
    output = run.mae.apply(
      {"params": params},
      run.arrays["x"],
      run.arrays["loss/mask_random/mask"],
    )
    losses = mae_loss(output, run.arrays["loss/labels"], lam)
    return jnp.mean(losses["loss"])

  gradient = jax.jit(jax.grad(objective))
  for lam in (0.0, 0.1):
    tree = release.to_release(
      "mae",
      run.golden_config["model_config"],
      gradient(run.variables["params"], lam),
    )
    leaves = traverse_util.flatten_dict(tree, sep="/")
    expected = under(f"loss/mask_random/lambda{lam}/grad_norm/", run.arrays)
    assert leaves.keys() == expected.keys()
    for name, leaf in leaves.items():
      norm = np.linalg.norm(leaf)
      assert norm == pytest.approx(expected[name], rel=2e-5, abs=1e-12), name


class Small(NamedTuple):
  mae: Any
  variables: Any
  apply: Any


@pytest.fixture(scope="module")
def small() -> Small:
  mae = build_mae(**ARGUMENTS)
  shapes = jax.eval_shape(mae.init, jax.random.key(0), _digits())
  return Small(mae, random_like(shapes), jax.jit(mae.apply))


def _digits() -> jax.Array:
  random = np.random.RandomState(0)
  return jnp.asarray(random.uniform(-1, 1, (3, 8, 8, 1)), jnp.float32)


def test_initialisation_follows_the_fan_in(small: Small):
  shapes = jax.tree.leaves(small.variables)
  assert {x.dtype for x in shapes} == {jnp.dtype("float32")}
  block = ResidualBlock(
    channels=16, stride=2, dtype=jnp.dtype("float32"), norm_groups=32
  )
  x = jnp.zeros((1, 4, 4, 8))
  params = jax.jit(block.init)(jax.random.key(0), x)["params"]
  for name in ("conv1", "conv2", "proj_conv"):
    (kernel,) = params[name].values()
    expected = math.sqrt(2 / np.prod(kernel.shape[:3]))
    # 5 standard errors of the standard deviation
    tolerance = 5 / math.sqrt(2 * kernel.size)
    assert np.std(kernel) == pytest.approx(expected, rel=tolerance), name
  assert (params["norm1"]["scale"] == 1).all()


def test_drawn_mask_hides_whole_patches_with_the_given_probability():
  mae = build_mae(**(ARGUMENTS | {"mask_patch_size": 4}))
  draw = jax.jit(
    lambda key, ratio: mae.apply(
      {"params": {}},
      (200, 32, 32),
      ratio,
      rngs={"mask": key},
      method="_draw_mask",
    )
  )
  mask = np.asarray(draw(jax.random.key(0), 0.3))
  assert mask.shape == (200, 32, 32, 1) and set(np.unique(mask)) == {0, 1}
  patches = mask.reshape(200, 8, 4, 8, 4).transpose(0, 1, 3, 2, 4)
  patches = patches.reshape(200 * 64, 16)
  np.testing.assert_array_equal(patches.min(axis=1), patches.max(axis=1))
  # Standard error of the mean over 12 800 patches: 0.004.
  assert patches.mean() == pytest.approx(0.3, abs=0.016)
  # Independent: the share per sample scatters as 64 coin flips do.
  shares = patches[:, 0].reshape(200, 64).mean(axis=1)
  assert shares.std() == pytest.approx(math.sqrt(0.3 * 0.7 / 64), rel=0.2)
  assert not draw(jax.random.key(0), 0.0).any()
  assert draw(jax.random.key(0), 1.0).all()


def test_drawn_mask_is_reproducible_and_equals_the_same_mask_given(
  small: Small,
):
  x = _digits()
  rngs = {"mask": jax.random.key(1)}
  drawn = small.apply(small.variables, x, rngs=rngs)
  again = small.apply(small.variables, x, rngs=rngs)
  given = small.apply(small.variables, x, drawn.mask)
  other = small.apply(small.variables, x, rngs={"mask": jax.random.key(2)})
  for field in MAEOutput._fields:
    np.testing.assert_array_equal(getattr(drawn, field), getattr(again, field))
    assert_close(getattr(given, field), getattr(drawn, field), 1e-6)
  assert (np.asarray(other.mask) != np.asarray(drawn.mask)).any()


def test_hidden_cells_do_not_reach_the_reconstruction(small: Small):
  x = _digits()
  mask = np.zeros((3, 8, 8, 1), np.float32)
  mask[:, 2:4, 4:6] = 1
  output = small.apply(small.variables, x, mask)
  hidden = small.apply(small.variables, x + 5 * mask, mask)
  seen = small.apply(small.variables, x + 5 * (1 - mask), mask)
  for field in ("recon", "logits"):
    before = getattr(output, field)
    np.testing.assert_array_equal(getattr(hidden, field), before)
    assert relative_error(getattr(seen, field), before) > 0.01
  np.testing.assert_array_equal(hidden.target, x + 5 * mask)


@pytest.mark.parametrize(
  "remat", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_equal_blocks_in_one_scan_are_those_blocks_in_turn(remat):
  """Stage 3 of six blocks: the first alone, five as one scan."""
  change = {"layers": (3, 1, 6, 1), "remat": remat, "norm_groups": 2}
  mae = build_mae(**(ARGUMENTS | change))
  x = _digits()
  shapes = jax.eval_shape(
    functools.partial(mae.init, method="features"), jax.random.key(0), x
  )
  variables = random_like(shapes, 0.25)

  @jax.jit
  def maps(variables, x):
    features = mae.apply(variables, x, method="features", every_k_block=1)
    return {f"layer3_blk{i}": features[f"layer3_blk{i}"] for i in range(1, 7)}

  features = maps(variables, x)
  stacked = variables["params"]["encoder"]["stage3_blocks"]
  apply = jax.jit(ResidualBlock(32, 1, jnp.dtype("float32"), 2).apply)
  hidden = features["layer3_blk1"].reshape(len(x), 2, 2, 32)
  for i in range(5):
    params = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
    hidden, _ = apply({"params": params}, hidden)
    found = features[f"layer3_blk{i + 2}"].reshape(hidden.shape)
    assert_close(found, hidden, 1e-5, f"block {i + 2}")


@pytest.mark.slow
def test_remat_changes_neither_features_nor_gradients(small: Small):
  def objective(remat, x):
    # More groups would divide roundings by 0 on the map of 1 x 1.
    mae = build_mae(**(ARGUMENTS | {"remat": remat, "norm_groups": 2}))
    return jnp.sum(jnp.sin(mae.apply(small.variables, x, method="pooled")))

  gradients, convolutions = [], []
  for remat in (False, True):
    gradient = jax.jit(jax.grad(functools.partial(objective, remat)))
    traced = gradient.trace(_digits())
    # Those of the smallest maps are products.
    convolutions.append(len(re.findall(_CONVOLUTION, str(traced.jaxpr))))
    gradients.append(traced.lower().compile()(_digits()))
  # The backward pass repeats the two convolutions of each of four blocks.
  assert convolutions[1] >= convolutions[0] + 8
  assert_close(gradients[1], gradients[0], 1e-5)


@pytest.mark.slow
def test_pooled_is_the_spatial_mean_of_the_last_stage(run: Run):
  """In bfloat16 nearly the same, also of parameters stored so."""

  def pooled(mae, variables):
    apply = jax.jit(functools.partial(mae.apply, method="pooled"))
    return apply(variables, run.arrays["x"])

  expected = run.arrays["act/layer4_mean"][:, 0]
  exact = pooled(run.mae, run.variables)
  assert exact.shape == (2, 8 * 32) and exact.dtype == jnp.float32
  assert_close(exact, expected, 1e-5)
  rough = run.mae.clone(dtype=jnp.dtype("bfloat16"))
  error = relative_error(pooled(rough, run.variables), expected)
  assert 1e-4 < error < 4e-2
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), run.variables)
  assert relative_error(pooled(rough, rounded), expected) < 4e-2


def test_classifies_as_a_call_that_hides_nothing(small: Small):
  x = _digits()
  whole = small.apply(small.variables, x, jnp.zeros((3, 8, 8, 1)))
  classify = jax.jit(functools.partial(small.mae.apply, method="classify"))
  assert_close(classify(small.variables, x)[1], whole.logits, 1e-5)


def _output(seed: int) -> MAEOutput:
  random = np.random.RandomState(seed)
  mask = random.randint(2, size=(4, 3, 5, 1)).astype(np.float32)
  mask[0] = 0
  return MAEOutput(
    jnp.asarray(random.randn(4, 3, 5, 2), jnp.float32),
    jnp.asarray(3 * random.randn(4, 6), jnp.float32),
    jnp.asarray(mask),
    jnp.asarray(random.randn(4, 3, 5, 2), jnp.float32),
  )


def test_loss_equals_a_float64_oracle_for_traced_lam():
  output = _output(0)
  labels = np.array([0, 5, 2, int(np.argmax(output.logits[3]))])
  recon, logits, mask, target = (np.asarray(x, np.float64) for x in output)
  losses = jax.jit(mae_loss)(output, jnp.asarray(labels), jnp.float32(0.3))
  for b in range(4):
    cells = [
      ((recon[b, i, j] - target[b, i, j]) ** 2).sum()
      for i, j in np.ndindex(3, 5)
      if mask[b, i, j, 0]
    ]
    expected = {
      "recon_loss": np.mean(cells) if cells else 0.0,
      "cls_loss": np.log(np.exp(logits[b]).sum()) - logits[b, labels[b]],
      "accuracy": float(logits[b].argmax() == labels[b]),
      "mask_ratio": mask[b].mean(),
    }
    expected["loss"] = 0.3 * expected["cls_loss"] + 0.7 * expected["recon_loss"]
    assert losses.keys() == expected.keys()
    for key, value in expected.items():
      assert losses[key][b] == pytest.approx(value, rel=1e-5), key
  assert losses["accuracy"][3] == 1


def test_bad_inputs_are_explained(small: Small):
  x = _digits()
  mask = {"rngs": {"mask": jax.random.key(0)}}
  features = {"method": "features"}
  for inputs, options, message in (
    ((x,), {}, "pass mask=, or rngs="),
    ((x, jnp.zeros((3, 4, 4, 1))), {}, r"folded input needs \(3, 8, 8, 1"),
    ((jnp.zeros((3, 8, 8, 3)),), features, "needs in_channels=1"),
    ((x[:, :7],), mask, "7 x 8: its sides must be multiples"),
    ((x,), features | {"every_k_block": 0}, "every_k_block=0: must be >= 1"),
  ):
    apply = functools.partial(small.mae.apply, **options)
    with pytest.raises(ValueError, match=message):
      jax.eval_shape(apply, small.variables, *inputs)
  folded = build_mae(**(ARGUMENTS | {"input_patch_size": 3}))
  with pytest.raises(ValueError, match="multiples of input_patch_size=3"):
    folded.apply({}, x)
