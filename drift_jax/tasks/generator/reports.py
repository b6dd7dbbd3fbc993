"""Reports: figures of a run, of exported weights, or of images."""

import dataclasses
import hashlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from etils import epath
from jax.sharding import Mesh

from drift_jax import config as config_lib
from drift_jax.metrics.batches import PixelsFn
from drift_jax.metrics.evaluators import Evaluator, baselines
from drift_jax.metrics.generation import (
  SampleFn,
  balanced_labels,
  evaluate,
  in_order,
  read_labels,
)
from drift_jax.metrics.images import save_image
from drift_jax.metrics.neighbours import plot_nearest_distances
from drift_jax.metrics.plots import plot_alphas
from drift_jax.metrics.sample_files import open_images
from drift_jax.metrics.sample_writer import SampleWriter
from drift_jax.system import options, processes, sharding, storage
from drift_jax.system.console import logger
from drift_jax.system.errors import naming
from drift_jax.tasks.generator.config import (
  CLASSIFIER_METRICS,
  EVAL_METRICS,
  JUDGED_METRICS,
  GeneratorConfig,
  GeneratorEval,
  Judge,
  Network,
  check_judges,
)
from drift_jax.tasks.generator.evaluators import (
  evaluation_conditions,
  evaluation_labels,
  judge_inputs,
  needs_reals,
  network_evaluators,
  run_evaluators,
)
from drift_jax.tasks.generator.judges import (
  image_size,
  make_decoder,
  make_pixels,
)
from drift_jax.tasks.generator.memorisation import (
  Memorisation,
  check_memorisation,
  check_searchable,
  feature_space,
)
from drift_jax.tasks.generator.protocols import PROTOCOLS, described
from drift_jax.tasks.generator.restore import open_artifact, open_run
from drift_jax.tasks.generator.samplers import make_sampler
from drift_jax.tasks.generator.setup import (
  decoded_encoders,
)
from drift_jax.training import places
from drift_jax.training.facts import check_data
from drift_jax.training.frozen import frozen_sums, load_encoders
from drift_jax.training.inputs import open_readers, require
from drift_jax.training.run import pad_to_mesh
from drift_jax.training.workdir import check_frozen

_Network = TypeVar("_Network", bound=Network)
# Figures of the networks that a config's eval names.
_BY_NETWORK = {**JUDGED_METRICS, "classifier": CLASSIFIER_METRICS}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """What a report computes; None takes the run's config, or the flag's default.

  Attributes:
    alphas: guidance scales.
    metrics: figures, see config.EVAL_METRICS.
    num_samples: number for each alpha; 0 for as many as are held out or listed.
    labels: file of class indices; None for balanced ones.
    label_order, pixels: as in a config's eval.
    protocol: key of protocols.PROTOCOLS, whose number of samples and Inception
      score it takes; `protocols.of_request` has the other arguments.
    batch_size: samples of a batch, over all devices.
    seed: seeds noise and style; a run's default is config.seed + 1, which its
      own evaluations (they chose the best checkpoint) did not use.
    paths: {dotted key of a run's config: where it is now}, see places.of_run.
    judges: {('inception' or another, 'path' or 'reference'): where}.
    neighbours: nearest training images of each sample; 0 for none.
    neighbour_space: see `feature_space`.
    neighbour_samples: samples whose neighbours are sought; at least so many.
    samples_out: .npz to write.
    out: JSON beside which pictures go.
  """

  alphas: Sequence[float] | None = None
  metrics: Sequence[str] | None = None
  num_samples: int | None = None
  labels: str | None = None
  label_order: options.LabelOrder | None = None
  pixels: options.Pixels | None = None
  protocol: str | None = None
  batch_size: int | None = None
  seed: int | None = None
  paths: Mapping[str, str] = dataclasses.field(default_factory=dict)
  judges: Mapping[tuple[str, str], str] = dataclasses.field(
    default_factory=dict
  )
  neighbours: int = 0
  neighbour_space: str = "encoder"
  neighbour_samples: int = 1000
  samples_out: str | None = None
  out: str = "evaluation.json"

  def judge(self, name: str, default: _Network) -> _Network:
    """Returns the network that the request names, or else the default's."""
    given = {key: path for (of, key), path in self.judges.items() if of == name}
    return dataclasses.replace(default, **given)

  def count(self, num_classes: int) -> int | None:
    """Returns the samples for each alpha; None for the default's."""
    if self.protocol:
      return PROTOCOLS[self.protocol].per_class * num_classes
    return self.num_samples

  @property
  def shuffle(self) -> bool:
    """Whether the Inception score's parts are of shuffled samples."""
    return not self.protocol or PROTOCOLS[self.protocol].shuffle

  def beside(self, suffix: str) -> epath.Path:
    """Returns the path of a picture: out without .json, then the suffix."""
    path = epath.Path(self.out)
    return path.with_name(path.stem + suffix)


