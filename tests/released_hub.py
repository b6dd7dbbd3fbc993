"""The authors' repository and the autoencoders', tiny, in their real layout."""

import json
import re

import flax.serialization
import numpy as np
import safetensors.numpy
from flax import traverse_util

from drift_jax.models import release
from drift_jax.training import released
from drift_jax.training.conversions import vae
from drift_jax.training.conversions.layouts import published_shapes

GENERATOR = {
  "num_classes": 1000,
  "cond_dim": 16,
  "input_size": 4,
  "in_channels": 4,
  "patch_size": 2,
  "hidden_size": 16,
  "depth": 1,
  "num_heads": 2,
  "mlp_ratio": 4.0,
  "out_channels": 4,
  "use_qknorm": True,
  "use_swiglu": True,
  "use_rope": True,
  "use_rmsnorm": True,
  "n_cls_tokens": 2,
  "noise_classes": 4,
  "noise_coords": 2,
  "use_bf16": False,
  "attn_fp32": True,
}
PIXELS = {"input_size": 8, "in_channels": 3, "out_channels": 3}
MAE = {
  "base_channels": 32,
  "patch_size": 2,
  "dropout_prob": 0.0,
  "layers": [1, 1, 1, 1],
  "in_channels": 4,
  "use_bf16": False,
  "input_patch_size": 1,
}
# diffusers' config.json of its sd-vae-ft-mse, which has no scaling_factor, but
# for the sizes.
AUTOENCODER = {
  "_class_name": "AutoencoderKL",
  "_diffusers_version": "0.4.2",
  "act_fn": "silu",
  "block_out_channels": [4, 8],
  "down_block_types": ["DownEncoderBlock2D"] * 2,
  "in_channels": 3,
  "latent_channels": 4,
  "layers_per_block": 1,
  "norm_num_groups": 2,
  "out_channels": 3,
  "sample_size": 8,
  "up_block_types": ["UpDecoderBlock2D"] * 2,
}
WEIGHTS = "diffusion_pytorch_model.safetensors"
FLAX_AUTOENCODER = "pcuenq/sd-vae-ft-mse-flax"


def artifact_files(kind, name, model_config, *, outer=False):
  """{FILE: bytes} of an artifact: exactly two files."""
  rng = np.random.default_rng([*name.encode()])
  params = {
    path: (0.2 * rng.normal(size=shape)).astype(np.float32)
    for path, shape in release.parameter_shapes(kind, model_config).items()
  }
  tree = release.to_release(
    kind, model_config, traverse_util.unflatten_dict(params, sep="/")
  )
  tree = {"params": tree} if outer else tree
  metadata = {
    "schema_version": 1,
    "artifact_type": "ema_model",
    "kind": kind,
    "backend": "jax",
    "model_id": name,
    "config_name": name,
    "config_path": f"configs/{kind}/{name}.yaml",
    "model_config": model_config,
    "source": {
      "step_requested": "30000",
      "step_loaded": 30000,
      "ema_requested": "0.999",
      "ema_selected": 0.999,
    },
  }
  folder = f"{released.FOLDERS[kind]}/{name}"
  return {
    f"{folder}/ema_params.msgpack": flax.serialization.msgpack_serialize(tree),
    f"{folder}/metadata.json": json.dumps(metadata).encode(),
  }


def autoencoder_weights(config):
  """A small AutoencoderKL under PyTorch's names."""
  rng = np.random.default_rng(0)
  config = {"scaling_factor": 0.18215} | config
  config = {key: config[key] for key in vae._CONFIG}
  shapes = release.parameter_shapes("vae", config)
  return {
    name: (0.3 * rng.normal(size=shape)).astype(np.float32)
    for name, shape in published_shapes(
      vae.NAMES.entries(shapes), shapes
    ).items()
  }


def in_flax(weights):
  """The same, as diffusers' FlaxAutoencoderKL has them."""
  attention = {"to_q": "query", "to_k": "key", "to_v": "value"}
  flat = {}
  for name, array in weights.items():
    for new, old in (attention | {"to_out.0": "proj_attn"}).items():
      name = name.replace(f".{new}.", f".{old}.")
    name = re.sub(r"\.(\d+)\.", r"_\1.", name)
    *modules, leaf = name.split(".")
    if leaf == "weight":
      leaf = "scale" if array.ndim == 1 else "kernel"
    axes = (2, 3, 1, 0) if array.ndim == 4 else range(array.ndim)[::-1]
    flat["/".join([*modules, leaf])] = array.transpose(*axes)
  return traverse_util.unflatten_dict(flat, sep="/")


def autoencoder_files(*, flax_form=False, **changes):
  """{FILE: bytes} of a repository of diffusers' AutoencoderKL."""
  config = AUTOENCODER | changes
  weights = autoencoder_weights(config)
  if flax_form:
    config = config | {"_class_name": "FlaxAutoencoderKL"}
    data = flax.serialization.msgpack_serialize(in_flax(weights))
    files = {"diffusion_flax_model.msgpack": data}
  else:
    files = {WEIGHTS: safetensors.numpy.save(weights)}
  return files | {"config.json": json.dumps(config).encode(), "README.md": b""}


def repositories():
  """{'OWNER/NAME': {FILE: bytes}} of all that is released."""
  theirs = {}
  for entry in released.released():
    pixels = PIXELS if "pixels" in entry.model else {}
    if entry.kind == "gen":
      config = GENERATOR | pixels
    else:
      config = MAE | ({"in_channels": 3} if pixels else {})
    theirs |= artifact_files(entry.kind, entry.name, config)
  return {
    released.REPOSITORY: theirs,
    released.AUTOENCODER.removeprefix("hf://"): autoencoder_files(),
    FLAX_AUTOENCODER: autoencoder_files(flax_form=True),
  }
