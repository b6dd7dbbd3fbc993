"""DDPM and DDIM against float64 loops and against a known distribution."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drift_jax.tasks.policy import diffusion
from tests.conftest import assert_close, precise_jit

STEPS = 100


def cosine_bars(steps):
  """Eq. 17 of arXiv:2102.09672, one time after the other."""

  def f(t):
    return math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2

  bar, bars = 1.0, []
  for t in range(steps):
    bar *= 1 - min(1 - f(t + 1) / f(t), 0.999)
    bars.append(bar)
  return bars


def denoiser(x, t):
  """Any smooth function will do."""
  return 0.7 * x + 0.01 * t


@pytest.mark.parametrize("steps", [10, 100])
def test_schedule(steps):
  bars = diffusion.alpha_bars(steps)
  assert_close(bars, cosine_bars(steps), 1e-12)
  assert np.all(np.diff(bars) < 0)
  assert bars[0] < 1 and bars[-1] > 0


def ddpm(x, z, bars):
  """Eq. 7 of arXiv:2006.11239, with x_0 clipped."""
  for t in reversed(range(len(bars))):
    bar, before = bars[t], bars[t - 1] if t else 1.0
    beta = 1 - bar / before
    clean = (x - math.sqrt(1 - bar) * denoiser(x, t)) / math.sqrt(bar)
    clean = np.clip(clean, -1, 1)
    mean = math.sqrt(before) * beta / (1 - bar) * clean
    mean = mean + math.sqrt(1 - beta) * (1 - before) / (1 - bar) * x
    sigma = math.sqrt((1 - before) / (1 - bar) * beta)
    x = mean + sigma * z[len(bars) - 1 - t]
  return x


def ddim(x, bars, evaluations):
  """Eq. 12 of arXiv:2010.02502, without noise."""
  stride = len(bars) // evaluations
  for t in reversed(range(0, len(bars), stride)):
    before = bars[t - stride] if t else 1.0
    eps = denoiser(x, t)
    clean = (x - math.sqrt(1 - bars[t]) * eps) / math.sqrt(bars[t])
    x = math.sqrt(before) * np.clip(clean, -1, 1) + math.sqrt(1 - before) * eps
  return x


@pytest.mark.parametrize(
  ("sampler", "steps"),
  [("ddpm:100", 100), ("ddpm:7", 7), ("ddim:100", 100), ("ddim:10", 100)],
)
def test_samplers_follow_the_formulas(sampler, steps):
  rng = np.random.default_rng(1)
  x = rng.normal(size=(5, 4, 2))
  z = rng.normal(size=(steps, 5, 4, 2))
  kind = diffusion.parse_sampler(sampler, steps)
  found = precise_jit(
    lambda x, z: diffusion.sample(
      lambda x, t: denoiser(x, t.astype(jnp.float32)),
      x,
      lambda number: z[number],
      kind,
      num_steps=steps,
    )
  )(x.astype(np.float32), z.astype(np.float32))
  bars = cosine_bars(steps)
  if kind.kind == "ddpm":
    want = ddpm(x, z, bars)
  else:
    want = ddim(x, bars, kind.evaluations)
  assert_close(found, want, 1e-5)


@pytest.mark.parametrize("sampler", ["ddpm:100", "ddim:100"])
def test_a_known_distribution_is_found(sampler):
  # Of data N(0, s^2) the best denoiser is linear.
  s, count = 0.2, 20_000
  bars = jnp.asarray(cosine_bars(STEPS), jnp.float32)

  def best(x, t):
    return jnp.sqrt(1 - bars[t]) / (bars[t] * s**2 + 1 - bars[t]) * x

  key = jax.random.key(0)
  shape = (count, 1, 1)
  samples = precise_jit(
    lambda: diffusion.sample(
      best,
      jax.random.normal(key, shape),
      lambda n: jax.random.normal(jax.random.fold_in(key, n + 1), shape),
      diffusion.parse_sampler(sampler, STEPS),
      num_steps=STEPS,
    )
  )()
  # sigma_t is DDPM's smaller choice: in a hundred steps it falls short.
  assert float(jnp.std(samples)) == pytest.approx(s, rel=0.1)
  assert abs(float(jnp.mean(samples))) < 4 * s / math.sqrt(count)


@pytest.mark.parametrize(
  "text", ["ddpm:10", "ddim:7", "ddim:0", "ddim", "euler:10", "ddim:-1", ""]
)
def test_unknown_samplers(text):
  with pytest.raises(ValueError, match="'ddpm:100' and 'ddim:N'") as error:
    diffusion.parse_sampler(text, STEPS)
  assert repr(text) in str(error.value)
