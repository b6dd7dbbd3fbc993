"""drift-jax COMMAND [FLAG ...], or python -m drift_jax COMMAND [FLAG ...]

starts one of the programs below; drift-jax COMMAND --help lists its flags.
"""

import os
import sys

import drift_jax

# {name: (module, what it does)}.
COMMANDS = {
  "train": ("main", "Train what a config says, or go on with its run."),
  "sample": ("sample", "Draw images from a run, an export or hf:// weights."),
  "evaluate": ("evaluate", "Measure FID and the like of a run or of images."),
  "serve": ("serve", "Show a page on which to draw images."),
  "export": ("tools.export", "Write a generator that needs no drift_jax."),
  "check": ("tools.compile_check", "Will a config fit these TPUs or GPUs?"),
  "ablate": ("tools.ablate", "Run a table of the paper's ablations."),
  "cache_latents": ("tools.cache_latents", "Encode a data set once."),
  "convert_weights": ("tools.convert_weights", "Read published weights."),
  "policy_table": ("tools.policy_table", "Compare runs of robot control."),
  "reference_stats": ("tools.reference_stats", "Write statistics for FID."),
  "rollout": ("tools.rollout", "Let a policy act; draw its videos."),
  "table": ("tools.table", "Compare the figures of runs."),
  "toy_table": ("tools.toy_table", "Compare drifting fields on the toys."),
  "verify_released": ("tools.verify_released", "Judge the released weights."),
}


def usage() -> str:
  """The docstring, and a line for each command."""
  width = max(map(len, COMMANDS))
  lines = (f"  {name:{width}}  {text}" for name, (_, text) in COMMANDS.items())
  return "\n".join([f"usage: {__doc__}", *lines])


def main() -> None:
  """Becomes the process of the program that the first argument names."""
  name, *arguments = sys.argv[1:] or ["--help"]
  if name in ("-h", "--help", "help"):
    print(usage())
  elif name == "--version":
    print(f"drift_jax {drift_jax.__version__}")
  elif name not in COMMANDS:
    sys.exit(f"Error: command {name!r}: valid options are {list(COMMANDS)}")
  else:
    module = f"drift_jax.{COMMANDS[name][0]}"
    # As python -m does: its worker processes need the program as __main__.
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])


if __name__ == "__main__":
  main()
