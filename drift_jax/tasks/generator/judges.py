"""Frozen networks on a mesh: decoders, and networks that judge images."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from drift_jax import config as config_lib
from drift_jax.metrics.batches import PixelsFn
from drift_jax.metrics.evaluators import FeatureFn, JudgeFn
from drift_jax.metrics.images import Images, to_rgb
from drift_jax.system import options, sharding
from drift_jax.tasks.generator.config import GeneratorConfig
from drift_jax.training import artifacts
from drift_jax.training import step as step_lib
from drift_jax.training.frozen import check_kind, decoding
from drift_jax.training.inputs import LATENTS

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


def make_pixels(
  decode: Callable[[Images], Images], pixels: options.Pixels = "truncate"
) -> PixelsFn:
  """Samples -> 8-bit RGB images, on the mesh; decode is `make_decoder`'s."""
  return lambda samples: to_rgb(decode(samples), pixels)


def are_images(config: GeneratorConfig, vae: artifacts.Artifact | None) -> bool:
  """Whether samples are, or become, images; else arrays without a decoder."""
  return vae is not None or are_pixels(config)


def are_pixels(config: GeneratorConfig) -> bool:
  """Whether samples are images themselves, and no latents or features."""
  channels = config.model.out_channels
  return channels in (1, 3) and not config.data.source.startswith(LATENTS)


def image_size(
  sample_shape: tuple[int, ...], vae: artifacts.Artifact | None
) -> int:
  """Returns the side in pixels of the images that samples become."""
  if vae is None:
    return sample_shape[0]
  module: Any = vae.module
  return sample_shape[0] * module.downsampling


def load_judge(
  path: str, mesh: Mesh, kinds: Sequence[str] = _KINDS
) -> artifacts.Artifact:
  """Loads a network that judges, of 8-bit RGB images, a copy on every device.

  Raises:
    ArtifactError: for anything that can't be loaded.
  """
  opened = artifacts.opened(path)
  artifact = opened.artifact
  check_kind(f"{path} holds", artifact.kind, kinds)
  shardings = jax.tree.map(lambda _: sharding.replicated(mesh), artifact.params)
  params = opened.read(sharding.abstract(artifact.params, shardings))
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


def classifier_fn(artifact: artifacts.Artifact, mesh: Mesh) -> JudgeFn:
  """Samples -> (pooled features, logits) of an autoencoder with its head."""
  classify = functools.partial(
    step_lib.apply, artifact.module, method="classify"
  )
  return on_mesh(classify, artifact.params, mesh)


def flatten_fn(mesh: Mesh) -> FeatureFn:
  """Samples [B, H, W, C] -> [B, H W C]."""
  return on_mesh(lambda _, x: x.reshape(len(x), -1), None, mesh)