class _Drawing(NamedTuple):
  """How samples are drawn, as in a config's eval; the usual values."""

  alphas: tuple[float, ...]
  label_order: options.LabelOrder = "given"
  pixels: options.Pixels = "truncate"


def report_on_run(
  workdir: str,
  request: Request,
  *,
  step: int | None = None,
  ema_decay: float | None = None,
) -> dict[str, Any]:
  """Computes figures of a run's checkpoint, and of real images beside them.

  Args:
    workdir: folder of the run.
    request: what to compute.
    step: checkpoint; None for the best, else the newest.
    ema_decay: which average; None for the evaluated one.

  Returns:
    The report: 'step', 'ema_decay', 'seed', 'num_samples', 'seconds', 'judges'
    (what the networks and statistics are), 'results': {alpha: {figure: value}},
    'baseline': {figure: value of train images}, `_conditions`, 'neighbours'.

  Raises:
    ConfigError: arguments that do not fit the run, or files of it that are not
      found.
    CheckpointError: no usable checkpoint.
    ArtifactError: a network that can't be loaded.
  """
  # 1. The run, with the evaluation that is asked for.
  mesh = sharding.make_mesh()
  run = open_run(
    workdir,
    mesh,
    step=step,
    ema_decay=ema_decay,
    paths=request.paths,
    check=lambda config: _check_files(config, workdir, request, ema_decay),
  )
  assert run.config is not None
  config = _requested_config(run.config, request, ema_decay)
  chosen = config.eval
  # 2. What it reads: encoders and real images, if a figure needs them.
  wants_encoder, wants_reals = _wanted(config, request)
  encoders = load_encoders(config.encoders, mesh) if wants_encoder else {}
  check_frozen(epath.Path(workdir), frozen_sums(encoders, None))
  readers = None
  if wants_reals:
    readers = open_readers(config, run.vae)
    check_data(epath.Path(workdir), readers.train.class_names, readers.facts)
  # 3. The evaluators; a mistake shows before anything is generated.
  with naming("eval"):
    labels = evaluation_labels(chosen, config.model.num_classes, readers)
    evaluators, facts = run_evaluators(
      config, encoders, readers, labels, run.vae, mesh, request.shuffle
    )
  if request.neighbours:
    assert readers is not None
    with naming("neighbours"):
      check_searchable(readers, request.neighbours)
  # 4. Figures.
  seed = config.seed + 1 if request.seed is None else request.seed
  sampler = make_sampler(run.task, mesh, seed)
  sample_fn = sampler(run.params, **evaluation_conditions(chosen, readers))
  batch_size = pad_to_mesh(chosen.batch_size, mesh)
  decode = make_decoder(run.vae, mesh)
  to_pixels = make_pixels(decode, chosen.pixels)
  report = {
    **run.provenance,
    "seed": seed,
    **_score(
      evaluators,
      sample_fn,
      labels,
      request,
      alphas=chosen.alphas,
      batch_size=batch_size,
      to_pixels=to_pixels,
    ),
    "judges": facts,
    "baseline": baselines(evaluators),
    **_conditions(request, facts, chosen.metrics, chosen),
  }
  # 5. Nearest training images.
  if request.neighbours:
    assert readers is not None
    with naming("neighbours"):
      space = feature_space(
        request.neighbour_space,
        *(encoders, run.vae, to_pixels, mesh),
        decoded_encoders(config.encoders),
      )
      memorisation = check_memorisation(
        sample_fn,
        _neighbour_labels(request, config, labels),
        *(chosen.alphas[0], readers, space),
        k=request.neighbours,
        batch_size=batch_size,
        decode=decode,
        mesh=mesh,
      )
    report["neighbours"] = _save_neighbours(memorisation, request)
  return report


