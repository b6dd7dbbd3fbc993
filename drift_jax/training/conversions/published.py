"""Models that are published, and where; imports nothing heavy."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

_TRANSFORMERS_FILES = ("model.safetensors", "pytorch_model.bin")
# pytorch-fid and torch-fidelity publish this file, under names that end in its
# first eight digits.
_INCEPTION_SHA256 = (
  "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
)
_INCEPTION_URL = (
  "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
  "pt_inception-2015-12-05-6726825d.pth"
)


class Model(NamedTuple):
  """A model that can be converted.

  Attributes:
    kind: of the artifact, see release.KINDS. If it is not the model's name, the
      artifact's metadata have that as `family`.
    summary: one line for --help.
    files: where the weights are in a folder or repository, best first.
    has_config: whether a config.json belongs to them.
    state_dict: of a torch checkpoint, which holds several: the one to take.
    sizes: {--size: what tells it from the others}; {} if there is one.
    url: where they are published; None if there is no one place.
    sha256: of the published file; None if there are several.
  """

  kind: str
  summary: str
  files: Sequence[str]
  has_config: bool
  url: str | None = None
  sha256: str | None = None
  state_dict: str | None = None
  sizes: Mapping[str, "WFlowSize"] = {}


class WFlowSize(NamedTuple):
  """One of W-Flow's generators.

  Attributes:
    file: in its authors' repository.
    width: of tokens and of the conditioning vector.
    depth: blocks.
    num_heads: of attention.
    attention_dtype: of its products.
  """

  file: str
  width: int
  depth: int
  num_heads: int
  attention_dtype: str = "bfloat16"


WFLOW_SIZES = {
  "ablation": WFlowSize(
    "checkpoints/latent_ablation_ot/state_00030000.pt", 768, 12, 12, "float32"
  ),
  "b2": WFlowSize(
    "checkpoints/latent_sota_B_ot/state_00200000.pt", 768, 12, 12
  ),
  "l2": WFlowSize(
    "checkpoints/latent_sota_L_ot/state_00200000.pt", 1024, 24, 16
  ),
  "xl2": WFlowSize(
    "checkpoints/latent_sota_XL_ot/state_00180000.pt", 1152, 28, 16
  ),
}
MODELS = {
  "vae": Model(
    "vae",
    "Stable Diffusion's autoencoder (diffusers' AutoencoderKL)",
    tuple(
      f"{folder}diffusion_{file}"
      for folder in ("", "vae/")
      for file in (
        "pytorch_model.safetensors",
        "flax_model.msgpack",
        "pytorch_model.bin",
      )
    ),
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
    has_config=False,
    url=_INCEPTION_URL,
    sha256=_INCEPTION_SHA256,
  ),
  "convnext": Model(
    "convnext",
    "ConvNeXt-V2, e.g. hf://timm/convnextv2_base.fcmae_ft_in22k_in1k",
    _TRANSFORMERS_FILES,
    has_config=False,
  ),
  "moco": Model(
    "resnet",
    "MoCo-v2's ResNet-50, e.g. moco_v2_800ep_pretrain.pth.tar",
    ("moco_v2_800ep_pretrain.pth.tar", *_TRANSFORMERS_FILES),
    has_config=False,
  ),
  "simclr": Model(
    "resnet",
    "SimCLR's ResNet-50 under torchvision's names, e.g. resnet50-1x.pth",
    ("resnet50-1x.pth", *_TRANSFORMERS_FILES),
    has_config=False,
  ),
  "dinov2": Model(
    "vit",
    "DINOv2, e.g. hf://facebook/dinov2-large (small, base or large)",
    _TRANSFORMERS_FILES,
    has_config=True,
  ),
  "clip": Model(
    "vit",
    "CLIP's image encoder, e.g. hf://openai/clip-vit-large-patch14",
    _TRANSFORMERS_FILES,
    has_config=True,
  ),
  "wflow": Model(
    "gen",
    "W-Flow's one-step generators, of hf://jiaqihan99/W-Flow",
    (),
    has_config=False,
    state_dict="ema_model",
    sizes=WFLOW_SIZES,
  ),
}
