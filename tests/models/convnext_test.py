import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from drift_jax.models import naming, release
from drift_jax.models.convnext import (
  GlobalResponseNorm,
  normalize_colors,
  normalize_stage,
  resize_input,
)
from drift_jax.training.conversions import convnext as conversion
from tests.conftest import assert_close, relative_error
from tests.models.published import draw_all, noise, under


@pytest.fixture(scope="module")
def tiny(golden, golden_json, release_params):
  """The golden arrays, the model and its parameters."""
  config = golden_json("convnext_tiny_config")
  model, params = release.from_release(
    "convnext",
    {"depths": config["depths"], "dims": config["dims"]},
    release_params("convnext_tiny"),
  )
  return golden("convnext_tiny"), model, {"params": params}


def test_golden_features(tiny):
  arrays, model, variables = tiny
  features = jax.jit(
    functools.partial(model.apply, method="features", input_scale=True)
  )(variables, arrays["x"])
  assert_close(features.pop("norm_x"), arrays["has_scale/norm_x"], 1e-6)
  expected = under("act/", arrays)
  assert features.keys() == expected.keys()
  for key, value in features.items():
    assert_close(value, expected[key], 5e-6, key)
  plain = jax.eval_shape(
    functools.partial(model.apply, method="features"), variables, arrays["x"]
  )
  assert plain.keys() == features.keys()


@pytest.fixture(scope="module")
def features_of_published():
  """Compiled once: weights of all namings are of one size."""
  config = {"depths": [1, 2, 3, 1], "dims": [4, 8, 12, 16]}
  model, _ = release.describe("convnext", config)
  apply = jax.jit(functools.partial(model.apply, method="features"))

  def features(converted):
    assert converted.model_config == config
    x = noise(0, (2, 64, 64, 3))
    return apply({"params": converted.params}, x)

  return features


