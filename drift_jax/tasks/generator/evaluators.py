"""The evaluators that a config's eval.metrics names.

To add a figure of generated and held-out images: write its evaluator in
drift_jax.metrics (small_sets.py has examples), name it in EVAL_METRICS of
tasks/generator/config.py, and add a function to BY_REALS here.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from drift_jax import config as config_lib
from drift_jax.metrics.evaluators import Evaluator, FeatureEvaluator, JudgeFn
from drift_jax.metrics.frechet import check_frechet_width
from drift_jax.metrics.generation import balanced_labels, in_order, read_labels
from drift_jax.metrics.small_sets import (
  DuplicatesEvaluator,
  LabelAccuracyEvaluator,
)
from drift_jax.system import devices, storage
from drift_jax.system.errors import EvaluationError, naming
from drift_jax.tasks.generator.config import (
  CLASSIFIER_METRICS,
  JUDGED_METRICS,
  GeneratorConfig,
  GeneratorEval,
  Judge,
  Network,
)
from drift_jax.tasks.generator.judges import (
  are_images,
  classifier_fn,
  encoder_fn,
  flatten_fn,
  image_size,
  is_published,
  load_judge,
  network_fn,
)
from drift_jax.tasks.generator.samplers import evenly
from drift_jax.tasks.generator.setup import decoded_encoders
from drift_jax.training import artifacts, inputs
from drift_jax.training.inputs import LATENTS, Readers
from drift_jax.training.run import pad_to_mesh

# Of a feature that coverage keeps: as it came, and joined to the others.
_BYTES = 8


# Figures of networks that look at images.
_OF_IMAGES = [name for names in JUDGED_METRICS.values() for name in names]


class Judged(NamedTuple):
  """An evaluator in a network's features, and facts on it, fit for JSON."""

  evaluator: Evaluator
  facts: dict[str, Any]


def network_evaluators(
  names: Sequence[str],
  judges: Mapping[str, Judge],
  *,
  count: int,
  seed: int,
  resolution: int,
  crop: str | None,
  mesh: Mesh,
  shuffle: bool = True,
) -> dict[str, Judged]:
  """Makes the evaluators that compare with reference statistics.

  Args:
    names: figures that are asked for; those of other evaluators are left out.
    judges: {'inception' or 'dinov2': where it and its statistics are}.
    count: number of images that will be judged.
    seed: see NetworkEvaluator.
    resolution, crop: how the images are cut; the statistics must have the same.
      None for an unknown crop.
    mesh: where the networks run.
    shuffle: see InceptionScore.

  Returns:
    {'inception' or 'dinov2': its evaluator}, where a figure needs it.

  Raises:
    ArtifactError: a network that can't be loaded.
    ConfigError: statistics that can't be used, or figures that these weights
      have no right to.
  """
  made = {}
  for name, figures in JUDGED_METRICS.items():
    wanted = [metric for metric in names if metric in figures]
    if not wanted:
      continue
    from drift_jax.metrics.network import NetworkEvaluator  # seldom wanted

    judge = judges[name]
    artifact = _judge(name, judge, wanted, mesh)
    facts = _facts(judge, artifact)
    network = network_fn(artifact, mesh)
    pixels = (mesh.size, resolution, resolution, 3)
    features, *_ = jax.eval_shape(
      network, jax.ShapeDtypeStruct(pixels, np.uint8)
    )
    with naming(f"eval.{name}"):
      reference = None
      if judge.reference:
        reference = _reference(
          judge.reference,
          dimensions=features.shape[1],
          resolution=resolution,
          crop=crop,
          network_sha256=artifact.sha256,
        )
        facts["reference"] = {
          "path": judge.reference,
          "count": reference.count,
          "provenance": reference.provenance
          and dataclasses.asdict(reference.provenance),
        }
      evaluator = NetworkEvaluator(
        name,
        network,
        wanted,
        reference,
        count=count,
        seed=seed,
        shuffle=shuffle,
      )
    made[name] = Judged(evaluator, facts)
  return made


