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
and of a run, run_config.json.
With --formats=...:
  release  OUT/params_ema/...      the weights as the authors' tools read them
  onnx     OUT/generate.onnx       generate with the weights in it; needs
                                   `pip install onnx-ir` and
                                   `pip install --no-deps jax2onnx`
With --push=OWNER/NAME, the export goes to the Hugging Face hub, with a model
card (README.md) and samples.png: drift_jax.load("hf://OWNER/NAME"). An export
that is in OUT already is pushed as it is: a push that ended early goes on.
"""

import argparse
import functools
import os
from collections.abc import Callable, Sequence

from drift_jax import config as config_lib
from drift_jax.system import console, options, paths, programs
from drift_jax.system.console import logger

_SHARED = ("private", "license")  # options of the push


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
    metavar="SOURCE",
    help=config_lib.GENERATORS,
  )
  add("--out", type=paths.argument, required=True, help="a new folder")
  # Not in the arguments unless they are given.
  ask = functools.partial(add, default=argparse.SUPPRESS)
  ask(
    "--vae",
    type=paths.argument,
    help="autoencoder of weights, a folder or hf://OWNER/NAME; of a run, if it "
    "has moved",
  )
  ask("--step", type=int, help="of a run: checkpoint")
  ask("--ema_decay", type=float, help="of a run: which EMA")
  ask("--dtype", choices=options.DTYPES, help="of computation (default: as is)")
  add("--push", metavar="OWNER/NAME", help="repository on the hub")
  ask("--private", action="store_true", help="of --push: if it is a new one")
  ask("--license", help="of --push: for the model card (default: unknown)")
  for name, valid, default in (
    ("formats", options.FORMATS, "stablehlo"),
    ("platforms", options.PLATFORMS, ",".join(options.PLATFORMS)),
  ):
    ask(
      f"--{name}",
      type=_names(*valid),
      help=f"of {','.join(valid)} (default: {default})",
    )
  return parser


def main(argv: Sequence[str] | None = None) -> None:
  """Exports what the command line asks for; a mistake is one line."""
  parser = _parser()
  arguments = vars(parser.parse_args(argv))
  source: str = arguments.pop("source") or ""
  out, repository = arguments.pop("out"), arguments.pop("push")
  shared = {k: arguments.pop(k) for k in _SHARED if k in arguments}
  if shared and repository is None:
    parser.error(f"--{next(iter(shared))} is of --push, which is not given")
  is_there = repository is not None and os.path.exists(out)
  if not source and not is_there:
    parser.error("the following arguments are required: --from")

  def program() -> None:
    if repository is None:
      return write()
    from drift_jax.tools.work import push

    push.check(repository)  # before the export
    if is_there:
      push.check_export(out, source, arguments)
    else:
      write()
    address = push.push(out, repository, **shared)
    logger.info("Pushed: drift_jax.load(%r) reads it.", address)

  def write() -> None:
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
