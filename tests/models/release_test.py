import functools
import json
import math
import tarfile

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from configs import models as presets
from drift_jax.models import release
from drift_jax.models.convnext import build_convnext
from drift_jax.models.generator import build_generator
from drift_jax.models.inception import build_inception
from drift_jax.models.mae import build_mae
from drift_jax.models.resnet import build_resnet
from drift_jax.models.vae import build_vae
from drift_jax.models.vit import build_vit
from tests.conftest import GOLDEN

KINDS = {
  "gen": (presets.GENERATORS, build_generator),
  "mae": (presets.MAES, build_mae),
  "convnext": (presets.CONVNEXTS, build_convnext),
}
# Of many layers, which take long to trace, and like others but for numbers.
LARGE = (
  "mae_640_latent",
  "mae_640_pixel",
  "generator_l2_latent",
  "generator_l16_pixel",
)
# Preset -> tests/golden/shapes_NAME.json and parameters in the encoder alone.
SHAPES = {
  "generator_b2_latent": "gen_B2_latent",
  "generator_l2_latent": "gen_L2_latent",
  "generator_b16_pixel": "gen_B16_pixel",
  "generator_l16_pixel": "gen_L16_pixel",
  "mae_256_latent": "mae_256_latent",
  "mae_640_latent": "mae_640_latent",
  "mae_640_pixel": "mae_640_pixel",
  "convnextv2_base": "convnextv2_base",
}
every_preset = pytest.mark.parametrize(
  ("kind", "name"),
  [
    pytest.param(kind, name, marks=[pytest.mark.slow] * (name in LARGE))
    for kind, (table, _) in KINDS.items()
    for name in table
    if name in SHAPES
  ],
)
# Of 512 px: kind, the preset of 256 px that folds less, parameters.
OF_512PX = {
  "generator_b4_latent": ("gen", "generator_b2_latent", 132_782_656),
  "generator_l4_latent": ("gen", "generator_l2_latent", 463_007_808),
  "mae_640_latent_512px": ("mae", "mae_640_latent", 2_687_943_416),
}
# W-Flow's, which its authors give as 679 M parameters.
XL2, XL2_PARAMETERS = "generator_xl2_latent", 678_929_872
# Models that the release lacks: kind -> presets, builder, parameters of each.
OTHERS = {
  "vae": (presets.VAES, build_vae, {"sd_vae": 83_653_863}),
  # torchvision's BatchNorms have 26 560 scales more, which are in the kernels.
  "resnet": (
    presets.RESNETS,
    build_resnet,
    dict.fromkeys(presets.RESNETS, 23_508_032 - 26_560),
  ),
  "inception": (
    presets.INCEPTIONS,
    build_inception,
    {"inception_fid": 23_833_744},
  ),
  # The published DINOv2 has 1370 positions and a token to mask with; here are
  # 257 and none.
  "vit": (
    presets.VITS,
    build_vit,
    {
      "dinov2_small": 22_056_576 - 1114 * 384,
      "dinov2_large": 304_368_640 - 1114 * 1024,
      "clip_large": 303_966_208,
    },
  ),
}


@functools.cache
def _preset(kind: str, name: str):
  """The preset's module and the shapes of its variables."""
  table, build = KINDS[kind]
  module = build(**table[name]())
  init = functools.partial(module.init, jax.random.key(0))
  return module, jax.eval_shape(init, *module.example_inputs)


def _published(kind: str, name: str, golden) -> dict:
  if kind == "convnext":
    return {"depths": golden["depths"], "dims": golden["dims"]}
  return golden["model_config"]