def _facts(network: Network, artifact: artifacts.Artifact) -> dict[str, Any]:
  return {
    "path": network.path,
    "sha256": artifact.sha256,
    "source": artifact.metadata.get("source"),
  }


def _loaded(
  name: str, network: Network, mesh: Mesh, *kinds: Sequence[str]
) -> artifacts.Artifact:
  """Loads the network of eval.NAME."""
  try:
    return load_judge(network.path, mesh, *kinds)
  except artifacts.ArtifactError as error:
    raise artifacts.ArtifactError(f"eval.{name}: {error}") from error


def _judge(
  name: str, judge: Judge, wanted: Sequence[str], mesh: Mesh
) -> artifacts.Artifact:
  """Loads the network of eval.NAME, and checks that its figures mean it."""
  artifact = _loaded(name, judge, mesh)
  source = artifact.metadata.get("source") or {}
  found = source.get("family", artifact.kind)
  if found != name:
    raise artifacts.ArtifactError(
      f"eval.{name}.path={judge.path!r} holds a model {found!r}, want {name!r}"
    )
  named = [figure for figure in wanted if not figure.startswith("fd_")]
  if named and not is_published(artifact):
    raise config_lib.ConfigError(
      f"eval.metrics holds {named}, but eval.inception.path={judge.path!r} are "
      "not the published weights, whose figures alone have these names: "
      "convert those, or ask for 'fd_inception'"
    )
  return artifact


def judge_inputs(
  names: Sequence[str],
  judges: Mapping[str, Judge],
  classifier: Network | None = None,
) -> list[inputs.Input]:
  """The networks and statistics that figures read, as `network_evaluators`."""
  wanted = []
  if classifier is not None and set(names) & set(CLASSIFIER_METRICS):
    wanted.append(inputs.frozen_input("eval.classifier", classifier.path))
  for name, figures in JUDGED_METRICS.items():
    asked = [metric for metric in names if metric in figures]
    if not asked:
      continue
    path, reference = judges[name].path, judges[name].reference
    wanted.append(inputs.frozen_input(f"eval.{name}", path))
    if reference:
      check = functools.partial(_find_statistics, name, reference, asked)
      wanted.append(inputs.Input(f"eval.{name}.reference", reference, check))
  return wanted


def _find_statistics(
  name: str, path: str, figures: Sequence[str]
) -> Sequence[Any]:
  """Raises ConfigError if statistics or their single features are missing."""
  from drift_jax.metrics.network import check_singles
  from drift_jax.metrics.reference import has_features

  with naming(f"eval.{name}"):
    check_singles(name, figures, _reading(path, has_features))
  return ()


def _reference(path: str, **of: Any) -> Any:
  """Loads statistics of real images; `of` says what they must be of."""
  from drift_jax.metrics.reference import load_reference  # seldom wanted

  return _reading(path, functools.partial(load_reference, **of))


def _reading(path: str, read: Callable[[str], Any]) -> Any:
  """What is read of a file of statistics; ConfigError if there is none."""
  storage.check_local("reference statistics", path)
  try:
    return read(path)
  except FileNotFoundError as error:
    raise config_lib.ConfigError(
      f"there are no reference statistics {path}: python -m "
      "drift_jax.tools.reference_stats makes them, and public .npz files for "
      "ImageNet at 256 px are read too (docs/evaluation.md)"
    ) from error


def needs_reals(config: GeneratorConfig) -> bool:
  """Returns whether an evaluation reads real images, or their conditions."""
  chosen = config.eval
  if config.data.conditions:
    return True
  return any(name not in _OF_IMAGES for name in chosen.metrics) or (
    chosen.num_samples == 0 and not chosen.labels
  )


