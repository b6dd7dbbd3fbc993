"""A generator for use without this package.

  python -m drift_jax.tools.export --workdir=runs/digits --out=exports/digits
  python -m drift_jax.tools.export --init_from=hf://NAME --vae=weights/vae \\
      --dtype=bfloat16 --out=exports/imagenet

  OUT/manifest.json                what there is: shapes, classes, checksums
  OUT/generator/model.safetensors  the weights, with a config.json
  OUT/vae/...                      the same of the autoencoder behind latents
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
import sys
from collections.abc import Callable, Sequence

from drift_jax.system import console, options, paths
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
  parser = console.Parser(
    prog="python -m drift_jax.tools.export",
    description="Exports a generator for use without this package.",
    allow_abbrev=False,
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  source = parser.add_mutually_exclusive_group(required=True)
  source.add_argument("--workdir", type=paths.argument, help="of a run")
  source.add_argument(
    "--init_from",
    type=paths.argument,
    help="an artifact's folder, hf://NAME of the authors' release, or "
    "hf://OWNER/NAME[@REVISION][/FOLDER]",
  )
  parser.add_argument(
    "--out", type=paths.argument, required=True, help="a new folder"
  )
  parser.add_argument(
    "--vae",
    type=paths.argument,
    default="",
    help="of --init_from: the autoencoder of its latents; of --workdir where "
    "it is now, if it is not found",
  )
  parser.add_argument("--step", type=int, help="of --workdir: checkpoint")
  parser.add_argument("--ema_decay", type=float, help="of --workdir: which EMA")
  parser.add_argument(
    "--dtype",
    choices=options.DTYPES,
    help="of computation; as trained, if not given",
  )
  parser.add_argument(
    "--formats",
    type=_names(*options.FORMATS),
    default=["stablehlo"],
    help=f"beside safetensors, of {','.join(options.FORMATS)}",
  )
  parser.add_argument(
    "--platforms",
    type=_names(*options.PLATFORMS),
    default=list(options.PLATFORMS),
  )
  return parser


def main(argv: Sequence[str] | None = None) -> None:
  """Exports what the command line asks for; a mistake is one line."""
  arguments = vars(_parser().parse_args(argv))
  from drift_jax.system import numerics
  from drift_jax.system.errors import ERRORS
  from drift_jax.tools.work import export

  console.setup()
  numerics.pin()
  source = arguments.pop("workdir") or arguments.pop("init_from")
  arguments.pop("init_from", None)
  out = arguments.pop("out")
  try:
    manifest = export.export(source, out, **arguments)
  except ERRORS as error:
    sys.exit(f"Error: {error}")
  total = sum(entry["bytes"] for entry in manifest["files"].values())
  logger.info(
    "Wrote %s: %d files, %.4g MB, %s.",
    out,
    len(manifest["files"]) + 1,
    total / 1e6,
    manifest["dtype"],
  )


if __name__ == "__main__":
  main()
