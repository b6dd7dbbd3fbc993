"""The published models: their configurations and parameters <-> those here.

All is renaming, by the tables below, and stacking, see `naming`. The paper's
release holds no 'resnet', 'vae', 'inception' or 'vit': the published names of
their parameters are those here.
"""

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from drift_jax.models.arguments import (
  NOT_IN_PAPER,
  argument_types,
  require_choice,
)
from drift_jax.models.naming import (
  Entry,
  Naming,
  gather,
  inside,
  require_parameters,
  scatter,
)

Config = Mapping[str, Any]
Params = Mapping[str, Any]

# Published artifacts of the autoencoders do not record it.
NORM_GROUPS = 32
IMAGENET_CLASSES = 1000

# Arguments that are published as yes or no: use_bf16, attn_fp32, use_remat.
_FLAGS = ("dtype", "attention_dtype", "remat")

_LINEAR = {"kernel": "Dense_0/kernel", "bias": "Dense_0/bias"}
_DIT = "LightningDiT_0"
_GENERATOR_NAMES = Naming(
  {
    "class_embed": "Embed_0",
    "style_embed": "noise_embeds_{i}/embedding",
    "alpha_embed/linear_in": "TimestepEmbedder_0/TorchLinear_0",
    "alpha_embed/linear_out": "TimestepEmbedder_0/TorchLinear_1",
    "alpha_embed/norm": "RMSNorm_0",
    "pos_embed": f"{_DIT}/pos_embed",
    "patch_embed": f"{_DIT}/TorchLinear_0",
    "context_embed": f"{_DIT}/cls_embed",
    "context_proj": f"{_DIT}/TorchLinear_1",
    # The release has no conditions: names are those here.
    "condition_embed/linear_in": "condition_embed/linear_in",
    "condition_embed/linear_out": "condition_embed/linear_out",
    "condition_proj": f"{_DIT}/condition_proj",
    "condition_pos": f"{_DIT}/condition_pos",
    "final/norm": f"{_DIT}/FinalLayer_0/RMSNorm_0",
    "final/modulation/linear": f"{_DIT}/FinalLayer_0/TorchLinear_0",
    "final/linear": f"{_DIT}/FinalLayer_0/TorchLinear_1",
    **inside(
      "blocks/",
      f"{_DIT}/blocks_{{i}}/",
      {
        "modulation/linear": "TorchLinear_0",
        "attention_norm": "RMSNorm_0",
        "attention/qkv": "Attention_0/TorchLinear_0",
        "attention/q_norm": "Attention_0/q_norm",
        "attention/k_norm": "Attention_0/k_norm",
        "attention/out": "Attention_0/TorchLinear_1",
        "mlp_norm": "RMSNorm_1",
        "mlp/gate": "SwiGLUFFN_0/TorchLinear_0",
        "mlp/up": "SwiGLUFFN_0/TorchLinear_1",
        "mlp/down": "SwiGLUFFN_0/TorchLinear_2",
      },
    ),
  },
  leaves=_LINEAR | {"scale": "weight"},
)

_MAE_BLOCK = {
  "conv{n}": "conv{n}",
  "norm{n}": "gn{n}",
  "proj_conv": "proj_conv",
  "proj_norm": "proj_gn",
}
_MAE_NAMES = Naming(
  {
    "encoder/stem_conv": "encoder/conv1",
    "encoder/stem_norm": "encoder/gn1",
    "encoder/stage{stage}_norm": "encoder/layer{stage}_norm",
    **inside(
      "encoder/stage{stage}_block{block}/",
      "encoder/stages_{stage0}/layers_{block0}/",
      _MAE_BLOCK,
    ),
    # Blocks that are equal: in stage 1 all, in the others all but the first.
    **inside(
      "encoder/stage1_blocks/", "encoder/stages_0/layers_{i}/", _MAE_BLOCK
    ),
    **inside(
      "encoder/stage{stage}_blocks/",
      "encoder/stages_{stage0}/layers_{i1}/",
      _MAE_BLOCK,
    ),
    "decoder/bridge/conv": "decoder/bridge/conv",
    "decoder/bridge/norm": "decoder/bridge/gn",
    **inside(
      "decoder/up{level}/",
      "decoder/up{level}{level0}/",
      {
        "norm": "concat_norm_fn",
        "proj/conv": "proj/conv",
        "proj/norm": "proj/gn",
        "refine/conv": "refine/conv",
        "refine/norm": "refine/gn",
      },
    ),
    "decoder/head": "decoder/head",
    "classifier": "fc",
  }
)

_CONVNEXT_NAMES = Naming(
  {
    "norm/scale": "norm/scale",
    "norm/bias": "norm/bias",
    "stage1_down_conv": "downsample_layers_0/layers_0",
    "stage1_down_norm": "downsample_layers_0/layers_1",
    "stage{stage}_down_norm": "downsample_layers_{stage0}/layers_0",
    "stage{stage}_down_conv": "downsample_layers_{stage0}/layers_1",
    **inside(
      "stage{stage}_blocks/",
      "stages_{stage0}/layers_{i}/",
      {
        "depthwise": "dwconv",
        "norm": "norm",
        "expand": "pwconv1",
        "response_norm": "grn",
        "project": "pwconv2",
      },
    ),
  },
  leaves={"scale": "weight"},
)


