"""The published parameter trees: their names and shapes <-> those here.

A tree here holds the generator's blocks, the equal blocks of an encoder's
stages and the style tables stacked along a leading axis; a published tree holds
one entry for each. All else is renaming.
The paper's release holds no 'resnet', 'vae', 'inception' or 'vit': their
published names are those here.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from drift_jax.models.arguments import require_choice
from drift_jax.models.convnext import build_convnext
from drift_jax.models.generator import build_generator
from drift_jax.models.inception import build_inception
from drift_jax.models.mae import build_mae, single_blocks
from drift_jax.models.resnet import build_resnet
from drift_jax.models.vae import build_vae
from drift_jax.models.vit import build_vit

Config = Mapping[str, Any]
Params = Mapping[str, Any]

# Published artifacts of the autoencoders do not record it.
NORM_GROUPS = 32
IMAGENET_CLASSES = 1000

_LISTED_DIFFERENCES = 5


class Entry(NamedTuple):
  """One parameter here and its counterpart, or counterparts, there."""

  ours: str
  theirs: tuple[str, ...]
  stacked: bool = False


def from_release(
  kind: str, model_config: Config, params: Params
) -> tuple[nn.Module, dict[str, Any]]:
  """Builds a published model from its configuration and parameters.

  Args:
    kind: 'gen', 'mae', 'convnext', 'resnet', 'vae', 'inception' or 'vit'.
    model_config: the model's configuration under its published names. An
      autoencoder without `num_classes` has 1000.
    params: nested dict of arrays under the published names, without an outer
      'params'. NumPy arrays stay on the host.

  Returns:
    The module and its parameters, for `module.apply({'params': params}, ...)`.
    Works under `jax.eval_shape` and `jax.jit`.

  Raises:
    ValueError: unknown kind; an option without counterpart here; names or
      shapes of params that do not fit model_config.
  """
  module, entries, shapes = _describe(kind, model_config)
  flat = _flatten(params)
  expected = {
    name: shapes[entry.ours][1:] if entry.stacked else shapes[entry.ours]
    for entry in entries
    for name in entry.theirs
  }
  require_parameters(
    f"published {kind!r} parameters do not fit model_config", flat, expected
  )
  converted = {}
  for entry in entries:
    leaves = [flat[name] for name in entry.theirs]
    converted[entry.ours] = _stack(leaves) if entry.stacked else leaves[0]
  return module, traverse_util.unflatten_dict(converted, sep="/")


def to_release(
  kind: str, model_config: Config, params: Params
) -> dict[str, Any]:
  """Exact inverse of `from_release`: parameters under the published names.

  Args:
    kind: 'gen', 'mae', 'convnext', 'resnet', 'vae', 'inception' or 'vit'.
    model_config: the model's configuration under its published names.
    params: parameters of the module that `from_release` builds from it.

  Raises:
    ValueError: as `from_release`.
  """
  _, entries, shapes = _describe(kind, model_config)
  flat = _flatten(params)
  require_parameters(
    f"{kind!r} parameters do not fit model_config", flat, shapes
  )
  converted = {}
  for entry in entries:
    leaf = flat[entry.ours]
    for i, name in enumerate(entry.theirs):
      converted[name] = leaf[i] if entry.stacked else leaf
  return traverse_util.unflatten_dict(converted, sep="/")


def published_config(kind: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
  """The published model_config of a model given by its arguments here.

  Args:
    kind: 'gen', 'mae', 'convnext', 'resnet', 'vae', 'inception' or 'vit'.
    arguments: of the function that builds this kind, e.g. `build_mae`.

  Returns:
    Plain values only, fit for JSON. The `remat` of 'mae' and 'vae' has no
    counterpart and is left out; norm_groups is there if it is not the 32 of
    every published model.

  Raises:
    ValueError: unknown kind; an argument that is missing.
  """
  require_choice("kind", kind, tuple(_KINDS))
  keys = _KINDS[kind].keys
  extra = {
    "gen": ("dtype", "attention_dtype", "remat"),
    "mae": ("dtype", "num_classes", "norm_groups"),
    "inception": (),
    "vit": (),
  }.get(kind, ("dtype",))
  missing = [name for name in (*keys, *extra) if name not in arguments]
  if missing:
    raise ValueError(f"arguments of {kind!r} lack {', '.join(missing)}")
  config = {theirs: arguments[ours] for ours, theirs in keys.items()}
  for key, value in config.items():
    if isinstance(value, (tuple, list)):
      config[key] = [x if isinstance(x, float) else int(x) for x in value]
  if "dtype" in extra:
    config["use_bf16"] = arguments["dtype"] == "bfloat16"
  if kind == "gen":
    config |= dict.fromkeys(_ALWAYS_ON, True)
    config["attn_fp32"] = arguments["attention_dtype"] == "float32"
    config["use_remat"] = arguments["remat"] == "full"
  if kind == "mae":
    config["num_classes"] = arguments["num_classes"]
    config["dropout_prob"] = 0.0
    if arguments["norm_groups"] != NORM_GROUPS:
      config["norm_groups"] = arguments["norm_groups"]
  return config


def describe(
  kind: str, model_config: Config
) -> tuple[nn.Module, dict[str, Any]]:
  """A model, and its parameters here as a tree of float32 ShapeDtypeStructs.

  Raises:
    ValueError: unknown kind; a model_config that can't be built.
  """
  module, _, shapes = _describe(kind, model_config)
  leaves = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
  return module, traverse_util.unflatten_dict(leaves, sep="/")


def parameter_shapes(
  kind: str, model_config: Config
) -> dict[str, tuple[int, ...]]:
  """Shapes of a model's parameters here, by names joined with '/'.

  Raises:
    ValueError: unknown kind; a model_config that can't be built.
  """
  _, _, shapes = _describe(kind, model_config)
  return shapes


@functools.lru_cache(maxsize=64)  # tracing a large module takes seconds
def _shapes(module: Any) -> Mapping[str, tuple[int, ...]]:
  """Shapes of a module's parameters by name; equal modules are one key."""
  variables = jax.eval_shape(
    module.init, jax.random.key(0), *module.example_inputs
  )
  return {k: v.shape for k, v in _flatten(variables["params"]).items()}


