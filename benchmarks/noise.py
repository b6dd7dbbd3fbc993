"""How much of independent noise a field takes away: a table.

  python benchmarks/noise.py

Samples are scikit-learn's digits, 8 x 8, with independent normal noise in each
pixel; the table has the cosine of their drift and their noise: -1 would take it
away, at 0 it stays. Drifting is by class, in whole images and in patches of
their grid, each place a problem of its own (features.tokens).
"""

import functools
import pathlib
import sys

if not __package__:
  # Python looks for a script's imports in the script's folder.
  sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import jax
import jax.numpy as jnp
import numpy as np

from drift_jax.drift import Variant, drift_loss
from drift_jax.models.layers import patchify

SAMPLES, POSITIVES = 32, 64
FIELDS = ("softmax", "mmd", "kl", "gaussian", "sharp", "sinkhorn")
AMPLITUDES = (0.05, 0.2)


def digits() -> np.ndarray:
  """Images [class, count, 8, 8, 1] in [-1, 1]."""
  from sklearn.datasets import load_digits

  images, labels = (load_digits()[name] for name in ("images", "target"))
  rng = np.random.default_rng(0)
  drawn = [
    rng.permutation(images[labels == label])[: SAMPLES + POSITIVES]
    for label in range(10)
  ]
  return np.stack(drawn)[..., None].astype(np.float32) / 8 - 1


@functools.partial(jax.jit, static_argnames=("side", "field"))
def cosine(
  images: jax.Array, amplitude: float, *, side: int, field: str = "softmax"
) -> jax.Array:
  """Of drift and noise, in patches of this side."""

  def problems(x: jax.Array) -> jax.Array:
    patches = jax.vmap(lambda x: patchify(x, side))(x)
    patches = patches.reshape(*x.shape[:2], -1, patches.shape[-1])
    return jnp.moveaxis(patches, 2, 1).reshape(-1, x.shape[1], side**2)

  real, pos = jnp.split(images, [SAMPLES], axis=1)
  noise = amplitude * jax.random.normal(jax.random.key(0), real.shape)

  def loss(x: jax.Array) -> jax.Array:
    losses, _ = drift_loss(
      problems(x),
      problems(pos),
      None,
      temperatures=(0.05, 0.1, 0.2),
      affinity_floor=0.0,
      variant=Variant(field=field),
    )
    return losses.sum()

  drift = -jax.grad(loss)(real + noise)
  lengths = jnp.linalg.norm(drift) * jnp.linalg.norm(noise)
  return jnp.vdot(drift, noise) / lengths


def main() -> None:
  """Prints the table."""
  images = digits()
  whole = images.shape[2]
  sides = [whole >> n for n in range(whole.bit_length())]
  print(f"| field | noise | {' | '.join(f'{n} x {n}' for n in sides)} |")
  print("|---" * (2 + len(sides)) + "|")
  for field in FIELDS:
    for amplitude in AMPLITUDES:
      found = (
        cosine(images, amplitude, side=side, field=field) for side in sides
      )
      cells = " | ".join(f"{value:.3f}" for value in found)
      print(f"| {field} | {amplitude} | {cells} |")


if __name__ == "__main__":
  main()