class _Kind(NamedTuple):
  """How the models of a kind are published.

  Attributes:
    home: name X of its file in this folder, imported when it is used; the file
      has `build_X`.
    class_name: the class; its arguments but for _FLAGS are published under the
      same names, or those of `renamed`.
    renamed: {argument: its published key}.
    only: {published key: its one value that can be built here}.
    optional: {published key: its value where a configuration lacks it}.
    names: of the parameters; None: as here.
  """

  home: str
  class_name: str
  renamed: Mapping[str, str] = {}
  only: Mapping[str, Any] = {}
  optional: Mapping[str, Any] = {"use_bf16": False}
  names: Naming | None = None

  @property
  def module(self) -> type[nn.Module]:
    return getattr(self._file, self.class_name)

  @property
  def build(self) -> Callable[..., nn.Module]:
    return getattr(self._file, f"build_{self.home}")

  @property
  def _file(self) -> Any:
    return importlib.import_module(f"drift_jax.models.{self.home}")

  def keys(self) -> dict[str, str]:
    """{argument: published key} of those that are published as they are."""
    return {
      name: self.renamed.get(name, name)
      for name in argument_types(self.module)
      if name not in _FLAGS
    }


# To add a kind of model: a file here with its linen module and `build_X`. The
# module has `example_inputs` for its initialisation and a field `dtype` if it
# computes in bfloat16. A feature encoder also has the methods `features(x,
# **options)` -> {key: [B, T, D]} and `pooled(x)` -> [B, D]; name its kind in
# ENCODERS of training/frozen.py.
_KINDS = {
  "gen": _Kind(
    "generator",
    "Generator",
    renamed={
      "context_tokens": "n_cls_tokens",
      "style_vocab": "noise_classes",
      "style_tokens": "noise_coords",
    },
    only=dict.fromkeys(
      ("use_qknorm", "use_swiglu", "use_rope", "use_rmsnorm"), True
    ),
    optional={
      "use_bf16": False,
      "attn_fp32": True,
      "use_remat": False,
      **NOT_IN_PAPER,
    },
    names=_GENERATOR_NAMES,
  ),
  "mae": _Kind(
    "mae",
    "MAE",
    renamed={"mask_patch_size": "patch_size"},
    only={"dropout_prob": 0.0},
    optional={
      "num_classes": IMAGENET_CLASSES,
      "norm_groups": NORM_GROUPS,
      "dropout_prob": 0.0,
      "use_bf16": False,
      "use_remat": False,
    },
    names=_MAE_NAMES,
  ),
  "convnext": _Kind(
    "convnext",
    "ConvNext",
    renamed={"widths": "dims"},
    names=_CONVNEXT_NAMES,
  ),
  "resnet": _Kind("resnet", "ResNet"),
  "vae": _Kind(
    "vae",
    "Vae",
    renamed={
      "widths": "block_out_channels",
      "blocks_per_level": "layers_per_block",
      "norm_groups": "norm_num_groups",
    },
  ),
  # Figures are of float32.
  "inception": _Kind("inception", "Inception", only={"use_bf16": False}),
  "vit": _Kind("vit", "Vit", only={"use_bf16": False}),
}
KINDS = tuple(_KINDS)


