"""Names, types and sections of a config; values live in configs/*.py."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Annotated, Any

# Strings whose `~` parsing expands: a path or URL, and KIND:PATH.
Path = Annotated[str, "path"]
Source = Annotated[str, "source"]


class ConfigError(ValueError):
  """A config that can't be run; the message names key, value and remedy."""


@typing.dataclass_transform(frozen_default=True, kw_only_default=True)
class Section:
  """Base of all sections: subclasses become frozen keyword-only classes."""

  def __init_subclass__(cls, **kwargs: Any):
    super().__init_subclass__(**kwargs)
    dataclasses.dataclass(frozen=True, kw_only=True)(cls)


class Data(Section):
  """Where real images come from and how they are cut (drift_jax.data)."""

  source: Source
  data_dir: Path
  train_split: str
  test_split: str
  held_out: int
  class_order: str
  image_size: int
  channels: int
  crop: str
  crop_scale: tuple[float, ...]
  flip: bool
  wire: str
  in_memory: bool
  decoder: str
  max_corrupt: int
  num_threads: int
  num_workers: int
  prefetch: int


class Vae(Section):
  """The autoencoder behind latents: a converted directory and its precision.

  The latent cache must have been made with it. It decodes samples for pictures
  and for encoders of pixels (Encoder's `decode`), and encodes images where an
  encoder of latents is trained on them. `sharding`, `remat` and `model` are as
  in Encoder.
  """

  path: Path
  dtype: str
  sharding: str
  remat: bool
  model: Mapping[str, Any]


class GeneratorModel(Section):
  """Arguments of drift_jax.models.build_generator."""

  input_size: int
  in_channels: int
  out_channels: int
  patch_size: int
  hidden_size: int
  depth: int
  num_heads: int
  mlp_ratio: float
  num_classes: int
  cond_dim: int
  context_tokens: int
  style_vocab: int
  style_tokens: int
  dtype: str
  attention_dtype: str
  remat: str


class MaeModel(Section):
  """Arguments of drift_jax.models.build_mae."""

  in_channels: int
  base_channels: int
  layers: tuple[int, ...]
  input_patch_size: int
  mask_patch_size: int
  num_classes: int
  norm_groups: int
  dtype: str
  remat: bool


class Encoder(Section):
  """A frozen feature encoder: an exported directory and its precision.

  With in_loss the generator drifts in its features; without, it only judges
  (eval.metrics 'fd_encoder'). With `decode` it reads the images that the
  autoencoder (vae) makes of samples and reals, without it these themselves.
  `sharding` says how its weights lie on the mesh: a copy on every device, or in
  parts over 'fsdp', gathered where they are used. With `remat` the backward
  pass through it recomputes its blocks. `model` says which model it is,
  {'kind': ..., arguments of the function that builds it}: the weights must be
  of that model, and it can be compiled before there are any. {} takes whatever
  is there.
  """

  path: Path
  dtype: str
  in_loss: bool
  decode: bool
  sharding: str
  remat: bool
  model: Mapping[str, Any]


class Features(Section):
  """Which feature vectors of A.5 enter the loss."""

  sample: bool
  every_k_block: int
  patch_mean_size: tuple[int, ...]
  patch_std_size: tuple[int, ...]
  use_mean: bool
  use_std: bool


class TemperatureScale(Section):
  """How the drift's temperatures change: what multiplies all of them.

  `kind` is 'fixed'; 'annealed', by exp(-rate * step), which must not fall below
  LEAST_TEMPERATURE_SCALE; 'learned', by what makes each label's positives
  likeliest, with `rate` of learning; or 'adaptive': each problem's own, such
  that a sample has `neighbours` effective positives at temperature 1.
  """

  kind: str
  rate: float
  neighbours: float


class Drift(Section):
  """The drifting field and its normalisations (method of A.6).

  `field` is one of the family (drift_jax.drift.FIELDS), `options` {field: its
  arguments}; affinity_floor and normalization are those of 'softmax'. The
  rest: drift_jax.drift.Variant.
  """

  field: str
  options: Mapping[str, Mapping[str, Any]]
  temperatures: tuple[float, ...]
  temperature_scale: TemperatureScale
  affinity_floor: float
  normalization: str
  attraction: float
  repulsion: float
  negatives: str
  guidance: str
  reduction: str
  normalize_features: bool
  normalize_drift: bool
  diagnostics: bool


class Guidance(Section):
  """Distribution of the guidance scale alpha during training (A.7)."""

  minimum: float
  maximum: float
  exponent: float
  no_cfg_frac: float


class Batch(Section):
  """Sizes of one step: N_c labels, each with N, N_pos and N_unc samples.

  `reals` says how positives and unconditional reals are found: through the
  sample queue, or by index, class by class.
  """

  reals: str
  labels: int
  generated: int
  positives: int
  unconditional: int


