"""Published weights into our format, one sub-command for each model.

  python -m drift_jax.tools.convert_weights vae --from=FILE --out=DIR
  python -m drift_jax.tools.convert_weights vae --from=DIR --out=DIR
  python -m drift_jax.tools.convert_weights vae \\
      --from=hf://stabilityai/sd-vae-ft-mse --out=DIR
  python -m drift_jax.tools.convert_weights inception --out=DIR
  python -m drift_jax.tools.convert_weights convnext \\
      --from=hf://timm/convnextv2_base.fcmae_ft_in22k_in1k --out=DIR
  python -m drift_jax.tools.convert_weights moco \\
      --from=moco_v2_800ep_pretrain.pth.tar --out=DIR
  python -m drift_jax.tools.convert_weights simclr \\
      --from=resnet50-1x.pth --out=DIR
  python -m drift_jax.tools.convert_weights dinov2 \\
      --from=hf://facebook/dinov2-large --out=DIR
  python -m drift_jax.tools.convert_weights clip \\
      --from=hf://openai/clip-vit-large-patch14 --out=DIR
  python -m drift_jax.tools.convert_weights wflow --size=l2 \\
      --from=hf://jiaqihan99/W-Flow --out=DIR

The weights' names and shapes are checked before anything is written, and
reading them executes nothing: .safetensors holds arrays and names only, and
torch, which reads .bin, .pth and their like, is told to load arrays only.
"""

from collections.abc import Sequence

from drift_jax.system import console, paths, programs
from drift_jax.system.console import logger
from drift_jax.training.conversions import published


def _parser() -> console.Parser:
  parser = console.Parser(
    prog="python -m drift_jax.tools.convert_weights",
    description="Converts published weights into this package's format.",
    allow_abbrev=False,
  )
  models = parser.add_subparsers(dest="model", required=True, metavar="MODEL")
  for name, model in published.MODELS.items():
    command = models.add_parser(name, help=model.summary, allow_abbrev=False)
    command.add_argument(
      *("--from", "--source"),
      dest="source",
      action=console.Once,
      metavar="SOURCE",
      type=paths.argument,
      required=model.url is None,
      default=model.url,
      help="a file, a folder, or hf://OWNER/NAME[@REVISION][/FILE or /FOLDER]"
      + (f"; by default it is downloaded from {model.url}" * bool(model.url)),
    )
    command.add_argument(
      "--out", type=paths.argument, required=True, help="folder to write"
    )
    if model.sizes:
      command.add_argument(
        "--size",
        choices=model.sizes,
        help="which of them; checked, and needed where the weights don't tell",
      )
  return parser


def main(argv: Sequence[str] | None = None) -> None:
  """Converts what the command line asks for; a mistake is one line."""
  arguments = _parser().parse_args(argv)

  def program() -> None:
    import jax

    from drift_jax.training.conversions import convert as convert_weights

    artifact = convert_weights.convert(
      arguments.model,
      arguments.source,
      arguments.out,
      getattr(arguments, "size", None),
    )
    logger.info(
      "Wrote %s: %s, %d parameters, SHA-256 %s, model_config %s.",
      arguments.out,
      artifact.kind,
      sum(leaf.size for leaf in jax.tree.leaves(artifact.params)),
      artifact.sha256,
      dict(artifact.metadata["model_config"]),
    )

  programs.run(program)


if __name__ == "__main__":
  main()
