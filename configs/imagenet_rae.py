"""ImageNet in the latents of a representation autoencoder, token by token.

  python -m drift_jax.tools.cache_latents --source=npy:DIR --split=train \\
    --class_order=imagenet --out=data/imagenet_rae
  python -m drift_jax.main --config=configs/imagenet_rae.py --workdir=runs/rae

DIR/train/WNID/FILE.npy are the latents of whatever encoder, [2, h, h, c] of an
image and of its mirror image; here 16 x 16 x 768, the patch tokens of a DINOv2
B/14 at 224 px. Others: --config.model.input_size=h, and in_channels and
out_channels = c. Each place of the grid drifts by itself, with no encoder
(arXiv:2606.15553), against 64 samples and 192 more without gradient, and to as
many positives. Samples are arrays: decoding them is the business of who made
the encoder (docs/negatives.md). Variants, joined by commas:
  b1      (or none) B/1, 133 M parameters
  folder  the cache's held-out split is val
  smoke   the same code path in a minute, with a tiny network

Neither the batch nor the schedule is that paper's, which begins with a trained
flow model. Nobody has trained this. The queue takes 100 GB of each process'
memory.
"""

from ml_collections import ConfigDict

from configs import common, models


def get_config(variant: str = "") -> ConfigDict:
  """The config of the named variants."""
  _, smoke, folder = common.choose(variant, ("b1",), common.SWITCHES)
  config = common.generator()
  config.data.update(
    source="latents:data/imagenet_rae",
    test_split="val" if folder else "validation",
    wire="bfloat16",
  )
  config.model = models.generator_b2_latent()
  config.model.update(
    input_size=16, in_channels=768, out_channels=768, patch_size=1
  )
  config.features.update(sample=False, tokens=True)
  config.guidance.exponent = 3.0
  config.batch.update(
    labels=64, generated=64, negatives=192, positives=256, unconditional=16
  )
  config.queue.update(class_size=256, prefill=256_000)
  config.optim.update(learning_rate=2e-4, weight_decay=0.01, warmup_steps=5_000)
  config.train.num_steps = 30_000
  config.eval.update(every=0, metrics=())
  config.checkpoint.every = 5_000
  config.mesh.update(data=1, fsdp=-1)
  if smoke:
    common.smoke_generator(config)
    config.batch.negatives = 2
    config.model.attention_dtype = "float32"
  return config
