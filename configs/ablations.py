"""The paper's ablations: every row of every table is a config by name.

  python -m drift_jax.main --workdir=runs/no_repulsion \\
    --config=configs/ablations.py:digits/table1/attraction_only

trains one row; `python -m drift_jax.tools.ablate` trains a table's rows with
several seeds and writes the table. What stands behind the colon is
BASE/TABLE/ROW, or BASE alone. BASE is a file of this folder that trains a
generator, with its variants if any:
  imagenet_latent        the published scale (64 TPU v6e), :ablation and others
  digits, mnist:cpu      for CPU cores
  mnist, cifar10         for one GPU
TABLE is a key of TABLES, ROW one of `rows`. Rows keep to the base's own sizes:
where the paper halves 64 positives, a base of 96 has 48.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from configs import cifar10, digits, imagenet_latent, mnist

BASES = {
  "imagenet_latent": imagenet_latent,
  "digits": digits,
  "mnist": mnist,
  "cifar10": cifar10,
}
# FID of the paper's ablation (Table 8), the row that all tables share.
DEFAULT = 8.46


@dataclasses.dataclass(frozen=True)
class Row:
  """One row of a table.

  Attributes:
    label: what a reader sees.
    overrides: {dotted key: value} relative to the base.
    paper: FID-50K in the paper; (lowest, highest) where only the range of
      several rows is known here; None where nothing is.
  """

  label: str
  overrides: dict[str, Any]
  paper: float | tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Table:
  """A table of the paper.

  Attributes:
    title: with its number in the paper.
    varies: what differs between its rows, in a sentence.
    rows: (name of the base, its config) -> {name: row}; ValueError where the
      base can't do it.
    source: whose figures stand beside.
  """

  title: str
  varies: str
  rows: Callable[[str, ConfigDict], dict[str, Row]]
  source: str = "arXiv:2602.04770"


def get_config(name: str = "digits") -> ConfigDict:
  """The config that BASE/TABLE/ROW names, or that of BASE alone."""
  base, *rest = name.split("/")
  if not rest:
    return base_config(base)
  if len(rest) != 2:
    raise ValueError(f"{name!r}: want BASE/TABLE/ROW, or BASE alone")
  table, row = rest
  found = rows(table, base)
  if row not in found:
    raise ValueError(
      f"row {row!r}: valid options of {base}/{table} are {list(found)}"
    )
  config = base_config(base)
  for key, value in found[row].overrides.items():
    *path, last = key.split(".")
    section = config
    for part in path:
      section = section[part]
    section[last] = value
  return config


def base_config(base: str) -> ConfigDict:
  """The config of 'FILE' or 'FILE:VARIANT', which trains a generator."""
  name, _, variant = base.partition(":")
  if name not in BASES:
    raise ValueError(f"base {name!r}: valid options are {list(BASES)}")
  config = BASES[name].get_config(variant)
  if config.task != "generator":
    raise ValueError(
      f"base {base!r} has task={config.task!r}: ablations are of generators"
    )
  return config


def rows(table: str, base: str) -> dict[str, Row]:
  """{name: row} of a table on a base."""
  if table not in TABLES:
    raise ValueError(f"table {table!r}: valid options are {list(TABLES)}")
  return TABLES[table].rows(base, base_config(base))


def _anti_symmetry(base: str, config: ConfigDict) -> dict[str, Row]:
  del base, config
  # Of the five together 41 to 177 is known here, not which has which.
  others = (41.0, 177.0)
  return {
    name: Row(
      f"{a:g} V+ - {b:g} V-",
      {"drift.attraction": a, "drift.repulsion": b},
      DEFAULT if a == b else others,
    )
    for name, a, b in (
      ("antisymmetric", 1.0, 1.0),
      ("attraction_1.5", 1.5, 1.0),
      ("repulsion_1.5", 1.0, 1.5),
      ("attraction_2", 2.0, 1.0),
      ("repulsion_2", 1.0, 2.0),
      ("attraction_only", 1.0, 0.0),
    )
  }


def _allocation(base: str, config: ConfigDict) -> dict[str, Row]:
  """N_pos at the base's N; N at the base's number of generated samples."""
  del base
  batch, queue = config.batch, config.queue
  found = {}
  fractions = (1, batch.positives // 4, batch.positives // 2)
  for positives, paper in zip(fractions, (20.4, 10.4, 9.0), strict=True):
    found[f"positives_{positives}"] = Row(
      f"N_pos {positives}, N {batch.generated}",
      {"batch.positives": positives},
      paper,
    )
  for part, paper in ((8, 11.8), (4, 10.2), (2, 9.3)):
    generated = batch.generated // part
    if generated < 1 or batch.generated % part:
      raise ValueError(
        f"table2 takes an eighth of batch.generated={batch.generated}, which "
        "is no whole number"
      )
    labels = batch.labels * part
    overrides = {"batch.generated": generated, "batch.labels": labels}
    if batch.reals == "queue":
      # A step's labels are drawn from what it pushes.
      overrides["queue.push_per_step"] = max(queue.push_per_step, labels)
    found[f"generated_{generated}"] = Row(
      f"N {generated}, N_pos {batch.positives}, {labels} labels",
      overrides,
      paper,
    )
  label = f"N_pos {batch.positives}, N {batch.generated}"
  return found | {"base": Row(label, {}, DEFAULT)}


# Latent-MAEs of Table 3: row -> (base width, workdir, label, FID).
_MAES = {
  "mae_256": (256, "mae_latent_256", "latent-MAE, width 256", DEFAULT),
  "mae_384": (384, "mae_latent_384", "latent-MAE, width 384", None),
  "mae_512": (512, "mae_latent_512", "latent-MAE, width 512", None),
  "mae_640": (640, "mae_latent_640_short", "latent-MAE, width 640", None),
  "mae_640_long": (
    640,
    "mae_latent_640_no_cls",
    "latent-MAE, width 640, 1280 epochs",
    None,
  ),
  "mae_640_cls": (
    640,
    "mae_latent_640",
    "latent-MAE, width 640, 1280 epochs, classification",
    None,
  ),
}
# Base widths of the MAEs whose features the others drift in; configs/NAME.py.
_WIDTHS = {"digits": 16, "mnist": 64, "mnist:cpu": 16, "cifar10": 64}


def _encoders(base: str, config: ConfigDict) -> dict[str, Row]:
  """Other encoders' weights on ImageNet; elsewhere none, or MAEs by width."""
  name, _, variant = base.partition(":")
  if name == "imagenet_latent":
    return _imagenet_encoders(base, variant)
  _need_encoder("table3", base, config)
  name = "mnist:cpu" if name == "mnist" and "cpu" in variant else name
  # Rows are judged in one space, and no encoder's is that of all.
  metrics = [m for m in config.eval.metrics if m != "fd_encoder"]
  if "fd_pixel" not in metrics:
    metrics.insert(0, "fd_pixel")
  judged: dict[str, Any] = {"eval.metrics": tuple(metrics)}
  if config.checkpoint.best_metric:
    judged["checkpoint.best_metric"] = "fd_pixel"
  found = {
    "raw": Row("no encoder", judged | {"encoders": ConfigDict()}),
  }
  for width in (_WIDTHS[name] // 2, _WIDTHS[name], 2 * _WIDTHS[name]):
    encoders = ConfigDict({"mae": config.encoders.mae.to_dict()})
    encoders.mae.in_loss = True
    encoders.mae.path = f"runs/{name.replace(':', '_')}_encoder_{width}/encoder"
    found[f"mae_{width}"] = Row(
      f"MAE, width {width}", judged | {"encoders": encoders}
    )
  return found


def _imagenet_encoders(base: str, variant: str) -> dict[str, Row]:
  names = [part for part in variant.split(",") if part]
  smoke = ",smoke" if "smoke" in names else ""
  if set(names) - {"ablation", "smoke"}:
    raise ValueError(
      f"table3 on {base!r}: the encoders are compared on the ablation, "
      "imagenet_latent"
    )

  def encoders(variant: str) -> ConfigDict:
    return imagenet_latent.get_config(variant + smoke).encoders

  found = {
    name: Row(label, {"encoders": encoders(name)})
    for name, label in (
      ("simclr", "SimCLR, ResNet-50"),
      ("moco", "MoCo-v2, ResNet-50"),
      ("convnext", "ConvNeXt-V2 base"),
    )
  }
  for name, (width, workdir, label, paper) in _MAES.items():
    chosen = encoders("ablation")
    chosen.mae.path = f"runs/{workdir}/encoder"
    if chosen.mae.model:
      chosen.mae.model.base_channels = width
    found[name] = Row(label, {"encoders": chosen}, paper)
  return found


def _need_encoder(table: str, base: str, config: ConfigDict) -> None:
  if config.encoders:
    return
  raise ValueError(
    f"{table} on {base!r}, which has no encoder: take a base that has one, "
    "digits:features, mnist, mnist:cpu, cifar10 or imagenet_latent"
  )


def _normalisation(base: str, config: ConfigDict) -> dict[str, Row]:
  del base, config
  return {
    value: Row(label, {"drift.normalization": value}, paper)
    for value, label, paper in (
      ("xy", "over x and y", DEFAULT),
      ("y", "over y", 8.92),
      ("none", "none", 10.54),
    )
  }


def _style(base: str, config: ConfigDict) -> dict[str, Row]:
  tokens = config.model.style_tokens
  if not tokens:
    raise ValueError(f"style on {base!r}, which has model.style_tokens=0")
  return {
    "without": Row("no style tokens", {"model.style_tokens": 0}, 8.86),
    "base": Row(f"{tokens} style tokens", {}, DEFAULT),
  }


def _features(base: str, config: ConfigDict) -> dict[str, Row]:
  _need_encoder("features", base, config)
  if not any(encoder.in_loss for encoder in config.encoders.values()):
    raise ValueError(
      f"features on {base!r}, whose encoders only judge: take a base that "
      "drifts in features, digits:features, mnist, cifar10 or imagenet_latent"
    )
  return {
    name: Row(
      label,
      {
        "features.patch_mean_size": sizes,
        "features.patch_std_size": sizes,
      },
      paper,
    )
    for name, label, sizes, paper in (
      ("a_b", "(a, b) locations, global mean and std", (), 9.58),
      ("a_c", "(a-c) and 2x2 patches", (2,), 9.10),
      ("a_d", "(a-d) and 4x4 patches", (2, 4), DEFAULT),
    )
  }


def _temperature(base: str, config: ConfigDict) -> dict[str, Row]:
  values = tuple(sorted(config.drift.temperatures))
  if len(values) != 3:
    raise ValueError(
      f"temperature on {base!r}: drift.temperatures={values} has "
      f"{len(values)}, the table takes a base of three"
    )
  # The paper's .02, .05 and .2, in this order.
  found = {
    f"tau_{value:g}": Row(
      f"tau {value:g}", {"drift.temperatures": (value,)}, paper
    )
    for value, paper in zip(values, (10.62, 8.67, 8.96), strict=True)
  }
  label = "tau " + ", ".join(f"{value:g}" for value in values)
  return found | {"all": Row(label, {}, DEFAULT)}


def _alphas(base: str, config: ConfigDict) -> dict[str, Row]:
  low, high = config.guidance.minimum, config.guidance.maximum
  alphas = [
    a for a in (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0) if low <= a <= high
  ]
  if len(alphas) < 2:
    raise ValueError(
      f"fig5 on {base!r}, which trains alpha in [{low:g}, {high:g}] alone"
    )
  return {
    f"alpha_{alpha:g}": Row(
      f"alpha {alpha:g}",
      {"eval.alphas": (alpha,)},
      DEFAULT if alpha == 2 else None,
    )
    for alpha in alphas
  }


def _fields(base: str, config: ConfigDict) -> dict[str, Row]:
  """The base's field, and others in its place; W-Flow's FID where it has one.

  Rows with W-Flow's figures have its settings of `drift` on any base, those of
  configs/imagenet_latent.py:wflow_ablation: no iteration of its plan is a field
  of unnormalised kernels, half of one has mean shifts.
  """
  del base
  if config.drift.field != "softmax":
    raise ValueError(
      f"fields on a base with drift.field={config.drift.field!r}"
    )
  found = {"softmax": Row("softmax, the paper's", {}, DEFAULT)}
  for name, label in (
    ("mmd", "mmd: kernels without normalisation"),
    ("kl", "kl: mean shifts, each over its own set"),
    ("gaussian", "gaussian: kl with a Gaussian kernel"),
    ("sharp", "sharp: a conservative field"),
  ):
    found[name] = Row(label, {"drift.field": name})
  temperature, iterations, _ = imagenet_latent.WFLOW["wflow_ablation"]
  own = {"negatives": "own_with_self", "own_in_scale": False}
  for name, label, steps, changes, paper in (
    ("sinkhorn_0", "sinkhorn, no iteration (MMD)", 0.0, {}, 10.40),
    ("sinkhorn_half", "sinkhorn, half an iteration (KL)", 0.5, {}, 10.17),
    (
      "sinkhorn",
      "sinkhorn, unconditional reals as negatives",
      iterations,
      {"guidance": "negatives"},
      7.29,
    ),
    ("sinkhorn_velocity", "sinkhorn, W-Flow's ablation", iterations, {}, 7.08),
    ("sinkhorn_own", "sinkhorn, its own batch", iterations, own, 17.57),
  ):
    drift = imagenet_latent.wflow_drift(temperature, steps) | changes
    overrides = {f"drift.{key}": value for key, value in drift.items()}
    found[name] = Row(label, overrides, paper)
  return found


TABLES = {
  "table1": Table(
    "Table 1: anti-symmetry",
    "The field is a V+ - b V-, anti-symmetric where a = b.",
    _anti_symmetry,
  ),
  "table2": Table(
    "Table 2: positives and negatives",
    "N_pos positives of each label at the base's N; then N generated samples "
    "(the negatives) of each label, at the same number of them in all.",
    _allocation,
  ),
  "table3": Table(
    "Table 3: the feature encoder",
    "The frozen encoder whose features the generator drifts in.",
    _encoders,
  ),
  "table11": Table(
    "Table 11: normalisation of the kernel",
    "The softmax is taken over x and y, over y alone, or not at all.",
    _normalisation,
  ),
  "style": Table(
    "Style tokens",
    "The generator is conditioned on random style tokens, or not.",
    _style,
  ),
  "features": Table(
    "Feature sets (A.5)",
    "Which vectors of the encoder's feature maps enter the loss.",
    _features,
  ),
  "temperature": Table(
    "Temperatures",
    "One temperature of the kernel alone, or all of them.",
    _temperature,
  ),
  "fig5": Table(
    "Fig. 5: the guidance scale",
    "Evaluation only: alpha at inference, of one trained generator.",
    _alphas,
  ),
  "fields": Table(
    "The family of drifting fields",
    "What the field is: the paper's, or another one in its place.",
    _fields,
    "arXiv:2602.04770 (softmax) and W-Flow, 2605.11755 (the others)",
  ),
}
