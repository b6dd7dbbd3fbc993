"""Published weights into our format, one sub-command for each model.

  python -m drift_jax.tools.convert_weights vae --source=FILE --out=DIR
  python -m drift_jax.tools.convert_weights vae --source=DIR --out=DIR
  python -m drift_jax.tools.convert_weights vae \\
      --source=hf://stabilityai/sd-vae-ft-mse --out=DIR
  python -m drift_jax.tools.convert_weights inception --out=DIR
  python -m drift_jax.tools.convert_weights convnext \\
      --source=hf://timm/convnextv2_base.fcmae_ft_in22k_in1k --out=DIR
  python -m drift_jax.tools.convert_weights moco \\
      --source=moco_v2_800ep_pretrain.pth.tar --out=DIR
  python -m drift_jax.tools.convert_weights simclr \\
      --source=resnet50-1x.pth --out=DIR
  python -m drift_jax.tools.convert_weights dinov2 \\
      --source=hf://facebook/dinov2-large --out=DIR
  python -m drift_jax.tools.convert_weights clip \\
      --source=hf://openai/clip-vit-large-patch14 --out=DIR

The weights' names and shapes are checked before anything is written, and
reading them executes nothing: .safetensors holds arrays and names only, and
torch, which reads .bin, .pth and their like, is told to load arrays only.
"""

import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from drift_jax import artifacts, console, numerics, paths
from drift_jax.console import logger
from drift_jax.tools import weight_files
from drift_jax.tools.conversions import convnext, inception, resnet, vae, vit
from drift_jax.tools.conversions.layouts import (
  CONFIG_FILE,
  Config,
  Converted,
  Weights,
  WeightsError,
)

_NAMED_DIGITS = 8  # of the checksum, in the name of a published file
_TRANSFORMERS_FILES = ("model.safetensors", "pytorch_model.bin")


class Model(NamedTuple):
  """What can be converted.

  Attributes:
    kind: of the artifact, see artifacts.KINDS. One that is not called like the
      model says in its metadata, as `family`, which model it is.
    summary: one line for --help.
    files: where the weights are in a folder or repository, best first.
    convert: (weights by name, config.json or None if there is none) ->
      Converted; raises WeightsError.
    has_config: whether a config.json belongs to them.
    url: where they are published; None if there is no one place.
    sha256: of the published file; None if there are several.
  """

  kind: str
  summary: str
  files: Sequence[str]
  convert: Callable[[Weights, Config | None], Converted]
  has_config: bool
  url: str | None = None
  sha256: str | None = None


MODELS = {
  "vae": Model(
    "vae",
    "Stable Diffusion's autoencoder (diffusers' AutoencoderKL)",
    tuple(
      f"{folder}diffusion_pytorch_model{suffix}"
      for folder in ("", "vae/")
      for suffix in (".safetensors", ".bin")
    ),
    vae.convert_vae,
    has_config=True,
  ),
  "inception": Model(
    "inception",
    "the Inception-v3 of FID and the Inception score",
    tuple(
      f"{name}-2015-12-05-6726825d{suffix}"
      for name in ("pt_inception", "weights-inception")
      for suffix in (".pth", ".safetensors")
    ),
    inception.convert_inception,
    has_config=False,
    url=inception.URL,
    sha256=inception.SHA256,
  ),
  "convnext": Model(
    "convnext",
    "ConvNeXt-V2, e.g. hf://timm/convnextv2_base.fcmae_ft_in22k_in1k",
    _TRANSFORMERS_FILES,
    convnext.convert_convnext,
    has_config=False,
  ),
  "moco": Model(
    "resnet",
    "MoCo-v2's ResNet-50, e.g. moco_v2_800ep_pretrain.pth.tar",
    ("moco_v2_800ep_pretrain.pth.tar", *_TRANSFORMERS_FILES),
    resnet.convert_moco,
    has_config=False,
  ),
  "simclr": Model(
    "resnet",
    "SimCLR's ResNet-50 under torchvision's names, e.g. resnet50-1x.pth",
    ("resnet50-1x.pth", *_TRANSFORMERS_FILES),
    resnet.convert_simclr,
    has_config=False,
  ),
  "dinov2": Model(
    "vit",
    "DINOv2, e.g. hf://facebook/dinov2-large (small, base or large)",
    _TRANSFORMERS_FILES,
    vit.convert_dinov2,
    has_config=True,
  ),
  "clip": Model(
    "vit",
    "CLIP's image encoder, e.g. hf://openai/clip-vit-large-patch14",
    _TRANSFORMERS_FILES,
    vit.convert_clip,
    has_config=True,
  ),
}