@pytest.mark.parametrize("name", conversion.PUBLISHED)
def test_published_weights_give_their_features(
  name, golden, features_of_published
):
  """timm's and transformers' models; the authors' names as timm reads them."""
  arrays = golden("convnextv2")
  weights = draw_all(arrays[f"parameters_{name}"])
  converted = conversion.convert_convnext(weights, None)
  features = features_of_published(converted)
  twice = features.pop("global_std")
  np.testing.assert_array_equal(twice, features["convenxt_stage_3_std"])
  expected = under(f"{name}/", arrays)
  assert features.keys() == expected.keys()
  for key, value in features.items():
    thinned = value[:, :: value.shape[1] // 20 | 1]
    assert_close(thinned, expected[key], 3e-5, key)
  # timm's small models have 1x1 convolutions for linear layers, and
  # transformers' bare encoder has neither prefix nor head.
  as_convolutions = {
    k: v[:, :, None, None] if k.endswith(("fc1.weight", "fc2.weight")) else v
    for k, v in weights.items()
  }
  bare = {
    k.removeprefix("convnextv2."): v
    for k, v in weights.items()
    if not k.startswith(f"{conversion.PUBLISHED[name].head}.")
  }
  for other in (as_convolutions, bare):
    again = conversion.convert_convnext(other, None)
    jax.tree.map(np.testing.assert_array_equal, again, converted)


@pytest.mark.parametrize("name", conversion.PUBLISHED)
def test_every_naming_gives_back_the_release(name, tiny):
  """So that its golden features are those of all of them."""
  _, model, variables = tiny
  flat = traverse_util.flatten_dict(variables["params"], sep="/")
  shapes = {path: leaf.shape for path, leaf in flat.items()}
  entries = conversion.PUBLISHED[name].names.entries(shapes)
  weights = {}
  for there, leaf in naming.scatter(entries, flat).items():
    if leaf.ndim == 4 and ".grn." not in there:
      leaf = leaf.transpose(3, 2, 0, 1)
    weights[there] = leaf.T if leaf.ndim == 2 else leaf
  converted = conversion.convert_convnext(weights, None)
  assert converted.model_config == {
    "depths": list(model.depths),
    "dims": list(model.widths),
  }
  jax.tree.map(
    np.testing.assert_array_equal, converted.params, variables["params"]
  )


def test_golden_colours_are_normalised_without_clipping(tiny):
  arrays, _, _ = tiny
  rows = normalize_colors(jnp.asarray(arrays["x"]))[:, 0]
  assert_close(rows, arrays["preprocessed_x_row0"], 1e-6)
  beyond = normalize_colors(jnp.full((1, 1, 1, 3), 3.0))[0, 0, 0]
  expected = (2 - np.array([0.485, 0.456, 0.406])) / [0.229, 0.224, 0.225]
  assert_close(beyond, expected, 1e-6)


@pytest.mark.parametrize("size", [256, 48])
def test_resize_is_a_triangle_filter_as_wide_as_the_shrinkage(size: int):
  x = np.random.RandomState(0).randn(1, size, size, 2).astype(np.float32)
  scale = size / 224
  centres = (np.arange(224) + 0.5) * scale - 0.5
  distances = np.abs(np.arange(size)[None, :] - centres[:, None])
  weights = np.maximum(0, 1 - distances / max(scale, 1))
  weights /= weights.sum(axis=1, keepdims=True)
  rows = np.einsum("ih,bhwc->biwc", weights, x)
  expected = np.einsum("jw,biwc->bijc", weights, rows)
  assert_close(resize_input(jnp.asarray(x)), expected, 5e-5)


def test_gradient_reaches_the_pixels_beyond_the_colour_range(tiny):
  arrays, model, variables = tiny

  def objective(x):
    return jnp.sum(jnp.sin(model.apply(variables, x, method="pooled")))

  gradient = jax.jit(jax.grad(objective))(1.5 * arrays["x"])
  assert np.isfinite(gradient).all()
  assert (np.abs(gradient) > 0).mean() > 0.99


def test_dead_channels_and_flat_maps_have_finite_gradients():
  norm = GlobalResponseNorm(jnp.dtype("float32"))
  x = jnp.ones((1, 2, 2, 3)).at[..., 1].set(0.0)
  params = {"gamma": jnp.ones((1, 1, 1, 3)), "beta": jnp.zeros((1, 1, 1, 3))}

  def objective(x):
    return jnp.sum(norm.apply({"params": params}, x) ** 2)

  assert np.isfinite(jax.jit(jax.grad(objective))(x)).all()
  gradient = jax.jit(jax.grad(lambda x: jnp.sum(normalize_stage(x))))
  assert np.isfinite(gradient(jnp.ones_like(x))).all()


@pytest.mark.slow
def test_remat_saves_memory_and_changes_no_gradient(tiny):
  arrays, model, variables = tiny
  deep = model.clone(depths=(1, 1, 16, 1))
  shapes = jax.eval_shape(deep.init, jax.random.key(0), arrays["x"])
  variables = jax.tree.map(
    lambda shape, x: np.resize(x, shape.shape), dict(shapes), variables
  )
  gradients, memory = [], []
  for module in (deep, deep.clone(remat=True)):

    def objective(x, variables, module=module):
      return jnp.sum(jnp.sin(module.apply(variables, x, method="pooled")))

    compiled = jax.jit(jax.grad(objective)).lower(arrays["x"], variables)
    compiled = compiled.compile()
    memory.append(compiled.memory_analysis().temp_size_in_bytes)
    gradients.append(compiled(arrays["x"], variables))
  assert memory[1] < 0.6 * memory[0]
  assert_close(gradients[1], gradients[0], 1e-5)


def test_golden_pooled_output(tiny):
  """In bfloat16 nearly the same, also of parameters stored so."""
  arrays, model, variables = tiny

  def pooled(model, variables):
    apply = jax.jit(functools.partial(model.apply, method="pooled"))
    return apply(variables, arrays["x"])

  exact = pooled(model, variables)
  assert exact.dtype == jnp.float32
  assert_close(exact, arrays["pooled"], 5e-6)
  rough = model.clone(dtype=jnp.dtype("bfloat16"))
  error = relative_error(pooled(rough, variables), arrays["pooled"])
  assert 1e-4 < error < 3e-2
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables)
  assert relative_error(pooled(rough, rounded), arrays["pooled"]) < 3e-2
