import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from drift_jax.models import release
from drift_jax.models.generator import REMATS, build_generator
from tests.builders import random_like
from tests.conftest import assert_close, relative_error
from tests.models.published import under
from tests.models.small import GENERATOR, LABELS


class Run(NamedTuple):
  arrays: dict[str, np.ndarray]
  config: dict[str, Any]
  generator: Any
  params: Any
  samples: np.ndarray
  intermediates: Any


@pytest.fixture(
  scope="module",
  params=["gen_latent", pytest.param("gen_pixel", marks=pytest.mark.slow)],
)
def run(request, golden, golden_json, release_params) -> Run:
  """The golden model with its parameters, run once on the golden inputs."""
  arrays = golden(request.param)
  config = golden_json(f"{request.param}_config")["model_config"]
  generator, params = release.from_release(
    "gen", config, release_params(request.param)
  )
  apply = functools.partial(generator.apply, mutable=["intermediates"])
  samples, state = jax.jit(apply)({"params": params}, **_golden_inputs(arrays))
  return Run(arrays, config, generator, params, samples, state["intermediates"])


def _golden_inputs(arrays):
  return {
    "labels": arrays["labels"],
    "alpha": arrays["cfg_scale"],
    "noise": arrays["x"],
    "style": arrays["noise_labels"],
  }


def test_golden_conditions(run: Run):
  inputs = _golden_inputs(run.arrays)
  del inputs["noise"]
  condition = jax.jit(
    functools.partial(run.generator.apply, method="condition")
  )
  variables = {"params": run.params}
  assert_close(condition(variables, **inputs), run.arrays["cond"], 1e-6)
  inputs["alpha"] = 2.5
  expected = run.arrays["scalar_cfg2.5/cond"]
  assert_close(condition(variables, **inputs), expected, 1e-6)


def test_golden_blocks_and_samples(run: Run):
  prefix = "intermediates/LightningDiT_0"
  (blocks,) = run.intermediates["blocks"]["output"]
  assert len(blocks) == run.config["depth"]
  for i, block in enumerate(blocks):
    assert_close(block, run.arrays[f"{prefix}/blocks_{i}"], 2e-6, f"block {i}")
  (final,) = run.intermediates["final_output"]
  assert_close(final, run.arrays[f"{prefix}/FinalLayer_0"], 2e-6)
  assert_close(run.samples, run.arrays["samples"], 2e-6)


def test_golden_scalar_alpha(run: Run):
  inputs = _golden_inputs(run.arrays) | {"alpha": 2.5}
  samples = jax.jit(run.generator.apply)({"params": run.params}, **inputs)
  assert_close(samples, run.arrays["scalar_cfg2.5/samples"], 2e-6)


def test_golden_gradients(run: Run):
  def objective(params, noise):
    inputs = _golden_inputs(run.arrays) | {"noise": noise}
    samples = run.generator.apply({"params": params}, **inputs)
    return jnp.sum(samples * run.arrays["grad/cotangent"])

  gradients = jax.jit(jax.grad(objective, argnums=(0, 1)))(
    run.params, run.arrays["x"]
  )
  assert_close(gradients[1], run.arrays["grad/x"], 1e-5)
  published = release.to_release("gen", run.config, gradients[0])
  leaves = traverse_util.flatten_dict(published, sep="/")
  expected = under("grad/param_norm/", run.arrays)
  assert leaves.keys() == expected.keys()
  for name, leaf in leaves.items():
    norm = np.linalg.norm(leaf)
    assert norm == pytest.approx(expected[name], rel=1e-5), name


@pytest.mark.parametrize("attn_fp32", [True, False])
def test_golden_bfloat16(run: Run, attn_fp32: bool):
  config = run.config | {"use_bf16": True, "attn_fp32": attn_fp32}
  generator, params = release.from_release(
    "gen", config, release.to_release("gen", run.config, run.params)
  )
  inputs = _golden_inputs(run.arrays)
  samples = jax.jit(generator.apply)({"params": params}, **inputs)
  assert samples.dtype == jnp.float32
  golden = run.arrays[f"bf16_attn_fp32_{int(attn_fp32)}/samples"]
  assert_close(samples, golden, 2e-2)
  assert relative_error(samples, run.arrays["samples"]) > 1e-3


class Small(NamedTuple):
  generator: Any
  initial: Any
  params: Any
  apply: Any