def convert(name: str, source: str, out: str) -> artifacts.Artifact:
  """Converts a model's published weights and writes them as an artifact.

  The metadata says where they came from. Of a model with one published file
  it also says, as `published`, whether this was that file by its SHA-256; of a
  model whose kind has another name it says, as `family`, the model's.

  Args:
    name: of MODELS.
    source: a file, a folder, hf://OWNER/NAME[@REVISION][/FILE], or the URL of
      the published file.
    out: folder of the artifact; one that is there is replaced.

  Returns:
    The artifact, read back from `out`.

  Raises:
    WeightsError: weights that are not there, can't be read, or are not those
      of the model (the first differences are listed).
    OSError: `out` can't be written.
  """
  model = MODELS[name]
  located = weight_files.locate(source, model.files, model.sha256)
  digest = weight_files.sha256_of(located.weights)
  if model.sha256 is not None:
    _check_name(located.weights, digest, model.sha256)
  weights = weight_files.read_weights(located.weights)
  config = None
  if model.has_config and located.config is not None:
    config = weight_files.read_config(located.config)
  try:
    converted = model.convert(weights, config)
  except WeightsError as error:
    raise WeightsError(f"{source}: {error}") from error
  if model.has_config and config is None:
    logger.warning("%s: no %s, took its defaults.", source, CONFIG_FILE)
  provenance: dict[str, Any] = {
    "location": source,
    "file": located.weights.name,
    "revision": located.revision,
    "sha256": digest,
  }
  if model.kind != name:
    provenance["family"] = name
  if model.sha256 is not None:
    provenance["published"] = digest == model.sha256
    if digest != model.sha256:
      logger.warning(
        "%s is not the published file: figures made with it are comparable"
        " among themselves only.",
        located.weights,
      )
  artifacts.save(
    out,
    kind=model.kind,
    model_config=converted.model_config,
    params=converted.params,
    step=None,
    ema_decay=None,
    source=provenance,
  )
  return artifacts.load(out)


def _check_name(path: pathlib.Path, digest: str, published: str) -> None:
  """Refuses a torch file that is called the published one and isn't it."""
  digits = published[:_NAMED_DIGITS]
  if (
    path.suffix in weight_files.TORCH_SUFFIXES
    and path.stem.endswith(f"-{digits}")
    and digest != published
  ):
    raise WeightsError(
      f"{path} ({path.stat().st_size} bytes) has SHA-256 {digest}, but its name"
      f" says that it begins with {digits}: it is damaged or another file"
    )


def _parser() -> console.Parser:
  parser = console.Parser(
    prog="python -m drift_jax.tools.convert_weights",
    description="Converts published weights into this package's format.",
    allow_abbrev=False,
  )
  models = parser.add_subparsers(dest="model", required=True, metavar="MODEL")
  for name, model in MODELS.items():
    command = models.add_parser(name, help=model.summary, allow_abbrev=False)
    command.add_argument(
      "--source",
      type=paths.argument,
      required=model.url is None,
      default=model.url,
      help="a file, a folder, or hf://OWNER/NAME[@REVISION][/FILE]"
      + (f"; by default it is downloaded from {model.url}" * bool(model.url)),
    )
    command.add_argument(
      "--out", type=paths.argument, required=True, help="folder to write"
    )
  return parser


def main(argv: Sequence[str] | None = None) -> None:
  """Converts what the command line asks for; a mistake is one line."""
  arguments = _parser().parse_args(argv)
  console.setup()
  numerics.pin()
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