def _describe(
  kind: str, config: Config
) -> tuple[nn.Module, list[Entry], dict[str, tuple[int, ...]]]:
  """The module, its entries, and the shapes of its parameters by name."""
  require_choice("kind", kind, tuple(_KINDS))
  described = _KINDS[kind]
  module: Any = described.build(config)
  shapes = dict(_shapes(module))
  if described.entries is None:
    return module, [Entry(name, (name,)) for name in shapes], shapes
  return module, described.entries(config), shapes


def _flatten(params: Params) -> dict[str, Any]:
  return traverse_util.flatten_dict(dict(params), sep="/")


def _stack(leaves: Sequence[Any]) -> Any:
  on_host = all(isinstance(leaf, np.ndarray) for leaf in leaves)
  return np.stack(leaves) if on_host else jnp.stack(leaves)


def require_parameters(
  what: str, flat: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]
) -> None:
  """Raises ValueError unless names and shapes are the expected ones.

  Args:
    what: begins the message, which lists the first differences.
    flat: arrays by name.
    expected: shapes by name.
  """
  shape_errors = [
    f"{name} has shape {tuple(flat[name].shape)}, not {shape}"
    for name, shape in expected.items()
    if name in flat and tuple(flat[name].shape) != shape
  ]
  complaints = [
    f"{title} ({len(items)}): {'; '.join(items[:_LISTED_DIFFERENCES])}"
    for title, items in (
      ("missing", sorted(expected.keys() - flat.keys())),
      ("unexpected", sorted(flat.keys() - expected.keys())),
      ("wrong shapes", shape_errors),
    )
    if items
  ]
  if complaints:
    raise ValueError(f"{what}: {'. '.join(complaints)}")


def _read(
  kind: str,
  config: Config,
  *,
  required: Iterable[str],
  optional: Mapping[str, Any],
) -> dict[str, Any]:
  """The configuration with defaults; ValueError on missing, unknown keys."""
  required = list(required)
  missing = [key for key in required if key not in config]
  unknown = [key for key in config if key not in (*required, *optional)]
  if missing or unknown:
    raise ValueError(
      f"model_config of {kind!r}: missing {missing}, unknown {unknown};"
      f" required keys: {', '.join(required)}; optional ones:"
      f" {', '.join(optional)}"
    )
  return {**optional, **config}


def _dtype(use_bf16: bool) -> str:
  return "bfloat16" if use_bf16 else "float32"