@pytest.fixture(scope="module")
def small() -> Small:
  """A small generator: as initialised, and with parameters far from it."""
  generator = build_generator(**GENERATOR)
  initial = jax.jit(generator.init)(jax.random.key(0), LABELS, 1.0)
  return Small(
    generator, initial, random_like(initial), jax.jit(generator.apply)
  )


def _inputs() -> dict[str, jax.Array]:
  random = np.random.RandomState(1)
  return {
    "noise": jnp.asarray(random.randn(4, 4, 4, 2), jnp.float32),
    "style": jnp.asarray(random.randint(6, size=(4, 2)), jnp.int32),
  }


def test_initialisation(small: Small):
  flat = traverse_util.flatten_dict(small.initial["params"], sep="/")
  for name, leaf in flat.items():
    assert leaf.dtype == jnp.float32, name
    if name.startswith("blocks/"):
      assert leaf.shape[0] == GENERATOR["depth"], name
    zero = name.endswith("bias") or "modulation" in name
    if zero or name == "final/linear/kernel":
      assert not leaf.any(), name
    elif name.endswith("scale"):
      assert (leaf == 1).all(), name
    elif "embed" in name and name not in (
      "patch_embed/kernel",
      "pos_embed",
    ):
      # normal(0.02), within 5 standard errors of the standard deviation
      tolerance = 5 / math.sqrt(2 * leaf.size)
      assert np.std(leaf) == pytest.approx(0.02, rel=tolerance), name
    elif name.endswith("kernel"):
      # Xavier uniform: sqrt(6 / (in + out)) over the layer's own axes
      bound = math.sqrt(6 / sum(leaf.shape[-2:]))
      assert 0.9 * bound < np.abs(leaf).max() <= bound, name
  qkv = flat["blocks/attention/qkv/kernel"]
  assert relative_error(qkv[0], qkv[1]) > 0.5
  # Blocks begin as the identity, and samples as zeros.
  apply = functools.partial(small.generator.apply, mutable=["intermediates"])
  samples, state = jax.jit(apply)(small.initial, LABELS, 1.0, **_inputs())
  first, second = state["intermediates"]["blocks"]["output"][0]
  np.testing.assert_array_equal(first, second)
  assert first.any() and not samples.any()


def _draw(small: Small, count: int, seed: int):
  """Noise and style tokens."""
  draw = functools.partial(small.generator.apply, method="draw")
  return jax.jit(draw, static_argnums=1)(
    small.params, count, rngs={"noise": jax.random.key(seed)}
  )


