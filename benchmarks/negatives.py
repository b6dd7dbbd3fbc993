"""What extra negatives and more positives tell of a drift: a table.

  python benchmarks/negatives.py

Data p are standard normal in 16 dimensions, samples q the same (equilibrium),
or off by .3 in each coordinate. "signal" is the root mean square of the raw
drift of the samples that are off, over that of the samples that are not, which
is noise alone, at temperature .2; "bias" the mean cosine of drift and position
at equilibrium, at temperature .05: above 0 samples are driven apart that should
stay, below 0 together. N samples with a gradient, E extra negatives, P
positives.
"""

import functools
import pathlib
import sys

if not __package__:
  # Python looks for a script's imports in the script's folder.
  sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import jax
import jax.numpy as jnp

from drift_jax.drift import Variant, drift_loss

CHANNELS, SHIFT, SAMPLES = 16, 0.3, 2048
FIELDS = ("softmax", "kl")
SIZES = (
  (16, 0, 16),
  (16, 0, 64),
  (16, 48, 64),
  (64, 0, 64),
  (16, 48, 16),
  (16, 240, 64),
  (16, 240, 256),
)


@functools.partial(
  jax.jit, static_argnames=("tau", "field", "n", "extra", "positives")
)
def _drift(
  shift: jax.Array,
  tau: float,
  *,
  field: str,
  n: int,
  extra: int,
  positives: int,
) -> tuple[jax.Array, jax.Array]:
  """(raw drift's root mean square, its mean cosine with the position)."""
  problems = SAMPLES // n
  keys = jax.random.split(jax.random.key(0), 3)
  x, pos, more = (
    jax.random.normal(key, (problems, count, CHANNELS))
    for key, count in zip(keys, (n, positives, extra), strict=True)
  )
  x, more = x + shift, more + shift

  def loss(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    losses, info = drift_loss(
      *(x, pos, None),
      temperatures=tau,
      affinity_floor=0.0,
      independent=more if extra else None,
      variant=Variant(field=field),
    )
    return jnp.sum(losses), info["drift_ms"][tau]

  gradient, mean_square = jax.grad(loss, has_aux=True)(x)
  cosine = -jnp.sum(gradient * x) / (
    jnp.linalg.norm(gradient) * jnp.linalg.norm(x)
  )
  return jnp.sqrt(mean_square), cosine


def figures(
  field: str, n: int, extra: int, positives: int
) -> tuple[float, float]:
  """(signal, bias), see above."""
  sizes = {"field": field, "n": n, "extra": extra, "positives": positives}
  there, _ = _drift(jnp.asarray(0.0), 0.2, **sizes)
  off, _ = _drift(jnp.asarray(SHIFT), 0.2, **sizes)
  _, bias = _drift(jnp.asarray(0.0), 0.05, **sizes)
  return float(off / there), float(bias)


def main() -> None:
  """Prints the table."""
  names = [
    f"{name}, {field}" for field in FIELDS for name in ("signal", "bias")
  ]
  print(f"| N | E | P | {' | '.join(names)} |")
  print("|---" * (3 + len(names)) + "|")
  for sizes in SIZES:
    found = [figures(field, *sizes) for field in FIELDS]
    cells = [f"{a:.2f} | {b:+.3f}" for a, b in found]
    print(f"| {' | '.join(map(str, sizes))} | {' | '.join(cells)} |")


if __name__ == "__main__":
  main()
