"""Vision Transformers: transformers' numbers, then their properties."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image

from configs import models as presets
from drift_jax.models import release
from drift_jax.models.vit import build_vit, preprocess, resize_bicubic
from drift_jax.tools.conversions.vit import (
  convert_clip,
  convert_dinov2,
  resize_positions,
)
from tests.conftest import assert_close, relative_error

SMALL = {
  "image_size": 8,
  "patch_size": 4,
  "hidden_size": 6,
  "depth": 2,
  "num_heads": 2,
  "mlp_size": 10,
  "activation": "quick_gelu",
  "pre_norm": True,
  "layer_scale": True,
  "patch_bias": True,
  "projection_dim": 5,
  "epsilon": 1e-5,
  "image_mean": (0.5, 0.4, 0.3),
  "image_std": (0.2, 0.3, 0.4),
}
DINOV2 = {
  "model_type": "dinov2",
  "hidden_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 3,
  "mlp_ratio": 4,
  "image_size": 518,
  "patch_size": 14,
  "layer_norm_eps": 1e-6,
}
DINOV2_SMALL = DINOV2 | {
  "hidden_size": 384,
  "num_hidden_layers": 12,
  "num_attention_heads": 6,
}
CLIP = {
  "model_type": "clip_vision_model",
  "hidden_size": 24,
  "intermediate_size": 80,
  "num_hidden_layers": 2,
  "num_attention_heads": 3,
  "image_size": 48,
  "patch_size": 16,
  "projection_dim": 20,
  "hidden_act": "quick_gelu",
  "layer_norm_eps": 1e-5,
}
# Golden name -> its parameters' name, converter, config.json, pixels.
GOLDEN = {
  "dinov2": ("dinov2", convert_dinov2, DINOV2, 224),
  "dinov2_small": ("dinov2_small", convert_dinov2, DINOV2_SMALL, 224),
  "clip": ("clip", convert_clip, CLIP, 48),
  "clip_gelu": ("clip", convert_clip, CLIP | {"hidden_act": "gelu"}, 48),
}


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """The golden arrays' weights, see tests/golden/README.md."""
  random = np.random.RandomState(zlib.crc32(name.encode()))
  uniform = 2 * random.random_sample(shape) - 1
  if name.endswith(".bias"):
    uniform *= 0.2
  elif "position_embedding" in name or name.endswith(
    ("_token", "class_embedding")
  ):
    pass
  elif len(shape) == 1:
    uniform = 1 + 0.2 * uniform
  else:
    uniform *= np.sqrt(3 / np.prod(shape[1:]))
  return uniform.astype(np.float32)


def draw_weights(lines: np.ndarray) -> dict[str, np.ndarray]:
  weights = {}
  for line in lines:
    name, shape = str(line).split()
    weights[name] = draw(name, tuple(map(int, shape.split(","))))
  return weights


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
  weights = draw_weights(arrays[f"parameters_{parameters}"])
  model_config, params = convert(weights, config)
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


@pytest.mark.parametrize(
  ("name", "convert", "published"),
  [
    ("dinov2_small", convert_dinov2, DINOV2_SMALL),
    (
      "dinov2_large",
      convert_dinov2,
      DINOV2
      | {"hidden_size": 1024, "num_hidden_layers": 24}
      | {"num_attention_heads": 16},
    ),
    (
      "clip_large",
      convert_clip,
      {
        "model_type": "clip",
        "projection_dim": 768,
        "vision_config": {
          "hidden_size": 1024,
          "intermediate_size": 4096,
          "num_hidden_layers": 24,
          "num_attention_heads": 16,
          "patch_size": 14,
        },
      },
    ),
  ],
)
def test_presets_are_the_published_configurations(
  name, convert, published, monkeypatch
):
  """Without their weights: what is asked for stands for what is made."""
  seen = []
  monkeypatch.setattr(
    release, "parameter_shapes", lambda kind, config: seen.append(config) or {}
  )
  monkeypatch.setattr(release, "require_parameters", lambda *_: None)
  convert({}, published)
  arguments = presets.VITS[name]().to_dict()
  assert seen == [release.published_config("vit", arguments)]


def test_golden_positions(golden):
  arrays = golden("vit")
  name = "embeddings.position_embeddings"
  positions = draw(name, (1, 1370, 24))[0]
  resized = resize_positions(positions, 16)
  assert resized.shape == (257, 24) and resized.dtype == np.float32
  np.testing.assert_array_equal(resized[0], positions[0])
  assert_close(resized[::3], arrays["positions_dinov2"], 3e-7)
  np.testing.assert_array_equal(resize_positions(positions, 37), positions)


