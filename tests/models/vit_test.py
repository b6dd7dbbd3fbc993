"""Vision Transformers: transformers' numbers, then their properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import models as presets
from drift_jax.models import release
from drift_jax.models.vit import build_vit, preprocess, resize_bicubic
from drift_jax.training.conversions.vit import (
  clip_config,
  convert_clip,
  convert_dinov2,
  dinov2_config,
  resize_positions,
)
from tests.conftest import assert_close, relative_error
from tests.models.published import CLIP, DINOV2, draw, draw_all
from tests.models.small import VIT, random_variables

DINOV2_SMALL = DINOV2 | {
  "hidden_size": 384,
  "num_hidden_layers": 12,
  "num_attention_heads": 6,
}
# Golden name -> its parameters' name, converter, config.json, pixels.
GOLDEN = {
  "dinov2": ("dinov2", convert_dinov2, DINOV2, 224),
  "dinov2_small": ("dinov2_small", convert_dinov2, DINOV2_SMALL, 224),
  "clip": ("clip", convert_clip, CLIP, 48),
  "clip_gelu": ("clip", convert_clip, CLIP | {"hidden_act": "gelu"}, 48),
}


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=[pytest.mark.slow] * (name == "dinov2_small"))
    for name in GOLDEN
  ],
)
def test_golden_features(golden, name):
  arrays = golden("vit")
  parameters, convert, config, size = GOLDEN[name]
  weights = draw_all(arrays[f"parameters_{parameters}"])
  model_config, params = convert(weights, config)[:2]
  vit, params = release.from_release("vit", model_config, params)
  pixels = np.random.RandomState(0).uniform(-2, 2, (2, size, size, 3))
  features = jax.jit(lambda p, x: vit.apply(p, x, method="network"))(
    {"params": params}, pixels.astype(np.float32)
  )
  assert features.dtype == jnp.float32
  expected = arrays[f"features_{name}"]
  assert_close(features, expected, 3e-6, name)
  # What the number above can tell apart.
  assert relative_error(expected[0], expected[1]) > 0.1
  if name == "clip_gelu":
    assert relative_error(expected, arrays["features_clip"]) > 0.005


DINOV2_LARGE = DINOV2 | {
  "hidden_size": 1024,
  "num_hidden_layers": 24,
  "num_attention_heads": 16,
}
CLIP_LARGE = {
  "model_type": "clip",
  "projection_dim": 768,
  "vision_config": {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
  },
}


def test_presets_are_the_published_configurations():
  published = {
    "dinov2_small": dinov2_config(DINOV2_SMALL),
    "dinov2_large": dinov2_config(DINOV2_LARGE),
    "clip_large": clip_config(CLIP_LARGE),
  }
  assert published == {
    name: release.published_config("vit", preset().to_dict())
    for name, preset in presets.VITS.items()
  }


def test_golden_positions(golden):
  arrays = golden("vit")
  name = "embeddings.position_embeddings"
  positions = draw(name, (1, 1370, 24))[0]
  resized = resize_positions(positions, 16)
  assert resized.shape == (257, 24) and resized.dtype == np.float32
  np.testing.assert_array_equal(resized[0], positions[0])
  assert_close(resized[::3], arrays["positions_dinov2"], 3e-7)
  np.testing.assert_array_equal(resize_positions(positions, 37), positions)


@pytest.mark.parametrize(
  ("height", "width", "size"),
  [(32, 32, 224), (256, 256, 224), (500, 310, 48), (7, 40, 16), (1, 1, 5)],
)
def test_resize_is_pillows(height, width, size):
  random = np.random.RandomState(1)
  images = random.choice(np.float32([0, 255]), (2, height, width, 3))
  resized = jax.jit(lambda x: resize_bicubic(x, size))(images)
  assert resized.shape == (2, size, size, 3)
  expected = np.empty_like(resized)
  for i, channel in np.ndindex(2, 3):
    image = Image.fromarray(images[i, :, :, channel])
    expected[i, ..., channel] = image.resize(
      (size, size), Image.Resampling.BICUBIC
    )
  np.testing.assert_allclose(resized, expected, rtol=0, atol=0.04)
  if height == 32:  # what rounding and clipping would take away
    assert expected.min() < -10 and expected.max() > 265


def test_preprocess_has_the_grey_levels_of_8_bit_images():
  """Pillow rounds after the rows too: a level more or less here and there."""
  random = np.random.RandomState(4)
  images = random.randint(80, 176, (2, 40, 30, 3)).astype(np.uint8)
  images[:, :8] = 0
  images[:, -8:] = 255
  options = {"image_mean": (0.0,) * 3, "image_std": (1.0,) * 3}
  levels = 255 * np.asarray(preprocess(images, image_size=24, **options))
  expected = np.stack(
    [
      Image.fromarray(image).resize((24, 24), Image.Resampling.BICUBIC)
      for image in images
    ]
  ).astype(np.float32)
  np.testing.assert_allclose(levels, np.round(levels), rtol=0, atol=1e-4)
  assert np.abs(levels - expected).max() < 1.01
  assert np.mean(np.abs(levels - expected) > 0.5) < 0.15
  assert {levels.min(), round(float(levels.max()), 3)} == {0.0, 255.0}


def test_whole_is_the_network_of_preprocessed_images():
  vit = build_vit(**VIT)
  variables = random_variables(vit)
  random = np.random.RandomState(3)
  options = {k: VIT[k] for k in ("image_size", "image_mean", "image_std")}
  images = random.randint(0, 256, (2, 8, 8, 3), np.uint8)
  pixels = preprocess(images, **options)
  expected = (images / 255 - options["image_mean"]) / options["image_std"]
  np.testing.assert_allclose(pixels, expected, rtol=0, atol=1e-6)
  images = random.randint(0, 256, (2, 5, 9, 3), np.uint8)
  pixels = preprocess(images, **options)
  features = vit.apply(variables, images)
  assert features.shape == (2, 5)
  expected = vit.apply(variables, pixels, method="network")
  np.testing.assert_array_equal(features, expected)
  assert relative_error(features[0], features[1]) > 0.01
  bare = build_vit(**VIT | {"projection_dim": 0})
  params = dict(variables["params"])
  kernel = params.pop("projection")["kernel"]
  np.testing.assert_allclose(
    bare.apply({"params": params}, images) @ kernel, features, rtol=1e-5
  )


def test_a_gradient_keeps_a_block_s_input_alone():
  """Else the published networks don't fit beside a generator."""

  def planned(depth):
    vit = build_vit(**VIT | {"depth": depth})
    pixels = jnp.zeros((8, 28, 28, 3))
    shapes = jax.eval_shape(vit.init, jax.random.key(0), np.uint8(pixels))

    @jax.grad
    def gradient(pixels, variables):
      return vit.apply(variables, pixels, method="smooth").sum()

    compiled = jax.jit(gradient).lower(pixels, shapes).compile()
    tokens = (vit.image_size // vit.patch_size) ** 2 + 1
    kept = 4 * len(pixels) * tokens * vit.hidden_size
    return compiled.memory_analysis().temp_size_in_bytes, kept

  (few, kept), (many, _) = planned(4), planned(20)
  assert (many - few) / 16 < 2 * kept
