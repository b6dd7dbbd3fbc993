import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from drift_jax.models import release
from drift_jax.models.convnext import (
  GlobalResponseNorm,
  build_convnext,
  normalize_colors,
  normalize_stage,
  resize_input,
)
from drift_jax.tools.conversions import convnext as conversion
from tests.conftest import assert_close, relative_error
from tests.models.published import draw_all, noise

NAMINGS = {
  "timm": conversion.TIMM,
  "facebook": conversion.FACEBOOK,
  "transformers": conversion.TRANSFORMERS,
}


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
  prefix = "act/"
  assert {prefix + key for key in features} == {
    key for key in arrays if key.startswith(prefix)
  }
  for key, value in features.items():
    assert_close(value, arrays[prefix + key], 5e-6, key)
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


@pytest.mark.parametrize("name", NAMINGS)
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
  assert features.keys() == {
    key.removeprefix(f"{name}/") for key in arrays if key.startswith(f"{name}/")
  }
  for key, value in features.items():
    thinned = value[:, :: value.shape[1] // 20 | 1]
    assert_close(thinned, arrays[f"{name}/{key}"], 3e-5, key)
  # timm's small models have 1x1 convolutions for linear layers, and
  # transformers' bare encoder has neither prefix nor head.
  as_convolutions = {
    k: v[:, :, None, None] if k.endswith(("fc1.weight", "fc2.weight")) else v
    for k, v in weights.items()
  }
  bare = {
    k.removeprefix("convnextv2."): v
    for k, v in weights.items()
    if not k.startswith(f"{NAMINGS[name].head}.")
  }
  for other in (as_convolutions, bare):
    again = conversion.convert_convnext(other, None)
    jax.tree.map(np.testing.assert_array_equal, again, converted)


@pytest.mark.parametrize("name", NAMINGS)
def test_every_naming_gives_back_the_release(name, tiny):
  """So that its golden features are those of all of them."""
  _, model, variables = tiny
  depths = list(model.depths)
  config = {"depths": depths, "dims": list(model.widths)}
  shapes = release.parameter_shapes("convnext", config)
  naming = NAMINGS[name]
  published = conversion.published_shapes(naming, shapes, depths)
  flat = traverse_util.flatten_dict(variables["params"], sep="/")
  weights = {}
  for path, leaf in flat.items():
    leaf = np.asarray(leaf)
    for i, there in enumerate(naming.of(path, depths)):
      one = leaf[i] if "_blocks/" in path else leaf
      if one.ndim == 4 and "response_norm" not in path:
        one = one.transpose(3, 2, 0, 1)
      elif one.ndim == 2:
        one = one.T
      weights[there] = one.reshape(published[there])
  assert weights.keys() == published.keys()
  converted = conversion.convert_convnext(weights, None)
  assert converted.model_config == config
  jax.tree.map(
    np.testing.assert_array_equal, converted.params, variables["params"]
  )


def test_golden_pooled_output(tiny):
  arrays, model, variables = tiny
  pooled = jax.jit(functools.partial(model.apply, method="pooled"))(
    variables, arrays["x"]
  )
  assert pooled.dtype == jnp.float32
  assert_close(pooled, arrays["pooled"], 5e-6)


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


def test_latents_are_no_pixels(tiny):
  _, model, variables = tiny
  with pytest.raises(
    ValueError, match=r"x has shape \(1, 8, 8, 4\): needs RGB"
  ):
    jax.eval_shape(
      functools.partial(model.apply, method="pooled"),
      variables,
      np.zeros((1, 8, 8, 4), np.float32),
    )


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


@pytest.mark.slow
def test_bfloat16_computes_near_float32(tiny):
  arrays, model, variables = tiny
  rough = build_convnext(
    depths=model.depths, widths=model.widths, dtype="bfloat16"
  )
  pooled = jax.jit(functools.partial(rough.apply, method="pooled"))
  error = relative_error(pooled(variables, arrays["x"]), arrays["pooled"])
  assert 1e-4 < error < 3e-2
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables)
  error = relative_error(pooled(rounded, arrays["x"]), arrays["pooled"])
  assert error < 3e-2


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"dims": (8,)}, "does not know 'dims'.*valid arguments: depths, widths"),
    ({"depths": (1, 1, 1)}, r"depths=\(1, 1, 1\): must be 4 numbers"),
    ({"widths": (8, 8, 0, 8)}, r"widths \(stage 3\)=0: must be an integer"),
    ({"dtype": "half"}, "dtype='half': must be one of 'float32', 'bfloat16'"),
  ],
)
def test_bad_arguments_are_explained(change, message):
  arguments = {
    "depths": (1, 1, 1, 1),
    "widths": (8, 8, 8, 8),
    "dtype": "float32",
  }
  with pytest.raises(ValueError, match=message):
    build_convnext(**(arguments | change))
