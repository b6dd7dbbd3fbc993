"""Published weights into our format, one sub-command for each model.

  python -m drift_jax.tools.convert_weights vae --source=FILE --out=DIR
  python -m drift_jax.tools.convert_weights vae --source=DIR --out=DIR
  python -m drift_jax.tools.convert_weights vae \\
      --source=hf://stabilityai/sd-vae-ft-mse --out=DIR

The weights' names and shapes are checked before anything is written, and
reading them executes nothing: .safetensors holds arrays and names only, and
torch, which reads .bin and .pt here, is told to load arrays only.
"""

import argparse
import hashlib
import importlib
import json
import pathlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util
from huggingface_hub import errors as hub_errors

from drift_jax import artifacts, console
from drift_jax.console import logger
from drift_jax.models import release
from drift_jax.models.vae import SCALING_FACTOR

TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
CONFIG_FILE = "config.json"

_HUB = re.compile(
  r"hf://(?P<repository>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?"
  r"(?:/(?P<file>.+))?"
)
_MAX_FAILURE = 300  # characters of another library's message

Weights = Mapping[str, np.ndarray]
Config = Mapping[str, Any]


class WeightsError(ValueError):
  """Weights that can't be converted; the message says why."""


class Converted(NamedTuple):
  """A model in the form that artifacts.save takes."""

  model_config: dict[str, Any]
  params: dict[str, Any]


class Model(NamedTuple):
  """What can be converted.

  Attributes:
    summary: one line for --help.
    files: where the weights are in a folder or repository, best first.
    convert: (weights by name, config.json or None if there is none) ->
      Converted; raises WeightsError.
  """

  summary: str
  files: Sequence[str]
  convert: Callable[[Weights, Config | None], Converted]


class Located(NamedTuple):
  """Weights found on this machine, with the revision if from the hub."""

  weights: pathlib.Path
  config: pathlib.Path | None
  revision: str | None


def convert(name: str, source: str, out: str) -> artifacts.Artifact:
  """Converts a model's published weights and writes them as an artifact.

  Args:
    name: of MODELS.
    source: a file, a folder, or hf://OWNER/NAME[@REVISION][/FILE].
    out: folder of the artifact; one that is there is replaced.

  Returns:
    The artifact, read back from `out`.

  Raises:
    WeightsError: weights that are not there, can't be read, or are not those
      of the model (the first differences are listed).
    OSError: `out` can't be written.
  """
  model = MODELS[name]
  located = locate(source, model.files)
  weights = read_weights(located.weights)
  if located.config is None:
    logger.warning("%s: no %s, taking its defaults.", source, CONFIG_FILE)
    config = None
  else:
    config = _read_config(located.config)
  try:
    converted = model.convert(weights, config)
  except WeightsError as error:
    raise WeightsError(f"{source}: {error}") from error
  with located.weights.open("rb") as file:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
  artifacts.save(
    out,
    kind=name,
    model_config=converted.model_config,
    params=converted.params,
    step=None,
    ema_decay=None,
    source={
      "location": source,
      "file": located.weights.name,
      "revision": located.revision,
      "sha256": digest,
    },
  )
  return artifacts.load(out)


def locate(source: str, files: Sequence[str]) -> Located:
  """Finds the weights and the config.json beside them.

  A file on the hub is downloaded into its cache (HF_HOME, HF_ENDPOINT and
  HF_HUB_OFFLINE are respected).

  Args:
    source: a file, a folder, or hf://OWNER/NAME[@REVISION][/FILE].
    files: what to look for in a folder or repository, in this order.

  Raises:
    WeightsError: nothing there; the message says where it looked.
  """
  if source.startswith("hf:"):
    return _locate_on_hub(source, files)
  path = pathlib.Path(source)
  if path.is_dir():
    found = [path / name for name in files if (path / name).is_file()]
    if not found:
      raise WeightsError(f"{source} holds none of {list(files)}")
    path = found[0]
  if not path.is_file():
    raise WeightsError(f"there is no file or folder {source}")
  config = path.parent / CONFIG_FILE
  return Located(path, config if config.is_file() else None, None)


