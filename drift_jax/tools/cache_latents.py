"""Latents of a data set, encoded once: what latent training reads.

  python -m drift_jax.tools.cache_latents --source=folder:DIR --split=train \\
      --vae=DIR --out=DIR
  python -m drift_jax.tools.cache_latents --verify --split=train --out=DIR

  python -m drift_jax.tools.cache_latents --source=npy:DIR --split=train \\
      --out=DIR

Every image is cropped (ADM's centre crop) and encoded twice, itself and its
mirror image; the moments of both posteriors are stored, not samples of them.
Run the same command again after a crash: finished shards are checked and kept.
Several processes share the work when each runs the same command; process p of P
takes every P-th shard, and whoever finishes last writes the manifest.
"""

import argparse
import functools
from collections.abc import Sequence

from drift_jax.system import console, options, paths, programs

SPLITS = ("train", "test")  # with --held_out


def _parser() -> console.Parser:
  parser = programs.parser("drift_jax.tools.cache_latents", __doc__)
  add = parser.add_argument
  path = functools.partial(add, type=paths.argument)
  number = functools.partial(add, type=int)
  add(
    "--source",
    help="folder:DIR, tar:FILE, tfds:NAME or hf://datasets/OWNER/NAME; "
    "torch:DIR has latents that were drawn before, as the authors' cache; "
    "npy:DIR arrays [2, h, h, c] of any encoder (without --vae)",
  )
  add("--split", default="train", help="of the source (default: train)")
  add(
    "--held_out",
    type=float,
    default=0.0,
    help="images of each class, below 1 their share, that are split 'test' "
    "where the source has none (0)",
  )
  path("--vae", help="folder of the autoencoder, or hf://OWNER/NAME")
  path("--out", required=True, help="folder of the cache")
  add("--verify", action="store_true", help="only compare --out's checksums")
  number("--image_size", default=256, help="of the crop (default: 256)")
  number("--batch_size", default=64, help="images at once (default: 64)")
  number("--images_per_shard", default=4096, help="(default: 4096)")
  for name, help, choices in (
    ("--dtype", "of the stored moments", options.LATENT_DTYPES),
    ("--compute_dtype", "of the encoder", options.DTYPES),
    ("--class_order", "'imagenet' for WordNet folders", options.CLASS_ORDERS),
  ):
    add(
      name,
      default=choices[0],
      choices=choices,
      help=help + " (default: the first)",
    )
  add("--exif", action="store_true", help="turn images upright, as data.exif")
  path("--data_dir", default="", help="of relative sources, and of TFDS' data")
  number(
    "--max_corrupt",
    default=0,
    help="undecodable images that others of their class may replace (0)",
  )
  number("--num_threads", help="that decode (default: one for each core)")
  number("--process_index", help="of this process (default: JAX's)")
  number("--process_count", help="that share the work (default: JAX's)")
  return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """The arguments of a command line; ends the program if one is wrong."""
  parser = _parser()
  arguments = parser.parse_args(argv)
  source = arguments.source or ""
  of_arrays = source.startswith(options.ARRAYS_SOURCE)
  is_drawn = of_arrays or source.startswith(options.DRAWN_SOURCE)
  needed = ("source",) if of_arrays else ("source", "vae")
  missing = [f"--{n}" for n in needed if not getattr(arguments, n)]
  if missing and not arguments.verify:
    parser.error(f"the following arguments are required: {', '.join(missing)}")
  if is_drawn:
    of_images = ("dtype", "compute_dtype", "max_corrupt", "exif")
    for name in (*of_images, *(("image_size", "vae") if of_arrays else ())):
      value = getattr(arguments, name)
      if value != parser.get_default(name):
        parser.error(
          f"--{name}={value}: of images only; the latents of "
          f"{arguments.source} are kept as they are"
        )
  held_out = arguments.held_out
  if held_out and (
    held_out < 0
    or (held_out > 1 and not held_out.is_integer())
    or arguments.split not in SPLITS
    or is_drawn
  ):
    parser.error(
      f"--held_out={held_out:g} --split={arguments.split}: want a number of "
      "images of each class, or a share between 0 and 1, of a source of "
      f"images, and --split one of {list(SPLITS)}"
    )
  for name in ("batch_size", "num_threads"):
    value = getattr(arguments, name)
    if value is not None and value < 1:
      parser.error(f"--{name}={value} must be at least 1")
  index, count = arguments.process_index, arguments.process_count
  if (index is None) != (count is None):
    parser.error("give both of --process_index and --process_count, or neither")
  if index is not None and not 0 <= index < count:
    parser.error(f"--process_index={index} must lie in [0, {count})")
  return arguments


def main(argv: Sequence[str] | None = None) -> None:
  """Does what the command line asks for; a mistake is one line."""
  arguments = parse(argv)

  def program() -> None:
    from drift_jax.tools.work import cache_latents

    cache_latents.run(arguments)

  programs.run(program)


if __name__ == "__main__":
  main()
