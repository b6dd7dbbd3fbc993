"""Latents for training, sampled from a cache of posterior moments."""

import math
import threading
from collections.abc import Sequence

import ml_dtypes
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from drift_jax.data import latent_format
from drift_jax.data.latent_format import LatentCacheError
from drift_jax.data.readers import Generators, Reader
from drift_jax.data.sources import Reopening
from drift_jax.system.options import check_choice
from drift_jax.system.storage import PathLike

WIRE_DTYPES = ("float16", "bfloat16", "float32")

_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_READER_BUFFER_SIZE = 16384
# Images that are sampled at once. Threads take turns in the interpreter: they
# run side by side only during operations on arrays of this size.
_BLOCK = 64


class LatentReader(Reopening, Reader):
  """Latents of a cache: z = (mean + exp(logvar / 2) * eps) * scaling_factor.

  Of a cache of latents that were drawn before, z is what it holds.

  Safe to read from several threads, and cheap to send to other processes:
  shards are opened when they are first read from.

  Attributes:
    settings: what the cache was made from.
  """

  chunk = _BLOCK
  _UNSENT = ("_readers", "_work")

  def __init__(
    self,
    directory: PathLike,
    split: str,
    *,
    dtype: str = "float16",
    flip: bool = True,
    expected_vae_sha256: str | None = None,
  ):
    """Opens and checks a cache: the manifest, labels, every shard's size.

    Args:
      directory: of the cache.
      split: of the cache.
      dtype: of what `read` gives: 'float16', 'bfloat16' or 'float32'.
      flip: read the mirror image of half of the images.
      expected_vae_sha256: identity of the autoencoder that will decode; None
        if nothing decodes.

    Raises:
      LatentCacheError: an incomplete or damaged cache, or one of another
        autoencoder.
      ValueError: another dtype.
    """
    check_choice("dtype", dtype, WIRE_DTYPES)
    self._folder, self.settings, self._shards, self.labels = (
      latent_format.verify(directory, split, checksum=False)
    )
    settings = self.settings
    if expected_vae_sha256 and not settings.vae_sha256:
      raise LatentCacheError(
        f"the latents of {directory} are arrays that no autoencoder of ours "
        "made: leave vae.path empty"
      )
    if expected_vae_sha256 not in (None, settings.vae_sha256):
      raise LatentCacheError(
        f"the latents of {directory} come from the autoencoder with SHA-256 "
        f"{settings.vae_sha256}, but the one given has {expected_vae_sha256}: "
        f"give that one, or make another cache with {latent_format.TOOL}"
      )
    self.class_names = settings.class_names
    self.sample_shape = settings.latent_shape
    self.dtype = latent_format.dtype_of(dtype)
    self._flip = flip
    self._open()

  def _open(self) -> None:
    self._readers: dict[int, ArrayRecordReader] = {}
    self._work = _Workspace(math.prod(self.sample_shape))

  def read(self, indices: np.ndarray, rngs: Generators) -> np.ndarray:
    """Samples of the posteriors, mirrored with probability 1/2 if `flip`.

    Image i depends on (indices[i], rngs[i]) alone.

    Args:
      indices: [c] in [0, N).
      rngs: c generators.

    Returns:
      [c, h, w, C] scaled latents of `dtype`.

    Raises:
      LatentCacheError: a shard that can't be read; it and the record are named.
      IndexError: indices outside [0, N).
    """
    indices = np.asarray(indices, np.int64)
    scale = np.float32(self.settings.scaling_factor)
    latents = np.empty((len(indices), *self.sample_shape), self.dtype)
    for start in range(0, len(indices), _BLOCK):
      block = slice(start, start + _BLOCK)
      mirrored = np.zeros(len(indices[block]), np.int64)
      if self._flip:
        mirrored[:] = [rng.random() < 0.5 for rng in rngs[block]]
      records = self._records(indices[block], mirrored)
      if self.settings.is_drawn:
        latents[block] = self._drawn(records)
        continue
      noise = fill_normals(rngs[block], self._work.noise, self._work.bits)
      moments = self._unpack(records, self._work.moments)
      sample = moments[:, 1]
      sample *= np.float32(0.5)
      np.exp(sample, out=sample)
      sample *= noise[:, : sample.shape[1]]
      sample += moments[:, 0]
      sample *= scale
      latents[block] = sample.reshape(-1, *self.sample_shape)
    return latents

  def fixed(self, indices: np.ndarray) -> np.ndarray:
    """The posteriors' means, unmirrored and scaled.

    Args:
      indices: [c] in [0, N).

    Returns:
      [c, h, w, C] float32: mean * scaling_factor, or what was drawn before.

    Raises:
      LatentCacheError: a shard that can't be read; it and the record are named.
      IndexError: indices outside [0, N).
    """
    indices = np.asarray(indices, np.int64)
    records = self._records(indices, np.zeros_like(indices))
    if self.settings.is_drawn:
      return self._drawn(records)
    values = math.prod(self.sample_shape)
    moments = np.empty((len(records), 2, values), np.float32)
    means = self._unpack(records, moments)[:, 0]
    means = means * np.float32(self.settings.scaling_factor)
    return means.reshape(-1, *self.sample_shape)

  def _drawn(self, records: Sequence[bytes]) -> np.ndarray:
    """[c, h, w, C] float32 of a cache of latents that were drawn before."""
    values = np.frombuffer(b"".join(records), "<f4")
    return values.reshape(-1, *self.sample_shape)

  def _unpack(self, records: Sequence[bytes], out: np.ndarray) -> np.ndarray:
    """Writes [c, 2, v] float32 to the start of `out`: mean, log of variance."""
    out = out[: len(records)]
    stored = np.frombuffer(b"".join(records), "<u2").reshape(out.shape)
    if self.settings.dtype == "float16":
      out.view(np.int32)[...] = stored.view(np.int16)
      return _scale_halves(out)
    out[...] = stored.view(ml_dtypes.bfloat16)
    return out

  def _records(self, indices: np.ndarray, mirrored: np.ndarray) -> list[bytes]:
    """The records of images, in order."""
    if ((indices < 0) | (indices >= len(self))).any():
      raise IndexError(f"image indices {indices} of {len(self)}")
    shards, images = np.divmod(indices, self.settings.images_per_shard)
    places = zip(shards.tolist(), (2 * images + mirrored).tolist(), strict=True)
    return [self._record(shard, position) for shard, position in places]

  def _record(self, shard: int, position: int) -> bytes:
    path = self._folder / self._shards[shard]["file"]
    try:
      # Threads that open one at the same time do no harm.
      if shard not in self._readers:
        self._readers[shard] = ArrayRecordReader(
          str(path),
          options=_READER_OPTIONS,
          file_reader_buffer_size=_READER_BUFFER_SIZE,
        )
      # Several records at a time are no faster, unless they are neighbours.
      record = self._readers[shard].read([position])[0]
      # Of a damaged shard ArrayRecord may give empty records.
      if len(record) != self.settings.record_bytes:
        raise IndexError(f"it has {len(record)} bytes")
      return record
    except (RuntimeError, IndexError) as error:
      what = f"record {position} of {path} can't be read ({error})"
      raise LatentCacheError(f"{what}; {latent_format.REDO}") from error


