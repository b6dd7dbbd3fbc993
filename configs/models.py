"""Sizes of the published models (Table 8, and W-Flow's largest), by name.

Each function returns a new ConfigDict of the keyword arguments of
drift_jax.models.build_generator, build_mae, build_convnext, build_resnet,
build_vae, build_inception or build_vit:

  config.model = models.GENERATORS["generator_b2_latent"]()
"""

from ml_collections import ConfigDict


def generator_b2_latent() -> ConfigDict:
  """B/2 on 32x32x4 latents: 133 M parameters."""
  return _generator_base(_latent_generator())


def generator_l2_latent() -> ConfigDict:
  """L/2 on 32x32x4 latents: 463 M parameters."""
  config = _generator_large(_latent_generator())
  config.remat = "branches"
  return config


def generator_xl2_latent() -> ConfigDict:
  """XL/2 of W-Flow (arXiv:2605.11755), 32x32x4 latents: 679 M parameters."""
  config = _latent_generator()
  config.update(hidden_size=1152, cond_dim=1152, depth=28, num_heads=16)
  config.remat = "branches"
  return config


def generator_b4_latent() -> ConfigDict:
  """B/4 on 64x64x4 latents of 512 px: as many tokens as B/2, 133 M."""
  return _of_512px(generator_b2_latent())


def generator_l4_latent() -> ConfigDict:
  """L/4 on 64x64x4 latents of 512 px: as many tokens as L/2, 463 M."""
  return _of_512px(generator_l2_latent())


def generator_b16_pixel() -> ConfigDict:
  """B/16 on 256x256x3 pixels: 134 M parameters."""
  return _generator_base(_pixel_generator())


def generator_l16_pixel() -> ConfigDict:
  """L/16 on 256x256x3 pixels: 464 M parameters."""
  return _generator_large(_pixel_generator())


def mae_256_latent() -> ConfigDict:
  """Latent-MAE of base width 256 (ablations): 431 M parameters."""
  return _mae(base_channels=256, in_channels=4, input_patch_size=1)


def mae_640_latent() -> ConfigDict:
  """Latent-MAE of base width 640: 2.7 G parameters."""
  return _mae(base_channels=640, in_channels=4, input_patch_size=1)


def mae_640_latent_512px() -> ConfigDict:
  """Latent-MAE of base width 640 on 2x2 cells of 64x64x4 latents: 2.7 G."""
  return _mae(base_channels=640, in_channels=4, input_patch_size=2)


def mae_640_pixel() -> ConfigDict:
  """Pixel-MAE of base width 640 on 8x8 patches: 2.7 G parameters."""
  return _mae(base_channels=640, in_channels=3, input_patch_size=8)


def convnextv2_base() -> ConfigDict:
  """ConvNeXt-V2 base without its head: 88 M parameters."""
  config = ConfigDict()
  config.depths = (3, 3, 27, 3)  # blocks of each stage
  config.widths = (128, 256, 512, 1024)  # channels of each stage
  config.dtype = "float32"
  return config


def resnet50_moco() -> ConfigDict:
  """MoCo-v2's ResNet-50 without its head: 23.5 M parameters."""
  config = _resnet50()
  # ImageNet's, of pixels in [0, 1].
  config.image_mean = (0.485, 0.456, 0.406)
  config.image_std = (0.229, 0.224, 0.225)
  return config


def resnet50_simclr() -> ConfigDict:
  """SimCLR's ResNet-50 (1x) without its head: 23.5 M parameters."""
  config = _resnet50()
  config.image_mean = (0.0, 0.0, 0.0)  # it takes pixels in [0, 1] as they are
  config.image_std = (1.0, 1.0, 1.0)
  return config


def sd_vae() -> ConfigDict:
  """Stable Diffusion's autoencoder, 8 pixels a cell: 84 M parameters."""
  config = ConfigDict()
  config.in_channels = 3
  config.latent_channels = 4
  config.widths = (128, 256, 512, 512)  # channels of each level
  config.blocks_per_level = 2
  config.norm_groups = 32
  config.scaling_factor = 0.18215  # latents are multiplied with it
  config.dtype = "float32"
  config.remat = False
  return config


def inception_fid() -> ConfigDict:
  """The Inception-v3 of FID, 2048 features: 24 M parameters."""
  config = ConfigDict()
  config.width = 16  # all numbers of channels are multiples of it
  config.num_classes = 1008
  return config


def dinov2_small() -> ConfigDict:
  """DINOv2 S/14 at 224 pixels, 384 features: 22 M parameters."""
  return _dinov2(hidden_size=384, depth=12, num_heads=6)


def dinov2_large() -> ConfigDict:
  """DINOv2 L/14 at 224 pixels, 1024 features: 303 M parameters."""
  return _dinov2(hidden_size=1024, depth=24, num_heads=16)


