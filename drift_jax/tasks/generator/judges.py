"""Networks that judge images, and the evaluators that a config asks for."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from drift_jax import config as config_lib
from drift_jax.metrics.batches import PixelsFn
from drift_jax.metrics.errors import EvaluationError
from drift_jax.metrics.evaluators import Evaluator, FeatureFn, FrechetEvaluator
from drift_jax.metrics.frechet import check_frechet_width
from drift_jax.metrics.generation import balanced_labels, read_labels
from drift_jax.metrics.images import Images, to_rgb
from drift_jax.metrics.network import NetworkEvaluator
from drift_jax.metrics.reference import ReferenceStats, load_reference
from drift_jax.metrics.small_sets import (
  CoverageEvaluator,
  DuplicatesEvaluator,
  LabelAccuracyEvaluator,
)
from drift_jax.system import sharding, storage
from drift_jax.system.errors import naming
from drift_jax.tasks.generator.config import (
  JUDGED_METRICS,
  GeneratorConfig,
  GeneratorEval,
  Judge,
)
from drift_jax.tasks.generator.setup import decoded_encoders
from drift_jax.training import artifacts
from drift_jax.training import step as step_lib
from drift_jax.training.frozen import decoding
from drift_jax.training.inputs import LATENTS, Readers
from drift_jax.training.run import pad_to_mesh

_KINDS = ("inception", "vit")


def on_mesh(
  apply: Callable[[Any, jax.Array], Any], params: Any, mesh: Mesh
) -> Callable[[Images], Any]:
  """Jits a frozen network; its batches and outputs are split over the mesh.

  Args:
    apply: (params, inputs [B, ...]) -> arrays [B, ...].
    params: its parameters, on the mesh.
    mesh: over which the batch is split.

  Returns:
    Inputs [B, ...] on the mesh, or this process' part of them on the host ->
    arrays [B, ...] on the mesh.
  """
  jitted = jit_network(apply, params, mesh)

  def call(inputs: Images) -> Any:
    if isinstance(inputs, np.ndarray):
      inputs = sharding.put_batch(inputs, mesh)
    return jitted(params, inputs)

  return call


def jit_network(
  apply: Callable[[Any, jax.Array], Any], params: Any, mesh: Mesh
) -> Any:
  """Jitted (params, inputs) -> outputs, for params that lie like these."""
  return jax.jit(sharding.over_batch(apply, mesh, sharding.specs(params)))


def make_decoder(
  vae: artifacts.Artifact | None, mesh: Mesh
) -> Callable[[Images], Images]:
  """Samples -> images [B, H, W, C] on the mesh, decoded if there is a VAE."""
  if vae is None:
    return lambda samples: samples
  return on_mesh(decoding(vae), vae.params, mesh)


def make_pixels(decode: Callable[[Images], Images]) -> PixelsFn:
  """Samples -> 8-bit RGB images, on the mesh; decode is `make_decoder`'s."""
  return lambda samples: to_rgb(decode(samples))


def load_judge(path: str, mesh: Mesh) -> artifacts.Artifact:
  """Loads a network that judges 8-bit RGB images, a copy on every device.

  Raises:
    ArtifactError: for anything that can't be loaded.
  """
  artifact = artifacts.load(path)
  if artifact.kind not in _KINDS:
    raise artifacts.ArtifactError(
      f"{path} holds a model of kind {artifact.kind!r}, want one of "
      f"{list(_KINDS)}: python -m drift_jax.tools.convert_weights writes them"
    )
  params = jax.device_put(artifact.params, sharding.replicated(mesh))
  return dataclasses.replace(artifact, params=params)


def is_published(artifact: artifacts.Artifact) -> bool:
  """Returns whether these are the published weights of FID."""
  source = artifact.metadata.get("source") or {}
  return artifact.kind == "inception" and source.get("published") is True


def name_of(artifact: artifacts.Artifact) -> str:
  """Names a network as reports and statistics record it."""
  if artifact.kind == "inception":
    weights = "published" if is_published(artifact) else "other"
    return f"inception-v3 pool3, {weights} weights"
  source = artifact.metadata.get("source") or {}
  name = source.get("family", artifact.kind)
  return f"{name}, weights of {source.get('location', 'unknown origin')}"


