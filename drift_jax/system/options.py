"""Defaults and choices that flags share with the code that uses them.

Nothing is imported here, so that a program reads its flags before it imports
anything heavy.
"""

from collections.abc import Sequence
from typing import Literal, get_args

# Seconds that processes wait for each other at the start: a host that restarts
# needs minutes.
JOIN_SECONDS = 600
MAX_SEED = 2**32 - 1
# Images that a generator draws at a time.
BATCH_SIZE = 256
# Files of pictures.
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
# Figures of an evaluation without a config, and its number of samples.
METRICS = ("fid", "inception_score")
NUM_SAMPLES = 50_000
# How samples become 8-bit pixels where figures are computed: cut off, as for
# the published FIDs (arXiv:2602.04770), or to the nearest.
Pixels = Literal["truncate", "round"]
PIXELS = get_args(Pixels)
# Order of the samples' labels: as they are balanced (0, 1, ..., 0, 1, ...),
# listed or held out; or class by class.
LabelOrder = Literal["given", "class"]
LABEL_ORDERS = get_args(LabelOrder)
# Where images may come from (data.source), and what `open_source` opens: a
# latent cache is opened with its autoencoder.
SOURCES = (
  "digits",
  "tfds:NAME",
  "folder:DIR",
  "tar:FILE",
  "hf://datasets/OWNER/NAME",
  "latents:DIR",
)
IMAGE_SOURCES = SOURCES[:-1]
# Order of a source's classes; '': its own.
ClassOrder = Literal["", "imagenet"]
CLASS_ORDERS = get_args(ClassOrder)
# How images are cut to one size: ADM's centre crop; a random resized crop
# (A.3); a black frame around smaller images; nothing, they fit.
Crop = Literal["center", "random", "pad", "none"]
# The dtype in which images and latents travel to the devices.
Wire = Literal["uint8", "float32", "float16", "bfloat16"]
Decoder = Literal["pillow", "simplejpeg"]
# Crops of statistics of real images, and how many single features are kept.
CROPS = ("center", "pad", "none")
NUM_FEATURES = 10_000
# Where a run's numbers go; the services are other packages.
Writer = Literal["jsonl", "tensorboard", "wandb", "trackio"]
SERVICES = ("wandb", "trackio")
# Dtypes of a network's computation, and of latents on a disk.
DTYPES = ("float32", "bfloat16")
LATENT_DTYPES = ("float16", "bfloat16")
# Before the folder of latents that were drawn before: the authors' cache; and
# arrays of an encoder that is none of ours.
DRAWN_SOURCE = "torch:"
ARRAYS_SOURCE = "npy:"
# Formats of an export, and platforms that it runs on.
FORMATS = ("stablehlo", "release", "onnx")
PLATFORMS = ("cpu", "cuda", "tpu")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
  """Raises ValueError for a value that is not among the choices."""
  if value not in choices:
    raise ValueError(f"{name}={value!r}: valid options are {list(choices)}")