def evaluation_labels(
  chosen: GeneratorEval, num_classes: int, readers: Readers | None
) -> np.ndarray:
  """Labels of the images that an evaluation generates.

  They are those of eval.labels; else balanced, or those of the held-out images
  if eval.num_samples is 0; in the order of eval.label_order. Where images have
  conditions, they are those of `evaluation_rows`.

  Raises:
    ValueError: a list of labels that does not fit.
  """
  if chosen.labels:
    labels = read_labels(
      chosen.labels, num_classes=num_classes, count=chosen.num_samples or None
    )
  elif (rows := evaluation_rows(chosen, readers)) is not None:
    assert readers is not None
    return readers.test().labels[rows].astype(np.int32)
  elif chosen.num_samples == 0:
    assert readers is not None
    labels = np.asarray(readers.test().labels, np.int32)
  else:
    labels = balanced_labels(chosen.num_samples, num_classes)
  return in_order(labels, chosen.label_order)


def evaluation_rows(
  chosen: GeneratorEval, readers: Readers | None
) -> np.ndarray | None:
  """Held-out images [n] whose conditions samples are of; None without any.

  All of them or, of eval.num_samples, evenly spaced ones, which repeat if there
  are fewer; in the order of eval.label_order.
  """
  if readers is None or readers.train.conditions is None:
    return None
  labels = readers.test().labels
  rows = evenly(len(labels), chosen.num_samples or len(labels))
  if chosen.label_order == "class":
    rows = rows[np.argsort(labels[rows], kind="stable")]
  return rows


def evaluation_conditions(
  chosen: GeneratorEval, readers: Readers | None
) -> dict[str, np.ndarray]:
  """{'conditions': those of `evaluation_labels`}; empty without any."""
  rows = evaluation_rows(chosen, readers)
  if rows is None:
    return {}
  assert readers is not None
  return {"conditions": readers.test().conditions[rows]}


def reference_crop(settings: config_lib.Data) -> str:
  """Names the crop of held-out images as reference statistics record it."""
  if settings.source.startswith(LATENTS) or settings.crop == "random":
    return "center"
  return settings.crop


def run_evaluators(
  config: GeneratorConfig,
  encoders: Mapping[str, artifacts.Artifact],
  readers: Readers | None,
  labels: np.ndarray,
  vae: artifacts.Artifact | None,
  mesh: Mesh,
  shuffle: bool = True,
) -> tuple[list[Evaluator], dict[str, Any]]:
  """Makes the evaluators of config.eval.metrics, and facts on their networks.

  Args:
    config: of the run.
    encoders: of 'fd_encoder'.
    readers: of real images; held-out ones are opened if a figure needs them.
      None if none does (`needs_reals`).
    labels: class index of each sample that will be generated.
    vae: decodes the samples, or None.
    mesh: where the networks run.
    shuffle: see InceptionScore.

  Raises:
    ArtifactError, ConfigError: see `network_evaluators`.
    ValueError: figures that the data don't allow.
  """
  of_images = [n for n in config.eval.metrics if n in _OF_IMAGES]
  if of_images and not are_images(config, vae):
    channels = config.model.out_channels
    raise config_lib.ConfigError(
      f"eval.metrics holds {of_images}, which look at images, but samples are "
      f"arrays of {channels} channels, which nothing decodes (vae.path=''): "
      "ask for 'fd_pixel', 'coverage' or 'fd_classifier'"
    )
  judged = network_evaluators(
    config.eval.metrics,
    {"inception": config.eval.inception, "dinov2": config.eval.dinov2},
    count=len(labels),
    seed=config.seed,
    resolution=image_size((config.model.input_size,), vae),
    crop=reference_crop(config.data),
    mesh=mesh,
    shuffle=shuffle,
  )
  evaluators = [entry.evaluator for entry in judged.values()]
  facts = {name: entry.facts for name, entry in judged.items()}
  compared = [name for name in config.eval.metrics if name in BY_REALS]
  seen = [name for name in config.eval.metrics if name in CLASSIFIER_METRICS]
  if compared or seen:
    assert readers is not None
    context = _Context(
      config=config,
      encoders=encoders,
      train=readers.train,
      test=readers.test(),
      labels=labels,
      vae=vae,
      mesh=mesh,
    )
    evaluators += [BY_REALS[name](context) for name in compared]
    if seen:
      artifact = _loaded("classifier", config.eval.classifier, mesh, ("mae",))
      facts["classifier"] = _facts(config.eval.classifier, artifact)
      evaluators.append(_by_classifier(seen, artifact, context))
  return evaluators, facts


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Context:
  """What evaluators that compare with held-out images are made of."""

  config: GeneratorConfig
  encoders: Mapping[str, artifacts.Artifact]
  train: Any
  test: Any
  labels: np.ndarray
  vae: artifacts.Artifact | None
  mesh: Mesh


