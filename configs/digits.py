"""scikit-learn's 1797 handwritten digits, 8x8: the quickstart, no download.

  python -m drift_jax.main --config=configs/digits.py --workdir=runs/digits

Variants, joined by commas, e.g. `configs/digits.py:encoder,smoke`:
  (none)    a generator that drifts in raw pixel space
  encoder   the ResNet-MAE that `judge` and `features` read
  judge     (none), judged in that encoder's features as well (fd_encoder)
  features  a generator that drifts in that encoder's features
  style     (none), of a slant and thickness asked for beside the class:
            docs/conditions.md
  fd_tune   that generator, tuned by Frechet distances: docs/fd_tune.md
  classifier  a network that judges them all, --config.eval.classifier.path=
            WORKDIR/encoder
  smoke     the same code path in a minute
`judge`, `features` and `fd_tune` need
--config.encoders.mae.path=WORKDIR/encoder, where WORKDIR is that of `encoder`;
`fd_tune` needs --config.init_from=EXPORT too, an export of `features`.

On two CPU cores, as measured in docs/results.md: encoder 1 minute, judge 3,
features 9.
"""

from ml_collections import ConfigDict

from configs import common

# Already decoded, with 17 grey levels, which 8 bits would not hold.
DATA = {
  "source": "digits",
  "image_size": 8,
  "channels": 1,
  "crop": "none",
  "flip": False,
  "wire": "float32",
  "num_threads": 1,
}
VARIANTS = (
  *("encoder", "judge", "features", "fd_tune", "style", "classifier"),
  "smoke",
)


def get_config(variant: str = "") -> ConfigDict:
  """The config of the named variants."""
  names = [name for name in variant.split(",") if name]
  for name in names:
    if name not in VARIANTS:
      raise ValueError(f"variant {name!r}: valid options are {VARIANTS}")
  tasks = [name for name in names if name != "smoke"]
  if len(tasks) > 1:
    raise ValueError(f"variants {tasks} exclude each other")
  if "encoder" in names:
    config = _encoder()
  elif "classifier" in names:
    config = _encoder()
    common.classifier(config, 400)
  else:
    config = _generator()
    if "style" in names:
      common.by_style(config, "runs/digits_style.npz")
      config.eval.alphas = (1.0,)
    elif tasks:
      common.add_encoder(config, "mae", "")
      config.encoders.mae.update(dtype="float32", in_loss="judge" not in names)
      config.eval.metrics = ("fd_encoder", *config.eval.metrics)
    if "features" in names:
      _features(config)
    if "fd_tune" in names:
      _fd_tune(config)
  if "smoke" in names:
    _smoke(config)
  return config


def _generator() -> ConfigDict:
  config = common.generator()
  config.data.update(DATA)

  config.model.update(
    input_size=8,
    in_channels=1,
    out_channels=1,
    patch_size=4,
    hidden_size=96,
    depth=3,
    num_heads=4,
    num_classes=10,
    cond_dim=96,
    context_tokens=2,
    style_vocab=16,
    style_tokens=4,
  )
  # The floor drowns the small temperatures of so small a problem.
  config.drift.affinity_floor = 0.0
  config.guidance.exponent = 5.0
  config.guidance.no_cfg_frac = 0.5

  config.batch.update(labels=16, generated=32, positives=96, unconditional=8)
  config.queue.update(
    class_size=128,
    unconditional_size=512,
    push_per_step=32,
    prefill=1_280,  # one epoch
  )

  config.optim.update(
    schedule="cosine",
    learning_rate=4e-3,
    warmup_steps=100,
    weight_decay=0.0,
  )
  config.ema.decays = (0.99, 0.995)
  config.train.update(num_steps=1_500, log_every=50)
  config.eval.update(
    every=250,
    num_samples=540,  # 54 of each class, as many as are held out
    batch_size=540,
    alphas=(1.0, 2.0),
    ema_decay=0.995,
    metrics=("fd_pixel", "coverage", "label_accuracy", "duplicates"),
  )
  config.checkpoint.update(every=250, best_metric="fd_pixel")
  return config


def _features(config: ConfigDict) -> None:
  """Without the 4x4 patches and with fewer positives, to save time."""
  config.features.update(patch_mean_size=(2,), patch_std_size=(2,))
  config.batch.positives = 64


def _fd_tune(config: ConfigDict) -> None:
  common.fd_tune(config, population=10_000, start="exports/digits")
  config.eval.classifier.path = "runs/digits_classifier/encoder"
  config.batch.labels = 512
  config.fd_loss.trust = 0.1
  config.optim.learning_rate = 1e-4
  config.train.num_steps = 500
  config.eval.ema_decay = 0.99


def _encoder() -> ConfigDict:
  config = common.mae()
  config.data.update(DATA)
  config.model.update(
    in_channels=1,
    base_channels=16,
    layers=(1, 1, 1, 1),
    input_patch_size=1,
    num_classes=10,
    norm_groups=4,  # 32 would make every channel of so narrow a net a group
  )
  config.mae.update(
    batch_size=256,
    classification_steps=200,
    classification_ramp=100,
  )
  config.optim.update(learning_rate=2e-3, warmup_steps=50)
  config.ema.decays = (0.99,)
  config.train.update(num_steps=600, log_every=50)
  config.eval.update(every=200, batch_size=540, ema_decay=0.99)
  config.checkpoint.update(every=200)
  return config


def _smoke(config: ConfigDict) -> None:
  config.train.update(num_steps=20, log_every=5)
  config.optim.warmup_steps = 5
  config.checkpoint.every = 10
  config.eval.every = 10
  if config.task == "mae":
    config.mae.update(
      batch_size=64, classification_steps=10, classification_ramp=5
    )
  else:
    config.eval.update(num_samples=100, batch_size=100)
    if config.fd_loss.population:
      config.batch.labels = 64
      config.fd_loss.population = 320