def test_every_preset_has_golden_shapes_and_every_golden_a_preset():
  files = {path.stem for path in GOLDEN.glob("shapes_*.json")}
  assert {f"shapes_{name}" for name in SHAPES.values()} == files
  functions = {
    name
    for name, value in vars(presets).items()
    if callable(value) and not name.startswith("_") and name != "ConfigDict"
  }
  others = {name for _, _, counts in OTHERS.values() for name in counts}
  assert functions == SHAPES.keys() | others | {XL2} | OF_512PX.keys()


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHERS)
def test_others_have_their_parameters_under_our_names(kind):
  """The release has none; their own tests have their published numbers."""
  table, build, counts = OTHERS[kind]
  assert table.keys() == counts.keys()
  for name, count in counts.items():
    arguments = table[name]().to_dict()
    expected = build(**arguments)
    config = release.published_config(kind, arguments)
    assert json.loads(json.dumps(config)) == config
    shapes = release.parameter_shapes(kind, config)
    assert sum(map(math.prod, shapes.values())) == count
    zeros = {k: np.zeros(shape, np.int8) for k, shape in shapes.items()}
    tree = traverse_util.unflatten_dict(zeros, sep="/")
    module, params = release.from_release(kind, config, tree)
    assert module == expected
    assert params == release.to_release(kind, config, params) == tree


@every_preset
def test_preset_has_the_published_parameters(kind, name, golden_json):
  golden = golden_json(f"shapes_{SHAPES[name]}")
  _, shapes = _preset(kind, name)
  config = _published(kind, name, golden)
  there = jax.eval_shape(
    lambda params: release.to_release(kind, config, params), shapes["params"]
  )
  leaves = {
    path: [list(leaf.shape), str(leaf.dtype)]
    for path, leaf in traverse_util.flatten_dict(there, sep="/").items()
  }
  assert leaves == golden["leaves"]
  counts = {k: math.prod(shape) for k, (shape, _) in leaves.items()}
  assert sum(counts.values()) == golden["n_params"]
  if kind == "mae":
    encoder = sum(v for k, v in counts.items() if k.startswith("encoder/"))
    assert encoder == golden["n_params_encoder"]
  back = jax.eval_shape(
    lambda params: release.from_release(kind, config, params)[1], there
  )
  assert back == shapes["params"]


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_512PX)
def test_presets_of_512_px_differ_in_what_they_fold(name):
  """Each folded layer has more parameters; tokens and features are as many."""
  kind, smaller, parameters = OF_512PX[name]
  module, variables = _preset(kind, name)
  leaves = traverse_util.flatten_dict(variables["params"])
  assert sum(leaf.size for leaf in leaves.values()) == parameters
  other, others = _preset(kind, smaller)
  same = {
    path
    for path, leaf in traverse_util.flatten_dict(others["params"]).items()
    if leaf.shape == leaves[path].shape
  }
  assert 1 <= len(leaves) - len(same) <= 4 and same < leaves.keys()
  if kind == "gen":
    assert (module.input_size, other.input_size) == (64, 32)
    assert module.clone(input_size=32, patch_size=2) == other
  else:
    shapes = [
      _features(net, of, jax.ShapeDtypeStruct((2, side, side, 4), jnp.float32))
      for net, of, side in ((module, variables, 64), (other, others, 32))
    ]
    assert shapes[0].keys() == shapes[1].keys()
    differ = {
      key for key, shape in shapes[0].items() if shapes[1][key] != shape
    }
    assert differ == {"global", "norm_x"}  # the latent itself


@pytest.mark.slow
def test_w_flows_largest_is_not_among_the_releases():
  _, shapes = _preset("gen", XL2)
  leaves = jax.tree.leaves(shapes["params"])
  assert sum(leaf.size for leaf in leaves) == XL2_PARAMETERS
  assert shapes["params"]["blocks"]["attention"]["q_norm"]["scale"].shape == (
    28,
    72,
  )


@every_preset
def test_preset_is_the_published_configuration(kind, name, golden_json):
  module, _ = _preset(kind, name)
  published = release.published_config(kind, KINDS[kind][0][name]().to_dict())
  assert json.loads(json.dumps(published)) == published
  golden = _published(kind, name, golden_json(f"shapes_{SHAPES[name]}"))
  defaults = {
    "gen": {"use_remat": False},
    "mae": {},
    "convnext": {"use_bf16": False},
  }
  assert published == defaults[kind] | golden
  # The release knows all or nothing of recomputed blocks.
  if kind == "gen" and module.remat != "full":
    module = module.clone(remat="none")
  assert release.describe(kind, published)[0] == module


