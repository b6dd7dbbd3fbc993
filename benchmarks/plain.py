"""The plain ways: what a short script of Pillow and NumPy would do."""

import pathlib
from typing import Any

import grain
import ml_dtypes
import numpy as np
from PIL import Image

from drift_jax.data import transforms

CROP_SCALE = (0.2, 1.0)


def open_image(file: Any) -> Image.Image:
  """RGB."""
  return Image.open(file).convert("RGB")


def center_crop(image: Image.Image, size: int) -> np.ndarray:
  """ADM's centre crop."""
  while min(image.size) >= 2 * size:
    half = (image.width // 2, image.height // 2)
    image = image.resize(half, Image.Resampling.BOX)
  scale = size / min(image.size)
  whole = (round(image.width * scale), round(image.height * scale))
  pixels = np.asarray(image.resize(whole, Image.Resampling.BICUBIC))
  return cut_middle(pixels, size)


def cut_middle(pixels: np.ndarray, size: int) -> np.ndarray:
  """[h, w, 3] -> [size, size, 3]."""
  top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
  return pixels[top : top + size, left : left + size]


def random_crop(image: Image.Image, size: int, seed: int) -> np.ndarray:
  """A random box, cut out, then resized; the box is drawn as ours is."""
  rng = np.random.default_rng(seed)
  box = transforms.sample_crop(*image.size, rng, CROP_SCALE)
  image = image.crop(box).resize((size, size), Image.Resampling.BICUBIC)
  return np.asarray(image)


def draft_crop(path: pathlib.Path, size: int) -> np.ndarray:
  """The centre crop of what libjpeg makes smaller while it decodes."""
  image = Image.open(path)
  image.draft("RGB", (size, size))
  return center_crop(image.convert("RGB"), size)


def opencv_decode(cv2: Any, file: bytes) -> np.ndarray:
  """RGB pixels by OpenCV."""
  pixels = cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR)
  return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def opencv_crop(cv2: Any, path: pathlib.Path, size: int) -> np.ndarray:
  """The centre crop with one INTER_AREA resize of OpenCV."""
  pixels = opencv_decode(cv2, path.read_bytes())
  height, width = pixels.shape[:2]
  scale = size / min(height, width)
  whole = (round(width * scale), round(height * scale))
  pixels = cv2.resize(pixels, whole, interpolation=cv2.INTER_AREA)
  return cut_middle(pixels, size)


class Latents:
  """A latent cache read record by record."""

  def __init__(
    self,
    folder: pathlib.Path,
    shape: tuple[int, int, int],
    scaling_factor: float,
  ):
    """The folder holds the shards, of float16."""
    files = sorted(str(path) for path in folder.glob("*.arrayrecord"))
    self._records = grain.sources.ArrayRecordDataSource(files)
    self._shape = shape
    self._scaling_factor = np.float32(scaling_factor)

  def __getitem__(self, index: int) -> np.ndarray:
    """A bfloat16 sample, seeded by the index."""
    rng = np.random.default_rng([0, index])
    record = self._records[2 * index + int(rng.random() < 0.5)]
    moments = np.frombuffer(record, np.float16).astype(np.float32)
    mean, logvar = moments.reshape(2, *self._shape)
    noise = rng.standard_normal(self._shape, np.float32)
    sample = (mean + np.exp(0.5 * logvar) * noise) * self._scaling_factor
    return sample.astype(ml_dtypes.bfloat16)


class Queue:
  """The sample queue, walked label by label."""

  def __init__(self, rings: np.ndarray, any_ring: np.ndarray):
    """In full rings that somebody else has allocated, [K, S, ...], [U, ...]."""
    self._rings, self._any = rings, any_ring
    self._pointer = np.zeros(len(rings), int)
    self._any_pointer = 0
    self._rng = np.random.RandomState(0)

  def push(self, samples: np.ndarray, labels: np.ndarray) -> None:
    """One by one."""
    for sample, label in zip(samples, labels, strict=True):
      self._rings[label, self._pointer[label]] = sample
      self._pointer[label] = (self._pointer[label] + 1) % self._rings.shape[1]
      self._any[self._any_pointer] = sample
      self._any_pointer = (self._any_pointer + 1) % len(self._any)

  def _draw(self, ring: np.ndarray, count: int) -> np.ndarray:
    return ring[self._rng.choice(len(ring), count, replace=False)]

  def sample(
    self, labels: np.ndarray, positives: int, unconditional: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Both without replacement within a label."""
    return (
      np.stack([self._draw(self._rings[label], positives) for label in labels]),
      np.stack([self._draw(self._any, unconditional) for _ in labels]),
    )