def _locate_on_hub(source: str, files: Sequence[str]) -> Located:
  match = _HUB.fullmatch(source)
  if match is None:
    raise WeightsError(
      f"--source={source}: want hf://OWNER/NAME, hf://OWNER/NAME/FILE or"
      " hf://OWNER/NAME@REVISION/FILE"
    )
  repository, revision = match["repository"], match["revision"]
  files = [match["file"]] if match["file"] else files
  for name in files:
    weights = _download(source, repository, revision, name)
    if weights is None:
      continue
    # All files of one snapshot: FOLDER/snapshots/COMMIT/FILE.
    commit = weights.parents[len(pathlib.PurePosixPath(name).parts) - 1].name
    config_name = pathlib.PurePosixPath(name).with_name(CONFIG_FILE)
    config = _download(source, repository, commit, str(config_name))
    return Located(weights, config, commit)
  raise WeightsError(f"{source}: the repository holds none of {list(files)}")


def _download(
  source: str, repository: str, revision: str | None, name: str
) -> pathlib.Path | None:
  """The file in the hub's cache; None if the repository has no such file."""
  try:
    return pathlib.Path(
      huggingface_hub.hf_hub_download(repository, name, revision=revision)
    )
  except hub_errors.RemoteEntryNotFoundError:
    return None
  except hub_errors.LocalEntryNotFoundError as error:
    # Not reached, but the cache may know from before that it isn't there.
    cached = huggingface_hub.try_to_load_from_cache(
      repository, name, revision=revision
    )
    if cached is not None and not isinstance(cached, str):
      return None
    raise WeightsError(f"{source}: {name}: {_one_line(error)}") from error
  except (OSError, hub_errors.HFValidationError) as error:
    raise WeightsError(f"{source}: {name}: {_one_line(error)}") from error