@pytest.mark.parametrize(
  ("key", "mae", "convnext_dtype"),
  [
    ("latent_mae256", "mae_256_latent", None),
    ("latent_mae640", "mae_640_latent", None),
    ("pixel_mae640_only", "mae_640_pixel", None),
    ("pixel_mae640_convnext", "mae_640_pixel", "float32"),
    ("pixel_mae640_convnext_bf16", "mae_640_pixel", "bfloat16"),
  ],
)
@pytest.mark.slow
def test_presets_give_the_published_features(
  key, mae, convnext_dtype, golden_json
):
  expected = golden_json("activation_keys")
  assert len(expected) == 5
  module, variables = _preset("mae", mae)
  x = jax.ShapeDtypeStruct(expected[key]["x_shape"], jnp.float32)
  features = dict(_features(module, variables, x))
  if convnext_dtype:
    module, variables = _preset("convnext", "convnextv2_base")
    module = module.clone(dtype=jnp.dtype(convnext_dtype))
    features |= _features(module, variables, x)
  assert {
    name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in features.items()
  } == expected[key]["features"]


def _features(module, variables, x):
  apply = functools.partial(module.apply, method="features")
  return jax.eval_shape(apply, variables, x)


def _artifact_gen():
  folder = GOLDEN / "artifact_gen" / "params_ema"
  return [(folder / name).read_bytes() for name in ARTIFACT]


def _artifact_mae():
  with tarfile.open(GOLDEN / "artifact_mae.tar.gz") as archive:
    files = (archive.extractfile(f"params_ema/{name}") for name in ARTIFACT)
    return [file.read() for file in files if file]


ARTIFACT = ("metadata.json", "ema_params.msgpack")


@pytest.mark.parametrize(
  ("kind", "read", "arrays"),
  [
    ("gen", _artifact_gen, "gen_latent"),
    ("mae", _artifact_mae, "mae_latent_params"),
  ],
)
def test_artifact_survives_the_round_trip_byte_for_byte(
  kind, read, arrays, release_params
):
  text, data = read()
  metadata = json.loads(text)
  assert metadata["kind"] == kind
  tree = flax.serialization.msgpack_restore(data)
  config = metadata["model_config"]
  _, params = release.from_release(kind, config, tree)
  back = release.to_release(kind, config, params)
  flat = traverse_util.flatten_dict(back, sep="/")
  # msgpack keeps the order of keys; restore it before comparing the bytes.
  order = traverse_util.flatten_dict(tree, sep="/")
  assert flat.keys() == order.keys()
  ordered = traverse_util.unflatten_dict(
    {name: np.asarray(flat[name]) for name in order}, sep="/"
  )
  assert flax.serialization.msgpack_serialize(ordered) == data
  golden = traverse_util.flatten_dict(release_params(arrays), sep="/")
  assert flat.keys() == golden.keys()
  for name, leaf in flat.items():
    np.testing.assert_array_equal(leaf, golden[name], name)


def test_conversion_traces_and_keeps_numpy_on_the_host(
  golden_json, release_params
):
  config = golden_json("gen_latent_config")["model_config"]
  tree = release_params("gen_latent")
  _, params = release.from_release("gen", config, tree)
  assert {type(x) for x in jax.tree.leaves(params)} == {np.ndarray}
  traced = jax.jit(lambda p: release.from_release("gen", config, p)[1])(tree)
  jax.tree.map(np.testing.assert_array_equal, traced, params)


