"""Random streams: one named root key for each use of a run's seed."""

import zlib

import jax
import numpy as np

# Parameters at the start; a step's draws; labels and reals from the queue;
# noise and style of samples; masks of the encoder's evaluation.
USES = ("params", "train", "queue", "sample", "mask")


def stream(seed: int | jax.Array, use: str) -> jax.Array:
  """The root key of one use: fold_in(key(seed), CRC-32 of its name).

  Streams of different uses share no key, whatever small integers (steps,
  sample indices) are folded into them.

  Raises:
    ValueError: if the use is not one of USES.
  """
  if use not in USES:
    raise ValueError(f"random stream {use!r}: valid options are {USES}")
  return jax.random.fold_in(
    jax.random.key(seed, impl="threefry2x32"),
    np.uint32(zlib.crc32(use.encode())),
  )
