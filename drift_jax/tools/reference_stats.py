"""Statistics of real images in a network's features: what a run is judged by.

  python -m drift_jax.tools.reference_stats --source=tfds:imagenet2012 \\
      --network=weights/inception --out=weights/imagenet256_train.npz
  python -m drift_jax.tools.reference_stats \\
      --public=VIRTUAL_imagenet256_labeled.npz \\
      --network=weights/inception --out=weights/imagenet256_adm.npz
  python -m drift_jax.tools.reference_stats \\
      --public=imagenet_256_fid_stats.npz --images=imagenet_val_prc_arr0.npz \\
      --network=weights/inception --out=weights/imagenet256_drifting.npz

The file holds mean and covariance of the features of all images, the features
of --num_features single ones (for precision, recall, KID, density and
coverage), and what they were computed from, which evaluation compares with the
run. --public takes mean and covariance from a published file, or from one that
this program wrote, and adds the features of the images in it, or of --images.
Several processes that run the same command, each
with its --process_id, share the images.
"""

import functools
from collections.abc import Sequence

from drift_jax.system import console, options, paths, programs

# Flags that say which images of a source are meant.
_SOURCE_FLAGS = ("split", "image_size", "crop", "channels", "data_dir")
_SOURCE_FLAGS += ("class_order", "max_corrupt", "exif", "num_threads")
# The least values of numbers.
_AT_LEAST = {"num_features": 0, "batch_size": 1, "seed": 0, "num_threads": 1}


def _parser() -> console.Parser:
  parser = programs.parser("drift_jax.tools.reference_stats", __doc__)
  what = parser.add_mutually_exclusive_group(required=True)
  what.add_argument("--source", help=", ".join(options.IMAGE_SOURCES))
  what.add_argument(
    "--public",
    type=paths.argument,
    help=".npz with mu and sigma (or ref_mu and ref_sigma), and images arr_0",
  )
  path = functools.partial(parser.add_argument, type=paths.argument)
  path("--network", required=True, help="folder of the exported network")
  path("--out", required=True, help=".npz to write")
  path(
    "--images",
    help="with --public: single images, an .npz of arr_0 or a folder, in place "
    "of those in it",
  )
  integer = functools.partial(parser.add_argument, type=int)
  integer(
    "--num_features",
    default=options.NUM_FEATURES,
    help="single images whose features are kept (default: %(default)s)",
  )
  integer(
    "--batch_size",
    default=64,
    help="images on all devices of a process (default: %(default)s)",
  )
  integer("--seed", default=0, help="picks the single images")
  add = parser.add_argument_group("with --source").add_argument
  add("--split", help="of the source (default: train)")
  add("--image_size", type=int, help="in pixels (default: 256)")
  add("--crop", choices=options.CROPS, help="as data.crop (default: center)")
  add("--channels", type=int, choices=(1, 3), help="1: grey (default: 3)")
  add(
    "--data_dir", type=paths.argument, help="where sources and TFDS' data lie"
  )
  add("--class_order", help="as data.class_order (default: the source's own)")
  add("--max_corrupt", type=int, help="as data.max_corrupt (default: 0)")
  add("--exif", action="store_true", default=None, help="as data.exif")
  add("--num_threads", type=int, help="that decode (default: one a core)")
  add = parser.add_argument_group("with several processes").add_argument
  add("--coordinator", default="", help="HOST:PORT of process 0, or 'auto'")
  add("--num_processes", type=int, help="how many share the work")
  add("--process_id", type=int, help="of this process, from 0")
  add(
    "--join_timeout",
    type=int,
    default=options.JOIN_SECONDS,
    help="seconds to wait at the start until all are there",
  )
  return parser


def main(argv: Sequence[str] | None = None) -> None:
  """Does what the command line asks for; a mistake is one line."""
  parser = _parser()
  arguments = parser.parse_args(argv)
  values = {k: v for k, v in vars(arguments).items() if v is not None}
  of_source = {name: values[name] for name in _SOURCE_FLAGS if name in values}
  if arguments.public is not None and of_source:
    first = next(iter(of_source))
    parser.error(f"--{first} goes with --source, not with --public")
  if arguments.source is not None and arguments.images is not None:
    parser.error("--images goes with --public, not with --source")
  for name, minimum in _AT_LEAST.items():
    if values.get(name, minimum) < minimum:
      parser.error(f"--{name}={values[name]} must be at least {minimum}")

  def program() -> None:
    from drift_jax.tools.work import reference_stats

    reference_stats.run(arguments, of_source)

  place = (
    arguments.coordinator,
    arguments.num_processes,
    arguments.process_id,
  )
  programs.run(program, processes=place, join_timeout=arguments.join_timeout)


if __name__ == "__main__":
  main()
