"""From a config to the objects of a run that is tuned by Frechet distances."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from drift_jax.data.feed import LabelFeed
from drift_jax.data.order import DistinctStream
from drift_jax.data.readers import Reader
from drift_jax.drift import frechet
from drift_jax.metrics.evaluators import features_of
from drift_jax.metrics.frechet import FeatureStream
from drift_jax.metrics.reference import (
  Provenance,
  ReferenceStats,
  load_reference,
  save_reference,
)
from drift_jax.system import processes, sharding, storage
from drift_jax.system.console import logger
from drift_jax.system.errors import ConfigError, naming
from drift_jax.tasks.generator import fd_step
from drift_jax.tasks.generator.config import GeneratorConfig, fd_networks
from drift_jax.tasks.generator.judges import image_size, load_judge, on_mesh
from drift_jax.tasks.generator.setup import decoded_encoders, init_generator
from drift_jax.tasks.generator.step import VAE_KEY, GeneratorTask
from drift_jax.training import artifacts
from drift_jax.training.run import Recipe, pad_to_mesh

# Samples for each dimension that moments must be of: with one, covariances are
# of full rank and tell nothing; the distance's bias falls as their inverse.
PER_DIMENSION = 2
# Folder of a workdir with the moments of real features.
REFERENCES = "fd_references"


def load_judges(
  config: GeneratorConfig, mesh: Mesh
) -> dict[str, artifacts.Artifact]:
  """Loads the networks of config.fd_loss that have a path.

  Raises:
    ArtifactError: naming the key, for anything that can't be loaded.
  """
  found = {}
  for name, path in fd_networks(config).items():
    try:
      found[name] = load_judge(path, mesh)
    except artifacts.ArtifactError as error:
      raise artifacts.ArtifactError(f"fd_loss.{name}: {error}") from error
  return found


class Tuning:
  """What a tuned run has in place of drifting: spaces, feed and recipe."""

  def __init__(
    self,
    config: GeneratorConfig,
    base: GeneratorTask,
    encoders: Mapping[str, artifacts.Artifact],
    judges: Mapping[str, artifacts.Artifact],
    vae: artifacts.Artifact | None,
    mesh: Mesh,
  ):
    """Describes the spaces; nothing is read.

    Args:
      config: of the run.
      base: the generator's task.
      encoders, judges, vae: networks on the mesh, or shapes for parameters.
      mesh: where it runs.

    Raises:
      ConfigError: two spaces of one name, or a population too small for the
        dimensions of one.
    """
    self._config, self._mesh, self._vae = config, mesh, vae
    in_loss = {n: a for n, a in encoders.items() if config.encoders[n].in_loss}
    for name in (fd_step.SAMPLE, *judges):
      if name in in_loss:
        raise ConfigError(
          f"encoders.{name}: with fd_loss.population this is the name of "
          "another feature space; choose another"
        )
    self._networks = {**in_loss, **judges}
    self._params = {name: a.params for name, a in self._networks.items()}
    module: Any = None
    if vae is not None:
      self._params[VAE_KEY], module = vae.params, vae.module
    self.task = fd_step.FdTask(
      base=base,
      spaces=fd_step.Spaces(
        encoders={name: a.module for name, a in in_loss.items()},
        decoded=decoded_encoders(config.encoders) & in_loss.keys(),
        judges={name: a.module for name, a in judges.items()},
        sample=config.features.sample,
        vae=module,
      ),
      population=config.fd_loss.population,
      trust=config.fd_loss.trust,
    )
    with naming("fd_loss"):
      shapes = jax.eval_shape(
        self.task.spaces,
        self._params,
        jax.ShapeDtypeStruct((1, *base.sample_shape), np.float32),
      )
    self._widths = {name: x.shape[1] for name, x in shapes.items()}
    for name, width in self._widths.items():
      _check_count(
        "samples of fd_loss.population", config.fd_loss.population, name, width
      )

  def feed(self, reader: Reader) -> LabelFeed:
    """Makes the feed of labels.

    Raises:
      ConfigError: labels that the processes can't share, or too few images for
        the dimensions of a space.
    """
    for name, width in self._widths.items():
      if not self._reference(name):
        count = self._num_reals(reader)
        source = "training images (data.source, fd_loss.reals)"
        _check_count(source, count, name, width)
    with naming("data"):
      return LabelFeed(
        reader.labels,
        seed=self._config.seed,
        num_labels=self._config.batch.labels,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
      )

  def sums(self) -> dict[str, str]:
    """SHA-256 of all weights but the encoders'."""
    found = {
      f"fd_loss.{name}": self._networks[name].sha256
      for name in fd_networks(self._config)
    }
    if self.task.trust:
      start = artifacts.opened(self._config.init_from).artifact
      found["init_from"] = start.sha256
    return found

  def prepare(
    self,
    reader: Reader,
    workdir: epath.Path,
    start_params: Callable[[], Any] | None,
  ) -> tuple[Recipe, Callable[[], Any]]:
    """Returns how the generator is tuned, and what gives its first parameters.

    Args:
      reader: training images.
      workdir: see references.
      start_params: reads the parameters of init_from.

    Raises:
      ArtifactError: parameters that can't be loaded.
      ConfigError: see references.
    """
    assert start_params is not None  # the config's checks ask for init_from
    start = None
    if self.task.trust:
      params = start_params()
      shardings = sharding.infer_sharding(params, self._mesh)
      start = jax.device_put(params, shardings)
    recipe = self._recipe(self.references(reader, workdir), start)
    return recipe, start_params if start is None else lambda: start

  def _recipe(
    self, references: Mapping[str, frechet.Reference], start: Any
  ) -> Recipe:
    base: Any = self.task.base.generator
    spaces = ", ".join(f"{name} ({n})" for name, n in self._widths.items())
    return Recipe(
      name="generator",
      init_params=init_generator(self.task.base),
      init_drift=functools.partial(fd_step.init_moments, references),
      step=functools.partial(fd_step.train_step, task=self.task),
      batch=fd_step.LabelBatch,
      frozen=fd_step.Frozen(self._params, references, start),
      computed=f"{np.dtype(base.dtype)}, Frechet distances in {spaces}, "
      f"remat: {base.remat}",
    )

  def abstract(self, params: Any) -> Recipe:
    """The recipe without data, for parameters of these shapes."""

    def real(width: int) -> frechet.Reference:
      shapes = ((width,), (width, width), (width,), ())
      return frechet.Reference(
        *(jax.ShapeDtypeStruct(s, np.float32, sharding=whole) for s in shapes)
      )

    whole = sharding.replicated(self._mesh)
    shardings = sharding.infer_sharding(params, self._mesh)
    start = sharding.abstract(params, shardings) if self.task.trust else None
    return self._recipe({n: real(w) for n, w in self._widths.items()}, start)

  def references(
    self, reader: Reader, workdir: epath.Path
  ) -> dict[str, frechet.Reference]:
    """Moments of real features on the mesh, those of the run's first start.

    Of as many training images as fd_loss.reals, as evaluations read them; or
    from a file that fd_loss.NAME.reference names. They are kept in the workdir
    unless that is in a bucket: there, each start takes them again.

    Raises:
      ConfigError: a file that can't be used, or of too few images.
    """
    found = {}
    for name, width in self._widths.items():
      kept = workdir / REFERENCES / f"{name}.npz"
      stats = self._given(name, kept)
      if stats is None:
        stats = self._measured(name, reader)
        if processes.is_first() and not storage.is_remote(kept):
          save_reference(kept, stats)
      if stats.count is not None:
        _check_count("images of the statistics", stats.count, name, width)
      found[name] = frechet.reference(stats.mean, stats.covariance())
    return jax.device_put(found, sharding.replicated(self._mesh))

  def _reference(self, name: str) -> str:
    """The file of statistics that the config names for a space, or ''."""
    if name not in fd_networks(self._config):
      return ""
    return getattr(self._config.fd_loss, name).reference

  def _num_reals(self, reader: Reader) -> int:
    count = len(reader.labels)
    return min(self._config.fd_loss.reals or count, count)

  def _given(self, name: str, kept: epath.Path) -> ReferenceStats | None:
    """Statistics from a file, if there is one."""
    path = self._reference(name)
    if not path:
      local = not storage.is_remote(kept)
      if not (local and processes.from_first(kept.exists)):
        return None
      path = str(kept)
    with naming(f"fd_loss.{name}"):
      try:
        return load_reference(path, dimensions=self._widths[name])
      except FileNotFoundError as error:
        raise ConfigError(
          f"fd_loss.{name}.reference={path!r} is not there: python -m "
          "drift_jax.tools.reference_stats makes it; '' takes it from the data"
        ) from error

  def _measured(self, name: str, reader: Reader) -> ReferenceStats:
    """Statistics of training images."""
    config, count = self._config, self._num_reals(reader)
    order = DistinctStream(len(reader.labels), 1, 1, config.seed, "fd_reals")
    chosen = order.take(0, count)
    chosen.sort()  # neighbours in a file are read together
    spaces = self.task.spaces

    def apply(params: Any, images: jax.Array) -> jax.Array:
      return spaces(params, images)[name]

    stream = FeatureStream()
    rows = features_of(
      on_mesh(apply, self._params, self._mesh),
      reader.fixed,
      chosen,
      batch_size=pad_to_mesh(config.eval.batch_size, self._mesh),
    )
    for features in rows:
      stream.update(features)
    logger.info("fd_loss: moments of %d images in %s.", len(chosen), name)
    network = self._networks.get(name)
    return ReferenceStats.from_stats(
      stream.result(),
      Provenance(
        source=config.data.source,
        split=config.data.train_split,
        crop=config.data.crop,
        resolution=image_size(reader.sample_shape, self._vae),
        network=name,
        network_sha256="0" * 64 if network is None else network.sha256,
      ),
    )


def _check_count(source: str, count: int, name: str, width: int) -> None:
  """Raises ConfigError for moments of too few samples."""
  least = PER_DIMENSION * width
  if count < least:
    raise ConfigError(
      f"{source} are {count}, too few for moments of the {width} dimensions of "
      f"the space {name!r}: give at least {least}, or leave the space out of "
      "the loss"
    )
