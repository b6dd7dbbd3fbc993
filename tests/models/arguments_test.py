"""What the networks refuse: arguments, and images of those that judge."""

import jax
import numpy as np
import pytest

from drift_jax.models.convnext import build_convnext
from drift_jax.models.generator import build_generator
from drift_jax.models.inception import build_inception
from drift_jax.models.mae import build_mae
from drift_jax.models.resnet import build_resnet
from drift_jax.models.vae import build_vae
from drift_jax.models.vit import build_vit
from tests.models import small

BUILD = {
  "generator": (build_generator, small.GENERATOR),
  "mae": (build_mae, small.MAE),
  "convnext": (build_convnext, small.CONVNEXT),
  "resnet": (build_resnet, small.RESNET),
  "vae": (build_vae, small.VAE),
  "inception": (build_inception, small.INCEPTION),
  "vit": (build_vit, small.VIT),
}


@pytest.mark.parametrize(
  ("model", "change", "message"),
  [
    ("generator", {"num_head": 2}, r"'num_head' \(did you mean 'num_heads'\?"),
    ("generator", {"depth": None}, "missing: depth; valid: input_size, in"),
    ("generator", {"input_size": 5}, "=5 must be a multiple of patch_size=2"),
    ("generator", {"num_heads": 3}, "multiple of 2 \\* num_heads=6"),
    ("generator", {"depth": True}, "depth=True: must be an integer >= 1"),
    ("generator", {"context_tokens": -1}, "=-1: must be an integer >= 0"),
    ("generator", {"mlp_ratio": 0.0}, "mlp_ratio=0.0: must be positive"),
    ("generator", {"remat": "all"}, "remat='all': must be one of 'none', 'att"),
    ("generator", {"attention_dtype": "bfloat16"}, "would round a float32"),
    ("mae", {"layers": (3, 4, 6)}, r"layers=\(3, 4, 6\): must hold 4 numbers"),
    ("mae", {"dtype": "float64"}, "dtype='float64': must be one of 'float32'"),
    ("resnet", {"image_mean": (0.5,)}, r"image_mean=\(0.5,\): must be three"),
    ("resnet", {"image_std": (1.0, 1.0, 0.0)}, "image_std=.* numbers > 0"),
    ("vae", {"widths": (8, 18)}, r"widths\[1\]=18 must be a multiple of"),
    ("vae", {"scaling_factor": np.inf}, "=inf: must be positive and finite"),
    ("vit", {"num_heads": 4}, "hidden_size=6 must be a multiple of num_heads"),
    ("vit", {"activation": "relu"}, "must be one of 'gelu', 'quick_gelu'"),
  ],
)
def test_bad_arguments_are_explained(model, change, message):
  build, arguments = BUILD[model]
  changed = {k: v for k, v in (arguments | change).items() if v is not None}
  with pytest.raises(ValueError, match=message):
    build(**changed)


@pytest.mark.parametrize("model", ["inception", "vit"])
@pytest.mark.parametrize(
  ("images", "message"),
  [
    (np.zeros((1, 4, 4, 3), np.float32), "dtype float32, want uint8.*to_uint8"),
    (np.zeros((1, 3, 4, 4), np.uint8), r"shape \(1, 3, 4, 4\), want"),
  ],
)
def test_other_images_are_refused(model, images, message):
  build, arguments = BUILD[model]
  with pytest.raises(ValueError, match=message):
    build(**arguments).apply({}, images)


@pytest.mark.parametrize(
  ("model", "count"),
  # The ViT: two of the resize, patches, eight of a block, projection.
  [("inception", 95), ("vit", 12)],
)
def test_products_are_of_full_float32_on_every_device(model, count):
  """Accelerators take fewer bits by default; a CPU would not show it."""
  build, arguments = BUILD[model]
  module = build(**arguments)
  variables = jax.eval_shape(
    module.init, jax.random.key(0), *module.example_inputs
  )
  images = jax.ShapeDtypeStruct((1, 5, 5, 3), np.uint8)
  products = small.products(jax.make_jaxpr(module.apply)(variables, images))
  assert len(products) == count
  highest = jax.lax.Precision.HIGHEST
  assert set(products) == {(highest, highest)}