def test_positions_of_either_axis_are_resized_alike():
  grid = np.random.RandomState(6).uniform(-1, 1, (5, 5, 3))

  def resize(grid: np.ndarray) -> np.ndarray:
    rows = np.concatenate([np.zeros((1, 3)), grid.reshape(25, 3)])
    return resize_positions(rows.astype(np.float32), 3)[1:].reshape(3, 3, 3)

  resized = resize(grid)
  assert relative_error(resized, resized.swapaxes(0, 1)) > 0.1
  for change in (
    lambda x: x.swapaxes(0, 1),
    lambda x: x[::-1],
    lambda x: x[:, ::-1],
    lambda x: x + 1,
  ):
    np.testing.assert_allclose(
      resize(change(grid)), change(resized), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(
  ("height", "width", "size"),
  [(32, 32, 224), (256, 256, 224), (500, 310, 48), (7, 40, 16), (1, 1, 5)],
)
def test_resize_is_pillows(height, width, size):
  random = np.random.RandomState(1)
  images = random.choice(np.float32([0, 255]), (2, height, width, 3))
  resized = jax.jit(lambda x: resize_bicubic(x, size))(images)
  assert resized.shape == (2, size, size, 3)
  expected = np.stack(
    [
      np.stack(
        [
          Image.fromarray(image[..., i]).resize(
            (size, size), Image.Resampling.BICUBIC
          )
          for i in range(3)
        ],
        axis=-1,
      )
      for image in images
    ]
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


def test_preprocess_takes_mean_and_std_of_each_channel():
  images = np.random.RandomState(2).randint(0, 256, (2, 8, 8, 3), np.uint8)
  options = {k: SMALL[k] for k in ("image_size", "image_mean", "image_std")}
  result = preprocess(images, **options)
  assert result.dtype == jnp.float32
  expected = (images / 255 - options["image_mean"]) / options["image_std"]
  np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6)


def test_whole_is_the_network_of_preprocessed_images():
  vit, variables = _small()
  images = np.random.RandomState(3).randint(0, 256, (2, 5, 9, 3), np.uint8)
  options = {k: SMALL[k] for k in ("image_size", "image_mean", "image_std")}
  pixels = preprocess(images, **options)
  features = vit.apply(variables, images)
  assert features.shape == (2, 5)
  expected = vit.apply(variables, pixels, method="network")
  np.testing.assert_array_equal(features, expected)
  assert relative_error(features[0], features[1]) > 0.01
  bare = build_vit(**SMALL | {"projection_dim": 0})
  params = dict(variables["params"])
  kernel = params.pop("projection")["kernel"]
  np.testing.assert_allclose(
    bare.apply({"params": params}, images) @ kernel, features, rtol=1e-5
  )


def _small(**change):
  """A small network and parameters that are not at their initial values."""
  vit = build_vit(**SMALL | change)
  shapes = jax.eval_shape(
    vit.init, jax.random.key(0), np.zeros((1, 1, 1, 3), np.uint8)
  )
  random = np.random.RandomState(4)
  return vit, jax.tree.map(
    lambda x: random.uniform(-1, 1, x.shape).astype(np.float32), shapes
  )


@pytest.mark.parametrize(
  ("images", "message"),
  [
    (np.zeros((1, 4, 4, 3), np.float32), "dtype float32, want uint8.*to_uint8"),
    (np.zeros((1, 4, 4, 3), np.int32), "dtype int32, want uint8"),
    (np.zeros((4, 4, 3), np.uint8), r"shape \(4, 4, 3\), want.*\[B, H, W, 3\]"),
    (np.zeros((1, 3, 4, 4), np.uint8), r"shape \(1, 3, 4, 4\), want"),
    (np.zeros((0, 4, 4, 3), np.uint8), r"shape \(0, 4, 4, 3\), want non-empty"),
  ],
)
def test_other_images_are_refused(images, message):
  with pytest.raises(ValueError, match=message):
    build_vit(**SMALL).apply({}, images)


def test_products_are_of_full_float32_on_every_device():
  """Accelerators take fewer bits by default; a CPU would not show it."""
  vit, variables = _small()
  images = jax.ShapeDtypeStruct((1, 5, 5, 3), jnp.uint8)
  jaxpr = jax.make_jaxpr(vit.apply)(variables, images)
  products = [
    equation.params["precision"]
    for equation in _equations(jaxpr.jaxpr)
    if equation.primitive.name in ("conv_general_dilated", "dot_general")
  ]
  # Two of the resize, patches, eight of the scanned block, projection.
  assert len(products) == 12
  highest = jax.lax.Precision.HIGHEST
  assert set(products) == {(highest, highest)}


def _equations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for inner in jaxprs_in_params(equation.params):
      yield from _equations(inner)


@pytest.mark.slow
def test_whole_over_a_mesh():
  """Each device has one image of two, and all parameters."""
  vit, variables = _small()
  images = np.random.RandomState(5).randint(0, 256, (2, 9, 9, 3), np.uint8)
  axis_types = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh(
    (2,), ("data",), axis_types=axis_types, devices=jax.devices()[:2]
  )
  shard = NamedSharding(mesh, PartitionSpec("data"))
  features = jax.jit(vit.apply)(
    jax.device_put(variables, NamedSharding(mesh, PartitionSpec())),
    jax.device_put(images, shard),
  )
  assert features.sharding.is_equivalent_to(shard, 2)
  assert_close(features, vit.apply(variables, images), 2e-6)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"depth": 0}, "depth=0: must be an integer >= 1"),
    ({"projection_dim": -1}, "projection_dim=-1: must be an integer >= 0"),
    ({"image_size": 9}, "image_size=9 must be a multiple of patch_size=4"),
    ({"num_heads": 4}, "hidden_size=6 must be a multiple of num_heads=4"),
    ({"activation": "relu"}, "='relu': must be one of 'gelu', 'quick_gelu'"),
    ({"epsilon": 0.0}, "epsilon=0.0: must be positive and finite"),
    ({"image_mean": (0.5,)}, r"image_mean=\(0.5,\): must be three finite"),
    (
      {"image_std": (1.0, 0.0, 1.0)},
      r"=\(1.0, 0.0, 1.0\): must be three finite .* > 0",
    ),
    ({"dtype": "bfloat16"}, "does not know 'dtype'.*: image_size, patch_size"),
  ],
)
def test_other_networks_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    build_vit(**SMALL | change)
