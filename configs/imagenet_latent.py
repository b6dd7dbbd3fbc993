"""ImageNet in the latents of the SD-VAE: ablation to XL/2, W-Flow, 512 px.

  python -m drift_jax.main --config=configs/imagenet_latent.py:l2 \\
    --workdir=runs/imagenet_l2

reads a latent cache (drift_jax.tools.cache_latents), the autoencoder that made
it, and an encoder: --config.encoders.mae.path=hf://mae_latent_640 (for the
ablation hf://mae_latent_256), one trained by configs/mae_latent.py, or a
converted one of pixels; and for its FID the
Inception-v3 and statistics of the training images (docs/imagenet.md has all
commands). Variants, joined by commas:
  ablation  (or none) B/2, 30k steps, encoder mae_latent.py:256
  b2        B/2, 200k steps, encoder mae_latent.py:640
  l2        L/2, 200k steps, encoder mae_latent.py:640
  b4_512px, l4_512px
            B/4 and L/4: the last two for 512 px, see below
  convnext, moco, simclr
            the ablation in the features of ConvNeXt-V2 base, or of a ResNet-50
            of MoCo-v2 or SimCLR (Table 3), in place of the MAE's: of pixels, so
            samples and reals are decoded, and gradients come back through the
            decoder
  folder    the cache is one of an ImageFolder: its splits are train and val
  wflow_ablation, wflow_b2, wflow_l2, wflow_xl2
            W-Flow, see below
  l2_fd_tune
            the authors' L/2 (or init_from), tuned by Frechet distances in
            DINOv2's features and judged by FID: docs/fd_tune.md
  one_gpu_24gb, one_gpu_80gb
            the ablation on one GPU of that memory, encoder hf://mae_latent_256:
            8 labels, 16 generated and 32 positive samples each, temperatures
            .1, .2, .4; or the paper's batch in groups of labels, equal in all
            but rounding and attention in bfloat16 (docs/one_gpu.md)
  smoke     the same code path in a minute, with a tiny network

FID-50K in the paper (Table 8) and of the authors' release: ablation 8.46 / 8.49
at alpha 2.0 on 64 TPU v6e; B/2 1.75 / 1.74 at alpha 1.1 and L/2 1.54 / 1.53 at
alpha 1.0 on 128 TPU v6e.

W-Flow (arXiv:2605.11755) trains the same generators by another field: maps of
entropic transport at the quadratic cost, from a batch to positives and to an
independent second batch, guided as velocities; one temperature, the loss
averaged over features. Published, by its authors:
  wflow_ablation  B/2, 30k steps, FID 7.08 at alpha 1.5
  wflow_b2        B/2, 200k steps, FID 1.52 and IS 271.8 at alpha 1.19
  wflow_l2        L/2, 200k steps, FID 1.35 and IS 272.5 at alpha 1.14
  wflow_xl2       XL/2, 200k steps (released 180k), FID 1.29 and IS 265.4 at
                  alpha 1.09
These are that code's figures: nobody has trained or evaluated any of the four
with this one. Two things differ: it takes the scale and the drift's RMS over
two labels at a time, this over all (docs/fields.md); and pushes into the queue
and what the backward pass recomputes are as in the variants above.

At 512 px latents are 64x64x4. The generator takes 4x4 cells for a token and the
encoder (mae_latent.py:640_512px) 2x2 for a cell of its grid, so that tokens,
features, batch and schedule are those of b2 and l2. Cache and statistics are of
512 px: `cache_latents --image_size=512 --out=data/imagenet_latents_512px`,
`reference_stats --image_size=512 --out=weights/imagenet512_train.npz`. Neither
the paper nor the release has this, and nobody has trained it.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import common, models

# Encoders of pixels: where tools.convert_weights put them, kind and model.
PIXEL_ENCODERS = {
  "convnext": ("weights/convnextv2_base", "convnext", models.convnextv2_base),
  "moco": ("weights/moco_v2", "resnet", models.resnet50_moco),
  "simclr": ("weights/simclr", "resnet", models.resnet50_simclr),
}
# W-Flow's temperature R, Sinkhorn iterations, alpha of the best FID.
WFLOW = {
  "wflow_ablation": (0.05, 10, 1.5),
  "wflow_b2": (0.05, 10, 1.19),
  "wflow_l2": (0.05, 1, 1.14),
  "wflow_xl2": (0.01, 1, 1.09),
}
ONE_GPU = ("one_gpu_24gb", "one_gpu_80gb")
LARGE = ("b4_512px", "l4_512px")
VARIANTS = (
  *("ablation", "b2", "l2", "l2_fd_tune"),
  *(*LARGE, *PIXEL_ENCODERS, *WFLOW, *ONE_GPU),
)


def get_config(variant: str = "") -> ConfigDict:
  """The config of the named variants."""
  size, smoke, folder = common.choose(variant, VARIANTS, common.SWITCHES)
  config = common.generator()
  config.data.update(
    source="latents:data/imagenet_latents",
    test_split="val" if folder else "validation",
    wire="bfloat16",
  )
  config.vae.path = "weights/sd_vae"
  config.vae.model = common.frozen_model("vae", models.sd_vae())
  if size in PIXEL_ENCODERS:
    path, kind, model = PIXEL_ENCODERS[size]
    common.add_encoder(config, size, path, kind, model())
    # Without `remat` a label of 64 samples does not fit 32 GB.
    config.encoders[size].update(decode=True, remat=True)
  else:
    width = "256" if size.endswith("ablation") or size in ONE_GPU else "640"
    common.add_encoder(
      config,
      "mae",
      f"hf://mae_latent_{width}"
      if size in ONE_GPU
      else f"runs/mae_latent_{width}/encoder",
      "mae",
      models.MAES[f"mae_{width}_latent"](),
    )
  published = size.removeprefix("wflow_").removesuffix("_fd_tune")
  {
    "b2": _b2,
    "l2": _l2,
    "xl2": _xl2,
    "b4_512px": _b2,
    "l4_512px": _l2,
  }.get(published, _ablation)(config)
  if size in WFLOW:
    temperature, iterations, alpha = WFLOW[size]
    config.drift.update_from_flattened_dict(
      wflow_drift(temperature, iterations)
    )
    config.eval.alphas = (1.0, alpha)
  if size in ONE_GPU:
    _one_gpu(config, large=size == "one_gpu_80gb")
  config.mesh.update(data=1, fsdp=-1)
  common.judge_by_fid(config)
  if size in LARGE:
    _of_512px(config, size)
  if size == "l2_fd_tune":
    _fd_tune(config)
  if smoke:
    common.smoke_generator(config)
  return config


def _fd_tune(config: ConfigDict) -> None:
  common.fd_tune(config, population=50_000, start="hf://latent_L_sota")
  common.judge_by_fid(config)
  config.encoders = ConfigDict()
  config.features.sample = False
  config.fd_loss.update(reals=50_000, trust=0.1)
  config.fd_loss.dinov2.path = "weights/dinov2"
  config.batch.update(reals="class_grouped", labels=1_024)
  config.optim.learning_rate = 1e-5
  config.train.num_steps = 2_000
  config.eval.every = config.checkpoint.every = 500


def wflow_drift(temperature: float, iterations: float) -> dict[str, Any]:
  """{key of config.drift: value} of W-Flow."""
  return {
    "field": "sinkhorn",
    "options.sinkhorn.cost": "quadratic",
    "options.sinkhorn.iterations": float(iterations),
    "temperatures": (temperature,),
    "negatives": "independent",
    "guidance": "velocity",
    "own_in_scale": True,
    "reduction": "mean",
  }


def _of_512px(config: ConfigDict, size: str) -> None:
  config.data.source = "latents:data/imagenet_latents_512px"
  config.data.image_size = 512
  model = {
    "b4_512px": models.generator_b4_latent,
    "l4_512px": models.generator_l4_latent,
  }
  config.model = model[size]()
  config.encoders.mae.path = "runs/mae_latent_640_512px/encoder"
  config.encoders.mae.model = common.frozen_model(
    "mae", models.mae_640_latent_512px()
  )
  config.eval.inception.reference = "weights/imagenet512_train.npz"


def _ablation(config: ConfigDict) -> None:
  config.model = models.generator_b2_latent()
  config.model.attention_dtype = "float32"
  config.guidance.update(exponent=3.0, no_cfg_frac=0.0)
  config.batch.update(labels=64, generated=64, positives=64, unconditional=16)
  config.queue.push_per_step = 64
  config.optim.update(learning_rate=2e-4, weight_decay=0.01, warmup_steps=5_000)
  config.train.num_steps = 30_000
  config.eval.alphas = (1.0, 1.5, 2.0, 2.5)


def _one_gpu(config: ConfigDict, large: bool) -> None:
  # cuDNN's attention, which stores no matrices.
  config.model.attention_dtype = "bfloat16"
  config.eval.every = 5_000
  if large:
    config.model.remat = "branches"
    config.train.accum_labels = 8
    return
  config.model.remat = "attention"  # it fits
  config.batch.update(labels=8, generated=16, positives=32)
  config.drift.temperatures = (0.1, 0.2, 0.4)


def _main(config: ConfigDict) -> None:
  # The release has 64 positives for both, the paper 128 for B/2.
  config.batch.update(labels=128, generated=64, positives=64, unconditional=32)
  config.optim.update(learning_rate=4e-4, warmup_steps=10_000)
  config.train.num_steps = 200_000
  config.eval.alphas = (1.0, 1.1, 1.5, 2.0)


def _b2(config: ConfigDict) -> None:
  _main(config)
  config.model = models.generator_b2_latent()
  config.guidance.update(exponent=5.0, no_cfg_frac=0.0)
  config.queue.push_per_step = 128
  config.optim.weight_decay = 0.0


def _l2(config: ConfigDict) -> None:
  _main(config)
  config.model = models.generator_l2_latent()
  config.guidance.update(exponent=3.0, no_cfg_frac=0.5)
  config.queue.push_per_step = 64
  config.optim.weight_decay = 0.01


def _xl2(config: ConfigDict) -> None:
  _main(config)
  config.model = models.generator_xl2_latent()
  config.guidance.update(exponent=4.0, no_cfg_frac=0.2)
  config.batch.positives = 128
  config.queue.push_per_step = 128
  config.optim.update(learning_rate=3e-4, weight_decay=0.01)