def clip_large() -> ConfigDict:
  """The image half of OpenAI's CLIP L/14, 768 features: 304 M parameters."""
  config = ConfigDict()
  config.image_size = 224  # pixels
  config.patch_size = 14  # pixels
  config.hidden_size = 1024
  config.depth = 24
  config.num_heads = 16
  config.mlp_size = 4096
  config.activation = "quick_gelu"
  config.pre_norm = True  # before the blocks
  config.layer_scale = False
  config.patch_bias = False
  config.projection_dim = 768
  config.epsilon = 1e-5
  # Of pixels in [0, 1].
  config.image_mean = (0.48145466, 0.4578275, 0.40821073)
  config.image_std = (0.26862954, 0.26130258, 0.27577711)
  return config


GENERATORS = {
  "generator_b2_latent": generator_b2_latent,
  "generator_l2_latent": generator_l2_latent,
  "generator_xl2_latent": generator_xl2_latent,
  "generator_b4_latent": generator_b4_latent,
  "generator_l4_latent": generator_l4_latent,
  "generator_b16_pixel": generator_b16_pixel,
  "generator_l16_pixel": generator_l16_pixel,
}
MAES = {
  "mae_256_latent": mae_256_latent,
  "mae_640_latent": mae_640_latent,
  "mae_640_latent_512px": mae_640_latent_512px,
  "mae_640_pixel": mae_640_pixel,
}
CONVNEXTS = {"convnextv2_base": convnextv2_base}
RESNETS = {
  "resnet50_moco": resnet50_moco,
  "resnet50_simclr": resnet50_simclr,
}
VAES = {"sd_vae": sd_vae}
INCEPTIONS = {"inception_fid": inception_fid}
VITS = {
  "dinov2_small": dinov2_small,
  "dinov2_large": dinov2_large,
  "clip_large": clip_large,
}


def _generator() -> ConfigDict:
  config = ConfigDict()
  config.mlp_ratio = 4.0
  config.num_classes = 1000
  config.context_tokens = 16  # prepended in-context tokens
  config.style_vocab = 64  # entries of each style table
  config.style_tokens = 32  # random style indices per sample
  config.dtype = "bfloat16"  # activations; parameters are float32
  return config


def _latent_generator() -> ConfigDict:
  config = _generator()
  config.input_size = 32  # latent cells
  config.in_channels = 4
  config.out_channels = 4
  config.patch_size = 2  # latent cells
  config.attention_dtype = "bfloat16"
  config.remat = "auto"  # see configs/common.py
  return config


def _of_512px(config: ConfigDict) -> ConfigDict:
  config.update(input_size=64, patch_size=4)  # latent cells
  return config


def _pixel_generator() -> ConfigDict:
  config = _generator()
  config.input_size = 256  # pixels
  config.in_channels = 3
  config.out_channels = 3
  config.patch_size = 16  # pixels
  config.attention_dtype = "float32"
  config.remat = "full"
  return config


def _generator_base(config: ConfigDict) -> ConfigDict:
  config.update(hidden_size=768, cond_dim=768, depth=12, num_heads=12)
  return config


def _generator_large(config: ConfigDict) -> ConfigDict:
  config.update(hidden_size=1024, cond_dim=1024, depth=24, num_heads=16)
  return config


def _mae(
  *, base_channels: int, in_channels: int, input_patch_size: int
) -> ConfigDict:
  config = ConfigDict()
  config.in_channels = in_channels
  config.base_channels = base_channels
  config.layers = (3, 4, 6, 3)  # blocks of each stage
  config.input_patch_size = input_patch_size  # pixels folded into channels
  config.mask_patch_size = 2  # cells of the folded grid
  config.num_classes = 1000
  config.norm_groups = 32
  config.dtype = "bfloat16"
  config.remat = False
  return config


def _resnet50() -> ConfigDict:
  config = ConfigDict()
  config.layers = (3, 4, 6, 3)  # blocks of each stage
  config.base_channels = 64  # of the stem; stages have 4, 8, 16, 32 times it
  config.dtype = "float32"
  return config


def _dinov2(*, hidden_size: int, depth: int, num_heads: int) -> ConfigDict:
  config = ConfigDict()
  config.image_size = 224  # pixels; it was trained at 518
  config.patch_size = 14  # pixels
  config.hidden_size = hidden_size
  config.depth = depth
  config.num_heads = num_heads
  config.mlp_size = 4 * hidden_size
  config.activation = "gelu"
  config.pre_norm = False
  config.layer_scale = True  # of every branch's result
  config.patch_bias = True
  config.projection_dim = 0  # none
  config.epsilon = 1e-6
  # ImageNet's, of pixels in [0, 1].
  config.image_mean = (0.485, 0.456, 0.406)
  config.image_std = (0.229, 0.224, 0.225)
  return config