def network_fn(artifact: artifacts.Artifact, mesh: Mesh) -> Callable[..., Any]:
  """8-bit RGB images [B, H, W, 3] -> (features [B, D], logits if it has any).

  On the mesh; images may be this process' part of them on the host.
  """

  return on_mesh(judging(artifact), artifact.params, mesh)


def judging(
  artifact: artifacts.Artifact,
) -> Callable[[Any, jax.Array], tuple[jax.Array, ...]]:
  """(params, 8-bit RGB images) -> (features, logits if it has any)."""

  def apply(params: Any, pixels: jax.Array) -> tuple[jax.Array, ...]:
    out: Any = step_lib.apply(artifact.module, params, pixels)
    if artifact.kind == "inception":
      return out.pool3, out.logits_unbiased
    return (out,)

  return apply


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
    judge = judges[name]
    artifact = _judge(name, judge, wanted, mesh)
    facts: dict[str, Any] = {
      "path": judge.path,
      "sha256": artifact.sha256,
      "source": artifact.metadata.get("source"),
    }
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
      )
    made[name] = Judged(evaluator, facts)
  return made


def _judge(
  name: str, judge: Judge, wanted: Sequence[str], mesh: Mesh
) -> artifacts.Artifact:
  """Loads the network of eval.NAME, and checks that its figures mean it."""
  try:
    artifact = load_judge(judge.path, mesh)
  except artifacts.ArtifactError as error:
    raise artifacts.ArtifactError(f"eval.{name}: {error}") from error
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


def _reference(path: str, **of: Any) -> ReferenceStats:
  """Loads statistics of real images; `of` says what they must be of."""
  storage.check_local("reference statistics", path)
  try:
    return load_reference(path, **of)
  except FileNotFoundError as error:
    raise config_lib.ConfigError(
      f"there are no reference statistics {path}: python -m "
      "drift_jax.tools.reference_stats makes them, and public .npz files for "
      "ImageNet at 256 px are read too (docs/evaluation.md)"
    ) from error


def needs_reals(chosen: GeneratorEval) -> bool:
  """Returns whether an evaluation reads real images."""
  judged = [n for names in JUDGED_METRICS.values() for n in names]
  return any(name not in judged for name in chosen.metrics) or (
    chosen.num_samples == 0 and not chosen.labels
  )


def evaluation_labels(
  chosen: GeneratorEval, num_classes: int, readers: Readers | None
) -> np.ndarray:
  """Labels of the images that an evaluation generates.

  They are those of eval.labels; else balanced, or those of the held-out images
  if eval.num_samples is 0.

  Raises:
    ValueError: a list of labels that does not fit.
  """
  if chosen.labels:
    return read_labels(
      chosen.labels, num_classes=num_classes, count=chosen.num_samples or None
    )
  if chosen.num_samples == 0:
    assert readers is not None
    return np.asarray(readers.test().labels, np.int32)
  return balanced_labels(chosen.num_samples, num_classes)


def reference_crop(settings: config_lib.Data) -> str:
  """Names the crop of held-out images as reference statistics record it."""
  if settings.source.startswith(LATENTS) or settings.crop == "random":
    return "center"
  return settings.crop


def image_size(
  sample_shape: tuple[int, ...], vae: artifacts.Artifact | None
) -> int:
  """Returns the side in pixels of the images that samples become."""
  if vae is None:
    return sample_shape[0]
  module: Any = vae.module
  return sample_shape[0] * module.downsampling


