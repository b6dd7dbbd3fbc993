"""A generator for use without this package.

  python -m drift_jax.tools.export --from=runs/digits --out=exports/digits
  python -m drift_jax.tools.export --from=hf://latent_L_sota \\
      --dtype=bfloat16 --out=exports/imagenet

  OUT/manifest.json                what there is: shapes, classes, checksums
  OUT/generator/model.safetensors  the weights, with a config.json
  OUT/vae/...                      the same of the autoencoder, for latents
  OUT/sample.stablehlo             (weights, labels, alpha, index, seed, style)
                                   -> images, as drift_jax.sample draws them
  OUT/generate.stablehlo           (weights, labels, alpha, noise, style)
                                   -> images
  OUT/run.py                       draws from it with jax and numpy alone
With --formats=...:
  release  OUT/params_ema/...      the weights as the authors' tools read them
  onnx     OUT/generate.onnx       generate with the weights in it; needs
                                   `pip install onnx-ir` and
                                   `pip install --no-deps jax2onnx`
"""

import argparse
from collections.abc import Callable, Sequence

from drift_jax import config as config_lib
from drift_jax.system import console, options, paths, programs
from drift_jax.system.console import logger


def _names(*valid: str) -> Callable[[str], list[str]]:
  """Reads names that are separated by commas."""

  def read(text: str) -> list[str]:
    names = [part for part in text.split(",") if part]
    for name in names:
      if name not in valid:
        raise argparse.ArgumentTypeError(
          f"{name!r}: valid options are {list(valid)}"
        )
    return names

  return read


def _parser() -> console.Parser:
  parser = programs.parser("drift_jax.tools.export", __doc__)
  add = parser.add_argument
  add(
    *("--from", "--workdir", "--init_from"),
    dest="source",
    action=console.Once,
    type=paths.argument,
    required=True,
    metavar="SOURCE",
    help=config_lib.GENERATORS,
  )
  add("--out", type=paths.argument, required=True, help="a new folder")
  add(
    "--vae",
    type=paths.argument,
    default="",
    help="autoencoder of weights, a folder or hf://OWNER/NAME; of a run, if it "
    "has moved",
  )
  add("--step", type=int, help="of a run: checkpoint")
  add("--ema_decay", type=float, help="of a run: which EMA")
  add("--dtype", choices=options.DTYPES, help="of computation (default: as is)")
  for name, valid, default in (
    ("formats", options.FORMATS, "stablehlo"),
    ("platforms", options.PLATFORMS, ",".join(options.PLATFORMS)),
  ):
    add(
      f"--{name}",
      type=_names(*valid),
      default=default,
      help=f"of {','.join(valid)} (default: {default})",
    )
  return parser


def main(argv: Sequence[str] | None = None) -> None:
  """Exports what the command line asks for; a mistake is one line."""
  arguments = vars(_parser().parse_args(argv))
  source, out = arguments.pop("source"), arguments.pop("out")

  def program() -> None:
    from drift_jax.tools.work import export

    manifest = export.export(source, out, **arguments)
    files = manifest["files"].values()
    logger.info(
      "Wrote %s: %d files, %.4g MB, %s.",
      out,
      len(files) + 1,
      sum(file["bytes"] for file in files) / 1e6,
      manifest["dtype"],
    )

  programs.run(program)


if __name__ == "__main__":
  main()