def from_release(
  kind: str, model_config: Config, params: Params
) -> tuple[nn.Module, dict[str, Any]]:
  """Builds a published model from its configuration and parameters.

  Args:
    kind: one of KINDS.
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
  flat = _flatten(params)
  module, entries = published_entries(kind, model_config, flat)
  return module, _unflatten(gather(entries, flat.__getitem__))


def published_entries(
  kind: str, model_config: Config, flat: Mapping[str, Any]
) -> tuple[nn.Module, dict[str, Entry]]:
  """A published model, and where each of its parameters here comes from.

  Args:
    kind, model_config: see `from_release`.
    flat: whatever has a shape, by published names joined with '/'.

  Raises:
    ValueError: as `from_release`.
  """
  module, shapes = _built(kind, model_config)
  entries = _entries(kind, shapes)
  require_parameters(
    f"published {kind!r} parameters do not fit model_config",
    flat,
    {
      name: shapes[path][1:] if stacked else shapes[path]
      for path, (names, stacked) in entries.items()
      for name in names
    },
  )
  return module, entries


def own_entries(
  kind: str, model_config: Config, flat: Mapping[str, Any]
) -> tuple[nn.Module, dict[str, Entry]]:
  """`published_entries` of parameters under the names here."""
  module, shapes = _built(kind, model_config)
  require_parameters(
    f"{kind!r} parameters do not fit model_config", flat, shapes
  )
  return module, {path: Entry((path,)) for path in shapes}


def to_release(
  kind: str, model_config: Config, params: Params
) -> dict[str, Any]:
  """Exact inverse of `from_release`: parameters under the published names.

  Args:
    kind: one of KINDS.
    model_config: the model's configuration under its published names.
    params: parameters of the module that `from_release` builds from it.

  Raises:
    ValueError: as `from_release`.
  """
  flat = _flatten(params)
  shapes = _built(kind, model_config)[1]
  require_parameters(
    f"{kind!r} parameters do not fit model_config", flat, shapes
  )
  return _unflatten(scatter(_entries(kind, shapes), flat))


def published_config(kind: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
  """The published model_config of a model given by its arguments here.

  Args:
    kind: one of KINDS.
    arguments: of the function that builds this kind, e.g. `build_mae`.

  Returns:
    Plain values only, fit for JSON. The `remat` of 'mae' and 'vae' has no
    counterpart and is left out; norm_groups is there if it is not the 32 of
    every published model, sizes of conditions if they are not 0.

  Raises:
    ValueError: unknown kind; an argument that is missing.
  """
  require_choice("kind", kind, KINDS)
  described = _KINDS[kind]
  keys = described.keys()
  flags = [x for x in _FLAGS if x in argument_types(described.module)]
  if kind != "gen":
    flags = [name for name in flags if name != "remat"]
  if kind == "gen":
    arguments = {**NOT_IN_PAPER, **arguments}
  missing = [name for name in (*keys, *flags) if name not in arguments]
  if missing:
    raise ValueError(f"arguments of {kind!r} lack {', '.join(missing)}")
  config = {theirs: arguments[ours] for ours, theirs in keys.items()}
  for key, value in config.items():
    if isinstance(value, tuple):
      config[key] = list(value)
  if kind == "mae" and config["norm_groups"] == NORM_GROUPS:
    del config["norm_groups"]
  if flags:
    config["use_bf16"] = arguments["dtype"] == "bfloat16"
    config |= described.only
  if kind == "gen":
    config["attn_fp32"] = arguments["attention_dtype"] == "float32"
    config["use_remat"] = arguments["remat"] == "full"
    for key, value in NOT_IN_PAPER.items():
      if config[key] == value:
        del config[key]
  return config


def describe(
  kind: str, model_config: Config
) -> tuple[nn.Module, dict[str, Any]]:
  """A model, and its parameters here as a tree of float32 ShapeDtypeStructs.

  Raises:
    ValueError: unknown kind; a model_config that can't be built.
  """
  module, shapes = _built(kind, model_config)
  leaves = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
  return module, _unflatten(leaves)


def parameter_shapes(
  kind: str, model_config: Config
) -> dict[str, tuple[int, ...]]:
  """Shapes of a model's parameters here, by names joined with '/'.

  Raises:
    ValueError: unknown kind; a model_config that can't be built.
  """
  return _built(kind, model_config)[1]


def _built(
  kind: str, config: Config
) -> tuple[nn.Module, dict[str, tuple[int, ...]]]:
  """The module and the shapes of its parameters by name."""
  require_choice("kind", kind, KINDS)
  module = _KINDS[kind].build(**_arguments(kind, config))
  return module, dict(_shapes(module))


@functools.lru_cache(maxsize=64)  # tracing a large module takes seconds
def _shapes(module: Any) -> Mapping[str, tuple[int, ...]]:
  """Shapes of a module's parameters by name; equal modules are one key."""
  variables = jax.eval_shape(
    module.init, jax.random.key(0), *module.example_inputs
  )
  return {k: v.shape for k, v in _flatten(variables["params"]).items()}


def _arguments(kind: str, config: Config) -> dict[str, Any]:
  """The arguments of a published configuration; ValueError if it is wrong."""
  described = _KINDS[kind]
  keys, optional = described.keys(), described.optional
  valid = dict.fromkeys((*keys.values(), *described.only, *optional))
  missing = [key for key in valid if key not in {**config, **optional}]
  unknown = [key for key in config if key not in valid]
  if missing or unknown:
    raise ValueError(
      f"model_config of {kind!r}: missing {missing}, unknown {unknown}; valid"
      f" keys: {', '.join(valid)}"
    )
  config = {**optional, **config}
  for key, value in described.only.items():
    if config[key] != value:
      raise ValueError(
        f"model_config of {kind!r} has {key}={config[key]!r}, but only"
        f" {value!r} can be built here"
      )
  arguments = {ours: config[theirs] for ours, theirs in keys.items()}
  dtype = "bfloat16" if config["use_bf16"] else "float32"
  remat = config.get("use_remat", False)
  flags = {"dtype": dtype, "remat": remat}
  if kind == "gen":
    flags["attention_dtype"] = "float32" if config["attn_fp32"] else dtype
    flags["remat"] = "full" if remat else "none"
  types = argument_types(described.module)
  return arguments | {k: v for k, v in flags.items() if k in types}


def _entries(
  kind: str, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Entry]:
  naming = _KINDS[kind].names
  if naming is None:
    return {path: Entry((path,)) for path in shapes}
  return naming.entries(shapes)


def _flatten(params: Params) -> dict[str, Any]:
  return traverse_util.flatten_dict(dict(params), sep="/")


def _unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  return traverse_util.unflatten_dict(dict(flat), sep="/")