class Queue(Section):
  """The sample queue (A.8).

  A class that has fewer samples in it than a label draws repeats them.
  `with_replacement` says whether the data may be such that it always will.
  """

  class_size: int
  unconditional_size: int
  push_per_step: int
  prefill: int
  with_replacement: bool


class Optim(Section):
  """AdamW, its schedule and the gradient clip."""

  schedule: str
  learning_rate: float
  warmup_steps: int
  b1: float
  b2: float
  eps: float
  weight_decay: float
  grad_clip: float


class Ema(Section):
  """Exponential moving averages of the parameters, several at once."""

  decays: tuple[float, ...]


class Train(Section):
  """Length of the run and how often it reports."""

  num_steps: int
  log_every: int


class GeneratorTrain(Train):
  """The same of a generator, and what computes its step.

  `kernels` of attention and drifting losses: 'pallas' for TPUs, 'xla'
  anywhere, 'auto' the first that the devices run and, on NVIDIA GPUs, cuDNN's
  attention. `accum_labels` at once, if not 0, with the field's scalars by
  `accum_scalars`, 'group' or 'exact'.
  """

  kernels: str
  accum_labels: int
  accum_scalars: str


class Judge(Section):
  """A network that judges images, and statistics of real ones' features."""

  path: Path
  reference: Path


class GeneratorEval(Section):
  """Evaluation in the loop."""

  every: int
  num_samples: int
  labels: Path
  batch_size: int
  alphas: tuple[float, ...]
  ema_decay: float
  metrics: tuple[str, ...]
  inception: Judge
  dinov2: Judge
  coverage_k: int
  grid_classes: int
  grid_per_class: int


class MaeEval(Section):
  """Evaluation of the encoder on held-out images."""

  every: int
  batch_size: int
  ema_decay: float


class Checkpoint(Section):
  """What is saved, what is kept, what happens when it can't be read."""

  every: int
  keep_latest: int
  keep_every: int
  best_metric: str
  on_corrupt: str


class Mesh(Section):
  """Sizes of the device mesh; one may be -1."""

  data: int
  fsdp: int


class Processes(Section):
  """How several processes look after each other."""

  heartbeat_timeout: int
  join_timeout: int = 600  # which runs of before have none of


class MaeLoss(Section):
  """Masked reconstruction and the classification fine-tune (A.3)."""

  batch_size: int
  mask_ratio: float
  classification_steps: int
  classification_ramp: int
  classification_weight: float


class GeneratorConfig(Section):
  """A run that trains a generator: config.task = 'generator'."""

  task: str
  seed: int
  init_from: Path
  data: Data
  vae: Vae
  model: GeneratorModel
  encoders: Mapping[str, Encoder]
  features: Features
  drift: Drift
  guidance: Guidance
  batch: Batch
  queue: Queue
  optim: Optim
  ema: Ema
  train: GeneratorTrain
  eval: GeneratorEval
  checkpoint: Checkpoint
  mesh: Mesh
  processes: Processes


class MaeConfig(Section):
  """A run that trains a feature encoder: config.task = 'mae'."""

  task: str
  seed: int
  init_from: Path
  data: Data
  vae: Vae
  model: MaeModel
  mae: MaeLoss
  optim: Optim
  ema: Ema
  train: Train
  eval: MaeEval
  checkpoint: Checkpoint
  mesh: Mesh
  processes: Processes


class ToyData(Section):
  """Points of the plane: a distribution, and the noise on it.

  `noise` is the standard deviation of the Gaussian that is added.
  """

  distribution: str
  noise: float
  prefetch: int


class ToyModel(Section):
  """Arguments of drift_jax.models.build_toy, but for the particles' number."""

  kind: str
  noise_size: int
  width: int
  depth: int
  location: tuple[float, ...]
  spread: float


class ToyBatch(Section):
  """Sizes of one step: N_c independent problems of N samples, N_pos data."""

  labels: int
  generated: int
  positives: int


class ToyEval(Section):
  """Evaluation against fresh data, and what the pictures show."""

  every: int
  num_samples: int
  ema_decay: float


class ToyConfig(Section):
  """A run that fits points of the plane (5.1): config.task = 'toy'.

  Where model.kind is 'particles' there is no network: a step is x <- x + eta V,
  eta = optim.learning_rate, and of `optim` nothing but its schedule counts.
  """

  task: str
  seed: int
  data: ToyData
  model: ToyModel
  drift: Drift
  batch: ToyBatch
  optim: Optim
  ema: Ema
  train: Train
  eval: ToyEval
  checkpoint: Checkpoint
  mesh: Mesh
  processes: Processes

  @property
  def has_particles(self) -> bool:
    """Whether there is no network."""
    return self.model.kind == "particles"