class _Workspace(threading.local):
  """Arrays that each thread uses again: fresh memory costs more than the sums.

  Attributes:
    moments: [block, 2, v] float32.
    noise: [block, v] float32, v rounded up to an even number.
    bits: [block, v / 2] uint64.
  """

  def __init__(self, values: int):
    pairs = -(-values // 2)
    self.moments = np.empty((_BLOCK, 2, values), np.float32)
    self.noise = np.empty((_BLOCK, 2 * pairs), np.float32)
    self.bits = np.empty((_BLOCK, pairs), np.uint64)


def _scale_halves(values: np.ndarray) -> np.ndarray:
  """Finite float16, given as sign-extended int32 in `values`, to float32.

  In place, and three times as fast as astype.
  """
  # Sign, exponent and significand go to their places in a float32, whose
  # exponent is then too small by the difference of the biases, 127 - 15.
  bits = values.view(np.int32)
  bits <<= 13
  bits &= np.int32(-0x70002000)
  values *= np.float32(2.0**112)
  return values


def fill_normals(
  rngs: Generators, noise: np.ndarray, bits: np.ndarray
) -> np.ndarray:
  """Standard normals, row i from rngs[i] alone: the first rows of `noise`.

  Box and Muller's sqrt(-2 log u) (cos, sin)(2 pi v), of a block at once: half
  the time of Generator.standard_normal. u and v are multiples of 2^-24.

  Args:
    rngs: c generators whose raw values have 64 bits (PCG64, Philox, SFC64).
    noise: [>= c, 2 n] float32, written to.
    bits: [>= c, n] uint64, for intermediate results.

  Returns:
    [c, 2 n] float32, a part of `noise`.
  """
  noise, bits = noise[: len(rngs)], bits[: len(rngs)]
  pairs = bits.shape[1]
  for row, rng in zip(bits, rngs, strict=True):
    # Unlike Generator.integers, this does not give way to other threads.
    row[:] = rng.bit_generator.random_raw(pairs)
  integers = bits.view(np.uint32)
  integers >>= np.uint32(8)
  noise[...] = integers
  radius, angle = noise[:, :pairs], noise[:, pairs:]
  radius += np.float32(1)  # u > 0
  radius *= np.float32(2.0**-24)
  np.log(radius, out=radius)
  radius *= np.float32(-2)
  np.sqrt(radius, out=radius)
  angle *= np.float32(2 * np.pi * 2.0**-24)
  cosine = np.cos(angle, out=bits.view(np.float32)[:, :pairs])
  np.sin(angle, out=angle)
  angle *= radius
  radius *= cosine
  return noise