def read_weights(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Arrays by name from .safetensors, or from a torch file if torch is there.

  Raises:
    WeightsError: another suffix, a damaged file, a file that is not what its
      suffix says, or a torch file where torch is not installed.
  """
  if path.suffix == ".safetensors":
    try:
      return safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
      with path.open("rb") as file:
        beginning = file.read(8)
      raise WeightsError(
        f"{path} ({path.stat().st_size} bytes, beginning with {beginning!r})"
        f" is no complete safetensors file: {_one_line(error)}"
      ) from error
  if path.suffix in TORCH_SUFFIXES:
    return _read_torch(path)
  raise WeightsError(
    f"{path}: unknown suffix {path.suffix!r}, valid options are"
    f" {['.safetensors', *TORCH_SUFFIXES]}"
  )


def _read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
  try:
    torch = importlib.import_module("torch")
  except ImportError as error:
    raise WeightsError(
      f"{path}: reading {path.suffix} needs torch, which is not installed; "
      "take the .safetensors file of the same model, or pip install torch"
    ) from error
  try:
    tensors = torch.load(path, map_location="cpu", weights_only=True)
  # What torch.load raises on a bad file is an open list (KeyError is on it),
  # and its messages advise to load the file unsafely: they are not repeated.
  except Exception as error:
    raise WeightsError(
      f"{path} ({path.stat().st_size} bytes) can't be read as a torch file of"
      f" arrays only ({type(error).__name__}): it is damaged or holds more than"
      " arrays; take the .safetensors file of the same model"
    ) from error
  if isinstance(tensors, Mapping) and "state_dict" in tensors:
    tensors = tensors["state_dict"]
  if not isinstance(tensors, Mapping) or not all(
    isinstance(tensor, torch.Tensor) for tensor in tensors.values()
  ):
    raise WeightsError(f"{path} holds no arrays by name: it is no state dict")
  return {
    str(name): (
      tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    ).numpy()
    for name, tensor in tensors.items()
  }


def _read_config(path: pathlib.Path) -> dict[str, Any]:
  try:
    config = json.loads(path.read_bytes())
  except ValueError as error:
    raise WeightsError(f"{path} is no JSON: {error}") from error
  if not isinstance(config, dict):
    raise WeightsError(f"{path} holds {config!r}, want a dict")
  return config


def _one_line(error: BaseException) -> str:
  text = " ".join(str(error).split()) or type(error).__name__
  return text if len(text) <= _MAX_FAILURE else f"{text[:_MAX_FAILURE]}..."


# Of an AutoencoderKL without config.json: Stable Diffusion's.
_VAE_CONFIG = {
  "in_channels": 3,
  "latent_channels": 4,
  "block_out_channels": [128, 256, 512, 512],
  "layers_per_block": 2,
  "norm_num_groups": 32,
  "scaling_factor": SCALING_FACTOR,
}
# What else diffusers' config.json may say, and what build_vae builds.
_VAE_FIXED = {
  "_class_name": "AutoencoderKL",
  "act_fn": "silu",
  "shift_factor": None,
  "latents_mean": None,
  "latents_std": None,
  "use_quant_conv": True,
  "use_post_quant_conv": True,
  "mid_block_add_attention": True,
}
_VAE_OLD_NAMES = {
  "query": "to_q",
  "key": "to_k",
  "value": "to_v",
  "proj_attn": "to_out.0",
}
_VAE_ATTENTION = {
  "norm": "group_norm",
  "query": "to_q",
  "key": "to_k",
  "value": "to_v",
  "out": "to_out.0",
}
_VAE_OTHERS = {
  "shortcut": "conv_shortcut",
  "head/norm": "conv_norm_out",
  "head/conv": "conv_out",
}
_VAE_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def convert_vae(weights: Weights, config: Config | None) -> Converted:
  """diffusers' AutoencoderKL -> kind 'vae'.

  Args:
    weights: diffusers' names and layouts (OIHW convolutions), also the older
      attention names and 1x1-convolution shapes. Any floating dtype.
    config: diffusers' config.json; Stable Diffusion's values where it, or all
      of it, is missing.

  Raises:
    WeightsError: a config.json of another architecture, or weights whose
      names, shapes or values do not fit.
  """
  model_config = _vae_config(config)
  try:
    shapes = release.parameter_shapes("vae", model_config)
  except ValueError as error:
    raise WeightsError(f"{CONFIG_FILE}: {error}") from error
  names = {path: vae_name(path) for path in shapes}
  weights = {_vae_new_name(k): _vae_new_shape(k, v) for k, v in weights.items()}
  try:
    release.require_parameters(
      "these are not the weights of "
      + (
        f"Stable Diffusion's AutoencoderKL (there is no {CONFIG_FILE})"
        if config is None
        else f"the AutoencoderKL of {CONFIG_FILE}"
      ),
      weights,
      {names[path]: torch_shape(shape) for path, shape in shapes.items()},
    )
  except ValueError as error:
    raise WeightsError(str(error)) from error
  params = {
    path: _jax_layout(name, weights[name]) for path, name in names.items()
  }
  return Converted(model_config, traverse_util.unflatten_dict(params, sep="/"))


def _vae_config(config: Config | None) -> dict[str, Any]:
  config = config or {}
  values = {key: config.get(key, value) for key, value in _VAE_CONFIG.items()}
  for key, value in values.items():
    example = _VAE_CONFIG[key]
    if not isinstance(value, type(example)):
      raise WeightsError(
        f"{CONFIG_FILE} has {key}={value!r}, want a value like {example!r}"
      )
  levels = len(values["block_out_channels"])
  fixed = _VAE_FIXED | {
    "out_channels": values["in_channels"],
    "down_block_types": ["DownEncoderBlock2D"] * levels,
    "up_block_types": ["UpDecoderBlock2D"] * levels,
  }
  for key, value in fixed.items():
    if config.get(key, value) != value:
      raise WeightsError(
        f"{CONFIG_FILE} has {key}={config[key]!r}, but only {value!r} can be"
        " converted"
      )
  return values


def vae_name(path: str) -> str:
  """diffusers' name of our parameter, e.g. encoder/level1_block1/conv1/bias."""
  module, _, leaf = path.rpartition("/")
  half, _, rest = module.partition("/")
  blocks = {"encoder": "down_blocks", "decoder": "up_blocks"}.get(half)
  resampler = {"encoder": "downsamplers", "decoder": "upsamplers"}.get(half)
  part, _, layer = rest.partition("/")
  if match := re.fullmatch(r"level(\d+)_block(\d+)", part):
    block = f"{blocks}.{int(match[1]) - 1}.resnets.{int(match[2]) - 1}"
    rest = f"{block}.{_VAE_OTHERS.get(layer, layer)}"
  elif match := re.fullmatch(r"level(\d+)_resample", part):
    rest = f"{blocks}.{int(match[1]) - 1}.{resampler}.0.conv"
  elif match := re.fullmatch(r"middle_block(\d+)", part):
    rest = f"mid_block.resnets.{int(match[1]) - 1}.{layer}"
  elif part == "middle_attention":
    rest = f"mid_block.attentions.0.{_VAE_ATTENTION[layer]}"
  else:
    rest = _VAE_OTHERS.get(rest, rest)
  return ".".join(filter(None, (half, rest, _VAE_LEAVES[leaf])))


def _vae_new_name(name: str) -> str:
  """Today's name of an attention layer that diffusers called otherwise."""
  return re.sub(
    rf"(\.attentions\.\d+)\.({'|'.join(_VAE_OLD_NAMES)})\.",
    lambda match: f"{match[1]}.{_VAE_OLD_NAMES[match[2]]}.",
    name,
  )


def _vae_new_shape(name: str, array: np.ndarray) -> np.ndarray:
  """[O, I] of an attention layer that was stored as a 1x1 convolution."""
  if ".attentions." in name and array.shape[2:] == (1, 1):
    return array[:, :, 0, 0]
  return array


def torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
  """Shape in torch's layout: OIHW for HWIO, [O, I] for [I, O]."""
  return (*shape[:-3:-1], *shape[:-2]) if len(shape) > 1 else shape


def _jax_layout(name: str, array: np.ndarray) -> np.ndarray:
  """float32 in JAX's layout: HWIO for OIHW, [I, O] for [O, I]."""
  if not jnp.issubdtype(array.dtype, jnp.floating):  # knows bfloat16
    raise WeightsError(f"{name} has dtype {array.dtype}, want floating point")
  array = array.astype(np.float32)
  if not np.isfinite(array).all():
    raise WeightsError(f"{name} holds values that are not finite")
  axes = (*range(2, array.ndim), 1, 0) if array.ndim > 1 else (0,)
  return np.ascontiguousarray(array.transpose(axes))


MODELS = {
  "vae": Model(
    "Stable Diffusion's autoencoder (diffusers' AutoencoderKL)",
    tuple(
      f"{folder}diffusion_pytorch_model{suffix}"
      for folder in ("", "vae/")
      for suffix in (".safetensors", ".bin")
    ),
    convert_vae,
  ),
}


class _Parser(argparse.ArgumentParser):
  """Says mistakes on the command line in one line."""

  def error(self, message: str) -> NoReturn:
    sys.exit(f"Error: {message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
  parser = _Parser(
    prog="python -m drift_jax.tools.convert_weights",
    description="Converts published weights into this package's format.",
    allow_abbrev=False,
  )
  models = parser.add_subparsers(dest="model", required=True, metavar="MODEL")
  for name, model in MODELS.items():
    command = models.add_parser(name, help=model.summary, allow_abbrev=False)
    command.add_argument(
      "--source",
      required=True,
      help="a file, a folder, or hf://OWNER/NAME[@REVISION][/FILE]",
    )
    command.add_argument("--out", required=True, help="folder to write")
  return parser


def main(argv: Sequence[str] | None = None) -> None:
  """Converts what the command line asks for; a mistake is one line."""
  arguments = _parser().parse_args(argv)
  console.setup()
  try:
    artifact = convert(arguments.model, arguments.source, arguments.out)
  except (WeightsError, artifacts.ArtifactError, OSError) as error:
    sys.exit(f"Error: {error}")
  logger.info(
    "Wrote %s: %s, %d parameters, SHA-256 %s, model_config %s.",
    arguments.out,
    artifact.kind,
    sum(leaf.size for leaf in jax.tree.leaves(artifact.params)),
    artifact.sha256,
    dict(artifact.metadata["model_config"]),
  )


if __name__ == "__main__":
  main()