def _check_files(
  config: GeneratorConfig,
  workdir: str,
  request: Request,
  ema_decay: float | None,
) -> None:
  """Raises ConfigError for all files that a report would not find."""
  config = _requested_config(config, request, ema_decay)
  keys = _files_of(config.eval, *_wanted(config, request))
  places.check_there(config, workdir, keys)


def _wanted(config: GeneratorConfig, request: Request) -> tuple[bool, bool]:
  """Returns whether a report reads the encoders, and real images."""
  encoder = "fd_encoder" in config.eval.metrics or (
    request.neighbours > 0 and request.neighbour_space == "encoder"
  )
  return encoder, needs_reals(config) or request.neighbours > 0


def _files_of(chosen: GeneratorEval, encoder: bool, reals: bool) -> list[str]:
  """Returns patterns of the config's keys that name files of a report."""
  keys = ["vae.path", "eval.labels"]
  keys += ["encoders.*"] * encoder + ["data.*"] * reals
  return keys + [
    f"eval.{judge}.*"
    for judge, figures in _BY_NETWORK.items()
    if set(figures) & set(chosen.metrics)
  ]


def _requested_config(
  config: GeneratorConfig, request: Request, ema_decay: float | None
) -> GeneratorConfig:
  """Returns the run's config with the requested values, checked."""
  given = {
    "alphas": None if request.alphas is None else tuple(request.alphas),
    "metrics": None if request.metrics is None else tuple(request.metrics),
    "num_samples": request.count(config.model.num_classes),
    "labels": request.labels,
    "label_order": request.label_order,
    "pixels": request.pixels,
    "batch_size": request.batch_size,
    "ema_decay": ema_decay,
    "inception": request.judge("inception", config.eval.inception),
    "dinov2": request.judge("dinov2", config.eval.dinov2),
    "classifier": request.judge("classifier", config.eval.classifier),
  }
  evaluation = dataclasses.replace(
    config.eval, **{k: v for k, v in given.items() if v is not None}
  )
  # A metric may be asked for that the training did not rank by.
  checkpoints = dataclasses.replace(config.checkpoint, best_metric="")
  config = dataclasses.replace(config, eval=evaluation, checkpoint=checkpoints)
  config.check()
  if not evaluation.metrics:
    raise config_lib.ConfigError(
      f"eval.metrics is empty: ask for some of {EVAL_METRICS}"
    )
  return config