# Arguments here -> keys there.
_GENERATOR_KEYS = {
  "input_size": "input_size",
  "in_channels": "in_channels",
  "out_channels": "out_channels",
  "patch_size": "patch_size",
  "hidden_size": "hidden_size",
  "depth": "depth",
  "num_heads": "num_heads",
  "mlp_ratio": "mlp_ratio",
  "num_classes": "num_classes",
  "cond_dim": "cond_dim",
  "context_tokens": "n_cls_tokens",
  "style_vocab": "noise_classes",
  "style_tokens": "noise_coords",
}
_MAE_KEYS = {
  "in_channels": "in_channels",
  "base_channels": "base_channels",
  "layers": "layers",
  "input_patch_size": "input_patch_size",
  "mask_patch_size": "patch_size",
}
_CONVNEXT_KEYS = {"depths": "depths", "widths": "dims"}
_RESNET_KEYS = {
  name: name for name in ("layers", "base_channels", "image_mean", "image_std")
}
_VAE_KEYS = {
  "in_channels": "in_channels",
  "latent_channels": "latent_channels",
  "widths": "block_out_channels",
  "blocks_per_level": "layers_per_block",
  "norm_groups": "norm_num_groups",
  "scaling_factor": "scaling_factor",
}
_INCEPTION_KEYS = {"width": "width", "num_classes": "num_classes"}
_VIT_KEYS = {
  name: name
  for name in (
    "image_size",
    "patch_size",
    "hidden_size",
    "depth",
    "num_heads",
    "mlp_size",
    "activation",
    "pre_norm",
    "layer_scale",
    "patch_bias",
    "projection_dim",
    "epsilon",
    "image_mean",
    "image_std",
  )
}
_ALWAYS_ON = ("use_qknorm", "use_swiglu", "use_rope", "use_rmsnorm")


def _build_generator(config: Config) -> nn.Module:
  config = _read(
    "gen",
    config,
    required=(*_GENERATOR_KEYS.values(), *_ALWAYS_ON),
    optional={"use_bf16": False, "attn_fp32": True, "use_remat": False},
  )
  for key in _ALWAYS_ON:
    if config[key] is not True:
      raise ValueError(
        f"model_config has {key}={config[key]!r}: every published generator"
        " sets it to true, and there is no other form here"
      )
  dtype = _dtype(config["use_bf16"])
  return build_generator(
    **{ours: config[theirs] for ours, theirs in _GENERATOR_KEYS.items()},
    dtype=dtype,
    attention_dtype="float32" if config["attn_fp32"] else dtype,
    remat="full" if config["use_remat"] else "none",
  )


def _build_mae(config: Config) -> nn.Module:
  config = _read(
    "mae",
    config,
    required=_MAE_KEYS.values(),
    optional={
      "num_classes": IMAGENET_CLASSES,
      "dropout_prob": 0.0,
      "use_bf16": False,
      "use_remat": False,
      "norm_groups": NORM_GROUPS,
    },
  )
  if config["dropout_prob"] > 0:
    raise ValueError(
      f"model_config has dropout_prob={config['dropout_prob']}: every"
      " published autoencoder has 0, and there is no dropout here"
    )
  return build_mae(
    **{ours: config[theirs] for ours, theirs in _MAE_KEYS.items()},
    num_classes=config["num_classes"],
    norm_groups=config["norm_groups"],
    dtype=_dtype(config["use_bf16"]),
    remat=config["use_remat"],
  )


def _build_convnext(config: Config) -> nn.Module:
  config = _read(
    "convnext",
    config,
    required=_CONVNEXT_KEYS.values(),
    optional={"use_bf16": False},
  )
  return build_convnext(
    **{ours: config[theirs] for ours, theirs in _CONVNEXT_KEYS.items()},
    dtype=_dtype(config["use_bf16"]),
  )


def _build_resnet(config: Config) -> nn.Module:
  config = _read(
    "resnet",
    config,
    required=_RESNET_KEYS.values(),
    optional={"use_bf16": False},
  )
  return build_resnet(
    **{ours: config[theirs] for ours, theirs in _RESNET_KEYS.items()},
    dtype=_dtype(config["use_bf16"]),
  )


def _build_vae(config: Config) -> nn.Module:
  config = _read(
    "vae",
    config,
    required=_VAE_KEYS.values(),
    optional={"use_bf16": False},
  )
  return build_vae(
    **{ours: config[theirs] for ours, theirs in _VAE_KEYS.items()},
    dtype=_dtype(config["use_bf16"]),
    remat=False,
  )


def _build_inception(config: Config) -> nn.Module:
  config = _read_float32(
    "inception", config, _INCEPTION_KEYS, "Inception features"
  )
  return build_inception(
    **{ours: config[theirs] for ours, theirs in _INCEPTION_KEYS.items()}
  )