def run_evaluators(
  config: GeneratorConfig,
  encoders: Mapping[str, artifacts.Artifact],
  readers: Readers | None,
  labels: np.ndarray,
  vae: artifacts.Artifact | None,
  mesh: Mesh,
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

  Raises:
    ArtifactError, ConfigError: see `network_evaluators`.
    ValueError: figures that the data don't allow.
  """
  judged = network_evaluators(
    config.eval.metrics,
    {"inception": config.eval.inception, "dinov2": config.eval.dinov2},
    count=len(labels),
    seed=config.seed,
    resolution=image_size((config.model.input_size,), vae),
    crop=reference_crop(config.data),
    mesh=mesh,
  )
  return [
    *(entry.evaluator for entry in judged.values()),
    *_by_reals(config, encoders, readers, labels, vae, mesh),
  ], {name: entry.facts for name, entry in judged.items()}


def _by_reals(
  config: GeneratorConfig,
  encoders: Mapping[str, artifacts.Artifact],
  readers: Readers | None,
  labels: np.ndarray,
  vae: artifacts.Artifact | None,
  mesh: Mesh,
) -> list[Evaluator]:
  """Makes the evaluators that compare with held-out images."""
  chosen = config.eval
  settings = {"labels": labels, "seed": config.seed}

  def frechet(
    name: str, features: FeatureFn, train: Any, test: Any
  ) -> Evaluator:
    samples = (mesh.size, *train.sample_shape)
    width = jax.eval_shape(
      features, jax.ShapeDtypeStruct(samples, np.float32)
    ).shape[1]
    try:
      check_frechet_width(width, name)
    except EvaluationError as error:
      raise config_lib.ConfigError(
        f"eval.metrics holds {name!r}: {error}; ask for a distance in a "
        "network's features: 'fid' or 'fd_inception' (eval.inception), "
        "'fd_dinov2' (eval.dinov2)"
      ) from error
    return FrechetEvaluator(
      name,
      features,
      train,
      test,
      batch_size=pad_to_mesh(chosen.batch_size, mesh),
      **settings,
    )

  def duplicates(train: Any, test: Any) -> Evaluator:
    if train.grid is None:
      raise config_lib.ConfigError(
        "eval.metrics holds 'duplicates', which compares pixels, but the data "
        f"are latents (data.source={config.data.source!r}): remove it"
      )
    return DuplicatesEvaluator(train, test, grid=train.grid)

  def fd_encoder(train: Any, test: Any) -> Evaluator:
    decoded = decoded_encoders(config.encoders)
    features = encoder_fn(encoders, decoded, vae, mesh)
    return frechet("fd_encoder", features, train, test)

  factories: dict[str, Callable[[Any, Any], Evaluator]] = {
    "fd_encoder": fd_encoder,
    "fd_pixel": functools.partial(frechet, "fd_pixel", flatten_fn(mesh)),
    "coverage": functools.partial(
      CoverageEvaluator, k=chosen.coverage_k, **settings
    ),
    "label_accuracy": LabelAccuracyEvaluator,
    "duplicates": duplicates,
  }
  wanted = [name for name in chosen.metrics if name in factories]
  if not wanted:
    return []
  assert readers is not None
  return [factories[n](readers.train, readers.test()) for n in wanted]


def encoder_fn(
  encoders: Mapping[str, artifacts.Artifact],
  decoded: Collection[str],
  vae: artifacts.Artifact | None,
  mesh: Mesh,
) -> FeatureFn:
  """Samples -> pooled features of the first autoencoder among the encoders.

  Args:
    encoders: of the run.
    decoded: names of those that read decoded samples.
    vae: decodes them, or None.
    mesh: where the networks run.

  Raises:
    ConfigError: there is none.
  """
  names = [name for name, a in encoders.items() if a.kind == "mae"]
  if not names:
    raise config_lib.ConfigError(
      "'fd_encoder' and neighbours in the space 'encoder' need an encoder of "
      f"kind 'mae'; encoders: {[(n, a.kind) for n, a in encoders.items()]}"
    )
  encoder = encoders[names[0]]
  pooled = functools.partial(step_lib.apply, encoder.module, method="pooled")
  if names[0] not in decoded:
    return on_mesh(pooled, encoder.params, mesh)
  assert vae is not None  # the config's checks ask for vae.path
  decode = decoding(vae)
  return on_mesh(
    lambda params, samples: pooled(params[0], decode(params[1], samples)),
    (encoder.params, vae.params),
    mesh,
  )


def flatten_fn(mesh: Mesh) -> FeatureFn:
  """Samples [B, H, W, C] -> [B, H W C]."""
  return on_mesh(lambda _, x: x.reshape(len(x), -1), None, mesh)
