"""Latents of a data set, encoded once: what latent training reads.

  python -m drift_jax.tools.cache_latents --source=folder:DIR --split=train \\
      --vae=DIR --out=DIR
  python -m drift_jax.tools.cache_latents --verify --split=train --out=DIR

Every image is cropped (ADM's centre crop) and encoded twice, itself and its
mirror image; the moments of both posteriors are stored, not samples of them.
Run the same command again after a crash: finished shards are checked and kept.
Several processes share the work when each runs the same command; process p of P
takes every P-th shard, and whoever finishes last writes the manifest.
"""

import argparse
from collections.abc import Sequence

from drift_jax.system import options, paths, programs


def _parser() -> argparse.ArgumentParser:
  description, _, details = (__doc__ or "").partition("\n")
  parser = argparse.ArgumentParser(
    prog="python -m drift_jax.tools.cache_latents",
    description=description,
    epilog=details,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = parser.add_argument
  add("--source", help="folder:DIR, tar:FILE or tfds:NAME")
  add("--split", default="train", help="of the source (default: train)")
  add("--vae", type=paths.argument, help="folder of the exported autoencoder")
  add("--out", type=paths.argument, required=True, help="folder of the cache")
  add(
    "--verify",
    action="store_true",
    help="only read the cache in --out and compare its checksums",
  )
  add("--image_size", type=int, default=256, help="of the crop (default: 256)")
  add(
    "--batch_size",
    type=int,
    default=64,
    help="images on all devices of a process (default: 64)",
  )
  add("--images_per_shard", type=int, default=4096, help="(default: 4096)")
  add(
    "--dtype",
    default="float16",
    choices=options.LATENT_DTYPES,
    help="of the stored moments (default: float16)",
  )
  add(
    "--compute_dtype",
    default="float32",
    choices=options.DTYPES,
    help="of the encoder (default: float32)",
  )
  add(
    "--data_dir",
    type=paths.argument,
    default="",
    help="where relative sources and TFDS' data lie",
  )
  add(
    "--class_order",
    default="",
    choices=options.CLASS_ORDERS,
    help="'imagenet' for the standard labels of WordNet folders",
  )
  add(
    "--max_corrupt",
    type=int,
    default=0,
    help="images that may turn out undecodable (default: 0); each is replaced "
    "by another one of its class",
  )
  add(
    "--num_threads", type=int, help="that decode (default: one for each core)"
  )
  add("--process_index", type=int, help="of this process (default: JAX's)")
  add("--process_count", type=int, help="that share the work (default: JAX's)")
  return parser


def main(argv: Sequence[str] | None = None) -> None:
  """Does what the command line asks for; a mistake is one line."""
  parser = _parser()
  arguments = parser.parse_args(argv)
  missing = [
    f"--{n}" for n in ("source", "vae") if getattr(arguments, n) is None
  ]
  if missing and not arguments.verify:
    parser.error(f"the following arguments are required: {', '.join(missing)}")
  if (arguments.process_index is None) != (arguments.process_count is None):
    parser.error("give both of --process_index and --process_count, or neither")

  def program() -> None:
    from drift_jax.tools.work import cache_latents

    cache_latents.run(arguments)

  programs.run(program)


if __name__ == "__main__":
  main()
