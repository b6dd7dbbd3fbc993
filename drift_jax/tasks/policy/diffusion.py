"""The diffusion baseline of control: DDPM and DDIM of noise prediction.

Published formulas: arXiv:2006.11239 (DDPM), arXiv:2102.09672 (the cosine
schedule), arXiv:2010.02502 (DDIM); clean samples are clipped to [-1, 1], as
Diffusion Policy (arXiv:2303.04137) does.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

MAX_BETA = 0.999
# eps(x_t, t) of a batch that is at one time.
Denoise = Callable[[Float[Array, "n T A"], Int[Array, ""]], jax.Array]
# (number of the evaluation) -> z ~ N(0, 1).
Noise = Callable[[Int[Array, ""]], jax.Array]


class Sampler(NamedTuple):
  """A way to draw samples with a denoiser.

  Attributes:
    kind: 'ddpm', or 'ddim' without noise (eta = 0).
    evaluations: of the network.
  """

  kind: str
  evaluations: int


def parse_sampler(text: str, num_steps: int) -> Sampler:
  """'ddpm:100' or 'ddim:10'.

  Args:
    text: the name and the evaluations.
    num_steps: of the noise that was trained on.

  Raises:
    ValueError: another name, or evaluations that don't divide the steps; ddpm
      needs as many as there are.
  """
  kind, _, count = text.partition(":")
  evaluations = int(count) if count.isdigit() else 0
  if (
    kind not in ("ddpm", "ddim")
    or evaluations < 1
    or num_steps % evaluations
    or (kind == "ddpm" and evaluations != num_steps)
  ):
    raise ValueError(
      f"{text!r}: valid samplers are 'ddpm:{num_steps}' and 'ddim:N', N a "
      f"divisor of the {num_steps} steps"
    )
  return Sampler(kind, evaluations)


def alpha_bars(num_steps: int) -> np.ndarray:
  """prod (1 - beta) of the cosine schedule: [num_steps] float64, falling.

  beta_t = min(1 - f(t + 1) / f(t), 0.999), f(t) = cos^2 of
  (t / num_steps + 0.008) / 1.008 * pi / 2 (arXiv:2102.09672, eq. 17).
  """
  edges = np.arange(num_steps + 1) / num_steps
  f = np.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2
  betas = np.minimum(1 - f[1:] / f[:-1], MAX_BETA)
  return np.cumprod(1 - betas)


def add_noise(
  clean: Float[Array, "n T A"],
  noise: Float[Array, "n T A"],
  time: Int[Array, " n"],
  *,
  num_steps: int,
) -> Float[Array, "n T A"]:
  """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (arXiv:2006.11239, eq. 4)."""
  bar = jnp.asarray(alpha_bars(num_steps), jnp.float32)[time][:, None, None]
  return jnp.sqrt(bar) * clean + jnp.sqrt(1.0 - bar) * noise


def sample(
  denoise: Denoise,
  start: Float[Array, "n T A"],
  noise: Noise,
  sampler: Sampler,
  *,
  num_steps: int,
) -> Float[Array, "n T A"]:
  """Samples in [-1, 1] from noise, in sampler.evaluations steps.

  With x_0 = clip((x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t)), s the time
  that follows t (abar = 1 at the end):
    ddpm: x_s = sqrt(abar_s) beta_t / (1 - abar_t) x_0
      + sqrt(1 - beta_t) (1 - abar_s) / (1 - abar_t) x_t + sigma_t z,
      sigma_t^2 = (1 - abar_s) / (1 - abar_t) beta_t (arXiv:2006.11239, eq. 7)
    ddim: x_s = sqrt(abar_s) x_0 + sqrt(1 - abar_s) eps (arXiv:2010.02502,
      eq. 12), at every (num_steps / evaluations)-th time.
  """
  stride = num_steps // sampler.evaluations
  times = np.arange(sampler.evaluations)[::-1] * stride
  bars = alpha_bars(num_steps)
  before = np.append(bars, 1.0)[np.where(times > 0, times - stride, num_steps)]
  now = bars[times]
  beta = 1 - now / before
  if sampler.kind == "ddpm":
    of_clean = np.sqrt(before) * beta / (1 - now)
    of_x = np.sqrt(1 - beta) * (1 - before) / (1 - now)
    of_eps = np.zeros_like(now)
    of_noise = np.sqrt((1 - before) / (1 - now) * beta)
  else:
    of_clean = np.sqrt(before)
    of_x = of_noise = np.zeros_like(now)
    of_eps = np.sqrt(1 - before)
  rows = np.stack([now, of_clean, of_x, of_eps, of_noise], axis=1)

  def step(x: jax.Array, at: Any) -> tuple[jax.Array, None]:
    time, number, (bar, of_clean, of_x, of_eps, of_noise) = at
    eps = denoise(x, time)
    clean = (x - jnp.sqrt(1.0 - bar) * eps) / jnp.sqrt(bar)
    clean = jnp.clip(clean, -1.0, 1.0)
    x = of_clean * clean + of_x * x + of_eps * eps
    if sampler.kind == "ddpm":
      x += of_noise * noise(number)
    return x, None

  along = (
    jnp.asarray(times, jnp.int32),
    jnp.arange(len(times)),
    jnp.asarray(rows, jnp.float32),
  )
  return jax.lax.scan(step, start, along)[0]