def _build_vit(config: Config) -> nn.Module:
  config = _read_float32(
    "vit", config, _VIT_KEYS, "Vision Transformer features"
  )
  return build_vit(
    **{ours: config[theirs] for ours, theirs in _VIT_KEYS.items()}
  )


def _read_float32(
  kind: str, config: Config, keys: Mapping[str, str], what: str
) -> dict[str, Any]:
  """The configuration of a network for figures; ValueError on use_bf16."""
  config = _read(
    kind, config, required=keys.values(), optional={"use_bf16": False}
  )
  if config["use_bf16"]:
    raise ValueError(
      f"model_config has use_bf16=True: {what} are float32, and there is no"
      " other form here"
    )
  return config


def _renamed(ours: str, theirs: str, leaves: Mapping[str, str]) -> list[Entry]:
  return [Entry(f"{ours}/{a}", (f"{theirs}/{b}",)) for a, b in leaves.items()]


def _stacked(
  ours: str, theirs: Sequence[str], leaves: Mapping[str, str]
) -> list[Entry]:
  return [
    Entry(f"{ours}/{a}", tuple(f"{layer}/{b}" for layer in theirs), True)
    for a, b in leaves.items()
  ]


_KERNEL = {"kernel": "kernel"}
_LINEAR = {"kernel": "kernel", "bias": "bias"}
_WRAPPED_LINEAR = {"kernel": "Dense_0/kernel", "bias": "Dense_0/bias"}
_NORM = {"scale": "scale", "bias": "bias"}
_WEIGHT_NORM = {"scale": "weight", "bias": "bias"}
_RESPONSE_NORM = {"gamma": "gamma", "beta": "beta"}
_RMS_NORM = {"scale": "weight"}


def _generator_entries(config: Config) -> list[Entry]:
  depth = config["depth"]
  dit = "LightningDiT_0"
  entries = [
    Entry("class_embed/embedding", ("Embed_0/embedding",)),
    Entry("pos_embed", (f"{dit}/pos_embed",)),
  ]
  if config["noise_coords"]:
    tables = range(config["noise_coords"])
    names = tuple(f"noise_embeds_{i}/embedding" for i in tables)
    entries.append(Entry("style_embed", names, True))
  if config["n_cls_tokens"]:
    entries.append(Entry("context_embed", (f"{dit}/cls_embed",)))
    entries += _renamed("context_proj", f"{dit}/TorchLinear_1", _WRAPPED_LINEAR)
  for ours, theirs, leaves in (
    (
      "alpha_embed/linear_in",
      "TimestepEmbedder_0/TorchLinear_0",
      _WRAPPED_LINEAR,
    ),
    (
      "alpha_embed/linear_out",
      "TimestepEmbedder_0/TorchLinear_1",
      _WRAPPED_LINEAR,
    ),
    ("alpha_embed/norm", "RMSNorm_0", _RMS_NORM),
    ("patch_embed", f"{dit}/TorchLinear_0", _WRAPPED_LINEAR),
    ("final/norm", f"{dit}/FinalLayer_0/RMSNorm_0", _RMS_NORM),
    (
      "final/modulation/linear",
      f"{dit}/FinalLayer_0/TorchLinear_0",
      _WRAPPED_LINEAR,
    ),
    ("final/linear", f"{dit}/FinalLayer_0/TorchLinear_1", _WRAPPED_LINEAR),
  ):
    entries += _renamed(ours, theirs, leaves)
  for ours, theirs, leaves in (
    ("modulation/linear", "TorchLinear_0", _WRAPPED_LINEAR),
    ("attention_norm", "RMSNorm_0", _RMS_NORM),
    ("attention/qkv", "Attention_0/TorchLinear_0", _WRAPPED_LINEAR),
    ("attention/q_norm", "Attention_0/q_norm", _RMS_NORM),
    ("attention/k_norm", "Attention_0/k_norm", _RMS_NORM),
    ("attention/out", "Attention_0/TorchLinear_1", _WRAPPED_LINEAR),
    ("mlp_norm", "RMSNorm_1", _RMS_NORM),
    ("mlp/gate", "SwiGLUFFN_0/TorchLinear_0", _WRAPPED_LINEAR),
    ("mlp/up", "SwiGLUFFN_0/TorchLinear_1", _WRAPPED_LINEAR),
    ("mlp/down", "SwiGLUFFN_0/TorchLinear_2", _WRAPPED_LINEAR),
  ):
    entries += _stacked(
      f"blocks/{ours}",
      [f"{dit}/blocks_{i}/{theirs}" for i in range(depth)],
      leaves,
    )
  return entries


