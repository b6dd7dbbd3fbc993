"""Images from a generator: python -m drift_jax.sample --from=SOURCE ...

  python -m drift_jax.sample --from=runs/digits --labels=3,5-7 --alpha=1.5
  python -m drift_jax.sample --from=hf://latent_L_sota \\
      --labels="golden retriever" --count=16 --out=dogs.png
  python -m drift_jax.sample --from=export --count=50 --out=samples/
  python -m drift_jax.sample --from=runs/style --labels=3 \\
      --conditions=styles.npz --out=styles.png
  python -m drift_jax.sample --from=export --interpolate=24 --out=walk.gif

--out says what is written: a grid (.png, .jpg, .webp), all images in ADM's
format (.npz), a walk from one noise to another (.gif), or a folder of single
images, which an interrupted command continues.
"""

import os

from absl import app, flags

from drift_jax import config as config_lib
from drift_jax.system import options, paths, programs
from drift_jax.system.errors import naming

FILES = (*options.PICTURES, ".npz", ".gif")


def define_flags() -> None:
  """Defines the flags: not on import, as other programs have the same names."""
  integer = flags.DEFINE_integer
  config_lib.define_generator_flags()
  flags.DEFINE_list(
    "labels",
    None,
    "Class indices, ranges and names, e.g. 3,5-7,tench; default: all. A name "
    "with a comma: '\"great white shark, white shark\"'. Classes called by "
    "numbers: index:3 or name:3.",
  )
  paths.define_flag(
    "conditions",
    None,
    "FILE.npz of an array 'conditions', for a generator of such: --count "
    "images of each, of one of --labels for all or one for each.",
  )
  flags.DEFINE_float("alpha", 1.0, "Guidance scale.")
  integer("seed", 0, "Of noise and style.", 0, options.MAX_SEED)
  flags.DEFINE_list(
    "style",
    None,
    "Style indices that all images share: one for all tokens, or one for each; "
    "-1 leaves one to chance; default: all of them.",
  )
  integer(
    "count", 10, "Images of each label or condition: a row of the grid.", 1
  )
  integer("batch_size", options.BATCH_SIZE, "Images at a time.", 1)
  integer("interpolate", None, "Frames of a walk between two noises, .gif.", 2)
  paths.define_flag(
    "out",
    "grid.png",
    "FILE.png, .jpg, .webp, .npz, .gif, or a folder. An existing file is "
    "overwritten, a folder goes on.",
  )
  config_lib.define_process_flags(waits=True)


def parse_style(values: list[str] | None) -> list[int] | None:
  """Style indices of the flag; ConfigError names the entry that is none."""
  with naming("--style"):
    return None if values is None else [int(value) for value in values]


def check_out(out: str, interpolate: int | None) -> str:
  """The suffix of a file, '' of a folder.

  Raises:
    ConfigError: a suffix that nothing here writes, or of something else than is
      asked for.
  """
  is_folder = os.path.isdir(out) or out.endswith("/")
  suffix = "" if is_folder else os.path.splitext(out)[1].lower()
  if suffix not in ("", *FILES):
    raise config_lib.ConfigError(
      f"--out={out}: {suffix!r} is none of {list(FILES)}; a folder ends in /"
    )
  if (suffix == ".gif") != (interpolate is not None):
    raise config_lib.ConfigError(
      f"--out={out} with --interpolate={interpolate}: a .gif is a walk of so "
      "many frames, and only a .gif is"
    )
  return suffix


def main(argv: list[str]) -> None:
  """Writes what the flags ask for."""
  values = flags.FLAGS
  source = config_lib.source()
  with programs.checking(argv):
    suffix = check_out(values.out, values.interpolate)
    style = parse_style(values.style)

  def program() -> None:
    from drift_jax.tools.work import sample as drawing

    drawing.draw(
      {
        "labels": values.labels,
        "conditions": values.conditions,
        "count": values.count,
        "alpha": values.alpha,
        "seed": values.seed,
        "style": style,
      },
      values.out,
      suffix,
      generator={
        "source": source,
        "vae": values.vae,
        "step": values.step,
        "ema_decay": values.ema_decay,
      },
      batch_size=values.batch_size,
      frames=values.interpolate,
    )

  programs.run(
    program,
    processes=config_lib.process_flags(),
    join_timeout=values.join_timeout,
  )


if __name__ == "__main__":
  define_flags()
  app.run(main, flags_parser=config_lib.parse_flags)
