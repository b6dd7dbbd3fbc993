"""Images from a generator: python -m drift_jax.sample --from=SOURCE ...

  python -m drift_jax.sample --from=runs/digits --labels=3,5-7 --alpha=1.5
  python -m drift_jax.sample --from=hf://NAME --vae=weights/vae \\
      --labels="golden retriever" --count=16 --out=dogs.png
  python -m drift_jax.sample --from=export --count=50 --out=samples/
  python -m drift_jax.sample --from=export --interpolate=24 --out=walk.gif

--out says what is written: a grid (.png, .jpg, .webp), all images in ADM's
format (.npz), a walk from one noise to another (.gif), or a folder of single
images, which an interrupted command continues.
"""

import os
from collections.abc import Sequence

from absl import app, flags

from drift_jax import config as config_lib
from drift_jax.system import options, paths, programs

FILES = (*options.PICTURES, ".npz", ".gif")


def define_flags() -> None:
  """Defines the flags: not on import, as other programs have the same names."""
  config_lib.define_source_flags()
  flags.DEFINE_list(
    "labels",
    None,
    "Class indices, ranges and names, e.g. 3,5-7,tench; all if not given. A "
    "name that holds a comma: '\"great white shark, white shark\"'. Classes "
    "that are called by numbers: index:3 or name:3.",
  )
  flags.DEFINE_float("alpha", 1.0, "Guidance scale.")
  flags.DEFINE_integer(
    "seed",
    0,
    "Of noise and style.",
    lower_bound=0,
    upper_bound=options.MAX_SEED,
  )
  flags.DEFINE_list(
    "style",
    None,
    "Style indices that all images share: one for all tokens, or one for each; "
    "-1 leaves one to chance, as all are if this is not given.",
  )
  flags.DEFINE_integer(
    "count", 10, "Images of each label: a row of the grid.", lower_bound=1
  )
  flags.DEFINE_integer(
    "batch_size",
    options.BATCH_SIZE,
    "Images at a time, on all devices.",
    lower_bound=1,
  )
  flags.DEFINE_integer(
    "interpolate",
    None,
    "Frames of a walk from one noise to another, there and back, as a .gif.",
    lower_bound=2,
  )
  paths.define_flag(
    "out",
    "grid.png",
    "FILE.png (or .jpg, .webp), FILE.npz, FILE.gif, or a folder for .png "
    "files.",
  )
  config_lib.define_process_flags(waits=True)


def parse_style(values: Sequence[str] | None) -> list[int] | None:
  """Style indices of the flag; ConfigError names the entry that is none."""
  if values is None:
    return None
  try:
    return [int(value) for value in values]
  except ValueError as error:
    raise config_lib.ConfigError(f"--style: {error}") from error


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
      f"--out={out} with --interpolate={interpolate}: a .gif is a walk of "
      "--interpolate=FRAMES, and only a .gif is"
    )
  return suffix


def main(argv: list[str]) -> None:
  """Writes what the flags ask for."""
  values = flags.FLAGS
  with programs.checking(argv):
    source = config_lib.source()
    suffix = check_out(values.out, values.interpolate)
    style = parse_style(values.style)

  def program() -> None:
    from drift_jax.tools.work import sample as drawing

    drawing.draw(
      drawing.Asked(
        values.labels, values.count, values.alpha, values.seed, style
      ),
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