def _mae_entries(config: Config) -> list[Entry]:
  pairs = [
    ("encoder/stem_conv", "encoder/conv1", _KERNEL),
    ("encoder/stem_norm", "encoder/gn1", _NORM),
    ("decoder/bridge/conv", "decoder/bridge/conv", _KERNEL),
    ("decoder/bridge/norm", "decoder/bridge/gn", _NORM),
    ("decoder/head", "decoder/head", _LINEAR),
    ("classifier", "fc", _LINEAR),
  ]
  for level in (4, 3, 2, 1):
    ours = f"decoder/up{level}"
    theirs = f"decoder/up{level}{level - 1}"
    pairs.append((f"{ours}/norm", f"{theirs}/concat_norm_fn", _NORM))
    for part in ("proj", "refine"):
      pairs += [
        (f"{ours}/{part}/conv", f"{theirs}/{part}/conv", _KERNEL),
        (f"{ours}/{part}/norm", f"{theirs}/{part}/gn", _NORM),
      ]
  parts = (
    ("conv1", "conv1", _KERNEL),
    ("norm1", "gn1", _NORM),
    ("conv2", "conv2", _KERNEL),
    ("norm2", "gn2", _NORM),
  )
  entries: list[Entry] = []
  for stage, count in enumerate(config["layers"]):
    ours = f"encoder/stage{stage + 1}"
    pairs.append((f"{ours}_norm", f"encoder/layer{stage + 1}_norm", _NORM))
    layers = [f"encoder/stages_{stage}/layers_{i}" for i in range(count)]
    single = single_blocks(stage, count)
    for i, layer in enumerate(layers[:single], start=1):
      for a, b, leaves in parts:
        pairs.append((f"{ours}_block{i}/{a}", f"{layer}/{b}", leaves))
    for a, b, leaves in parts if layers[single:] else ():
      theirs = [f"{layer}/{b}" for layer in layers[single:]]
      entries += _stacked(f"{ours}_blocks/{a}", theirs, leaves)
    if stage > 0:
      pairs += [
        (f"{ours}_block1/proj_conv", f"{layers[0]}/proj_conv", _KERNEL),
        (f"{ours}_block1/proj_norm", f"{layers[0]}/proj_gn", _NORM),
      ]
  return entries + [entry for pair in pairs for entry in _renamed(*pair)]


def _convnext_entries(config: Config) -> list[Entry]:
  pairs = [("norm", "norm", _NORM)]
  for stage in range(len(config["depths"])):
    ours = f"stage{stage + 1}"
    theirs = f"downsample_layers_{stage}"
    conv, layer_norm = (0, 1) if stage == 0 else (1, 0)
    pairs += [
      (f"{ours}_down_conv", f"{theirs}/layers_{conv}", _LINEAR),
      (f"{ours}_down_norm", f"{theirs}/layers_{layer_norm}", _WEIGHT_NORM),
    ]
  entries = [entry for pair in pairs for entry in _renamed(*pair)]
  for stage, depth in enumerate(config["depths"]):
    for ours, theirs, leaves in (
      ("depthwise", "dwconv", _LINEAR),
      ("norm", "norm", _WEIGHT_NORM),
      ("expand", "pwconv1", _LINEAR),
      ("response_norm", "grn", _RESPONSE_NORM),
      ("project", "pwconv2", _LINEAR),
    ):
      entries += _stacked(
        f"stage{stage + 1}_blocks/{ours}",
        [f"stages_{stage}/layers_{i}/{theirs}" for i in range(depth)],
        leaves,
      )
  return entries


class _Kind(NamedTuple):
  keys: Mapping[str, str]
  build: Callable[[Config], nn.Module]
  entries: Callable[[Config], list[Entry]] | None  # None: the same names


_KINDS = {
  "gen": _Kind(_GENERATOR_KEYS, _build_generator, _generator_entries),
  "mae": _Kind(_MAE_KEYS, _build_mae, _mae_entries),
  "convnext": _Kind(_CONVNEXT_KEYS, _build_convnext, _convnext_entries),
  "resnet": _Kind(_RESNET_KEYS, _build_resnet, None),
  "vae": _Kind(_VAE_KEYS, _build_vae, None),
  "inception": _Kind(_INCEPTION_KEYS, _build_inception, None),
  "vit": _Kind(_VIT_KEYS, _build_vit, None),
}
