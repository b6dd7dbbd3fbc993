"""What each drifting field costs: loss and gradient of one feature key.

  python benchmarks/fields.py [--tiny] [--seconds=S] [--json=FILE]

Each row is the jitted loss with its gradient, three temperatures, on random
features; "plain" is the default field on the same features, in turns with it,
so that "times" above 1 is cheaper than the default. Shapes: one of the digits
generator (raw pixels), and one layer of a latent encoder on one label. The
second batch of sinkhorn, two batches, is given: what its generator costs is in
benchmarks/step.py's forward pass.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

if not __package__:
  # Python looks for a script's imports in the script's folder.
  sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from benchmarks import timing
from drift_jax import drift

# (name, labels x locations, channels, generated, positives, unconditional)
SHAPES = (
  ("digits, 16 x 64", 16, 64, 32, 96, 8),
  ("latent encoder, 64 locations x 512", 64, 512, 64, 64, 16),
)
TINY = (("tiny", 2, 8, 4, 6, 2),)
VARIANTS = {
  "mmd": drift.Variant(field="mmd"),
  "kl": drift.Variant(field="kl"),
  "gaussian": drift.Variant(field="gaussian"),
  "sharp": drift.Variant(field="sharp"),
  "sinkhorn, 10 iterations": drift.Variant(
    field="sinkhorn", options={"iterations": 10}
  ),
  "sinkhorn, 20 iterations, two batches, velocity guidance": drift.Variant(
    field="sinkhorn",
    options={"iterations": 20},
    negatives="independent",
    guidance="velocity",
  ),
  "softmax, adaptive temperature": drift.Variant(neighbours=4.0),
  "softmax, learned temperature": drift.Variant(learned=True),
  "softmax, diagnostics": drift.Variant(diagnostics=True),
}


def case(
  variant: drift.Variant, b: int, c: int, n: int, p: int, u: int
) -> timing.Case:
  """One loss with its gradient."""
  rng = np.random.default_rng(0)

  def normal(count: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=(b, count, c)), jnp.float32)

  x, pos, neg, other = normal(n), normal(p), normal(u), normal(n)
  independent = other if variant.negatives == "independent" else None

  @jax.jit
  def gradient(x: jax.Array) -> Any:
    def loss(x: jax.Array) -> Any:
      value, info = drift.drift_loss(
        x,
        pos,
        neg,
        weight_neg=jnp.full((b, u), 0.5),
        temperatures=(0.02, 0.05, 0.2),
        variant=variant,
        independent=independent,
      )
      return value.mean(), info

    return jax.grad(loss, has_aux=True)(x)

  return timing.Case(lambda: jax.block_until_ready(gradient(x)))


def main(argv: Sequence[str] | None = None) -> None:
  """Measures and prints."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--seconds", type=float, default=3.0)
  parser.add_argument("--json", type=timing.path, help="file to write")
  parser.add_argument(
    "--tiny", action="store_true", help="tiny sizes: shows that it runs"
  )
  flags = parser.parse_args(argv)
  report = timing.Report(0.01 if flags.tiny else flags.seconds)
  facts = timing.machine()
  for name, *sizes in TINY if flags.tiny else SHAPES:
    plain = case(drift.PAPER, *sizes)
    cases = {key: case(v, *sizes) for key, v in VARIANTS.items()}
    report.compare(name, "ms", 1, plain, cases)
  print(timing.in_words(facts), report.table(), sep="\n\n")
  if flags.json:
    flags.json.write_text(report.json(facts))


if __name__ == "__main__":
  main()