def test_blocks_and_style_tables_stack_in_numeric_order():
  # Sorted by name, number 10 would come before number 2.
  config, tree = _small_release(depth=11, style_tokens=12)
  for i in range(11):
    tree["LightningDiT_0"][f"blocks_{i}"]["RMSNorm_0"]["weight"] += i
  for i in range(12):
    tree[f"noise_embeds_{i}"]["embedding"] += i
  _, params = release.from_release("gen", config, tree)
  scales = params["blocks"]["attention_norm"]["scale"]
  np.testing.assert_array_equal(scales[:, 0], np.arange(11))
  np.testing.assert_array_equal(params["style_embed"][:, 0, 0], np.arange(12))


def _small_release(**change):
  """A small generator's published configuration and zero parameters."""
  arguments = presets.generator_b2_latent().to_dict()
  arguments |= {"hidden_size": 24, "cond_dim": 8, "depth": 2} | change
  config = release.published_config("gen", arguments)
  _, shapes = release.describe("gen", config)
  zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  tree = release.to_release("gen", config, zeros)
  return config, jax.tree.map(np.copy, tree)  # rows of a stack are views


def test_absent_style_and_context_tokens_are_absent_there_too():
  config, tree = _small_release(style_tokens=0, context_tokens=0)
  names = set(traverse_util.flatten_dict(tree, sep="/"))
  assert not [x for x in names if "noise_embeds" in x or "cls_embed" in x]
  _, params = release.from_release("gen", config, tree)
  assert not {"style_embed", "context_embed", "context_proj"} & params.keys()


def test_autoencoder_without_num_classes_has_1000(golden_json):
  config = golden_json("mae_latent_config")["model_config"]
  del config["num_classes"]
  shapes = release.parameter_shapes("mae", config)
  assert shapes["classifier/bias"] == (1000,)


def test_differences_from_the_configuration_are_listed(
  golden_json, release_params
):
  config = golden_json("gen_latent_config")["model_config"]
  tree = release_params("gen_latent")
  _, params = release.from_release("gen", config, tree)
  tree["Embed_1"] = tree.pop("Embed_0")
  tree["RMSNorm_0"]["weight"] = np.ones(65, np.float32)
  message = (
    r"missing \(1\): Embed_0/embedding\. "
    r"unexpected \(1\): Embed_1/embedding\. "
    r"wrong shapes \(1\): RMSNorm_0/weight has shape \(65,\), not \(64,\)"
  )
  with pytest.raises(ValueError, match=message):
    release.from_release("gen", config, tree)
  params["blocks"]["mlp_norm"]["scale"] = np.ones((3, 64), np.float32)
  message = r"blocks/mlp_norm/scale has shape \(3, 64\), not \(2, 64\)"
  with pytest.raises(ValueError, match=message):
    release.to_release("gen", config, params)


@pytest.mark.parametrize(
  ("kind", "change", "message"),
  [
    ("gen", {"use_rope": False}, "use_rope=False, but only True"),
    ("gen", {"use_qknorm": 0}, "use_qknorm=0, but only True"),
    ("gen", {"window": 8}, r"unknown \['window'\]"),
    ("gen", {"depth": None}, r"missing \['depth'\]"),
    ("mae", {"dropout_prob": 0.1}, "dropout_prob=0.1, but only 0.0"),
    ("vit", {"use_bf16": True}, "use_bf16=True, but only False"),
    ("vea", {}, "kind='vea': must be one of 'gen', 'mae', 'conv"),
  ],
)
def test_configurations_without_counterpart_are_explained(
  kind, change, message
):
  preset = {
    "mae": presets.mae_256_latent,
    "vit": presets.dinov2_small,
  }.get(kind, presets.generator_b2_latent)
  known = "gen" if kind == "vea" else kind
  config = release.published_config(known, preset().to_dict()) | change
  config = {k: v for k, v in config.items() if v is not None}
  for function in (release.from_release, release.to_release):
    with pytest.raises(ValueError, match=message):
      function(kind, config, {})


def test_missing_arguments_are_named():
  arguments = presets.mae_256_latent().to_dict()
  del arguments["num_classes"], arguments["layers"]
  with pytest.raises(ValueError, match="'mae' lack layers, num_classes"):
    release.published_config("mae", arguments)
