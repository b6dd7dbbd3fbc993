"""The authors' released generators, each with our figure beside theirs.

  python -m drift_jax.tools.verify_released --out=released
  python -m drift_jax.tools.verify_released --only=latent_B_sota --fid \\
      --inception=weights/inception \\
      --inception_reference=imagenet_256_fid_stats.npz --out=released

Downloads each generator and its autoencoder, draws 10 images into
OUT/NAME.png and prints a line of a table. With --fid it also computes the FID
at the published alpha (1 where none is known) and writes OUT/NAME.json.
"""

from collections.abc import Sequence

from drift_jax.system import console, options, paths, programs
from drift_jax.training.released import released


def _parser() -> console.Parser:
  parser = programs.parser("drift_jax.tools.verify_released", __doc__)
  add = parser.add_argument
  add("--only", help="NAME,...: some of them (default: all generators)")
  add("--out", type=paths.argument, required=True, help="folder to write")
  add("--seed", type=int, default=0, help="of noise and style")
  add("--batch_size", type=int, default=options.BATCH_SIZE, help="at a time")
  add("--fid", action="store_true", help="compute the FID, which takes hours")
  add = parser.add_argument_group("with --fid").add_argument
  add("--num_samples", type=int, default=options.NUM_SAMPLES, help="of each")
  add("--inception", type=paths.argument, help="folder of the Inception-v3")
  add(
    "--inception_reference",
    type=paths.argument,
    help="its statistics of real images, .npz",
  )
  return parser


def main(argv: Sequence[str] | None = None) -> None:
  """Does what the command line asks for; a mistake is one line."""
  parser = _parser()
  arguments = parser.parse_args(argv)
  generators = {
    entry.name: entry for entry in released() if entry.kind == "gen"
  }
  names = (arguments.only or ",".join(generators)).split(",")
  for name in names:
    if name not in generators:
      parser.error(f"--only: {name!r} is none of {list(generators)}")
  for name in ("batch_size", "num_samples"):
    if getattr(arguments, name) < 1:
      parser.error(f"--{name}={getattr(arguments, name)} must be at least 1")
  if not 0 <= arguments.seed <= options.MAX_SEED:
    parser.error(f"--seed={arguments.seed} must lie in [0, {options.MAX_SEED}]")
  for name in ("inception", "inception_reference"):
    if arguments.fid != (getattr(arguments, name) is not None):
      parser.error(f"--{name} goes with --fid, and --fid needs it")

  def program() -> None:
    from drift_jax.tools.work import verify_released

    verify_released.run([generators[name] for name in names], arguments)

  programs.run(program)


if __name__ == "__main__":
  main()
