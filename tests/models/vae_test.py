"""The autoencoder: diffusers' numbers at full size, then its properties."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import models as presets
from drift_jax.models import release
from drift_jax.models.vae import (
  Vae,
  build_vae,
  latent_mean,
  sample_latents,
)
from drift_jax.training.conversions.vae import convert_vae
from tests.conftest import assert_close, relative_error
from tests.models.published import draw_all
from tests.models.small import VAE, random_variables


@pytest.fixture(scope="module")
def full(golden):
  """The golden arrays, the full-size model and its parameters."""
  arrays = golden("vae")
  weights = draw_all(arrays["parameters"])
  model_config, params = convert_vae(weights, None)[:2]
  published = release.published_config("vae", presets.sd_vae().to_dict())
  assert published == model_config | {"use_bf16": False}
  vae = build_vae(**presets.sd_vae())
  return arrays, vae, {"params": params}


def _gradient(vae, method):
  """(gradient of the result's sum of sines, result)."""

  def objective(x, variables):
    result = vae.apply(variables, x, method=method)
    return jnp.sum(jnp.sin(result)), result

  return jax.jit(jax.grad(objective, has_aux=True))


@pytest.mark.slow
def test_golden_moments(full):
  arrays, vae, variables = full
  images = arrays["pixels"].astype(np.float32) / np.float32(127.5) - 1
  gradient, moments = _gradient(vae, "encode")(images, variables)
  assert moments.dtype == jnp.float32
  assert_close(moments, arrays["moments"], 1e-5)
  norm = np.linalg.norm(np.asarray(gradient, np.float64))
  assert_close(norm, arrays["moments_gradient_norm"], 1e-5)


@pytest.mark.slow
def test_golden_images(full):
  arrays, vae, variables = full
  gradient, images = _gradient(vae, "decode")(arrays["latents"], variables)
  assert images.dtype == jnp.float32
  assert np.abs(images).max() > 2  # beyond the range of pixels: not clipped
  assert_close(images, arrays["images"], 1e-5)
  assert_close(gradient, arrays["images_gradient"], 1e-5)


class Small(NamedTuple):
  vae: Vae
  variables: Any
  encode: Callable[..., jax.Array]
  decode: Callable[..., jax.Array]


@pytest.fixture(scope="module")
def small():
  """A small autoencoder of two levels, compiled, and random variables."""
  vae = build_vae(**VAE)
  encode, decode = (
    jax.jit(functools.partial(vae.apply, method=method))
    for method in ("encode", "decode")
  )
  return Small(vae, random_variables(vae), encode, decode)


def _images(batch: int = 2, height: int = 8, width: int = 12) -> np.ndarray:
  random = np.random.RandomState(1)
  return random.uniform(-1, 1, (batch, height, width, 3)).astype(np.float32)


def _latents() -> np.ndarray:
  return np.random.RandomState(2).randn(2, 4, 6, 4).astype(np.float32)


def test_images_of_a_batch_do_not_meet(small: Small):
  for run, x in ((small.encode, _images()), (small.decode, _latents())):
    before = run(small.variables, x)
    after = run(small.variables, np.stack([-x[0], x[1]]))
    assert relative_error(after[0], before[0]) > 0.1
    assert_close(after[1], before[1], 1e-6)


def test_reconstruction_decodes_the_scaled_mean(small: Small):
  vae, variables = small.vae, small.variables
  assert vae.downsampling == 2
  moments = small.encode(variables, _images())
  assert moments.shape == (2, 4, 6, 8)
  latents = latent_mean(moments, scaling_factor=0.5)
  images = small.decode(variables, latents)
  assert images.shape == (2, 8, 12, 3)
  assert_close(jax.jit(vae.apply)(variables, _images()), images, 1e-6)


def test_log_variance_is_clipped_and_the_mean_is_not(small: Small):
  bias = np.array([100, -100, 0, 0, 100, -100, 0, 0], np.float32)
  params = small.variables["params"]
  layer = params["quant_conv"] | {"bias": bias}
  moments = small.encode({"params": params | {"quant_conv": layer}}, _images())
  assert np.abs(moments[..., :2]).min() > 50
  np.testing.assert_array_equal(moments[..., 4], 20)
  np.testing.assert_array_equal(moments[..., 5], -30)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_samples_of_the_posterior(dtype):
  random = np.random.RandomState(3)
  moments = jnp.asarray(random.randn(2, 3, 4, 5, 8), dtype)
  noise = random.randn(2, 3, 4, 5, 4).astype(np.float32)
  mean, log_variance = np.split(np.asarray(moments, np.float64), 2, axis=-1)
  expected = (mean + np.sqrt(np.exp(log_variance)) * noise) * 0.18215
  samples = sample_latents(moments, noise)
  assert samples.dtype == jnp.float32
  assert_close(samples, expected, 1e-6)
  assert_close(latent_mean(moments), 0.18215 * mean, 1e-6)
  twice = sample_latents(moments, noise, scaling_factor=2 * 0.18215)
  assert_close(twice, 2 * expected, 1e-6)


@pytest.mark.slow
def test_remat_saves_memory_and_changes_no_gradient():
  """Through both halves; the gradient is of the images."""
  images = _images(1, 64, 64)
  gradients, memory = [], []
  for remat in (False, True):
    vae = build_vae(**(VAE | {"widths": (8, 8, 8), "remat": remat}))
    variables = random_variables(vae)
    gradient = jax.jit(
      jax.grad(lambda x, v, vae=vae: jnp.sum(jnp.sin(vae.apply(v, x)))),
      # On CPUs this pass removes what makes the recomputation wait.
      compiler_options={"xla_disable_hlo_passes": "cse_barrier_expander"},
    )
    compiled = gradient.lower(images, variables).compile()
    memory.append(compiled.memory_analysis().temp_size_in_bytes)
    gradients.append(compiled(images, variables))
  assert memory[1] < 0.6 * memory[0]
  assert_close(gradients[1], gradients[0], 1e-5)


@pytest.mark.slow
def test_bfloat16_computes_near_float32_from_the_same_parameters(small: Small):
  rough = small.vae.clone(dtype=jnp.dtype("bfloat16"))
  decode = jax.jit(functools.partial(rough.apply, method="decode"))
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), small.variables)
  expected = small.decode(small.variables, _latents())
  for variables in (small.variables, rounded):
    images = decode(variables, _latents())
    assert images.dtype == jnp.float32
    assert 1e-4 < relative_error(images, expected) < 4e-2
  moments = jax.eval_shape(
    functools.partial(rough.apply, method="encode"), rounded, _images()
  )
  assert moments.dtype == jnp.float32


@pytest.mark.parametrize(
  ("method", "shape", "message"),
  [
    ("encode", (1, 8, 8, 4), "images have 4 channels .* takes 3"),
    ("encode", (1, 8, 9, 3), "width=9 must be a multiple of downsampling=2"),
    ("encode", (1, 7, 8, 3), "height=7 must be a multiple of downsampling=2"),
    ("decode", (1, 4, 4, 8), "latents have 8 channels .* takes 4"),
  ],
)
def test_inputs_of_a_wrong_shape_are_explained(
  small: Small, method, shape, message
):
  with pytest.raises(ValueError, match=message):
    small.vae.apply(small.variables, np.zeros(shape, np.float32), method=method)