class PolicyData(Section):
  """Demonstrations, and how windows are cut from them.

  `source` is 'expert' (the environment's scripted one, `episodes` of them by
  `seed`), 'zarr:DIR' or 'hdf5:FILE' (the first `episodes`, 0 for all).
  `observations` may cut columns: 'state[:2]'.
  """

  source: Source
  episodes: int
  seed: int
  observations: tuple[str, ...]
  observation_horizon: int
  prediction_horizon: int
  executed: int
  prefetch: int


class PolicyModel(Section):
  """Arguments of drift_jax.models.Policy's two networks.

  `crop` is the side that images are cut to, 0 for whole ones; `time_size` of
  the embedding that a diffusion policy has.
  """

  widths: tuple[int, ...]
  kernel_size: int
  groups: int
  time_size: int
  crop: int
  keypoints: int
  image_features: int
  dtype: str


class PolicyLoss(Section):
  """What trains the policy: 'drifting', or a baseline of the same network.

  `problem` is the drifting loss': 'step', 'chunk' or 'batch';
  `diffusion_steps` are the noise levels of 'diffusion'.
  """

  method: str
  problem: str
  diffusion_steps: int


class PolicyBatch(Section):
  """Sizes of one step: observations, and G generated (noisy) chunks of each."""

  size: int
  generated: int


class PolicyEval(Section):
  """Rollouts in the loop, of the episodes seed, seed + 1, ...

  `samplers` are those of a diffusion policy, 'ddpm:N' or 'ddim:N'; every one
  is rolled out. figures.json has means over the last `checkpoints`
  evaluations.
  """

  every: int
  episodes: int
  seed: int
  parallel: int
  threads: int
  samplers: tuple[str, ...]
  ema_decay: float
  checkpoints: int
  videos: int


class PolicyConfig(Section):
  """A run that trains a policy of robot control: config.task = 'policy'."""

  task: str
  seed: int
  environment: str
  data: PolicyData
  model: PolicyModel
  loss: PolicyLoss
  drift: Drift
  batch: PolicyBatch
  optim: Optim
  ema: Ema
  train: Train
  eval: PolicyEval
  checkpoint: Checkpoint
  mesh: Mesh
  processes: Processes


AnyConfig = GeneratorConfig | MaeConfig | ToyConfig | PolicyConfig
TASKS = {
  "generator": GeneratorConfig,
  "mae": MaeConfig,
  "toy": ToyConfig,
  "policy": PolicyConfig,
}

# Distributions of the plane (data.distribution of a toy), and what fits them.
DISTRIBUTIONS = (
  "bimodal",
  "checkerboard",
  "swiss_roll",
  "eight_gaussians",
  "moons",
  "spiral",
)
TOY_MODELS = ("mlp", "particles")

# What a policy is rolled out in; '': nothing, where no simulator is at hand.
ENVIRONMENTS = (
  "obstacle",
  "fetch_reach",
  "fetch_push",
  "fetch_pick_and_place",
  "pusht",
  "",
)
DEMONSTRATIONS = ("expert", "zarr:DIR", "hdf5:FILE")
POLICY_METHODS = ("drifting", "diffusion", "regression")
POLICY_PROBLEMS = ("step", "chunk", "batch")

# Figures of eval.inception and eval.dinov2. 'fd_inception' is what FID is of
# other weights than the published ones, which those after it are for.
JUDGED_METRICS = {
  "inception": (
    "fd_inception",
    "fid",
    "inception_score",
    "precision_recall",
    "kid",
    "coverage_inception",
  ),
  "dinov2": ("fd_dinov2",),
}
# The figures that the generator's evaluation can compute.
EVAL_METRICS = (
  *JUDGED_METRICS["inception"],
  *JUDGED_METRICS["dinov2"],
  "fd_pixel",
  "fd_encoder",
  "coverage",
  "label_accuracy",
  "duplicates",
)
# Those that are better when they are smaller: what can rank checkpoints.
RANKING_METRICS = (
  "fid",
  "kid",
  *(name for name in EVAL_METRICS if name.startswith("fd_")),
)
# Where data may come from (data.source).
SOURCES = ("digits", "tfds:NAME", "folder:DIR", "tar:FILE", "latents:DIR")
# How images are cut to data.image_size: ADM's centre crop; a random resized
# crop (A.3); a black frame around smaller images; nothing, they fit.
CROPS = ("center", "random", "pad", "none")
# How the drift's temperatures change.
TEMPERATURE_KINDS = ("fixed", "annealed", "learned", "adaptive")
# Annealed temperatures fall no further: float32 tells no two distances apart
# that differ by less than such a part.
LEAST_TEMPERATURE_SCALE = 1e-6
# How frozen weights lie on the mesh.
FROZEN_SHARDINGS = ("fsdp", "replicated")
WIRE_DTYPES = ("uint8", "float32", "float16", "bfloat16")
DECODERS = ("pillow", "simplejpeg")