def report_on_weights(
  weights: str, request: Request, *, vae: str = ""
) -> dict[str, Any]:
  """Computes figures of a generator's weights, ours or the release's.

  Args:
    weights: their folder.
    request: what to compute; figures against reference statistics only.
    vae: the autoencoder of its latents, see open_artifact.

  Returns:
    The report, as `report_on_run` has it.

  Raises:
    ConfigError: arguments that do not fit.
    ArtifactError: weights that can't be loaded.
  """
  # 1. The generator, and what is asked of it.
  alphas = (1.0,) if request.alphas is None else tuple(request.alphas)
  for alpha in alphas:
    if not alpha >= 1:
      raise config_lib.ConfigError(f"alpha={alpha} must be at least 1")
  require(judge_inputs(_metrics(request), _judges(request)), None)
  mesh = sharding.make_mesh()
  generator = open_artifact(weights, vae, mesh, decoded=True)
  if generator.task.condition_shape:
    raise config_lib.ConfigError(
      f"{weights} is of a generator of conditions, which are those of held-out "
      "images: give its run, --from=WORKDIR"
    )
  count = request.count(generator.num_classes)
  count = options.NUM_SAMPLES if count is None else count
  with naming("labels"):
    if request.labels:
      labels = read_labels(
        request.labels,
        num_classes=generator.num_classes,
        count=request.num_samples or None,
      )
    else:
      labels = balanced_labels(count, generator.num_classes)
  drawing = _Drawing(
    alphas, request.label_order or "given", request.pixels or "truncate"
  )
  labels = in_order(labels, drawing.label_order)
  # 2. The evaluators; a mistake shows before anything is generated.
  evaluators, facts = _by_files(
    request,
    count=len(labels),
    resolution=image_size(generator.task.sample_shape, generator.vae),
    mesh=mesh,
  )
  # 3. Figures.
  seed = request.seed or 0
  sample_fn = make_sampler(generator.task, mesh, seed)
  report = {
    **generator.provenance,
    "seed": seed,
  }
  report |= _score(
    evaluators,
    sample_fn(generator.params),
    labels,
    request,
    alphas=alphas,
    batch_size=pad_to_mesh(request.batch_size or options.BATCH_SIZE, mesh),
    to_pixels=make_pixels(make_decoder(generator.vae, mesh), drawing.pixels),
  )
  metrics = _metrics(request)
  conditions = _conditions(request, facts, metrics, drawing)
  return report | {"judges": facts, "baseline": {}} | conditions


def report_on_images(path: str, request: Request) -> dict[str, Any]:
  """Computes figures of images that were made elsewhere.

  Args:
    path: a folder, or an .npz in ADM's format; see sample_files.open_images.
    request: what to compute; figures against reference statistics only.

  Returns:
    The report, as `report_on_run` has it; its only result is that of 'images'.

  Raises:
    ConfigError: arguments or images that do not fit.
    ArtifactError: a network that can't be loaded.
  """
  storage.check_local("images", path)
  mesh = sharding.make_mesh()
  with naming("images"):
    images = open_images(path)
  if request.num_samples not in (None, 0, len(images)):
    raise config_lib.ConfigError(
      f"num_samples={request.num_samples}, but {path} holds {len(images)} "
      "images: all of them are scored, leave it out"
    )
  require(judge_inputs(_metrics(request), _judges(request)), None)
  evaluators, facts = _by_files(
    request, count=len(images), resolution=images.shape[0], mesh=mesh
  )
  report: dict[str, Any] = {"images": path, "resolution": images.shape[0]}
  with naming("images"):
    report |= _score(
      evaluators,
      lambda labels, alpha, index: sharding.put_batch(
        images.pixels(index), mesh
      ),
      np.zeros(len(images), np.int32),
      request,
      alphas=(1.0,),
      batch_size=pad_to_mesh(request.batch_size or options.BATCH_SIZE, mesh),
      to_pixels=lambda pixels: pixels,  # pyright: ignore[reportArgumentType]
    )
  report["results"] = {"images": report["results"].pop(1.0)}
  conditions = _conditions(request, facts, _metrics(request), None)
  return report | {"judges": facts, "baseline": {}} | conditions


def _metrics(request: Request) -> tuple[str, ...]:
  """Returns the figures that are computed without a config.

  Raises:
    ConfigError: one that needs a run.
  """
  valid = [n for group in JUDGED_METRICS.values() for n in group]
  names = options.METRICS if request.metrics is None else tuple(request.metrics)
  for name in names:
    if name not in valid:
      raise config_lib.ConfigError(
        f"metrics={name!r} needs a run (--from=WORKDIR): valid options are "
        f"{valid}"
      )
  return names


def _judges(request: Request) -> dict[str, Any]:
  """Returns the networks that judge; ConfigError if one is missing."""
  none = Judge(path="", reference="")
  judges = {name: request.judge(name, none) for name in JUDGED_METRICS}
  check_judges(_metrics(request), judges)
  return judges