def _in_features(
  name: str, figures: Sequence[str], network: JudgeFn, of: _Context
) -> Evaluator:
  samples = (of.mesh.size, *of.train.sample_shape)
  features, *_ = jax.eval_shape(
    network, jax.ShapeDtypeStruct(samples, np.float32)
  )
  width, count = features.shape[1], len(of.labels) + len(of.test.labels)
  try:
    for figure in figures:
      if figure.startswith("fd_"):
        check_frechet_width(width, figure)
      elif figure.startswith("coverage"):
        devices.check_fits(
          _BYTES * width * count,
          f"{figure}: {count} generated and held-out images are kept as {width}"
          f" features of {_BYTES} bytes",
          f"leave {figure} out of eval.metrics",
        )
  except EvaluationError as error:
    raise config_lib.ConfigError(
      f"eval.metrics holds {name!r}: {error}, or ask for figures in a "
      "network's features: 'fid', 'fd_inception' (eval.inception), 'fd_dinov2' "
      "(eval.dinov2), 'fd_classifier' (eval.classifier)"
    ) from error
  return FeatureEvaluator(
    name,
    network,
    figures,
    of.train,
    of.test,
    batch_size=pad_to_mesh(of.config.eval.batch_size, of.mesh),
    labels=of.labels,
    seed=of.config.seed,
    k=of.config.eval.coverage_k,
  )


def _fd_encoder(of: _Context) -> Evaluator:
  decoded = decoded_encoders(of.config.encoders)
  features = encoder_fn(of.encoders, decoded, of.vae, of.mesh)
  return _in_features(
    "fd_encoder", ["fd_encoder"], lambda x: (features(x),), of
  )


def _in_pixels(figure: str, of: _Context) -> Evaluator:
  flat = flatten_fn(of.mesh)
  return _in_features(figure, [figure], lambda x: (flat(x),), of)


def _by_classifier(
  figures: Sequence[str], artifact: artifacts.Artifact, of: _Context
) -> Evaluator:
  """Makes the evaluator of eval.classifier.

  Raises:
    ConfigError: samples or classes that are not the network's.
  """
  module: Any = artifact.module
  path, classes = of.config.eval.classifier.path, of.config.model.num_classes
  if "classifier_accuracy" in figures and module.num_classes != classes:
    raise config_lib.ConfigError(
      f"eval.classifier.path={path!r} knows {module.num_classes} classes, the "
      f"data have {classes}: leave 'classifier_accuracy' out of eval.metrics, "
      "or train one on these data"
    )
  shape = of.train.sample_shape
  with naming(f"eval.classifier.path={path!r} on samples of shape {shape}"):
    network = classifier_fn(artifact, of.mesh)
    return _in_features("classifier", figures, network, of)


def _label_accuracy(of: _Context) -> Evaluator:
  return LabelAccuracyEvaluator(of.train, of.test)


def _duplicates(of: _Context) -> Evaluator:
  if of.train.grid is None:
    raise config_lib.ConfigError(
      "eval.metrics holds 'duplicates', which compares pixels, but the data "
      f"are latents (data.source={of.config.data.source!r}): remove it"
    )
  return DuplicatesEvaluator(of.train, of.test, grid=of.train.grid)


# Figures of generated and held-out images.
BY_REALS: Mapping[str, Callable[[_Context], Evaluator]] = {
  "fd_encoder": _fd_encoder,
  "fd_pixel": functools.partial(_in_pixels, "fd_pixel"),
  "coverage": functools.partial(_in_pixels, "coverage"),
  "label_accuracy": _label_accuracy,
  "duplicates": _duplicates,
}
