"""ResNet encoders: timm's numbers, then their properties."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import models as presets
from drift_jax.models import release
from drift_jax.models.resnet import build_resnet
from drift_jax.training.conversions import resnet as conversion
from drift_jax.training.conversions.layouts import published_shapes
from tests.conftest import assert_close, relative_error
from tests.models.published import draw_all, noise, under
from tests.models.small import RESNET, random_variables

# Golden prefix -> converter, input.
GOLDEN = {
  "moco": (conversion.convert_moco, noise(0, (2, 64, 64, 3))),
  "simclr": (conversion.convert_simclr, noise(1, (1, 256, 256, 3))),
}
# Outputs of the last block of a stage, which are the stage's.
TWICE = {"layer2_blk2": "layer2", "layer3_blk6": "layer3"}


@pytest.fixture(scope="module")
def tiny(golden):
  """Golden prefix -> the network as `convert_weights` gives it."""
  arrays = golden("resnet")
  weights = draw_all(arrays["parameters"])
  networks = {}
  for name, (convert, _) in GOLDEN.items():
    converted = convert(weights, None)[:2]
    networks[name] = release.from_release("resnet", *converted)
  return arrays, networks


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_features(tiny, name):
  arrays, networks = tiny
  model, params = networks[name]
  assert (model.layers, model.base_channels) == ((1, 2, 6, 1), 4)
  features = jax.jit(functools.partial(model.apply, method="features"))(
    {"params": params}, GOLDEN[name][1]
  )
  expected = under(f"{name}/", arrays)
  pooled = expected.pop("pooled")
  assert_close(features["layer4_mean"][:, 0], pooled, 3e-5)
  for key in [key for key in features if key.startswith(tuple(TWICE))]:
    name = key[: len("layerN_blkN")]
    same = features[key.replace(name, TWICE[name])]
    np.testing.assert_array_equal(features.pop(key), same)
  if name == "moco":
    assert features.keys() == expected.keys()
  for key, value in expected.items():
    count = features[key].shape[1]
    thinned = features[key][:, :: count // 20 | 1]
    assert_close(thinned, value, 3e-5, key)


def pooled_of(model, params, x):
  apply = functools.partial(model.apply, method="pooled")
  return jax.jit(apply)({"params": params}, x)


def test_pooled_is_the_mean_of_the_last_stage(tiny):
  arrays, networks = tiny
  model, params = networks["simclr"]
  x = GOLDEN["simclr"][1]
  exact = pooled_of(model, params, x)
  assert_close(exact, arrays["simclr/pooled"], 3e-5)
  rough = pooled_of(model.clone(dtype=jnp.dtype("bfloat16")), params, x)
  assert rough.dtype == jnp.float32
  assert 1e-4 < relative_error(rough, arrays["simclr/pooled"]) < 3e-2


def test_resnet50_has_torchvisions_parameters(golden):
  """All that its file holds but head and counters, and no more."""
  there = {}
  for line in golden("resnet")["parameters_resnet50"]:
    name, shape = str(line).split()
    there[name] = tuple(map(int, shape.split(",")))
  trained = {
    name: math.prod(shape)
    for name, shape in there.items()
    if not name.startswith("fc.") and ".running_" not in name
  }
  assert sum(trained.values()) == 23_508_032
  arguments = presets.resnet50_moco().to_dict()
  config = release.published_config("resnet", arguments)
  shapes = release.parameter_shapes("resnet", config)
  ours = published_shapes(conversion.NAMES.entries(shapes), shapes)
  assert ours == {k: v for k, v in there.items() if not k.startswith("fc.")}
  assert arguments["image_mean"] == tuple(conversion.IMAGENET_MEAN)
  assert arguments["image_std"] == tuple(conversion.IMAGENET_STD)


X = noise(2, (2, 32, 32, 3))


def small(**change):
  """A network and random parameters, not compiled."""
  model = build_resnet(**(RESNET | change))
  return model, random_variables(model)["params"]


def shapes_of(model, params, x=X, **options):
  """{key: shape and dtype} of the features."""
  apply = functools.partial(model.apply, method="features", **options)
  return jax.eval_shape(apply, {"params": params}, x)


def test_features_have_an_maes_keys_and_options():
  model, params = small(layers=(2, 1, 1, 1))
  maps = ["conv1", "layer1_blk2", "layer1", "layer2", "layer3", "layer4"]
  of_each = ["", "_mean", "_std", "_mean_2", "_mean_4", "_std_2", "_std_4"]
  features = shapes_of(model.clone(dtype=jnp.dtype("bfloat16")), params)
  for key, value in features.items():
    wide = key == "norm_x" or "_std" in key
    assert value.dtype == (jnp.float32 if wide else jnp.bfloat16), key
  divides = {"layer3": "_4", "layer4": ("_2", "_4")}  # 14 x 14 and 7 x 7
  assert features.keys() == {"norm_x"} | {
    name + end
    for name in maps
    for end in of_each
    if not end.endswith(divides.get(name, "never"))
  }
  assert features["conv1"].shape == (2, 56 * 56, 2)
  assert features["layer2_std_4"].shape == (2, 7 * 7, 16)
  assert features["layer4_mean"].shape == (2, 1, 64)
  assert features["norm_x"].shape == (2, 1, 3)
  none = {"patch_mean_size": (), "patch_std_size": ()}
  features = shapes_of(
    model, params, every_k_block=math.inf, use_mean=False, use_std=False, **none
  )
  assert features.keys() == {"norm_x", *maps} - {"layer1_blk2"}


def test_gradient_reaches_the_pixels_and_remat_changes_none():
  model, params = small(layers=(1, 1, 5, 1))  # a scan and single blocks
  assert params["stage3_blocks"]["conv2"]["kernel"].shape == (4, 3, 3, 8, 8)
  gradients = []
  for module in (model, model.clone(remat=True)):

    def objective(x, module=module):
      return jnp.sum(
        jnp.sin(module.apply({"params": params}, x, method="pooled"))
      )

    # Beyond [-1, 1]: nothing is clipped.
    gradients.append(jax.jit(jax.grad(objective))(1.5 * X))
  assert (np.abs(gradients[0]) > 0).mean() > 0.99
  assert_close(gradients[1], gradients[0], 1e-5)


def test_other_inputs_and_options_are_explained():
  model, params = small()
  with pytest.raises(ValueError, match=r"x has shape \(2, 32, 32, 4\): needs"):
    shapes_of(model, params, np.zeros((2, 32, 32, 4), np.float32))
  with pytest.raises(ValueError, match="every_k_block=0: must be >= 1"):
    shapes_of(model, params, every_k_block=0)
