"""Toy experiments in the plane (5.1, Fig. 3 and 4); no data are read.

  python -m drift_jax.main --config=configs/toy.py:checkerboard \\
    --workdir=runs/checkerboard

The workdir then holds plots/evolution.gif, plots/field.png, plots/curves.png
and figures.json. Variants, joined by commas, e.g. `configs/toy.py:moons,quick`;
one of
  bimodal_between    two modes; the samples start between them (the default)
  bimodal_far        the same; they start far from both
  bimodal_collapsed  the same; they start collapsed on one
  checkerboard, swiss_roll, eight_gaussians, moons, spiral
and any of
  quick            smaller batches and fewer steps: under a minute
  particles        no network: x <- x + eta V, with eta = optim.learning_rate
  attraction_only  nothing repels the samples: they collapse (Table 1, (1, 0))
  smoke            the same code path in seconds
"""

from ml_collections import ConfigDict

from configs import common

# Of the data: standard deviation of the noise.
NOISE = {
  "bimodal": 0.1,
  "checkerboard": 0.05,
  "swiss_roll": 0.03,
  "eight_gaussians": 0.05,
  "moons": 0.05,
  "spiral": 0.02,
}
# Where the samples start, and how wide; the modes are at (-0.5, 0), (0.5, 0).
BIMODAL = {
  "bimodal_between": ((0.0, 0.0), 0.1),
  "bimodal_far": ((0.0, 1.0), 0.1),
  "bimodal_collapsed": ((-0.5, 0.0), 0.02),
}
EXPERIMENTS = (*BIMODAL, *(name for name in NOISE if name != "bimodal"))
OPTIONS = ("quick", "particles", "attraction_only", "smoke")


def get_config(variant: str = "") -> ConfigDict:
  """The config of the named variants."""
  names = [name for name in variant.split(",") if name]
  for name in names:
    if name not in (*EXPERIMENTS, *OPTIONS):
      raise ValueError(
        f"variant {name!r}: valid options are {(*EXPERIMENTS, *OPTIONS)}"
      )
  chosen = [name for name in names if name in EXPERIMENTS]
  if len(chosen) > 1:
    raise ValueError(f"variants {chosen} exclude each other")
  experiment = chosen[0] if chosen else EXPERIMENTS[0]
  config = common.toy()
  if experiment in BIMODAL:
    location, spread = BIMODAL[experiment]
    config.model.update(location=location, spread=spread)
  else:
    config.data.distribution = experiment
  config.data.noise = NOISE[config.data.distribution]
  if not {"quick", "particles", "smoke"} & set(names):
    # At a constant rate, single iterates' figures vary by a factor of two.
    config.ema.decays = (0.99,)
    config.eval.ema_decay = 0.99
  if "attraction_only" in names:
    config.drift.repulsion = 0.0
  if "quick" in names:
    config.batch.update(generated=512, positives=512)
    # A few steps take larger strides, and the last ones settle.
    config.optim.update(schedule="cosine", learning_rate=4e-3)
    config.train.num_steps = 800
    config.eval.update(every=20, num_samples=2_048)
    config.checkpoint.every = 800
  if "particles" in names:
    config.model.kind = "particles"
    config.optim.update(schedule="constant", learning_rate=1.0)  # eta
  if "smoke" in names:
    config.batch.update(generated=32, positives=32)
    config.model.update(width=16, depth=1)
    config.train.update(num_steps=4, log_every=1)
    config.eval.update(every=2, num_samples=64)
    config.checkpoint.every = 2
  return config