def _by_files(
  request: Request, *, count: int, resolution: int, mesh: Mesh
) -> tuple[list[Evaluator], dict[str, Any]]:
  """Makes evaluators against reference statistics, without a config."""
  judged = network_evaluators(
    _metrics(request),
    _judges(request),
    count=count,
    seed=request.seed or 0,
    resolution=resolution,
    crop=None,
    mesh=mesh,
    shuffle=request.shuffle,
  )
  evaluators = [entry.evaluator for entry in judged.values()]
  return evaluators, {name: entry.facts for name, entry in judged.items()}


def _conditions(
  request: Request,
  facts: Mapping[str, Any],
  metrics: Sequence[str],
  drawing: _Drawing | GeneratorEval | None,
) -> dict[str, Any]:
  """A report's 'protocol', or 'pixels' and 'label_order' if not as usual.

  Args:
    request: what was asked for.
    facts: of the networks and statistics.
    metrics: that were computed.
    drawing: None for images that were made elsewhere.
  """
  names = () if drawing is None else _Drawing._fields
  used = {name: getattr(drawing, name) for name in names}
  if not request.protocol:
    usual = _Drawing._field_defaults
    return {k: v for k, v in used.items() if v != usual.get(k, v)}
  if drawing is not None:
    used["per_class"] = PROTOCOLS[request.protocol].per_class
  reference = facts.get("inception", {}).get("reference")
  if reference:
    digest = hashlib.sha256(epath.Path(reference["path"]).read_bytes())
    reference = reference | {"sha256": digest.hexdigest()}
  return {
    "protocol": described(
      request.protocol, samples=used, metrics=metrics, reference=reference
    )
  }


def _neighbour_labels(
  request: Request, config: GeneratorConfig, labels: np.ndarray
) -> np.ndarray:
  """Returns the fewest balanced labels that are at least as many as asked for.

  Of conditions `labels`, which go with them, as often as need be.
  """
  count, num_classes = request.neighbour_samples, config.model.num_classes
  if config.data.conditions:
    return np.resize(labels, count)
  return balanced_labels(-(-count // num_classes) * num_classes, num_classes)


def _score(
  evaluators: Sequence[Evaluator],
  sample_fn: SampleFn,
  labels: np.ndarray,
  request: Request,
  *,
  alphas: Sequence[float],
  batch_size: int,
  to_pixels: PixelsFn,
) -> dict[str, Any]:
  """Scores the samples; writes them and the plot over alpha if asked."""
  if request.samples_out:
    path = epath.Path(request.samples_out)
    paths = [path]
    if len(alphas) > 1:
      paths = [path.with_name(f"{path.stem}_alpha_{a:g}.npz") for a in alphas]
    evaluators = [*evaluators, SampleWriter(paths, labels)]
  start = time.perf_counter()
  results = evaluate(
    evaluators, sample_fn, labels, alphas, batch_size, to_pixels=to_pixels
  )
  seconds = time.perf_counter() - start
  if len(alphas) > 1 and processes.is_first():
    drawn = any(
      name.startswith(("fid", "fd_", "inception_score"))
      for name in results[alphas[0]]
    )
    if drawn:
      plot_alphas(results, request.beside("_alphas.png"))
      logger.info("Wrote %s.", request.beside("_alphas.png"))
  return {"num_samples": len(labels), "seconds": seconds, "results": results}


def _save_neighbours(found: Memorisation, request: Request) -> dict[str, Any]:
  """Writes the pictures; returns the report's entry."""
  pictures = [
    request.beside("_neighbours.png"),
    request.beside("_nearest_distances.png"),
  ]
  if processes.is_first():
    save_image(found.picture, pictures[0])
    plot_nearest_distances(*found.nearest, pictures[1], space=found.space)
    logger.info("Wrote %s and %s.", *pictures)
  return {
    "space": found.space,
    "k": request.neighbours,
    "training_images": found.neighbours.count,
    "shown_samples": found.shown.tolist(),
    **found.summary,
  }
