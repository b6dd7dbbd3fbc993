"""Names, types and ranges of the sections that tasks share.

Values live in configs/*.py. A field's type says what it may hold: `Literal`
lists choices, `AtLeast` gives bounds; checks.check_values reads both.
"""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from drift_jax.system import options


@dataclasses.dataclass(frozen=True)
class AtLeast:
  """Bounds of a number, in its type: Annotated[int, AtLeast(1)]."""

  least: float
  most: float = math.inf


# A number of things, which may be 0, or must not.
Count = Annotated[int, AtLeast(0)]
Size = Annotated[int, AtLeast(1)]
Fraction = Annotated[float, AtLeast(0, 1)]
# Of Adam: if float32 made it 1, the bias correction would divide by 0.
Beta = Annotated[float, AtLeast(0, 1 - 2**-24)]
# Strings whose `~` parsing expands: a path or URL, and KIND:PATH.
Path = Annotated[str, "path"]
Source = Annotated[str, "source"]
Dtype = Literal["float32", "bfloat16"]


@typing.dataclass_transform(frozen_default=True, kw_only_default=True)
class Section:
  """Base of all sections: subclasses become frozen keyword-only classes."""

  def __init_subclass__(cls, **kwargs: Any):
    super().__init_subclass__(**kwargs)
    dataclasses.dataclass(frozen=True, kw_only=True)(cls)


class RunData(Section):
  """Training data of any task; prefetch: batches ahead of the step."""

  prefetch: Count


class Data(RunData):
  """Where real images come from and how they are cut (drift_jax.data)."""

  source: Source
  data_dir: Path
  train_split: str
  test_split: str
  held_out: Annotated[float, AtLeast(0)]
  class_order: options.ClassOrder
  image_size: Size
  channels: Literal[1, 3]
  crop: options.Crop
  crop_scale: tuple[float, ...]
  flip: bool
  wire: options.Wire
  in_memory: bool
  decoder: options.Decoder
  max_corrupt: Count
  num_threads: Size
  num_workers: Count
  exif: bool = False  # earlier versions have no such key


class Reals(Section):
  """Reals that a generator's step draws: N_c labels, each N_pos and N_unc.

  `reals` says how positives and unconditional reals are drawn: from the sample
  queue, or by index, class by class or condition by condition (then labels are
  conditions). 0 labels stand for no generator.
  """

  reals: Literal["queue", "class_grouped", "condition_grouped"]
  labels: Count
  positives: Size
  unconditional: Count


class GeneratorReals(Reals):
  """Reals that a generator draws, and its eval.num_samples."""

  num_samples: Count = 0  # earlier runs have none


class Frozen(Section):
  """A frozen network: an exported directory and its precision.

  `sharding` says how its weights lie on the mesh: a copy on every device, or in
  parts over 'fsdp', gathered where they are used. With `remat` the backward
  pass through it recomputes its blocks. `model` says which model it is,
  {'kind': ..., arguments of the function that builds it}: the weights must be
  of that model, and it can be compiled before there are any. {} takes whatever
  is there.
  """

  path: Path
  dtype: Literal["", "float32", "bfloat16"]
  sharding: Literal["fsdp", "replicated"]
  remat: bool
  model: Mapping[str, Any]


class Vae(Frozen):
  """The autoencoder of a generator of latents.

  The latent cache must have been made with it; a cache of arrays has none, and
  path is ''. It decodes samples for pictures
  and for encoders of pixels (Encoder's `decode`), and encodes images if an
  encoder of latents is trained on them.
  """


class Encoder(Frozen):
  """A frozen feature encoder.

  With in_loss the generator drifts in its features; without, it only judges
  (eval.metrics 'fd_encoder'). With `decode` it reads the images that the
  autoencoder (vae) makes of samples and reals, without it these themselves.
  """

  in_loss: bool
  decode: bool


class TemperatureScale(Section):
  """How the drift's temperatures change, by a factor of all of them.

  `kind` is 'fixed'; 'annealed', by exp(-rate * step), which must not fall below
  LEAST_TEMPERATURE_SCALE; 'learned', by what makes each label's positives
  likeliest, with `rate` of learning; or 'adaptive': each problem's own, such
  that a sample has `neighbours` effective positives at temperature 1.
  """

  kind: Literal["fixed", "annealed", "learned", "adaptive"]
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
  affinity_floor: Annotated[float, AtLeast(0)]
  normalization: Literal["xy", "y", "none"]
  attraction: float
  repulsion: float
  negatives: str
  guidance: str
  reduction: Literal["sum", "mean"]
  normalize_features: bool
  normalize_drift: bool
  diagnostics: bool
  own_in_scale: bool = False  # earlier runs have none


class Optim(Section):
  """AdamW, its schedule and the gradient clip, and Muon."""

  schedule: Literal["constant", "cosine"]
  learning_rate: float
  warmup_steps: Count
  b1: Beta
  b2: Beta
  eps: float
  weight_decay: Annotated[float, AtLeast(0)]
  grad_clip: float
  muon_learning_rate: Annotated[float, AtLeast(0)] = 0.0  # earlier runs: none
  muon_kernels: Literal["blocks", "all"] = "blocks"  # earlier runs: these


class Ema(Section):
  """Exponential moving averages of the parameters, several at once."""

  decays: tuple[float, ...]


class Train(Section):
  """Length of the run and how often it reports."""

  num_steps: Size
  log_every: Size
  profile: str = ""  # earlier runs have neither of these
  keep_compiled: bool = True


class Eval(Section):
  """Evaluation in the loop of any task: how often, and of which average."""

  every: Count
  ema_decay: float


class Checkpoint(Section):
  """Checkpoints: those saved and kept, and the reaction to a damaged one."""

  every: Size
  keep_latest: Size
  keep_every: Count
  best_metric: str
  on_corrupt: Literal["error", "previous"]


class Mesh(Section):
  """Sizes of the device mesh; one may be -1."""

  data: int
  fsdp: int


class Processes(Section):
  """Timeouts by which several processes notice a lost one."""

  heartbeat_timeout: Annotated[int, AtLeast(10)]
  join_timeout: Size = 600  # earlier runs have none


class RunConfig(Section):
  """Sections and keys that the config of every task has."""

  task: str
  seed: Annotated[int, AtLeast(0, options.MAX_SEED)]  # keys have 32 bits
  data: RunData
  optim: Optim
  ema: Ema
  train: Train
  eval: Eval
  checkpoint: Checkpoint
  mesh: Mesh
  processes: Processes
  writers: tuple[options.Writer, ...] = ("jsonl", "tensorboard")  # earlier runs

  def check(self) -> None:
    """Raises ConfigError if values are out of range or contradict."""
    raise NotImplementedError


class ImageModel(Section):
  """Arguments that all models of images have."""

  num_classes: Count  # 0: as many as the data have
  dtype: Dtype


class ImageEval(Eval):
  """Evaluation of a model of images."""

  batch_size: Size


class ImageConfig(RunConfig):
  """Sections that the configs of tasks that read images have."""

  init_from: Path
  data: Data
  vae: Vae
  model: ImageModel
  eval: ImageEval


# Annealed temperatures fall no further: float32 tells no two distances apart
# that differ by less than such a part.
LEAST_TEMPERATURE_SCALE = 1e-6