def test_drawn_noise_equals_the_same_noise_given(small: Small):
  rngs = {"noise": jax.random.key(3)}
  noise, style = _draw(small, len(LABELS), 3)
  apply = functools.partial(small.apply, small.params, LABELS, 2.0)
  samples = apply(noise=noise, style=style)
  drawn = apply(rngs=rngs)
  np.testing.assert_allclose(drawn, samples, rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(drawn, apply(rngs=rngs))
  other = _draw(small, len(LABELS), 4)
  assert (other[0] != noise).all() and (other[1] != style).any()
  # What is given does not change what is drawn for the rest.
  mixed = apply(noise=noise, rngs=rngs)
  np.testing.assert_allclose(mixed, samples, rtol=1e-5, atol=1e-5)


def test_drawn_noise_is_standard_normal_and_style_uniform(small: Small):
  noise, style = _draw(small, 4_000, 0)
  assert noise.shape == (4_000, 4, 4, 2) and style.shape == (4_000, 2)
  assert abs(np.mean(noise)) < 0.02 and abs(np.std(noise) - 1) < 0.02
  for token in range(2):
    counts = np.bincount(style[:, token], minlength=6)
    assert len(counts) == 6
    np.testing.assert_allclose(counts, 4_000 / 6, rtol=0.2)
  assert np.mean(style[:, 0] == style[:, 1]) == pytest.approx(1 / 6, abs=0.05)


def test_samples_of_a_batch_do_not_mix(small: Small):
  inputs = _inputs()
  samples = small.apply(small.params, LABELS, 1.0, **inputs)
  inputs["noise"] = inputs["noise"].at[0].add(1.0)
  changed = small.apply(small.params, LABELS, 1.0, **inputs)
  np.testing.assert_array_equal(samples[1:], changed[1:])
  assert relative_error(samples[0], changed[0]) > 0.01
  # A label out of range spoils its own sample.
  labels = jnp.array([0, 1, 4, 5])
  samples = small.apply(small.params, labels, 1.0, **inputs)
  np.testing.assert_array_equal(samples[:3], changed[:3])
  assert np.isnan(samples[3]).all()


def test_samples_may_end_at_black_and_white(small: Small):
  apply = jax.jit(build_generator(**GENERATOR, clip=True).apply)
  plain = 3 * small.apply(small.params, LABELS, 1.0, **_inputs())
  last = small.params["params"]["final"]["linear"]
  scaled = jax.tree.map(lambda x: 3 * x, last)
  final = small.params["params"]["final"] | {"linear": scaled}
  params = {"params": small.params["params"] | {"final": final}}
  found = apply(params, LABELS, 1.0, **_inputs())
  assert 0.1 < np.mean(np.abs(plain) > 1) < 0.9
  np.testing.assert_allclose(found, np.clip(plain, -1, 1), rtol=0, atol=1e-5)
  # Each pixel has one bias, and those beyond have no gradient.
  slopes = jax.grad(lambda p: jnp.sum(apply(p, LABELS, 1.0, **_inputs())))
  bias = slopes(params)["params"]["final"]["linear"]["bias"]
  assert jnp.sum(bias) == pytest.approx(np.sum(np.abs(plain) < 1), rel=1e-6)


@pytest.mark.slow
def test_remat_changes_neither_samples_nor_gradients(small: Small):
  def objective(remat, variables):
    generator = build_generator(**(GENERATOR | {"remat": remat}))
    samples = generator.apply(variables, LABELS, 1.0, **_inputs())
    return jnp.sum(jnp.sin(samples))

  gradients, products = [], []
  for remat in REMATS:
    gradient = jax.jit(jax.grad(functools.partial(objective, remat)))
    traced = gradient.trace(small.params)
    products.append(str(traced.jaxpr).count("dot_general["))
    gradients.append(traced.lower().compile()(small.params))
  # What the backward pass repeats: the modulation, and of attention all but
  # that with values; gate and up as well; that one and the MLP's last as well.
  # 'auto' is the first.
  assert np.diff(products).tolist() == [4, 2, 2, -4]
  for other in gradients[1:]:
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), gradients[0], other)


@pytest.mark.parametrize("absent", ["style", "context"])
def test_style_and_context_tokens_may_be_absent(absent: str):
  generator = build_generator(**(GENERATOR | {f"{absent}_tokens": 0}))
  shapes = jax.eval_shape(generator.init, jax.random.key(0), LABELS, 1.0)
  assert not [name for name in shapes["params"] if absent in name]
  variables = random_like(shapes)
  inputs = _inputs()
  if absent == "style":
    del inputs["style"]
  apply = jax.jit(generator.apply)
  samples = apply(variables, LABELS, 1.0, **inputs)
  assert samples.shape == (4, 4, 4, 3) and np.isfinite(samples).all()
  one_class = apply(variables, 0 * LABELS, 1.0, **inputs)
  assert relative_error(one_class[1:], samples[1:]) > 1e-3


@pytest.mark.parametrize("attention_dtype", ["float32", "bfloat16"])
def test_precision_of_attention_is_an_option(attention_dtype: str):
  generator = build_generator(
    **(GENERATOR | {"dtype": "bfloat16", "attention_dtype": attention_dtype})
  )
  key = jax.random.key(0)
  variables = jax.eval_shape(generator.init, key, LABELS, 1.0)
  assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}

  def apply(variables):
    return generator.apply(variables, LABELS, 1.0, rngs={"noise": key})

  assert jax.eval_shape(apply, variables).dtype == jnp.float32
  text = str(jax.make_jaxpr(apply)(variables))
  # Weights times values of 7 tokens: the only result of these four axes.
  short = {"float32": "f32", "bfloat16": "bf16"}[attention_dtype]
  assert text.count(f":{short}[4,2,8,7] = dot_general") == 1


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"noise": None}, "pass noise= and style=, or rngs="),
    ({"style": jnp.zeros((4, 1), int)}, r"style has .* need \(4, 2\)"),
    ({"alpha": jnp.ones(2)}, r"alpha has shape \(2,\)"),
  ],
)
def test_bad_inputs_are_explained(small: Small, change, message):
  inputs = {"alpha": 1.0, **_inputs()} | change
  with pytest.raises(ValueError, match=message):
    small.generator.apply(small.params, LABELS, **inputs)
